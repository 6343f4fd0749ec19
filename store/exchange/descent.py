"""Translate the ids of a model's parents from what another node calls them."""

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection

from store.models import find_copies, ids_in_store


def parents_here(
    connection: Connection, model_store_ddc: str, node_id: str, parents: Sequence[str], own: Mapping[str, str]
) -> list[str]:
    """Return the ids, in this model store, of those parents that are in it.

    A parent is here as a copy of that node's model, or it came from here: `own` says as which, by its id there.
    """
    copies = find_copies(connection, model_store_ddc, node_id, parents)
    ids = [found for parent in parents if (found := copies.get(parent) or own.get(parent)) is not None]
    here = ids_in_store(connection, model_store_ddc, ids)
    return [each for each in ids if each in here]
