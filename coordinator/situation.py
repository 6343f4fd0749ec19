"""Gather what is known of a job now, from records, broker and object store; who is away is a fact as well."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from celery import Celery
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import Connection, Engine, func, select

from common.broker import connect
from common.dead_letters import DeadLetter, read_dead_letters
from common.errors import BrokerUnavailable, FedChordError
from common.heartbeats import Heartbeat, read_heartbeats
from common.progress import ProgressReport, read_progress
from common.queues import COORDINATOR_QUEUE, site_queue
from common.settings import Settings
from coordinator.jobs import Job, find_job
from coordinator.listeners import coordinator_workers
from coordinator.members import Member, find_members
from coordinator.parts import Part, find_in, find_parts
from coordinator.rounds import Round, find_rounds
from coordinator.states import PartState, RoundState
from store.database import reading
from store.parties import PartyInfo
from store.parties import sites as enrolled_sites
from store.tables import outbox, rounds, utc_now


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Who aggregates a round."""

    owner: str  # a random name that the process gave itself
    until: datetime  # it is renewed until then at the latest, or the process is gone


@dataclass(frozen=True, kw_only=True)
class Unsent:
    """The notices of a job that are still in the outbox."""

    sites: tuple[str, ...]  # whom they are for
    since: datetime  # the oldest one's


@dataclass(frozen=True, kw_only=True)
class Situation:
    """Everything that tells why a job is where it is."""

    now: datetime  # by this machine's clock
    settings: Settings  # the coordinator's
    job: Job
    round: Round | None = None  # the one that goes on, else the newest
    parts: tuple[Part, ...] = ()  # of that round
    lease: Lease | None = None  # on that round, if it aggregates
    unsent: Unsent | None = None  # None: every notice is on its queue
    members: Mapping[str, Member] = field(default_factory=dict)  # sites that are paused or have left, by name
    late: tuple[Part, ...] = ()  # of earlier rounds, still owed or kept for the next training round
    parties: Mapping[str, PartyInfo] = field(default_factory=dict)  # the enrolled sites, by name
    broker_trouble: str = ""  # why what follows is not known; empty if the broker answers
    heartbeats: Mapping[str, Heartbeat] = field(default_factory=dict)  # of the sites that are alive
    queued: Mapping[str, int] = field(default_factory=dict)  # messages on each site's queue
    progress: Mapping[str, ProgressReport] = field(default_factory=dict)  # of parts at work, by task id
    taken_at: Mapping[str, datetime] = field(default_factory=dict)  # when a site took the oldest one in its hands
    workers: tuple[str, ...] = ()  # coordinator workers that answer
    answers_queued: int = 0  # messages on the coordinator's queue
    set_aside: tuple[DeadLetter, ...] = ()  # the newest ones, of the coordinator's queue and of those that owe
    store_trouble: str = ""  # why the object store cannot be used; empty if it can, or nobody needs it now


def gather(
    settings: Settings, engine: Engine, app: Celery, job_id: str, *, check_store: Callable[[], str]
) -> Situation:
    """Return the situation of the job; raise NotFound.

    `check_store` tells the object store's trouble, and is asked only when a round waits for it.
    """
    with reading(engine) as connection:
        situation = _recorded(connection, settings, find_job(connection, job_id))
    needs_store = situation.round is not None and (
        situation.round.state is RoundState.AGGREGATING
        or (situation.round.state is RoundState.OPEN and not waiting(situation.parts))
    )
    situation = replace(situation, store_trouble=check_store() if needs_store else "")
    try:
        with closing(connect(settings)) as broker:
            found = _in_broker(broker, app, waiting(situation.parts))
    except (BrokerUnavailable, RedisError) as error:
        trouble = error.message if isinstance(error, FedChordError) else f"The broker does not answer ({error})."
        return replace(situation, broker_trouble=trouble)
    return replace(situation, **found)


def waiting(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the parts that nobody has answered."""
    return tuple(part for part in parts if part.state is PartState.WAITING)


def _recorded(connection: Connection, settings: Settings, job: Job) -> Situation:
    planned = find_rounds(connection, job.job_id)
    going_on = (each for each in planned if each.state in (RoundState.OPEN, RoundState.AGGREGATING))
    round_ = next(going_on, planned[-1] if planned else None)
    return Situation(
        now=utc_now(),
        settings=settings,
        job=job,
        round=round_,
        parts=tuple(find_parts(connection, round_.round_id)) if round_ else (),
        lease=_lease(connection, round_.round_id) if round_ else None,
        unsent=_unsent(connection, job.job_id),
        members=find_members(connection, job.job_id),
        late=tuple(find_in(connection, (PartState.LATE, PartState.KEPT), job_id=job.job_id)),
        parties={party.site: party for party in enrolled_sites(connection) if party.site},
    )


def _lease(connection: Connection, round_id: str) -> Lease | None:
    query = select(rounds.c.lease_owner, rounds.c.lease_until).where(
        rounds.c.round_id == round_id, rounds.c.state == RoundState.AGGREGATING.value
    )
    row = connection.execute(query).first()
    return None if row is None or row.lease_until is None else Lease(owner=row.lease_owner, until=row.lease_until)


def _unsent(connection: Connection, job_id: str) -> Unsent | None:
    query = select(outbox.c.site, func.min(outbox.c.created_at).label("since"))
    query = query.where(outbox.c.job_id == job_id, outbox.c.sent_at.is_(None)).group_by(outbox.c.site)
    rows = connection.execute(query).all()
    if not rows:
        return None
    return Unsent(sites=tuple(sorted(row.site for row in rows)), since=min(row.since for row in rows))


def _in_broker(broker: Redis, app: Celery, owing: Sequence[Part]) -> dict[str, Any]:
    """Return the situation's fields that the broker knows."""
    sites = [part.site for part in owing]
    with broker.pipeline(transaction=False) as pipeline:
        for site in sites:
            pipeline.llen(site_queue(site))
            pipeline.zrange(f"unacked_index.{site_queue(site)}", 0, 0, withscores=True)  # see common/broker.py
        pipeline.llen(COORDINATOR_QUEUE)
        *found, answers_queued = pipeline.execute()
    oldest = dict(zip(sites, found[1::2], strict=True))
    return {
        "heartbeats": read_heartbeats(broker, sites),
        "progress": read_progress(broker, [(part.site, part.task_id) for part in owing]),
        "queued": dict(zip(sites, found[0::2], strict=True)),
        "taken_at": {site: datetime.fromtimestamp(taken[0][1], UTC) for site, taken in oldest.items() if taken},
        "answers_queued": answers_queued,
        "set_aside": tuple(
            letter
            for queue in (COORDINATOR_QUEUE, *map(site_queue, sites))
            for letter in read_dead_letters(broker, queue, limit=1)
        ),
        "workers": coordinator_workers(app),
    }
