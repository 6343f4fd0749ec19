"""Look, every second, for what should have happened and has not: a deadline that has passed, a message that was lost,
a coordinator that died between two steps. Any number of processes may sweep; every step can be repeated.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from celery import bootsteps

from common.errors import FedChordError
from common.heartbeats import Heartbeat, read_heartbeats
from coordinator.asking import Asking
from coordinator.closing import start_job
from coordinator.dispatch import call_back, publish_round, send_notices
from coordinator.jobs import JobState, find_jobs
from coordinator.overdue import Held, find_overdue
from coordinator.quarantine import keep_quarantine
from coordinator.rounds import end_lease
from coordinator.services import Services, services_of
from coordinator.stack.old_logs import clean_logs
from coordinator.steady_clock import SteadyClock
from coordinator.waiting import Waiting, end_waiting, find_waiting
from store.database import reading, writing
from store.garbage import CLEAN_SECONDS, clean

logger = logging.getLogger(__name__)


class Memory:
    """What one sweeping process remembers from one sweep to the next."""

    def __init__(self) -> None:
        self.clock = SteadyClock()
        self.asking = Asking()
        self.told: set[str] = set()  # overdue rounds that the log has told of


def sweep(services: Services, memory: Memory, *, grace_seconds: float) -> int:
    """Take up everything that is overdue by grace_seconds; return how many things that were."""
    with reading(services.engine) as connection:
        overdue = find_overdue(connection, grace_seconds=grace_seconds)
        submitted = find_jobs(connection, states=(JobState.SUBMITTED,))
        waiting = find_waiting(connection)
    steps: list[Callable[[], None]] = []
    if waiting:
        steps.append(partial(_look_after, services, memory, waiting))
    steps += [partial(_end_lease, services, memory, held) for held in overdue.held]
    steps += [partial(_take_up, services, memory, round_id) for round_id in overdue.unclaimed]
    steps += [partial(start_job, services, job.job_id) for job in submitted]
    steps += [partial(_send_again, services, memory, round_id) for round_id in overdue.unpublished]
    steps.append(partial(send_notices, services, grace_seconds=grace_seconds))
    memory.told &= {*overdue.unclaimed, *overdue.unpublished}
    _run_all(steps)
    memory.clock.turn()
    return len(submitted) + len(overdue.unpublished) + len(overdue.unclaimed)


def _run_all(steps: Sequence[Callable[[], None]]) -> None:
    """Run each on its own, for one job's trouble must not keep another job's deadline from being seen; then raise."""
    failures: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:
            failures.append(error)
    if failures:
        raise next((error for error in failures if not isinstance(error, FedChordError)), failures[0])


def _look_after(services: Services, memory: Memory, waiting: Sequence[Waiting]) -> None:
    """End the waiting that has lasted long enough, and ask again for what seems to be lost."""
    owing = {part.site for each in waiting for part in each.owing}
    steps: list[Callable[[], None]] = []
    heartbeats: Mapping[str, Heartbeat] | None = None  # a deadline ends also while the broker is away
    try:
        heartbeats = read_heartbeats(services.broker, sorted(owing))
    finally:
        steps += [partial(end_waiting, services, each, heartbeats, memory.clock) for each in waiting]
        if heartbeats is not None:
            sent = [part for each in waiting if each.round.published_at is not None for part in each.owing]
            steps.append(partial(memory.asking.ask_again, services, sent, heartbeats))
        _run_all(steps)


def _end_lease(services: Services, memory: Memory, held: Held) -> None:
    """End a lease that has not been renewed for as long as it lasts, though the clock says that it has not run out."""
    limit = services.settings.lease_seconds + 2 * services.settings.sweep_seconds
    if memory.clock.seconds(("lease", held.round_id, held.owner, held.until)) > limit:
        with writing(services.engine) as connection:
            end_lease(connection, held.round_id, held.owner, held.until)


def _send_again(services: Services, memory: Memory, round_id: str) -> None:
    if round_id not in memory.told:  # once, also when that does not help because a service is away
        memory.told.add(round_id)
        logger.warning("Round %s may not have been sent; sending it.", round_id, extra={"action": "resend_round"})
    publish_round(services, round_id)


def _take_up(services: Services, memory: Memory, round_id: str) -> None:
    if round_id not in memory.told:
        memory.told.add(round_id)
        logger.warning("Round %s has every answer; taking it up.", round_id, extra={"action": "take_up_round"})
    call_back(services, round_id)


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
        memory = Memory()
        trouble = ""
        next_clean = time.monotonic()
        while not self._stopped.wait(period):
            try:
                sweep(services, memory, grace_seconds=2 * period)
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
