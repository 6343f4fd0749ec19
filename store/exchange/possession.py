"""Know which blobs a tenant may make a model of: those whose bytes it has shown to have, or may read here.

Otherwise whoever learns a digest could have another tenant's bytes made a model of their own, and load it.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, exc, insert, select

from common.errors import NotFound
from store.blobs import Blob, BlobStore
from store.database import reading
from store.model_stores import visible_stores
from store.models import find_by_hash
from store.opening import OpenStore
from store.tables import received_blobs
from store.tenants import Caller

_AT_ONCE = 1000  # digests in a statement


def record_received(connection: Connection, caller: Caller, blob: Blob) -> None:
    """Note that the caller has sent, or fetched, these bytes."""
    values = {"tenant_id": caller.tenant_id, "digest": blob.digest, "size": blob.size}
    try:
        with connection.begin_nested():
            connection.execute(insert(received_blobs), values)
    except exc.IntegrityError:  # it has before
        return


def missing_blobs(store: OpenStore, caller: Caller, model_hash: str, shards: Sequence[Blob]) -> tuple[Blob, ...]:
    """Return those blobs of the model that have to be moved here before the caller may have it recorded."""
    with reading(store.engine) as connection:
        known = set(shards) if caller.is_operator else _known(connection, caller, model_hash, shards)
    return tuple(shard for shard in dict.fromkeys(shards) if shard not in known or not _is_stored(store.blobs, shard))


def _known(connection: Connection, caller: Caller, model_hash: str, shards: Sequence[Blob]) -> set[Blob]:
    names = [each.name for each in visible_stores(connection, caller)]
    same = find_by_hash(connection, names, model_hash)
    known = set(same.shards) if same is not None else set()
    for start in range(0, len(shards), _AT_ONCE):
        digests = [shard.digest for shard in shards[start : start + _AT_ONCE]]
        query = select(received_blobs.c.digest, received_blobs.c.size).where(
            received_blobs.c.tenant_id == caller.tenant_id, received_blobs.c.digest.in_(digests)
        )
        known.update(Blob(digest=digest, size=size) for digest, size in connection.execute(query))
    return known


def _is_stored(blobs: BlobStore, blob: Blob) -> bool:
    try:
        return blobs.find(blob.digest) == blob
    except NotFound:
        return False
