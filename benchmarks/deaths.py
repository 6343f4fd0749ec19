"""What the death of a coordinator costs a job, and how soon that of a site is noticed.

    python -m benchmarks.deaths --sites 4 --deaths 5 --json

While a job runs, every worker of the coordinator is killed at once, at a random moment of a round; the stack starts
them again. The cost is by how much the rounds around it last longer than those that nothing happened to. The floor is
measured in the same run: a process that imports what a coordinator imports. Then a site stands still, and the time is
taken until a coordinator says that it has gone.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
import psutil

from benchmarks.fleet import fleet
from benchmarks.report import median, report
from common.settings import CONFIG_VARIABLE, Settings
from coordinator.jobfile import JobSpec
from coordinator.jobs import LIVE, get_job
from coordinator.rounds import find_rounds
from coordinator.services import Services
from coordinator.stack.folder import StackFolder
from coordinator.stack.lifecycle import status
from coordinator.stack.programs import COORDINATOR
from coordinator.states import RoundKind
from coordinator.submitting import abort, submit
from store.database import reading

_ROUND_SECONDS = 0.5  # that a part takes
_STILL = 2  # rounds before each death that nothing happens to
_AROUND = 3  # rounds in which a death may make itself felt
_LONGEST_SECONDS = 120.0
_FLOOR_STARTS = 3


def _wait(fact: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _LONGEST_SECONDS
    while not fact():
        if time.monotonic() > end:
            raise SystemExit(f"Waited {_LONGEST_SECONDS:g} s for {what}.")
        time.sleep(0.02)


def _round(services: Services, job_id: str) -> int:
    with reading(services.engine) as connection:
        job = get_job(connection, job_id)
    if job.state not in LIVE:
        raise SystemExit(f"The job is {job.state}: {job.reason}")
    return job.current_round


def _wait_round(services: Services, job_id: str, number: int) -> None:
    _wait(lambda: _round(services, job_id) >= number, f"round {number}")


def _intervals(services: Services, job_id: str) -> dict[int, float]:
    """Return how long it was from each training round's plan to the next one's, in seconds, by number."""
    with reading(services.engine) as connection:
        begun = {
            each.number: each.created_at for each in find_rounds(connection, job_id) if each.kind is RoundKind.TRAIN
        }
    return {number: (begun[number + 1] - begun[number]).total_seconds() for number in begun if number + 1 in begun}


def _processes(folder: StackFolder, name: str) -> list[psutil.Process]:
    """Return the stack's processes of that name, as coordinator and coordinator-2, with their children."""
    found = [each for each in status(folder.path).processes if each.name == name or each.name.startswith(f"{name}-")]
    parents = [psutil.Process(each.pid) for each in found]
    return [process for parent in parents for process in (parent, *parent.children(recursive=True))]


def _kill_coordinators(services: Services, folder: StackFolder, job_id: str, deaths: int) -> list[int]:
    """Kill the coordinator so often; return the numbers of the rounds in which that was."""
    chance, killed = random.Random(0), []
    for _ in range(deaths):
        _wait_round(services, job_id, _round(services, job_id) + _STILL)
        time.sleep(chance.uniform(0, _ROUND_SECONDS))
        killed.append(_round(services, job_id))
        for process in _processes(folder, COORDINATOR):
            process.kill()
        _wait_round(services, job_id, killed[-1] + _AROUND)
    return killed


@contextmanager
def _stopped(processes: list[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def _seconds_to_notice(folder: StackFolder, site: str) -> float:
    """Return after how long a coordinator says that the site, which stands still, has gone."""
    logs = sorted(folder.logs.glob(f"{COORDINATOR}*.log"))
    sizes = {log: log.stat().st_size for log in logs}
    words = f"Site {site} has gone".encode()
    with _stopped(_processes(folder, site)):
        begun = time.monotonic()
        _wait(lambda: any(words in log.read_bytes()[sizes[log] :] for log in logs), f"{site} to be missed")
        return time.monotonic() - begun


def _floor_seconds(folder: StackFolder) -> float:
    environment = {**os.environ, CONFIG_VARIABLE: str(folder.settings_file)}
    times = []
    for _ in range(_FLOOR_STARTS):
        begun = time.monotonic()
        subprocess.run([sys.executable, "-c", "import coordinator.celery"], env=environment, check=True)
        times.append(time.monotonic() - begun)
    return median(times)


@click.command()
@click.option("--sites", default=4, show_default=True, help="How many sites, each a process of its own.")
@click.option("--deaths", default=5, show_default=True, help="How often the coordinator is killed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(sites: int, deaths: int, as_json: bool) -> None:
    """Kill the coordinator again and again while a job runs, then stop a site; tell what that costs."""
    spec = JobSpec(
        name="deaths",
        trainer="constant",
        rounds=100_000,
        min_sites=sites,
        test_every=0,
        config={"seconds": _ROUND_SECONDS},
    )
    with fleet(sites) as services:
        folder = StackFolder(services.settings.signing_key_file.parent)
        job_id = submit(services, spec).job_id
        killed = _kill_coordinators(services, folder, job_id, deaths)
        intervals = _intervals(services, job_id)
        around = {number: range(number, number + _AROUND) for number in killed}
        disturbed = {number for numbers in around.values() for number in numbers} | {1}
        still = median([seconds for number, seconds in intervals.items() if number not in disturbed])
        costs = [sum(intervals[each] - still for each in numbers if each in intervals) for numbers in around.values()]
        noticed = [_seconds_to_notice(folder, f"site-{number}") for number in range(1, min(sites, 3) + 1)]
        abort(services, job_id, "measured")
        floor = _floor_seconds(folder)
    figures = {
        "sites": sites,
        "deaths": deaths,
        "seconds_per_round_undisturbed": still,
        "cost_seconds_median": median(costs),
        "cost_seconds_worst": max(costs),
        "floor_seconds": floor,
        "heartbeat_seconds": Settings().heartbeat_seconds,
        "site_missed_seconds_worst": max(noticed),
    }
    report("deaths", figures, as_json=as_json)


if __name__ == "__main__":
    main()
