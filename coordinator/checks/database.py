"""Look at the database: does it answer, are its tables ours, can it be written, how large is it."""

import time
from collections.abc import Iterator
from contextlib import suppress

from sqlalchemy import Engine, text

from common.settings import Settings
from coordinator.checks.finding import Finding, fault, ok, warning
from coordinator.checks.roster import open_records, sqlite_file
from store.database import reading, revision, writing
from store.migrations import HEAD, is_known

_SLOW_SECONDS = 0.1  # for one statement; a round takes some dozens


def check_database(settings: Settings) -> Iterator[Finding]:
    """Look at the records."""
    with open_records(settings) as engine:
        begun = time.perf_counter()
        with reading(engine) as connection:
            connection.execute(text("SELECT 1"))
        seconds = time.perf_counter() - begun
        url = engine.url.set(query={}).render_as_string(hide_password=True)
        said = f"{url} answers in {1000 * seconds:.1f} ms and has {_size(settings, engine) / 1e6:.1f} MB."
        if seconds > _SLOW_SECONDS:
            yield warning("database", said, "Bring database and coordinator nearer to each other, or look at its load.")
        else:
            yield ok("database", said)
        found = revision(engine)
        yield judge_revision(found)
        if found is not None:
            begun = time.perf_counter()
            _write_nothing(engine)
            yield ok("database: writing", f"A change can be made, in {1000 * (time.perf_counter() - begun):.1f} ms.")


def judge_revision(found: str | None) -> Finding:
    """Tell whether the tables are those that this FedChord knows."""
    name = "database: revision"
    if found == HEAD:
        return ok(name, f"The tables are at revision {found}, the newest.")
    if found is None:
        return fault(
            name,
            "It has no tables of FedChord.",
            "Correct FEDCHORD_DATABASE_URL, or start a coordinator worker, which makes them.",
        )
    if is_known(found):
        return warning(
            name,
            f"The tables are at revision {found}; this FedChord has {HEAD}.",
            "Restart the coordinator workers with this FedChord: the first one brings the tables up to date.",
        )
    return fault(
        name,
        f"The tables are at revision {found}, which this FedChord does not know: a newer one wrote them.",
        "Upgrade this installation.",
    )


class _UndoneError(Exception):
    """Ends a transaction that must leave nothing."""


def _write_nothing(engine: Engine) -> None:
    """Make a change and take it back; raise DatabaseUnavailable or DiskFull."""
    with suppress(_UndoneError), writing(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = version_num"))
        raise _UndoneError


def _size(settings: Settings, engine: Engine) -> int:
    """Return the database's size in bytes."""
    file = sqlite_file(settings.database_url.get_secret_value())
    if file is not None:
        return sum(each.stat().st_size for each in file.parent.glob(f"{file.name}*") if each.is_file())
    with reading(engine) as connection:
        return int(connection.scalar(text("SELECT pg_database_size(current_database())")) or 0)
