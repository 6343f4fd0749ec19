"""Find the rounds in which something should have happened by now."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, and_, exists, or_, select

from coordinator.states import PartState, RoundState
from store.tables import parts, rounds, utc_now


@dataclass(frozen=True, kw_only=True)
class Held:
    """A round that somebody aggregates, as far as its record tells."""

    round_id: str
    owner: str
    until: datetime  # of the lease


@dataclass(frozen=True, kw_only=True)
class Overdue:
    """What the sweeper has to take up again."""

    unpublished: tuple[str, ...]  # open rounds whose messages may not have been sent
    unclaimed: tuple[str, ...]  # rounds with every answer there, or whose aggregating process has gone
    held: tuple[Held, ...]  # rounds whose lease has not run out, by the clock


def find_overdue(connection: Connection, *, grace_seconds: float) -> Overdue:
    """Return the rounds in which something should have happened by now, but for so many seconds."""
    waiting = exists().where(parts.c.round_id == rounds.c.round_id, parts.c.state == PartState.WAITING.value)
    answered = (parts.c.round_id == rounds.c.round_id, parts.c.answered_at.is_not(None))
    fresh = exists().where(*answered, ~is_old(parts.c.answered_at, grace_seconds))
    is_open = rounds.c.state == RoundState.OPEN.value
    is_held = and_(rounds.c.state == RoundState.AGGREGATING.value, rounds.c.lease_until >= utc_now())

    def ids(*conditions: Any) -> tuple[str, ...]:
        return tuple(connection.execute(select(rounds.c.round_id).where(*conditions)).scalars())

    held = connection.execute(select(rounds.c.round_id, rounds.c.lease_owner, rounds.c.lease_until).where(is_held))
    return Overdue(
        unpublished=ids(is_open, rounds.c.published_at.is_(None), is_old(rounds.c.created_at, grace_seconds)),
        unclaimed=ids(
            or_(
                and_(is_open, ~waiting, ~fresh),
                and_(rounds.c.state == RoundState.AGGREGATING.value, rounds.c.lease_until < utc_now()),
            )
        ),
        held=tuple(Held(round_id=round_id, owner=owner, until=until) for round_id, owner, until in held),
    )


def is_old(moment: Column[datetime], seconds: float) -> ColumnElement[bool]:
    """Tell whether a moment is so long ago; one that lies ahead is, since the clock was set back after it."""
    now = utc_now()
    return or_(moment < now - timedelta(seconds=seconds), moment > now + timedelta(seconds=seconds))
