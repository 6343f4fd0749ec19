"""The side of a model store that others feed: tell the way up, and record models that are offered.

An offer is answered with the blobs that are missing, and becomes a record once they are all there; so a transfer that
was cut goes on with the blob at which it was cut, and nothing half-made is ever seen.
"""

import logging
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from common.errors import Conflict, FedChordError, InvalidInput, NoUpstream
from store.database import reading
from store.documents import model_document
from store.exchange.descent import parents_here
from store.exchange.foreign import MAX_PATH, ForeignModel, brief
from store.exchange.neighbour import Neighbour, place
from store.exchange.possession import missing_blobs
from store.model_stores import check_access
from store.models import ModelState, find_copy
from store.new_models import check_new_model
from store.opening import OpenStore
from store.putting import check_size_limit, put_shards
from store.tenants import Caller
from store.upstreams import choose_upstream

logger = logging.getLogger(__name__)

Document = dict[str, Any]


def get_path(store: OpenStore, caller: Caller, model_store_ddc: str, via: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return this model store and those above it, as far as they can be reached.

    `via` names those that were passed on the way here; one of them is where the way ends.
    """
    own = place(store.node_id, model_store_ddc)
    path = [{"node_id": store.node_id, "model_store_ddc": model_store_ddc}]
    with reading(store.engine) as connection:
        check_access(connection, caller, model_store_ddc, write=False)
        try:
            upstream = choose_upstream(connection, store.box, store.settings, model_store_ddc)
        except NoUpstream:
            return path
    if own in via or len(via) >= MAX_PATH:
        return path
    try:
        with Neighbour(store, upstream, hops=len(via)) as above:
            return (path + above.path([*via, own]))[:MAX_PATH]
    except FedChordError as error:  # whatever is wrong there, the way up is known as far as here
        logger.info("The way up ends here: %s", error, extra={"action": "path_ended"})
        return path


def offer_model(store: OpenStore, caller: Caller, model_store_ddc: str, model: Document) -> Document:
    """Record another node's model as fed back, or say which of its blobs have to be sent first.

    Return {"model": its model_info here}, also when it was recorded before, or {"missing": [{digest, size}, …]}. Raise
    InvalidInput or TooLarge for a model that cannot be kept, Conflict if its origin has offered another one.
    """
    with reading(store.engine) as connection:
        check_access(connection, caller, model_store_ddc, write=True)
    offered = _parse(model)
    origin = offered.origin
    if origin is None:
        raise InvalidInput("The model's origin is missing; name the node that offers it, and its model_id there.")
    with reading(store.engine) as connection:
        known = find_copy(connection, model_store_ddc, origin.node_id, origin.model_id)
        own = {parent: parent for parent in offered.parents}
        parents = parents_here(connection, model_store_ddc, origin.node_id, offered.parents, own)
    if known is not None:
        if known.model_hash != offered.model_hash:
            raise Conflict(f"Model {origin.model_id} of that node was offered with other bytes; give yours a new id.")
        return {"model": model_document(known)}
    new = offered.copied(
        node_id=origin.node_id,
        model_id=origin.model_id,
        state=ModelState.FEEDBACKED,
        parents=parents,
    )
    check_new_model(store.settings, new)
    check_size_limit(store.settings, offered.model_size)
    if missing := missing_blobs(store, caller, offered.model_hash, offered.blobs):
        return {"missing": [{"digest": blob.digest, "size": blob.size} for blob in missing]}
    added = put_shards(store, model_store_ddc, None, offered.blobs, offered.model_hash, new)
    logger.info(
        "Model %s was fed back into %s",
        added.model_id,
        model_store_ddc,
        extra={"action": "model_fed_back", "model": added.model_id, "model_store": model_store_ddc},
    )
    return {"model": model_document(added)}


def _parse(model: Document) -> ForeignModel:
    try:
        return ForeignModel.model_validate(model)
    except ValidationError as error:
        raise InvalidInput(f"The model cannot be taken: {brief(error)}; offer a model_info.") from error
    except RecursionError as error:
        raise InvalidInput("The model cannot be taken: it is nested too deep.") from error
