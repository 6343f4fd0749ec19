from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workplace import Workplace

_HANG_SECONDS = 300  # each of these tests starts dozens of processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give these tests longer than the others before they count as hanging."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(_HANG_SECONDS))


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
