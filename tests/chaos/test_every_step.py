"""The coordinator is killed before and after everything that others can see; each job ends with the same model."""

import random
from pathlib import Path

import pytest

from tests.chaos import play
from tests.chaos.steps import disturb, record_points
from tests.chaos.table import Table
from tests.federation import federation

SHORT = 12  # points that are tried in `make test`


@pytest.mark.timeout(1800)
def test_a_coordinator_killed_at_any_step_changes_no_bit(tmp_path: Path, full: bool, seed: int, table: Table) -> None:
    chance = random.Random(seed)
    with federation(tmp_path, *play.SITES) as made, play.playing(made):
        points = record_points(made)
        if full:
            targets = [(point, 1) for point in points] + [(point, chance.randint(2, 5)) for point in points]
        else:
            targets = [(point, chance.randint(1, 3)) for point in chance.sample(points, SHORT)]
        done = disturb(made, targets)
    assert done.missed == []
    for point in done.hit:
        table.record("coordinator killed (SQLite, folder)", point)
