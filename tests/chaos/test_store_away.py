"""PostgreSQL and the S3 store are away, answer 503 or are slow for a while: everybody waits and goes on."""

from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Proxy
from tests.chaos.stages import Stage, pass_time, stage
from tests.chaos.table import Table

SITES = ("alpha", "beta")
ROUNDS = 11
BEGIN = 4  # the round in which the fault begins

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("away"), *SITES, services=True) as made:
        yield made


@pytest.fixture
def here(lent: Stage) -> Stage:
    """Lend the same processes to each test, all of them alive."""
    lent.revive()
    return lent


@pytest.fixture
def store(here: Stage) -> Proxy:
    """Lend what stands before the S3 store."""
    assert here.store_proxy is not None
    return here.store_proxy


def test_a_database_that_is_killed_and_comes_back(here: Stage, table: Table, away_seconds: float) -> None:
    assert here.postgres is not None
    job = here.submit(rounds=ROUNDS)
    here.wait_round(job, BEGIN)
    here.postgres.kill()
    pass_time(away_seconds)
    here.postgres.start_again()
    here.check(job)
    table.record(f"PostgreSQL killed, and back after {away_seconds:g} s", "in mid-round")


@pytest.mark.parametrize(("how", "mode"), [("refuses", "refuse"), ("hangs", "hang"), ("answers 503", "answer_503")])
def test_a_store_that_is_away(
    here: Stage, store: Proxy, table: Table, away_seconds: float, how: str, mode: str
) -> None:
    job = here.submit(rounds=ROUNDS, config={"megabytes": 2})
    here.wait_round(job, BEGIN)
    getattr(store, mode)()
    pass_time(away_seconds)
    store.restore()
    here.check(job)
    table.record(f"object store {how} for {away_seconds:g} s", "in mid-round")


def test_a_store_that_is_away_then_broken_then_slow(
    here: Stage, store: Proxy, table: Table, away_seconds: float
) -> None:
    job = here.submit(rounds=ROUNDS, config={"megabytes": 2})
    here.wait_round(job, BEGIN)
    store.refuse()
    pass_time(away_seconds)
    store.answer_503()
    pass_time(away_seconds)
    store.degrade(bytes_per_second=8e6)
    here.wait_round(job, BEGIN + 3, seconds=100)
    store.restore()
    here.check(job)
    table.record(f"object store away for {away_seconds:g} s, then 503 for as long, then slow", "in mid-round")
