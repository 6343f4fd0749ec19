"""Find and end the processes of a stack whose supervisor is gone; nobody else's are touched.

Every process of a stack inherits a variable with the stack's own random id. Unlike a recorded pid, that also finds what
the supervisor restarted since, and the children that train, and cannot be mistaken for somebody else's process.
"""

import logging
import time
from collections.abc import Callable, Sequence

import psutil

from coordinator.stack.folder import Stack
from coordinator.stack.programs import MARK
from coordinator.stack.supervision import is_alive

logger = logging.getLogger(__name__)

_BROKER_COMMAND = "valkey-server"
_KILL_SECONDS = 5.0
_POLL_SECONDS = 0.05


def find_leftovers(stack: Stack) -> list[psutil.Process]:
    """Return every running process of the stack, the supervisor included."""
    return [process for process in psutil.process_iter() if _belongs(process, stack)]


def end_leftovers(stack: Stack, *, grace_seconds: float) -> int:
    """End every process of the stack, the broker last; return how many there were."""
    found = find_leftovers(stack)
    supervisors = [process for process in found if "supervisor.supervisord" in _command(process)]
    brokers = [process for process in found if _BROKER_COMMAND in " ".join(_command(process)[:1])]
    others = [process for process in found if process not in supervisors and process not in brokers]
    _end(supervisors, grace_seconds=0)  # it would start the others again
    _end(others, grace_seconds=grace_seconds)
    _end(brokers, grace_seconds=grace_seconds)
    if late := find_leftovers(stack):  # born while their parents ended
        _end(late, grace_seconds=0)
    if found:
        logger.warning("Ended %s left-over processes of the stack.", len(found), extra={"action": "end_leftovers"})
    return len(found)


def _end(processes: Sequence[psutil.Process], *, grace_seconds: float) -> None:
    """Ask the processes to end, and kill those that have not after so many seconds."""
    if grace_seconds > 0:
        for process in processes:
            _signal(process.terminate)
        _wait(processes, grace_seconds)
    for process in processes:
        if is_alive(process.pid):
            _signal(process.kill)
    _wait(processes, _KILL_SECONDS)


def _wait(processes: Sequence[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(is_alive(process.pid) for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _belongs(process: psutil.Process, stack: Stack) -> bool:
    try:
        return is_alive(process.pid) and process.environ().get(MARK) == stack.stack_id
    except (psutil.Error, OSError):  # gone, or another user's
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except (psutil.Error, OSError):
        return []


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return
