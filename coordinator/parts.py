"""The parts of rounds: one site's share of one round, what it answered, and where that counts.

Every change is one compare-and-set UPDATE, so that a message that comes twice, or to two coordinator workers at once,
changes nothing the second time.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)

from coordinator.states import OWING, PartState, RoundKind, RoundState
from store.tables import parts, rounds, utc_now

RELEASED = "released"  # the code of a part whose answer counts because a person has said so
SURPLUS = "surplus"  # of one that was not waited for because enough others had answered


@dataclass(frozen=True, kw_only=True)
class Part:
    """One site's share of a round."""

    job_id: str
    round_id: str
    site: str
    position: int  # in the chord's header; the order in which updates are aggregated
    attempt: int = 1  # a fencing number: each asking again has a higher one, and a place of its own to write to
    state: PartState = PartState.WAITING
    code: str = ""  # RELEASED, SURPLUS or nothing
    reason: str = ""
    num_examples: int | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    model_id: str | None = None  # the update's model_info
    answered_at: datetime | None = None
    update_norm: float | None = None  # of (update - global model), L2; None if it was not measured
    global_norm: float | None = None  # of the global model that it was measured from
    counted_in: str | None = None  # the later round that its answer counts in; None: its own

    @property
    def task_id(self) -> str:
        """Return the part's name, which is also its Celery task's id."""
        return f"{self.round_id}.{self.site}"

    @property
    def released(self) -> bool:
        """Return whether a person has overruled the gate."""
        return self.code == RELEASED

    def slot(self, shard: int) -> str:
        """Return the name of the place in the object store where the site may write its shard."""
        return f"{self.task_id}/{self.attempt}/{shard}"


# Built once: to build a statement takes longer than to run it.
_PARTS = select(parts).where(parts.c.round_id == bindparam("round_id")).order_by(parts.c.position)
_IS_OPEN = exists().where(rounds.c.round_id == parts.c.round_id, rounds.c.state == RoundState.OPEN.value)
_MEASURED = ("update_norm", "global_norm")
_ANSWER_LATE = (
    update(parts)
    .where(
        parts.c.task_id == bindparam("of_task"),
        parts.c.attempt >= bindparam("of_attempt"),
        parts.c.state == bindparam("of_state"),
    )
    .values(
        {
            name: bindparam(name)
            for name in (
                "state", "attempt", "code", "reason", "num_examples", "metrics", "shards", "model_id", "answered_at",
                *_MEASURED,
            )
        }
    )
)  # fmt: skip
_ANSWER = _ANSWER_LATE.where(_IS_OPEN)
_COUNTED = (
    select(parts)
    .join(rounds, rounds.c.round_id == parts.c.round_id)
    .where(
        parts.c.state == PartState.ACCEPTED.value,
        parts.c.job_id == bindparam("job_id"),
        parts.c.counted_in == bindparam("round_id"),
    )
    .order_by(parts.c.site, rounds.c.number)
)


def find_parts(connection: Connection, round_id: str) -> list[Part]:
    """Return the round's parts in the order of aggregation."""
    return [part_of(row) for row in connection.execute(_PARTS, {"round_id": round_id}).mappings()]


def find_carried(connection: Connection, job_id: str, round_id: str) -> list[Part]:
    """Return the parts of earlier rounds whose answers count in this one, by site and round."""
    values = {"job_id": job_id, "round_id": round_id}
    return [part_of(row) for row in connection.execute(_COUNTED, values).mappings()]


def find_in(connection: Connection, states: Collection[PartState], *, job_id: str | None = None) -> list[Part]:
    """Return all parts that are in one of the states."""
    query = select(parts).where(parts.c.state.in_([state.value for state in states]))
    if job_id is not None:
        query = query.where(parts.c.job_id == job_id)
    return [part_of(row) for row in connection.execute(query.order_by(parts.c.task_id)).mappings()]


def count_good(connection: Connection, job_id: str, round_id: str) -> int:
    """Return how many updates there are for the round: its own, and those of earlier rounds that are kept for it."""
    query = select(func.count()).select_from(parts).where(_is_good(job_id, round_id))
    return int(connection.scalar(query) or 0)


def find_good(connection: Connection, job_id: str, round_id: str) -> list[Part]:
    """Return the parts that `count_good` counts."""
    query = select(parts).where(_is_good(job_id, round_id))
    return [part_of(row) for row in connection.execute(query).mappings()]


def _is_good(job_id: str, round_id: str) -> ColumnElement[bool]:
    own = and_(parts.c.round_id == round_id, parts.c.state == PartState.ACCEPTED.value)
    return or_(own, and_(parts.c.job_id == job_id, parts.c.state == PartState.KEPT.value))


def answer_part(
    connection: Connection, part: Part, state: PartState, *, expected: PartState = PartState.WAITING, **values: Any
) -> bool:
    """Record the answer to the part's attempt, if the part is as expected; return whether this one counts.

    The round must still be open, unless a late answer is expected.
    """
    row: dict[str, Any] = {
        "code": None, "reason": "", "metrics": {}, "shards": [],
        **dict.fromkeys(("num_examples", "model_id", *_MEASURED)), **values, "attempt": part.attempt,
    }  # fmt: skip
    row["reason"] = row["reason"].replace("\x00", "")  # a site's words; PostgreSQL holds no NUL
    known = {"of_task": part.task_id, "of_attempt": part.attempt, "of_state": expected.value}
    statement = _ANSWER_LATE if expected is PartState.LATE else _ANSWER
    result = connection.execute(statement, {**known, **row, "state": state.value, "answered_at": utc_now()})
    return result.rowcount == 1


def overrule_part(connection: Connection, part: Part, state: PartState, **values: Any) -> bool:
    """Change the verdict on a part that has its answer, if it is still the one that the caller knows."""
    result = connection.execute(
        update(parts)
        .where(parts.c.task_id == part.task_id, parts.c.attempt == part.attempt, parts.c.state == part.state.value)
        .values(state=state.value, **values)
    )
    return result.rowcount == 1


def raise_attempt(connection: Connection, part: Part) -> bool:
    """Give the part its next attempt, so that who works on an earlier one writes elsewhere; False if it is answered."""
    result = connection.execute(
        update(parts)
        .where(
            parts.c.task_id == part.task_id,
            parts.c.attempt == part.attempt,
            parts.c.state.in_([state.value for state in OWING]),
        )
        .values(attempt=part.attempt + 1)
    )
    return result.rowcount == 1


def leave_parts(
    connection: Connection, owing: Sequence[Part], state: PartState, reason: str, *, code: str | None = None
) -> tuple[Part, ...]:
    """Wait no longer for the parts, as late or as dropped; return those that had not been answered in the meantime."""
    now = utc_now()
    values = {"state": state.value, "reason": reason, "code": code, "answered_at": now}
    left = []
    for part in owing:
        result = connection.execute(
            update(parts).where(parts.c.task_id == part.task_id, parts.c.state == part.state.value).values(**values)
        )
        if result.rowcount == 1:
            left.append(part)
    return tuple(left)


def count_kept(connection: Connection, round_id: str) -> None:
    """Let every answer that is kept for the job's next training round count in this one, if it is one.

    One that missed this very round, and came before it was claimed, counts like the round's others.
    """
    job = select(rounds.c.job_id).where(rounds.c.round_id == round_id, rounds.c.kind == RoundKind.TRAIN.value)
    connection.execute(
        update(parts)
        .where(parts.c.state == PartState.KEPT.value, parts.c.job_id == job.scalar_subquery())
        .values(
            state=PartState.ACCEPTED.value,
            counted_in=case((parts.c.round_id != round_id, literal(round_id)), else_=None),
        )
    )


def end_parts(connection: Connection, job_id: str, states: Collection[PartState], reason: str) -> None:
    """Drop the job's parts that are in one of the states; its end leaves none of them."""
    connection.execute(
        update(parts)
        .where(parts.c.state.in_([state.value for state in states]), parts.c.job_id == job_id)
        .values(state=PartState.DROPPED.value, reason=reason, answered_at=utc_now())
    )


def drop_stale(connection: Connection, job_id: str, number: int, reason: str) -> tuple[Part, ...]:
    """Drop what is late or kept of the job's training rounds before the number; return those that still owed."""
    earlier = select(rounds.c.round_id).where(rounds.c.job_id == job_id, rounds.c.number < number)
    stale = select(parts).where(
        parts.c.state.in_([PartState.LATE.value, PartState.KEPT.value]),
        parts.c.job_id == job_id,
        parts.c.round_id.in_(earlier),
    )
    found = [part_of(row) for row in connection.execute(stale).mappings()]
    dropped = leave_parts(connection, found, PartState.DROPPED, reason)
    return tuple(replace(part, reason=reason) for part in dropped if part.state is PartState.LATE)


def part_of(row: RowMapping) -> Part:
    """Return the part in a row that has the columns of its table."""
    return Part(
        job_id=row[parts.c.job_id],
        round_id=row[parts.c.round_id],
        site=row[parts.c.site],
        position=row[parts.c.position],
        attempt=row[parts.c.attempt],
        state=PartState(row[parts.c.state]),
        code=row[parts.c.code] or "",
        reason=row[parts.c.reason],
        num_examples=row[parts.c.num_examples],
        metrics=row[parts.c.metrics],
        model_id=row[parts.c.model_id],
        answered_at=row[parts.c.answered_at],
        update_norm=row[parts.c.update_norm],
        global_norm=row[parts.c.global_norm],
        counted_in=row[parts.c.counted_in],
    )
