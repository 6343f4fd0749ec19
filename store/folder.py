"""Keep blobs in a local folder.

    blobs/<digest>              a blob, mode 0444
    grants/<expires>-<token>    a reference to read: a hard link to a blob, which `clean` removes when it has expired
    bodies/<token>              what was written at a slot; it can be created once
    scratch/                    files that are not finished
    key                         what a slot's token is derived with, so that none has to be kept

References are `file://` URLs. Their secret is the token: other users can enter `grants` and `bodies`, not list them.
A reference to write does not expire by itself: what comes too late is never accepted, and cleaned. No reference costs
an inode, which is what a file system is slow to create. Data is not flushed to the disk: a crash of ours loses nothing;
after a power cut a blob of the last seconds may be short, which `open` notices by its size.
"""

import contextlib
import hmac
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from common.errors import InvalidInput, NotFound, UpdateRejected
from store.blobs import (
    Blob,
    check_digest,
    check_disk,
    check_size,
    check_slot,
    copy_hashed,
    damaged,
    disk_errors,
    hash_file,
    hash_open,
    move_file,
    open_plain,
    read_blocks,
)

logger = logging.getLogger(__name__)

_LISTED_BY_US = 0o711
_PRIVATE = 0o700
_WRITTEN_BY_ALL = 0o1733  # others may create but neither list nor remove what is not theirs


class FolderStore:
    """Keep blobs in a folder of the local disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._blobs = self.folder / "blobs"
        self._grants = self.folder / "grants"
        self._bodies = self.folder / "bodies"
        self._scratch = self.folder / "scratch"

    def prepare(self) -> None:
        """Create the folders."""
        with disk_errors(self.folder):
            for folder, mode in (
                (self._blobs, _PRIVATE),
                (self._grants, _LISTED_BY_US),
                (self._bodies, _WRITTEN_BY_ALL),
                (self._scratch, _PRIVATE),
            ):
                folder.mkdir(parents=True, exist_ok=True)
                folder.chmod(mode)
            if not (self.folder / "key").exists():
                self._create_key()

    def check(self) -> None:
        """Raise StoreUnavailable or DiskFull unless one can write now."""
        check_disk(self._scratch)

    def scratch(self) -> Path:
        """Return a folder on the blobs' own disk."""
        return self._scratch

    def put(self, path: Path, *, blob: Blob | None = None) -> Blob:
        """Take over the file by renaming it, or by a copy when it is on another disk."""
        with disk_errors(self.folder):
            blob = hash_file(path) if blob is None else check_size(path, blob)
            self._adopt(path, blob)
        return blob

    def find(self, digest: str) -> Blob:
        """Return the stored blob of the digest."""
        with disk_errors(self.folder):
            try:
                return Blob(digest=check_digest(digest), size=self._path(digest).stat().st_size)
            except FileNotFoundError:
                raise _missing(digest) from None

    def open(self, blob: Blob) -> BinaryIO:
        """Open the blob's own file; its bytes were verified when it was stored, now only its size is."""
        with disk_errors(self.folder):
            try:
                file = self._path(blob.digest).open("rb", buffering=0)
            except FileNotFoundError:
                raise _missing(blob.digest) from None
            size = os.fstat(file.fileno()).st_size
            if size != blob.size:
                file.close()
                raise damaged(blob, f"{size} bytes")
            return file

    def stream(self, blob: Blob, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of the blob's own file."""
        with self.open(blob) as file, disk_errors(self.folder):
            yield from read_blocks(file, start)

    def delete(self, digest: str, *, older_than_seconds: float = 0) -> bool:
        """Forget the blob; references to read it that are out keep its bytes until they end."""
        path = self._path(check_digest(digest))
        with disk_errors(self.folder):
            try:
                if older_than_seconds <= 0:
                    path.unlink()
                elif not self._unlink_old(path, time.time() - older_than_seconds):
                    return False
            except FileNotFoundError:
                return False
        logger.info("Blob %s was deleted", digest, extra={"action": "blob_deleted"})
        return True

    def blobs(self, *, older_than_seconds: float = 0) -> Iterator[Blob]:
        """Go through everything that was put so long ago."""
        before = time.time() - older_than_seconds
        with disk_errors(self.folder):
            for entry in os.scandir(self._blobs):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # deleted meanwhile
                    continue
                if status.st_mtime <= before:
                    yield Blob(digest=entry.name, size=status.st_size)

    def read_url(self, blob: Blob, *, seconds: int) -> str:
        """Return a `file://` URL of a new hard link to the blob; here it must be there."""
        grant = self._grants / _grant_name(seconds)
        with disk_errors(self.folder):
            try:
                os.link(self._path(blob.digest), grant)
            except FileNotFoundError:
                raise _missing(blob.digest) from None
        return grant.as_uri()

    def write_url(self, slot: str, *, seconds: int) -> str:  # see above
        """Return a `file://` URL of the file that makes the slot's body; it is the same one each time."""
        return self._body(slot).as_uri()

    def accept(self, slot: str, blob: Blob) -> None:
        """Verify what was written at the slot and rename it to the blob.

        What another user wrote is copied, because its owner could still change it.
        """
        body = self._body(slot)
        with disk_errors(self.folder):
            try:
                file = open_plain(body)
            except InvalidInput as error:
                raise UpdateRejected(f"What was written at {slot} is not a plain file; upload it again.") from error
            except FileNotFoundError:
                if not self._has(blob):
                    raise UpdateRejected(
                        f"Nothing was written at {slot}; upload the update before announcing it."
                    ) from None
                return
            with file:
                status = os.fstat(file.fileno())
                if status.st_size != blob.size:
                    raise UpdateRejected(
                        f"What was written at {slot} has {status.st_size} bytes, but {blob.size} were announced."
                    )
                if status.st_uid == os.geteuid():
                    source, found = body, hash_open(file)
                else:
                    source = self._scratch / secrets.token_hex(16)
                    with source.open("xb", buffering=0) as copy:
                        found = copy_hashed(file, copy)
            if found != blob:
                if source is not body:
                    source.unlink()
                raise UpdateRejected(
                    f"What was written at {slot} has the digest {found.digest}, but {blob.digest} was announced."
                )
            try:
                self._adopt(source, blob)
            except FileNotFoundError:  # another coordinator accepted it meanwhile
                if not self._has(blob):
                    raise
            body.unlink(missing_ok=True)
        logger.debug("Slot %s became blob %s", slot, blob.digest, extra={"action": "slot_accepted"})

    def written(self, slot: str, *, max_bytes: int) -> Blob | None:
        """Hash the slot's body."""
        with disk_errors(self.folder):
            try:
                with open_plain(self._body(slot)) as file:
                    return hash_open(file) if os.fstat(file.fileno()).st_size <= max_bytes else None
            except (InvalidInput, FileNotFoundError):  # InvalidInput: not a plain file
                return None

    def discard(self, slot: str) -> None:
        """Remove the slot's body."""
        with disk_errors(self.folder):
            _remove(self._body(slot))

    def clean(self, *, older_than_seconds: float) -> int:
        """Remove expired references to read, bodies that nobody accepted, and temporary files."""
        now = time.time()
        before = now - older_than_seconds
        with disk_errors(self.folder):
            left = [entry.path for entry in os.scandir(self._grants) if int(entry.name.partition("-")[0]) <= now]
            for folder in (self._bodies, self._scratch):
                left += [entry.path for entry in os.scandir(folder) if _left_before(entry, before)]
            for path in left:
                _remove(Path(path))
        if left:
            logger.info("Removed %d leftovers from %s", len(left), self.folder, extra={"action": "store_cleaned"})
        return len(left)

    def _path(self, digest: str) -> Path:
        return self._blobs / digest

    def _body(self, slot: str) -> Path:
        token = hmac.digest(self._key, check_slot(slot).encode(), "sha256").hex()[:32]
        return self._bodies / token

    @cached_property
    def _key(self) -> bytes:
        with disk_errors(self.folder):
            return (self.folder / "key").read_bytes()

    def _create_key(self) -> None:
        own = self._scratch / secrets.token_hex(16)
        own.touch(0o600)
        own.write_bytes(secrets.token_bytes(32))
        with contextlib.suppress(FileExistsError):  # another process was quicker
            os.link(own, self.folder / "key")
        own.unlink()

    def _has(self, blob: Blob) -> bool:
        try:
            return self._path(blob.digest).stat().st_size == blob.size
        except FileNotFoundError:
            return False

    def _unlink_old(self, path: Path, before: float) -> bool:
        """Remove the blob's file unless it was put again since then.

        Whoever puts it again at this moment touches this very file, before it is set aside, or else makes a new one.
        """
        if path.stat().st_mtime > before:
            return False
        aside = self._scratch / secrets.token_hex(16)
        path.rename(aside)
        is_old = aside.stat().st_mtime <= before
        if not is_old:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return is_old

    def _adopt(self, path: Path, blob: Blob) -> None:
        """Rename the file to the blob, unless the blob is there and whole; either way it counts as put now."""
        target = self._path(blob.digest)
        if self._has(blob):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                os.utime(target)
                path.unlink(missing_ok=True)
                return
        os.utime(path)  # a site may have given it any time
        move_file(path, target, by_way_of=self._scratch)


def _missing(digest: str) -> NotFound:
    return NotFound(f"There is no blob {digest} in the store; it was deleted, or never put there.")


def _grant_name(seconds: int) -> str:
    return f"{int(time.time()) + seconds}-{secrets.token_hex(16)}"


def _remove(path: Path) -> None:
    """Remove what is there, even if another user made it a folder."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(path, ignore_errors=True)


def _left_before(entry: os.DirEntry[str], before: float) -> bool:
    """Return whether the file is where it is since before then; its content may be older."""
    try:
        return entry.stat(follow_symlinks=False).st_ctime <= before
    except FileNotFoundError:  # somebody else cleans
        return False
