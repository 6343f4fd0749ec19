"""Look, every second, for what should have happened and has not: a deadline that has passed, a message that was lost,
a coordinator that died between two steps. Any number of processes may sweep; every step can be repeated.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import bootsteps
from redis.exceptions import RedisError

from common.errors import BrokerUnavailable, FedChordError
from common.heartbeats import read_heartbeats
from common.queues import site_queue
from coordinator.closing import start_job
from coordinator.dispatch import call_back, complete_part, publish_again, publish_round, send_notices
from coordinator.jobs import JobState, find_jobs
from coordinator.overdue import find_overdue
from coordinator.quarantine import keep_quarantine
from coordinator.rounds import drop_waiting, find_parts, find_waiting
from coordinator.services import Services, services_of
from coordinator.stack.old_logs import clean_logs
from store.database import reading, writing
from store.garbage import CLEAN_SECONDS, clean

logger = logging.getLogger(__name__)

LONGEST_PATIENCE_SECONDS = 600.0  # a site that is asked in vain is asked again ever more rarely, down to this


def sweep(services: Services, *, grace_seconds: float, asked: "Asked | None" = None) -> int:
    """Take up everything that is overdue by grace_seconds; return how many things that were.

    `asked` remembers, from one sweep of this process to the next, whom it has asked again.
    """
    with reading(services.engine) as connection:
        overdue = find_overdue(connection, grace_seconds=grace_seconds)
        submitted = find_jobs(connection, states=(JobState.SUBMITTED,))
    steps: list[Callable[[], None]] = []
    steps += [partial(_expire, services, round_id) for round_id in overdue.expired]
    steps += [partial(_take_up, services, round_id) for round_id in overdue.unclaimed]
    steps += [partial(start_job, services, job.job_id) for job in submitted]
    steps += [partial(_send_again, services, round_id) for round_id in overdue.unpublished]
    if asked is not None:
        steps.append(partial(asked.ask_again, services))
    steps.append(partial(send_notices, services, grace_seconds=grace_seconds))
    failures: list[Exception] = []
    for step in steps:  # each on its own: one job's trouble must not keep another job's deadline from being seen
        try:
            step()
        except Exception as error:
            failures.append(error)
    if failures:
        raise next((error for error in failures if not isinstance(error, FedChordError)), failures[0])
    return len(submitted) + len(overdue.unpublished) + len(overdue.expired) + len(overdue.unclaimed)


def _send_again(services: Services, round_id: str) -> None:
    logger.warning("Round %s may not have been sent; sending it.", round_id, extra={"action": "resend_round"})
    publish_round(services, round_id)


def _take_up(services: Services, round_id: str) -> None:
    logger.warning("Round %s has every answer; taking it up.", round_id, extra={"action": "take_up_round"})
    call_back(services, round_id)


def _expire(services: Services, round_id: str) -> None:
    """Close a round whose deadline has passed: what is missing is dropped, and the callback runs with what is there."""
    with writing(services.engine) as connection:
        dropped = drop_waiting(connection, round_id, "no answer before the deadline")
        parts = find_parts(connection, round_id)
    logger.warning(
        "Round %s is past its deadline: %s of %s sites have not answered.",
        round_id,
        dropped,
        len(parts),
        extra={"action": "expire_round", "round": round_id},
    )
    for part in parts:
        complete_part(services, round_id, part)


class Asked:
    """Ask again the sites that owe an answer although they are alive and have nothing in hand.

    Redis hands a message to one process and forgets it; if that process dies in the same moment, the message is lost.
    """

    def __init__(self) -> None:
        self._asked: dict[str, tuple[float, float]] = {}  # by task id: when next (monotonic), and the pause after that

    def ask_again(self, services: Services) -> None:
        """Send the message again of each part that seems to be lost, and not sooner than it may have arrived."""
        patience = services.settings.ask_again_seconds
        with reading(services.engine) as connection:
            waiting = find_waiting(connection, age_seconds=patience)
        now = time.monotonic()
        self._asked = {part.task_id: self._asked.get(part.task_id, (now, patience)) for part in waiting}
        due = [part for part in waiting if self._asked[part.task_id][0] <= now]
        heartbeats = read_heartbeats(services.broker, sorted({part.site for part in due}))
        for part in due:
            heartbeat = heartbeats.get(part.site)
            if heartbeat is None or heartbeat.tasks or _has_messages(services, part.site):
                continue  # away, at work, or yet to take the message from its queue
            logger.warning(
                "Site %s is idle and owes an answer; asking again.",
                part.site,
                extra={"action": "ask_again", "job": part.job_id, "round": part.round_id, "site": part.site},
            )
            publish_again(services, part)
            _, pause = self._asked[part.task_id]
            self._asked[part.task_id] = (now + pause, min(2 * pause, max(patience, LONGEST_PATIENCE_SECONDS)))


def _has_messages(services: Services, site: str) -> bool:
    try:
        return bool(services.broker.llen(site_queue(site)))
    except RedisError as error:
        raise BrokerUnavailable(f"The broker does not answer ({error}); start it.") from error


class Sweeper(bootsteps.StartStopStep):
    """Sweep in a thread of the coordinator's worker, for as long as the worker runs."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, worker: Any) -> None:
        """Begin to sweep."""
        services = services_of(worker.app)
        self._thread = threading.Thread(target=self._run, args=(services,), name="sweeper", daemon=True)
        self._thread.start()

    def stop(self, worker: Any) -> None:
        """End after the sweep that is going on."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self, services: Services) -> None:
        period = services.settings.sweep_seconds
        asked = Asked()
        trouble = ""
        next_clean = time.monotonic()
        while not self._stopped.wait(period):
            try:
                sweep(services, grace_seconds=2 * period, asked=asked)
                if time.monotonic() >= next_clean:
                    next_clean = time.monotonic() + CLEAN_SECONDS  # even if it fails: not every second
                    keep_quarantine(services)
                    clean(services.settings, services.engine, services.blobs)
                    clean_logs(services.settings)
                trouble = ""
            except FedChordError as error:
                if error.message != trouble:  # once, not every second
                    trouble = error.message
                    logger.warning("The sweep has to wait: %s", trouble, extra={"action": "sweep_waits"})
            except Exception as error:
                if repr(error) != trouble:
                    trouble = repr(error)
                    logger.exception("The sweep failed.", extra={"action": "sweep_failed"})
