"""What a server optimizer is: FedAvg whose mean is not the new model, but says which way to step."""

from abc import abstractmethod
from typing import ClassVar

from coordinator.strategies.base import Block
from coordinator.strategies.fedavg import FedAvg


class ServerOptimizer(FedAvg):
    """Step from the round's model along the change that the mean of the updates makes, and remember moments of it.

    Source: Reddi et al., Adaptive Federated Optimization, arXiv 2003.00295, algorithm 2 (FedOpt).
    """

    state_names: ClassVar[tuple[str, ...]]  # of the tensors that are kept for each of the model's; zero at first

    @abstractmethod
    def step(self, current: Block, state: tuple[Block, ...], out: Block) -> None:
        """Turn the mean in `out` into the new model, and each array of `state` into the new state, in place.

        Element by element, and without a random number or a clock. `current` is the round's model; all arrays have
        the same shape and dtype.
        """
