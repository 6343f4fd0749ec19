"""Start, ask and stop the supervisord of a stack, through its XML-RPC on a unix socket."""

import http.client
import logging
import socket
import subprocess
import sys
import time
import xmlrpc.client
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common.errors import Unavailable
from coordinator.stack.folder import Stack, StackFolder
from coordinator.stack.programs import supervisor_environment

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class ProcessState:
    """How one of the stack's processes is."""

    name: str
    state: str  # supervisord's word: STARTING, RUNNING, BACKOFF, STOPPING, STOPPED, EXITED, FATAL
    pid: int  # 0 if it does not run
    seconds: int  # since its start; 0 if it does not run
    has_ended: bool  # at least once since the supervisor's start, even if it was started again


class Supervisor:
    """The supervisord of one stack, running or not."""

    def __init__(self, folder: StackFolder, stack: Stack) -> None:
        self._folder = folder
        self._stack = stack
        self._server = xmlrpc.client.ServerProxy(
            "http://localhost", transport=_SocketTransport(stack.supervisor_socket)
        )

    def start(self) -> None:
        """Start it and, with it, the broker; raise Unavailable when it does not start."""
        started = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(self._folder.supervisor_file)],
            capture_output=True,
            text=True,
            check=False,
            env=supervisor_environment(self._stack),
        )
        if started.returncode != 0:
            said = (started.stderr or started.stdout).strip().splitlines()
            raise Unavailable(f"The stack's supervisor does not start: {said[-1] if said else 'it says nothing'}")

    def start_others(self) -> None:
        """Start every process that does not run yet, all at once."""
        self._call("startAllProcesses", False)

    def is_running(self) -> bool:
        """Return whether it answers."""
        return self._call("getState") is not None

    def processes(self) -> list[ProcessState]:
        """Return the state of every process; none if the supervisor does not run."""
        return [
            ProcessState(
                name=str(found["name"]),
                state=str(found["statename"]),
                pid=int(found["pid"]),
                seconds=int(found["now"] - found["start"]) if found["pid"] else 0,
                has_ended=found["stop"] > 0,
            )
            for found in self._call("getAllProcessInfo") or []
        ]

    def stop(self, *, deadline_seconds: float) -> bool:
        """Stop every process in order, then the supervisor; return whether it ended in time."""
        pid = self._call("getPID")
        if pid is None:
            return True
        deadline = time.monotonic() + deadline_seconds
        self._call("shutdown")
        while is_alive(pid):
            if time.monotonic() > deadline:
                return False
            self._call("getState")  # wakes it, or it would look at its processes once a second only
            time.sleep(_POLL_SECONDS)
        return True

    def _call(self, method: str, *arguments: object) -> Any:
        """Return the answer; None when there is nobody to answer, or nothing more to tell."""
        try:
            return getattr(self._server.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException) as error:
            logger.debug("No answer to %s: %r.", method, error, extra={"action": "call_supervisor"})
            return None
        except xmlrpc.client.Fault as fault:
            if fault.faultCode == _SHUTTING_DOWN:
                return None
            raise Unavailable(f"The stack's supervisor refuses {method}: {fault.faultString}.") from fault
        finally:
            self._server("close")()


_SHUTTING_DOWN = 6  # supervisor.xmlrpc.Faults.SHUTDOWN_STATE


def is_alive(pid: int) -> bool:
    """Return whether the process runs: a zombie does not, and stays where nobody collects it, as in a container."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _SocketTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        """Return a new connection: a kept one would hide that the supervisor has ended."""
        connection = _SocketConnection(self._path)
        self._connection = host, connection  # where `close` looks for it
        return connection
