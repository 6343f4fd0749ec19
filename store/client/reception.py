"""Receive a model's bytes from a service: after a cut, go on where it was, and check the digest at the end."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from http import HTTPStatus
from types import TracebackType
from typing import Self

import urllib3
from urllib3.exceptions import HTTPError, IncompleteRead

from common.errors import Unavailable
from store.blobs import BLOCK_BYTES, new_hasher
from store.client.remote import FIRST_ATTEMPTS, Remote, is_timeout

_ETAG = re.compile(r'"([0-9a-f]{64})"')


class Reception(Iterator[bytes]):
    """The blocks of a model that a service sends; the last one is held back until the digest has proved right.

    The first connection is made at once, so that what the service refuses is raised here, and not at the first block.
    `close` it when it is not read to its end.
    """

    size: int  # bytes
    digest: str  # BLAKE3 of them all, as the service says

    def __init__(self, remote: Remote, model_store_ddc: str, model_id: str, digest: str | None = None) -> None:
        """Ask for the model, or for the one of its blobs that has the digest; raise NotFound, Unavailable, …."""
        self._remote = remote
        self._params = {"model_store_ddc": model_store_ddc, "model_id": model_id, "digest": digest}
        self._connection = ExitStack()
        self._received = 0  # bytes
        self._failures = 0  # in a row
        self._hasher = new_hasher()
        self._response = self._open_first()
        self._blocks = self._checked()

    def __next__(self) -> bytes:
        """Return the next block; raise Unavailable when the service cannot give it, or gave other bytes."""
        return next(self._blocks)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        """Return the reception."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the connection."""
        self.close()

    def __del__(self) -> None:
        """End the connection of a reception that nobody reads any more."""
        if hasattr(self, "_connection"):
            self._connection.close()

    def _open_first(self) -> urllib3.BaseHTTPResponse:
        while True:
            try:
                response = self._connect({})
                break
            except HTTPError as error:
                self._count(error, progress=0)
        etag = _ETAG.fullmatch(response.headers.get("ETag", ""))
        length = response.headers.get("Content-Length", "")
        if response.status != HTTPStatus.OK or etag is None or not length.isascii() or not length.isdigit():
            self.close()
            raise Unavailable(f"{self._remote.url} sends a model without its size and digest; check the URL.")
        self.size, self.digest = int(length), etag[1]
        return response

    def _connect(self, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        self._connection.close()
        return self._connection.enter_context(self._remote.download(self._params, headers))

    def _checked(self) -> Iterator[bytes]:
        held = b""
        try:
            for block in self._received_blocks():
                self._hasher.update(block)
                if held:
                    yield held
                held = block
        finally:
            self.close()
        if self._hasher.hexdigest() != self.digest:
            raise Unavailable(
                f"What {self._remote.url} sent is not the model of digest {self.digest}; it is damaged there, "
                "or on the way. Load it again."
            )
        if held:
            yield held

    def _received_blocks(self) -> Iterator[bytes]:
        while True:
            before = self._received
            try:
                while self._received < self.size:
                    block = self._response.read1(BLOCK_BYTES)
                    if not block:
                        raise IncompleteRead(self._received, self.size - self._received)
                    self._received += len(block)
                    if self._received > self.size:
                        raise Unavailable(f"{self._remote.url} sends more than it said; check the URL.")
                    yield block
                return
            except HTTPError as error:
                self._count(error, progress=self._received - before)
            self._go_on()

    def _go_on(self) -> None:
        """Connect again, and be where the connection was cut."""
        headers = {"Range": f"bytes={self._received}-", "If-Range": f'"{self.digest}"'} if self._received else {}
        while True:
            try:
                response = self._connect(headers)
                break
            except HTTPError as error:
                self._count(error, progress=0)
        start = f"bytes {self._received}-{self.size - 1}/{self.size}"
        is_same = response.headers.get("ETag") == f'"{self.digest}"'
        is_rest = response.headers.get("Content-Range") == start if headers else response.status == HTTPStatus.OK
        if not is_same or not is_rest:
            self.close()
            raise Unavailable(f"{self._remote.url} does not go on with the same model after a cut; load it again.")
        self._response = response

    def _count(self, error: HTTPError, *, progress: int) -> None:
        """Wait for the next attempt; raise Unavailable after too many in a row, or when nothing came for too long."""
        self._connection.close()
        self._failures = 1 if progress else self._failures + 1
        limit = self._remote.attempts if self._received else min(self._remote.attempts, FIRST_ATTEMPTS)
        if self._failures >= limit or (is_timeout(error) and not progress):
            raise self._remote.unavailable(error) from error
        self._remote.pause(self._failures, error)
