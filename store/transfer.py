"""Read and write single blobs by the references of a store; a site needs no more.

References come from the coordinator, which a site does not have to trust: `file://` leads nowhere but into the shared
folder, redirects are not followed, and what arrives is what was promised, or an error.
"""

import errno
import os
import secrets
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

import urllib3

from common.errors import InvalidInput, StoreUnavailable
from store.attempts import Download, Upload, log_there, public
from store.blobs import (
    BLOCK_BYTES,
    Blob,
    copy_hashed,
    disk_errors,
    hash_file,
    hash_open,
    open_plain,
)
from store.file_locks import open_alone
from store.patience import Outages, Patience, Watch, repeat

_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP}  # then copy


def _watch_nothing(_: int) -> None:
    """Take no notice."""


class Transfer:
    """Fetch and upload blobs; any number of threads may share one."""

    def __init__(
        self,
        *,
        shared_folder: Path | None,  # the only folder that `file://` references may lead into
        timeout_seconds: float,  # without a single byte moving
        patience_seconds: float = 10.0,  # without progress, over any number of attempts
        pause_seconds: float = 0.2,  # before the second attempt, at most; doubled for each further one
    ) -> None:
        self._shared_folder = shared_folder.resolve() if shared_folder else None
        self._patience_seconds = patience_seconds
        self._pause_seconds = pause_seconds
        self._outages = Outages()
        self._pool = urllib3.PoolManager(
            maxsize=8,
            timeout=urllib3.Timeout(connect=timeout_seconds, read=timeout_seconds),
            retries=False,
            blocksize=BLOCK_BYTES,
        )

    def fetch(
        self, url: str, blob: Blob, folder: Path, *, name: str | None = None, watch: Watch = _watch_nothing
    ) -> Path:
        """Return a verified read-only file of the blob in the folder; its name is the digest unless another is given.

        A file that is there already is verified and used. A download that is cut for good leaves what came as
        `.<name>.part`, and the next one, of this process or another, goes on from there. On the store's own disk
        nothing is copied: the file is the blob's own, under one more name. Raise NotFound, StoreUnavailable (also when
        the bytes are not the blob's), DiskFull, InvalidInput for a reference that is not allowed, or what the watch
        raises.
        """
        source = self._local_path(url)
        path = folder / (name or blob.digest)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists() and hash_file(path) == blob:
                return path
            if source is None:
                self._download(url, blob, path, watch)
            else:
                temporary = _temporary(path)
                try:
                    if _link_or_copy(source, temporary) != blob:
                        raise StoreUnavailable(
                            f"What {public(url)} leads to is not blob {blob.digest}; ask for a new reference."
                        )
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
        return path

    def upload(self, path: Path, url: str, *, watch: Watch = _watch_nothing) -> None:
        """Write the file where the reference leads; the file must not change any more.

        What is written there already is left as it is and counts as done: it is the upload of an earlier attempt, or of
        an earlier delivery of the same task, and the gate verifies it in any case. On the store's own disk nothing is
        copied: the file becomes read-only and shares its bytes with the store.
        """
        target = self._local_path(url)
        if target is None:
            with disk_errors(path), path.open("rb", buffering=0) as file:
                patience = self._patience(url, watch)
                repeat(Upload(self._pool, url, file, patience), patience, public(url))
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
            raise InvalidInput(f"{public(url)} is not in the shared folder; correct the setting of the shared folder.")
        return path

    def _download(self, url: str, blob: Blob, path: Path, watch: Watch) -> None:
        """Make the path a file with the blob's bytes, and leave what has come if that ends before it is whole."""
        begun = path.with_name(f".{path.name}.part")
        file = open_alone(begun)
        if file is None:  # another process is at it, and we do not wait for it
            begun = _temporary(path)
            file = FileIO(begun, "x+b")
        with file:
            patience = self._patience(url, watch)
            try:
                repeat(Download(self._pool, url, file, blob, patience), patience, public(url))
                begun.replace(path)
                path.chmod(0o444)
            except BaseException:
                if os.fstat(file.fileno()).st_size == 0:
                    begun.unlink(missing_ok=True)
                raise

    def _patience(self, url: str, watch: Watch) -> Patience:
        return Patience(
            self._patience_seconds,
            pause_seconds=self._pause_seconds,
            host=urlsplit(url).netloc.rpartition("@")[2],
            outages=self._outages,
            watch=watch,
        )


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


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
            log_there(target.as_uri())
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
            log_there(target.as_uri())
        finally:
            own.unlink(missing_ok=True)


def _ended(path: Path) -> StoreUnavailable:
    return StoreUnavailable(
        f"The reference to {public(path.as_uri())} leads nowhere: it has expired; ask the coordinator for a new one."
    )
