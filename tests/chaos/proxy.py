"""A TCP proxy on the loopback address that does to a service's connections what networks do, changed while it runs.

with Proxy(port) as proxy:
    proxy.refuse()      connections end with a reset, those that are there and those that come
    proxy.hang()        connections are taken, and nothing moves
    proxy.answer_503()  HTTP requests are read and answered with 503
    proxy.degrade(bytes_per_second=…, cut_after_bytes=…)
    proxy.restore()     all is well again
"""

import random
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from enum import Enum, auto
from types import TracebackType
from typing import Self

_BLOCK_BYTES = 64 * 1024
_LOOK_SECONDS = 0.05  # how soon a connection notices that the mode has changed
_HEAD_BYTES = 64 * 1024
_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Mode(Enum):
    """What becomes of connections."""

    PASS = auto()
    REFUSE = auto()
    HANG = auto()
    UNAVAILABLE = auto()


class Proxy:
    """Stand before a service on a loopback port; as a context it runs until the end."""

    def __init__(self, target_port: int, *, seed: int = 0) -> None:
        self._target = ("127.0.0.1", target_port)
        self._chance = random.Random(seed)
        self._mode = Mode.PASS
        self._bytes_per_second: float | None = None  # of all connections together, each way
        self._cut_after_bytes: int | None = None  # of a connection, either way, on average
        self._budget_at = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self.cuts = 0  # connections that were ended by force
        self.bytes = 0  # that were moved
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.settimeout(_LOOK_SECONDS)
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Self:
        """Begin to listen."""
        self._start(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every connection."""
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def restore(self) -> None:
        """Let everything pass."""
        self._bytes_per_second = self._cut_after_bytes = None
        self._mode = Mode.PASS

    def refuse(self) -> None:
        """Reset every connection."""
        self._mode = Mode.REFUSE

    def hang(self) -> None:
        """Move nothing."""
        self._mode = Mode.HANG

    def answer_503(self) -> None:
        """Answer every request by itself."""
        self._mode = Mode.UNAVAILABLE

    def degrade(self, *, bytes_per_second: float | None = None, cut_after_bytes: int | None = None) -> None:
        """Let things pass, but slowly, and cut each connection after about so many bytes."""
        self._bytes_per_second, self._cut_after_bytes = bytes_per_second, cut_after_bytes
        self._mode = Mode.PASS

    def _start(self, run: "object", *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads = [each for each in self._threads if each.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client:
            if self._mode is Mode.REFUSE:
                self._reset(client)
                return
            try:
                with socket.create_connection(self._target, timeout=5) as server:
                    self._pump(client, server)
            except OSError:  # the service itself is away, or one of the two has left
                self._reset(client)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        cut_after = self._cut_after_bytes and self._cut_after_bytes * self._chance.uniform(0.5, 1.5)
        moved = 0
        for each in (client, server):
            each.settimeout(30)
        peers = {client: server, server: client}
        while not self._closed.is_set():
            if self._mode is Mode.HANG:
                time.sleep(_LOOK_SECONDS)
                continue
            if self._mode is Mode.REFUSE:
                self._reset(client)
                return
            readable, _, _ = select.select(list(peers), [], [], _LOOK_SECONDS)
            if self._mode is Mode.UNAVAILABLE:
                if client in readable:
                    _answer_unavailable(client)
                    return
                continue
            for source in readable:
                if not (block := source.recv(_BLOCK_BYTES)):
                    return
                self._pace(len(block))
                peers[source].sendall(block)
                moved += len(block)
                self.bytes += len(block)
                if cut_after and moved >= cut_after:
                    self.cuts += 1
                    self._reset(client)
                    return

    def _pace(self, count: int) -> None:
        """Wait until so many bytes may be moved."""
        if (rate := self._bytes_per_second) is None:
            return
        with self._lock:
            self._budget_at = max(self._budget_at, time.monotonic()) + count / rate
            until = self._budget_at
        self._closed.wait(max(0.0, until - time.monotonic()))

    def _reset(self, client: socket.socket) -> None:
        """Close with a reset, as a broken network does, not in peace."""
        with suppress(OSError):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()


def _answer_unavailable(client: socket.socket) -> None:
    """Read one request with its body, and answer it."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _HEAD_BYTES:
        if not (block := client.recv(_BLOCK_BYTES)):
            return
        head += block
    head, _, body = head.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    left = int(lengths[0]) - len(body) if lengths else 0
    while left > 0 and (block := client.recv(_BLOCK_BYTES)):
        left -= len(block)
    client.sendall(_UNAVAILABLE)
