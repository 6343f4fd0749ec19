"""Draw accuracy.png; run in a process of its own, for the coordinator needs no matplotlib.

    python -m coordinator.demo.chart chart.json accuracy.png

where chart.json is {"rounds": […], "federated": […], "centralized": …, "local_only": …, "title": …}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator


def draw(values: dict[str, Any], path: Path) -> None:
    """Draw federated accuracy by round, with centralized and local-only accuracy as lines to compare with."""
    mpl.use("Agg")  # no display is needed
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.axhline(values["centralized"], color="#2a9d8f", linestyle="--", label="centralized: all digits in one place")
    axes.plot(values["rounds"], values["federated"], color="#1d3557", marker="o", markersize=4, label="federated")
    axes.axhline(values["local_only"], color="#e76f51", linestyle=":", label="local only: mean of the sites alone")
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy on the held-out digits")
    axes.set_ylim(0, 1)
    axes.set_title(values["title"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]))
