"""Keep verified copies of blobs in a local folder of limited size.

Files are named by digest. Any number of processes may share the folder: files appear whole and are never written again.
"""

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import BinaryIO

from store.blobs import Blob, disk_errors, move_file

_SCAN_PART = 10  # the folder is looked through after a tenth of its limit was added


class BlobCache:
    """Keep the most recently used blobs."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self._limit_bytes = limit_bytes
        self._added_bytes = limit_bytes  # since the last scan; the first blob causes one
        self._lock = threading.Lock()

    def open(self, blob: Blob) -> BinaryIO | None:
        """Open the blob's file and count that as a use; None when it is not there."""
        path = self.folder / blob.digest
        with disk_errors(self.folder):
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError:
                return None
            if os.fstat(file.fileno()).st_size != blob.size:  # cut short by a power cut
                file.close()
                self.remove(blob.digest)
                return None
            _touch(path)
            return file

    def add(self, path: Path, blob: Blob) -> None:
        """Take over the verified file; blobs that were not used for longest may leave, never this one."""
        with disk_errors(self.folder):
            _touch(path)
            move_file(path, self.folder / blob.digest, by_way_of=self.folder)
            with self._lock:
                self._added_bytes += blob.size
                if self._added_bytes * _SCAN_PART < self._limit_bytes:
                    return
                self._added_bytes = 0
            self._evict(blob.digest)

    def remove(self, digest: str) -> None:
        """Forget the blob."""
        with disk_errors(self.folder):
            (self.folder / digest).unlink(missing_ok=True)

    def _evict(self, keep: str) -> None:
        found = []
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process evicts
                continue
            found.append((entry.name != keep, status.st_mtime_ns, entry.name, status.st_size))
        total = sum(size for *_, size in found)
        for evictable, _, name, size in sorted(found):
            if evictable and total > self._limit_bytes:
                (self.folder / name).unlink(missing_ok=True)
                total -= size


def _touch(path: Path) -> None:
    """Note that the file is used now, more exactly than the file system's own clock ticks."""
    now = time.time_ns()
    with contextlib.suppress(FileNotFoundError):  # another process evicts it
        os.utime(path, ns=(now, now))
