"""Read and write single blobs by the references of a store; a site needs no more.

References come from the coordinator, which a site does not have to trust: `file://` leads nowhere but into the shared
folder, redirects are not followed, and what arrives is what was promised, or an error.
"""

import errno
import logging
import os
import random
import re
import secrets
import time
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from common.errors import InvalidInput, NotFound, StoreUnavailable
from store.blobs import (
    BLOCK_BYTES,
    Blob,
    copy_hashed,
    disk_errors,
    hash_file,
    hash_open,
    new_hasher,
    open_plain,
    write_all,
)

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_SECONDS = 10.0
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP}  # then copy
_SECRET = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")  # what makes a file reference hard to guess
_S3_CODE = re.compile(rb"<Code>(\w{1,60})</Code>")
_PASSING = {408, 409, 416, 425, 429, 500, 502, 503, 504}  # answers that may be another one next time


class Transfer:
    """Fetch and upload blobs; any number of threads may share one."""

    def __init__(
        self,
        *,
        shared_folder: Path | None,  # the only folder that `file://` references may lead into
        timeout_seconds: float,  # without a single byte moving
        attempts: int = 5,  # in a row without progress
        pause_seconds: float = 0.2,  # before the second attempt, at most; doubled for each further one
    ) -> None:
        self._shared_folder = shared_folder.resolve() if shared_folder else None
        self._attempts = attempts
        self._pause_seconds = pause_seconds
        self._pool = urllib3.PoolManager(
            maxsize=8,
            timeout=urllib3.Timeout(connect=timeout_seconds, read=timeout_seconds),
            retries=False,
            blocksize=BLOCK_BYTES,
        )

    def fetch(self, url: str, blob: Blob, folder: Path) -> Path:
        """Return a verified read-only file of the blob in the folder, named by its digest.

        A file that is there already is verified and used. On the store's own disk nothing is copied: the file is the
        blob's own, under one more name. Raise NotFound, StoreUnavailable (also when the bytes are not the blob's),
        DiskFull, or InvalidInput for a reference that is not allowed.
        """
        source = self._local_path(url)
        path = folder / blob.digest
        temporary = folder / f".{blob.digest}.{secrets.token_hex(8)}.part"
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists() and hash_file(path) == blob:
                return path
            try:
                if source is None:
                    with temporary.open("xb", buffering=0) as file:
                        self._repeat(url, _Download(self._pool, url, file, blob))
                    temporary.chmod(0o444)
                elif _link_or_copy(source, temporary) != blob:
                    raise StoreUnavailable(
                        f"What {_public(url)} leads to is not blob {blob.digest}; ask for a new reference."
                    )
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def upload(self, path: Path, url: str) -> None:
        """Write the file where the reference leads; the file must not change any more.

        What is written there already is left as it is and counts as done: it is the upload of an earlier attempt, or of
        an earlier delivery of the same task, and the gate verifies it in any case. On the store's own disk nothing is
        copied: the file becomes read-only and shares its bytes with the store.
        """
        target = self._local_path(url)
        if target is None:
            with disk_errors(path), path.open("rb", buffering=0) as file:
                self._repeat(url, _Upload(self._pool, url, file))
        else:
            _place(path, target)

    def close(self) -> None:
        """Close all connections."""
        self._pool.clear()

    def __enter__(self) -> Self:
        """Return the transfer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self.close()

    def _local_path(self, url: str) -> Path | None:
        """Return the path of a `file://` reference, None for http; raise InvalidInput for what is not allowed."""
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise InvalidInput(f"The reference is no URL ({error}); ask the coordinator for another one.") from error
        if parts.scheme in ("http", "https") and parts.hostname:
            return None
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or "\0" in unquote(parts.path):
            raise InvalidInput(
                f"References to {parts.scheme}://{parts.netloc} are not followed; use http, https or file."
            )
        path = Path(unquote(parts.path))
        path = path.parent.resolve() / path.name  # a link in the last name is never followed, so it stays
        if self._shared_folder is None or path.name == ".." or not path.is_relative_to(self._shared_folder):
            raise InvalidInput(f"{_public(url)} is not in the shared folder; correct the setting of the shared folder.")
        return path

    def _repeat(self, url: str, attempt: "_Attempt") -> None:
        """Make the attempt until it succeeds, or has failed so many times in a row without progress."""
        failures = 0
        while True:
            before = attempt.progress
            try:
                return attempt.run()
            except (HTTPError, _PassingError) as error:
                failures = 1 if attempt.progress - before >= BLOCK_BYTES else failures + 1
                if failures >= self._attempts:
                    raise StoreUnavailable(
                        f"The transfer with {_public(url)} failed {failures} times in a row ({error}); check the "
                        "network, and that the object store runs."
                    ) from error
                longest = min(_LONGEST_PAUSE_SECONDS, self._pause_seconds * 2 ** (failures - 1))
                logger.warning(
                    "Transfer with %s was cut (%s); it is repeated",
                    _public(url),
                    error,
                    extra={"action": "transfer_repeated"},
                )
                time.sleep(longest * random.uniform(0.5, 1))  # noqa: S311  # spreads the load, hides nothing


class _PassingError(Exception):
    """The attempt failed, and another one may not."""


class _Attempt(Protocol):
    progress: int  # bytes that need not be moved again

    def run(self) -> None:
        """Make one attempt; raise HTTPError or _PassingError when another one may succeed."""


class _Download:
    """Download to an open file, each attempt from where the one before it was cut."""

    def __init__(self, pool: urllib3.PoolManager, url: str, file: BinaryIO, blob: Blob) -> None:
        self._pool = pool
        self._url = url
        self._file = file
        self._blob = blob
        self._restart()

    def run(self) -> None:
        """Download what is missing and verify the whole."""
        headers = {"Range": f"bytes={self.progress}-"} if self.progress else {}
        response = self._pool.request("GET", self._url, headers=headers, redirect=False, preload_content=False)
        try:
            if response.status == HTTPStatus.OK:
                self._restart()
            elif response.status != HTTPStatus.PARTIAL_CONTENT:
                if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    self._restart()
                raise _refusal(self._url, response)
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {self.progress}-"):
                self._restart()
                raise _PassingError("another range came than was asked for")
            for block in response.stream(BLOCK_BYTES, decode_content=False):
                self._add(block)
        finally:
            response.close()
        self._verify()

    def _restart(self) -> None:
        self.progress = 0
        self._hasher = new_hasher()
        self._file.seek(0)
        self._file.truncate()

    def _add(self, block: bytes) -> None:
        if self.progress + len(block) > self._blob.size:
            self._restart()
            raise _PassingError(f"more came than the {self._blob.size} bytes of blob {self._blob.digest}")
        write_all(self._file, block)
        self._hasher.update(block)
        self.progress += len(block)

    def _verify(self) -> None:
        if self.progress < self._blob.size:
            raise _PassingError(f"only {self.progress} of {self._blob.size} bytes came")
        if self._hasher.hexdigest() != self._blob.digest:
            self._restart()
            raise _PassingError(f"what came has not the digest {self._blob.digest}")


class _Upload:
    """Upload an open file, each attempt from its beginning."""

    progress = 0

    def __init__(self, pool: urllib3.PoolManager, url: str, file: BinaryIO) -> None:
        self._pool = pool
        self._url = url
        self._file = file

    def run(self) -> None:
        """Upload the file unless something is there."""
        self._file.seek(0)
        headers = {
            "Content-Length": str(os.fstat(self._file.fileno()).st_size),
            "Content-Type": "application/octet-stream",
            "If-None-Match": "*",  # some stores ignore it, so the gate verifies what it reads
        }
        response = self._pool.request(
            "PUT", self._url, body=self._file, headers=headers, redirect=False, preload_content=False
        )
        try:
            if response.status == HTTPStatus.PRECONDITION_FAILED:
                _log_there(self._url)
            elif not 200 <= response.status < 300:
                raise _refusal(self._url, response)
            response.drain_conn()
        finally:
            response.close()


def _refusal(url: str, response: urllib3.BaseHTTPResponse) -> Exception:
    """Return the error for an answer that is not the wanted one."""
    code = _S3_CODE.search(response.read(4096))
    answer = f"{response.status} {code.group(1).decode() if code else response.reason or ''}".strip()
    if response.status in _PASSING:
        return _PassingError(f"the answer was {answer}")
    if response.status == HTTPStatus.NOT_FOUND:
        return NotFound(f"There is nothing at {_public(url)} ({answer}); ask the coordinator for a new reference.")
    if response.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return StoreUnavailable(
            f"The object store refused the reference to {_public(url)} ({answer}): it has expired, or clocks differ; "
            "ask the coordinator for a new one."
        )
    return StoreUnavailable(f"The object store answered {answer} at {_public(url)}; look into its log.")


def _link_or_copy(source: Path, target: Path) -> Blob:
    """Make the target a file with the bytes of the source; return the blob that it is."""
    try:
        os.link(source, target, follow_symlinks=False)
        file, copied = open_plain(target), False
    except FileNotFoundError as error:
        raise _ended(source) from error
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        file, copied = open_plain(source), True
    with file:
        if not copied:
            return hash_open(file)
        with target.open("xb", buffering=0) as copy:
            return copy_hashed(file, copy)


def _place(path: Path, target: Path) -> None:
    """Make the target a new file with the bytes of the path, in one step; leave what is there."""
    with disk_errors(target.parent):
        if not target.parent.is_dir():
            raise _ended(target)
        path.chmod(0o444)
        try:
            os.link(path.resolve(), target)
            return
        except FileExistsError:
            _log_there(target.as_uri())
            return
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
        own = target.parent / f".{secrets.token_hex(8)}.part"
        try:
            with path.open("rb", buffering=0) as source, own.open("xb", buffering=0) as copy:
                copy_hashed(source, copy)
            own.chmod(0o444)
            os.link(own, target)
        except FileExistsError:
            _log_there(target.as_uri())
        finally:
            own.unlink(missing_ok=True)


def _ended(path: Path) -> StoreUnavailable:
    return StoreUnavailable(
        f"The reference to {_public(path.as_uri())} leads nowhere: it has expired; ask the coordinator for a new one."
    )


def _log_there(url: str) -> None:
    logger.info("Something is written at %s already; it stays", _public(url), extra={"action": "upload_was_there"})


def _public(url: str) -> str:
    """Return the reference without what makes it a secret."""
    return _SECRET.sub("…", url.partition("?")[0])
