"""The same job over every store and database, with real site processes: the model is the same to the bit."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.constant import NUM_TENSORS
from coordinator.jobs import JobState
from coordinator.submitting import submit
from tests.contract.postgres import PostgresServer
from tests.federation import Federation, federation
from tests.servers import S3Server, juicefs, seaweedfs

SITES = ("alpha", "beta")


def expected(rounds: int) -> np.float32:
    """Return the mean of both sites' constants, added so many times, in float32 as the coordinator computes it."""
    value = np.float32(0)
    for _ in range(rounds):
        total = np.float32(0)
        for site in SITES:
            constant = np.float32(int.from_bytes(hashlib.sha256(site.encode()).digest()[:2], "big") / 2**16)
            total += (value + constant) * np.float32(0.5)
        value = total
    return value


def s3_settings(server: S3Server, bucket: str) -> dict[str, Any]:
    return {
        "blob_store": "s3",
        "s3_endpoint": server.endpoint,
        "s3_access_key": server.access_key,
        "s3_secret_key": server.secret_key,
        "s3_secure": False,
        "s3_bucket": bucket,
    }


@pytest.fixture(params=["folder and sqlite", "seaweedfs", "juicefs", "postgresql"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Federation]:
    with ExitStack() as stack:
        settings: dict[str, Any] = {}
        if request.param == "seaweedfs":
            settings = s3_settings(stack.enter_context(seaweedfs()), "jobs")
        elif request.param == "juicefs":
            server = stack.enter_context(juicefs())
            settings = s3_settings(server, "jobs")
        elif request.param == "postgresql":
            settings = {"database_url": stack.enter_context(PostgresServer()).new_database()}
        yield stack.enter_context(federation(tmp_path, *SITES, cache_folder=str(tmp_path / "cache"), **settings))


def test_real_sites_train_over_every_store_and_database(made: Federation) -> None:
    with made.coordinator(), made.site("alpha"), made.site("beta"):
        spec = made.spec(rounds=3, test_every=1, config={"megabytes": 2}, min_sites=2)
        job = submit(made.services, spec)
        ended = made.wait(job.job_id, "completed", "failed", seconds=60)
    assert ended.state is JobState.COMPLETED, ended.reason
    model = made.model(job.job_id)
    assert len(model) == NUM_TENSORS
    assert {tensor.tobytes() for tensor in model.values()} == {np.full(62_500, expected(3), np.float32).tobytes()}


def test_a_model_of_several_shards_makes_the_trip(tmp_path: Path) -> None:
    with federation(tmp_path, *SITES, shard_megabytes=1) as made:
        with made.coordinator(), made.site("alpha"), made.site("beta"):
            job = submit(made.services, made.spec(rounds=2, config={"megabytes": 8}, min_sites=2))
            ended = made.wait(job.job_id, "completed", "failed", seconds=60)
        assert ended.state is JobState.COMPLETED, ended.reason
        assert {tensor.shape for tensor in made.model(job.job_id).values()} == {(250_000,)}
