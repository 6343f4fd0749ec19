from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workplace import Workplace


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Workplace]:
    """Lend a workplace, and end what the test has left running in it."""
    place = Workplace(tmp_path)
    yield place
    for process in place.processes():
        process.kill()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """Lend a workplace with a stack that runs, the same to every test of the module."""
    place = Workplace(tmp_path_factory.mktemp("running"))
    place.up("--flower")
    yield place
    place.run("down")
    assert place.processes() == []
