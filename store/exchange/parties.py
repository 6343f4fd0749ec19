"""Register parties: at the node's upstream, which registers them at its own, and so on to the top.

Each node records who registered a party with it, and how many hops away the party is: 0 for its own. A node without
upstream is its own upstream.
"""

import logging
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection

from common.errors import FedChordError, InvalidInput, NoUpstream, UpstreamCycle
from store.database import reading, writing
from store.documents import party_document
from store.exchange.foreign import MAX_PATH, NewParty, brief
from store.exchange.neighbour import Neighbour
from store.model_stores import visible_stores
from store.opening import OpenStore
from store.parties import add_party, parties, remove_party
from store.tenants import Caller
from store.upstreams import DEFAULT_ALIAS, Upstream, choose_upstream, upstream_of_settings, upstreams

logger = logging.getLogger(__name__)

Document = dict[str, Any]

_HASTE = 2  # hops that count as made already when something is taken back: a quarter of the time


def get_parties(store: OpenStore, caller: Caller, *, here: bool = False) -> list[Document]:
    """Return the parties that are registered at the upstream, or those that are registered here."""
    with reading(store.engine) as connection:
        upstream = None if here else node_upstream(connection, store, caller)
        if upstream is None:
            return [party_document(party) for party in parties(connection)]
    with Neighbour(store, upstream) as above:
        return above.parties()


def create_party(store: OpenStore, caller: Caller, description: str = "") -> Document:
    """Register this node's organisation, as its settings say, and return its record at the upstream."""
    party = _checked(
        id=str(uuid.uuid4()),
        tenant_id=store.settings.tenant_id,
        tenant_name=store.settings.tenant_name,
        description=description,
        hop_count=0,
    )
    try:
        recorded, above = _register(store, caller, party, via=())
    except FedChordError:
        _undo(store, caller, party["id"])
        raise
    return recorded if above is None else above


def delete_party(store: OpenStore, caller: Caller, id: str) -> int:
    """Take a party that the caller registered from here and from all nodes above; return 1, or 0 if it was nowhere."""
    return _unregister(store, caller, id, via=())


def register_party(
    store: OpenStore,
    caller: Caller,
    id: str,
    tenant_id: str,
    tenant_name: str,
    description: str = "",
    hop_count: int = 1,
    via: Sequence[str] = (),
) -> Document:
    """Record a party that the caller's node registers, after the nodes above have; return its record here.

    Raise UpstreamCycle if the party has come by here, Conflict if its id is another tenant's.
    """
    party = _checked(id=id, tenant_id=tenant_id, tenant_name=tenant_name, description=description, hop_count=hop_count)
    return _register(store, caller, party, via=via)[0]


def unregister_party(store: OpenStore, caller: Caller, id: str, via: Sequence[str] = ()) -> int:
    """Forget a party that the caller registered, above and then here; return how many were forgotten, 0 or 1."""
    return _unregister(store, caller, id, via=via)


def node_upstream(connection: Connection, store: OpenStore, caller: Caller) -> Upstream | None:
    """Return the upstream of the node as a whole, or None: that of the settings, or the one that its stores feed.

    Only the model stores that the caller may read count. Raise NoUpstream if they feed several services, and one of
    them alone is not called "default".
    """
    if store.settings.upstream_url:
        return upstream_of_settings(store.settings, "")
    visible = {each.name for each in visible_stores(connection, caller)}
    found = [each for each in upstreams(connection) if each.enabled and each.store in visible]
    if len({(each.url, each.api_key) for each in found}) > 1:
        found = [each for each in found if each.alias == DEFAULT_ALIAS]
        if len({(each.url, each.api_key) for each in found}) != 1:
            raise NoUpstream("The model stores here feed several services; set FEDCHORD_UPSTREAM_URL to one of them.")
    if not found:
        return None
    return choose_upstream(connection, store.box, store.settings, found[0].store, found[0].id)


def _register(
    store: OpenStore, caller: Caller, party: Document, *, via: Sequence[str]
) -> tuple[Document, Document | None]:
    """Return the party's record here, and that at the upstream if there is one."""
    _check_way(store, via)
    with reading(store.engine) as connection:
        upstream = node_upstream(connection, store, caller)
    above = None
    if upstream is not None:
        with Neighbour(store, upstream, hops=len(via)) as neighbour:
            above = neighbour.register({**party, "hop_count": party["hop_count"] + 1}, [*via, store.node_id])
    with writing(store.engine) as connection:
        recorded = add_party(connection, **party, registered_by=caller.tenant_id)
    logger.info(
        "Party %s is registered, %d hops away",
        recorded.id,
        recorded.hop_count,
        extra={"action": "party_registered", "party": recorded.id},
    )
    return party_document(recorded), above


def _unregister(store: OpenStore, caller: Caller, id: str, *, via: Sequence[str]) -> int:
    _check_way(store, via)
    with reading(store.engine) as connection:
        known = next((party for party in parties(connection) if party.id == id), None)
        if not caller.is_operator and (known is None or known.registered_by != caller.tenant_id):
            return 0
        upstream = node_upstream(connection, store, caller)
    count = 0
    if upstream is not None:
        with Neighbour(store, upstream, hops=len(via)) as neighbour:
            count = neighbour.unregister(id, [*via, store.node_id])
    with writing(store.engine) as connection:
        removed = remove_party(connection, id, registered_by=None if caller.is_operator else caller.tenant_id)
    return max(count, removed)


def _undo(store: OpenStore, caller: Caller, id: str) -> None:
    """Take back what some nodes above may have recorded before another one failed, if they can be reached."""
    try:
        with reading(store.engine) as connection:
            upstream = node_upstream(connection, store, caller)
        if upstream is not None:
            with Neighbour(store, upstream, hops=_HASTE) as neighbour:
                neighbour.unregister(id, [store.node_id])
    except FedChordError as error:
        logger.warning(
            "Party %s may be recorded above, though it is not registered: %s",
            id,
            error,
            extra={"action": "party_left", "party": id},
        )


def _check_way(store: OpenStore, via: Sequence[str]) -> None:
    if store.node_id in via:
        raise UpstreamCycle(
            f"The way up leads back to node {store.node_id}; correct or remove one of the upstreams on it."
        )
    if len(via) >= MAX_PATH:
        raise UpstreamCycle(f"The way up has more than {MAX_PATH} nodes; correct or remove one of the upstreams on it.")


def _checked(*, id: str, tenant_id: str, tenant_name: str, description: str, hop_count: int) -> Document:
    """Return the party's fields; raise InvalidInput that names one that cannot be kept."""
    party = {
        "id": id,
        "tenant_id": tenant_id,
        "tenant_name": tenant_name,
        "description": description,
        "hop_count": hop_count,
    }
    try:
        return NewParty.model_validate(party).model_dump()
    except ValidationError as error:
        raise InvalidInput(f"The party cannot be registered: {brief(error)}.") from error
