"""Files of the parts that are at work, all in one folder: what is in it survives the process.

Their names begin with the part's task id, and that with the job's id. A folder for each part would be tidier, but to
make and remove one takes longer than all else that a small part does.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from store.blobs import disk_errors
from worker.jobs import Part
from worker.receipts import check_id

_SEPARATOR = "@"  # is in no id


class PartFiles:
    """The files in one folder."""

    def __init__(self, folder: Path, *, keep_seconds: float) -> None:
        self.folder = folder
        self._keep_seconds = keep_seconds  # for a part that nobody comes back to

    def prepare(self) -> None:
        """Make the folder and remove what is old."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.forget_old()

    def name(self, part: Part, what: str) -> str:
        """Return the name of one of the part's files."""
        return f"{check_id(part.task_id)}{_SEPARATOR}{what}"

    def path(self, part: Part, what: str) -> Path:
        """Return where one of the part's files is, or would be."""
        return self.folder / self.name(part, what)

    def forget(self, part: Part) -> None:
        """Remove the part's files."""
        self._remove(lambda entry: _belongs(entry, part.task_id + _SEPARATOR))

    def forget_job(self, job_id: str) -> None:
        """Remove the files of all parts of a job."""
        self._remove(lambda entry: _belongs(entry, job_id + "."))

    def forget_old(self) -> None:
        """Remove what parts have left that nobody has come back to."""
        oldest = time.time() - self._keep_seconds
        # Not the time of the bytes' last change: a file that shares its bytes with the store has the store's.
        self._remove(lambda entry: entry.stat(follow_symlinks=False).st_ctime < oldest)

    def _remove(self, is_meant: Callable[[os.DirEntry[str]], bool]) -> None:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # another process was faster, or the next time will do
                    if is_meant(entry):
                        Path(entry).unlink()


def _belongs(entry: os.DirEntry[str], prefix: str) -> bool:
    return entry.name.removeprefix(".").startswith(prefix)  # what is not whole yet begins with a dot
