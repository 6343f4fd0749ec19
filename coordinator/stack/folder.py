"""Where a stack's files lie, and the record of what the stack is."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import Conflict, InvalidInput, InvalidSettings, NotFound

DEFAULT_FOLDER = Path("fedchord-stack")

_FORBIDDEN = frozenset("\"'\\;#?%\n\r")  # they mean something in supervisord's, Valkey's or SQLAlchemy's syntax


def _password() -> str:
    return secrets.token_urlsafe(24)


class Stack(BaseModel):
    """What a stack consists of; kept in its folder, so that `up` can start the same again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stack_id: str = Field(default_factory=lambda: secrets.token_hex(16))  # marks the stack's processes
    sites: tuple[str, ...]
    num_coordinators: int = 1  # workers
    trainers: dict[str, str] = {}  # on every site's list: name -> "module:Class"
    site_data: Path | None = None  # has one folder for each site, named like the site
    working_folder: Path  # where `up` ran: the sites import their trainers from there
    broker_port: int
    broker_password: str = Field(default_factory=_password)
    http_port: int | None = None  # of the model store's service; None in what a FedChord without one has written
    flower_port: int | None = None  # None: no Flower
    flower_password: str = Field(default_factory=_password)
    supervisor_socket: Path


class StackFolder:
    """The files of one stack."""

    def __init__(self, path: Path) -> None:
        self.path = check_path(path.resolve())
        self.record = self.path / "stack.json"
        self.settings_file = self.path / "fedchord.toml"  # the coordinator's
        self.key_file = self.path / "signing.key"
        self.database_file = self.path / "fedchord.db"
        self.supervisor_file = self.path / "supervisord.conf"
        self.supervisor_pid_file = self.path / "supervisord.pid"
        self.valkey_folder = self.path / "valkey"
        self.valkey_file = self.valkey_folder / "valkey.conf"
        self.logs = self.path / "logs"

    def site(self, name: str) -> Path:
        """Return the folder of one site's own files."""
        return self.path / "sites" / name

    def log(self, process: str) -> Path:
        """Return where a process's output goes."""
        return self.logs / f"{process}.log"

    def load(self) -> Stack:
        """Return what the stack is; raise NotFound if none was ever started here."""
        try:
            return Stack.model_validate_json(self.record.read_bytes())
        except FileNotFoundError as error:
            raise NotFound(f"There is no stack in {self.path}; `fedchord up` makes one.") from error
        except (OSError, ValidationError) as error:
            raise InvalidSettings(f"Cannot read {self.record}: {error}") from error

    def save(self, stack: Stack) -> None:
        """Record what the stack is."""
        write_private(self.record, stack.model_dump_json(indent=2) + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other `up` and `down` away from this folder."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(
                    f"Another `fedchord up` or `down` is at work in {self.path}; wait until it has ended."
                ) from error
            yield


def check_path(path: Path) -> Path:
    """Return the path; raise InvalidInput when the stack's programs could not be told of it."""
    if bad := sorted(_FORBIDDEN.intersection(str(path))):
        raise InvalidInput(f"The path {str(path)!r} has a {bad[0]!r} in it; choose another folder for the stack.")
    return path


def write_private(path: Path, text: str) -> None:
    """Write the file, readable by its owner only; at no time is it half-written."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
