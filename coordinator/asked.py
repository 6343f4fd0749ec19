"""What a site was asked: its part, the round and the job that the part belongs to, and the key it answers with."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, select

from common.errors import NotFound
from coordinator.jobs import Job, job_of
from coordinator.parts import Part, part_of
from coordinator.rounds import Round, round_of
from coordinator.states import RoundKind
from store.tables import jobs, parts, party_info, rounds


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A part and all that it is part of."""

    job: Job
    round: Round
    part: Part
    public_key: str  # of the part's site


_ASKED = (  # built once: that takes longer than to run it
    select(jobs, rounds, parts, party_info.c.public_key)
    .join(rounds, rounds.c.job_id == jobs.c.job_id)
    .join(parts, parts.c.round_id == rounds.c.round_id)
    .join(party_info, party_info.c.site == parts.c.site)
    .where(parts.c.task_id == bindparam("task_id"))
)


def get_asked(connection: Connection, task_id: str) -> Asked:
    """Return what a site was asked; raise NotFound if it was not, or is not enrolled any more."""
    row = connection.execute(_ASKED, {"task_id": task_id}).mappings().first()
    if row is None:
        raise NotFound(f"No enrolled site was asked {task_id[:200]!r}.")
    return Asked(job=job_of(row), round=round_of(row), part=part_of(row), public_key=row[party_info.c.public_key] or "")


def builder(round_: Round, parts: Sequence[Part]) -> str | None:
    """Return the site that builds the first model in a start; None if there is a model. Another one at each start."""
    if round_.kind is not RoundKind.START or round_.input_model_id is not None:
        return None
    return parts[round_.number % len(parts)].site
