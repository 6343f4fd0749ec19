"""Serve the application over HTTP until SIGTERM or SIGINT, in this process."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common.errors import InvalidSettings, PortInUse
from common.settings import Settings
from store.service.access import is_loopback
from store.service.answers import JSON
from store.service.codes import INVALID_REQUEST, Failure
from store.service.rpc import encode_failure

logger = logging.getLogger(__name__)

_BACKLOG = 512  # connections that wait to be taken
_MAX_CONNECTIONS = 1000  # at once; more are told to come again
_KEEP_ALIVE_SECONDS = 30  # that an idle connection is kept
_END_SECONDS = 3  # that what is under way has got to end after SIGTERM


def serve(app: ASGIApp, settings: Settings, *, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is told the URL once requests are taken.

    Raise InvalidSettings when everybody, not only this machine, would be let in, PortInUse when the port is taken.
    """
    listener = listen(settings)
    with listener:
        config = uvicorn.Config(
            app,
            http=_protocol(settings.http_idle_seconds),
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,  # its lines go where ours go
            access_log=False,
            server_header=False,
            proxy_headers=False,  # who calls is who is connected
            backlog=_BACKLOG,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_END_SECONDS,
        )
        server = _Server(config, lambda: ready(_url(settings, listener)))
        server.run(sockets=[listener])
    logger.info("The model store's service has ended", extra={"action": "service_ended"})


def listen(settings: Settings) -> socket.socket:
    """Return the socket on which the service listens; raise InvalidSettings or PortInUse."""
    host, port = settings.http_host, settings.http_port
    if settings.http_access == "open" and not is_loopback(host):
        raise InvalidSettings(
            f"FEDCHORD_HTTP_HOST is {host}, which others reach, and access is open to all: set "
            "FEDCHORD_HTTP_ACCESS=keys, or FEDCHORD_HTTP_HOST=127.0.0.1."
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InvalidSettings(f"FEDCHORD_HTTP_HOST {host!r} is no address of this machine: {error}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: whoever takes no byte for so long is cut off
            milliseconds = int(settings.http_idle_seconds * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"Port {port} of {host} is taken; free it, or set FEDCHORD_HTTP_PORT (0 takes any free one)."
            ) from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InvalidSettings(f"Cannot listen at {host}, port {port} ({reason}); correct FEDCHORD_HTTP_….") from error
    return listener


def _url(settings: Settings, listener: socket.socket) -> str:
    """Return the address at which programs on this machine reach the service."""
    port = listener.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(settings.http_host, settings.http_host)  # noqa: S104  # compared with, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Tell when it is ready, and end by returning: uvicorn's own ends the process with the signal that it got."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def _protocol(idle_seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol, but for headers that do not come, for which it waits for ever, and how it refuses."""

    class Protocol(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
            super().connection_made(transport)
            self._expect_headers()

        def data_received(self, data: bytes) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self._expect_headers()
            super().data_received(data)

        def on_headers_complete(self) -> None:
            self._expect_nothing()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect_nothing()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            failure = Failure(code=INVALID_REQUEST, message="Invalid Request", data=f"This is not HTTP/1.1: {msg}")
            body = encode_failure(None, failure)
            head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
            self.transport.close()

        def _expect_headers(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(idle_seconds, self.transport.abort)

        def _expect_nothing(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Protocol
