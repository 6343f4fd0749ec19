"""Rounds and their parts: the records that say what was asked of whom, and what came of it.

A round's states:   open ─▶ aggregating ─▶ closed | failed      and from each that is not terminal: ─▶ aborted
A part's states:    waiting ─▶ accepted | quarantined | declined | failed | dropped

Every change is one compare-and-set UPDATE, so that a message that comes twice, or to two coordinator workers at once,
changes nothing the second time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, RowMapping, and_, bindparam, exists, or_, select, update

from common.errors import NotFound
from common.queues import Kind
from coordinator.jobs import Job, job_of
from store.tables import jobs, parts, party_info, rounds, utc_now

RELEASED = "released"  # the code of a part whose answer counts because a person has said so


class RoundKind(StrEnum):
    """What a round asks of its sites."""

    START = "start"  # check the trainer; one site may build the first model
    TRAIN = "train"
    TEST = "test"
    SWAG = "swag"


MESSAGE_KINDS = {
    RoundKind.START: Kind.TRAINING_START,
    RoundKind.TRAIN: Kind.UPDATE_ROUND_START,
    RoundKind.TEST: Kind.MODEL_TEST_ROUND,
    RoundKind.SWAG: Kind.SWAG_ROUND_START,
}


class RoundState(StrEnum):
    """Where a round is."""

    OPEN = "open"  # asked, or about to be; answers count
    AGGREGATING = "aggregating"  # one process holds a lease on it and puts the answers together
    CLOSED = "closed"  # terminal
    FAILED = "failed"  # terminal: no quorum, or no way to put the answers together
    ABORTED = "aborted"  # terminal: the job ended


class PartState(StrEnum):
    """Where one site's share of a round is."""

    WAITING = "waiting"  # no answer yet
    ACCEPTED = "accepted"  # the answer passed the gate
    QUARANTINED = "quarantined"  # the gate refused the update; it is kept with the reason
    DECLINED = "declined"  # the site would not
    FAILED = "failed"  # the site tried and could not
    DROPPED = "dropped"  # no answer before the deadline


@dataclass(frozen=True, kw_only=True)
class Round:
    """One question to many sites."""

    job_id: str
    kind: RoundKind
    number: int  # of the training round it belongs to; 0 at the start
    state: RoundState = RoundState.OPEN
    input_model_id: str | None  # the global model that is sent out
    output_model_id: str | None = None  # what came of it
    deadline_at: datetime
    published_at: datetime | None = None  # None: perhaps not sent yet
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


@dataclass(frozen=True, kw_only=True)
class Part:
    """One site's share of a round."""

    job_id: str
    round_id: str
    site: str
    position: int  # in the chord's header; the order in which updates are aggregated
    attempt: int = 1  # a fencing number: answers to an earlier attempt do not count
    state: PartState = PartState.WAITING
    reason: str = ""
    num_examples: int | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    model_id: str | None = None  # the update's model_info
    answered_at: datetime | None = None
    update_norm: float | None = None  # of (update - global model), L2; None if it was not measured
    global_norm: float | None = None  # of the global model that it was measured from
    released: bool = False  # a person has overruled the gate

    @property
    def task_id(self) -> str:
        """Return the part's name, which is also its Celery task's id."""
        return f"{self.round_id}.{self.site}"

    def slot(self, shard: int) -> str:
        """Return the name of the place in the object store where the site may write its shard."""
        return f"{self.task_id}/{self.attempt}/{shard}"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A part and all that it is part of."""

    job: Job
    round: Round
    part: Part
    public_key: str  # of the part's site


# Built once: to build a statement takes longer than to run it.
_ASKED = (
    select(jobs, rounds, parts, party_info.c.public_key)
    .join(rounds, rounds.c.job_id == jobs.c.job_id)
    .join(parts, parts.c.round_id == rounds.c.round_id)
    .join(party_info, party_info.c.site == parts.c.site)
    .where(parts.c.task_id == bindparam("task_id"))
)
_PARTS = select(parts).where(parts.c.round_id == bindparam("round_id")).order_by(parts.c.position)
_ROUND = select(rounds).where(rounds.c.round_id == bindparam("round_id"))
_IS_OPEN = exists().where(rounds.c.round_id == parts.c.round_id, rounds.c.state == RoundState.OPEN.value)
_MEASURED = ("update_norm", "global_norm")
_ANSWER = (
    update(parts)
    .where(
        parts.c.task_id == bindparam("of_task"),
        parts.c.attempt == bindparam("of_attempt"),
        parts.c.state == PartState.WAITING.value,
        _IS_OPEN,
    )
    .values(
        {
            name: bindparam(name)
            for name in ("state", "reason", "num_examples", "metrics", "shards", "model_id", "answered_at", *_MEASURED)
        }
    )
)


def body_task_id(round_id: str) -> str:
    """Return the task id of the callback of the round's chord."""
    return f"{round_id}.aggregate"


def add_round(connection: Connection, round_: Round, sites: tuple[str, ...]) -> bool:
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
    return _round(row)


def find_rounds(connection: Connection, job_id: str, *, created_from: datetime | None = None) -> list[Round]:
    """Return the job's rounds in the order they were planned; from that moment on if one is given."""
    query = select(rounds).where(rounds.c.job_id == job_id).order_by(rounds.c.created_at)
    if created_from is not None:
        query = query.where(rounds.c.created_at >= created_from)
    return [_round(row) for row in connection.execute(query).mappings()]


def get_asked(connection: Connection, task_id: str) -> Asked:
    """Return what a site was asked; raise NotFound if it was not, or is not enrolled any more."""
    row = connection.execute(_ASKED, {"task_id": task_id}).mappings().first()
    if row is None:
        raise NotFound(f"No enrolled site was asked {task_id[:200]!r}.")
    return Asked(job=job_of(row), round=_round(row), part=_part(row), public_key=row[party_info.c.public_key] or "")


def builder(round_: Round, parts: Sequence[Part]) -> str | None:
    """Return the site that builds the first model in a start; None if there is a model. Another one at each start."""
    if round_.kind is not RoundKind.START or round_.input_model_id is not None:
        return None
    return parts[round_.number % len(parts)].site


def find_parts(connection: Connection, round_id: str) -> list[Part]:
    """Return the round's parts in the order of aggregation."""
    return [_part(row) for row in connection.execute(_PARTS, {"round_id": round_id}).mappings()]


def answer_part(connection: Connection, part: Part, state: PartState, **values: Any) -> bool:
    """Record the answer if none is and the round is still open; return whether this one counts."""
    known = {"of_task": part.task_id, "of_attempt": part.attempt}
    empty = dict.fromkeys(("num_examples", "model_id", *_MEASURED))
    row: dict[str, Any] = {"reason": "", "metrics": {}, "shards": [], **empty, **values}
    row["reason"] = row["reason"].replace("\x00", "")  # a site's words; PostgreSQL holds no NUL
    result = connection.execute(_ANSWER, {**known, **row, "state": state.value, "answered_at": utc_now()})
    return result.rowcount == 1


def overrule_part(connection: Connection, part: Part, state: PartState, **values: Any) -> bool:
    """Change the verdict on a part that has its answer, if it is still the one that the caller knows."""
    result = connection.execute(
        update(parts)
        .where(parts.c.task_id == part.task_id, parts.c.attempt == part.attempt, parts.c.state == part.state.value)
        .values(state=state.value, **values)
    )
    return result.rowcount == 1


def lock_round(connection: Connection, round_id: str) -> RoundState:
    """Return the round's state, which nobody changes until the transaction ends; raise NotFound."""
    row = connection.execute(_ROUND.with_for_update(), {"round_id": round_id}).mappings().first()
    if row is None:
        raise NotFound(f"There is no round {round_id!r}.")
    return _round(row).state


def drop_waiting(connection: Connection, round_id: str, reason: str) -> int:
    """Drop the parts that nobody has answered; return how many."""
    result = connection.execute(
        update(parts)
        .where(parts.c.round_id == round_id, parts.c.state == PartState.WAITING.value)
        .values(state=PartState.DROPPED.value, reason=reason, answered_at=utc_now())
    )
    return result.rowcount


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
        )
    )
    return result.rowcount == 1


def renew_lease(connection: Connection, round_id: str, owner: str, lease_seconds: float) -> bool:
    """Prolong the owner's lease; return False when somebody else has the round."""
    result = connection.execute(
        update(rounds)
        .where(
            rounds.c.round_id == round_id,
            rounds.c.state == RoundState.AGGREGATING.value,
            rounds.c.lease_owner == owner,
        )
        .values(lease_until=utc_now() + timedelta(seconds=lease_seconds))
    )
    return result.rowcount == 1


def close_round(connection: Connection, round_id: str, owner: str, state: RoundState, **values: Any) -> bool:
    """Move the round that the owner is aggregating to a terminal state; return False when it is no longer his."""
    result = connection.execute(
        update(rounds)
        .where(
            rounds.c.round_id == round_id,
            rounds.c.state == RoundState.AGGREGATING.value,
            rounds.c.lease_owner == owner,
        )
        .values(state=state.value, closed_at=utc_now(), **values)
    )
    return result.rowcount == 1


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
    connection.execute(
        update(parts)
        .where(parts.c.job_id == job_id, parts.c.state == PartState.WAITING.value)
        .values(state=PartState.DROPPED.value, reason=reason, answered_at=utc_now())
    )


def find_waiting(connection: Connection, *, age_seconds: float) -> list[Part]:
    """Return the parts without an answer of the open rounds that were sent so long ago."""
    query = (
        select(parts)
        .join(rounds, rounds.c.round_id == parts.c.round_id)
        .where(
            rounds.c.state == RoundState.OPEN.value,
            rounds.c.published_at < utc_now() - timedelta(seconds=age_seconds),
            parts.c.state == PartState.WAITING.value,
        )
    )
    return [_part(row) for row in connection.execute(query).mappings()]


def _round(row: RowMapping) -> Round:
    return Round(
        job_id=row[rounds.c.job_id],
        kind=RoundKind(row[rounds.c.kind]),
        number=row[rounds.c.number],
        state=RoundState(row[rounds.c.state]),
        input_model_id=row[rounds.c.input_model_id],
        output_model_id=row[rounds.c.output_model_id],
        deadline_at=row[rounds.c.deadline_at],
        published_at=row[rounds.c.published_at],
        metrics=row[rounds.c.metrics],
        reason=row[rounds.c.reason],
        seconds=row[rounds.c.seconds],
        created_at=row[rounds.c.created_at],
        closed_at=row[rounds.c.closed_at],
    )


def _part(row: RowMapping) -> Part:
    return Part(
        job_id=row[parts.c.job_id],
        round_id=row[parts.c.round_id],
        site=row[parts.c.site],
        position=row[parts.c.position],
        attempt=row[parts.c.attempt],
        state=PartState(row[parts.c.state]),
        reason=row[parts.c.reason],
        num_examples=row[parts.c.num_examples],
        metrics=row[parts.c.metrics],
        model_id=row[parts.c.model_id],
        answered_at=row[parts.c.answered_at],
        update_norm=row[parts.c.update_norm],
        global_norm=row[parts.c.global_norm],
        released=row[parts.c.code] == RELEASED,
    )
