"""Exchange models between a model store and the one that it feeds, server to server.

`feedback` sends a model up, `request_transfer` brings the newest aggregated one down, `proxy_request_transfer_info`
only looks. Each can be repeated at any time: what has arrived is not moved again, and a model is recorded once, when
all of it is there and is what its hash says.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from common.errors import InvalidInput, NotFound, TooLarge, UpstreamUnavailable
from store.blobs import Blob
from store.conditions import parse_condition
from store.database import reading, writing
from store.documents import model_document
from store.exchange.descent import parents_here
from store.exchange.foreign import ForeignModel
from store.exchange.neighbour import Neighbour
from store.exchange.possession import missing_blobs, record_received
from store.expiry import check_bytes
from store.model_stores import check_access, visible_stores
from store.models import ModelInfo, ModelState, find_copy, find_models, get_model, ids_in_store
from store.new_models import check_new_model
from store.opening import OpenStore
from store.putting import check_size_limit, put_shards, spooled
from store.tenants import Caller
from store.upstreams import Upstream, choose_upstream, feeds_upstream_of_settings, upstreams

logger = logging.getLogger(__name__)

Document = dict[str, Any]

_OFFERS = 3  # of one model: before its blobs were sent, after, and once more if one got lost meanwhile
_BROUGHT_DOWN = {"in": ["model_state", [int(ModelState.AGGREGATED), int(ModelState.TRANSFERRED)]]}


def feedback(
    store: OpenStore, caller: Caller, model_store_ddc: str, model_id: str, upstream: str | None = None
) -> Document:
    """Send the model to the upstream and return its model_info there; one that is there already is not sent again.

    Raise NoUpstream, UpstreamCycle, UpstreamUnavailable, or what the upstream refuses it with.
    """
    chosen = _chosen(store, caller, model_store_ddc, upstream)
    with reading(store.engine) as connection:
        if not ids_in_store(connection, model_store_ddc, [model_id]):
            raise NotFound(
                f"There is no model {model_id[:80]!r} in {model_store_ddc}; get_models lists those there are."
            )
        model = get_model(connection, model_id)
    if not model.shards:
        raise NotFound(f"Model {model_id} is recorded without bytes; there is nothing to send.")
    check_bytes(store.blobs, model)
    with Neighbour(store, chosen) as above:
        node_id = above.check_way_up(model_store_ddc)
        offered = {
            **model_document(model),
            "origin": {"node_id": store.node_id, "model_id": model.model_id},
            "parents": _parents_above(store, model, node_id),
        }
        for _ in range(_OFFERS):
            recorded, missing = above.offer(offered)
            if recorded is not None:
                logger.info(
                    "Model %s was fed back to %s",
                    model.model_id,
                    chosen.url,
                    extra={"action": "feedback", "model": model.model_id, "model_store": model_store_ddc},
                )
                return recorded
            for blob in missing:
                if blob not in model.shards:
                    raise UpstreamUnavailable(f"{above} asks for a blob that is not the model's; check its version.")
                above.send(blob, partial(store.blobs.stream, blob))
        raise UpstreamUnavailable(f"{above} does not keep what it is sent; look into its log.")


def request_transfer(store: OpenStore, caller: Caller, model_store_ddc: str, upstream: str | None = None) -> Document:
    """Bring the upstream's newest aggregated model into the model store and return its model_info here.

    One that is here already is returned, and bytes that are here already are not moved. Raise NotFound while there is
    none, NoUpstream, UpstreamCycle, UpstreamUnavailable, or TooLarge.
    """
    chosen = _chosen(store, caller, model_store_ddc, upstream)
    with Neighbour(store, chosen) as above:
        node_id = above.check_way_up(model_store_ddc)
        document, model = above.newest()
        with reading(store.engine) as connection:
            known = find_copy(connection, model_store_ddc, node_id, model.model_id)
        if known is not None:
            return model_document(known)
        new = model.copied(
            node_id=node_id,
            model_id=model.model_id,
            state=ModelState.TRANSFERRED,
            parents=_parents_here(store, above, model_store_ddc, node_id, model),
        )
        check_size_limit(store.settings, model.model_size)
        try:
            check_new_model(store.settings, new)
            for blob in missing_blobs(store, caller, model.model_hash, model.blobs):
                _fetch(store, caller, above, model.model_id, blob)
            added = put_shards(store, model_store_ddc, None, model.blobs, model.model_hash, new)
        except TooLarge:
            raise
        except InvalidInput as error:
            raise UpstreamUnavailable(f"{above} gives a model that cannot be kept: {error.message}") from error
    logger.info(
        "Model %s came down from %s as %s",
        document["model_id"],
        chosen.url,
        added.model_id,
        extra={"action": "request_transfer", "model": added.model_id, "model_store": model_store_ddc},
    )
    return model_document(added)


def proxy_request_transfer_info(
    store: OpenStore, caller: Caller, model_store_ddc: str = "", upstream: str | None = None
) -> Document:
    """Return the upstream's model_info of its newest aggregated model; nothing is moved.

    A node without upstream answers for its own model store. Raise NotFound while there is none.
    """
    name = model_store_ddc or _only_store(store, caller)
    if upstream is not None or _has_upstream(store, caller, name):
        with Neighbour(store, _chosen(store, caller, name, upstream, write=False)) as above:
            return above.newest()[0]
    with reading(store.engine) as connection:
        newest = find_models(connection, store=name, conditions=parse_condition(_BROUGHT_DOWN), limit=1)
    if not newest:
        raise NotFound(f"{name} has no upstream and no aggregated model yet; put one, or wait for it.")
    return model_document(newest[0])


def _chosen(
    store: OpenStore, caller: Caller, model_store_ddc: str, upstream: str | None, *, write: bool = True
) -> Upstream:
    with reading(store.engine) as connection:
        check_access(connection, caller, model_store_ddc, write=write)
        return choose_upstream(connection, store.box, store.settings, model_store_ddc, upstream)


def _only_store(store: OpenStore, caller: Caller) -> str:
    """Return the one model store that can be meant when none is named: the only one that feeds another, or at all."""
    with reading(store.engine) as connection:
        names = [each.name for each in visible_stores(connection, caller)]
        feeding = {each.store for each in upstreams(connection) if each.enabled}
    names = [name for name in names if name in feeding] or names
    if len(names) != 1:
        raise InvalidInput(f"Name the model store: there are {len(names)} that can be meant.")
    return names[0]


def _has_upstream(store: OpenStore, caller: Caller, model_store_ddc: str) -> bool:
    with reading(store.engine) as connection:
        check_access(connection, caller, model_store_ddc, write=False)
        if upstreams(connection, model_store_ddc):
            return True
        return feeds_upstream_of_settings(connection, store.settings, model_store_ddc)


def _fetch(store: OpenStore, caller: Caller, above: Neighbour, model_id: str, blob: Blob) -> None:
    """Bring one blob here; it is kept even if the next one fails, so that a repetition goes on after it."""
    with spooled(store, above.fetch(model_id, blob)) as (path, found):
        if found != blob:
            raise UpstreamUnavailable(f"{above} sent blob {found.digest} in place of {blob.digest}; try again.")
        store.blobs.put(path, blob=blob)
    with writing(store.engine) as connection:
        record_received(connection, caller, blob)


def _parents_above(store: OpenStore, model: ModelInfo, node_id: str) -> list[str]:
    """Return the ids that the model's parents have at the upstream, where they came from there; else their own."""
    above = []
    with reading(store.engine) as connection:
        for parent in model.parents:
            try:
                known = get_model(connection, parent)
            except NotFound:
                continue
            came_from_there = known.origin_node == node_id and known.origin_model_id is not None
            above.append(known.origin_model_id or parent if came_from_there else parent)
    return above


def _parents_here(
    store: OpenStore, above: Neighbour, model_store_ddc: str, node_id: str, model: ForeignModel
) -> Sequence[str]:
    """Return the ids that the upstream model's parents have here, of those that are, sent from here or brought here."""
    if not model.parents:
        return ()
    origins = {each["model_id"]: each["origin"] for each in above.models(model.parents) if each.get("origin")}
    sent = {parent: own["model_id"] for parent, own in origins.items() if own["node_id"] == store.node_id}
    with reading(store.engine) as connection:
        return parents_here(connection, model_store_ddc, node_id, model.parents, sent)
