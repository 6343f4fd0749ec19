"""Keep the answer of every part that was done, so that a message that comes twice is not worked on twice."""

import contextlib
import logging
import os
import re
import time
from pathlib import Path

from common.errors import InvalidMessage
from store.blobs import disk_errors

logger = logging.getLogger(__name__)

KEEP_SECONDS = 7 * 24 * 3600  # no message stays in the broker for longer

BEGUN = b"."  # for each begin of the work, before the answer, which is a map of msgpack and never begins so
_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,159}")  # what may become a part of a file's name


def prepare_receipts(folder: Path) -> None:
    """Make the folder and forget what is older than any message can be."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    forget_old_receipts(folder)


def forget_old_receipts(folder: Path) -> None:
    """Remove what is older than any message can be; also while the site works, for it may run for years."""
    oldest = time.time() - KEEP_SECONDS
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process has removed or renamed it, or the next time will do
                if entry.stat().st_mtime < oldest:
                    Path(entry).unlink()


class Receipts:
    """The answers given by this site: one small file each, which was the part's own (`worker/leases.py`).

    A part is answered once, whatever its attempt. The files are not forced to the disk: after a power cut a part may be
    done again, with the same result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, task_id: str) -> bytes | None:
        """Return the answer that was given to the part, if there is one that can be read."""
        path = self.path(task_id)
        try:
            return path.read_bytes().lstrip(BEGUN) or None  # a power cut may leave an empty file
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("Cannot read the receipt %s: %s.", path, error, extra={"action": "find_receipt"})
            return None

    def path(self, task_id: str) -> Path:
        """Return where the part's receipt is, or would be."""
        return self.folder / f"{check_id(task_id)}.answer"


def check_id(identifier: str) -> str:
    """Return the id of a task or job; raise InvalidMessage unless it is safe as a file's name."""
    if not _SAFE.fullmatch(identifier):
        raise InvalidMessage(f"The id {identifier[:80]!r} is not valid: use up to 160 letters, digits, dots, - and _.")
    return identifier
