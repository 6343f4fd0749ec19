"""Wait until a stack works: its broker, its coordinator and every site answer."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

from common.broker import connect, make_coordinator_app
from common.errors import BrokerUnavailable, Unavailable
from common.heartbeats import read_heartbeats
from common.settings import Settings
from coordinator.stack.folder import Stack, StackFolder
from coordinator.stack.ports import LOOPBACK
from coordinator.stack.supervision import Supervisor

_POLL_SECONDS = 0.05
_PING_SECONDS = 0.2
_TAIL_LINES = 8


def wait_until_ready(
    folder: StackFolder, stack: Stack, settings: Settings, supervisor: Supervisor, *, deadline_seconds: float
) -> None:
    """Return when everything answers; raise Unavailable with the reason when a process gives up or time runs out."""
    since = time.time()  # a heartbeat from before tells nothing; it outlives its site by seconds
    deadline = time.monotonic() + deadline_seconds
    checks: list[tuple[str, Callable[[], bool]]] = [
        ("the broker does not answer", lambda: _has_broker(settings)),
        ("a site does not answer", lambda: not missing_sites(settings, stack, since=since)),
        ("the coordinator does not answer", lambda: _has_coordinator(settings)),
        ("Flower does not answer", lambda: stack.flower_port is None or _listens(stack.flower_port)),
    ]
    for trouble, holds in checks:
        while not holds():
            _check_processes(folder, supervisor)
            if time.monotonic() > deadline:
                raise Unavailable(f"After {deadline_seconds:g} s {trouble}.{_newest_words(folder)}")
            time.sleep(_POLL_SECONDS)


def missing_sites(settings: Settings, stack: Stack, *, since: float = 0.0) -> list[str]:
    """Return the stack's sites that have not shown a sign of life since the time; raise BrokerUnavailable."""
    broker = connect(settings)
    try:
        alive = read_heartbeats(broker, stack.sites)
    finally:
        broker.close()
    return [site for site in stack.sites if site not in alive or alive[site].at < since]


def tail(log: Path) -> str:
    """Return the last lines of a log, empty if there is none."""
    try:
        lines = log.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join([line for line in lines if line.strip()][-_TAIL_LINES:])


def _check_processes(folder: StackFolder, supervisor: Supervisor) -> None:
    """Raise Unavailable with the log's last words when a process will not be tried again."""
    processes = supervisor.processes()
    if not processes:
        raise Unavailable(f"The stack's supervisor has ended; its log is {folder.log('supervisord')}.")
    if given_up := next((process for process in processes if process.state == "FATAL"), None):
        log = folder.log(given_up.name)
        raise Unavailable(f"{given_up.name} does not start; its log is {log}:\n{tail(log)}")


def _newest_words(folder: StackFolder) -> str:
    logs = sorted(folder.logs.glob("*.log"), key=lambda log: log.stat().st_mtime)
    return f" The newest log is {logs[-1]}:\n{tail(logs[-1])}" if logs else ""


def _has_broker(settings: Settings) -> bool:
    try:
        connect(settings).close()
    except BrokerUnavailable:
        return False
    return True


def _has_coordinator(settings: Settings) -> bool:
    app = make_coordinator_app(settings)
    return bool(app.control.ping([f"coordinator@{socket.gethostname()}"], timeout=_PING_SECONDS, limit=1))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0
