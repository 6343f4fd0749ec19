"""A large model comes over a slow link that is cut again and again, both ways."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.stages import Stage, stage
from tests.chaos.table import Table

SITES = ("alpha", "beta")
ROUNDS = 1


@pytest.fixture
def here(tmp_path: Path, full: bool, seed: int) -> Iterator[Stage]:
    with stage(
        tmp_path, *SITES, services=True, seed=seed, shard_megabytes=16 if full else 4, initial_shards=64
    ) as made:
        yield made


@pytest.mark.timeout(1800)
def test_a_large_model_over_a_slow_link_that_is_cut_arrives(here: Stage, full: bool, table: Table) -> None:
    store = here.store_proxy
    assert store is not None
    megabytes, cut_megabytes, rate = (758, 40, 60) if full else (60, 15, 60)
    store.degrade(bytes_per_second=rate * 1e6, cut_after_bytes=cut_megabytes * 10**6)
    job = here.submit(rounds=ROUNDS, config={"megabytes": megabytes, "tensors": 64})
    here.made.wait(job.job_id, "completed", "failed", seconds=1500)
    store.restore()  # who checks reads it, too
    here.check(job)
    assert store.cuts >= 5 * megabytes // cut_megabytes // 2
    assert store.bytes > 5 * megabytes * 10**6
    table.record(
        f"a link of {rate} MB/s that is cut about every {cut_megabytes} MB, a model of {megabytes} MB",
        "always, both ways",
    )
