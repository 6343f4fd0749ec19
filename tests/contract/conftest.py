"""Share one server of each kind between all contract tests of a session."""

from collections.abc import Iterator

import pytest

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
