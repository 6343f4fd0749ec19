"""FedMedian: the median of each coordinate, which a minority of bad updates cannot move far."""

from collections.abc import Iterable

import numpy as np

from coordinator.strategies.base import Block, Strategy


class FedMedian(Strategy):
    """Take the median of each coordinate; examples do not count, so that nobody can claim to have many.

    Source: Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, arXiv 1803.01498.
    """

    def combine(self, blocks: Iterable[Block], weights: tuple[float, ...], out: Block) -> None:
        """Write the median over one block of every update; holds as many blocks as there are updates."""
        np.median(np.stack([block.copy() for block in blocks]), axis=0, out=out, overwrite_input=True)
