"""Jobs: what is trained, by whom, and how far it is. State changes by compare-and-set; terminal states absorb."""

import uuid
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, exc, select, update

from common.errors import NotFound
from coordinator.jobfile import JobSpec
from store.tables import jobs, utc_now


class JobState(StrEnum):
    """Where a job is."""

    SUBMITTED = "submitted"  # recorded; its first round is not planned yet
    RUNNING = "running"
    COMPLETED = "completed"  # terminal: every round is done
    FAILED = "failed"  # terminal: the reason says why
    ABORTED = "aborted"  # terminal: somebody ended it


LIVE = (JobState.SUBMITTED, JobState.RUNNING)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of federated training."""

    job_id: str  # uuid4
    name: str
    state: JobState
    spec: JobSpec  # what the job file said
    reason: str  # why it failed or was aborted, else empty
    current_round: int  # the newest training round that was planned, from 1
    model_id: str | None  # the current global model
    sites: tuple[str, ...]  # who is in the job now, sorted
    submitted_by: str
    submission_key: str | None  # the submitter's own name for it; the same again is the same job
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def quorum(self) -> int:
        """Return how many sites must answer for a round to count."""
        return self.spec.quorum(len(self.spec.sites or self.sites))

    @property
    def all_sites(self) -> tuple[str, ...]:
        """Return every site that is in the job, or was at its beginning."""
        return tuple(sorted({*(self.spec.sites or ()), *self.sites}))

    @property
    def target(self) -> int | None:
        """Return with how many updates a training round is full; None if it waits for everyone's."""
        rules = self.spec.participation
        return rules.target(len(self.sites)) if rules.has_target else None

    @property
    def model_store(self) -> str:
        """Return the name of the model store that holds the job's models."""
        return f"ddc:{self.name}"


def new_job(
    spec: JobSpec,
    *,
    sites: tuple[str, ...],
    model_id: str | None,
    submitted_by: str,
    submission_key: str | None = None,
) -> Job:
    """Return a job to be added."""
    return Job(
        job_id=str(uuid.uuid4()),
        name=spec.name,
        state=JobState.SUBMITTED,
        spec=spec.model_copy(update={"sites": sites}),
        reason="",
        current_round=0,
        model_id=model_id,
        sites=sites,
        submitted_by=submitted_by,
        submission_key=submission_key,
        created_at=utc_now(),
        started_at=None,
        finished_at=None,
    )


def add_job(connection: Connection, job: Job) -> Job:
    """Record the job and return it; of jobs with the same submission key the first one stays and is returned."""
    known = find_submission(connection, job.submission_key)
    if known is not None:
        return known
    try:
        with connection.begin_nested():  # so that the caller's transaction survives a race that we lose
            connection.execute(
                jobs.insert().values(
                    job_id=job.job_id,
                    name=job.name,
                    state=job.state.value,
                    spec=job.spec.model_dump(mode="json"),
                    num_rounds=job.spec.rounds,
                    model_id=job.model_id,
                    sites=list(job.sites),
                    submitted_by=job.submitted_by,
                    submission_key=job.submission_key,
                    created_at=job.created_at,
                )
            )
    except exc.IntegrityError:
        if (known := find_submission(connection, job.submission_key)) is None:
            raise
        return known
    return job


def find_submission(connection: Connection, key: str | None) -> Job | None:
    """Return the job that was submitted with the key; None if there is none, or no key."""
    if key is None:
        return None
    row = connection.execute(select(jobs).where(jobs.c.submission_key == key)).mappings().first()
    return None if row is None else job_of(row)


_JOB = select(jobs).where(jobs.c.job_id == bindparam("job_id"))  # built once: that takes longer than to run it


def get_job(connection: Connection, job_id: str) -> Job:
    """Return the job; raise NotFound."""
    row = connection.execute(_JOB, {"job_id": job_id}).mappings().first()
    if row is None:
        raise NotFound(f"There is no job {job_id!r}; `fedchord jobs` lists them.")
    return job_of(row)


_LOCK = select(jobs.c.job_id).where(jobs.c.job_id == bindparam("job_id")).with_for_update()


def lock_job(connection: Connection, job_id: str) -> None:
    """Keep other writers from the job until the transaction ends.

    Who changes a job and its rounds takes the job first: two that did so in different orders would wait for each other
    for ever on PostgreSQL. On SQLite there is one writer at a time in any case.
    """
    connection.execute(_LOCK, {"job_id": job_id})


def find_job(connection: Connection, beginning: str) -> Job:
    """Return the job whose id is, or begins with, the text; raise NotFound unless there is exactly one."""
    query = select(jobs).where(jobs.c.job_id.startswith(beginning, autoescape=True)).limit(2)
    rows = connection.execute(query).mappings().all()
    if len(rows) != 1 or not beginning:
        trouble = "More than one job has an id that begins" if rows else "There is no job whose id begins"
        raise NotFound(f"{trouble} with {beginning!r}; `fedchord jobs` lists them.")
    return job_of(rows[0])


def find_jobs(connection: Connection, *, states: tuple[JobState, ...] = (), limit: int | None = None) -> list[Job]:
    """Return the jobs in these states (all if none is given), the newest first."""
    query = select(jobs).order_by(jobs.c.created_at.desc()).limit(limit)
    if states:
        query = query.where(jobs.c.state.in_([state.value for state in states]))
    return [job_of(row) for row in connection.execute(query).mappings()]


def change_job(connection: Connection, job_id: str, *, expected: tuple[JobState, ...], **values: Any) -> bool:
    """Change the job if its state is one of the expected; return whether it was."""
    result = connection.execute(
        update(jobs)
        .where(jobs.c.job_id == job_id, jobs.c.state.in_([state.value for state in expected]))
        .values(**values, updated_at=utc_now())
    )
    return result.rowcount == 1


def end_job(connection: Connection, job_id: str, state: JobState, reason: str = "") -> bool:
    """Move the job to a terminal state unless it is in one; return whether it was moved."""
    return change_job(connection, job_id, expected=LIVE, state=state.value, reason=reason, finished_at=utc_now())


def job_of(row: RowMapping) -> Job:
    """Return the job in a row that has the columns of its table."""
    return Job(
        job_id=row[jobs.c.job_id],
        name=row[jobs.c.name],
        state=JobState(row[jobs.c.state]),
        spec=JobSpec.model_validate(row[jobs.c.spec]),
        reason=row[jobs.c.reason],
        current_round=row[jobs.c.current_round],
        model_id=row[jobs.c.model_id],
        sites=tuple(row[jobs.c.sites]),
        submitted_by=row[jobs.c.submitted_by],
        submission_key=row[jobs.c.submission_key],
        created_at=row[jobs.c.created_at],
        started_at=row[jobs.c.started_at],
        finished_at=row[jobs.c.finished_at],
    )
