"""Find the rounds in which something should have happened by now."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, and_, exists, or_, select

from coordinator.rounds import PartState, RoundState
from store.tables import parts, rounds, utc_now


@dataclass(frozen=True, kw_only=True)
class Overdue:
    """What the sweeper has to take up again."""

    unpublished: tuple[str, ...]  # open rounds whose messages may not have been sent
    expired: tuple[str, ...]  # open rounds past their deadline with answers missing
    unclaimed: tuple[str, ...]  # rounds with every answer there, or whose aggregating process has gone


def find_overdue(connection: Connection, *, grace_seconds: float) -> Overdue:
    """Return the rounds in which something should have happened by now, but for so many seconds."""
    now = utc_now()
    late = now - timedelta(seconds=grace_seconds)
    waiting = exists().where(parts.c.round_id == rounds.c.round_id, parts.c.state == PartState.WAITING.value)
    fresh = exists().where(parts.c.round_id == rounds.c.round_id, parts.c.answered_at >= late)
    is_open = rounds.c.state == RoundState.OPEN.value

    def ids(*conditions: Any) -> tuple[str, ...]:
        return tuple(connection.execute(select(rounds.c.round_id).where(*conditions)).scalars())

    return Overdue(
        unpublished=ids(is_open, rounds.c.published_at.is_(None), rounds.c.created_at < late),
        expired=ids(is_open, rounds.c.deadline_at < now, waiting),
        unclaimed=ids(
            or_(
                and_(is_open, ~waiting, ~fresh),
                and_(rounds.c.state == RoundState.AGGREGATING.value, rounds.c.lease_until < now),
            )
        ),
    )
