"""The digits example's split: seeded, disjoint, complete, uneven."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from examples.digits.baselines import centralized_accuracy, local_only_accuracies, model_accuracy
from examples.digits.partition import (
    MIN_EXAMPLES,
    Examples,
    dirichlet_parts,
    load_examples,
    main,
    partition,
    site_names,
)


def read_all(folder: Path) -> dict[str, Examples]:
    return {str(file.relative_to(folder)): Examples.load(file) for file in sorted(folder.rglob("*.npz"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("digits")
    partition(made, num_sites=10, alpha=0.5, seed=0)
    return made


def test_every_digit_is_in_one_place_and_none_is_lost(folder: Path) -> None:
    parts = read_all(folder)
    assert len(parts) == 1 + 2 * 10
    assert len(parts["heldout.npz"].labels) == 360
    placed = np.concatenate([np.column_stack([part.images, part.labels]) for part in parts.values()])
    everything = load_examples()
    expected = np.column_stack([everything.images, everything.labels])
    assert sorted(map(bytes, placed)) == sorted(map(bytes, expected))


def test_the_held_out_test_set_has_all_classes_alike(folder: Path) -> None:
    counts = np.bincount(read_all(folder)["heldout.npz"].labels)
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_sites_differ_in_their_classes_and_each_has_enough(folder: Path) -> None:
    parts = read_all(folder)
    shares = []
    for name in site_names(10):
        train, test = parts[f"{name}/train.npz"], parts[f"{name}/test.npz"]
        assert len(train.labels) + len(test.labels) >= MIN_EXAMPLES
        assert len(test.labels) == max(1, round(0.2 * (len(train.labels) + len(test.labels))))
        shares.append(np.bincount(train.labels, minlength=10).max() / len(train.labels))
    assert np.mean(shares) > 0.25  # alike, they would have 0.1 of each class


def test_the_same_seed_gives_the_same_files_and_another_one_others(folder: Path, tmp_path: Path) -> None:
    partition(tmp_path / "same", num_sites=10, alpha=0.5, seed=0)
    partition(tmp_path / "other", num_sites=10, alpha=0.5, seed=1)
    expected = read_all(folder)
    assert {name: part.labels.tolist() for name, part in read_all(tmp_path / "same").items()} == {
        name: part.labels.tolist() for name, part in expected.items()
    }
    assert read_all(tmp_path / "other")["heldout.npz"].labels.tolist() != expected["heldout.npz"].labels.tolist()


def test_images_are_pixels_from_0_to_1(folder: Path) -> None:
    train = read_all(folder)["site-1/train.npz"]
    assert (str(train.images.dtype), str(train.labels.dtype)) == ("float32", "int64")
    assert train.images.shape[1:] == (64,)
    assert 0 <= train.images.min() < train.images.max() <= 1


@pytest.mark.parametrize(("num_parts", "alpha"), [(0, 0.5), (11, 0.5), (2, 0.0)])
def test_an_impossible_split_is_refused(num_parts: int, alpha: float) -> None:
    with pytest.raises(ValueError, match="Cannot split 100 examples"):
        dirichlet_parts(np.zeros(100, np.int64), num_parts=num_parts, alpha=alpha, rng=np.random.default_rng(0))


def test_the_command_tells_what_each_site_has(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--sites", "2", "--alpha", "100", "--folder", str(tmp_path)])
    assert result.exit_code == 0
    assert result.output.splitlines()[0].startswith("site-1: 5")
    refused = CliRunner().invoke(main, ["--sites", "500", "--folder", str(tmp_path / "b")])
    assert refused.exit_code == 1
    assert "1 to 143 parts" in refused.output
    assert not (tmp_path / "b" / "site-1").exists()


def test_baselines_order_as_federated_learning_expects(tmp_path: Path) -> None:
    partition(tmp_path, num_sites=3, alpha=0.5, seed=0)
    config = {"batch_size": 32, "learning_rate": 0.1, "momentum": 0.9, "hidden": 16}
    chosen: dict[str, Any] = {"config": config, "rounds": 6, "seed": 0}
    local = local_only_accuracies(tmp_path, **chosen)
    assert list(local) == ["site-1", "site-2", "site-3"]
    assert max(local.values()) < centralized_accuracy(tmp_path, **chosen)
    untrained = {"0.weight": np.zeros((16, 64)), "0.bias": np.zeros(16), "2.weight": np.zeros((10, 16))}
    untrained["2.bias"] = np.eye(10)[3]  # always says 3
    tensors = {name: array.astype(np.float32) for name, array in untrained.items()}
    expected = np.mean(Examples.load(tmp_path / "heldout.npz").labels == 3)
    assert model_accuracy(tmp_path, tensors, config=config) == pytest.approx(expected)
