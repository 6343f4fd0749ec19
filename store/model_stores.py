"""Record model stores: named sets of models, each of one tenant, which may open it to others."""

import re
import uuid
from dataclasses import dataclass, fields
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, RowMapping, bindparam, delete, exc, insert, or_, select, text, update

from common.errors import AccessDenied, Conflict, InvalidInput, NotFound
from store.models import delete_models
from store.tables import jobs, model_stores, store_grants, tenants, upstreams, utc_now
from store.tenants import Caller

OPERATOR = ""  # the tenant_id of the operator's own model stores

_PREFIX = "ddc:"
_NAME = re.compile(r"ddc:[A-Za-z0-9][A-Za-z0-9._ -]{0,99}")
_SHOWN_CHARACTERS = 80  # of what somebody else wrote, in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStore:
    """What is known of a model store."""

    id: str  # uuid4
    name: str  # e.g. "ddc:digits"
    tenant_id: str  # who owns it, empty for the operator
    description: str
    created_at: datetime
    updated_at: datetime


_SELECT = select(*(model_stores.c[field.name] for field in fields(ModelStore)))
_SELECT_NAME = _SELECT.where(model_stores.c.name == bindparam("name"))
_SELECT_GRANT = select(store_grants.c.may_write).where(
    store_grants.c.store_id == bindparam("store_id"), store_grants.c.tenant_id == bindparam("tenant_id")
)


def check_store_name(name: str) -> str:
    """Return the model store's name; raise InvalidInput unless it is one."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name[:_SHOWN_CHARACTERS]!a} cannot be a model store's name; write {_PREFIX} and 1 to 100 letters, "
            "digits, dots, underscores, spaces and hyphens, the first a letter or digit."
        )
    return name


def store_name_of_job(name: str) -> str:
    """Return the name of the model store into which a job of that name puts its models."""
    return f"{_PREFIX}{name}"


def add_store(connection: Connection, name: str, *, tenant_id: str = OPERATOR, description: str = "") -> ModelStore:
    """Record the model store and return it; one that the tenant has already stays as it is.

    Raise InvalidInput for what is no name, Conflict if the model store is another tenant's.
    """
    now = utc_now()
    store = ModelStore(
        id=str(uuid.uuid4()),
        name=check_store_name(name),
        tenant_id=tenant_id,
        description=description,
        created_at=now,
        updated_at=now,
    )
    known = lock_store(connection, name)
    if known is None:
        try:
            with connection.begin_nested():  # so that the caller's transaction survives a race that we lose
                connection.execute(
                    insert(model_stores), {field.name: getattr(store, field.name) for field in fields(store)}
                )
        except exc.IntegrityError:
            known = get_store(connection, name)
        else:
            return store
    if known.tenant_id != tenant_id:
        raise Conflict(f"There is a model store {name} already, of another tenant; choose another name.")
    return known


def find_store(connection: Connection, name: str) -> ModelStore | None:
    """Return the model store, or None."""
    row = connection.execute(_SELECT_NAME, {"name": name}).mappings().first()
    return None if row is None else _store(row)


def get_store(connection: Connection, name: str) -> ModelStore:
    """Return the model store; raise NotFound if there is none of that name."""
    store = find_store(connection, name)
    if store is None:
        raise _no_store(name)
    return store


def lock_store(connection: Connection, name: str, *, alone: bool = False) -> ModelStore | None:
    """Return the model store, which nobody can remove until the transaction ends, or None.

    With `alone`, nobody else has it locked either. SQLite has one writer at a time in any case.
    """
    row = connection.execute(_SELECT_NAME.with_for_update(read=not alone), {"name": name}).mappings().first()
    return None if row is None else _store(row)


def lock_out_puts(connection: Connection) -> None:
    """Let nobody lock a model store, as who records a model or submits a job does, until the transaction ends.

    SQLite has one writer at a time in any case.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE model_stores IN EXCLUSIVE MODE"))


def visible_stores(connection: Connection, caller: Caller) -> tuple[ModelStore, ...]:
    """Return the model stores that the caller may read, by name."""
    query = _SELECT.where(_visible_to(caller)).order_by(model_stores.c.name)
    return tuple(_store(row) for row in connection.execute(query).mappings())


def check_access(connection: Connection, caller: Caller, name: str, *, write: bool) -> ModelStore:
    """Return the model store if the caller may read it, or write to it.

    Raise InvalidInput for what is no name, NotFound for one that the caller cannot see, whether it is there or not,
    and AccessDenied for one that the caller may only read.
    """
    store = find_store(connection, check_store_name(name))
    if store is None:
        raise _no_store(name)
    if caller.is_operator or store.tenant_id == caller.tenant_id:
        return store
    may_write = connection.scalar(_SELECT_GRANT, {"store_id": store.id, "tenant_id": caller.tenant_id})
    if may_write is None:
        raise _no_store(name)
    if write and not may_write:
        raise AccessDenied(f"You may read model store {name} but not change it; ask its owner to open it for writing.")
    return store


def check_owner(connection: Connection, caller: Caller, name: str) -> ModelStore:
    """Return the model store if it is the caller's; raise what `check_access` raises, AccessDenied included."""
    store = check_access(connection, caller, name, write=False)
    if not caller.is_operator and store.tenant_id != caller.tenant_id:
        raise AccessDenied(f"Model store {name} belongs to another tenant, who alone may do this; ask them.")
    return store


def remove_store(connection: Connection, name: str) -> int:
    """Forget the model store, its models, grants and upstreams; return how many models that were.

    Raise NotFound if there is none, Conflict while a job puts its models there or goes on from one of them.
    """
    store = lock_store(connection, name, alone=True)
    if store is None:
        raise _no_store(name)
    unfinished = jobs.c.finished_at.is_(None)
    user = connection.scalar(
        select(jobs.c.job_id).where(unfinished, jobs.c.name == name.removeprefix(_PREFIX)).limit(1)
    )
    if user is not None:
        raise Conflict(f"Job {user} puts its models into {name}; wait for the job or abort it first.")
    count = delete_models(connection, name)
    connection.execute(delete(store_grants).where(store_grants.c.store_id == store.id))
    connection.execute(delete(upstreams).where(upstreams.c.store == name))
    connection.execute(delete(model_stores).where(model_stores.c.id == store.id))
    return count


def grant(connection: Connection, name: str, tenant_id: str, *, may_write: bool) -> None:
    """Open the model store to the tenant, for reading or also for writing; raise NotFound for no such store or tenant.

    What was opened before is open as it is asked for now.
    """
    store = lock_store(connection, name, alone=True)
    if store is None:
        raise _no_store(name)
    if connection.scalar(select(tenants.c.tenant_id).where(tenants.c.tenant_id == tenant_id)) is None:
        raise NotFound(
            f"There is no tenant {tenant_id[:_SHOWN_CHARACTERS]!a}; `fedchord store tenants` lists all of them."
        )
    one = (store_grants.c.store_id == store.id, store_grants.c.tenant_id == tenant_id)
    if connection.execute(update(store_grants).where(*one).values(may_write=may_write)).rowcount == 0:
        values = {"store_id": store.id, "tenant_id": tenant_id, "may_write": may_write}
        connection.execute(insert(store_grants), values)


def revoke(connection: Connection, name: str, tenant_id: str) -> int:
    """Close the model store to the tenant; return 1 if it was open, else 0. Raise NotFound for no such store."""
    store = get_store(connection, name)
    one = (store_grants.c.store_id == store.id, store_grants.c.tenant_id == tenant_id)
    return connection.execute(delete(store_grants).where(*one)).rowcount


def _visible_to(caller: Caller) -> ColumnElement[bool]:
    if caller.is_operator:
        return model_stores.c.id == model_stores.c.id
    granted = select(store_grants.c.store_id).where(store_grants.c.tenant_id == caller.tenant_id)
    return or_(model_stores.c.tenant_id == caller.tenant_id, model_stores.c.id.in_(granted))


def _store(row: RowMapping) -> ModelStore:
    return ModelStore(**row)


def _no_store(name: str) -> NotFound:
    return NotFound(
        f"There is no model store {name[:_SHOWN_CHARACTERS]!a} that you may use; make it with initialize_model_store, "
        "or `fedchord store create`."
    )
