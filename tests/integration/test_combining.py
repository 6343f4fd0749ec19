"""What a round's model is made of, by its records: late updates, and what a server optimizer keeps."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import InvalidTensors, NotFound
from coordinator.combining import OPTIMIZER, Made, make_model
from coordinator.jobs import Job, new_job
from coordinator.parts import Part
from coordinator.rounds import Round
from coordinator.states import PartState, RoundKind
from coordinator.strategies import STRATEGIES
from coordinator.verifying import Result, verify
from store.database import writing
from store.models import ModelInfo, ModelState, add_model, delete_model, latest_model
from store.tables import utc_now
from store.weights import store_weights
from tests.federation import Federation, Tensors, federation, read_model


@dataclass
class Bench:
    """A job whose rounds are put together by hand."""

    made: Federation
    job: Job
    current: ModelInfo
    parts: dict[tuple[str, int], Part] = field(default_factory=dict)  # of each site and round

    def keep(self, tensors: Tensors, **facts: Any) -> ModelInfo:
        """Record a model of the job."""
        weights = store_weights(self.made.services.blobs, tensors, self.made.services.settings.shard_bytes)
        digest, size = weights.index.digest, weights.size
        values = {"store": self.job.model_store, "job_id": self.job.job_id, "shards": weights.shards, **facts}
        with writing(self.made.services.engine) as connection:
            return add_model(connection, ModelInfo(model_hash=digest, index_hash=digest, model_size=size, **values))

    def update(self, site: str, number: int, *values: float, num_examples: int = 1) -> Part:
        """Record a site's update of the round, trained from what is the current model now."""
        update = self.keep(
            {"w": np.float32(values), "n": np.array(number)},
            model_kind="update",
            model_state=ModelState.FEEDBACKED,
            site=site,
            round=number,
            parents=(self.current.model_id,),
            num_examples=num_examples,
        )
        part = Part(
            job_id=self.job.job_id,
            round_id=f"{self.job.job_id}.train.{number}",
            site=site,
            position=0,
            state=PartState.ACCEPTED,
            num_examples=num_examples,
            model_id=update.model_id,
        )
        self.parts[site, number] = part
        return part

    def make(self, number: int, *parts: Part, kind: RoundKind = RoundKind.TRAIN) -> Made:
        """Return what comes of the round."""
        round_ = Round(
            job_id=self.job.job_id,
            kind=kind,
            number=number,
            input_model_id=self.current.model_id,
            deadline_at=utc_now() + timedelta(hours=1),
        )
        made = make_model(self.made.services, self.job, round_, parts)
        assert made is not None
        return made

    def go_on(self, made: Made) -> ModelInfo:
        """Record what has come of a round, as the coordinator does."""
        with writing(self.made.services.engine) as connection:
            for each in (*made.also, made.model):
                self.current = add_model(connection, each)
        return self.current

    def train(self, number: int, *values: float) -> ModelInfo:
        """Do a round with one site."""
        return self.go_on(self.make(number, self.update("alpha", number, *values)))

    def value(self, model: ModelInfo, name: str = "w") -> list[float]:
        """Return the numbers of one of the model's tensors."""
        found: list[float] = read_model(self.made.services, model)[name].tolist()
        return found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("combining")) as made:
        yield made


def start(made: Federation, strategy: str = "fedavg", model: ModelInfo | None = None, **options: Any) -> Bench:
    """Begin a job, from a model of zeros or from the given one."""
    spec = made.spec(strategy={"name": strategy, **options}, sites=("alpha", "beta", "gamma"))
    job = new_job(spec, sites=("alpha", "beta", "gamma"), model_id=None, submitted_by="test")
    bench = Bench(made=made, job=job, current=model)  # type: ignore[arg-type]
    if model is None:
        bench.current = bench.keep({"w": np.zeros(2, np.float32), "n": np.array(0)}, model_kind="initial", site="alpha")
    return bench


def test_a_late_update_counts_in_the_next_round_and_the_record_says_so(running: Federation) -> None:
    bench = start(running)
    late = bench.update("beta", 1, 4, 8)  # it was trained from zeros
    bench.train(1, 1, 1)
    model = bench.go_on(bench.make(2, bench.update("alpha", 2, 3, 3), late))
    half = np.float32(0.5 * 2**-0.5)  # of the examples, one round ago
    left = np.float32(1 - (0.5 + 0.5 * 2**-0.5))
    expected = np.float32([3, 3]) * np.float32(0.5) + np.float32([5, 9]) * half + np.float32([1, 1]) * left
    assert bench.value(model) == expected.tolist()
    assert bench.value(model, "n") == 2
    assert model.model_meta["sites"] == ["alpha", "beta"]
    assert (model.model_meta["staleness"], model.model_meta["discount"]) == ([0, 1], 0.5)
    (verdict,) = verify(running.services, model.model_id)
    assert (verdict.result, verdict.updates) == (Result.SAME, 2)


def test_updates_of_one_site_and_several_rounds_count_in_a_fixed_order(running: Federation) -> None:
    bench = start(running, "fedadam")
    old = [bench.update("gamma", 1, 0.3, 7), bench.update("beta", 1, 0.7, 9)]
    bench.train(1, 1, 2)
    old.append(bench.update("gamma", 2, 0.1, 0.9))
    bench.train(2, 5, 3)
    new = [bench.update("alpha", 3, 0.2, 1), bench.update("gamma", 3, 0.6, 1, num_examples=3)]
    made = [bench.make(3, *parts) for parts in itertools.permutations([*old, *new], 5)]
    assert len({(each.model.model_hash, each.also[0].model_hash) for each in made}) == 1
    model = bench.go_on(made[0])
    assert model.model_meta["sites"] == ["alpha", "beta", "gamma", "gamma", "gamma"]
    assert model.model_meta["staleness"] == [0, 2, 2, 1, 0]
    (verdict,) = verify(running.services, model.model_id)
    assert (verdict.result, verdict.updates) == (Result.SAME, 5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_of_late_updates_is_recomputed_to_the_bit(running: Federation, strategy: str) -> None:
    bench = start(running, strategy)
    late = [bench.update("beta", 1, 0.3, 7), bench.update("gamma", 1, 0.7, 9)]
    bench.train(1, 1, 2)
    model = bench.go_on(bench.make(2, *late))
    assert model.model_meta["staleness"] == [1, 1]
    (verdict,) = verify(running.services, model.model_id)
    assert verdict.result is Result.SAME, verdict


def test_a_round_without_a_late_update_records_no_staleness(running: Federation) -> None:
    model = start(running).train(1, 1, 1)
    assert model.model_meta.keys() == {"trainer", "strategy", "sites"}


def test_the_model_that_a_late_update_was_trained_from_is_needed_to_verify(running: Federation) -> None:
    bench = start(running)
    bench.train(1, 0, 1)
    base, late = bench.current, bench.update("beta", 2, 4, 8)
    bench.train(2, 1, 1)
    model = bench.go_on(bench.make(3, late))
    with writing(running.services.engine) as connection:
        delete_model(connection, base.model_id)
    (verdict,) = verify(running.services, model.model_id)
    assert verdict.result is Result.MISSING
    assert verdict.troubles == (f"The model that beta trained ({base.model_id}) was deleted.",)


@pytest.mark.parametrize("discount", ["none", -1, 1e9])
def test_a_discount_that_is_none_is_told(running: Federation, discount: object) -> None:
    bench = start(running)
    late = bench.update("beta", 1, 4, 8)
    bench.train(1, 1, 1)
    made = bench.make(2, late)
    forged = replace(made.model, model_meta={**made.model.model_meta, "discount": discount})
    model = bench.go_on(replace(made, model=forged))
    (verdict,) = verify(running.services, model.model_id)
    assert verdict.result is Result.DIFFERENT
    assert "names the discount" in verdict.troubles[0]


def test_the_optimizers_state_goes_on_from_round_to_round(running: Federation) -> None:
    bench = start(running, "fedavgm", momentum=0.5)
    first = bench.train(1, 4, 0)  # velocity 4
    second = bench.train(2, 5, 0)  # 4/2 + 1
    assert [bench.value(first), bench.value(second)] == [[4, 0], [7, 0]]
    with writing(running.services.engine) as connection:
        kept = latest_model(connection, job_id=bench.job.job_id, kind=OPTIMIZER)
        newest = latest_model(connection, job_id=bench.job.job_id)
        aggregated = latest_model(connection, job_id=bench.job.job_id, state=ModelState.AGGREGATED)
    assert kept is not None
    assert newest == aggregated == second  # who asks for the newest is not given an optimizer's moments
    assert bench.value(kept, "velocity/w") == [3, 0]
    assert kept.parents == (first.model_meta[OPTIMIZER]["model_id"], first.model_id)
    assert second.model_meta[OPTIMIZER] == {
        "model_id": kept.model_id,
        "digest": kept.model_hash,
        "strategy": "fedavgm",
    }


def test_a_job_that_starts_from_a_stored_model_goes_on_with_its_moments(running: Federation) -> None:
    stored = start(running, "fedavgm").train(1, 4, 0)
    bench = start(running, "fedavgm", stored, momentum=0.25)
    assert bench.value(bench.train(1, 5, 0)) == [6, 0]  # velocity 4/4 + 1
    other = start(running, "fedadam", stored)
    anew = start(running, "fedadam", start(running, "fedavg").train(1, 4, 0))
    assert other.train(1, 5, 0).model_hash == anew.train(1, 5, 0).model_hash


def test_what_a_model_that_somebody_has_put_says_of_an_optimizer_is_not_believed(running: Federation) -> None:
    bench = start(running, "fedavgm")
    recorded = bench.train(1, 4, 0).model_meta[OPTIMIZER]
    bench.current = bench.keep(
        {"w": np.zeros(2, np.float32), "n": np.array(0)}, job_id=None, model_meta={OPTIMIZER: recorded}
    )
    assert bench.value(bench.train(2, 1, 0)) == [1, 0]


def test_moments_of_the_weights_are_averaged_and_take_no_step(running: Federation) -> None:
    bench = start(running, "fedadam")
    parts = [bench.update(site, 1, value, 0) for site, value in (("alpha", 1), ("beta", 3))]
    made = bench.make(1, *parts, kind=RoundKind.SWAG)
    assert made.also == ()
    assert bench.value(made.model) == [2, 0]


def test_a_state_that_was_deleted_ends_the_job_rather_than_begin_at_zero(running: Federation) -> None:
    bench = start(running, "fedadam")
    kept = bench.train(1, 4, 0).model_meta[OPTIMIZER]["model_id"]
    with writing(running.services.engine) as connection:
        delete_model(connection, kept)
    with pytest.raises(NotFound, match=kept):
        bench.train(2, 5, 0)


def test_a_state_of_other_tensors_is_not_taken(running: Federation) -> None:
    bench = start(running, "fedavgm")
    kept = bench.keep({"velocity/x": np.zeros(2, np.float32)})
    named = {OPTIMIZER: {"model_id": kept.model_id, "digest": kept.model_hash, "strategy": "fedavgm"}}
    bench.current = bench.keep({"w": np.zeros(2, np.float32), "n": np.array(0)}, model_meta=named)
    with pytest.raises(InvalidTensors, match="is not what the strategy's optimizer keeps"):
        bench.train(1, 1, 0)


def test_making_a_model_again_gives_the_same_bits(running: Federation, tmp_path: Path) -> None:
    bench = start(running, "fedyogi")
    bench.train(1, 4, 0)
    part = bench.update("beta", 2, 3, 2)
    first, again = bench.make(2, part), bench.make(2, part)
    assert first.model.model_hash == again.model.model_hash
    assert first.also[0].model_hash == again.also[0].model_hash
