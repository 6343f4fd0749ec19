"""Choose loopback ports that are free."""

import errno
import socket

from common.errors import PortInUse

LOOPBACK = "127.0.0.1"


def choose_port(wanted: int | None, *, option: str, else_last: int | None = None) -> int:
    """Return the wanted port, or the last one if it is still free, or any free one; raise PortInUse."""
    if wanted is not None:
        if not _is_free(wanted):
            raise PortInUse(f"Port {wanted} is in use or not allowed; free it or choose another one with {option}.")
        return wanted
    if else_last is not None and _is_free(else_last):
        return else_last
    with socket.socket() as any_free:
        any_free.bind((LOOPBACK, 0))
        return int(any_free.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, to pass over closed connections
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return False
            raise
    return True
