"""Stop waiting for parts: a round's deadline has passed, enough others have answered, or a site has gone.

What is recorded comes first; then the parts are completed in the chord and the sites are told to stop, both of which
can be repeated, and neither of which a round depends on: the sweeper calls back a round that has no part to wait for.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from redis.exceptions import RedisError
from sqlalchemy import Connection

from common.queues import cancel_key
from coordinator.dispatch import complete_part
from coordinator.jobs import Job
from coordinator.outliers import has_good
from coordinator.parts import SURPLUS, Part, find_parts, leave_parts
from coordinator.planning import gives_up_at, keeps_late
from coordinator.rounds import Round
from coordinator.services import Services
from coordinator.states import PartState, RoundKind
from store.tables import utc_now

logger = logging.getLogger(__name__)

_CLOCK_SECONDS = 600  # a site's clock may differ; what is told to it lives so much longer


def let_go(
    connection: Connection, job: Job, round_: Round, owing: Sequence[Part], reason: str, *, code: str | None = None
) -> tuple[Part, ...]:
    """Record that the round does not wait for the parts; return, as they are now, those that were not answered."""
    state = PartState.LATE if keeps_late(job, round_) else PartState.DROPPED
    left = leave_parts(connection, owing, state, reason, code=code)
    return tuple(replace(part, state=state, reason=reason, code=code or "") for part in left)


def let_surplus_go(connection: Connection, job: Job, round_: Round) -> tuple[Part, ...]:
    """Close a training round to who is missing if it is full; return them. The caller has locked the round."""
    if job.target is None or round_.kind is not RoundKind.TRAIN:
        return ()
    if not has_good(connection, job, round_.round_id, job.target):
        return ()
    owing = [part for part in find_parts(connection, round_.round_id) if part.state is PartState.WAITING]
    return let_go(connection, job, round_, owing, f"{job.target} other updates were enough", code=SURPLUS)


def follow_up(services: Services, job: Job, round_: Round, left: Sequence[Part]) -> None:
    """Complete the parts in the chord, and tell the sites of those that were dropped to stop; can be repeated."""
    for part in left:
        complete_part(services, round_.round_id, part)
    cancel_parts(services, [part for part in left if part.state is PartState.DROPPED], _seconds(job, round_))


def cancel_parts(services: Services, dropped: Sequence[Part], seconds: int) -> None:
    """Tell the sites to stop working on the parts; a broker that is away tells nobody, and their deadline ends it."""
    try:
        with services.broker.pipeline(transaction=False) as pipeline:
            for part in dropped:
                pipeline.set(cancel_key(part.site, part.task_id), part.reason, ex=seconds)
            pipeline.execute()
    except RedisError as error:
        logger.warning("Sites could not be told to stop: %s.", error, extra={"action": "cancel_parts"})


def _seconds(job: Job, round_: Round) -> int:
    left = (gives_up_at(job, round_) - utc_now()).total_seconds()
    return int(max(left, 0)) + _CLOCK_SECONDS
