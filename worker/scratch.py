"""Scratch folders: one for each part, gone when the part is done or, at the latest, when the site starts again."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from store.blobs import disk_errors

_KEEP_SECONDS = 24 * 3600  # a number of a process may be given again, so it does not protect a folder for ever


def prepare_scratch(parent: Path) -> None:
    """Make the parent folder and remove what killed processes have left in it."""
    oldest = time.time() - _KEEP_SECONDS
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for folder in parent.iterdir():
            owner = folder.name.partition("-")[0]
            alive = owner.isdecimal() and psutil.pid_exists(int(owner))
            if not alive or folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Give a new folder that is removed at the end."""
    with disk_errors(parent):
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
