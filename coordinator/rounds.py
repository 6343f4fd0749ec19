"""Rounds: one question to many sites, and what came of the answers.

Every change of state is one compare-and-set UPDATE, so that a message that comes twice, or to two coordinator workers
at once, changes nothing the second time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, bindparam, case, exists, or_, select, update

from common.errors import NotFound
from coordinator.states import PartState, RoundKind, RoundState
from store.tables import parts, rounds, utc_now


@dataclass(frozen=True, kw_only=True)
class Round:
    """One question to many sites."""

    job_id: str
    kind: RoundKind
    number: int  # of the training round it belongs to; a start's counts the attempts to build a model
    state: RoundState = RoundState.OPEN
    input_model_id: str | None  # the global model that is sent out
    output_model_id: str | None = None  # what came of it
    deadline_at: datetime  # moves while sites that are missing report progress, if the job allows it
    published_at: datetime | None = None  # None: perhaps not sent yet
    claims: int = 0  # how often its aggregation was begun
    metrics: dict[str, float] = field(default_factory=dict)  # weighted by examples
    reason: str = ""  # why it failed
    seconds: dict[str, float] = field(default_factory=dict)  # how long its steps took
    created_at: datetime = field(default_factory=utc_now)
    closed_at: datetime | None = None

    @property
    def round_id(self) -> str:
        """Return the round's name, which is also the chord's group id."""
        return f"{self.job_id}.{self.kind}.{self.number}"

    @property
    def title(self) -> str:
        """Return the round's name for people."""
        return "the start" if self.kind is RoundKind.START else f"{self.kind} round {self.number}"


# Built once: to build a statement takes longer than to run it.
_ROUND = select(rounds).where(rounds.c.round_id == bindparam("round_id"))
_AS_PLANNED = (  # no clock has a say in it
    case((rounds.c.kind == RoundKind.START.value, 0), else_=1),
    rounds.c.number,
    case((rounds.c.kind == RoundKind.TRAIN.value, 0), (rounds.c.kind == RoundKind.TEST.value, 1), else_=2),
)


def body_task_id(round_id: str) -> str:
    """Return the task id of the callback of the round's chord."""
    return f"{round_id}.aggregate"


def add_round(connection: Connection, round_: Round, sites: Sequence[str]) -> bool:
    """Record the round and its parts, in the order of the sites' names; return False if it is recorded already."""
    known = select(rounds.c.round_id).where(rounds.c.round_id == round_.round_id)
    if connection.execute(known).first() is not None:
        return False
    connection.execute(
        rounds.insert().values(
            round_id=round_.round_id,
            job_id=round_.job_id,
            number=round_.number,
            kind=round_.kind.value,
            state=round_.state.value,
            group_id=round_.round_id,
            body_task_id=body_task_id(round_.round_id),
            input_model_id=round_.input_model_id,
            deadline_at=round_.deadline_at,
            created_at=round_.created_at,
        )
    )
    connection.execute(
        parts.insert(),
        [
            {
                "task_id": f"{round_.round_id}.{site}",
                "round_id": round_.round_id,
                "job_id": round_.job_id,
                "site": site,
                "position": position,
                "state": PartState.WAITING.value,
            }
            for position, site in enumerate(sorted(sites))
        ],
    )
    return True


def get_round(connection: Connection, round_id: str) -> Round:
    """Return the round; raise NotFound."""
    row = connection.execute(_ROUND, {"round_id": round_id}).mappings().first()
    if row is None:
        raise NotFound(f"There is no round {round_id!r}.")
    return round_of(row)


def find_rounds(connection: Connection, job_id: str, *, number_from: int | None = None) -> list[Round]:
    """Return the job's rounds in the order they were planned; those of a number or a higher one if one is given."""
    query = select(rounds).where(rounds.c.job_id == job_id).order_by(*_AS_PLANNED)
    if number_from is not None:
        query = query.where(rounds.c.number >= number_from, rounds.c.kind != RoundKind.START.value)
    return [round_of(row) for row in connection.execute(query).mappings()]


def find_open(connection: Connection, *, job_id: str | None = None, kind: RoundKind | None = None) -> list[Round]:
    """Return the rounds that are open, of a job or a kind if one is given."""
    query = select(rounds).where(rounds.c.state == RoundState.OPEN.value)
    if job_id is not None:
        query = query.where(rounds.c.job_id == job_id)
    if kind is not None:
        query = query.where(rounds.c.kind == kind.value)
    return [round_of(row) for row in connection.execute(query).mappings()]


def lock_round(connection: Connection, round_id: str) -> RoundState:
    """Return the round's state, which nobody changes until the transaction ends; raise NotFound."""
    row = connection.execute(_ROUND.with_for_update(), {"round_id": round_id}).mappings().first()
    if row is None:
        raise NotFound(f"There is no round {round_id!r}.")
    return round_of(row).state


def extend_round(connection: Connection, round_: Round, deadline_at: datetime) -> bool:
    """Move the round's deadline if it is open and its deadline is the one that the caller knows."""
    result = connection.execute(
        update(rounds)
        .where(
            rounds.c.round_id == round_.round_id,
            rounds.c.state == RoundState.OPEN.value,
            rounds.c.deadline_at == round_.deadline_at,
        )
        .values(deadline_at=deadline_at)
    )
    return result.rowcount == 1


def mark_published(connection: Connection, round_id: str) -> None:
    """Record that the round's messages are on their queues."""
    connection.execute(update(rounds).where(rounds.c.round_id == round_id).values(published_at=utc_now()))


def claim_round(connection: Connection, round_id: str, owner: str, lease_seconds: float) -> bool:
    """Take the round for aggregation, if it is open with no answer missing or its last owner's lease has run out."""
    now = utc_now()
    waiting = exists().where(parts.c.round_id == round_id, parts.c.state == PartState.WAITING.value)
    result = connection.execute(
        update(rounds)
        .where(
            rounds.c.round_id == round_id,
            or_(
                and_(rounds.c.state == RoundState.OPEN.value, ~waiting),
                and_(rounds.c.state == RoundState.AGGREGATING.value, rounds.c.lease_until < now),
            ),
        )
        .values(
            state=RoundState.AGGREGATING.value,
            lease_owner=owner,
            lease_until=now + timedelta(seconds=lease_seconds),
            claims=rounds.c.claims + 1,
        )
    )
    return result.rowcount == 1


def renew_lease(connection: Connection, round_id: str, owner: str, lease_seconds: float) -> bool:
    """Prolong the owner's lease; return False when somebody else has the round."""
    return _change_held(connection, round_id, owner, lease_until=utc_now() + timedelta(seconds=lease_seconds))


def forgive_claim(connection: Connection, round_id: str, owner: str) -> bool:
    """Do not count the owner's claim: a service was away, which is not the round's fault. The lease runs out."""
    return _change_held(connection, round_id, owner, claims=rounds.c.claims - 1)


def close_round(connection: Connection, round_id: str, owner: str, state: RoundState, **values: Any) -> bool:
    """Move the round that the owner is aggregating to a terminal state; return False when it is no longer his."""
    return _change_held(connection, round_id, owner, state=state.value, closed_at=utc_now(), **values)


def end_lease(connection: Connection, round_id: str, owner: str, until: datetime) -> bool:
    """End a lease that is still as the caller has seen it, whatever the clocks say of it."""
    as_seen = rounds.c.lease_until == until
    return _change_held(connection, round_id, owner, as_seen, lease_until=utc_now() - timedelta(days=1))


def abort_rounds(connection: Connection, job_id: str, reason: str) -> None:
    """End the job's rounds that are still going on."""
    connection.execute(
        update(rounds)
        .where(
            rounds.c.job_id == job_id,
            rounds.c.state.in_([RoundState.OPEN.value, RoundState.AGGREGATING.value]),
        )
        .values(state=RoundState.ABORTED.value, reason=reason, closed_at=utc_now())
    )


def round_of(row: RowMapping) -> Round:
    """Return the round in a row that has the columns of its table."""
    return Round(
        job_id=row[rounds.c.job_id],
        kind=RoundKind(row[rounds.c.kind]),
        number=row[rounds.c.number],
        state=RoundState(row[rounds.c.state]),
        input_model_id=row[rounds.c.input_model_id],
        output_model_id=row[rounds.c.output_model_id],
        deadline_at=row[rounds.c.deadline_at],
        published_at=row[rounds.c.published_at],
        claims=row[rounds.c.claims],
        metrics=row[rounds.c.metrics],
        reason=row[rounds.c.reason],
        seconds=row[rounds.c.seconds],
        created_at=row[rounds.c.created_at],
        closed_at=row[rounds.c.closed_at],
    )


def _change_held(
    connection: Connection, round_id: str, owner: str, *conditions: ColumnElement[bool], **values: Any
) -> bool:
    result = connection.execute(
        update(rounds)
        .where(
            rounds.c.round_id == round_id,
            rounds.c.state == RoundState.AGGREGATING.value,
            rounds.c.lease_owner == owner,
            *conditions,
        )
        .values(**values)
    )
    return result.rowcount == 1
