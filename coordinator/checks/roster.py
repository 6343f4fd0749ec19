"""Read who is enrolled and what each one's heartbeat tells, without making anything that is not there."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, make_url
from sqlalchemy.exc import ArgumentError

from common.broker import connect
from common.errors import DatabaseUnavailable
from common.heartbeats import Heartbeat, read_heartbeats
from common.settings import Settings
from store.database import open_database, reading, revision
from store.migrations import HEAD
from store.parties import PartyInfo
from store.parties import sites as enrolled_sites


@dataclass(frozen=True, kw_only=True)
class Roster:
    """The enrolled sites, and those that are alive."""

    parties: tuple[PartyInfo, ...]  # by site
    heartbeats: Mapping[str, Heartbeat]  # by site


def read_roster(settings: Settings) -> Roster:
    """Return who is there; raise DatabaseUnavailable or BrokerUnavailable."""
    with open_records(settings) as engine:
        if revision(engine) != HEAD:
            raise DatabaseUnavailable("The database's tables are not those of this FedChord; see its revision.")
        with reading(engine) as connection:
            parties = enrolled_sites(connection)
    with closing(connect(settings)) as broker:
        heartbeats = read_heartbeats(broker, [party.site for party in parties if party.site])
    return Roster(parties=parties, heartbeats=heartbeats)


@contextmanager
def open_records(settings: Settings) -> Iterator[Engine]:
    """Open the database as it is; raise DatabaseUnavailable rather than make an SQLite file that is not there."""
    url = settings.database_url.get_secret_value()
    file = sqlite_file(url)
    if file is not None and not file.exists():
        raise DatabaseUnavailable(
            f"There is no database {file}; correct FEDCHORD_DATABASE_URL, or start a coordinator worker: it makes one."
        )
    engine = open_database(url)
    try:
        yield engine
    finally:
        engine.dispose()


def sqlite_file(url: str) -> Path | None:
    """Return the file of an SQLite database; None for another one, or for what is no URL."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return None
    is_file = parsed.drivername == "sqlite" and parsed.database not in (None, "", ":memory:")
    return Path(parsed.database or "").absolute() if is_file else None
