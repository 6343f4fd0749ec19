"""Let the bytes of what jobs have made expire, by age and by size; the records stay.

    the bytes stay ─▶ expired_at is set ─▶ (keep_unused_hours later) `store.garbage` removes the blobs

Both steps can be repeated, and be done by several processes at once. What expires is decided under the lock that
recording a model, keeping one and submitting a job take too, so nobody can begin to need it meanwhile; and the hours in
between let a download end, or go on after a cut, that began before.

Never: what a job makes that has not ended, or goes on from; the model that a job has left; what a site may still hold
references to; what is kept, with all that it comes from; and what no job has made, because people put it there. An
optimizer's state goes with its global model.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, Engine, or_, select, update

from common.settings import Settings
from store.database import reading, writing
from store.keeping import OPTIMIZER, kept_models, lineage_ids
from store.model_stores import lock_out_puts
from store.tables import jobs, model_info, rounds, utc_now

logger = logging.getLogger(__name__)

_AT_ONCE = 500  # models marked in one transaction, during which nobody records a model
_LONGEST_DAYS = 100 * 365.0  # a time so long ago is before any record; `inf` is none


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """A model whose bytes are to expire, or have just done so."""

    model_id: str
    model_store_ddc: str
    model_kind: str
    job_id: str
    site: str | None  # that made it
    round: int
    bytes: int  # of all its shards
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """How long, and how much, of one class of models is kept."""

    name: str  # as the settings have it
    days: float
    gigabytes: float
    hold_seconds: float  # after its job has ended, sites may still hold references


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A model that a job made and that has not expired."""

    model_id: str
    store: str
    model_kind: str
    job_id: str
    site: str | None
    round: int
    model_size: int
    created_at: datetime
    finished_at: datetime | None  # the job; None: it goes on
    optimizer: str | None  # the id of the optimizer's state that goes with it


@dataclass(frozen=True, kw_only=True)
class _Lot:
    """What expires together: a model, or a global model and the state of its optimizer."""

    members: tuple[_Candidate, ...]  # the first one decides

    @property
    def size(self) -> int:
        return sum(member.model_size for member in self.members)


_CANDIDATES = (
    select(
        model_info.c.model_id,
        model_info.c.store,
        model_info.c.model_kind,
        model_info.c.job_id,
        model_info.c.site,
        model_info.c.round,
        model_info.c.model_size,
        model_info.c.created_at,
        jobs.c.finished_at,
        OPTIMIZER,
    )
    .join(jobs, jobs.c.job_id == model_info.c.job_id)
    .where(
        model_info.c.expired_at.is_(None),
        or_(model_info.c.site.is_not(None), model_info.c.model_kind.in_(("global", "optimizer"))),
    )
    .order_by(model_info.c.sequence)
)


def find_due(engine: Engine, settings: Settings) -> list[Due]:
    """Return what `expire` would let expire now."""
    with reading(engine) as connection:
        spared = lineage_ids(connection, kept_models(connection))
        candidates = _candidates(connection)
        in_use = _in_use(connection, _companions(candidates))
    return _due(candidates, settings, in_use, spared)


def expire(engine: Engine, settings: Settings) -> list[Due]:
    """Let the bytes expire that are older, or more, than the settings say; return what that was.

    What is found is looked at again, a little at a time, under the lock: a round must not wait long for it.
    """
    with reading(engine) as connection:
        kept = kept_models(connection)
        spared = lineage_ids(connection, kept)
        candidates = _candidates(connection)
        companions = _companions(candidates)
        due = _due(candidates, settings, _in_use(connection, companions), spared)
    expired: list[Due] = []
    for start in range(0, len(due), _AT_ONCE):
        with writing(engine) as connection:
            lock_out_puts(connection)
            now_kept = kept_models(connection)
            if now_kept != kept:  # a lineage never changes, so what was read of it still holds
                kept, spared = now_kept, lineage_ids(connection, now_kept)
            protected = _in_use(connection, companions) | spared
            expired += _mark(connection, due[start : start + _AT_ONCE], protected)
    for reason, count in Counter(each.reason for each in expired).items():
        logger.info("%s models have expired: %s", count, reason, extra={"action": "expire_models"})
    return expired


def _mark(connection: Connection, due: Sequence[Due], protected: set[str]) -> list[Due]:
    """Mark those that nothing protects and nobody has marked or deleted meanwhile; return them."""
    asked = [each.model_id for each in due if each.model_id not in protected]
    is_there = (model_info.c.model_id.in_(asked), model_info.c.expired_at.is_(None))
    left = set(connection.scalars(select(model_info.c.model_id).where(*is_there)))
    marked = [each for each in due if each.model_id in left]
    now = utc_now()
    for reason in {each.reason for each in marked}:
        ids = [each.model_id for each in marked if each.reason == reason]
        connection.execute(
            update(model_info).where(model_info.c.model_id.in_(ids)).values(expired_at=now, expired_reason=reason)
        )
    return marked


def _candidates(connection: Connection) -> list[_Candidate]:
    return [_Candidate(**row) for row in connection.execute(_CANDIDATES).mappings()]


def _companions(candidates: Sequence[_Candidate]) -> dict[str, str]:
    """Return the ids of the optimizers' states, by the global models that they go with."""
    return {each.model_id: each.optimizer for each in candidates if each.optimizer is not None}


def _due(candidates: Sequence[_Candidate], settings: Settings, in_use: set[str], spared: set[str]) -> list[Due]:
    updates = _Limits(
        name="updates", days=settings.keep_updates_days, gigabytes=settings.keep_updates_gigabytes, hold_seconds=0
    )
    models = _Limits(
        name="models",
        days=settings.keep_models_days,
        gigabytes=settings.keep_models_gigabytes,
        hold_seconds=settings.reference_seconds,
    )
    of_sites = _lots((each for each in candidates if each.site is not None), {})
    made_here = _lots((each for each in candidates if each.site is None), _companions(candidates))
    now = utc_now()
    return [*_over(of_sites, updates, in_use, spared, now), *_over(made_here, models, in_use, spared, now)]


def _in_use(connection: Connection, companions: Mapping[str, str]) -> set[str]:
    """Return the ids of the models that jobs were left with, are at or began with, with their optimizers' states."""
    found = _inputs(connection)
    found.update(connection.scalars(select(jobs.c.model_id).where(jobs.c.model_id.is_not(None))))
    return found | {companions[model_id] for model_id in found if model_id in companions}


def _inputs(connection: Connection) -> set[str]:
    """Return the ids of the models that jobs which have not ended began with, or began a round with."""
    live = jobs.c.finished_at.is_(None)
    begun = select(rounds.c.input_model_id).join(jobs, jobs.c.job_id == rounds.c.job_id)
    found = set(connection.scalars(begun.where(live, rounds.c.input_model_id.is_not(None))))
    for spec in connection.scalars(select(jobs.c.spec).where(live)):
        model_id = (spec.get("initial_model") or {}).get("model")
        found |= {model_id} if model_id else set()
    return found


def _lots(rows: Iterable[_Candidate], companions: Mapping[str, str]) -> list[_Lot]:
    """Return what expires together, the oldest first; an optimizer's state is with the last model that has it."""
    by_id = {row.model_id: row for row in rows}
    owners = {optimizer: model_id for model_id, optimizer in companions.items() if optimizer in by_id}
    owned = {model_id: by_id[optimizer] for optimizer, model_id in owners.items()}
    return [
        _Lot(members=(row, owned[model_id]) if model_id in owned else (row,))
        for model_id, row in by_id.items()
        if model_id not in owners
    ]


def _over(lots: Sequence[_Lot], limits: _Limits, in_use: set[str], spared: set[str], now: datetime) -> Iterator[Due]:
    """Yield what is too old, and then the oldest of what is too much."""
    protected = in_use | spared
    left = sum(lot.size for lot in lots if lot.members[0].model_id not in in_use)  # these are the jobs' results
    young = []
    for lot in lots:
        head = lot.members[0]
        if head.model_id in protected or head.finished_at is None or _is_held(head.finished_at, limits, now):
            continue
        if now - max(head.created_at, head.finished_at) < timedelta(days=min(limits.days, _LONGEST_DAYS)):
            young.append(lot)
            continue
        left -= lot.size
        reason = f"keep_{limits.name}_days is {limits.days:g}, and its job ended longer ago."
        yield from _expiring(lot, protected, reason)
    for lot in young:
        if left <= limits.gigabytes * 10**9:
            return
        left -= lot.size
        reason = f"keep_{limits.name}_gigabytes is {limits.gigabytes:g}, and there was more; the oldest go first."
        yield from _expiring(lot, protected, reason)


def _is_held(finished_at: datetime, limits: _Limits, now: datetime) -> bool:
    return now - finished_at < timedelta(seconds=limits.hold_seconds)


def _expiring(lot: _Lot, protected: set[str], reason: str) -> Iterator[Due]:
    for member in lot.members:
        if member.model_id not in protected:
            yield Due(
                model_id=member.model_id,
                model_store_ddc=member.store,
                model_kind=member.model_kind,
                job_id=member.job_id,
                site=member.site,
                round=member.round,
                bytes=member.model_size,
                reason=reason,
            )
