"""Wait until a stack works: its broker, its coordinator, its HTTP service, every site and Flower answer."""

import socket
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

from celery import Celery
from redis import Redis

from common.broker import connect, make_coordinator_app
from common.errors import BrokerUnavailable, Unavailable
from common.heartbeats import read_heartbeats
from common.settings import Settings
from coordinator.stack.folder import Stack, StackFolder
from coordinator.stack.ports import LOOPBACK
from coordinator.stack.programs import BROKER, FLOWER, HTTP, coordinator_names
from coordinator.stack.supervision import Supervisor

_POLL_SECONDS = 0.1
_PING_SECONDS = 0.2
_TAIL_LINES = 8


class Readiness:
    """Wait for the processes of a stack, as they are started; made before the first of them is."""

    def __init__(self, folder: StackFolder, stack: Stack, supervisor: Supervisor, *, deadline_seconds: float) -> None:
        self._folder = folder
        self._stack = stack
        self._supervisor = supervisor
        self._since = time.time()  # a heartbeat from before tells nothing; it outlives its site by seconds
        self._deadline = time.monotonic() + deadline_seconds
        self._log_sizes = {log: log.stat().st_size for log in folder.logs.glob("*.log")}

    def wait_for_broker(self, settings: Settings) -> None:
        """Return when the broker answers; raise Unavailable when it has ended or the deadline has passed."""

        def missing() -> str | None:
            try:
                connect(settings).close()
            except BrokerUnavailable:
                return BROKER
            return None

        self._wait(missing)

    def wait_for_everybody(self, settings: Settings) -> None:
        """Return when everybody answers; raise Unavailable when one has ended or the deadline has passed."""
        with closing(connect(settings)) as broker:
            self._wait(lambda: next(iter(missing_sites(broker, self._stack, since=self._since)), None))
        with make_coordinator_app(settings) as app:
            for name in coordinator_names(self._stack):
                self._wait(partial(_mute, app, name))
        for name, port in ((HTTP, self._stack.http_port), (FLOWER, self._stack.flower_port)):
            if port is not None:
                self._wait(partial(_silent, name, port))

    def _wait(self, missing: Callable[[], str | None]) -> None:
        """Ask until no process is missing."""
        while (name := missing()) is not None:
            if time.monotonic() > self._deadline:
                raise Unavailable(f"{name} does not answer in time; {self._last_words(name)}")
            self._check_processes()
            time.sleep(_POLL_SECONDS)

    def _check_processes(self) -> None:
        processes = self._supervisor.processes()
        if not processes:
            raise Unavailable(f"The stack's supervisor has ended; {self._last_words('supervisord')}")
        if ended := next((process for process in processes if process.has_ended), None):
            raise Unavailable(f"{ended.name} does not start; {self._last_words(ended.name)}")

    def _last_words(self, name: str) -> str:
        log = self._folder.log(name)
        words = _tail(log, skip=self._log_sizes.get(log, 0))
        return f"the end of {log}:\n{words}" if words else f"its log {log} is empty."


def missing_sites(broker: Redis, stack: Stack, *, since: float = 0.0) -> list[str]:
    """Return the stack's sites that have not shown a sign of life since the time; raise BrokerUnavailable."""
    alive = read_heartbeats(broker, stack.sites)
    return [site for site in stack.sites if site not in alive or alive[site].at < since]


def _tail(log: Path, *, skip: int) -> str:
    """Return the last lines of what is in the log after the bytes to skip."""
    try:
        data = log.read_bytes()
    except FileNotFoundError:
        return ""
    new = data[skip:] if len(data) >= skip else data  # shorter: it was rotated
    lines = [line for line in new.decode("utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-_TAIL_LINES:])


def _mute(app: Celery, name: str) -> str | None:
    """Return the name of the coordinator's worker as long as it does not answer."""
    node = f"{name}@{socket.gethostname()}"
    return None if app.control.ping([node], timeout=_PING_SECONDS, limit=1) else name


def _silent(name: str, port: int) -> str | None:
    """Return the name of the process as long as nobody listens at its port."""
    return None if _listens(port) else name


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0
