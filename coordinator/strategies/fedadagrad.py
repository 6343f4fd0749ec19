"""FedAdagrad: Adagrad at the coordinator."""

import numpy as np
from pydantic import Field

from coordinator.strategies.adaptive import AdaptiveOptimizer
from coordinator.strategies.base import Block


class FedAdagrad(AdaptiveOptimizer):
    """Step by the rounds' mean change, divided by the root of the sum of all squares so far: ever shorter steps.

    Source: Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295.
    """

    beta_1: float = Field(0.0, ge=0, lt=1)  # what is kept of the first moment

    def accumulate(self, second: Block, squares: Block) -> None:
        """Add the squares."""
        np.add(second, squares, out=second)
