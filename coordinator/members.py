"""The sites of a job that need watching: those that fail again and again, and those that have left.

A site that has given no good answer for some rounds in a row is paused: it is not asked for a while, then once more,
and each further pause is twice as long. One good answer ends all of that. A site without a row is in good standing.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, and_, delete, select

from coordinator.jobs import Job
from coordinator.parts import SURPLUS, Part
from coordinator.states import PartState
from store.tables import members, utc_now

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_SECONDS = 24 * 3600.0
_BAD = (PartState.FAILED, PartState.QUARANTINED, PartState.DECLINED, PartState.DROPPED)


@dataclass(frozen=True, kw_only=True)
class Member:
    """How a site does in a job."""

    site: str
    failures: int = 0  # rounds in a row without a good answer
    pauses: int = 0  # in a row
    paused_until: datetime | None = None
    reason: str = ""  # why it is paused, or has left
    has_left: bool = False

    def is_paused(self, now: datetime) -> bool:
        """Return whether the site is not asked for now."""
        return self.paused_until is not None and now < self.paused_until


def find_members(connection: Connection, job_id: str) -> dict[str, Member]:
    """Return what is recorded of the job's sites, by name; nothing of those in good standing."""
    rows = connection.execute(select(members).where(members.c.job_id == job_id)).mappings()
    return {
        row["site"]: Member(
            site=row["site"],
            failures=row["failures"],
            pauses=row["pauses"],
            paused_until=row["paused_until"],
            reason=row["reason"],
            has_left=row["has_left"],
        )
        for row in rows
    }


def note_answers(connection: Connection, job: Job, answered: Iterable[Part]) -> None:
    """Take note of how a round's sites have answered; once, in the transaction that closes the round."""
    known = find_members(connection, job.job_id)
    for part in answered:
        member = known.get(part.site, Member(site=part.site))
        if part.state is PartState.ACCEPTED:
            if part.site in known and not member.has_left:
                connection.execute(delete(members).where(_is(job, part.site)))
        elif part.state in _BAD and part.code != SURPLUS:
            _write(connection, job, _failed(job, member, part))


def set_left(connection: Connection, job: Job, site: str, reason: str) -> None:
    """Record that the site has left the job."""
    _write(connection, job, Member(site=site, reason=reason, has_left=True))


def forget_member(connection: Connection, job: Job, site: str) -> None:
    """Put the site into good standing."""
    connection.execute(delete(members).where(_is(job, site)))


def _failed(job: Job, member: Member, part: Part) -> Member:
    rules = job.spec.participation
    failures = member.failures + 1
    if rules.pause_after == 0 or failures < rules.pause_after:
        return replace(member, failures=failures)
    seconds = min(rules.pause_seconds * 2**member.pauses, _LONGEST_PAUSE_SECONDS)
    why = part.reason.rstrip(".") or str(part.state)
    reason = f"{failures} rounds in a row without a good answer, the last {part.state}: {why}"
    logger.warning(
        "Site %s is paused for %.0f s: %s.",
        part.site,
        seconds,
        reason,
        extra={"action": "pause_site", "job": job.job_id, "round": part.round_id, "site": part.site},
    )
    until = utc_now() + timedelta(seconds=seconds)
    return replace(member, failures=failures, pauses=member.pauses + 1, paused_until=until, reason=reason)


def _write(connection: Connection, job: Job, member: Member) -> None:
    forget_member(connection, job, member.site)
    connection.execute(members.insert().values(job_id=job.job_id, **vars(member)))


def _is(job: Job, site: str) -> ColumnElement[bool]:
    return and_(members.c.job_id == job.job_id, members.c.site == site)
