"""Trainers for sites that are disturbed while they train."""

import time
from pathlib import Path

from benchmarks.constant import ConstantTrainer
from worker.trainer import Fit, RoundContext, Tensors


class SlowTrainer(ConstantTrainer):
    """Do as ConstantTrainer does, but take `seconds` (config), and note in `notes` (config, a folder) that it began."""

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
