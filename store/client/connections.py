"""Connections on which the head of a reply has to be whole in time; urllib3 only bounds the time between two bytes."""

import socket
import threading
from contextlib import suppress
from http.client import HTTPException
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class PromptConnection(HTTPConnection):
    """A connection that is shut down when the head of a reply takes longer than the timeout for reading."""

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]  # as in urllib3
        """Return the reply; raise TimeoutError when its head is not there in time."""
        is_late = threading.Event()
        timer: threading.Timer | None = None
        if (seconds := self.timeout) is not None and (sock := self.sock) is not None:

            def end() -> None:
                is_late.set()
                with suppress(OSError):  # it has ended by itself
                    sock.shutdown(socket.SHUT_RDWR)

            timer = threading.Timer(seconds, end)
            timer.daemon = True
            timer.start()
        try:
            response = super().getresponse()
        except (OSError, HTTPException):
            if is_late.is_set():
                raise TimeoutError("the head of the reply took too long") from None
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if is_late.is_set():  # http.client takes headers that were cut for whole ones
            response.close()
            raise TimeoutError("the head of the reply took too long")
        return response


class PromptTlsConnection(PromptConnection, HTTPSConnection):
    """The same over TLS."""


class HttpPool(HTTPConnectionPool):
    """Such connections to one host."""

    ConnectionCls = PromptConnection


class HttpsPool(HTTPSConnectionPool):
    """Such connections to one host over TLS."""

    ConnectionCls = PromptTlsConnection


def prompt_pool(**arguments: Any) -> urllib3.PoolManager:
    """Return a pool of such connections, with the arguments of urllib3's own."""
    pool = urllib3.PoolManager(**arguments)
    pool.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}
    return pool
