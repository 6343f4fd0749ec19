"""FedMedian: the median of each coordinate, which a minority of bad updates cannot move far."""

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from coordinator.strategies.base import Block, Strategy


class FedMedian(Strategy):
    """Take the median of each coordinate; examples do not count, so that nobody can claim to have many.

    A stale update counts as much as any other: what it changes, added to the round's model, is one more candidate.

    Source: Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, arXiv 1803.01498.
    """

    is_weighted: ClassVar[bool] = False

    def combine(self, blocks: Iterable[Block], weights: tuple[float, ...], out: Block) -> None:
        """Write the median over one block of every update; holds as many blocks as there are updates."""
        np.median(np.stack([block.copy() for block in blocks]), axis=0, out=out, overwrite_input=True)
