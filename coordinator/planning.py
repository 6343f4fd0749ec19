"""Decide what a job does next. The decision is pure; it is recorded with what ends the last step."""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection

from common.queues import Kind
from coordinator.jobs import LIVE, Job, JobState, change_job, end_job
from coordinator.outbox import add_notices
from coordinator.rounds import Round, RoundKind, add_round
from store.parties import sites as enrolled_sites
from store.tables import utc_now


@dataclass(frozen=True, kw_only=True)
class Step:
    """A round to be planned."""

    kind: RoundKind
    number: int


def next_step(job: Job, last: Step | None) -> Step | None:
    """Return the step after the last that was closed; None when the job is done.

    start → train 1 → test 1 → train 2 → … → train n → test n → swag

    A job of no training rounds builds a model, or takes the given one, and may test it: start → test 0 → swag.
    """
    spec = job.spec
    if last is None:
        return Step(kind=RoundKind.START, number=0)
    if last.kind is RoundKind.START and job.model_id is None:  # the site that was to build the first model did not
        return Step(kind=RoundKind.START, number=last.number + 1)
    if last.kind is RoundKind.SWAG:
        return None
    trained = 0 if last.kind is RoundKind.START else last.number  # a start's number counts the attempts to build
    may_test = last.kind is RoundKind.TRAIN or (last.kind is RoundKind.START and spec.rounds == 0)
    if may_test and is_tested(job, trained):
        return Step(kind=RoundKind.TEST, number=trained)
    if trained < spec.rounds:
        return Step(kind=RoundKind.TRAIN, number=trained + 1)
    return Step(kind=RoundKind.SWAG, number=trained) if spec.swag else None


def is_tested(job: Job, number: int) -> bool:
    """Return whether a test round follows the training round: every so many, and the last."""
    every = job.spec.test_every
    return every > 0 and (number % every == 0 or number == job.spec.rounds)


def choose_sites(job: Job, *, enabled: frozenset[str], alive: frozenset[str]) -> tuple[str, ...]:
    """Return whom to ask: those that are alive, or, when they are too few for a quorum, all that may come back.

    A queue keeps its messages, so a site that is away may still answer before the deadline.
    """
    members = tuple(site for site in job.sites if site in enabled)
    present = tuple(site for site in members if site in alive)
    return present if len(present) >= job.quorum else members


def plan_next(connection: Connection, job: Job, last: Step | None, *, alive: frozenset[str]) -> Round | None:
    """Record the job's next round, or its end; return the round if there is one. Repeating it changes nothing."""
    step = next_step(job, last)
    if step is None:
        finish(connection, job, JobState.COMPLETED)
        return None
    if step.kind is RoundKind.START and step.number >= max(len(job.sites), 1):
        finish(
            connection, job, JobState.FAILED, "No site could build the first model; the sites' reasons are in the log."
        )
        return None
    enabled = frozenset(party.site for party in enrolled_sites(connection, enabled=True) if party.site)
    chosen = choose_sites(job, enabled=enabled, alive=alive)
    if len(chosen) < job.quorum:
        reason = f"Only {len(chosen)} of the job's sites are left and enabled, but its quorum is {job.quorum}."
        finish(connection, job, JobState.FAILED, reason)
        return None
    now = utc_now()
    round_ = Round(
        job_id=job.job_id,
        kind=step.kind,
        number=step.number,
        input_model_id=job.model_id,
        deadline_at=now + timedelta(seconds=_deadline_seconds(job, step)),
        created_at=now,
    )
    values: dict[str, object] = {"state": JobState.RUNNING.value}
    if last is None:
        values["started_at"] = now
    if step.kind is RoundKind.TRAIN:
        values["current_round"] = step.number
    if not change_job(connection, job.job_id, expected=LIVE, **values):
        return None
    return round_ if add_round(connection, round_, chosen) else None


def _deadline_seconds(job: Job, step: Step) -> float:
    if step.kind is RoundKind.START and job.spec.start_deadline_seconds is not None:
        return job.spec.start_deadline_seconds
    return job.spec.round_deadline_seconds


def finish(connection: Connection, job: Job, state: JobState, reason: str = "") -> bool:
    """End the job and tell its sites; return False if it had ended before."""
    if not end_job(connection, job.job_id, state, reason):
        return False
    add_notices(connection, Kind.TRAINING_FINISHED, job.job_id, job.spec.sites or job.sites, reason)
    return True
