"""Follow a job until it ends."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live

from common.errors import BrokerUnavailable, JobFailed
from common.heartbeats import Heartbeat, read_heartbeats
from coordinator.cli.progress_view import draw, line
from coordinator.jobs import LIVE, JobState
from coordinator.progress import ENDED, JobProgress, job_progress
from coordinator.services import Services

_POLL_SECONDS = 0.2


def follow(services: Services, job_id: str, console: Console | None) -> JobProgress:
    """Show the job's progress until it ends, and return it; show nothing without a console."""
    if console is None:
        return _poll(services, job_id, lambda progress: None)
    if not console.is_terminal:
        return _poll(services, job_id, _LinePrinter(console))
    with Live(console=console, auto_refresh=False) as live:

        def show(progress: JobProgress) -> None:
            live.update(draw(progress, _heartbeats(services, progress)), refresh=True)

        return _poll(services, job_id, show)


def check_completed(progress: JobProgress) -> None:
    """Raise JobFailed unless the job has completed."""
    job = progress.job
    if job.state is not JobState.COMPLETED:
        raise JobFailed(f"Job {job.name} ({job.job_id}) {_ENDINGS[job.state]}: {job.reason or 'no reason is known'}")


_ENDINGS = {
    JobState.SUBMITTED: "has not started",
    JobState.RUNNING: "is still running",
    JobState.FAILED: "failed",
    JobState.ABORTED: "was aborted",
}


class _LinePrinter:
    """Print every round once, when it has ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed: set[str] = set()

    def __call__(self, progress: JobProgress) -> None:
        for round_ in progress.rounds:
            if round_.state in ENDED and round_.round_id not in self._printed:
                self._printed.add(round_.round_id)
                self._console.print(line(round_), soft_wrap=True, markup=False)


def _poll(services: Services, job_id: str, show: Callable[[JobProgress], None]) -> JobProgress:
    progress = None
    while True:
        asked = time.monotonic()
        progress = job_progress(services, job_id, since=progress)
        show(progress)
        if progress.job.state not in LIVE:
            return progress
        time.sleep(max(_POLL_SECONDS, 3 * (time.monotonic() - asked)))  # of many sites there is much to read


def _heartbeats(services: Services, progress: JobProgress) -> dict[str, Heartbeat]:
    """Return what the sites tell of themselves; nothing while the broker is away, for it may come back."""
    try:
        return read_heartbeats(services.broker, progress.job.spec.sites or progress.job.sites)
    except BrokerUnavailable:
        return {}
