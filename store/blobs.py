"""Name immutable bytes by their digest, and say what every place that keeps them can do.

`FolderStore` keeps blobs in a local folder, `S3Store` in any S3. Both hand out short-lived references, so that a site
reads and writes single blobs without a credential of the store.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from blake3 import blake3

from common.errors import DiskFull, FedChordError, InvalidInput, NotFound, StoreUnavailable

BLOCK_BYTES = 1 << 20  # what is read, hashed and written at a time: fits the processor's cache, hides the calls

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SLOT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_SLOT_CHARACTERS = 180  # flattened and quoted it is still a file name

_MINIMUM_FREE_BYTES = 32 << 20  # less, and the next model hardly fits
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, kw_only=True, slots=True)
class Blob:
    """Name some bytes; a Blob that exists is well formed, whoever sent it."""

    digest: str  # BLAKE3 of the bytes, 64 hexadecimal characters
    size: int  # bytes

    def __post_init__(self) -> None:
        """Raise InvalidInput unless digest and size can be those of some bytes."""
        check_digest(self.digest)
        if self.size < 0:
            raise InvalidInput(f"A blob of {self.size} bytes cannot be; give its size in bytes, 0 or more.")


class BlobStore(Protocol):
    """Keep blobs: whole, immutable, named by digest."""

    def prepare(self) -> None:
        """Make the place ready for use; it may be ready already."""

    def check(self) -> None:
        """Raise StoreUnavailable or DiskFull unless one can write now; cheap."""

    def scratch(self) -> Path:
        """Return a folder for new files that `put` takes over without a copy."""

    def put(self, path: Path, *, blob: Blob | None = None) -> Blob:
        """Take over the file, which is then gone; hash it unless `blob` says what the caller hashed while it wrote.

        Atomic. Bytes that are there already are not stored again.
        """

    def find(self, digest: str) -> Blob:
        """Return the stored blob of the digest; raise NotFound."""

    def open(self, blob: Blob) -> BinaryIO:
        """Open a local, verified, unbuffered file of the blob; raise NotFound when it is missing or damaged."""

    def stream(self, blob: Blob, start: int = 0) -> Iterator[bytes]:
        """Yield the blob's bytes from an offset, in blocks of BLOCK_BYTES, and keep nothing of what is far away.

        The first block raises NotFound when the blob is missing; what has to be fetched and turns out to be damaged
        raises NotFound before its last block, when it is read from its beginning. Close it when it is not read to its
        end.
        """

    def delete(self, digest: str, *, older_than_seconds: float = 0) -> bool:
        """Forget the blob, unless it was put, or put again, more lately; return whether it is forgotten now."""

    def blobs(self, *, older_than_seconds: float = 0) -> Iterator[Blob]:
        """Go through everything that was put, or put again, so long ago; in no order."""

    def read_url(self, blob: Blob, *, seconds: int) -> str:
        """Return a reference with which anyone can read the blob for so long; whether it is there is not checked."""

    def write_url(self, slot: str, *, seconds: int) -> str:
        """Return a reference with which anyone can write one new object at the slot for so long."""

    def accept(self, slot: str, blob: Blob) -> None:
        """Make what was written at the slot a blob, if it is the one that is expected; the slot is gone after.

        Idempotent: when the slot is gone and the blob is there, nothing happens. Raise UpdateRejected when nothing was
        written, or something else; the slot stays then, until `discard`.
        """

    def written(self, slot: str, *, max_bytes: int) -> Blob | None:
        """Return what `accept` would take from the slot now; None if nothing is there, or more than so many bytes."""

    def discard(self, slot: str) -> None:
        """Forget what may have been written at the slot."""

    def clean(self, *, older_than_seconds: float) -> int:
        """Remove expired references, and slots and temporary files that were left so long ago; return how many."""


def check_digest(digest: str) -> str:
    """Return the digest; raise InvalidInput unless it is 64 characters of lower-case hexadecimal."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidInput(
            f"Digest {digest[:80]!r} is not valid: use the 64 lower-case hexadecimal characters of a BLAKE3 hash."
        )
    return digest


def check_slot(slot: str) -> str:
    """Return the slot's name; raise InvalidInput unless it is safe as a key and as a path."""
    if len(slot) > _SLOT_CHARACTERS or not _SLOT.fullmatch(slot):
        raise InvalidInput(
            f"Slot {slot[:80]!r} is not valid: use up to {_SLOT_CHARACTERS} letters, digits, dots, hyphens and "
            "underscores, in parts that are joined by / and do not begin with a dot."
        )
    return slot


def new_hasher() -> blake3:
    """Return what digests are made with: BLAKE3, since hashing, not averaging, is what bounds a round.

    It is three to four times as fast as SHA-256 with the processor's own instructions, and `b3sum` checks a file.
    Source: O'Connor, Aumasson, Neves, Wilcox-O'Hearn, BLAKE3: one function, fast everywhere.
    """
    return blake3()


def hash_bytes(data: bytes) -> Blob:
    """Return the blob of some bytes."""
    hasher = new_hasher()
    hasher.update(data)
    return Blob(digest=hasher.hexdigest(), size=len(data))


def hash_file(path: Path) -> Blob:
    """Return the file's blob."""
    with path.open("rb", buffering=0) as file:
        return hash_open(file)


def hash_open(file: BinaryIO) -> Blob:
    """Return the blob of what is left to read of an open file."""
    hasher, size = new_hasher(), 0
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]  # typeshed: raw files have it, BinaryIO does not say
        hasher.update(buffer[:count])
        size += count
    return Blob(digest=hasher.hexdigest(), size=size)


def copy_hashed(source: BinaryIO, target: BinaryIO) -> Blob:
    """Copy what is left to read of one unbuffered file to another; return its blob."""
    hasher, size = new_hasher(), 0
    while block := source.read(BLOCK_BYTES):
        hasher.update(block)
        write_all(target, block)
        size += len(block)
    return Blob(digest=hasher.hexdigest(), size=size)


def read_blocks(file: BinaryIO, start: int) -> Iterator[bytes]:
    """Yield what an unbuffered file has from an offset, in blocks."""
    file.seek(start)
    while block := file.read(BLOCK_BYTES):
        yield block


def open_plain(path: Path) -> BinaryIO:
    """Open a file that somebody else put there; raise InvalidInput for a link, a pipe, a folder or a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise InvalidInput(f"{path.name} is not a plain file; write it again.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidInput(f"{path.name} is not a plain file; write it again.")
    return os.fdopen(descriptor, "rb", buffering=0)


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of the data to an unbuffered file, whose `write` may take only a part."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def check_disk(folder: Path) -> None:
    """Raise StoreUnavailable or DiskFull unless one can write into the folder now."""
    with disk_errors(folder):
        free_bytes = shutil.disk_usage(folder).free
        probe = folder / f"check-{secrets.token_hex(8)}"
        try:
            probe.write_bytes(b"1")
        finally:
            probe.unlink(missing_ok=True)
    if free_bytes < _MINIMUM_FREE_BYTES:
        raise DiskFull(f"The disk of {folder} has only {free_bytes >> 20} MiB left; free some space and try again.")


def check_size(path: Path, blob: Blob) -> Blob:
    """Return the blob that the caller hashed while writing the file; raise InvalidInput when its size differs."""
    if (size := path.stat().st_size) != blob.size:
        raise InvalidInput(f"{path} has {size} bytes, not {blob.size}; finish writing a file before you put it.")
    return blob


def move_file(path: Path, target: Path, *, by_way_of: Path) -> None:
    """Make the file read-only and rename it; from another disk it is copied to a folder beside the target first."""
    path.chmod(0o444)
    try:
        path.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        own = by_way_of / f".{secrets.token_hex(16)}"
        try:
            shutil.copyfile(path, own)
            own.chmod(0o444)
            own.replace(target)
        finally:
            own.unlink(missing_ok=True)
        path.unlink()


def damaged(blob: Blob, found: str) -> NotFound:
    """Return the error that says that the blob's stored bytes are not its own."""
    return NotFound(
        f"Blob {blob.digest} is damaged in the store: {found} where {blob.size} bytes of that digest should be. "
        "Delete the blob and store the same bytes again."
    )


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn what the operating system says about a folder's disk into DiskFull or StoreUnavailable."""
    try:
        yield
    except FedChordError:  # Unavailable is an OSError itself
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _FULL:
            raise DiskFull(f"The disk of {place} is full ({reason}); free some space and try again.") from error
        raise StoreUnavailable(
            f"Cannot use {error.filename or place} ({reason}); correct its permissions or its disk and try again."
        ) from error
