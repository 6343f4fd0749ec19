"""Download and upload over HTTP, one attempt at a time: what an attempt has moved, the next one need not."""

import logging
import os
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import BinaryIO

import urllib3

from common.errors import NotFound, StoreUnavailable
from store.blobs import BLOCK_BYTES, Blob, new_hasher, write_all
from store.patience import PassingError, Patience, read_retry_after

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 18  # at most at a time; less as soon as less is there
_SEND_BYTES = 1 << 16  # at a time: what the time-out without a byte is measured by
_MAX_WRONG = 3  # so often other bytes may come than were promised: no waiting will mend them
_SECRET = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")  # what makes a file reference hard to guess
_S3_CODE = re.compile(rb"<Code>(\w{1,60})</Code>")
_PASSING = {408, 409, 416, 425, 429, 500, 502, 503, 504}  # answers that may be another one next time


class Download:
    """Download to an open file, each attempt from where the one before it was cut; what the file has is built on."""

    def __init__(self, pool: urllib3.PoolManager, url: str, file: BinaryIO, blob: Blob, patience: Patience) -> None:
        self._pool = pool
        self._url = url
        self._file = file
        self._blob = blob
        self._patience = patience
        self._wrong = 0  # how often other bytes came than were promised
        self._progress = 0  # bytes that need not be moved again
        self._hasher = new_hasher()
        self._take_up()
        patience.begin_at(self._progress)

    def run(self) -> None:
        """Download what is missing and verify the whole."""
        if 0 < self._progress == self._blob.size:
            return self._verify()
        headers = {"Range": f"bytes={self._progress}-"} if self._progress else {}
        response = self._pool.request("GET", self._url, headers=headers, redirect=False, preload_content=False)
        try:
            if response.status == HTTPStatus.OK:
                self._restart()
            elif response.status != HTTPStatus.PARTIAL_CONTENT:
                if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    self._restart()
                raise _refusal(self._url, response)
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {self._progress}-"):
                self._restart()
                raise PassingError("another range came than was asked for")
            while block := response.read1(_READ_BYTES, decode_content=False):
                self._add(block)
        finally:
            response.close()
        return self._verify()

    def _take_up(self) -> None:
        """Build on what the file has from an earlier time."""
        if os.fstat(self._file.fileno()).st_size > self._blob.size:
            return self._restart()
        self._file.seek(0)
        while block := self._file.read(BLOCK_BYTES):
            self._hasher.update(block)
            self._progress += len(block)
        return None

    def _restart(self) -> None:
        self._progress = 0
        self._hasher = new_hasher()
        self._file.seek(0)
        self._file.truncate()

    def _add(self, block: bytes) -> None:
        if self._progress + len(block) > self._blob.size:
            raise self._refuse(f"more came than the {self._blob.size} bytes of blob {self._blob.digest}")
        write_all(self._file, block)
        self._hasher.update(block)
        self._progress += len(block)
        self._patience.received(self._progress)

    def _verify(self) -> None:
        if self._progress < self._blob.size:
            raise PassingError(f"only {self._progress} of {self._blob.size} bytes came")
        if self._hasher.hexdigest() != self._blob.digest:
            raise self._refuse(f"what came has not the digest {self._blob.digest}")
        self._patience.answered()

    def _refuse(self, reason: str) -> Exception:
        """Begin anew and return the error for bytes that are not the blob's."""
        self._restart()
        self._wrong += 1
        if self._wrong < _MAX_WRONG:
            return PassingError(reason)
        return StoreUnavailable(
            f"{public(self._url)} gives other bytes than the coordinator promised, {self._wrong} times in a row: "
            f"{reason}. Have the object store, and what lies between, checked."
        )


class Upload:
    """Upload an open file, each attempt from its beginning."""

    def __init__(self, pool: urllib3.PoolManager, url: str, file: BinaryIO, patience: Patience) -> None:
        self._pool = pool
        self._url = url
        self._file = file
        self._patience = patience

    def run(self) -> None:
        """Upload the file unless something is there."""
        headers = {
            "Content-Length": str(os.fstat(self._file.fileno()).st_size),
            "Content-Type": "application/octet-stream",
            "If-None-Match": "*",  # some stores ignore it, so the gate verifies what it reads
        }
        response = self._pool.request(
            "PUT",
            self._url,
            body=_pieces(self._file, self._patience),
            headers=headers,
            redirect=False,
            preload_content=False,
        )
        try:
            if response.status == HTTPStatus.PRECONDITION_FAILED:
                log_there(self._url)
            elif not 200 <= response.status < 300:
                raise _refusal(self._url, response)
            self._patience.answered()
            response.drain_conn()
        finally:
            response.close()


def _pieces(file: BinaryIO, patience: Patience) -> Iterator[bytes]:
    """Yield the file from its beginning; what was yielded before has been sent."""
    file.seek(0)
    sent = 0
    while piece := file.read(_SEND_BYTES):
        yield piece
        sent += len(piece)
        patience.moved(sent)


def log_there(url: str) -> None:
    """Say that an upload was not needed."""
    logger.info("Something is written at %s already; it stays.", public(url), extra={"action": "upload_was_there"})


def public(url: str) -> str:
    """Return the reference without what makes it a secret."""
    return _SECRET.sub("…", url.partition("?")[0])


def _refusal(url: str, response: urllib3.BaseHTTPResponse) -> Exception:
    """Return the error for an answer that is not the wanted one."""
    code = _S3_CODE.search(response.read(4096))
    answer = f"{response.status} {code.group(1).decode() if code else response.reason or ''}".strip()
    if response.status in _PASSING:
        asked = read_retry_after(response.headers.get("Retry-After"))
        return PassingError(f"the answer was {answer}", retry_after_seconds=asked)
    if response.status == HTTPStatus.NOT_FOUND:
        return NotFound(f"There is nothing at {public(url)} ({answer}); ask the coordinator for a new reference.")
    if response.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return StoreUnavailable(
            f"The object store refused the reference to {public(url)} ({answer}): it has expired, or clocks differ; "
            "ask the coordinator for a new one."
        )
    return StoreUnavailable(f"The object store answered {answer} at {public(url)}; look into its log.")
