"""Record tenants: who may call the model store's service, by API key and secret."""

import hmac
import secrets
import uuid
from dataclasses import dataclass, fields
from datetime import datetime

from sqlalchemy import Connection, RowMapping, bindparam, exc, insert, or_, select, update

from common.errors import AccessDenied, Conflict, InvalidInput, NotFound
from common.settings import Settings
from store.blobs import hash_bytes
from store.tables import tenants as tenants_table
from store.tables import utc_now

_KEY_BYTES = 16  # of randomness; the key is a name, not a secret
_SECRET_BYTES = 32  # of randomness
_MAX_NAME_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks for something."""

    tenant_id: str
    tenant_name: str  # for people
    is_operator: bool  # may do everything


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """What is known of a tenant, the secret not included."""

    tenant_id: str  # uuid4
    name: str  # for people, unique
    api_key: str  # says who calls
    is_operator: bool  # may do everything
    enabled: bool  # whether it may call
    created_at: datetime
    updated_at: datetime


_FIELDS = [tenants_table.c[field.name] for field in fields(Tenant)]
_SELECT_KEY = select(*_FIELDS, tenants_table.c.secret_hash).where(tenants_table.c.api_key == bindparam("api_key"))
_NO_HASH = "0" * 64  # compared with when there is no such key, so that the answer takes as long


def operator(settings: Settings) -> Caller:
    """Return who does everything: the local command line, and everybody on this machine where access is open."""
    return Caller(tenant_id=settings.tenant_id, tenant_name=settings.tenant_name, is_operator=True)


def add_tenant(connection: Connection, name: str, *, is_operator: bool = False) -> tuple[Tenant, str]:
    """Record the tenant; return it with its secret, which is told this once. Raise Conflict if the name is taken.

    Only the secret's hash is kept. One fast hash suffices: the secret is random, 256 bits, and nobody can guess it.
    """
    now = utc_now()
    tenant = Tenant(
        tenant_id=str(uuid.uuid4()),
        name=_check_name(name),
        api_key=secrets.token_urlsafe(_KEY_BYTES),
        is_operator=is_operator,
        enabled=True,
        created_at=now,
        updated_at=now,
    )
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    values = {field.name: getattr(tenant, field.name) for field in fields(tenant)}
    try:
        with connection.begin_nested():
            connection.execute(insert(tenants_table), {**values, "secret_hash": _hash(secret)})
    except exc.IntegrityError as error:
        raise Conflict(f"There is a tenant {name!r} already; choose another name, or renew its secret.") from error
    return tenant, secret


def authenticate(connection: Connection, api_key: str, secret: str) -> Caller:
    """Return who has the key and the secret; raise AccessDenied, which does not tell what is wrong with them."""
    row = None
    if "\0" not in api_key:  # which PostgreSQL does not take
        row = connection.execute(_SELECT_KEY, {"api_key": api_key}).mappings().first()
    is_right = hmac.compare_digest(_hash(secret), row["secret_hash"] if row is not None else _NO_HASH)
    if row is None or not is_right or not row["enabled"]:
        raise AccessDenied("The API key and secret are not those of a tenant that may call; ask the operator for them.")
    return Caller(tenant_id=row["tenant_id"], tenant_name=row["name"], is_operator=row["is_operator"])


def tenants(connection: Connection) -> tuple[Tenant, ...]:
    """Return the tenants by name."""
    rows = connection.execute(select(*_FIELDS).order_by(tenants_table.c.name)).mappings()
    return tuple(_tenant(row) for row in rows)


def get_tenant(connection: Connection, name_or_id: str) -> Tenant:
    """Return the tenant; raise NotFound."""
    one = or_(tenants_table.c.tenant_id == name_or_id, tenants_table.c.name == name_or_id)
    row = connection.execute(select(*_FIELDS).where(one)).mappings().first()
    if row is None:
        raise NotFound(f"There is no tenant {name_or_id[:80]!a}; `fedchord store tenants` lists those that there are.")
    return _tenant(row)


def set_tenant_enabled(connection: Connection, name_or_id: str, enabled: bool) -> Tenant:
    """Let the tenant call or not, and return it; raise NotFound."""
    tenant = get_tenant(connection, name_or_id)
    _change(connection, tenant, enabled=enabled)
    return get_tenant(connection, tenant.tenant_id)


def renew_secret(connection: Connection, name_or_id: str) -> str:
    """Give the tenant a new secret and return it, this once; the old one ends. Raise NotFound."""
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    _change(connection, get_tenant(connection, name_or_id), secret_hash=_hash(secret))
    return secret


def _change(connection: Connection, tenant: Tenant, **values: object) -> None:
    one = tenants_table.c.tenant_id == tenant.tenant_id
    connection.execute(update(tenants_table).where(one).values(**values, updated_at=utc_now()))


def _hash(secret: str) -> str:
    return hash_bytes(secret.encode("utf-8", "surrogatepass")).digest


def _check_name(name: str) -> str:
    if not 1 <= len(name) <= _MAX_NAME_CHARACTERS or not name.isprintable() or name != name.strip():
        raise InvalidInput(
            f"{name[:80]!a} cannot be a tenant's name; use 1 to {_MAX_NAME_CHARACTERS} printable characters, "
            "without a space at either end."
        )
    return name


def _tenant(row: RowMapping) -> Tenant:
    return Tenant(**row)
