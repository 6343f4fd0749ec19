"""A trainer for sites that are disturbed while they train, and for large models."""

import time
from pathlib import Path

import numpy as np

from benchmarks.constant import NUM_TENSORS, ConstantTrainer
from worker.trainer import Fit, RoundContext, Tensors


class SlowTrainer(ConstantTrainer):
    """Do as ConstantTrainer does, but take `seconds` (config), and note in `notes` (config, a folder) that it began.

    The `megabytes` (config, of 10^6 bytes) are in `tensors` (config) tensors.
    """

    def build(self) -> Tensors:
        """Return zeros."""
        config = self.context.config
        count = int(str(config.get("tensors", NUM_TENSORS)))
        elements = int(float(str(config.get("megabytes", 0.1))) * 1e6) // 4 // count
        return {f"t{number}": np.zeros(elements, np.float32) for number in range(count)}

    def fit(self, tensors: Tensors, step: RoundContext) -> Fit:
        """Note the round, take the time, and add the constant."""
        config = self.context.config
        if notes := str(config.get("notes", "")):
            with (Path(notes) / f"{self.context.site}.began").open("a") as file:
                file.write(f"{self.context.job_id} {step.round}\n")
        end = time.monotonic() + float(str(config.get("seconds", 0.2)))
        while time.monotonic() < end:
            step.report(0.5, "taking its time")
            time.sleep(0.01)
        return super().fit(tensors, step)
