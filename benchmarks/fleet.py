"""A whole federation of real processes for a benchmark: the stack that `fedchord up` starts, in a temporary folder."""

import itertools
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from common.settings import Settings
from coordinator.jobfile import JobSpec
from coordinator.jobs import LIVE
from coordinator.progress import JobProgress, job_progress
from coordinator.services import Services, open_services
from coordinator.stack.lifecycle import down, status, up
from coordinator.stack.wishes import Wishes
from coordinator.submitting import submit

_SAMPLE_SECONDS = 0.2
_LONGEST_SECONDS = 1800.0


@dataclass
class Load:
    """What processes have used, sampled while they run."""

    coordinator: int  # process id
    processes: list[psutil.Process]
    coordinator_peak_rss: int = 0  # bytes
    total_peak_rss: int = 0  # bytes, of all processes together; pages that they share count for each of them
    _done: threading.Event = field(default_factory=threading.Event)

    def cpu_seconds(self) -> float:
        """Return what all processes have used so far, user and system."""
        times = [process.cpu_times() for process in self.processes]
        return sum(each.user + each.system for each in times)

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Watch the memory."""
        thread = threading.Thread(target=self._sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            rss = {process.pid: process.memory_info().rss for process in self.processes}
            self.coordinator_peak_rss = max(self.coordinator_peak_rss, rss[self.coordinator])
            self.total_peak_rss = max(self.total_peak_rss, sum(rss.values()))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished job and what it has cost."""

    progress: JobProgress
    intervals: tuple[float, ...]  # seconds from a training round's plan to the next one's, the first left out
    cpu_seconds_per_round: float
    coordinator_peak_rss_mb: float  # 10^6 bytes
    total_peak_rss_mb: float  # 10^6 bytes
    num_processes: int


@contextmanager
def fleet(num_sites: int) -> Iterator[Services]:
    """Run a stack with so many sites that offer the trainer `constant`."""
    with tempfile.TemporaryDirectory(prefix="fedchord-bench-") as folder:
        path = Path(folder) / "stack"
        up(path, Wishes(num_sites=num_sites, trainers={"constant": "benchmarks.constant:ConstantTrainer"}))
        try:
            with open_services(Settings.load(path / "fedchord.toml")) as services:
                yield services
        finally:
            down(path)


def run(services: Services, spec: JobSpec) -> Run:
    """Run a job to its end and measure it."""
    load = _load(services)
    with load.sampled():
        before = load.cpu_seconds()
        job_id = submit(services, spec).job_id
        end = time.monotonic() + _LONGEST_SECONDS
        progress = job_progress(services, job_id)
        while progress.job.state in LIVE and time.monotonic() < end:
            time.sleep(0.1)  # seldom: what asks also takes time
            progress = job_progress(services, job_id, since=progress)
        cpu = load.cpu_seconds() - before
    if progress.job.state != "completed":
        raise SystemExit(f"The job is {progress.job.state}: {progress.job.reason}")
    trained = [round_ for round_ in progress.rounds if round_.kind == "train"]
    times = [round_.created_at for round_ in trained] + [progress.job.finished_at or trained[-1].created_at]
    intervals = [(after - before).total_seconds() for before, after in itertools.pairwise(times[1:])]
    return Run(
        progress=progress,
        intervals=tuple(intervals),
        cpu_seconds_per_round=cpu / len(trained),
        coordinator_peak_rss_mb=load.coordinator_peak_rss / 1e6,
        total_peak_rss_mb=load.total_peak_rss / 1e6,
        num_processes=len(load.processes),
    )


def _load(services: Services) -> Load:
    found = status(services.settings.signing_key_file.parent)
    processes: list[psutil.Process] = []
    for state in found.processes:
        process = psutil.Process(state.pid)
        processes += [process, *process.children(recursive=True)]
    coordinator = next(state.pid for state in found.processes if state.name == "coordinator")
    return Load(coordinator=coordinator, processes=processes)
