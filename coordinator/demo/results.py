"""What a demonstration leaves behind: a summary, a table of every round and site, and whether it is good enough."""

import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.demo.edges import Share
from coordinator.parts import Part
from coordinator.progress import JobProgress
from coordinator.rounds import Round
from coordinator.states import RoundKind, RoundState

EVERY_SITE = "all"  # in the column `site`: the round as a whole, metrics weighted by examples

LEAST_ACCURACY = 0.93  # that federated training must reach on the held-out digits
LARGEST_GAP = 0.03  # by which it may stay below centralized training


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The demonstration in numbers; every one of them is measured in the run. This is summary.json."""

    sites: int
    edges: int  # between the coordinator and the sites; 0 if there are none
    rounds: int  # training rounds
    federated_accuracy: float  # of the final global model, on the held-out digits that no site has seen
    centralized_accuracy: float  # of the same network trained on all sites' digits together, on the same digits
    local_only_accuracy_mean: float  # of one network for each site, trained on its digits alone, on the same digits
    seconds_total: float  # from the first step to the last, start and stop of every process included
    seconds_per_round_median: float  # of a training round, from its plan to its new global model
    seconds_per_test_round_median: float
    seconds_to_start: float  # until broker, coordinator and every site answered
    seconds_federated: float  # from the job's submission to its end
    alpha: float  # of the Dirichlet distribution that split the digits
    seed: int
    job_id: str
    shares: tuple[Share, ...]  # of each edge and its sites; empty if there are none


def shortcomings(summary: Summary) -> list[str]:
    """Return in what the demonstration of the default size is not as good as promised; empty if it is."""
    found = []
    if summary.federated_accuracy < LEAST_ACCURACY:
        found.append(f"federated accuracy is {summary.federated_accuracy:.3f}, below {LEAST_ACCURACY}")
    gap = summary.centralized_accuracy - summary.federated_accuracy
    if gap > LARGEST_GAP:
        found.append(f"federated accuracy is {gap:.3f} below centralized accuracy, more than {LARGEST_GAP}")
    return found


def median_seconds(progress: JobProgress, kind: RoundKind) -> float:
    """Return the median time from plan to close of the rounds of a kind, in seconds."""
    times = [
        (round_.closed_at - round_.created_at).total_seconds()
        for round_ in progress.rounds
        if round_.kind is kind and round_.state is RoundState.CLOSED and round_.closed_at is not None
    ]
    return statistics.median(times) if times else 0.0


def write_metrics(path: Path, progress: JobProgress, parts: Mapping[str, Sequence[Part]]) -> None:
    """Write one row for each round as a whole (site "all") and one for each site's part of it.

    `parts` has the parts of each round, by round id. A cell is empty where there is no such value; a site's seconds go
    from the round's plan to its answer.
    """
    rounds = [round_ for round_ in progress.rounds if round_.kind is not RoundKind.START]
    names = sorted(
        {name for round_ in rounds for name in round_.metrics}
        | {name for each in parts.values() for part in each for name in part.metrics}
    )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["round", "kind", "site", "state", "num_examples", "seconds", *names])
        for round_ in rounds:
            writer.writerows(_rows(round_, parts.get(round_.round_id, ()), names))


def _rows(round_: Round, parts: Sequence[Part], names: Sequence[str]) -> Iterator[list[object]]:
    total = sum(part.num_examples or 0 for part in parts)
    ended = round_.closed_at or round_.created_at
    seconds = (ended - round_.created_at).total_seconds()
    metrics: Mapping[str, float | None] = dict(round_.metrics)
    yield _row(round_, EVERY_SITE, str(round_.state), total, seconds, metrics, names)
    for part in parts:
        answered = (part.answered_at - round_.created_at).total_seconds() if part.answered_at else None
        yield _row(round_, part.site, str(part.state), part.num_examples, answered, part.metrics, names)


def _row(
    round_: Round,
    site: str,
    state: str,
    num_examples: int | None,
    seconds: float | None,
    metrics: Mapping[str, float | None],
    names: Sequence[str],
) -> list[object]:
    cells: list[object] = [round_.number, str(round_.kind), site, state, num_examples]
    cells.append(None if seconds is None else f"{seconds:.4f}")
    return cells + [metrics.get(name) for name in names]
