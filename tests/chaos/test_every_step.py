"""The coordinator is killed before and after everything that others can see; each job ends with the same model."""

import random
from pathlib import Path

import pytest

from tests.chaos import play
from tests.chaos.steps import Target
from tests.chaos.table import Table
from tests.federation import federation

SHORT = 8  # points that are tried in `make test`


@pytest.mark.timeout(1800)
def test_a_coordinator_killed_at_any_step_changes_no_bit(tmp_path: Path, full: bool, seed: int, table: Table) -> None:
    chance = random.Random(seed)
    with federation(tmp_path, *play.SITES) as made, play.playing(made):
        points = play.record_points(made)
        if full:
            targets = [Target(point=point, number=number) for number in (1, chance.randint(2, 5)) for point in points]
        else:
            targets = [Target(point=point, number=chance.randint(1, 3)) for point in chance.sample(points, SHORT)]
        done = play.disturb_coordinator(made, targets)
    assert done.missed == []
    for target in done.hit:
        table.record("coordinator killed (SQLite, folder)", target.point)
