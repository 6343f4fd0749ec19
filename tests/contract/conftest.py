"""Share one server of each kind between all contract tests of a session, and lend databases of each kind."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from store.database import open_database, upgrade
from tests.contract.postgres import PostgresServer
from tests.servers import S3Server, juicefs, seaweedfs


@pytest.fixture(scope="session")
def seaweedfs_server() -> Iterator[S3Server]:
    """Run SeaweedFS, which honours If-None-Match."""
    with seaweedfs() as server:
        yield server


@pytest.fixture(scope="session")
def juicefs_server() -> Iterator[S3Server]:
    """Run the JuiceFS gateway, MinIO's front end, which ignores If-None-Match."""
    with juicefs() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Run PostgreSQL; every test has databases of its own in it."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Name a new database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/records.db"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.new_database()


@pytest.fixture
def fresh(database_url: str) -> Iterator[Engine]:
    """Give a database without tables."""
    engine = open_database(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def engine(fresh: Engine) -> Engine:
    """Give a database with our tables."""
    upgrade(fresh)
    return fresh
