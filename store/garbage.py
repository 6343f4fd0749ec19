"""Remove the blobs that no model needs any more: of deleted and expired models, and of puts that were never finished.

Somebody may just be recording a model of a blob that looks unused. Bytes that were put lately are left alone, and who
makes a model of older ones records it under a lock that removing takes too (see `store.putting`). Which models have
expired, `store.retention` says; their blobs are left alone as long again.
"""

import logging
import time
from collections.abc import Collection, Sequence
from datetime import timedelta

from sqlalchemy import Connection, Engine, delete, or_, select

from common.settings import Settings
from store.blobs import Blob, BlobStore
from store.database import reading, writing
from store.model_stores import lock_out_puts
from store.models import parts_of
from store.retention import expire
from store.tables import model_info, quarantine, received_blobs, utc_now

logger = logging.getLogger(__name__)

CLEAN_SECONDS = 3600.0  # between two looks
UNNAMED = "unnamed"  # the kind of a blob that no record names
_ABANDONED_SECONDS = 24 * 3600.0  # beyond a reference's life: then nobody writes any more what was begun with it
_AT_ONCE = 500  # blobs at most that are removed in one transaction, during which nobody records a model
_LOCKED_SECONDS = 0.2  # a transaction that has taken so long is ended
_PAUSE_SECONDS = 0.1  # between two of them: so seldom does a writer look who waits for SQLite's lock

_BLOBS = select(model_info.c.model_hash, model_info.c.index_hash, model_info.c.shards)


def clean(settings: Settings, engine: Engine, blobs: BlobStore) -> None:
    """Remove expired references and what ended uploads have left; let expire what is to; remove unused blobs."""
    blobs.clean(older_than_seconds=settings.reference_seconds + _ABANDONED_SECONDS)
    expire(engine, settings)
    remove_unused(engine, blobs, older_than_seconds=settings.keep_unused_hours * 3600)


def find_unused(
    engine: Engine, blobs: BlobStore, *, older_than_seconds: float, expiring: Collection[str] = ()
) -> list[Blob]:
    """Return the blobs that were put so long ago and are needed by no model, or by one that expired so long ago.

    `expiring` are ids of models that are taken as expired now.
    """
    old = list(blobs.blobs(older_than_seconds=older_than_seconds))  # first: what is recorded from here on is newer
    with reading(engine) as connection:
        needed = _needed(connection, older_than_seconds, expiring if older_than_seconds <= 0 else ())
    return [blob for blob in old if blob.digest not in needed]


def remove_unused(engine: Engine, blobs: BlobStore, *, older_than_seconds: float) -> list[Blob]:
    """Remove them and return those that were there; to repeat it at any time is safe."""
    removed: list[Blob] = []
    left = find_unused(engine, blobs, older_than_seconds=older_than_seconds)
    while left:
        with writing(engine) as connection:
            lock_out_puts(connection)
            until = time.monotonic() + _LOCKED_SECONDS
            needed = _needed(connection, older_than_seconds)
            some = left[:_AT_ONCE]
            gone, count = _remove(blobs, some, needed, older_than_seconds, until)
            connection.execute(delete(received_blobs).where(received_blobs.c.digest.in_([b.digest for b in gone])))
        removed += gone
        left = left[count:]
        if left:
            time.sleep(_PAUSE_SECONDS)
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
        lock_out_puts(connection)
        needed = _needed(connection, None)
        received = received_blobs.c.digest
        needed.update(connection.scalars(select(received).where(received.in_(digests))))
        return [digest for digest in dict.fromkeys(digests) if digest not in needed and blobs.delete(digest)]


def kinds_of(engine: Engine, blobs: Sequence[Blob], *, expiring: Sequence[str] = ()) -> dict[str, list[Blob]]:
    """Return the blobs by the kind of the expired model that they are of; UNNAMED if no record names them.

    `expiring` are ids of models that are taken as expired.
    """
    queries = [_BLOBS.where(model_info.c.expired_at.is_not(None))]
    queries += [_BLOBS.where(model_info.c.model_id.in_(some)) for some in parts_of(expiring)]
    kinds: dict[str | None, str] = {}
    with reading(engine) as connection:
        for query in queries:
            for *names, shards, kind in connection.execute(query.add_columns(model_info.c.model_kind)):
                for digest in (*names, *(shard["digest"] for shard in shards)):
                    kinds[digest] = min(kind, kinds.get(digest, kind))  # of several, the same one each time
    found: dict[str, list[Blob]] = {}
    for blob in blobs:
        found.setdefault(kinds.get(blob.digest, UNNAMED), []).append(blob)
    return found


def _remove(
    blobs: BlobStore, some: Sequence[Blob], needed: Collection[str], older_than_seconds: float, until: float
) -> tuple[list[Blob], int]:
    """Remove what is not needed, one at least; return what was there, and how many were looked at in time."""
    gone: list[Blob] = []
    for count, blob in enumerate(some, start=1):
        if blob.digest not in needed and blobs.delete(blob.digest, older_than_seconds=older_than_seconds):
            gone.append(blob)
            if time.monotonic() > until:
                return gone, count
    return gone, len(some)


def _needed(connection: Connection, expired_seconds: float | None, expiring: Collection[str] = ()) -> set[str]:
    """Return the digests of all blobs of all models, and of what is held in quarantine.

    Those of models that expired so long ago, or are expiring, are not needed; with None they are, whenever it was.
    """
    query = _BLOBS
    if expired_seconds is not None:
        before = utc_now() - timedelta(seconds=expired_seconds)
        query = query.where(or_(model_info.c.expired_at.is_(None), model_info.c.expired_at > before))
    going = frozenset(expiring)
    needed: set[str] = set()
    for model_hash, index_hash, shards, model_id in connection.execute(query.add_columns(model_info.c.model_id)):
        if model_id not in going:
            needed.update((model_hash, index_hash), (shard["digest"] for shard in shards))
    held = select(quarantine.c.found).where(quarantine.c.state == "held")  # nobody has decided about it
    for (found,) in connection.execute(held):
        needed.update(blob["digest"] for blob in found if blob is not None)
    return needed
