"""Files that one process at a time has open; the kernel gives a file back when its process ends, however it does."""

import fcntl
import os
import weakref
from io import FileIO
from pathlib import Path

_held: weakref.WeakSet[FileIO] = weakref.WeakSet()


def open_alone(path: Path) -> FileIO | None:
    """Open a file for reading and writing, made if it is missing; return None while somebody else has it.

    Whoever has it may rename or remove it, and gives it back by closing it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        file = FileIO(descriptor, "r+b")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _leads_to(path, descriptor):
                _held.add(file)
                return file
        except BlockingIOError:
            file.close()
            return None
        file.close()  # whoever had it before has renamed or removed it in this moment


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _close_in_child() -> None:
    """Let go of what is the parent's: a child that outlives it, as a data loader's may, would keep the lock."""
    for file in list(_held):
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
