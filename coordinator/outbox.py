"""Messages that ask for no answer, recorded with the change they tell of, so that neither happens without the other."""

from dataclasses import dataclass

from sqlalchemy import Connection, select, update

from common.queues import Kind
from coordinator.overdue import is_old
from store.tables import outbox, utc_now


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A message that is to be sent."""

    notice_id: int
    site: str
    kind: Kind  # TRAINING_FINISHED or CLIENT_REMOVED
    job_id: str
    reason: str


def add_notices(connection: Connection, kind: Kind, job_id: str, sites: tuple[str, ...], reason: str = "") -> None:
    """Record a message to each site."""
    if sites:
        connection.execute(
            outbox.insert(),
            [{"kind": kind.value, "job_id": job_id, "site": site, "reason": reason} for site in sites],
        )


def find_notices(connection: Connection, *, grace_seconds: float = 0, limit: int = 1000) -> list[Notice]:
    """Return the messages, so many seconds old, that are not known to have been sent, the oldest first."""
    query = select(outbox).where(outbox.c.sent_at.is_(None))
    if grace_seconds:
        query = query.where(is_old(outbox.c.created_at, grace_seconds))
    query = query.order_by(outbox.c.id).limit(limit)
    return [
        Notice(
            notice_id=row["id"],
            site=row["site"],
            kind=Kind(row["kind"]),
            job_id=row["job_id"],
            reason=row["reason"],
        )
        for row in connection.execute(query).mappings()
    ]


def mark_sent(connection: Connection, notice: Notice) -> None:
    """Record that the message is on its queue."""
    connection.execute(update(outbox).where(outbox.c.id == notice.notice_id).values(sent_at=utc_now()))
