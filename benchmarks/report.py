"""Print what a benchmark has measured, with the machine it ran on."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))


def report(name: str, figures: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the figures: one JSON object for programs, lines for people."""
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
    if as_json:
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        print(json.dumps({"benchmark": name, **rounded, **machine}))
        return
    print(name)
    for key, value in rounded.items():
        print(f"  {key:28} {value}")
