"""A folder for each part that is at work, in one for each job: what is in it survives the process."""

import contextlib
import os
import shutil
import time
from pathlib import Path

from store.blobs import disk_errors
from worker.jobs import Part
from worker.receipts import check_id


def prepare_part_folders(parent: Path, *, keep_seconds: float) -> None:
    """Make the parent folder and remove what parts have left that nobody has come back to for so long."""
    oldest = time.time() - keep_seconds
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for job in parent.iterdir():
            for folder in job.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another process has just answered the part
                    if _changed_at(folder) < oldest:
                        shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it has other parts
                if job.stat().st_mtime < oldest:
                    job.rmdir()


class PartFolders:
    """The folders in one parent."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent

    def path(self, part: Part) -> Path:
        """Return where the part's folder is, or would be."""
        return self._parent / check_id(part.job_id) / check_id(part.task_id)

    def forget(self, part: Part) -> None:
        """Remove the part's folder."""
        shutil.rmtree(self.path(part), ignore_errors=True)

    def forget_job(self, job_id: str) -> None:
        """Remove the folders of all parts of a job."""
        shutil.rmtree(self._parent / check_id(job_id), ignore_errors=True)


def _changed_at(folder: Path) -> float:
    """Return when the newest thing in the folder was changed, unix time in seconds."""
    with os.scandir(folder) as entries:
        return max([folder.stat().st_mtime, *(entry.stat(follow_symlinks=False).st_mtime for entry in entries)])
