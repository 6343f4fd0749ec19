"""Look at this machine: the signing key, the installed versions, the room on the disks that we write to."""

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from common.settings import Settings
from common.signing import SigningKey
from coordinator.checks.finding import Finding, fault, ok, warning
from coordinator.checks.roster import sqlite_file

_OLDEST_PYTHON = (3, 11)
_LIBRARIES = ("celery", "kombu", "redis", "sqlalchemy", "numpy")
_FAULT_BYTES = 256 << 20  # a shard of the usual size does not fit
_WARNING_BYTES = 2 * 10**9  # a few models do not fit


def check_key(settings: Settings) -> Iterator[Finding]:
    """Look at the coordinator's key: it can be read, and by its owner only."""
    name, path = "signing key", settings.signing_key_file.absolute()
    key = SigningKey.load(path)
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        yield fault(
            name,
            f"Others may read {path}, whose mode is {mode:04o}; who has it can speak for the coordinator.",
            f"`chmod 600 {path}`; if others use this machine, make a new key, and tell it to every site.",
        )
    elif status.st_uid != os.geteuid():
        yield warning(name, f"{path} belongs to another user ({status.st_uid}).", "Run as the coordinator's user.")
    else:
        yield ok(name, f"{path} can be read by its owner only; its public half is {key.public_key}.")


def check_versions(_settings: Settings) -> Iterator[Finding]:
    """Look at what is installed here; the sites' versions are told with the sites."""
    python = ".".join(str(part) for part in sys.version_info[:3])
    libraries = ", ".join(f"{library} {version(library)}" for library in _LIBRARIES)
    said = f"FedChord {version('fedchord')} on Python {python}; {libraries}."
    if sys.version_info[:2] < _OLDEST_PYTHON:
        yield fault("versions", said, f"Install Python {'.'.join(str(part) for part in _OLDEST_PYTHON)} or newer.")
    else:
        yield ok("versions", said)


def check_disks(settings: Settings) -> Iterator[Finding]:
    """Look at the room where the coordinator writes; folders on one disk are told once."""
    folders = {"blobs": settings.blob_folder} if settings.blob_store == "folder" else {"cache": settings.cache_folder}
    if (file := sqlite_file(settings.database_url.get_secret_value())) is not None:
        folders["database"] = file.parent
    disks: dict[int, tuple[Path, list[str]]] = {}
    for what, folder in folders.items():
        there = _nearest(folder.absolute())
        disks.setdefault(there.stat().st_dev, (there, []))[1].append(what)
    for folder, whats in disks.values():
        usage = shutil.disk_usage(folder)
        yield judge_disk(f"disk: {', '.join(whats)}", folder, free=usage.free, total=usage.total)


def judge_disk(name: str, folder: Path, *, free: int, total: int) -> Finding:
    """Tell whether there is room; sizes in bytes."""
    said = f"{folder} has {free / 1e9:.1f} of {total / 1e9:.0f} GB left."
    mend = "Free some space: delete models that nobody needs, or give it a larger disk."
    if free < _FAULT_BYTES:
        return fault(name, said, mend)
    return warning(name, said, mend) if free < _WARNING_BYTES else ok(name, said)


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())
