"""Keep blobs in a local folder.

    blobs/ab/<digest>           a blob, mode 0444
    grants/<expires>-<token>    a reference: to read, a hard link to a blob; to write, a link to a slot's folder
    bodies/<token>/body         what was written at a slot; it can be created once
    slots/<slot>                a link to the slot's folder, which only we can find
    scratch/                    files that are not finished

References are `file://` URLs. Their secret is the token: other users can enter `grants` and `bodies`, not list them.
A reference ends when `clean` removes it. Data is not flushed to the disk: a crash of ours loses nothing; after a power
cut a blob of the last seconds may be short, which `open` notices by its size.
"""

import errno
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import NotFound, UpdateRejected
from store.blobs import (
    Blob,
    check_digest,
    check_disk,
    check_slot,
    copy_hashed,
    damaged,
    disk_errors,
    hash_file,
    hash_open,
)

logger = logging.getLogger(__name__)

BODY = "body"  # the one file that may be written in a slot's folder

_LISTED_BY_US = 0o711
_PRIVATE = 0o700
_WRITTEN_BY_ALL = 0o1733  # others may create but neither list nor remove what is not theirs
_OPEN_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # neither led away nor held up by a pipe


class FolderStore:
    """Keep blobs in a folder of the local disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._blobs = self.folder / "blobs"
        self._grants = self.folder / "grants"
        self._bodies = self.folder / "bodies"
        self._slots = self.folder / "slots"
        self._scratch = self.folder / "scratch"

    def prepare(self) -> None:
        """Create the folders."""
        with disk_errors(self.folder):
            for folder, mode in (
                (self._blobs, _PRIVATE),
                (self._grants, _LISTED_BY_US),
                (self._bodies, _LISTED_BY_US),
                (self._slots, _PRIVATE),
                (self._scratch, _PRIVATE),
            ):
                folder.mkdir(parents=True, exist_ok=True)
                folder.chmod(mode)
            for first in range(256):
                (self._blobs / f"{first:02x}").mkdir(exist_ok=True)

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

    def delete(self, digest: str) -> bool:
        """Forget the blob; references to read it that are out keep its bytes until they end."""
        with disk_errors(self.folder):
            try:
                self._path(check_digest(digest)).unlink()
            except FileNotFoundError:
                return False
        logger.info("Blob %s was deleted", digest, extra={"action": "blob_deleted"})
        return True

    def blobs(self) -> Iterator[Blob]:
        """Go through everything stored."""
        with disk_errors(self.folder):
            for folder in os.scandir(self._blobs):
                for entry in os.scandir(folder.path):
                    yield Blob(digest=entry.name, size=entry.stat().st_size)

    def read_url(self, blob: Blob, *, seconds: int) -> str:
        """Return a `file://` URL of a new hard link to the blob; here it must be there."""
        grant = self._grants / _grant_name(seconds)
        with disk_errors(self.folder):
            try:
                os.link(self._path(blob.digest), grant)
            except FileNotFoundError:
                raise _missing(blob.digest) from None
        return grant.as_uri()

    def write_url(self, slot: str, *, seconds: int) -> str:
        """Return a `file://` URL in the slot's folder; all references to one slot lead to the same folder."""
        link = self._slot(slot)
        grant = self._grants / _grant_name(seconds)
        with disk_errors(self.folder):
            body = self._bodies / secrets.token_hex(16)
            try:
                link.symlink_to(body)
            except FileExistsError:
                body = link.readlink()
            body.mkdir(exist_ok=True)
            body.chmod(_WRITTEN_BY_ALL)
            grant.symlink_to(body)
        return (grant / BODY).as_uri()

    def accept(self, slot: str, blob: Blob) -> None:
        """Verify what was written at the slot and rename it to the blob.

        What another user wrote is copied, because its owner could still change it.
        """
        body = self._slot(slot) / BODY
        with disk_errors(self.folder):
            try:
                file = os.fdopen(os.open(body, _OPEN_PLAIN), "rb", buffering=0)
            except FileNotFoundError:
                if not self._has(blob):
                    raise UpdateRejected(
                        f"Nothing was written at {slot}; upload the update before announcing it."
                    ) from None
                self.discard(slot)
                return
            with file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UpdateRejected(f"What was written at {slot} is not a plain file; upload the update again.")
                if status.st_size != blob.size:
                    raise UpdateRejected(
                        f"What was written at {slot} has {status.st_size} bytes, but {blob.size} were announced."
                    )
                if status.st_uid == os.geteuid():
                    source, found = body, hash_open(file)
                else:
                    source = self._scratch / secrets.token_hex(16)
                    with source.open("wb", buffering=0) as copy:
                        found = copy_hashed(file, copy)
            if found != blob:
                raise UpdateRejected(
                    f"What was written at {slot} has the digest {found.digest}, but {blob.digest} was announced."
                )
            try:
                self._adopt(source, blob)
            except FileNotFoundError:  # another coordinator accepted it meanwhile
                if not self._has(blob):
                    raise
            self.discard(slot)
        logger.debug("Slot %s became blob %s", slot, blob.digest, extra={"action": "slot_accepted"})

    def discard(self, slot: str) -> None:
        """Remove the slot's folder and the way to it."""
        link = self._slot(slot)
        with disk_errors(self.folder):
            try:
                _remove_folder(link.readlink())
                link.unlink()
            except FileNotFoundError:
                return  # nothing was ever granted, or somebody else was quicker

    def clean(self, *, older_than_seconds: float) -> int:
        """Remove expired references, slots that no reference leads to any more, and temporary files."""
        now = time.time()
        before = now - older_than_seconds
        removed = 0
        with disk_errors(self.folder):
            granted = set()
            for entry in os.scandir(self._grants):
                if float(entry.name.partition("-")[0]) <= now:
                    Path(entry.path).unlink(missing_ok=True)
                    removed += 1
                elif entry.is_symlink():
                    granted.add(str(Path(entry.path).readlink()))
            for entry in os.scandir(self._bodies):
                if entry.path not in granted and _left_before(entry, before):
                    _remove_folder(Path(entry.path))
                    removed += 1
            for entry in os.scandir(self._slots):
                if not os.path.exists(entry.path) and _left_before(entry, before):  # noqa: PTH110  # a hot loop
                    Path(entry.path).unlink(missing_ok=True)
            for entry in os.scandir(self._scratch):
                if _left_before(entry, before):
                    shutil.rmtree(entry.path) if entry.is_dir() else Path(entry.path).unlink(missing_ok=True)
                    removed += 1
        if removed:
            logger.info("Removed %d leftovers from %s", removed, self.folder, extra={"action": "store_cleaned"})
        return removed

    def _path(self, digest: str) -> Path:
        return self._blobs / digest[:2] / digest

    def _slot(self, slot: str) -> Path:
        return self._slots / check_slot(slot).replace("/", "%")

    def _has(self, blob: Blob) -> bool:
        try:
            return self._path(blob.digest).stat().st_size == blob.size
        except FileNotFoundError:
            return False

    def _adopt(self, path: Path, blob: Blob) -> None:
        """Rename the file to the blob, unless the blob is there and whole."""
        if self._has(blob):
            path.unlink(missing_ok=True)
            return
        move_file(path, self._path(blob.digest), by_way_of=self._scratch)


def _missing(digest: str) -> NotFound:
    return NotFound(f"There is no blob {digest} in the store; it was deleted, or never put there.")


def _grant_name(seconds: int) -> str:
    return f"{int(time.time()) + seconds}-{secrets.token_hex(16)}"


def _left_before(entry: os.DirEntry[str], before: float) -> bool:
    try:
        return entry.stat(follow_symlinks=False).st_mtime <= before
    except FileNotFoundError:  # somebody else cleans
        return False


def _remove_folder(folder: Path) -> None:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        shutil.rmtree(folder, ignore_errors=True)  # what a late writer adds now is cleaned next time
