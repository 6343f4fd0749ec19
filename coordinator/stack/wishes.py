"""What somebody wants of a stack, and what to start because of it."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import InvalidInput
from common.queues import check_site_name
from coordinator.stack.folder import Stack, StackFolder, check_path
from coordinator.stack.ports import choose_port
from coordinator.stack.programs import is_taken

DEFAULT_SITES = 2
DEFAULT_COORDINATORS = 2  # a round's answers come at once, and one worker cannot use two cores for them

_LONGEST_SOCKET_PATH = 80  # bytes; systems allow about 104, of which supervisord needs some for itself


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What somebody wants of a stack; None leaves it as it was at the last `up`."""

    num_sites: int | None = None
    num_coordinators: int | None = None
    trainers: Mapping[str, str] | None = None  # name -> "module:Class", on every site's list
    site_data: Path | None = None  # has one folder for each site, named like the site
    broker_port: int | None = None
    http_port: int | None = None
    flower: bool | None = None
    flower_port: int | None = None
    working_folder: Path | None = None  # where the sites import their trainers from; the current folder if None


def plan_stack(folder: StackFolder, last: Stack | None, wishes: Wishes) -> Stack:
    """Return what to start: as it was at the last `up`, but for the wishes."""
    site_data = check_path(wishes.site_data.resolve()) if wishes.site_data else last.site_data if last else None
    wants_flower = last is not None and last.flower_port is not None if wishes.flower is None else wishes.flower
    flower_port = None
    if wants_flower:
        flower_port = choose_port(
            wishes.flower_port, option="--flower-port", else_last=last.flower_port if last else None
        )
    values = {
        "sites": _choose_sites(wishes, site_data, last),
        "num_coordinators": wishes.num_coordinators or (last.num_coordinators if last else DEFAULT_COORDINATORS),
        "site_data": site_data,
        "trainers": dict(wishes.trainers) if wishes.trainers is not None else last.trainers if last else {},
        "working_folder": check_path(wishes.working_folder or Path.cwd()),
        "broker_port": choose_port(wishes.broker_port, option="--port", else_last=last.broker_port if last else None),
        # Others have written this address down, so that the last port is not given up for another one.
        "http_port": choose_port(wishes.http_port or (last.http_port if last else None), option="--http-port"),
        "flower_port": flower_port if wants_flower else None,
        "supervisor_socket": _socket(folder, last),
    }
    return Stack(**values) if last is None else last.model_copy(update=values)


def _choose_sites(wishes: Wishes, site_data: Path | None, last: Stack | None) -> tuple[str, ...]:
    if wishes.site_data is None and wishes.num_sites is None and last is not None:
        return last.sites
    num_sites = DEFAULT_SITES if wishes.num_sites is None else wishes.num_sites
    if site_data is None:
        return tuple(f"site-{number}" for number in range(1, num_sites + 1))
    if not site_data.is_dir():
        raise InvalidInput(f"--site-data: there is no folder {site_data}.")
    names = sorted((each.name for each in site_data.iterdir() if each.is_dir()), key=lambda name: (len(name), name))
    for name in names:
        if is_taken(check_site_name(name)):
            raise InvalidInput(f"--site-data: another process of the stack is called {name}; rename that folder.")
    if not names or (wishes.num_sites is not None and wishes.num_sites != len(names)):
        wanted = f", not {wishes.num_sites}" if wishes.num_sites is not None else ""
        raise InvalidInput(f"--site-data: {site_data} has folders for {len(names)} sites{wanted}.")
    return tuple(names)


def _socket(folder: StackFolder, last: Stack | None) -> Path:
    """Return where supervisord listens: in the folder, or in a private one if the path is too long for a socket."""
    here = folder.path / "supervisor.sock"
    if len(bytes(here)) <= _LONGEST_SOCKET_PATH:
        return here
    if last is not None and last.supervisor_socket.parent.is_dir():
        return last.supervisor_socket
    short = "/tmp"  # noqa: S108 (mkdtemp makes a private folder in it; $TMPDIR may be as long as the stack's own path)
    return Path(tempfile.mkdtemp(prefix="fedchord-", dir=short)) / "supervisor.sock"
