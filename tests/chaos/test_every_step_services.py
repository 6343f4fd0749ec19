"""The coordinator, over PostgreSQL and S3, is killed before and after everything that others can see."""

import random
from pathlib import Path

import pytest

from tests.chaos import play
from tests.chaos.steps import Target
from tests.chaos.table import Table
from tests.contract.postgres import PostgresServer
from tests.federation import federation
from tests.integration.test_services import s3_settings
from tests.servers import seaweedfs

SHORT = 4  # points that are tried in `make test`


@pytest.mark.timeout(1800)
def test_a_coordinator_killed_at_any_step_changes_no_bit_over_services(
    tmp_path: Path, full: bool, seed: int, table: Table
) -> None:
    chance = random.Random(seed)
    with PostgresServer() as database, seaweedfs() as server:
        settings = {"cache_folder": str(tmp_path / "cache"), "database_url": database.new_database()}
        with federation(tmp_path, *play.SITES, **s3_settings(server, "jobs"), **settings) as made, play.playing(made):
            points = play.record_points(made)
            chosen = points if full else chance.sample(points, SHORT)
            targets = [Target(point=point, number=1 if full else chance.randint(1, 3)) for point in chosen]
            done = play.disturb_coordinator(made, targets)
    assert done.missed == []
    for target in done.hit:
        table.record("coordinator killed (PostgreSQL, S3)", target.point)
