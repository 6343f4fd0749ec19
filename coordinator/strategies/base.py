"""What a strategy is: how a round's updates become the new global model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Block: TypeAlias = NDArray[np.floating[Any]]  # shape (elements,): a piece of one tensor, float32 or float64


class Strategy(BaseModel, ABC):
    """A strategy and its options; the options' names and defaults are its fields.

    `combine` is a pure function. It sees one piece of one tensor at a time, so that memory does not grow with the
    model, and takes the updates in the order of their sites' names, so that the result is the same to the bit
    whatever order they arrived in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    is_weighted: ClassVar[bool] = True  # whether `combine` heeds the weights; if not, a stale update counts in full

    @abstractmethod
    def combine(self, blocks: Iterable[Block], weights: tuple[float, ...], out: Block) -> None:
        """Write the combination of the updates' blocks to `out`.

        `blocks` yields one array of out's shape and dtype for each weight; it is overwritten when the next is taken,
        and may be altered. `weights` add up to 1: they are the sites' shares of all examples, and what a discount has
        taken from stale updates is the weight of the round's own model, which then comes last.
        """

    def trainer_config(self) -> dict[str, Any]:
        """Return what the strategy asks of the sites' trainers, added to the job's own config."""
        return {}
