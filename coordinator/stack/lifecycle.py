"""Bring a stack up, take it down, tell how it is."""

import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.broker import connect, hide_password
from common.errors import BrokerUnavailable, Conflict, NotFound, Unavailable
from common.settings import Settings
from coordinator.stack.configuration import configure
from coordinator.stack.folder import Stack, StackFolder
from coordinator.stack.leftovers import end_leftovers, find_leftovers
from coordinator.stack.ports import LOOPBACK
from coordinator.stack.readiness import Readiness, missing_sites
from coordinator.stack.supervision import ProcessState, Supervisor
from coordinator.stack.valkey import broker_url
from coordinator.stack.wishes import Wishes, plan_stack
from store.blobs import check_disk, disk_errors

logger = logging.getLogger(__name__)

_READY_SECONDS = 90.0
_STOP_SECONDS = 60.0
_GRACE_SECONDS = 5.0  # for processes whose supervisor is gone


@dataclass(frozen=True, kw_only=True)
class StackStatus:
    """How a stack is."""

    folder: Path
    is_running: bool  # its supervisor answers
    processes: tuple[ProcessState, ...]
    sites_missing: tuple[str, ...]  # without a heartbeat; all, if the broker does not answer
    broker: str  # its URL without the password
    settings_file: Path  # the coordinator's
    http: str | None  # the URL of the model store's service
    flower: str | None  # its URL
    leftovers: int  # processes that run although the supervisor does not

    @property
    def is_well(self) -> bool:
        """Return whether everything runs."""
        running = all(process.state == "RUNNING" for process in self.processes)
        return self.is_running and running and not self.sites_missing


def up(path: Path, wishes: Wishes) -> StackStatus:
    """Start the stack of this folder, or a new one, and return when all of it answers.

    Raise Conflict if it runs already. If it cannot be started, everything that was started is stopped again.
    """
    folder = StackFolder(path)
    with disk_errors(folder.path), _made(folder), folder.lock():
        last = _last(folder)
        if last is not None:
            if Supervisor(folder, last).is_running():
                raise Conflict(f"The stack in {folder.path} is running already; `fedchord down` stops it.")
            end_leftovers(last, grace_seconds=_GRACE_SECONDS)
        check_disk(folder.path)
        stack = plan_stack(folder, last, wishes)
        settings = configure(folder, stack)
        try:
            _start(folder, stack, settings)
        except BaseException:
            with undisturbed():
                _stop(folder, stack)
            raise
    return status(path)


def down(path: Path) -> int:
    """Stop the stack, also what a crash has left of it; return how many processes that were. Its data stays."""
    folder = StackFolder(path)
    stack = folder.load()
    with folder.lock():
        return _stop(folder, stack)


def status(path: Path) -> StackStatus:
    """Return how the stack is; raise NotFound if there is none."""
    folder = StackFolder(path)
    stack = folder.load()
    supervisor = Supervisor(folder, stack)
    is_running = supervisor.is_running()
    missing: list[str] = list(stack.sites)
    if is_running:
        try:
            with closing(connect(Settings.load(folder.settings_file))) as client:
                missing = missing_sites(client, stack)
        except BrokerUnavailable as error:
            logger.warning("%s", error.message, extra={"action": "stack_status"})
    return StackStatus(
        folder=folder.path,
        is_running=is_running,
        processes=tuple(supervisor.processes()),
        sites_missing=tuple(missing),
        broker=hide_password(broker_url(stack)),
        settings_file=folder.settings_file,
        http=_url(stack.http_port),
        flower=_url(stack.flower_port),
        leftovers=0 if is_running else len(find_leftovers(stack)),
    )


def _url(port: int | None) -> str | None:
    return None if port is None else f"http://{LOOPBACK}:{port}"


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no Ctrl-C or SIGTERM interrupt the block: it stops what would otherwise go on for ever."""
    if threading.current_thread() is not threading.main_thread():  # signals do not come here
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _made(folder: StackFolder) -> Iterator[None]:
    """Make the folder if there is none, and take it away again if nothing comes of the stack."""
    is_new = not folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        yield
    finally:
        if is_new and not folder.record.exists():
            shutil.rmtree(folder.path, ignore_errors=True)  # what went wrong is told already


def _last(folder: StackFolder) -> Stack | None:
    try:
        return folder.load()
    except NotFound:
        return None


def _start(folder: StackFolder, stack: Stack, settings: Settings) -> None:
    """Start the broker, then everybody else at once, and return when all of them answer."""
    supervisor = Supervisor(folder, stack)
    readiness = Readiness(folder, stack, supervisor, deadline_seconds=_READY_SECONDS)
    supervisor.start()
    readiness.wait_for_broker(settings)
    supervisor.start_others()
    readiness.wait_for_everybody(settings)


def _stop(folder: StackFolder, stack: Stack) -> int:
    """Stop everything in order; return how many processes there were. Raise Unavailable if some cannot be stopped."""
    started = time.monotonic()
    supervisor = Supervisor(folder, stack)
    count = sum(process.pid > 0 for process in supervisor.processes())
    supervisor.stop(deadline_seconds=_STOP_SECONDS)
    count += end_leftovers(stack, grace_seconds=_GRACE_SECONDS)
    if left := find_leftovers(stack):
        pids = ", ".join(str(process.pid) for process in left)
        raise Unavailable(f"Processes {pids} of the stack do not end; end them by hand.")
    stack.supervisor_socket.unlink(missing_ok=True)
    if stack.supervisor_socket.parent != folder.path:
        shutil.rmtree(stack.supervisor_socket.parent, ignore_errors=True)
    logger.info("Stopped %s processes in %.1f s.", count, time.monotonic() - started, extra={"action": "stop_stack"})
    return count
