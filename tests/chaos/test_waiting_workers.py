"""A service is away in mid-job: the workers wait, say so once, go on, and the model is the same to the bit.

Real servers that are killed, stopped or locked, and real workers, none of which may end.
"""

import os
import resource
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from coordinator.jobs import JobState
from coordinator.submitting import submit
from tests.federation import Federation, federation, wait_until
from tests.integration.test_broker_loss import broker
from tests.integration.test_services import SITES, expected, s3_settings
from tests.servers import free_ports, seaweedfs

ROUNDS = 30
BEGUN = 5  # rounds done when the service goes away
AWAY_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Running:
    """A job in mid-course, and the workers that it must end with."""

    made: Federation
    job_id: str
    coordinator: "subprocess.Popen[bytes]"
    sites: tuple["subprocess.Popen[bytes]", ...]

    def ends_well(self) -> None:
        """See the job end with the model of an undisturbed one, and the workers as they were."""
        ended = self.made.wait(self.job_id, "completed", "failed", seconds=60)
        assert ended.state is JobState.COMPLETED, ended.reason
        assert [process.poll() for process in (self.coordinator, *self.sites)] == [None, None, None]
        assert {tensor[0] for tensor in self.made.model(self.job_id).values()} == {np.float32(expected(ROUNDS))}


@contextmanager
def job(folder: Path, **settings: Any) -> Iterator[Running]:
    """Run a job, and lend it when some rounds are done."""
    with ExitStack() as stack:
        made = stack.enter_context(
            federation(folder, *SITES, cache_folder=str(folder / "cache"), **{"ask_again_seconds": 30.0, **settings})
        )
        coordinator = stack.enter_context(made.coordinator())
        sites = tuple(stack.enter_context(made.site(name)) for name in SITES)
        spec = made.spec(rounds=ROUNDS, min_sites=2, config={"megabytes": 0.1}, round_deadline_seconds=600)
        job_id = submit(made.services, spec).job_id
        wait_until(lambda: made.job(job_id).current_round >= BEGUN, seconds=60, what="some rounds")
        yield Running(made=made, job_id=job_id, coordinator=coordinator, sites=sites)


def warnings(made: Federation, name: str = "coordinator.log") -> list[str]:
    """Return what a worker has complained of."""
    levels = (" WARNING ", " ERROR ", " CRITICAL ")
    return [line for line in made.log(name).splitlines() if any(level in line for level in levels)]


def told(made: Federation, action: str, name: str = "coordinator.log") -> int:
    return sum(f"action={action}" in line for line in warnings(made, name))


def wait_while_away(fact: Callable[[], Any], *, seconds: float = AWAY_SECONDS) -> None:
    """Wait until the worker has told of it, and for some seconds more, in which it must not tell again."""
    wait_until(fact, seconds=30, what="the worker to tell that it waits")
    time.sleep(seconds)  # the length of the outage is the point


def test_a_broker_that_is_away_and_comes_back_empty_is_told_of_once_and_costs_little_time(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    url = f"redis://127.0.0.1:{port}/0"
    with broker(port, tmp_path) as first, job(tmp_path, broker_url=url, ask_again_seconds=1.0) as running:
        made, names = running.made, ("coordinator", *SITES)
        first.kill()
        first.wait()
        wait_while_away(lambda: all(told(made, "broker_away", f"{name}.log") for name in names))
        with broker(port, tmp_path):
            back = time.monotonic()
            wait_until(lambda: all(told(made, "broker_back", f"{name}.log") for name in names), what="the workers")
            assert time.monotonic() - back < 10  # they try every second
            running.ends_well()
            for name in names:
                assert told(made, "broker_away", f"{name}.log") == told(made, "broker_back", f"{name}.log") == 1
            assert len(warnings(made)) < 10, warnings(made)


def test_a_database_that_somebody_has_locked_for_longer_than_is_waited_is_told_of_once(tmp_path: Path) -> None:
    with job(tmp_path) as running:
        somebody = sqlite3.connect(tmp_path / "fedchord.db", isolation_level=None)
        somebody.execute("BEGIN IMMEDIATE")
        wait_while_away(lambda: told(running.made, "wait_for_service"))
        somebody.execute("ROLLBACK")
        somebody.close()
        running.ends_well()
        wait_until(lambda: told(running.made, "go_on"), what="what has waited to be tried again")
        assert told(running.made, "wait_for_service") == told(running.made, "go_on") == 1


def test_a_full_disk_is_waited_for_and_the_job_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with job(tmp_path) as running:
        process = psutil.Process(running.coordinator.pid)
        process.rlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))  # less than an update or the records
        wait_while_away(lambda: told(running.made, "wait_for_service"), seconds=9)  # longer than Celery would try
        process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        running.ends_well()
        wait_until(
            lambda: told(running.made, "go_on") == told(running.made, "wait_for_service"),
            what="what has waited to be tried again",
        )
        assert len(warnings(running.made)) < 10, warnings(running.made)


def test_an_object_store_that_hangs_is_waited_for(tmp_path: Path) -> None:
    with seaweedfs() as server, job(tmp_path, **s3_settings(server, "outage")) as running:
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(AWAY_SECONDS)  # the length of the outage is the point
        os.kill(server.pid, signal.SIGCONT)
        running.ends_well()
