"""An object store over HTTP, in memory, that does what a bad line and a bad day do to one."""

import contextlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class HttpStore:
    """What is in it, what it was asked, and how it behaves."""

    url: str
    objects: dict[str, bytes] = field(default_factory=dict)  # by path
    asked: list[str] = field(default_factory=list)  # method, path and range
    away: bool = False  # connections are closed without an answer
    stall_after: int | None = None  # bytes of a body, up or down, after which nothing moves any more
    stalled: threading.Event = field(default_factory=threading.Event)  # something has stalled
    ending: threading.Event = field(default_factory=threading.Event)

    def reference(self, path: str) -> str:
        """Return the reference to an object."""
        return f"{self.url}/{path}"

    def stall(self) -> None:
        """Let whoever called wait until the store ends, or a minute."""
        self.stalled.set()
        self.ending.wait(60)


@contextmanager
def http_store() -> Iterator[HttpStore]:
    """Run the store."""
    store = HttpStore(url="")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_GET(self) -> None:
            if (path := self._begin()) is None:
                return
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            begin, data = int(wanted.group(1)) if wanted else 0, store.objects[path]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data) - begin))
            if wanted:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            self.wfile.write(data[begin : store.stall_after])
            if store.stall_after is not None:
                store.stall()
                self.close_connection = True

        def do_PUT(self) -> None:
            if (path := self._begin()) is None:
                return
            length = int(self.headers["Content-Length"])
            if store.stall_after is not None:
                self.rfile.read(min(length, store.stall_after))
                store.stall()
                self.close_connection = True
                return
            data = self.rfile.read(length)
            if len(data) < length:
                return
            there = path in store.objects
            store.objects.setdefault(path, data)
            self.send_response(412 if there and self.headers.get("If-None-Match") == "*" else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _begin(self) -> str | None:
            path = self.path.removeprefix("/")
            store.asked.append(f"{self.command} {path} {self.headers.get('Range', 'all')}")
            if not store.away:
                return path
            self.close_connection = True
            return None

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing: the client left."""

    with Server(("127.0.0.1", 0), Handler) as server:
        store.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield store
        finally:
            store.ending.set()
            with contextlib.suppress(OSError):
                server.shutdown()
            thread.join()
