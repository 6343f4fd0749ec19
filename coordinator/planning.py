"""Decide what a job does next. The decision is pure; it is recorded with what ends the last step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import MappingProxyType

from sqlalchemy import Connection

from common.errors import InvalidSettings
from common.heartbeats import Heartbeat
from common.queues import Kind
from coordinator.choosing import candidates, choose
from coordinator.jobs import LIVE, Job, JobState, change_job, end_job
from coordinator.members import find_members
from coordinator.outbox import add_notices
from coordinator.parts import Part, drop_stale, end_parts, find_in
from coordinator.rounds import Round, add_round
from coordinator.states import PartState, RoundKind
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


def plan_next(
    connection: Connection,
    job: Job,
    last: Step | None,
    *,
    alive: Mapping[str, Heartbeat],
    choosers: Mapping[str, str] = MappingProxyType({}),
) -> Round | None:
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
    job = _let_join(connection, job, enabled, alive)
    left = sum(site in enabled for site in job.sites)
    if left < job.quorum:
        reason = f"Only {left} of the job's sites are left and enabled, but its quorum is {job.quorum}."
        finish(connection, job, JobState.FAILED, reason)
        return None
    try:
        chosen = _choose(connection, job, step, enabled, alive, choosers)
    except InvalidSettings as error:
        finish(connection, job, JobState.FAILED, f"The sites of {step.kind} {step.number} cannot be chosen: {error}")
        return None
    now = utc_now()
    seconds = job.spec.deadline_seconds(start=step.kind is RoundKind.START)
    round_ = Round(
        job_id=job.job_id,
        kind=step.kind,
        number=step.number,
        input_model_id=job.model_id,
        deadline_at=now + timedelta(seconds=seconds),
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


def gives_up_at(job: Job, round_: Round) -> datetime:
    """Return until when an answer to the round may count, at the most."""
    is_start, is_train = round_.kind is RoundKind.START, round_.kind is RoundKind.TRAIN
    return round_.created_at + timedelta(seconds=job.spec.longest_seconds(start=is_start, train=is_train))


def keeps_late(job: Job, round_: Round) -> bool:
    """Return whether an answer that misses the round may count in a later one."""
    return (
        job.spec.late.policy == "keep" and round_.kind is RoundKind.TRAIN and round_.number < job.spec.rounds
    )  # after the last one there is none


def let_stale_go(connection: Connection, job: Job, last: Step) -> tuple[Part, ...]:
    """Drop the late and kept answers that can count in no round after the last; return those that are still owed."""
    if job.spec.late.policy != "keep" or last.kind is not RoundKind.TRAIN:
        return ()
    if last.number >= job.spec.rounds:
        return drop_stale(connection, job.job_id, last.number + 1, "no training round is left for it to count in")
    oldest = last.number + 1 - job.spec.late.max_staleness
    return drop_stale(connection, job.job_id, oldest, "its model is more rounds old than max_staleness allows")


def finish(connection: Connection, job: Job, state: JobState, reason: str = "") -> bool:
    """End the job and tell its sites; return False if it had ended before."""
    if not end_job(connection, job.job_id, state, reason):
        return False
    end_parts(connection, job.job_id, (PartState.LATE, PartState.KEPT), "the job has ended")
    add_notices(connection, Kind.TRAINING_FINISHED, job.job_id, job.all_sites, reason)
    return True


def _choose(
    connection: Connection,
    job: Job,
    step: Step,
    enabled: frozenset[str],
    alive: Mapping[str, Heartbeat],
    choosers: Mapping[str, str],
) -> tuple[str, ...]:
    """Return whom the step's round asks."""
    busy: list[str] = []
    if job.spec.late.policy == "keep":
        busy = [part.site for part in find_in(connection, (PartState.LATE,), job_id=job.job_id)]
    now = utc_now()
    paused = [site for site, member in find_members(connection, job.job_id).items() if member.is_paused(now)]
    found = candidates(job, enabled=enabled, alive=alive, paused=paused, busy=busy)
    if step.kind is not RoundKind.TRAIN:
        return tuple(each.site for each in found)
    return choose(job, step.number, found, choosers)


def _let_join(connection: Connection, job: Job, enabled: frozenset[str], alive: Mapping[str, Heartbeat]) -> Job:
    """Take sites into the job that were enrolled or enabled since, if it is open to them and they have its trainer."""
    if not job.spec.participation.join:
        return job
    known = find_members(connection, job.job_id)
    new = [
        site
        for site, heartbeat in alive.items()
        if site in enabled and site not in job.sites and site not in known and job.spec.trainer in heartbeat.trainers
    ]
    if not new:
        return job
    sites = tuple(sorted((*job.sites, *new)))
    change_job(connection, job.job_id, expected=LIVE, sites=list(sites))
    return replace(job, sites=sites)
