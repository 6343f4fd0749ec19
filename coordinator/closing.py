"""The chord's callback: put a round's answers together, record what came of it, plan and send the next round."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType

from sqlalchemy import Connection

from common.errors import Conflict, FedChordError, Unavailable
from common.heartbeats import Heartbeat, read_heartbeats
from common.queues import Kind
from coordinator.aggregation import weighted_metrics
from coordinator.combining import make_model
from coordinator.dispatch import publish_round, send_notices
from coordinator.jobs import LIVE, Job, JobState, change_job, get_job, lock_job
from coordinator.lease import held_round
from coordinator.letting_go import cancel_parts
from coordinator.members import note_answers, set_left
from coordinator.outbox import add_notices
from coordinator.outliers import outliers
from coordinator.parts import Part, find_carried, find_parts
from coordinator.planning import Step, finish, let_stale_go, plan_next
from coordinator.quarantine import set_aside
from coordinator.rounds import Round, close_round, forgive_claim, get_round
from coordinator.services import Services
from coordinator.states import PartState, RoundKind, RoundState
from store.database import reading, writing
from store.models import add_model, set_metrics
from store.parties import sites as enrolled_sites

logger = logging.getLogger(__name__)

_MOST_CLAIMS = 10  # a round whose aggregation has ended its process so often ends the job


def settle_round(services: Services, round_id: str) -> None:
    """Aggregate the round if it is ready and nobody else does; go on with the job. Can be repeated."""
    with held_round(services, round_id) as owner:
        if owner is None:
            logger.debug("Round %s is not ready, or in other hands.", round_id, extra={"action": "not_claimed"})
            return
        with reading(services.engine) as connection:
            round_ = get_round(connection, round_id)
            job = get_job(connection, round_.job_id)
            parts = find_parts(connection, round_id)
            carried = find_carried(connection, job.job_id, round_id) if job.spec.late.policy == "keep" else []
        try:
            if round_.claims > _MOST_CLAIMS:
                raise Conflict(_too_often())
            following = _settle(services, owner, job, round_, parts, carried)
        except Unavailable:
            with suppress(Unavailable), writing(services.engine) as connection:
                forgive_claim(connection, round_id, owner)
            raise
        except Exception as error:
            logger.exception("Round %s cannot be aggregated.", round_id, extra={"action": "aggregation_failed"})
            said = error.message if isinstance(error, FedChordError) else f"{type(error).__name__}: {error}"
            _fail(services, owner, job, round_, f"The answers of {round_.title} cannot be put together: {said}")
            following = None
    if following is not None:
        publish_round(services, following.round_id)
    send_notices(services)


def start_job(services: Services, job_id: str) -> None:
    """Plan and send a submitted job's first round. Can be repeated."""
    with reading(services.engine) as connection:
        job = get_job(connection, job_id)
    if job.state is JobState.SUBMITTED:
        alive = alive_sites(services, job)
        first = None
        with writing(services.engine) as connection:
            lock_job(connection, job_id)
            job = get_job(connection, job_id)  # a site may have left it, or another process have planned
            if job.state is JobState.SUBMITTED:
                first = plan_next(connection, job, None, alive=alive, choosers=services.settings.choosers)
        if first is not None:
            publish_round(services, first.round_id)
    send_notices(services)


def alive_sites(services: Services, job: Job) -> dict[str, Heartbeat]:
    """Return the heartbeats that have not run out, of the job's sites and of those that may join it."""
    sites = set(job.sites)
    if job.spec.participation.join:
        with reading(services.engine) as connection:
            sites |= {party.site for party in enrolled_sites(connection, enabled=True) if party.site}
    return read_heartbeats(services.broker, sorted(sites))


def _settle(
    services: Services, owner: str, job: Job, round_: Round, own: Sequence[Part], carried: Sequence[Part]
) -> Round | None:
    verdicts = outliers(job, [*own, *carried])
    refused = [part for part in (*own, *carried) if part.task_id in verdicts]
    parts, carried = _judged(own, verdicts), _judged(carried, verdicts)
    accepted = [part for part in (*carried, *parts) if part.state is PartState.ACCEPTED]
    accepted.sort(key=lambda part: part.site)  # of one site's two the older stays first
    if round_.kind is not RoundKind.TEST and len(accepted) < job.quorum:
        _fail(services, owner, job, round_, no_quorum(job, round_, parts, carried), refused, verdicts)
        return None
    started = time.monotonic()
    made = make_model(services, job, round_, accepted)
    examples = [part.num_examples or 0 for part in accepted]
    metrics = weighted_metrics([part.metrics for part in accepted], examples)
    alive = alive_sites(services, job)
    answered_at = max((part.answered_at for part in parts if part.answered_at), default=round_.created_at)
    seconds = {
        "collecting": (answered_at - round_.created_at).total_seconds(),
        "aggregating": time.monotonic() - started,
    }
    with writing(services.engine) as connection:
        lock_job(connection, job.job_id)
        closed = close_round(
            connection,
            round_.round_id,
            owner,
            RoundState.CLOSED,
            output_model_id=made.model.model_id if made else None,
            metrics=metrics,
            seconds=seconds,
        )
        if not closed:
            return None
        for part in refused:
            set_aside(connection, part, verdicts[part.task_id])
        if made is not None and round_.kind is not RoundKind.START:
            for each in (*made.also, made.model):
                add_model(connection, each)
        if made is not None and round_.kind is not RoundKind.SWAG:
            change_job(connection, job.job_id, expected=LIVE, model_id=made.model.model_id)
        if round_.kind is RoundKind.TEST and round_.input_model_id and metrics:
            set_metrics(connection, round_.input_model_id, metrics)
        _remove_unwilling(connection, job, round_, parts)
        if round_.kind is not RoundKind.START:
            note_answers(connection, job, [*carried, *parts])
        job = get_job(connection, job.job_id)
        last = Step(kind=round_.kind, number=round_.number)
        stale = let_stale_go(connection, job, last)
        following = plan_next(connection, job, last, alive=alive, choosers=services.settings.choosers)
    if stale:
        cancel_parts(services, stale, services.settings.reference_seconds)
    logger.info(
        "Closed %s of job %s with %s of %s sites.",
        round_.title,
        job.name,
        len(accepted),
        len(parts) + len(carried),
        extra={"action": "close_round", "job": job.job_id, "round": round_.round_id, "metrics": metrics},
    )
    return following


def _judged(parts: Sequence[Part], verdicts: Mapping[str, str]) -> list[Part]:
    """Return the parts, with those that there is a verdict on as quarantined."""
    return [
        replace(part, state=PartState.QUARANTINED, reason=verdicts[part.task_id]) if part.task_id in verdicts else part
        for part in parts
    ]


def _remove_unwilling(connection: Connection, job: Job, round_: Round, parts: Sequence[Part]) -> None:
    """Take the sites that declined the start out of the job, and tell them."""
    if round_.kind is not RoundKind.START:
        return
    for part in parts:
        if part.state is PartState.DECLINED:
            add_notices(connection, Kind.CLIENT_REMOVED, job.job_id, (part.site,), part.reason)
            set_left(connection, job, part.site, f"it declined the start: {part.reason}")
    removed = {part.site for part in parts if part.state is PartState.DECLINED}
    if removed:
        left = [site for site in job.sites if site not in removed]
        change_job(connection, job.job_id, expected=LIVE, sites=left)


def _fail(
    services: Services,
    owner: str,
    job: Job,
    round_: Round,
    reason: str,
    refused: Sequence[Part] = (),
    verdicts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    with writing(services.engine) as connection:
        lock_job(connection, job.job_id)
        if not close_round(connection, round_.round_id, owner, RoundState.FAILED, reason=reason):
            return
        for part in refused:
            set_aside(connection, part, verdicts[part.task_id])
        finish(connection, job, JobState.FAILED, reason)
    logger.error(
        "Job %s failed: %s", job.name, reason, extra={"action": "fail_job", "job": job.job_id, "round": round_.round_id}
    )


def _too_often() -> str:
    return (
        f"it was begun {_MOST_CLAIMS} times, and each time the process ended, perhaps for want of memory; look at the "
        "coordinator's log and the machine, and submit the job again from its last model."
    )


def no_quorum(job: Job, round_: Round, parts: Sequence[Part], carried: Sequence[Part] = ()) -> str:
    """Return why the round cannot count: who answered what."""
    parts = [*parts, *carried]
    accepted = sum(part.state is PartState.ACCEPTED for part in parts)
    others = "; ".join(
        f"{part.site} {part.state}: {part.reason.rstrip('.')}" for part in parts if part.state is not PartState.ACCEPTED
    )
    return (
        f"In {round_.title} {accepted} of {len(parts)} sites answered well, but the quorum is {job.quorum}. {others}."
    )
