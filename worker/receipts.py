"""Keep the answer of every part that was done, so that a message that comes twice is not worked on twice."""

import contextlib
import logging
import os
import re
import secrets
import time
from pathlib import Path

from common.errors import InvalidMessage
from store.blobs import disk_errors

logger = logging.getLogger(__name__)

KEEP_SECONDS = 7 * 24 * 3600  # no message stays in the broker for longer

_SAFE = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what may become a file's name


def prepare_receipts(folder: Path) -> None:
    """Make the folder and forget what is older than any message can be."""
    oldest = time.time() - KEEP_SECONDS
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if file.stat().st_mtime < oldest:
                file.unlink(missing_ok=True)


class Receipts:
    """The answers given by this site: one small file each, written whole or not at all.

    The files are not forced to the disk: after a power cut a part may be done again, with the same result.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, task_id: str, attempt: int) -> bytes | None:
        """Return the answer that was given to the part, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            return self._path(task_id, attempt).read_bytes()
        return None

    def keep(self, task_id: str, attempt: int, answer: bytes) -> None:
        """Write the answer; raise DiskFull or StoreUnavailable when that fails."""
        path = self._path(task_id, attempt)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        with disk_errors(self._folder):
            try:
                temporary.write_bytes(answer)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            self._starts(task_id, attempt).unlink(missing_ok=True)

    def count_start(self, task_id: str, attempt: int) -> int:
        """Note that work on the part begins; return how often it has, this time included."""
        descriptor = os.open(self._starts(task_id, attempt), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, b".")
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def _path(self, task_id: str, attempt: int) -> Path:
        return self._folder / f"{check_id(task_id)}.{attempt}"

    def _starts(self, task_id: str, attempt: int) -> Path:
        return self._folder / f"{check_id(task_id)}.{attempt}.starts"


def check_id(identifier: str) -> str:
    """Return the id of a task or job; raise InvalidMessage unless it is safe as a file's name."""
    if not _SAFE.fullmatch(identifier):
        raise InvalidMessage(f"The id {identifier[:80]!r} is not valid: use up to 64 letters, digits, - and _.")
    return identifier
