"""Record upstreams: the service, and the model store there, that a model store feeds."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr
from sqlalchemy import Connection, RowMapping, exc, insert, or_, select, update
from sqlalchemy import delete as delete_from

from common.errors import Conflict, InvalidInput, NotFound, NoUpstream
from common.settings import Settings
from store.model_stores import OPERATOR, check_store_name, find_store, lock_store
from store.secret_box import SecretBox
from store.tables import upstreams as upstreams_table
from store.tables import utc_now

__all__ = [
    "SecretBox",
    "Upstream",
    "add_upstream",
    "check_upstream_url",
    "choose_upstream",
    "feeds_upstream_of_settings",
    "get_upstream",
    "no_upstream",
    "remove_upstream",
    "update_upstream",
    "upstream_of_settings",
    "upstreams",
]

DEFAULT_ALIAS = "default"  # the upstream that is meant when there are several and none is named

_MAX_CHARACTERS = {"url": 2000, "api_key": 1000, "secret": 1000, "alias": 100, "description": 10_000}


@dataclass(frozen=True, kw_only=True, slots=True)
class Upstream:
    """What is known of an upstream."""

    id: str  # uuid4, empty for the one in the settings
    store: str  # the model store that feeds it
    url: str  # of the service, without a slash at the end
    api_key: str  # this node's there
    secret: SecretStr  # this node's there; empty except from `choose_upstream`, which alone decrypts it
    upstream_store: str  # the model store there
    alias: str  # what it is called here, unique for the model store
    description: str
    enabled: bool
    created_at: datetime
    updated_at: datetime


_FIELDS = [upstreams_table.c[field.name] for field in fields(Upstream) if field.name != "secret"]
_CHANGES = frozenset({"url", "api_key", "secret", "upstream_store", "alias", "description", "enabled"})


def add_upstream(
    connection: Connection,
    box: SecretBox,
    store: str,
    *,
    url: str,
    api_key: str = "",
    secret: str = "",
    upstream_store: str = "",
    alias: str = DEFAULT_ALIAS,
    description: str = "",
    enabled: bool = True,
) -> Upstream:
    """Record the upstream of a model store, by default the model store of the same name, and return it.

    Raise InvalidInput for a field that cannot be, NotFound for no such model store, Conflict if it has an upstream of
    that alias.
    """
    if lock_store(connection, store) is None:
        raise NotFound(f"There is no model store {store[:80]!r}; make it before its upstream.")
    now = utc_now()
    values = {
        "url": url,
        "api_key": api_key,
        "secret": secret,
        "upstream_store": upstream_store or store,
        "alias": alias,
        "description": description,
        "enabled": enabled,
    }
    row = {"id": str(uuid.uuid4()), "store": store, "created_at": now, "updated_at": now, **_checked(values, box)}
    try:
        with connection.begin_nested():
            connection.execute(insert(upstreams_table), row)
    except exc.IntegrityError as error:
        raise _alias_taken(store, alias) from error
    return get_upstream(connection, row["id"])


def update_upstream(connection: Connection, box: SecretBox, id: str, **changes: object) -> Upstream:
    """Change the given fields of an upstream and return it.

    Raise NotFound, InvalidInput for a field that cannot be, Conflict if its model store has one of that alias.
    """
    if unknown := sorted(changes.keys() - _CHANGES):
        raise InvalidInput(f"An upstream's {unknown[0]!r} cannot be changed; change {', '.join(sorted(_CHANGES))}.")
    known = get_upstream(connection, id)
    values = {**_checked(changes, box), "updated_at": utc_now()}
    try:
        with connection.begin_nested():
            connection.execute(update(upstreams_table).where(upstreams_table.c.id == id).values(values))
    except exc.IntegrityError as error:
        raise _alias_taken(known.store, str(changes.get("alias"))) from error
    return get_upstream(connection, id)


def remove_upstream(connection: Connection, id: str) -> int:
    """Forget the upstream; return how many were forgotten, 0 or 1."""
    return connection.execute(delete_from(upstreams_table).where(upstreams_table.c.id == id)).rowcount


def get_upstream(connection: Connection, id: str) -> Upstream:
    """Return the upstream; raise NotFound."""
    row = None
    if id.isprintable():  # PostgreSQL does not even look up NUL, nor half of a character
        row = connection.execute(select(*_FIELDS).where(upstreams_table.c.id == id)).mappings().first()
    if row is None:
        raise no_upstream(id)
    return _upstream(row)


def no_upstream(id: str) -> NotFound:
    """Return the error that says that there is none."""
    return NotFound(f"There is no upstream {id[:80]!a}; `fedchord store upstreams` lists those that there are.")


def upstreams(connection: Connection, store: str | None = None) -> tuple[Upstream, ...]:
    """Return the upstreams by model store and alias; only the model store's own if one is named."""
    query = select(*_FIELDS).order_by(upstreams_table.c.store, upstreams_table.c.alias)
    if store is not None:
        query = query.where(upstreams_table.c.store == store)
    return tuple(_upstream(row) for row in connection.execute(query).mappings())


def choose_upstream(
    connection: Connection, box: SecretBox, settings: Settings, store: str, alias: str | None = None
) -> Upstream:
    """Return, with its secret, the upstream of that alias or id, or the one that is meant when none is named.

    That is the only enabled one, or the one called "default"; an operator's model store without upstreams of its own
    feeds the model store of the same name at FEDCHORD_UPSTREAM_URL. Raise NotFound for no such alias, NoUpstream if it
    is disabled or none is meant.
    """
    query = select(*_FIELDS, upstreams_table.c.secret.label("sealed")).where(upstreams_table.c.store == store)
    if alias is not None:
        query = query.where(or_(upstreams_table.c.alias == alias, upstreams_table.c.id == alias))
    is_name = alias is None or alias.isprintable()  # others PostgreSQL does not even look up
    rows = connection.execute(query.order_by(upstreams_table.c.alias)).mappings().all() if is_name else []
    enabled = [row for row in rows if row["enabled"]]
    if alias is not None and not rows:
        raise NotFound(f"Model store {store} has no upstream {alias[:80]!a}; list_upstream_info shows those it has.")
    if not rows and feeds_upstream_of_settings(connection, settings, store):
        return upstream_of_settings(settings, store)
    if not rows:
        raise NoUpstream(f"Model store {store} has no upstream; add one with `fedchord store upstreams add`.")
    if not enabled:
        raise NoUpstream(f"Model store {store} has no upstream that is enabled; enable one or add another.")
    if len(enabled) > 1:
        enabled = [row for row in enabled if row["alias"] == DEFAULT_ALIAS or alias is not None]
    if len(enabled) != 1:
        raise NoUpstream(
            f"Model store {store} has several upstreams; name one of them: {', '.join(row['alias'] for row in rows)}."
        )
    secret = SecretStr(box.open(enabled[0]["sealed"]))
    return _upstream({name: value for name, value in enabled[0].items() if name != "sealed"}, secret)


def check_upstream_url(url: str) -> str:
    """Return the URL without a slash at its end; raise InvalidInput unless it is a service's, and no more."""
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidInput(f"{_shown(url)} is not the URL of a service; write http://HOST:PORT or https://HOST.")
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise InvalidInput(
            f"The URL of {parts.hostname} has a user, a query or a fragment; leave them out, and give the API key and "
            "secret in their own fields."
        )
    return url.rstrip("/")


def feeds_upstream_of_settings(connection: Connection, settings: Settings, store: str) -> bool:
    """Return whether the model store, unless it has upstreams of its own, feeds that of the settings.

    A tenant's does not: under a name of its choice, it would reach with this node's key what is another's there.
    """
    found = find_store(connection, store)
    return bool(settings.upstream_url) and found is not None and found.tenant_id == OPERATOR


def upstream_of_settings(settings: Settings, store: str) -> Upstream:
    """Return the upstream at FEDCHORD_UPSTREAM_URL, with the model store of the same name."""
    now = utc_now()
    return Upstream(
        id="",
        store=store,
        url=check_upstream_url(settings.upstream_url),
        api_key=settings.upstream_api_key,
        secret=settings.upstream_secret,
        upstream_store=store,
        alias=DEFAULT_ALIAS,
        description="FEDCHORD_UPSTREAM_URL",
        enabled=True,
        created_at=now,
        updated_at=now,
    )


def _checked(values: Mapping[str, object], box: SecretBox) -> dict[str, Any]:
    """Return the fields as they are stored; raise InvalidInput for one that cannot be."""
    checked = dict(values)
    for name, max_characters in _MAX_CHARACTERS.items():
        value = values.get(name, "")
        if not isinstance(value, str) or len(value) > max_characters or "\0" in value or not _is_text(value):
            raise InvalidInput(f"An upstream's {name} is text of at most {max_characters} characters; shorten it.")
    if not isinstance(values.get("enabled", True), bool):
        raise InvalidInput("An upstream's enabled is true or false.")
    for name in ("api_key", "secret"):  # they travel as headers
        if not (str(values.get(name, "")).isascii() and str(values.get(name, "")).isprintable()):
            raise InvalidInput(f"An upstream's {name} is printable ASCII; copy it as the upstream's operator gave it.")
    if "url" in values:
        checked["url"] = check_upstream_url(str(values["url"]))
    if "upstream_store" in values:
        checked["upstream_store"] = check_store_name(str(values["upstream_store"]))
    if "secret" in values:
        checked["secret"] = box.seal(str(values["secret"]))
    if ("alias" in values and not str(values["alias"]).isprintable()) or values.get("alias") == "":
        raise InvalidInput("An upstream's alias is 1 to 100 printable characters; choose another one.")
    return checked


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _alias_taken(store: str, alias: str) -> Conflict:
    return Conflict(f"Model store {store} has an upstream {alias!r} already; choose another alias, or change that one.")


def _shown(url: str) -> str:
    """Return the beginning of a URL without what may be a password."""
    return repr(url.rpartition("@")[2][:80])


def _upstream(row: RowMapping | Mapping[str, Any], secret: SecretStr | None = None) -> Upstream:
    return Upstream(**row, secret=secret or SecretStr(""))
