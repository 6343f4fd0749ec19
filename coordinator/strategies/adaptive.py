"""What the adaptive server optimizers share: a step for each coordinate, long where its changes have been small."""

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from pydantic import Field

from coordinator.strategies.base import Block
from coordinator.strategies.optimizer import ServerOptimizer


class AdaptiveOptimizer(ServerOptimizer):
    """Step by server_learning_rate times first / (sqrt(second) + tau), of the change's two moments.

    Both begin at zero, and neither is corrected for that.
    """

    state_names: ClassVar[tuple[str, ...]] = ("first", "second")

    server_learning_rate: float = Field(0.1, gt=0, allow_inf_nan=False)  # how far to step
    beta_1: float = Field(0.9, ge=0, lt=1)  # what is kept of the first moment
    tau: float = Field(1e-3, ge=1e-12, allow_inf_nan=False)  # bounds the step where changes are small

    def step(self, current: Block, state: tuple[Block, ...], out: Block) -> None:
        """Bring both moments up to date and go along the first, measured by the second."""
        real = out.dtype.type
        first, second = state
        np.subtract(out, current, out=out)
        np.multiply(first, real(self.beta_1), out=first)
        np.add(first, out * real(1 - self.beta_1), out=first)
        np.square(out, out=out)
        self.accumulate(second, out)
        np.sqrt(second, out=out)
        np.add(out, real(self.tau), out=out)
        np.divide(first, out, out=out)
        np.multiply(out, real(self.server_learning_rate), out=out)
        np.add(current, out, out=out)

    @abstractmethod
    def accumulate(self, second: Block, squares: Block) -> None:
        """Bring the second moment up to date, in place, with the squares of the change, which may be altered."""
