"""The quarantine: updates that were refused, kept with the bytes that came, until a person decides or time runs out.

    held ─▶ released   it counts: its round was still open
         ─▶ kept       it became a model that is not aggregated: its round had ended
         ─▶ refused    a person has said so; the bytes are removed
         ─▶ expired    nobody has decided in time; the bytes are removed

The record stays in every state. What was found at the part's slots is recorded with the verdict, in one transaction,
before it is made a blob, so that after a crash between the two the same bytes are kept. While an entry is held, its
blobs are left alone by `store.garbage`, which removes them afterwards unless something else needs them.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import Connection, RowMapping, select, update

from common.errors import Conflict, NotFound, Unavailable, UpdateRejected
from coordinator.expected import Expected
from coordinator.parts import Part, overrule_part
from coordinator.services import Services
from coordinator.states import PartState
from store.blobs import Blob, BlobStore
from store.database import reading, writing
from store.models import delete_model
from store.tables import audit, jobs, parts, quarantine, utc_now

logger = logging.getLogger(__name__)

SWEEPER = "sweeper"  # who decides when time runs out
_AT_ONCE = 200  # entries looked after in one sweep
_PATIENCE_SECONDS = 60.0  # the process that refused an update keeps its bytes itself, unless it dies


class EntryState(StrEnum):
    """What has become of a quarantined update."""

    HELD = "held"  # nobody has decided
    RELEASED = "released"  # terminal: it counts
    KEPT = "kept"  # terminal: a model that is not aggregated
    REFUSED = "refused"  # terminal: a person refused it
    EXPIRED = "expired"  # terminal: nobody decided in time


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One quarantined update."""

    task_id: str  # of its part
    attempt: int  # of its part, when it was refused
    state: EntryState
    job_id: str
    job_name: str
    round_id: str
    site: str
    reason: str  # why it was refused
    announced: tuple[Blob, ...]  # the shards, as the site signed them
    found: tuple[Blob | None, ...]  # for each of them the bytes that came; None: none, or too many to be kept
    is_stored: bool  # whether these bytes are blobs, rather than still at their slots
    num_examples: int | None
    metrics: Mapping[str, float | None]
    update_norm: float | None  # L2, of update - global model
    global_norm: float | None  # L2, of the global model
    model_id: str | None  # of the model that it became
    decided_by: str  # empty: nobody
    decided_at: datetime | None
    created_at: datetime

    @property
    def size(self) -> int:
        """Return how many bytes are kept, or were."""
        return sum(blob.size for blob in self.found if blob is not None)


_ENTRIES = (
    select(quarantine, parts, jobs.c.name)
    .join(parts, parts.c.task_id == quarantine.c.task_id)
    .join(jobs, jobs.c.job_id == parts.c.job_id)
)


def find_entries(
    connection: Connection, *, job_id: str | None = None, states: Sequence[EntryState] = (), limit: int | None = None
) -> list[Entry]:
    """Return the entries, the newest first."""
    query = _ENTRIES.order_by(quarantine.c.created_at.desc(), quarantine.c.task_id).limit(limit)
    if job_id is not None:
        query = query.where(parts.c.job_id == job_id)
    if states:
        query = query.where(quarantine.c.state.in_([state.value for state in states]))
    return [_entry(row) for row in connection.execute(query).mappings()]


def find_entry(connection: Connection, beginning: str) -> Entry:
    """Return the entry whose task id is, or alone begins with, the text; raise NotFound."""
    begins = quarantine.c.task_id.startswith(beginning, autoescape=True)
    rows = connection.execute(_ENTRIES.where(begins).order_by(quarantine.c.task_id).limit(2)).mappings().all()
    if rows and rows[0][quarantine.c.task_id] == beginning:
        return _entry(rows[0])
    if len(rows) != 1 or not beginning:
        trouble = "More than one task has an id that begins" if rows else "There is no task whose id begins"
        raise NotFound(f"{trouble} with {beginning[:200]!r}; `fedchord quarantine` lists them.")
    return _entry(rows[0])


def add_entry(connection: Connection, part: Part, found: Sequence[Blob | None], *, is_stored: bool = False) -> None:
    """Record that the part's update is held, with the bytes that were found."""
    connection.execute(
        quarantine.insert().values(
            task_id=part.task_id,
            attempt=part.attempt,
            state=EntryState.HELD.value,
            found=_documents(found),
            is_stored=is_stored or not found,
            created_at=utc_now(),
        )
    )


def decide(connection: Connection, entry: Entry, state: EntryState, by: str, *, model_id: str | None = None) -> bool:
    """Move the entry from held to a terminal state and write it into the audit; return False if it was not held."""
    result = connection.execute(
        update(quarantine)
        .where(quarantine.c.task_id == entry.task_id, quarantine.c.state == EntryState.HELD.value)
        .values(state=state.value, model_id=model_id, decided_by=by, decided_at=utc_now())
    )
    if result.rowcount != 1:
        return False
    detail = {"site": entry.site, "reason": entry.reason, "bytes": entry.size, "model_id": model_id}
    connection.execute(
        audit.insert().values(actor=by, action=f"quarantine.{state.value}", subject=entry.task_id, detail=detail)
    )
    return True


def set_aside(connection: Connection, part: Part, reason: str) -> None:
    """Quarantine an update that had been accepted: it stands out from the others of its round. Can be repeated."""
    shards = connection.scalar(select(parts.c.shards).where(parts.c.task_id == part.task_id)) or []
    if not overrule_part(connection, part, PartState.QUARANTINED, reason=reason, model_id=None):
        return
    if part.model_id is not None:
        with suppress(NotFound, Conflict):  # somebody has deleted it, or begun a job with it
            delete_model(connection, part.model_id)
    add_entry(connection, part, [Blob(digest=shard["digest"], size=shard["size"]) for shard in shards], is_stored=True)
    logger.warning(
        "The update of site %s in %s is quarantined: %s",
        part.site,
        part.round_id,
        reason,
        extra={"action": "quarantine", "job": part.job_id, "round": part.round_id, "site": part.site},
    )


def find_bytes(services: Services, part: Part, shards: Sequence[Blob], expected: Expected) -> list[Blob | None]:
    """Return what has come for each announced shard, whether or not it is what was announced; nothing is changed.

    What is more than the gate would take is not kept.
    """
    left = expected.most_bytes(len(shards))
    found: list[Blob | None] = []
    for number, shard in enumerate(shards[: expected.max_shards]):
        blob = services.blobs.written(part.slot(number), max_bytes=left)
        if blob is None and shard.size <= left and is_stored(services.blobs, shard):  # accepted before the verdict
            blob = shard
        left -= blob.size if blob is not None else 0
        found.append(blob)
    return found


def keep_bytes(services: Services, part: Part, found: Sequence[Blob | None]) -> None:
    """Make what was found at the part's slots blobs, and forget the rest. Can be repeated."""
    kept: list[Blob | None] = []
    try:
        for number, blob in enumerate(found):
            kept.append(_keep(services.blobs, part.slot(number), blob))
        with writing(services.engine) as connection:
            connection.execute(
                update(quarantine)
                .where(quarantine.c.task_id == part.task_id, quarantine.c.attempt == part.attempt)
                .values(found=_documents(kept), is_stored=True)
            )
    except Unavailable as error:
        logger.warning(
            "The bytes of %s are not kept yet: %s",
            part.task_id,
            error,
            extra={"action": "keep_bytes", "job": part.job_id, "round": part.round_id, "site": part.site},
        )


def _keep(blobs: BlobStore, slot: str, blob: Blob | None) -> Blob | None:
    if blob is None:
        blobs.discard(slot)
        return None
    try:
        blobs.accept(slot, blob)
    except UpdateRejected as error:
        logger.warning("A quarantined update changed after it was looked at: %s", error, extra={"action": "keep_bytes"})
        blobs.discard(slot)
        return None
    return blob


def is_stored(blobs: BlobStore, blob: Blob) -> bool:
    """Return whether the blob's bytes are in the store."""
    try:
        return blobs.find(blob.digest) == blob
    except NotFound:
        return False


def keep_quarantine(services: Services) -> int:
    """Keep the bytes that a crash has left at their slots, and end what nobody has decided; return how many ended."""
    now = utc_now()
    not_kept = _ENTRIES.where(
        quarantine.c.state == EntryState.HELD.value,
        quarantine.c.is_stored.is_(False),
        quarantine.c.created_at < now - timedelta(seconds=_PATIENCE_SECONDS),
    ).limit(_AT_ONCE)
    too_old = _ENTRIES.where(
        quarantine.c.state == EntryState.HELD.value,
        quarantine.c.created_at < now - timedelta(days=services.settings.quarantine_days),
    ).limit(_AT_ONCE)
    with reading(services.engine) as connection:
        left = [_entry(row) for row in connection.execute(not_kept).mappings()]
        old = [_entry(row) for row in connection.execute(too_old).mappings()]
    for entry in left:
        keep_bytes(services, _part(entry), entry.found)
    if not old:
        return 0
    with writing(services.engine) as connection:
        ended = [entry for entry in old if decide(connection, entry, EntryState.EXPIRED, SWEEPER)]
    if ended:
        logger.info(
            "Ended %s quarantined updates that nobody decided.", len(ended), extra={"action": "expire_quarantine"}
        )
    return len(ended)


def _part(entry: Entry) -> Part:
    """Return as much of the entry's part as names its slots."""
    return Part(
        job_id=entry.job_id,
        round_id=entry.round_id,
        site=entry.site,
        position=0,
        attempt=entry.attempt,
        state=PartState.QUARANTINED,
    )


def _documents(found: Sequence[Blob | None]) -> list[dict[str, object] | None]:
    return [None if blob is None else {"digest": blob.digest, "size": blob.size} for blob in found]


def _entry(row: RowMapping) -> Entry:
    def blob(document: Mapping[str, object]) -> Blob:
        return Blob(digest=str(document["digest"]), size=int(str(document["size"])))

    return Entry(
        task_id=row[quarantine.c.task_id],
        attempt=row[quarantine.c.attempt],
        state=EntryState(row[quarantine.c.state]),
        job_id=row[parts.c.job_id],
        job_name=row[jobs.c.name],
        round_id=row[parts.c.round_id],
        site=row[parts.c.site],
        reason=row[parts.c.reason],
        announced=tuple(blob(each) for each in row[parts.c.shards]),
        found=tuple(None if each is None else blob(each) for each in row[quarantine.c.found]),
        is_stored=row[quarantine.c.is_stored],
        num_examples=row[parts.c.num_examples],
        metrics=row[parts.c.metrics],
        update_norm=row[parts.c.update_norm],
        global_norm=row[parts.c.global_norm],
        model_id=row[quarantine.c.model_id],
        decided_by=row[quarantine.c.decided_by],
        decided_at=row[quarantine.c.decided_at],
        created_at=row[quarantine.c.created_at],
    )
