"""Record models: what each one is, where it comes from, and which blobs hold it."""

import operator
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from enum import IntEnum
from functools import reduce
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Text,
    bindparam,
    cast,
    delete,
    exc,
    func,
    insert,
    literal,
    select,
    text,
    update,
)

from common.errors import Conflict, NotFound, TooLarge
from store.blobs import Blob
from store.tables import jobs, model_info, utc_now


class ModelState(IntEnum):
    """What became of a model; the numbers are those of the field's other model stores."""

    CREATED = 10  # stored
    FEEDBACKED = 20  # sent up, as an update is
    AGGREGATED = 30  # made from other models
    TRANSFERRED = 40  # received from a coordinator above


def new_model_id() -> str:
    """Return an id that no other model has."""
    return str(uuid.uuid4())


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What is known of a model."""

    model_id: str = field(default_factory=new_model_id)
    store: str  # the model store's name, e.g. "ddc:digits"
    tenant_id: str = ""  # of the party that made it
    model_kind: str = ""
    model_description: str = ""
    model_meta: Mapping[str, Any] = field(default_factory=dict)  # whatever its maker wants to keep with it, as JSON
    model_state: ModelState = ModelState.CREATED
    model_hash: str  # digest of the file that was put, or of the index of what a job made
    index_hash: str | None = None  # digest of the tensors' index, None for an opaque file
    model_size: int  # bytes of all shards
    round: int = 0  # of the job, 0 for a model that no round made
    hop_count: int = 0  # coordinators between its maker and this one
    start_datetime: datetime | None = None  # when its making started
    end_datetime: datetime | None = None  # when its making ended
    location: Sequence[float] | str | None = None  # of its maker: [x, y], or WKB in hexadecimal
    parents: tuple[str, ...] = ()  # ids of the models it was made from
    job_id: str | None = None
    site: str | None = None  # the site that made it, None for the coordinator
    num_examples: int | None = None  # it was trained on
    metrics: Mapping[str, Any] = field(default_factory=dict)  # by name
    shards: tuple[Blob, ...] = ()  # in the order of the index
    created_at: datetime = field(default_factory=utc_now)
    origin_node: str | None = None  # the node that this is a copy from, None for one made here
    origin_model_id: str | None = None  # its id there
    kept: bool = False  # a person has said that its bytes, and those of all that it comes from, stay
    expired_at: datetime | None = None  # since when its bytes may go; None: they stay
    expired_reason: str = ""  # why they may go
    sequence: int = 0  # the order in which models were added; the database gives it


# Statements that are asked for often are built once: to build one costs as much as to run it.
_COLUMNS = tuple(column.name for column in fields(ModelInfo))
_SELECT = select(*(model_info.c[name] for name in _COLUMNS))
_SELECT_ONE = _SELECT.where(model_info.c.model_id == bindparam("model_id"))
_SELECT_COPY = _SELECT.where(
    model_info.c.store == bindparam("store"),
    model_info.c.origin_node == bindparam("origin_node"),
    model_info.c.origin_model_id == bindparam("origin_model_id"),
)
_SELECT_SAME = _SELECT.where(model_info.c.model_hash == bindparam("model_hash")).order_by(model_info.c.sequence.desc())
# Written out, so that the database sees that it can use the index that holds only these.
_FEEDBACKED = (model_info.c.store == bindparam("store"), text("model_state = 20"))
_HIGHEST_FEEDBACKED = select(model_info.c.round).where(*_FEEDBACKED).order_by(model_info.c.round.desc()).limit(1)
_NEWEST_FEEDBACKED = (
    select(func.max(model_info.c.sequence))
    .where(*_FEEDBACKED, model_info.c.round == bindparam("round"))
    .group_by(model_info.c.tenant_id, model_info.c.site, model_info.c.origin_node)
)
_LONG_COLUMNS = ("model_description", "model_meta", "parents", "metrics", "shards")
_SHORT_BYTES = 1200  # of the other columns together, with the names of all
_RECORD_BYTES = reduce(
    operator.add, (func.length(cast(model_info.c[name], Text)) for name in _LONG_COLUMNS), literal(_SHORT_BYTES)
)
_INSERT = insert(model_info).returning(model_info.c.sequence)


def add_model(connection: Connection, info: ModelInfo) -> ModelInfo:
    """Record the model and return it with its sequence; raise Conflict if its id is taken."""
    values = {column.name: getattr(info, column.name) for column in fields(info) if column.name != "sequence"}
    values["shards"] = [{"digest": shard.digest, "size": shard.size} for shard in info.shards]
    try:
        sequence = connection.scalars(_INSERT, values).one()
    except exc.IntegrityError as error:
        raise Conflict(f"There is a model {info.model_id} already; give the new one its own id.") from error
    return replace(info, sequence=sequence)


def get_model(connection: Connection, model_id: str) -> ModelInfo:
    """Return the model; raise NotFound if there is none with that id."""
    row = connection.execute(_SELECT_ONE, {"model_id": model_id}).first()
    if row is None:
        raise _no_model(model_id)
    return _model(row)


def find_model(connection: Connection, beginning: str) -> ModelInfo:
    """Return the model whose id is, or alone begins with, the text; raise NotFound if there is none or more."""
    begins = model_info.c.model_id.startswith(beginning, autoescape=True)
    shortest_first = func.length(model_info.c.model_id)  # the id that is the text comes before those that go on
    rows = connection.execute(_SELECT.where(begins).order_by(shortest_first).limit(2)).all()
    if not rows or not beginning:
        raise NotFound(f"There is no model whose id begins with {beginning!r}; `fedchord models` lists them.")
    if len(rows) > 1 and rows[0].model_id != beginning:
        raise NotFound(f"More than one model has an id that begins with {beginning!r}; `fedchord models` lists them.")
    return _model(rows[0])


def get_models(connection: Connection, model_ids: Sequence[str]) -> tuple[ModelInfo, ...]:
    """Return the models in the order asked for; raise NotFound if there is none with one of the ids."""
    found = find_by_id(connection, model_ids)
    for model_id in model_ids:
        if model_id not in found:
            raise _no_model(model_id)
    return tuple(found[model_id] for model_id in model_ids)


def find_by_id(connection: Connection, model_ids: Sequence[str]) -> dict[str, ModelInfo]:
    """Return those of the models that there are, by their ids."""
    found: dict[str, ModelInfo] = {}
    for some in parts_of(model_ids):
        rows = connection.execute(_SELECT.where(model_info.c.model_id.in_(some)))
        found.update((model.model_id, model) for model in map(_model, rows))
    return found


def parts_of(values: Sequence[str], count: int = 1000) -> Iterator[Sequence[str]]:
    """Yield so many of the values after another: a statement holds some ten thousand at most."""
    for start in range(0, len(values), count):
        yield values[start : start + count]


def find_models(
    connection: Connection,
    *,
    store: str | None = None,
    job_id: str | None = None,
    state: ModelState | None = None,
    kind: str | None = None,
    round: int | None = None,
    conditions: ColumnElement[bool] | None = None,
    newest_first: bool = True,
    order: Sequence[ColumnElement[Any]] = (),
    limit: int | None = None,
    offset: int = 0,
    max_bytes: int | None = None,  # of the records together, which are all in memory
) -> tuple[ModelInfo, ...]:
    """Return the models for which all that is given holds, in the order if there is one (see `store.conditions`).

    Raise TooLarge if their records have more than max_bytes.
    """
    matching = _matching(store=store, job_id=job_id, state=state, kind=kind, round=round)
    if conditions is not None:
        matching.append(conditions)
    ordered = order or (model_info.c.sequence.desc() if newest_first else model_info.c.sequence,)
    query = _SELECT.where(*matching).order_by(*ordered).limit(limit).offset(offset)
    if max_bytes is not None:
        sizes = query.with_only_columns(_RECORD_BYTES.label("num_bytes")).subquery()
        num_bytes = connection.scalar(select(func.sum(sizes.c.num_bytes))) or 0
        if num_bytes > max_bytes:
            raise TooLarge(
                f"The records of these models have {num_bytes} bytes, and {max_bytes} is the limit; ask for fewer at a "
                "time, with limit and offset."
            )
    return tuple(_model(row) for row in connection.execute(query).all())


def latest_model(
    connection: Connection,
    *,
    store: str | None = None,
    job_id: str | None = None,
    state: ModelState | None = None,
    kind: str | None = None,
    round: int | None = None,
) -> ModelInfo | None:
    """Return the model that was added last among those for which all that is given holds, or None."""
    matching = _matching(store=store, job_id=job_id, state=state, kind=kind, round=round)
    query = _SELECT.where(*matching).order_by(model_info.c.sequence.desc()).limit(1)
    row = connection.execute(query).first()
    return None if row is None else _model(row)


def count_models(connection: Connection, store: str, conditions: ColumnElement[bool] | None = None) -> int:
    """Return how many models of the model store meet the conditions."""
    query = select(func.count()).select_from(model_info).where(model_info.c.store == store)
    return connection.scalars(query if conditions is None else query.where(conditions)).one()


def find_copy(connection: Connection, store: str, origin_node: str, origin_model_id: str) -> ModelInfo | None:
    """Return the model store's copy of another node's model, or None."""
    row = connection.execute(
        _SELECT_COPY, {"store": store, "origin_node": origin_node, "origin_model_id": origin_model_id}
    )
    found = row.first()
    return None if found is None else _model(found)


def find_copies(
    connection: Connection, store: str, origin_node: str, origin_model_ids: Sequence[str]
) -> dict[str, str]:
    """Return the ids of the model store's copies of another node's models, by their ids there."""
    query = select(model_info.c.origin_model_id, model_info.c.model_id).where(
        model_info.c.store == store, model_info.c.origin_node == origin_node
    )
    found: dict[str, str] = {}
    for some in parts_of(origin_model_ids):
        rows = connection.execute(query.where(model_info.c.origin_model_id.in_(some)))
        found.update((there, here) for there, here in rows)
    return found


def ids_in_store(connection: Connection, store: str, model_ids: Sequence[str]) -> set[str]:
    """Return those of the ids that are models' of the model store."""
    query = select(model_info.c.model_id).where(model_info.c.store == store)
    return {
        found
        for some in parts_of(model_ids)
        for found in connection.scalars(query.where(model_info.c.model_id.in_(some)))
    }


def find_by_hash(connection: Connection, stores: Sequence[str], model_hash: str) -> ModelInfo | None:
    """Return the newest model of the hash in one of the model stores, or None."""
    rows = connection.execute(_SELECT_SAME, {"model_hash": model_hash})
    wanted = frozenset(stores)
    return next((_model(row) for row in rows if row.store in wanted), None)


def latest_feedbacked(connection: Connection, store: str, round: int | None = None) -> tuple[ModelInfo, ...]:
    """Return the newest model that each origin fed back in the round, the newest first.

    An origin is a tenant, site and node. Without a round it is the highest in which anything was fed back.
    """
    if round is None:
        round = connection.scalar(_HIGHEST_FEEDBACKED, {"store": store})
    newest = connection.scalars(_NEWEST_FEEDBACKED, {"store": store, "round": round}).all()
    found: list[ModelInfo] = []
    for start in range(0, len(newest), 1000):
        rows = connection.execute(_SELECT.where(model_info.c.sequence.in_(newest[start : start + 1000])))
        found.extend(map(_model, rows))
    return tuple(sorted(found, key=lambda model: model.sequence, reverse=True))


def set_metrics(connection: Connection, model_id: str, metrics: Mapping[str, Any]) -> None:
    """Replace the model's metrics, as when it has been tested; raise NotFound if there is none with that id."""
    changed = update(model_info).where(model_info.c.model_id == model_id).values(metrics=dict(metrics))
    if connection.execute(changed).rowcount == 0:
        raise _no_model(model_id)


def delete_model(connection: Connection, model_id: str) -> None:
    """Forget the model, not its blobs.

    Raise NotFound if there is none, Conflict while a job goes on from it, or somebody has said that it is kept.
    """
    users = connection.scalars(
        select(jobs.c.job_id).where(jobs.c.model_id == model_id, jobs.c.finished_at.is_(None))
    ).all()
    if users:
        raise Conflict(f"Model {model_id} is the current one of job {users[0]}; wait for the job or abort it first.")
    if connection.scalar(select(model_info.c.kept).where(model_info.c.model_id == model_id)):
        raise Conflict(f"Model {model_id} is kept; say `fedchord models keep {model_id} --off` before you delete it.")
    if connection.execute(delete(model_info).where(model_info.c.model_id == model_id)).rowcount == 0:
        raise _no_model(model_id)


def delete_models(connection: Connection, store: str) -> int:
    """Forget all models of the model store and return how many; raise Conflict while a job goes on from one."""
    ours = select(model_info.c.model_id).where(model_info.c.store == store)
    user = connection.execute(
        select(jobs.c.job_id, jobs.c.model_id).where(jobs.c.finished_at.is_(None), jobs.c.model_id.in_(ours)).limit(1)
    ).first()
    if user is not None:
        raise Conflict(
            f"Model {user.model_id} is the current one of job {user.job_id}; wait for the job or abort it first."
        )
    return connection.execute(delete(model_info).where(model_info.c.store == store)).rowcount


def _matching(
    *,
    store: str | None = None,
    job_id: str | None = None,
    state: ModelState | None = None,
    kind: str | None = None,
    round: int | None = None,
) -> list[ColumnElement[bool]]:
    wanted = {"store": store, "job_id": job_id, "model_state": state, "model_kind": kind, "round": round}
    return [model_info.c[name] == value for name, value in wanted.items() if value is not None]


def _model(row: Row[Any]) -> ModelInfo:
    values: dict[str, Any] = dict(zip(_COLUMNS, row, strict=True))  # a row's own mapping costs more than the query
    values["model_state"] = ModelState(values["model_state"])
    values["parents"] = tuple(values["parents"])
    values["shards"] = tuple(Blob(digest=shard["digest"], size=shard["size"]) for shard in values["shards"])
    return ModelInfo(**values)


def _no_model(model_id: str) -> NotFound:
    return NotFound(f"There is no model {model_id[:80]!a}; `fedchord models` lists those that there are.")
