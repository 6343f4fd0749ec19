"""One process of a site at a time has a part in hand, however many copies of its message there are."""

import contextlib
import time
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from store.blobs import disk_errors, write_all
from store.file_locks import open_alone
from worker.receipts import KEEP_SECONDS, check_id


def prepare_leases(folder: Path) -> None:
    """Make the folder and forget parts that no message can be about any more."""
    oldest = time.time() - KEEP_SECONDS
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process has just answered the part
                if path.stat().st_mtime < oldest:
                    path.unlink()


class Lease:
    """The right to work on one part, until it is given back or the process ends.

    Its file stays when the process ends before the part is answered, and tells the next one how often work was begun.
    """

    def __init__(self, file: FileIO, path: Path) -> None:
        self._file = file
        self._path = path

    def count_begin(self) -> int:
        """Note that work on the part begins; return how often it has begun, this time included."""
        with disk_errors(self._path):
            self._file.seek(0, 2)
            write_all(self._file, b".")
            return self._file.tell()

    def __enter__(self) -> Self:
        """Return the lease."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back; without an error the part is answered, and what was noted is forgotten."""
        if error is None:
            self._path.unlink(missing_ok=True)
        self._file.close()


class Leases:
    """The parts that are in hand: one locked file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, task_id: str) -> Lease | None:
        """Return the lease of the part, or None while another process has it; raise DiskFull or StoreUnavailable."""
        path = self._folder / check_id(task_id)
        with disk_errors(self._folder):
            file = open_alone(path)
        return None if file is None else Lease(file, path)
