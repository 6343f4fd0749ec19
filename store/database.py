"""Open the database of records (SQLite or PostgreSQL), bring it up to date, and read and write in it.

A writer's transaction on SQLite starts with BEGIN IMMEDIATE: writers wait in line, and none has to upgrade a read
lock, which is how SQLite's deadlocks come about. On PostgreSQL it runs at READ COMMITTED, where an UPDATE looks at
its WHERE again for a row that another writer has just changed. So on both, a compare-and-set is one
`UPDATE … WHERE state = <expected>`, and its row count tells who won.
"""

import logging
import os
import sqlite3
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, Pool, create_engine, event, exc, inspect, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection

from common.errors import Conflict, DatabaseUnavailable, DiskFull, FedChordError, InvalidInput, InvalidSettings
from store.migrations import HEAD, is_known, migrate

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_SECONDS = 10  # to PostgreSQL, whose own default is minutes
_UPGRADE_LOCK = 0x66656463  # "fedc": PostgreSQL's advisory lock for one upgrade at a time
_READ_OPTIONS: dict[str, dict[str, Any]] = {
    # SQLAlchemy's own AUTOCOMMIT would switch the driver's transaction handling back on afterwards.
    "sqlite": {"without_transaction": True},
    "postgresql": {"isolation_level": "AUTOCOMMIT"},
}
_SQLITE_TROUBLES = {  # by primary result code; the others are mistakes in a statement
    sqlite3.SQLITE_BUSY: "another process has locked it for too long; stop that process or try again",
    sqlite3.SQLITE_LOCKED: "another connection has locked it; try again",
    sqlite3.SQLITE_CANTOPEN: "its file cannot be opened; check the folder and its permissions",
    sqlite3.SQLITE_READONLY: "its file cannot be written; check the permissions of the file and its folder",
    sqlite3.SQLITE_PERM: "its file cannot be accessed; check the permissions of the file and its folder",
    sqlite3.SQLITE_IOERR: "its disk reports an error; check the disk",
    sqlite3.SQLITE_NOTADB: "its file is not an SQLite database; name another file",
    sqlite3.SQLITE_CORRUPT: "its file is damaged; restore it from a backup",
    sqlite3.SQLITE_PROTOCOL: "its file system does not lock files; move it to a local disk",
}


def open_database(url: str, *, busy_timeout_seconds: float = 10) -> Engine:
    """Return an engine for `sqlite:///<file>` or `postgresql://…` to which one connection has succeeded.

    An SQLite writer waits up to busy_timeout_seconds for another one. Raise InvalidSettings for a URL that we
    cannot use, DatabaseUnavailable or DiskFull if the database does not answer.
    """
    parsed = _parse(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    engine = _sqlite_engine(parsed, busy_timeout_seconds) if is_sqlite else _postgresql_engine(parsed)
    _engines.add(engine)
    try:
        with reading(engine) as connection:
            if is_sqlite:
                _write_ahead(connection, busy_timeout_seconds)
            else:
                connection.execute(text("SELECT 1"))
    except FedChordError:
        engine.dispose()
        raise
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Give a connection each of whose statements sees what is committed by then; it holds no lock in between."""
    with _translated(engine), engine.connect() as connection:
        yield connection.execution_options(**_READ_OPTIONS[engine.dialect.name])


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Give a connection in a transaction, which is kept if the block ends and undone if it raises."""
    with _translated(engine), engine.begin() as connection:
        yield connection


def upgrade(engine: Engine) -> bool:
    """Bring the tables to HEAD and tell whether that took anything; any number of processes may do it at once."""
    if revision(engine) == HEAD:
        return False
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
        found = _revision(connection)  # again, now that nobody else can change it
        if found == HEAD:
            return False
        if found is not None and not is_known(found):
            raise Conflict(
                f"The database {_name(engine)} is at revision {found}, which this FedChord does not know; "
                "a newer one wrote it: upgrade this installation."
            )
        migrate(connection)
    return True


def revision(engine: Engine) -> str | None:
    """Return the revision that the tables are at, or None for a database without our tables."""
    with reading(engine) as connection:
        return _revision(connection)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return found


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except exc.ArgumentError as error:  # the URL may hold a password, so no message repeats it
        raise InvalidSettings(
            "FEDCHORD_DATABASE_URL is not a URL; write sqlite:///<file> or postgresql://<user>:<password>@<host>/<name>."
        ) from error
    if parsed.drivername in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise InvalidSettings(f"{parsed.drivername} is no database for FedChord; use sqlite:///… or postgresql://….")
    if parsed.drivername == "sqlite" and (parsed.database or ":memory:") == ":memory:":
        raise InvalidSettings("The records must outlive the process; name a file, as in sqlite:///fedchord.db.")
    return parsed


def _sqlite_engine(url: URL, busy_timeout_seconds: float) -> Engine:
    folder = Path(url.database or "").absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseUnavailable(f"The folder {folder} of the database cannot be made: {error.strerror}.") from error
    engine = create_engine(url, connect_args={"timeout": busy_timeout_seconds})

    def configure(driver: DBAPIConnection, _record: object) -> None:
        driver.isolation_level = None  # the driver sends no BEGIN of its own
        driver.execute("PRAGMA foreign_keys=ON")
        driver.execute("PRAGMA synchronous=NORMAL")  # with WAL: a power cut may lose the last commits, no more

    def begin(connection: Connection) -> None:
        if not connection.get_execution_options().get("without_transaction"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", configure)
    event.listen(engine, "begin", begin)
    return engine


def _postgresql_engine(url: URL) -> Engine:
    defaults = {"connect_timeout": _CONNECT_TIMEOUT_SECONDS, "fallback_application_name": "fedchord"}
    arguments = {name: value for name, value in defaults.items() if name not in url.query}
    try:
        return create_engine(url, pool_pre_ping=True, connect_args=arguments)
    except ModuleNotFoundError as error:
        raise InvalidSettings("PostgreSQL needs its driver; install fedchord[postgres].") from error


def _write_ahead(connection: Connection, busy_timeout_seconds: float) -> None:
    """Switch the file to WAL, which it then remembers; SQLite does not itself wait for another process here."""
    deadline = time.monotonic() + busy_timeout_seconds
    while True:
        try:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        except exc.OperationalError as error:
            if _sqlite_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


# A connection must not be used, nor even closed, in a process forked from the one that opened it.
_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()
_inherited: list[Pool] = []  # kept in the child only so that nothing closes them


def _leave_connections_to_parent() -> None:
    for engine in _engines:
        _inherited.append(engine.pool)
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_leave_connections_to_parent)


@contextmanager
def _translated(engine: Engine) -> Iterator[None]:
    """Raise our errors in place of those that a statement's author can do nothing about."""
    try:
        yield
    except exc.TimeoutError as error:
        raise DatabaseUnavailable(
            f"All connections to {_name(engine)} are in use; run fewer threads in this process."
        ) from error
    except UnicodeEncodeError as error:
        raise InvalidInput(f"A text holds half of a character ({error}); leave it out.") from error
    except exc.StatementError as error:
        translation = _translation(engine, error)
        if translation is None:
            raise
        raise translation from error


def _translation(engine: Engine, error: exc.StatementError) -> FedChordError | None:
    said = " ".join(str(error.orig).split())
    if isinstance(error, exc.DataError) or not isinstance(error, exc.DBAPIError):
        return InvalidInput(f"A value cannot be stored: {said}")
    if engine.dialect.name == "sqlite":
        code = _sqlite_code(error)
        if code == sqlite3.SQLITE_FULL:
            return DiskFull(f"The disk of {_name(engine)} is full; free some space and try again.")
        if code in _SQLITE_TROUBLES:
            return DatabaseUnavailable(f"{_name(engine)} cannot be used: {_SQLITE_TROUBLES[code]} ({said}).")
        return None
    if getattr(error.orig, "sqlstate", None) == "53100":  # disk_full
        return DiskFull(f"The disk of the server of {_name(engine)} is full; free some space and try again.")
    if isinstance(error, exc.OperationalError | exc.InterfaceError):
        return DatabaseUnavailable(
            f"The database {_name(engine)} cannot be used; check that it runs, and the URL: {said}"
        )
    return None


def _sqlite_code(error: exc.StatementError) -> int:
    """Return SQLite's primary result code, whose refinements are in the higher bits."""
    return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF


def _name(engine: Engine) -> str:
    """Return the database's URL without secrets."""
    return engine.url.set(query={}).render_as_string(hide_password=True)
