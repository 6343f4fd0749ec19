"""Services that behave badly, and a line that breaks: what clients must be able to live with."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Answer = Callable[[BaseHTTPRequestHandler, Any], None]  # of a request and its JSON body


@contextmanager
def odd_service(answers: Mapping[str, Answer]) -> Iterator[str]:
    """Run a service that answers each JSON-RPC method, or path, as it is told; yield its URL."""
    ending = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = json.loads(body) if self.path == "/jsonrpc" else {}
            self._answer(request.get("method", self.path), request)

        def do_GET(self) -> None:
            self._answer(self.path.partition("?")[0], {})

        def _answer(self, key: str, request: Any) -> None:
            if key not in answers:
                error = {"code": -32601, "message": "Method not found"}
                return say_json({"jsonrpc": "2.0", "id": request.get("id"), "error": error})(self, request)
            return answers[key](self, request)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        ended = ending

        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing: the client left."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            ending.set()
            server.shutdown()
            thread.join()


def say(data: bytes, *, kind: str = "application/json", status: int = 200, headers: Mapping[str, str] = {}) -> Answer:
    """Answer with these bytes."""

    def answer(handler: BaseHTTPRequestHandler, request: Any) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(data)

    return answer


def say_json(document: Any) -> Answer:
    """Answer with this document."""
    return say(json.dumps(document).encode())


def result(value: Any) -> Answer:
    """Answer a request with this result."""

    def answer(handler: BaseHTTPRequestHandler, request: Any) -> None:
        say_json({"jsonrpc": "2.0", "id": request.get("id"), "result": value})(handler, request)

    return answer


def hang(handler: BaseHTTPRequestHandler, request: Any) -> None:
    """Answer nothing until the test is over."""
    handler.server.ended.wait(60)  # type: ignore[attr-defined]  # of our own server
    handler.close_connection = True


def trickle(handler: BaseHTTPRequestHandler, request: Any) -> None:
    """Answer one byte at a time, without end."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 20))
    handler.end_headers()
    with contextlib.suppress(ConnectionError):
        while not handler.server.ended.wait(0.05):  # type: ignore[attr-defined]  # of our own server
            handler.wfile.write(b" ")


def trickle_head(handler: BaseHTTPRequestHandler, request: Any) -> None:
    """Begin an answer, the head of which has no end."""
    with contextlib.suppress(ConnectionError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Endless: ")
        while not handler.server.ended.wait(0.05):  # type: ignore[attr-defined]  # of our own server
            handler.wfile.write(b"a")


class CuttingLine:
    """A line to a service that breaks after some bytes of each answer, as often as it is told."""

    def __init__(self, port: int, cuts: list[int]) -> None:
        self.cuts = cuts  # bytes of an answer after which the line breaks, one for each of the next connections
        self.connections = 0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            limit = self.cuts.pop(0) if self.cuts else None
            threading.Thread(target=self._join, args=(near, limit), daemon=True).start()

    def _join(self, near: socket.socket, limit: int | None) -> None:
        try:
            opened = socket.create_connection(("127.0.0.1", self._port))
        except OSError:  # the service is gone, and so is the line
            near.close()
            return
        with near, opened as far:
            up = threading.Thread(target=self._forward, args=(near, far), daemon=True)
            up.start()
            _pump(far, near, limit)
            for each in (near, far):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            up.join(5)

    def _forward(self, near: socket.socket, far: socket.socket) -> None:
        _pump(near, far, None)


class HoldingLine(CuttingLine):
    """A line that stops after some bytes of requests until it is released."""

    def __init__(self, port: int, hold_after: int) -> None:
        super().__init__(port, [])
        self.held = threading.Event()  # it has stopped
        self.release = threading.Event()
        self._left = hold_after  # bytes

    def __exit__(self, *error: object) -> None:
        self.release.set()
        super().__exit__(*error)

    def _forward(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(65536):
                self._left -= len(data)
                if self._left < 0:
                    self.held.set()
                    self.release.wait(60)
                far.sendall(data)
            far.shutdown(socket.SHUT_WR)


def _pump(source: socket.socket, target: socket.socket, limit: int | None) -> None:
    with contextlib.suppress(OSError):
        while limit is None or limit > 0:
            data = source.recv(65536 if limit is None else min(65536, limit))
            if not data:
                return
            target.sendall(data)
            limit = None if limit is None else limit - len(data)
