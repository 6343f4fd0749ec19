"""Options and fixtures of the chaos suite."""

import random
from pathlib import Path

import pytest

from tests.chaos.table import Table

pytest.register_assert_rewrite("tests.chaos.play", "tests.chaos.invariants")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--chaos` and `--chaos-table`."""
    group = parser.getgroup("chaos")
    group.addoption("--chaos", choices=["short", "full"], default="short", help="How much of the chaos suite is run.")
    group.addoption("--chaos-table", default="", help="A folder for the rows of the table that the suite finds.")
    group.addoption("--chaos-seed", type=int, default=None, help="Choose what the short suite tries; else it is drawn.")


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Return whether everything is to be tried, and long."""
    return bool(pytestconfig.getoption("chaos", "short") == "full")


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> Table:
    """Return where rows are recorded."""
    folder = pytestconfig.getoption("chaos_table", "")
    return Table(Path(folder) if folder else None)


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """Return what chance begins with; it is printed with what fails."""
    given = pytestconfig.getoption("chaos_seed", None)
    chosen = random.randrange(2**32) if given is None else given
    print(f"\n--chaos-seed {chosen}")
    return chosen


@pytest.fixture(scope="session")
def away_seconds(full: bool) -> float:
    """Return how long a service stays away."""
    return 30.0 if full else 2.0
