"""Keep models: their bytes, and those of all that they come from, stay whatever their age and size."""

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, and_, case, func, select, update

from store.blobs import BlobStore
from store.database import reading, writing
from store.expiry import expired_error, has_bytes
from store.model_stores import lock_out_puts
from store.models import ModelInfo, find_by_id, get_model, parts_of
from store.tables import audit, model_info

logger = logging.getLogger(__name__)

_AT_ONCE = 100  # models brought back in one transaction

OPTIMIZER = case(  # the id of the optimizer's state that a job's global model goes with, or NULL
    (
        and_(model_info.c.job_id.is_not(None), model_info.c.site.is_(None), model_info.c.model_kind == "global"),
        model_info.c.model_meta[("optimizer", "model_id")].as_string(),
    )
).label("optimizer")

_ORIGINS = select(model_info.c.model_id, model_info.c.job_id, model_info.c.parents, OPTIMIZER)


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What came of keeping a model, or of not keeping it any more."""

    model: ModelInfo
    models: int  # that it keeps: itself and all it comes from, as far as they are recorded
    bytes: int  # of them together
    revived: tuple[str, ...] = ()  # ids of those that had expired and are back
    gone: tuple[str, ...] = ()  # ids of those whose bytes were removed before


def kept_models(connection: Connection) -> frozenset[str]:
    """Return the ids of the models that a person has said to keep."""
    return frozenset(connection.scalars(select(model_info.c.model_id).where(model_info.c.kept)))


def lineage_ids(connection: Connection, model_ids: Iterable[str]) -> set[str]:
    """Return the ids of the models and of all that they come from, the states of optimizers included.

    A job's models are read at once: a chain of rounds takes a query for each job, not one for each round.
    """
    origins: dict[str, tuple[str, ...]] = {}  # by id, of every model that was read; nothing for one that is not there
    jobs_read: set[str] = set()
    reached: set[str] = set()
    waiting = set(model_ids)
    while waiting:
        _read_origins(connection, sorted(waiting - origins.keys()), origins, jobs_read)
        stack, waiting = list(waiting), set()
        while stack:
            model_id = stack.pop()
            if model_id in reached:
                continue
            if model_id not in origins:
                waiting.add(model_id)
                continue
            reached.add(model_id)
            stack += origins[model_id]
    return reached


def _read_origins(
    connection: Connection, model_ids: Sequence[str], origins: dict[str, tuple[str, ...]], jobs_read: set[str]
) -> None:
    new_jobs: set[str] = set()
    for some in parts_of(model_ids):
        for model_id, job_id, parents, optimizer in connection.execute(_ORIGINS.where(model_info.c.model_id.in_(some))):
            origins[model_id] = (*parents, *([optimizer] if optimizer else []))
            if job_id is not None and job_id not in jobs_read:
                new_jobs.add(job_id)
    for job_id in new_jobs:
        for model_id, _, parents, optimizer in connection.execute(_ORIGINS.where(model_info.c.job_id == job_id)):
            origins[model_id] = (*parents, *([optimizer] if optimizer else []))
    jobs_read |= new_jobs
    for model_id in model_ids:
        origins.setdefault(model_id, ())


def keep_model(engine: Engine, blobs: BlobStore, model_id: str, *, by: str) -> Keeping:
    """Keep the model and all that it comes from; bring back what has expired and still has its bytes. Can be repeated.

    Raise NotFound if there is no such model, or if its own bytes were removed; nothing has changed then.
    """
    with writing(engine) as connection:
        lock_out_puts(connection)
        model = get_model(connection, model_id)
        if model.expired_at is not None and not has_bytes(blobs, model):
            raise expired_error(model)
        _mark(connection, model, kept=True, by=by)
    # From here on nothing of its lineage expires any more, so the rest can be done bit by bit.
    with reading(engine) as connection:
        ids = sorted(lineage_ids(connection, [model_id]))
        expired = _expired(connection, ids)
    revived: list[str] = []
    for some in parts_of(expired, _AT_ONCE):
        with writing(engine) as connection:
            lock_out_puts(connection)
            revived += _revive(connection, blobs, some)
    with reading(engine) as connection:
        model = get_model(connection, model_id)
        gone = _expired(connection, ids)
        count, size = _measure(connection, ids)
    logger.info(
        "Model %s is kept with %s others of its lineage.",
        model_id,
        count - 1,
        extra={"action": "keep_model", "model": model_id, "revived": len(revived), "gone": len(gone)},
    )
    return Keeping(model=model, models=count, bytes=size, revived=tuple(revived), gone=tuple(gone))


def stop_keeping(engine: Engine, model_id: str, *, by: str) -> Keeping:
    """Keep the model no more than any other; what another one keeps stays. Raise NotFound if there is no such model."""
    with writing(engine) as connection:
        _mark(connection, get_model(connection, model_id), kept=False, by=by)
        model = get_model(connection, model_id)
    with reading(engine) as connection:
        count, size = _measure(connection, sorted(lineage_ids(connection, [model_id])))
    return Keeping(model=model, models=count, bytes=size)


def _mark(connection: Connection, model: ModelInfo, *, kept: bool, by: str) -> None:
    if model.kept is kept:
        return
    connection.execute(update(model_info).where(model_info.c.model_id == model.model_id).values(kept=kept))
    action = f"model.{'keep' if kept else 'stop_keeping'}"
    connection.execute(audit.insert().values(actor=by, action=action, subject=model.model_id, detail={}))


def _revive(connection: Connection, blobs: BlobStore, model_ids: Sequence[str]) -> list[str]:
    """Let those of the models that still have their bytes expire no more; return them."""
    found = find_by_id(connection, model_ids)
    alive = [model_id for model_id, model in found.items() if model.expired_at is not None and has_bytes(blobs, model)]
    values = {"expired_at": None, "expired_reason": ""}
    connection.execute(update(model_info).where(model_info.c.model_id.in_(alive)).values(**values))
    return alive


def _expired(connection: Connection, model_ids: Collection[str]) -> list[str]:
    query = select(model_info.c.model_id).where(model_info.c.expired_at.is_not(None))
    wanted = sorted(model_ids)
    return [
        found for some in parts_of(wanted) for found in connection.scalars(query.where(model_info.c.model_id.in_(some)))
    ]


def _measure(connection: Connection, model_ids: Sequence[str]) -> tuple[int, int]:
    """Return how many of the models there are, and the bytes of them together."""
    query = select(func.count(), func.coalesce(func.sum(model_info.c.model_size), 0))
    rows = [connection.execute(query.where(model_info.c.model_id.in_(some))).one() for some in parts_of(model_ids)]
    return sum(count for count, _ in rows), sum(int(size) for _, size in rows)
