"""A short campaign of random faults."""

from pathlib import Path

import pytest

from tests.chaos.campaign import run
from tests.chaos.table import Table


@pytest.mark.timeout(900)
@pytest.mark.parametrize("services", [False, True], ids=["folder", "services"])
def test_nothing_is_stuck_lost_or_done_twice_whatever_happens(
    tmp_path: Path, full: bool, seed: int, table: Table, services: bool
) -> None:
    run(tmp_path, minutes=2.0 if full else 0.4, seed=seed, services=services, table=table, say=print)
