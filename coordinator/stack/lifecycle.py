"""Bring a stack up, take it down, tell how it is."""

import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.broker import hide_password
from common.errors import BrokerUnavailable, Conflict, InvalidInput, NotFound, Unavailable
from common.queues import check_site_name
from common.settings import Settings
from common.signing import SigningKey
from coordinator.services import make_key
from coordinator.stack.folder import Stack, StackFolder
from coordinator.stack.kit import KEY_FILE, SETTINGS_FILE, renew_kit, site_values, write_kit
from coordinator.stack.leftovers import end_leftovers, find_leftovers
from coordinator.stack.ports import LOOPBACK, choose_port
from coordinator.stack.programs import write_supervisor_file
from coordinator.stack.readiness import missing_sites, wait_until_ready
from coordinator.stack.settings_file import write_settings
from coordinator.stack.supervision import ProcessState, Supervisor
from coordinator.stack.valkey import broker_url, write_valkey_file
from store.blobs import disk_errors
from store.database import open_database, upgrade, writing
from store.parties import enroll_site

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = Path("fedchord-stack")
DEFAULT_SITES = 2

_READY_SECONDS = 90.0
_STOP_SECONDS = 60.0
_GRACE_SECONDS = 5.0  # for processes whose supervisor is gone
_LONGEST_SOCKET_PATH = 80  # bytes; systems allow about 104, of which supervisord needs some for itself


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What somebody wants of a stack; None leaves it as it was at the last `up`."""

    num_sites: int | None = None
    trainers: Mapping[str, str] | None = None  # name -> "module:Class", on every site's list
    site_data: Path | None = None  # has one folder for each site, named like the site
    broker_port: int | None = None
    flower: bool | None = None
    flower_port: int | None = None


@dataclass(frozen=True, kw_only=True)
class StackStatus:
    """How a stack is."""

    folder: Path
    is_running: bool  # its supervisor answers
    processes: tuple[ProcessState, ...]
    sites_missing: tuple[str, ...]  # without a heartbeat; all, if the broker does not answer
    broker: str  # its URL without the password
    settings_file: Path  # the coordinator's
    flower: str | None  # its URL
    leftovers: int  # processes that run although the supervisor does not

    @property
    def is_well(self) -> bool:
        """Return whether everything runs."""
        running = all(process.state == "RUNNING" for process in self.processes)
        return self.is_running and running and not self.sites_missing


def up(path: Path, wishes: Wishes) -> StackStatus:
    """Start the stack of this folder, or a new one, and return when all of it answers.

    Raise Conflict if it runs already. If it cannot be started, everything that was started is stopped again.
    """
    folder = StackFolder(path)
    with disk_errors(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with folder.lock():
            last = _last(folder)
            if last is not None:
                if Supervisor(folder, last).is_running():
                    raise Conflict(f"The stack in {folder.path} is running already; `fedchord down` stops it.")
                end_leftovers(last, grace_seconds=_GRACE_SECONDS)
            stack = _plan(folder, last, wishes)
            settings = _configure(folder, stack)
            supervisor = Supervisor(folder, stack)
            try:
                supervisor.start()
                wait_until_ready(folder, stack, settings, supervisor, deadline_seconds=_READY_SECONDS)
            except BaseException:
                _stop(folder, stack)
                raise
    return status(path)


def down(path: Path) -> int:
    """Stop the stack, also what a crash has left of it; return how many processes that were. Its data stays."""
    folder = StackFolder(path)
    stack = folder.load()
    with folder.lock():
        return _stop(folder, stack)


def status(path: Path) -> StackStatus:
    """Return how the stack is; raise NotFound if there is none."""
    folder = StackFolder(path)
    stack = folder.load()
    supervisor = Supervisor(folder, stack)
    is_running = supervisor.is_running()
    missing: list[str] = list(stack.sites)
    if is_running:
        try:
            missing = missing_sites(Settings.load(folder.settings_file), stack)
        except BrokerUnavailable as error:
            logger.warning("%s", error.message, extra={"action": "stack_status"})
    return StackStatus(
        folder=folder.path,
        is_running=is_running,
        processes=tuple(supervisor.processes()),
        sites_missing=tuple(missing),
        broker=hide_password(broker_url(stack)),
        settings_file=folder.settings_file,
        flower=None if stack.flower_port is None else f"http://{LOOPBACK}:{stack.flower_port}",
        leftovers=0 if is_running else len(find_leftovers(stack)),
    )


def _last(folder: StackFolder) -> Stack | None:
    try:
        return folder.load()
    except NotFound:
        return None


def _plan(folder: StackFolder, last: Stack | None, wishes: Wishes) -> Stack:
    """Return what to start: as it was at the last `up`, but for the wishes."""
    site_data = wishes.site_data.absolute() if wishes.site_data else last.site_data if last else None
    wants_flower = last is not None and last.flower_port is not None if wishes.flower is None else wishes.flower
    flower_port = None
    if wants_flower:
        flower_port = choose_port(
            wishes.flower_port, option="--flower-port", else_last=last.flower_port if last else None
        )
    values = {
        "sites": _choose_sites(wishes, site_data, last),
        "site_data": site_data,
        "trainers": dict(wishes.trainers) if wishes.trainers is not None else last.trainers if last else {},
        "working_folder": Path.cwd(),
        "broker_port": choose_port(wishes.broker_port, option="--port", else_last=last.broker_port if last else None),
        "flower_port": flower_port if wants_flower else None,
        "supervisor_socket": _socket(folder, last),
    }
    return Stack(**values) if last is None else last.model_copy(update=values)


def _choose_sites(wishes: Wishes, site_data: Path | None, last: Stack | None) -> tuple[str, ...]:
    if wishes.site_data is None and wishes.num_sites is None and last is not None:
        return last.sites
    if site_data is None:
        return tuple(f"site-{number}" for number in range(1, (wishes.num_sites or DEFAULT_SITES) + 1))
    if not site_data.is_dir():
        raise InvalidInput(f"--site-data: there is no folder {site_data}.")
    names = sorted((each.name for each in site_data.iterdir() if each.is_dir()), key=lambda name: (len(name), name))
    for name in names:
        check_site_name(name)
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


def _configure(folder: StackFolder, stack: Stack) -> Settings:
    """Write every file that the processes read, and enroll the sites; return the coordinator's settings."""
    folder.save(stack)
    folder.logs.mkdir(exist_ok=True)
    key = make_key(folder.key_file)
    write_settings(
        folder.settings_file,
        {
            "broker_url": broker_url(stack),
            "database_url": f"sqlite:///{folder.database_file}",
            "blob_store": "folder",
            "blob_folder": "blobs",
            "cache_folder": "cache",
            "signing_key_file": folder.key_file.name,
        },
        heading="The coordinator of an embedded stack; `fedchord up` keeps these lines, and leaves what is added.",
    )
    settings = Settings.load(folder.settings_file)
    write_valkey_file(folder, stack)
    write_supervisor_file(folder, stack)
    _enroll(folder, stack, settings, key)
    return settings


def _enroll(folder: StackFolder, stack: Stack, settings: Settings, coordinator_key: SigningKey) -> None:
    """Give every site its kit, and record its public key."""
    engine = open_database(settings.database_url.get_secret_value())
    try:
        upgrade(engine)
        for site in stack.sites:
            kit = folder.site(site)
            values = site_values(
                settings,
                site=site,
                coordinator_public_key=coordinator_key.public_key,
                data=stack.site_data / site if stack.site_data else kit / "data",
                trainers=stack.trainers,
            )
            if (kit / KEY_FILE).exists():
                key = SigningKey.load(kit / KEY_FILE)
                renew_kit(kit, values)
            else:
                (kit / SETTINGS_FILE).unlink(missing_ok=True)  # of an `up` that was interrupted before it made the key
                key = SigningKey.generate()
                write_kit(kit, values, key)
            (kit / "data").mkdir(exist_ok=True)
            with writing(engine) as connection:
                enroll_site(connection, site, key.public_key, description="a site of the embedded stack")
    finally:
        engine.dispose()


def _stop(folder: StackFolder, stack: Stack) -> int:
    """Stop everything in order; return how many processes there were. Raise Unavailable if some cannot be stopped."""
    started = time.monotonic()
    supervisor = Supervisor(folder, stack)
    count = sum(process.pid > 0 for process in supervisor.processes())
    supervisor.stop(deadline_seconds=_STOP_SECONDS)
    count += end_leftovers(stack, grace_seconds=_GRACE_SECONDS)
    if left := find_leftovers(stack):
        pids = ", ".join(str(process.pid) for process in left)
        raise Unavailable(f"Processes {pids} of the stack do not end; end them by hand.")
    stack.supervisor_socket.unlink(missing_ok=True)
    if stack.supervisor_socket.parent != folder.path:
        shutil.rmtree(stack.supervisor_socket.parent, ignore_errors=True)
    logger.info("Stopped %s processes in %.1f s.", count, time.monotonic() - started, extra={"action": "stop_stack"})
    return count
