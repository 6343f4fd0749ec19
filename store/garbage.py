"""Remove the blobs that no model needs any more: of deleted models, and of puts that were never finished.

Somebody may just be recording a model of a blob that looks unused. Bytes that were put lately are left alone, and who
makes a model of older ones records it under a lock that removing takes too (see `store.putting`).
"""

import logging
from collections.abc import Collection

from sqlalchemy import Connection, Engine, delete, select, text

from common.settings import Settings
from store.blobs import Blob, BlobStore
from store.database import reading, writing
from store.tables import model_info, quarantine, received_blobs

logger = logging.getLogger(__name__)

CLEAN_SECONDS = 3600.0  # between two looks
_ABANDONED_SECONDS = 24 * 3600.0  # beyond a reference's life: then nobody writes any more what was begun with it
_AT_ONCE = 500  # blobs removed in one transaction, during which nobody records a model


def clean(settings: Settings, engine: Engine, blobs: BlobStore) -> None:
    """Remove expired references, what ended uploads have left, and blobs that no model needs any more."""
    blobs.clean(older_than_seconds=settings.reference_seconds + _ABANDONED_SECONDS)
    remove_unused(engine, blobs, older_than_seconds=settings.keep_unused_hours * 3600)


def find_unused(engine: Engine, blobs: BlobStore, *, older_than_seconds: float) -> list[Blob]:
    """Return the blobs that were put so long ago and are no model's."""
    old = list(blobs.blobs(older_than_seconds=older_than_seconds))  # first: what is recorded from here on is newer
    with reading(engine) as connection:
        needed = _needed(connection)
    return [blob for blob in old if blob.digest not in needed]


def remove_unused(engine: Engine, blobs: BlobStore, *, older_than_seconds: float) -> list[Blob]:
    """Remove them and return those that were there; to repeat it at any time is safe."""
    removed: list[Blob] = []
    old = find_unused(engine, blobs, older_than_seconds=older_than_seconds)
    for start in range(0, len(old), _AT_ONCE):
        with writing(engine) as connection:
            _lock_out_puts(connection)
            needed = _needed(connection)
            unused = [blob for blob in old[start : start + _AT_ONCE] if blob.digest not in needed]
            connection.execute(delete(received_blobs).where(received_blobs.c.digest.in_([b.digest for b in unused])))
            removed += [blob for blob in unused if blobs.delete(blob.digest)]
    if removed:
        logger.info(
            "Removed %s blobs of %s bytes that no model needs.",
            len(removed),
            sum(blob.size for blob in removed),
            extra={"action": "remove_unused"},
        )
    return removed


def remove_blobs(engine: Engine, blobs: BlobStore, digests: Collection[str]) -> list[str]:
    """Remove those of the blobs that nothing needs, however lately they were put; return which were there."""
    with writing(engine) as connection:
        _lock_out_puts(connection)
        needed = _needed(connection)
        received = received_blobs.c.digest
        needed.update(connection.scalars(select(received).where(received.in_(digests))))
        return [digest for digest in dict.fromkeys(digests) if digest not in needed and blobs.delete(digest)]


def _needed(connection: Connection) -> set[str]:
    """Return the digests of all blobs of all models, and of what is held in quarantine."""
    needed: set[str] = set()
    rows = connection.execute(select(model_info.c.model_hash, model_info.c.index_hash, model_info.c.shards))
    for model_hash, index_hash, shards in rows:
        needed.update((model_hash, index_hash), (shard["digest"] for shard in shards))
    held = select(quarantine.c.found).where(quarantine.c.state == "held")  # nobody has decided about it
    for (found,) in connection.execute(held):
        needed.update(blob["digest"] for blob in found if blob is not None)
    return needed


def _lock_out_puts(connection: Connection) -> None:
    """Let no put record a model until the transaction ends; SQLite has one writer at a time in any case."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE model_stores IN EXCLUSIVE MODE"))
