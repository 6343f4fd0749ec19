"""The strategies by name. A new one is one file, one class with a link to its paper, and one line here."""

from typing import Any

from pydantic import ValidationError

from common.errors import InvalidInput
from coordinator.strategies.base import Strategy
from coordinator.strategies.fedadagrad import FedAdagrad
from coordinator.strategies.fedadam import FedAdam
from coordinator.strategies.fedavg import FedAvg
from coordinator.strategies.fedavgm import FedAvgM
from coordinator.strategies.fedmedian import FedMedian
from coordinator.strategies.fedprox import FedProx
from coordinator.strategies.fedyogi import FedYogi

STRATEGIES: dict[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "fedmedian": FedMedian,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}


def make_strategy(name: str, options: dict[str, Any]) -> Strategy:
    """Return the strategy; raise InvalidInput for an unknown name or option."""
    if (strategy := STRATEGIES.get(name)) is None:
        raise InvalidInput(f"strategy.name: there is no strategy {name!r}; there are {', '.join(STRATEGIES)}.")
    try:
        return strategy(**options)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise InvalidInput(f"strategy.{field}: {problem['msg']}.") from error
