"""FedYogi: Yogi at the coordinator."""

import numpy as np
from pydantic import Field

from coordinator.strategies.adaptive import AdaptiveOptimizer
from coordinator.strategies.base import Block


class FedYogi(AdaptiveOptimizer):
    """Step as FedAdam does, but let the second moment go down by no more than a small square at a time.

    So the steps do not grow suddenly when the changes become small.

    Source: Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295.
    """

    beta_2: float = Field(0.99, ge=0, lt=1)  # 1 less the squares' share

    def accumulate(self, second: Block, squares: Block) -> None:
        """Move the moment towards the squares, by a share of the squares themselves."""
        real = second.dtype.type
        direction = np.sign(second - squares)
        np.multiply(squares, real(1 - self.beta_2), out=squares)
        np.multiply(squares, direction, out=squares)
        np.subtract(second, squares, out=second)
