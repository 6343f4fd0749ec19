"""Remove an embedded stack's old logs; how large they become, supervisord bounds itself (see `programs`)."""

import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path

from common.settings import Settings
from store.blobs import disk_errors

logger = logging.getLogger(__name__)

_DAY_SECONDS = 24 * 3600.0
_LOG = re.compile(r".+\.log(\.[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class OldLog:
    """A log whose last line is older than logs are kept."""

    path: Path
    bytes: int


def find_old_logs(settings: Settings) -> list[OldLog]:
    """Return the logs of the stack that are too old; none if the settings are no stack's."""
    folder = settings.log_folder
    if folder is None or not folder.is_dir():
        return []
    before = time.time() - settings.keep_logs_days * _DAY_SECONDS
    found = []
    with disk_errors(folder):
        for path in sorted(folder.iterdir()):
            try:
                status = path.lstat()
            except FileNotFoundError:  # supervisord has just renamed it
                continue
            if _LOG.fullmatch(path.name) and status.st_size and status.st_mtime <= before:
                found.append(OldLog(path=path, bytes=status.st_size))
    return found


def clean_logs(settings: Settings) -> list[OldLog]:
    """Remove those logs and return them; one that supervisord may have open is emptied instead."""
    found = find_old_logs(settings)
    for log in found:
        with disk_errors(log.path.parent):
            if log.path.suffix == ".log":
                log.path.open("wb").close()  # supervisord appends, so its next line is the first one
            else:
                log.path.unlink(missing_ok=True)
    if found:
        logger.info("Removed %s old logs.", len(found), extra={"action": "clean_logs"})
    return found
