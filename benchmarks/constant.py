"""The benchmarks' trainer: it only adds a constant of the site's own, so that no two updates are equal."""

import hashlib
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.trainer import Evaluation, Fit, RoundContext, Tensors, Trainer

NUM_TENSORS = 8


class ConstantTrainer(Trainer):
    """Hold `megabytes` (config, of 10^6 bytes) of float32 in eight tensors, and add a constant to each of them.

    That takes as many `seconds` (config) as are given.
    """

    def build(self) -> Tensors:
        """Return zeros."""
        config = self.context.config
        elements = int(float(str(config.get("megabytes", 0.1))) * 1e6) // 4 // NUM_TENSORS
        return {f"t{number}": np.zeros(elements, np.float32) for number in range(NUM_TENSORS)}

    def fit(self, tensors: Tensors, step: RoundContext) -> Fit:
        """Add the constant."""
        time.sleep(float(str(self.context.config.get("seconds", 0))))
        constant = np.float32(int.from_bytes(hashlib.sha256(self.context.site.encode()).digest()[:2], "big") / 2**16)
        return Fit(tensors={name: _add(tensor, constant) for name, tensor in tensors.items()}, num_examples=1)

    def evaluate(self, tensors: Tensors, step: RoundContext) -> Evaluation:
        """Return the first value."""
        return Evaluation(num_examples=1, metrics={"first": float(tensors["t0"][0])})

    def num_examples(self) -> int:
        """Return one."""
        return 1


def _add(tensor: NDArray[Any], constant: np.float32) -> NDArray[Any]:
    return tensor + constant
