"""Rounds through a real Valkey and a real coordinator process, with sites that follow a script."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.messages import ModelTestRound, TrainingFinished, UpdateRoundStart
from coordinator.jobs import JobState
from coordinator.submitting import submit
from tests.federation import Federation, federation


@pytest.fixture
def two_sites(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path, "alpha", "beta") as made:
        yield made


def test_a_job_trains_tests_and_finishes(two_sites: Federation) -> None:
    first = {"w": np.zeros(3, np.float32), "n": np.array(0, np.int64)}
    alpha, beta = two_sites.sites["alpha"], two_sites.sites["beta"]
    with two_sites.coordinator():
        job = submit(two_sites.services, two_sites.spec(test_every=1))
        alpha.start(first)
        beta.start(first)
        for site, value, examples in ((alpha, 1.0, 1), (beta, 4.0, 2)):
            message = site.receive()
            assert isinstance(message, UpdateRoundStart)
            assert site.tensors(message)["w"].tolist() == [0, 0, 0]
            update = {"w": np.full(3, value, np.float32), "n": np.array(int(value), np.int64)}
            site.answer(message, update, num_examples=examples, metrics={"train_loss": value})
        for site, accuracy, examples in ((alpha, 0.5, 1), (beta, 0.8, 2)):
            message = site.receive()
            assert isinstance(message, ModelTestRound)
            assert site.tensors(message)["w"].tolist() == [3, 3, 3]  # (1*1 + 2*4) / 3
            site.answer(message, num_examples=examples, metrics={"accuracy": accuracy})
        finished = alpha.receive()
        assert isinstance(finished, TrainingFinished)
        assert finished.state == "completed"
    assert two_sites.job(job.job_id).state is JobState.COMPLETED
    model = two_sites.model(job.job_id)
    assert model["w"].tolist() == [3, 3, 3]
    assert model["n"] == 4  # a counter is not averaged
