"""FedAvgM: FedAvg with momentum at the coordinator."""

from typing import ClassVar

import numpy as np
from pydantic import Field

from coordinator.strategies.base import Block
from coordinator.strategies.optimizer import ServerOptimizer


class FedAvgM(ServerOptimizer):
    """Step along a decaying sum of the rounds' mean changes, which evens out what single rounds pull apart.

    With momentum 0.9, changes that agree add up to ten times a single one: lower server_learning_rate if it diverges.

    Source: Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification,
    arXiv 1909.06335.
    """

    state_names: ClassVar[tuple[str, ...]] = ("velocity",)

    server_learning_rate: float = Field(1.0, gt=0, allow_inf_nan=False)  # how far to step
    momentum: float = Field(0.9, ge=0, lt=1)  # what is kept of the sum so far

    def step(self, current: Block, state: tuple[Block, ...], out: Block) -> None:
        """Add the change to the decayed velocity and go along it."""
        real = out.dtype.type
        (velocity,) = state
        np.subtract(out, current, out=out)
        np.multiply(velocity, real(self.momentum), out=velocity)
        np.add(velocity, out, out=velocity)
        np.multiply(velocity, real(self.server_learning_rate), out=out)
        np.add(current, out, out=out)
