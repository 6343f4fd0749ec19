"""One process of a site at a time has a part in hand, however many copies of its message there are."""

import contextlib
import os
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from store.blobs import disk_errors, write_all
from store.file_locks import open_alone
from worker.receipts import BEGUN, KEEP_SECONDS, check_id


class Lease:
    """The right to work on one part, until it is given back or the process ends.

    When the process ends first, the part's file tells the next one how often work was begun, and the answer that was
    kept. The file is not forced to the disk; who reads an answer notices by its signature when a power cut damaged it.
    """

    def __init__(self, file: FileIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._is_over = False  # the file is somebody else's

    def count_begin(self) -> int:
        """Note that work on the part begins, and drop any answer; return how often it has begun, with this time."""
        begun, _ = self._read()
        self._write(begun, BEGUN)
        return begun + 1

    def keep_answer(self, answer: bytes) -> None:
        """Keep the answer in the place of any other; raise DiskFull or StoreUnavailable when that fails."""
        begun, _ = self._read()
        self._write(begun, answer)

    def answer(self) -> bytes:
        """Return the answer that was kept; empty if there is none."""
        return self._read()[1]

    def hand_over(self, target: Path) -> None:
        """Rename the part's file to the target, which needs no lease; raise DiskFull or StoreUnavailable."""
        with disk_errors(target.parent):
            self._path.replace(target)
        self._is_over = True

    def __enter__(self) -> Self:
        """Return the lease."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back; without an error the part is answered, and only an answer that was kept stays."""
        try:
            if error is None and not self._is_over and not self.answer():
                self._path.unlink(missing_ok=True)
        finally:
            self._file.close()

    def _read(self) -> tuple[int, bytes]:
        """Return how often work was begun, and the answer."""
        with disk_errors(self._path):
            self._file.seek(0)
            content = self._file.readall()
        answer = content.lstrip(BEGUN)
        return len(content) - len(answer), answer

    def _write(self, position: int, content: bytes) -> None:
        """Write the content from there on; so little is written in one step, unless the machine stops."""
        with disk_errors(self._path):
            self._file.seek(position)
            write_all(self._file, content)
            self._file.truncate()


class Leases:
    """The parts that are in hand: one locked file each.

    One file sees a part through, from its begin to its receipt: to make files and remove them may take longer than all
    else that a small part does (ext4 looks at every inode that was given back within the last minute).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """Make the folder and forget parts that no message can be about any more."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self.forget_old()

    def take(self, task_id: str) -> Lease | None:
        """Return the lease of the part, or None while another process has it; raise DiskFull or StoreUnavailable."""
        path = self._folder / check_id(task_id)
        with disk_errors(self._folder):
            file = open_alone(path)
        return None if file is None else Lease(file, path)

    def forget_job(self, job_id: str) -> None:
        """Remove the files of a job's parts, but for those in hand."""
        self._remove(lambda entry: entry.name.startswith(job_id + "."))

    def forget_old(self) -> None:
        """Remove the files of parts that no message can be about any more."""
        oldest = time.time() - KEEP_SECONDS
        self._remove(lambda entry: entry.stat().st_mtime < oldest)

    def _remove(self, is_meant: Callable[[os.DirEntry[str]], bool]) -> None:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # another process was faster, or the next time will do
                    if is_meant(entry) and (file := open_alone(Path(entry))) is not None:
                        with file:
                            Path(entry).unlink()
