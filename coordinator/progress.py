"""See how far a job is: what the operator's tables and bars show."""

from dataclasses import dataclass

from sqlalchemy import Connection

from coordinator.jobs import LIVE, Job, find_job
from coordinator.parts import Part, find_parts
from coordinator.rounds import Round, find_rounds
from coordinator.services import Services
from coordinator.states import RoundKind, RoundState
from store.database import reading

ENDED = (RoundState.CLOSED, RoundState.FAILED, RoundState.ABORTED)  # such a round does not change any more


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


def job_progress(services: Services, job_id: str, since: JobProgress | None = None) -> JobProgress:
    """Return how far the job is; raise NotFound.

    With what it was before, of a job that goes on only those rounds are read that can have changed since then.
    """
    with reading(services.engine) as connection:
        job = find_job(connection, job_id)
        if since is None or since.job.job_id != job.job_id or job.state not in LIVE:
            rounds = tuple(find_rounds(connection, job.job_id))
        else:
            rounds = _rounds_since(connection, since)
        parts = tuple(find_parts(connection, rounds[-1].round_id)) if rounds else ()
    return JobProgress(job=job, rounds=rounds, parts=parts)


def _rounds_since(connection: Connection, since: JobProgress) -> tuple[Round, ...]:
    """Return the rounds that had ended by then as they were, and those from the first that had not as they are."""
    going_on = next((round_ for round_ in since.rounds if round_.state not in ENDED), since.newest)
    if going_on is None or going_on.kind is RoundKind.START:
        return tuple(find_rounds(connection, since.job.job_id))
    kept = [each for each in since.rounds if each.kind is RoundKind.START or each.number < going_on.number]
    return (*kept, *find_rounds(connection, since.job.job_id, number_from=going_on.number))
