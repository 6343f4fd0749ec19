"""FedAdam: Adam at the coordinator."""

import numpy as np
from pydantic import Field

from coordinator.strategies.adaptive import AdaptiveOptimizer
from coordinator.strategies.base import Block


class FedAdam(AdaptiveOptimizer):
    """Step by the first moment of the rounds' mean changes, divided by the root of a decaying mean of their squares.

    Source: Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295.
    """

    beta_2: float = Field(0.99, ge=0, lt=1)  # what is kept of the second moment

    def accumulate(self, second: Block, squares: Block) -> None:
        """Decay the moment and add the squares' share."""
        real = second.dtype.type
        np.multiply(second, real(self.beta_2), out=second)
        np.multiply(squares, real(1 - self.beta_2), out=squares)
        np.add(second, squares, out=second)
