"""See how far a job is: what the operator's tables and bars show."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from coordinator.jobs import Job, find_job
from coordinator.rounds import Part, Round, RoundKind, RoundState, find_parts, find_rounds
from coordinator.services import Services
from store.database import reading


@dataclass(frozen=True, kw_only=True)
class JobProgress:
    """A job, its rounds, and the parts of the newest round."""

    job: Job
    rounds: tuple[Round, ...]  # as they were planned
    parts: tuple[Part, ...]  # of the newest round

    @property
    def rounds_done(self) -> int:
        """Return how many training rounds are closed."""
        return len(self._closed(RoundKind.TRAIN))

    @property
    def newest(self) -> Round | None:
        """Return the round that was planned last."""
        return self.rounds[-1] if self.rounds else None

    def metric(self, name: str) -> tuple[tuple[int, float], ...]:
        """Return (training round, value) for each test round that measured it."""
        return tuple(
            (round_.number, round_.metrics[name]) for round_ in self._closed(RoundKind.TEST) if name in round_.metrics
        )

    def round_seconds(self) -> tuple[float, ...]:
        """Return how long each closed training round took, from plan to close, in seconds."""
        return tuple(
            (round_.closed_at - round_.created_at).total_seconds()
            for round_ in self._closed(RoundKind.TRAIN)
            if round_.closed_at is not None
        )

    def _closed(self, kind: RoundKind) -> list[Round]:
        return [round_ for round_ in self.rounds if round_.kind is kind and round_.state is RoundState.CLOSED]


def job_progress(services: Services, job_id: str) -> JobProgress:
    """Return how far the job is; raise NotFound."""
    with reading(services.engine) as connection:
        job = find_job(connection, job_id)
        return _progress(connection, job)


def _progress(connection: Connection, job: Job) -> JobProgress:
    rounds = tuple(find_rounds(connection, job.job_id))
    parts = tuple(find_parts(connection, rounds[-1].round_id)) if rounds else ()
    return JobProgress(job=job, rounds=rounds, parts=parts)


def site_metrics(services: Services, round_id: str) -> Mapping[str, Mapping[str, float | None]]:
    """Return each site's own metrics of a round."""
    with reading(services.engine) as connection:
        return {part.site: part.metrics for part in find_parts(connection, round_id)}
