"""Which of a round's updates stand out, by what the gate has recorded, and how many good ones that leaves."""

from collections.abc import Sequence

from sqlalchemy import Connection

from coordinator.jobs import Job
from coordinator.norms import find_outliers
from coordinator.parts import Part, count_good, find_good
from coordinator.states import PartState


def outliers(job: Job, parts: Sequence[Part]) -> dict[str, str]:
    """Return why an update must not be aggregated, by the task id of its part.

    It is found from what the gate has recorded, so that whoever takes the round up after a crash finds the same.
    """
    distances = {
        part.task_id: (part.update_norm, part.global_norm or 0.0)
        for part in parts
        if part.state in (PartState.ACCEPTED, PartState.KEPT) and part.update_norm is not None and not part.released
    }
    return find_outliers(distances, job.spec.gate.outlier_score)


def has_good(connection: Connection, job: Job, round_id: str, wanted: int) -> bool:
    """Return whether the round has so many updates, its own and kept ones, without those that stand out by now."""
    if count_good(connection, job.job_id, round_id) < wanted:
        return False
    good = find_good(connection, job.job_id, round_id)
    return len(good) - len(outliers(job, good)) >= wanted
