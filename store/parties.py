"""Record the parties of the federation; a site is a party with a name and a public key."""

import uuid
from dataclasses import dataclass, fields, replace
from datetime import datetime

from sqlalchemy import Connection, RowMapping, bindparam, exc, insert, select, update
from sqlalchemy import delete as delete_from

from common.errors import Conflict, NotFound
from common.queues import check_site_name
from store.tables import party_info, utc_now


@dataclass(frozen=True, kw_only=True, slots=True)
class PartyInfo:
    """What is known of a party."""

    id: str  # uuid4
    tenant_id: str  # of the organisation, empty if it has none
    tenant_name: str  # the organisation's, for people
    description: str
    hop_count: int  # coordinators between the party and this one
    created_at: datetime
    updated_at: datetime
    site: str | None  # the site's name, None for a party that is not a site
    public_key: str | None  # the key that the site signs with
    enabled: bool  # whether the site may take part in rounds
    reason: str  # why it is disabled, else empty
    registered_by: str = ""  # id of the tenant that registered it, empty for the operator


_SELECT = select(*(party_info.c[field.name] for field in fields(PartyInfo)))
_SELECT_SITE = _SELECT.where(party_info.c.site == bindparam("site"))  # built once, for it is asked at each answer


def enroll_site(
    connection: Connection,
    name: str,
    public_key: str,
    *,
    tenant_id: str = "",
    tenant_name: str = "",
    description: str = "",
) -> PartyInfo:
    """Record the site and return it; to enroll it again with the same key changes nothing.

    Raise InvalidInput for a name that cannot be a site's, Conflict if it is enrolled with another key.
    """
    now = utc_now()
    party = PartyInfo(
        id=str(uuid.uuid4()),
        tenant_id=tenant_id,
        tenant_name=tenant_name,
        description=description,
        hop_count=0,
        created_at=now,
        updated_at=now,
        site=check_site_name(name),
        public_key=public_key,
        enabled=True,
        reason="",
    )
    known = _find(connection, name)
    if known is None:
        try:
            with connection.begin_nested():  # so that the caller's transaction survives a race that we lose
                connection.execute(
                    insert(party_info), {field.name: getattr(party, field.name) for field in fields(party)}
                )
        except exc.IntegrityError:
            known = get_site(connection, name)
        else:
            return party
    if known.public_key != public_key:
        raise Conflict(f"Site {name} is enrolled with another public key; remove it first if the new key is right.")
    return known


def get_site(connection: Connection, name: str) -> PartyInfo:
    """Return the site; raise NotFound if it is not enrolled."""
    party = _find(connection, name)
    if party is None:
        raise _not_enrolled(name)
    return party


def sites(connection: Connection, *, enabled: bool | None = None) -> tuple[PartyInfo, ...]:
    """Return the enrolled sites by name; only the enabled or the disabled ones if asked for."""
    query = _SELECT.where(party_info.c.site.is_not(None)).order_by(party_info.c.site)
    if enabled is not None:
        query = query.where(party_info.c.enabled.is_(enabled))
    return tuple(_party(row) for row in connection.execute(query).mappings())


def set_enabled(connection: Connection, name: str, enabled: bool, reason: str = "") -> PartyInfo:
    """Let the site take part or not, for the given reason, and return it; raise NotFound if it is not enrolled."""
    values = {"enabled": enabled, "reason": "" if enabled else reason, "updated_at": utc_now()}
    if connection.execute(update(party_info).where(party_info.c.site == name).values(values)).rowcount == 0:
        raise _not_enrolled(name)
    return get_site(connection, name)


def remove_site(connection: Connection, name: str) -> None:
    """Forget the site; raise NotFound if it is not enrolled."""
    if connection.execute(delete_from(party_info).where(party_info.c.site == name)).rowcount == 0:
        raise _not_enrolled(name)


def add_party(
    connection: Connection,
    *,
    id: str,
    tenant_id: str,
    tenant_name: str,
    description: str,
    hop_count: int,
    registered_by: str,
) -> PartyInfo:
    """Record a party that is not a site, and return it.

    To register it again changes only by how many hops it is away. Raise Conflict if the id is another tenant's.
    """
    now = utc_now()
    party = PartyInfo(
        id=id,
        tenant_id=tenant_id,
        tenant_name=tenant_name,
        description=description,
        hop_count=hop_count,
        created_at=now,
        updated_at=now,
        site=None,
        public_key=None,
        enabled=True,
        reason="",
        registered_by=registered_by,
    )
    known = _find_by_id(connection, id)
    if known is None:
        try:
            with connection.begin_nested():
                connection.execute(
                    insert(party_info), {field.name: getattr(party, field.name) for field in fields(party)}
                )
        except exc.IntegrityError:  # another was quicker
            known = _find_by_id(connection, id)
    if known is None:
        return party
    if known.site is not None or (known.registered_by, known.tenant_id) != (registered_by, tenant_id):
        raise Conflict(f"Party {id} was registered by another tenant; register yours under an id of its own.")
    again = {"hop_count": hop_count, "updated_at": now}
    connection.execute(update(party_info).where(party_info.c.id == id).values(again))
    return replace(known, hop_count=hop_count, updated_at=now)


def parties(connection: Connection) -> tuple[PartyInfo, ...]:
    """Return the registered parties that are not sites, the oldest first."""
    query = _SELECT.where(party_info.c.site.is_(None)).order_by(party_info.c.created_at, party_info.c.id)
    return tuple(_party(row) for row in connection.execute(query).mappings())


def remove_party(connection: Connection, id: str, *, registered_by: str | None) -> int:
    """Forget the party if that tenant registered it, or anybody for None; return how many were forgotten, 0 or 1."""
    ours = [party_info.c.id == id, party_info.c.site.is_(None)]
    if registered_by is not None:
        ours.append(party_info.c.registered_by == registered_by)
    return connection.execute(delete_from(party_info).where(*ours)).rowcount


def _find_by_id(connection: Connection, id: str) -> PartyInfo | None:
    row = connection.execute(_SELECT.where(party_info.c.id == id)).mappings().first()
    return None if row is None else _party(row)


def _find(connection: Connection, name: str) -> PartyInfo | None:
    row = connection.execute(_SELECT_SITE, {"site": name}).mappings().first()
    return None if row is None else _party(row)


def _party(row: RowMapping) -> PartyInfo:
    return PartyInfo(**row)


def _not_enrolled(name: str) -> NotFound:
    return NotFound(f"No site is enrolled as {name!r}; `fedchord sites` lists those that are.")
