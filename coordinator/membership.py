"""Let a site join a job that goes on, or leave it, because a person says so."""

import logging

from redis.exceptions import RedisError

from common.errors import BrokerUnavailable, Conflict, NotFound
from common.heartbeats import read_heartbeats
from common.queues import Kind, cancel_key
from coordinator.dispatch import send_notices
from coordinator.jobs import LIVE, Job, change_job, find_job, get_job, lock_job
from coordinator.letting_go import follow_up
from coordinator.members import forget_member, set_left
from coordinator.outbox import add_notices
from coordinator.parts import Part, find_in, leave_parts
from coordinator.rounds import get_round
from coordinator.services import Services
from coordinator.states import OWING, PartState
from store.database import reading, writing
from store.parties import sites as enrolled_sites

logger = logging.getLogger(__name__)

_CANCEL_SECONDS = 7 * 24 * 3600  # how long a site that is away can still learn of it


def join(services: Services, job_id: str, site: str) -> Job:
    """Take the site into the job from its next round on; one that has left may come back, a pause is over.

    Raise NotFound for a job or site that there is not; Conflict if the job has ended, the site is disabled, or is alive
    and does not offer the job's trainer.
    """
    with reading(services.engine) as connection:
        job = find_job(connection, job_id)
        party = next((party for party in enrolled_sites(connection) if party.site == site), None)
    if party is None:
        raise NotFound(f"There is no site {site!r}; `fedchord sites` lists them.")
    if not party.enabled:
        raise Conflict(f"Site {site} is disabled ({party.reason}); `fedchord sites enable {site}` takes it back.")
    heartbeat = read_heartbeats(services.broker, [site]).get(site)
    if heartbeat is not None and job.spec.trainer not in heartbeat.trainers:
        offered = ", ".join(heartbeat.trainers) or "none"
        raise Conflict(f"Site {site} does not offer the trainer {job.spec.trainer!r}; it offers {offered}.")
    if job.state not in LIVE:
        raise Conflict(_ended(job))
    try:
        services.broker.delete(cancel_key(site, job.job_id))  # of a time when it had left
    except RedisError as error:
        raise BrokerUnavailable(f"The broker does not answer ({error}); start it and try again.") from error
    with writing(services.engine) as connection:
        lock_job(connection, job.job_id)
        job = get_job(connection, job.job_id)
        if not change_job(connection, job.job_id, expected=LIVE, sites=sorted({*job.sites, site})):
            raise Conflict(_ended(job))
        forget_member(connection, job, site)
    logger.info("Site %s joins job %s.", site, job.name, extra={"action": "join_job", "job": job.job_id, "site": site})
    with reading(services.engine) as connection:
        return get_job(connection, job.job_id)


def leave(services: Services, job_id: str, site: str, reason: str) -> Job:
    """Take the site out of the job now: nothing of it is waited for any more, and it is told.

    Raise NotFound if it is not in the job, Conflict if the job has ended or could not have a quorum without the site.
    """
    with reading(services.engine) as connection:
        job = find_job(connection, job_id)
    with writing(services.engine) as connection:
        lock_job(connection, job.job_id)
        job = get_job(connection, job.job_id)
        if site not in job.sites:
            raise NotFound(f"Site {site!r} is not in job {job.name}; in it are {', '.join(job.sites)}.")
        left = [each for each in job.sites if each != site]
        if len(left) < job.quorum:
            raise Conflict(
                f"Without {site} job {job.name} has {len(left)} sites, and its quorum is {job.quorum}; end the job "
                f"instead: `fedchord abort {job.job_id[:8]}`."
            )
        if not change_job(connection, job.job_id, expected=LIVE, sites=left):
            raise Conflict(_ended(job))
        set_left(connection, job, site, reason)
        add_notices(connection, Kind.CLIENT_REMOVED, job.job_id, (site,), reason)
        owing = [part for part in find_in(connection, OWING, job_id=job.job_id) if part.site == site]
        dropped = leave_parts(connection, owing, PartState.DROPPED, f"the site has left the job: {reason}")
    logger.info(
        "Site %s leaves job %s.", site, job.name, extra={"action": "leave_job", "job": job.job_id, "site": site}
    )
    _tell(services, job, site, reason, dropped)
    with reading(services.engine) as connection:
        return get_job(connection, job.job_id)


def _tell(services: Services, job: Job, site: str, reason: str, dropped: tuple[Part, ...]) -> None:
    try:
        services.broker.set(cancel_key(site, job.job_id), reason, ex=_CANCEL_SECONDS)
        for part in dropped:
            with reading(services.engine) as connection:
                round_ = get_round(connection, part.round_id)
            follow_up(services, job, round_, [part])
        send_notices(services)
    except (RedisError, BrokerUnavailable) as error:
        raise BrokerUnavailable(
            f"The site has left the job, but it could not be told ({error}); it stops at its round's deadline."
        ) from error


def _ended(job: Job) -> str:
    return f"Job {job.name} ({job.job_id}) has ended: it is {job.state}."
