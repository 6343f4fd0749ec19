"""Scratch folders: one for each process, empty between parts, gone at the latest when the site starts again."""

import os
import shutil
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
            alive = folder.name.isdecimal() and psutil.pid_exists(int(folder.name))
            if not alive or folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Lend this process's own folder, which is empty again at the end; one borrower at a time."""
    folder = parent / str(os.getpid())  # kept, since making a folder costs more than all else that a small part does
    with disk_errors(parent):
        folder.mkdir(exist_ok=True)
        _empty(folder)  # a process that had this number before may have been killed
    try:
        yield folder
    finally:
        _empty(folder)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
