"""FedAvg: the mean of the updates, weighted by examples."""

from collections.abc import Iterable

import numpy as np

from coordinator.strategies.base import Block, Strategy


class FedAvg(Strategy):
    """Average the updates, each weighted by its share of the examples.

    Source: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data,
    arXiv 1602.05629.
    """

    def combine(self, blocks: Iterable[Block], weights: tuple[float, ...], out: Block) -> None:
        """Write the weighted mean: multiply and add in place, with no array of the update's size."""
        out.fill(0)
        for block, weight in zip(blocks, weights, strict=True):
            np.multiply(block, out.dtype.type(weight), out=block)
            np.add(out, block, out=out)
