"""The broker, the database, the disk or the right time is away for a while: everybody waits and goes on."""

import random
import re
from collections.abc import Iterator
from functools import partial

import pytest

from tests.chaos.services import locked
from tests.chaos.stages import Stage, pass_time, stage
from tests.chaos.table import Table, failed_at_once
from tests.federation import wait_until

SITES = ("alpha", "beta")
ROUNDS = 11
BEGIN = 4  # the round in which the fault begins
MOST_BYTES = 2_000_000  # of a file on a full disk: less than a model has, more than a log
AHEAD = [
    "after commit in lease.held_round",
    "after commit in closing._settle",
    "before publishing in dispatch.publish_round",
    "before counting in the chord in dispatch.complete_part",
    "before publishing in dispatch.complete_part",
    "before publishing in dispatch.send_notices",
]


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("away"), *SITES) as made:
        yield made


@pytest.fixture
def here(lent: Stage) -> Stage:
    """Lend the same processes to each test, all of them alive."""
    lent.revive()
    return lent


def test_a_broker_that_loses_everything(here: Stage, table: Table) -> None:
    job = here.submit(rounds=ROUNDS)
    for number in (BEGIN, BEGIN + 4):
        here.wait_round(job, number)
        here.broker.kill()
        here.broker.start()
    here.check(job)
    table.record("broker killed, and back with nothing", "in mid-round, twice")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("how", "mode"), [("refuses", "refuse"), ("does not answer", "hang")])
def test_a_broker_that_is_away(here: Stage, table: Table, away_seconds: float, how: str, mode: str) -> None:
    job = here.submit(rounds=ROUNDS)
    here.wait_round(job, BEGIN)
    getattr(here.broker_proxy, mode)()
    pass_time(away_seconds)
    here.broker_proxy.restore()
    here.check(job)
    table.record(f"broker {how} for {away_seconds:g} s", "in mid-round")


@pytest.mark.timeout(300)
def test_a_database_that_is_locked(here: Stage, table: Table, away_seconds: float) -> None:
    job = here.submit(rounds=ROUNDS)
    here.wait_round(job, BEGIN)
    with locked(here.made.folder / "fedchord.db"):
        pass_time(away_seconds)
    here.check(job)
    table.record(f"SQLite locked for {away_seconds:g} s", "in mid-round")


@pytest.mark.timeout(300)
def test_a_disk_of_the_coordinator_that_is_full(here: Stage, table: Table, away_seconds: float) -> None:
    job = here.submit(rounds=ROUNDS, config={"megabytes": 4})
    here.wait_round(job, BEGIN)
    here.coordinators["first"].fill_disk(MOST_BYTES)
    pass_time(away_seconds)
    here.coordinators["first"].fill_disk(None)
    here.check(job)
    table.record(f"coordinator's disk full for {away_seconds:g} s", "in mid-round")


def test_a_disk_of_a_site_that_is_full(here: Stage, table: Table) -> None:
    job = here.submit(rounds=ROUNDS, config={"megabytes": 4}, min_sites=1)
    here.wait_round(job, BEGIN)
    here.sites["beta"].fill_disk(MOST_BYTES)
    here.wait_round(job, BEGIN + 4)
    here.sites["beta"].fill_disk(None)
    here.check(job)
    table.record("a site's disk full", "in mid-round, the others are a quorum")


def test_a_disk_of_a_site_that_is_needed_is_full(here: Stage, table: Table) -> None:
    job = here.submit(rounds=ROUNDS, config={"megabytes": 4})
    here.wait_round(job, BEGIN)
    here.sites["beta"].fill_disk(MOST_BYTES)
    ended = here.made.wait(job.job_id, "completed", "failed")
    here.sites["beta"].fill_disk(None)
    assert re.search(r"beta failed: The disk of .* is full .*; free some space and try again", ended.reason)
    outcome = failed_at_once("“beta failed: The disk of … is full; free some space and try again.”")
    table.record("a site's disk full", "in mid-round, the site is needed for the quorum", outcome)


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_jumps(here: Stage, table: Table, hours: int) -> None:
    job = here.submit(rounds=ROUNDS, round_deadline_seconds=60)
    here.wait_round(job, BEGIN)
    here.coordinators["first"].set_clock(hours * 3600)
    here.wait_round(job, BEGIN + 4)
    here.coordinators["first"].set_clock(0)
    here.check(job)
    table.record(f"coordinator's clock jumps by {hours:+d} h, and back", "in mid-round, with a deadline of a minute")


@pytest.mark.timeout(300)
def test_a_coordinator_killed_an_hour_ahead_of_the_next_one(here: Stage, full: bool, seed: int, table: Table) -> None:
    """What it has recorded seems to be from the future to whoever goes on."""
    program = here.coordinators["first"]
    for point in AHEAD if full else random.Random(seed).sample(AHEAD, 2):
        program.set_clock(3600)
        job = here.submit(rounds=3)
        program.aim(point)
        program.wait_hit()
        program.set_clock(0)
        program.start()
        here.check(job)
        wait_until(partial(here.is_told, job), what="the notices to be sent")
        table.record("coordinator killed, and its clock then set back by 1 h", point)
