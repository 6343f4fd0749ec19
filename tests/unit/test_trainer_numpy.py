"""The Trainer API itself, and a trainer without torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import Declined, InvalidSettings, InvalidTensors
from examples.digits.partition import partition
from examples.digits.sklearn_trainer import DigitsRegression
from worker.seeds import seeded
from worker.trainer import JobContext, RoundContext, check_tensors, derive_seed
from worker.trainers import Trainers


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    partition(folder, num_sites=2, alpha=100, seed=0)
    return folder


def regression(data: Path, **config: Any) -> DigitsRegression:
    context = JobContext(
        site=data.name,
        job_id="job",
        job_name="test",
        trainer="regression",
        config=config,
        seed=0,
        data=data,
        folder=data,
    )
    return DigitsRegression(context)


def test_a_scikit_learn_model_is_trained_from_the_global_model_on(digits: Path) -> None:
    trainer = regression(digits / "site-1", local_epochs=3)
    accuracies, tensors = [], trainer.build()
    for number in (1, 2):
        fit = trainer.fit(tensors, RoundContext(round=number, seed=number))
        tensors = fit.tensors
        evaluation = trainer.evaluate(tensors, RoundContext(round=number, seed=number))
        accuracies.append(evaluation.metrics["accuracy"])
    assert fit.num_examples == trainer.num_examples() == 543  # 80 % of about half of 1437
    assert evaluation.num_examples == 136
    assert {name: (array.shape, str(array.dtype)) for name, array in tensors.items()} == {
        "coef": ((10, 64), "float32"),
        "intercept": ((10,), "float32"),
    }
    assert 0.8 < accuracies[0] <= accuracies[1] + 0.03


def test_a_scikit_learn_part_gives_the_same_bits_at_any_time(digits: Path) -> None:
    step = RoundContext(round=1, seed=derive_seed(0, 1, "site-1"))
    trainer = regression(digits / "site-1")
    once = trainer.fit(trainer.build(), step).tensors
    trainer.fit(trainer.build(), RoundContext(round=2, seed=1))
    again = regression(digits / "site-1").fit(trainer.build(), step).tensors
    assert all(np.array_equal(once[name], again[name]) for name in once)


def test_a_trainer_without_moments_declines_them(digits: Path) -> None:
    trainer = regression(digits / "site-1")
    with pytest.raises(Declined, match="gives no moments"):
        trainer.moments(trainer.build(), RoundContext(round=1, seed=1))


def test_a_wrong_config_is_declined_by_the_key_s_name(digits: Path) -> None:
    with pytest.raises(Declined, match=r"local_epoch: Extra inputs.*its keys are local_epochs, learning_rate"):
        regression(digits / "site-1", local_epoch=3)


def test_the_trainer_api_and_the_site_import_no_torch() -> None:
    code = "import sys, worker.site, worker.heartbeat; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_seeds_of_parts_are_pinned_and_differ() -> None:
    assert derive_seed(0, 1, "alpha") == 9171047319387047579  # sha256("0/1/alpha"), first 8 bytes, halved
    seeds = {derive_seed(job, number, site) for job in (0, 1) for number in (1, 2) for site in ("alpha", "beta")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeded_random_numbers_repeat_and_the_process_s_own_go_on() -> None:
    np.random.seed(1)
    expected = np.random.random(2).tolist()
    np.random.seed(1)
    drawn = [np.random.random()]
    with seeded(2**62) as rng:
        first = (np.random.random(), rng.random())
    drawn.append(np.random.random())
    with seeded(2**62) as rng:
        assert (np.random.random(), rng.random()) == first
    assert drawn == expected


@pytest.mark.parametrize("tensors", [None, {}, [1], {"w": [1.0]}, {1: np.zeros(1)}])
def test_what_is_not_arrays_by_name_is_refused(tensors: object) -> None:
    with pytest.raises(InvalidTensors):
        check_tensors(tensors)


def test_numpy_scalars_are_0_d_tensors() -> None:
    assert check_tensors({"w": np.float32(2)})["w"].shape == ()


# --- the list of trainers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere_to_be_found:Trainer", "names a module that is not there"),
        ("nowhere.to_be_found:Trainer", "cannot be found"),
        ("examples.digits.trainer", "is not 'module:Class'"),
        ("examples.digits.trainer:", "is not 'module:Class'"),
        (":DigitsTrainer", "is not 'module:Class'"),
    ],
)
def test_a_wrong_path_is_told_at_the_start(path: str, message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        Trainers({"mine": path}).check()


def test_a_trainer_that_cannot_be_imported_is_declined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_trainer.py").write_text("import module_that_is_not_there\n")
    (tmp_path / "other_thing.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    trainers = Trainers({"broken": "broken_trainer:T", "thing": "other_thing:Thing", "gone": "other_thing:Gone"})
    trainers.check()
    with pytest.raises(Declined, match=r"cannot be imported at this site \(ModuleNotFoundError\)"):
        trainers.load("broken")
    with pytest.raises(Declined, match="is not a subclass"):
        trainers.load("thing")
    with pytest.raises(Declined, match="AttributeError"):
        trainers.load("gone")
    with pytest.raises(Declined, match=r"'other' is not on this site's list \(broken, gone, thing\)"):
        trainers.load("other")
    trainers.warm_up()  # tells the log, and nobody else
