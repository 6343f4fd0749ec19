"""End the waiting of rounds: for sites that are late, that have gone, or whose updates are not needed any more."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection

from common.heartbeats import Heartbeat
from common.progress import read_progress
from coordinator.jobs import Job, get_job
from coordinator.letting_go import cancel_parts, follow_up, let_go, let_surplus_go
from coordinator.outliers import has_good
from coordinator.parts import Part, find_in, find_parts, leave_parts
from coordinator.planning import gives_up_at
from coordinator.rounds import Round, extend_round, get_round, lock_round
from coordinator.services import Services
from coordinator.states import OWING, PartState, RoundKind, RoundState
from coordinator.steady_clock import SteadyClock
from store.database import writing

logger = logging.getLogger(__name__)

_EXTENSION_SECONDS = 10.0  # that a deadline is moved by at a time, while a site that is missing reports progress
_STOP_SECONDS = 3600  # how long a site can learn that its late part is not wanted any more


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A round that waits, or waited, for the answers of some sites."""

    job: Job
    round: Round
    owing: tuple[Part, ...]  # waiting or late

    @property
    def extra(self) -> dict[str, object]:
        """Return what a log line about it is filed under."""
        return {"job": self.job.job_id, "round": self.round.round_id}


def find_waiting(connection: Connection) -> list[Waiting]:
    """Return every round that somebody owes an answer to, late ones included, of jobs that go on."""
    by_round: dict[str, list[Part]] = {}
    for part in find_in(connection, OWING):
        by_round.setdefault(part.round_id, []).append(part)
    jobs: dict[str, Job] = {}
    found = []
    for round_id, owing in by_round.items():
        round_ = get_round(connection, round_id)
        job = jobs.get(round_.job_id) or jobs.setdefault(round_.job_id, get_job(connection, round_.job_id))
        found.append(Waiting(job=job, round=round_, owing=tuple(owing)))
    return found


def end_waiting(
    services: Services, each: Waiting, heartbeats: Mapping[str, Heartbeat] | None, clock: SteadyClock
) -> None:
    """Let go whom the round need not, or must not, wait for any longer; can be repeated.

    Without heartbeats, while the broker is away, nobody is taken for gone.
    """
    if each.round.state is not RoundState.OPEN:
        _end_late(services, each, clock)
        return
    waiting = [part for part in each.owing if part.state is PartState.WAITING]
    if not waiting:
        return
    _let_surplus_go(services, each)
    if clock.has_passed(each.round.round_id, each.round.deadline_at, begun=each.round.created_at):
        _expire(services, each, waiting)
    elif heartbeats is not None:
        _let_absent_go(services, each, waiting, heartbeats, clock)


def _expire(services: Services, each: Waiting, waiting: Sequence[Part]) -> None:
    """Close a round whose deadline has passed, but to sites that still report progress, if the job gives them more."""
    latest = each.round.created_at + timedelta(
        seconds=each.job.spec.deadline_seconds(start=each.round.kind is RoundKind.START)
        + each.job.spec.round_extension_seconds
    )
    slow: set[str] = set()
    if each.round.deadline_at < latest:
        slow = set(read_progress(services.broker, [(part.site, part.task_id) for part in waiting]))
    silent = [part for part in waiting if part.task_id not in slow]
    with writing(services.engine) as connection:
        if lock_round(connection, each.round.round_id) is not RoundState.OPEN:
            return
        left = let_go(connection, each.job, each.round, silent, "no answer before the deadline")
        if slow:
            later = min(each.round.deadline_at + timedelta(seconds=_EXTENSION_SECONDS), latest)
            extend_round(connection, each.round, later)
    logger.warning(
        "%s of job %s is past its deadline: %s sites have not answered, %s of them report progress and are given more.",
        each.round.title,
        each.job.name,
        len(waiting),
        len(slow),
        extra={"action": "expire_round", **each.extra},
    )
    follow_up(services, each.job, each.round, left)


def _let_absent_go(
    services: Services,
    each: Waiting,
    waiting: Sequence[Part],
    heartbeats: Mapping[str, Heartbeat],
    clock: SteadyClock,
) -> None:
    """Wait no longer for sites whose heartbeat has been missing for so long, as far as the quorum can do without them.

    A site that was away when it was asked is needed, or it would not have been asked: it has until the deadline.
    """
    limit = each.job.spec.participation.absent_seconds
    gone = []
    for part in waiting:
        name = ("absent", part.site)
        if part.site in heartbeats:
            clock.forget(name)
        elif (seconds := clock.seconds(name)) >= limit:
            gone.append(part)
        elif seconds == 0:
            logger.warning(
                "Site %s has gone: it owes an answer and has no heartbeat.",
                part.site,
                extra={"action": "site_gone", "site": part.site, **each.extra},
            )
    if not gone:
        return
    with writing(services.engine) as connection:
        if lock_round(connection, each.round.round_id) is not RoundState.OPEN:
            return
        still = [part for part in find_parts(connection, each.round.round_id) if part.state is PartState.WAITING]
        away = {part.site for part in gone}
        gone = [part for part in still if part.site in away]
        needed = each.job.quorum - (len(still) - len(gone))
        if each.round.kind is not RoundKind.TEST and not has_good(connection, each.job, each.round.round_id, needed):
            return
        left = let_go(connection, each.job, each.round, gone, f"no heartbeat for {limit:g} s")
    logger.warning(
        "%s of job %s does not wait for %s any longer: no heartbeat.",
        each.round.title,
        each.job.name,
        ", ".join(part.site for part in left),
        extra={"action": "drop_absent", **each.extra},
    )
    follow_up(services, each.job, each.round, left)


def _let_surplus_go(services: Services, each: Waiting) -> None:
    """Close a round that became full in a moment in which nobody could: by what was kept before it was planned."""
    if each.job.target is None or each.round.kind is not RoundKind.TRAIN:
        return
    with writing(services.engine) as connection:
        if lock_round(connection, each.round.round_id) is not RoundState.OPEN:
            return
        left = let_surplus_go(connection, each.job, each.round)
    follow_up(services, each.job, each.round, left)


def _end_late(services: Services, each: Waiting, clock: SteadyClock) -> None:
    """Drop late answers that have not come in time."""
    late = [part for part in each.owing if part.state is PartState.LATE]
    begun = each.round.closed_at or each.round.created_at
    if not late or not clock.has_passed(("late", each.round.round_id), gives_up_at(each.job, each.round), begun=begun):
        return
    with writing(services.engine) as connection:
        dropped = leave_parts(connection, late, PartState.DROPPED, "no answer in time for a later round either")
    cancel_parts(services, dropped, _STOP_SECONDS)
