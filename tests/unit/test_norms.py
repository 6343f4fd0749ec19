"""How far an update is from the global model, and which updates stand out."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from common.errors import UpdateRejected
from coordinator.aggregation import shares
from coordinator.expected import moments_schema
from coordinator.norms import Distance, Measure, Reference, find_outliers
from examples.digits.partition import dirichlet_parts, load_examples
from store.folder import FolderStore
from store.tensors import Array
from store.weights import register_shards, store_weights

Tensors = Mapping[str, Array]
MANY = 150_001  # elements: more than two blocks, and a rest


@pytest.fixture
def blobs(tmp_path: Path) -> FolderStore:
    store = FolderStore(tmp_path / "blobs")
    store.prepare()
    return store


def measure(
    blobs: FolderStore,
    update: Tensors,
    model: Tensors,
    *,
    shard_bytes: int = 2**28,
    moments: bool = False,
) -> Distance:
    known = store_weights(blobs, model, 2**20)
    sent = store_weights(blobs, update, shard_bytes)
    schema = moments_schema(known.schema) if moments else known.schema
    with Reference(blobs, known, schema, moments=moments) as reference:
        measured = Measure(reference)
        register_shards(blobs, sent.shards, look=measured.look)
        return measured.distance()


def normal(count: int, dtype: Any, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(count).astype(dtype)


def norm(*arrays: Array) -> float:
    return math.sqrt(sum(float(np.sum(np.abs(array.astype(np.complex128)) ** 2)) for array in arrays))


@pytest.mark.parametrize(
    "dtype",
    [np.float32, np.float64, np.float16, np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn],
    ids=lambda dtype: np.dtype(dtype).name,
)
def test_the_distance_is_the_norm_of_the_difference_over_all_floating_tensors(blobs: FolderStore, dtype: Any) -> None:
    model = {"a": normal(MANY, dtype, 1), "b": normal(7, np.float32, 2), "n": np.arange(5)}
    update = {"a": normal(MANY, dtype, 3), "b": normal(7, np.float32, 4), "n": np.arange(5) + 100}
    found = measure(blobs, update, model)
    wide = {name: (update[name].astype(np.complex128), model[name].astype(np.complex128)) for name in ("a", "b")}
    assert found.update_norm == pytest.approx(norm(*(sent - known for sent, known in wide.values())), rel=1e-5)
    assert found.global_norm == pytest.approx(norm(*(known for _, known in wide.values())), rel=1e-5)
    assert not found.is_zero


def test_the_distance_does_not_depend_on_how_either_is_cut_into_shards(blobs: FolderStore) -> None:
    model = {f"t{number}": normal(50_000, np.float32, number) for number in range(30)}
    update = {name: values + np.float32(0.5) for name, values in model.items()}
    found = [measure(blobs, update, model, shard_bytes=size) for size in (1, 500_000, 2**28)]
    for each in found:
        assert each.update_norm == pytest.approx(0.5 * math.sqrt(30 * 50_000), rel=1e-6)
    assert found[0] == measure(blobs, update, model, shard_bytes=1)  # the same again, to the bit


def test_an_update_that_is_the_global_model_has_a_distance_of_nothing(blobs: FolderStore) -> None:
    model = {"w": normal(MANY, np.float32, 1), "empty": np.empty((0, 3), np.float32), "one": np.float64(3)}
    found = measure(blobs, model, model)
    assert found.update_norm == 0
    assert not found.is_zero


def test_a_model_of_zeros_is_seen_to_be_one_whatever_their_sign(blobs: FolderStore) -> None:
    model = {"w": normal(10, np.float32, 1), "n": np.array(3)}
    update = {"w": np.float32([0.0, -0.0] * 5), "n": np.array(4)}
    found = measure(blobs, update, model)
    assert found.is_zero
    assert found.update_norm == pytest.approx(found.global_norm)


def test_moments_are_held_against_those_of_weights_that_stand_still(blobs: FolderStore) -> None:
    model = {"w": normal(1000, ml_dtypes.bfloat16, 1), "second/x": normal(10, np.float64, 2), "n": np.arange(3)}
    wide = {name: model[name].astype(np.float32) for name in ("w", "second/x")}
    still = {f"first/{name}": values for name, values in wide.items()}
    still |= {f"second/{name}": values**2 for name, values in wide.items()}
    assert measure(blobs, still, model, moments=True).update_norm == 0
    moved = {**still, "second/w": still["second/w"] + 2}
    assert measure(blobs, moved, model, moments=True).update_norm == pytest.approx(2 * math.sqrt(1000))


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "is NaN"), (np.inf, "is infinite"), (-np.inf, "is infinite")],
    ids=["nan", "inf", "-inf"],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64])
@pytest.mark.parametrize("element", [0, MANY - 1])
def test_the_first_value_that_is_not_finite_is_named(
    blobs: FolderStore, value: float, said: str, dtype: Any, element: int
) -> None:
    update = {"a": normal(5, np.float32, 0), "w": normal(MANY, dtype, 1)}
    update["w"][element] = value
    with pytest.raises(UpdateRejected, match=f"Tensor 'w' is not finite: element {element} {said}"):
        measure(blobs, update, {"a": normal(5, np.float32, 0), "w": normal(MANY, dtype, 2)})


def test_finite_values_whose_squares_are_not_are_measured_all_the_same(blobs: FolderStore) -> None:
    model, update = {"w": np.full(4, -3e38, np.float32)}, {"w": np.full(4, 3e38, np.float32)}
    found = measure(blobs, update, model)
    assert found.update_norm == pytest.approx(1.2e39)
    assert found.global_norm == pytest.approx(6e38)


def test_a_distance_that_no_number_holds_is_refused(blobs: FolderStore) -> None:
    with pytest.raises(UpdateRejected, match="further from the global model than a number can say"):
        measure(blobs, {"w": np.full(4, 1e200)}, {"w": np.zeros(4)})


@pytest.mark.parametrize(
    "strange",
    [{"w": np.zeros(9, np.float32)}, {"w": np.zeros(3, np.float64)}, {"x": np.ones(3, np.float32)}],
    ids=["shape", "dtype", "name"],
)
def test_what_is_not_in_the_global_model_is_looked_at_but_not_measured(blobs: FolderStore, strange: Tensors) -> None:
    model = {"w": np.ones(3, np.float32)}
    assert measure(blobs, strange, model).update_norm == 0
    for values in strange.values():
        values[1] = np.nan
    with pytest.raises(UpdateRejected, match="element 1 is NaN"):
        measure(blobs, strange, model)


def test_a_file_of_the_global_model_is_opened_once_for_each_shard_of_an_update(
    blobs: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the tensors lie in the update's file: whoever sends it must not be able to make that slow."""
    model = {f"{number:03}": normal(1000, np.float32, number) for number in range(200)}
    known = store_weights(blobs, model, 40_000)
    assert len(known.shards) == 20
    sent = store_weights(blobs, {**model, "000": model["000"] * 2}, 2**28)
    opened: list[str] = []
    original = blobs.open
    monkeypatch.setattr(blobs, "open", lambda blob: opened.append(blob.digest) or original(blob))
    with ExitStack() as stack:
        reference = stack.enter_context(Reference(blobs, known, known.schema, moments=False))
        measured = Measure(reference)

        def look(file: Any, found: Mapping[str, Any]) -> None:
            shuffled = sorted(found, key=lambda name: name[::-1])
            measured.look(file, {name: found[name] for name in shuffled})

        register_shards(blobs, sent.shards, look=look)
    assert len(opened) == 20 + 1


def outliers(*norms: float, limit: float = 6.0, size: float = 1.0) -> list[int]:
    """Return the positions of those that stand out among updates of a global model of that norm."""
    found = find_outliers({str(position): (norm, size) for position, norm in enumerate(norms)}, limit)
    return sorted(int(name) for name in found)


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ((1.0, 1e6), [1]),
        ((1e6, 1.0, 1.2), [0]),
        ((1.0, 999.0), []),  # of two, nobody knows which one is wrong: a factor of 1000
        ((1.0, 1.1, 0.9, 1e6), [3]),
        ((1.0, 1.1, 0.9, 1.2, 0.8, 1e6, 1e6), [5, 6]),
        ((1.0,) * 9 + (1e6,), [9]),
        ((1.0,) * 9 + (99.0,), []),  # alike to the bit, but for one site with more data
        ((1.0,) * 9 + (101.0,), [9]),
        ((1.0,) * 6 + (1e6,) * 4, [6, 7, 8, 9]),  # a minority, however many of it
        ((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0), []),  # spread over two orders of magnitude
        ((1.0, 1.0, 1.0, 1e-9), []),  # too little harms nobody
        ((0.0, 0.0, 0.0, 5.0), []),  # three did not change the model: there is one norm
        ((0.0, 0.0, 5.0, 1e6), [3]),
        ((1e6,), []),
        ((), []),
    ],
)  # fmt: skip
def test_an_update_far_beyond_the_others_is_an_outlier(norms: tuple[float, ...], expected: list[int]) -> None:
    assert outliers(*norms) == expected


def test_who_moves_the_model_by_less_than_a_tenth_of_itself_is_no_outlier() -> None:
    """As when all sites but one have nothing left to learn."""
    learnt = (1e-6, 2e-6, 1e-6, 3e-6)
    assert outliers(*learnt, 0.09, size=1.0) == []
    assert outliers(*learnt, 0.11, size=1.0) == [4]
    assert outliers(*learnt, 0.09, size=0.0) == [4]  # a global model of zeros is moved by anything


def test_a_lower_limit_finds_more_and_none_finds_nothing() -> None:
    norms = (1.0,) * 9 + (11.0,)
    assert outliers(*norms, limit=3.0) == [9]
    assert outliers(*norms, limit=6.0) == []
    assert outliers(*(1.0,) * 9, 1e9, limit=0) == []
    assert outliers(1.0, 1e9, limit=0) == []


def test_the_reason_names_the_distance_the_median_the_score_and_the_setting() -> None:
    found = find_outliers({name: (norm, 1.0) for name, norm in zip("abcd", (1, 1, 1, 1e6), strict=True)}, 6.0)
    assert found == {
        "d": "The update is 1e+06 away from the global model, the median of the round's 4 is 1: its score is 18.0, and "
        "[gate] outlier_score is 6."
    }
    assert find_outliers({"a": (2.0, 1.0), "b": (3e6, 1.0)}, 6.0) == {
        "b": "The update is 3e+06 away from the global model, more than 1000 times the 2 that are the median of the "
        "round's 2."
    }


def _train(model: Tensors, images: Array, labels: Array, *, epochs: int, rng: np.random.Generator) -> dict[str, Array]:
    """Train a network of one hidden layer by stochastic gradient descent, as the example's torch trainer does."""
    w1, b1, w2, b2 = (model[name].astype(np.float64) for name in ("w1", "b1", "w2", "b2"))
    for _ in range(epochs):
        order = rng.permutation(len(labels))
        for start in range(0, len(order), 16):
            x, y = images[order[start : start + 16]], labels[order[start : start + 16]]
            hidden = np.maximum(x @ w1 + b1, 0)
            scores = hidden @ w2 + b2
            chances = np.exp(scores - scores.max(axis=1, keepdims=True))
            chances /= chances.sum(axis=1, keepdims=True)
            chances[np.arange(len(y)), y] -= 1
            chances /= len(y)
            back = (chances @ w2.T) * (hidden > 0)
            w2, b2 = w2 - 0.2 * hidden.T @ chances, b2 - 0.2 * chances.sum(axis=0)
            w1, b1 = w1 - 0.2 * x.T @ back, b1 - 0.2 * back.sum(axis=0)
    return {"w1": w1, "b1": b1, "w2": w2, "b2": b2}


@pytest.mark.parametrize("num_sites", [2, 3, 4, 10])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 100.0])
def test_honest_sites_with_little_in_common_are_never_outliers_and_a_liar_among_them_always(
    num_sites: int, alpha: float
) -> None:
    """Digits dealt out by Dirichlet(alpha): of 0.1, most sites have few classes, and some 50 times the data."""
    examples = load_examples()
    rng = np.random.default_rng([num_sites, int(10 * alpha)])
    parts = dirichlet_parts(examples.labels, num_parts=num_sites, alpha=alpha, rng=rng)
    model: dict[str, Array] = {
        "w1": rng.standard_normal((64, 32)) / 8, "b1": np.zeros(32), "w2": rng.standard_normal((32, 10)) / 6,
        "b2": np.zeros(10),
    }  # fmt: skip
    for _ in range(8):
        updates = [_train(model, examples.images[part], examples.labels[part], epochs=3, rng=rng) for part in parts]
        size = norm(*model.values())
        norms = [norm(*(update[name] - model[name] for name in model)) for update in updates]
        assert outliers(*norms, size=size) == [], norms
        norms[0] = norm(*(1e6 * updates[0][name] - model[name] for name in model))
        assert outliers(*norms, size=size) == [0]
        weights = shares([len(part) for part in parts])
        model = {
            name: np.asarray(sum(weight * update[name] for weight, update in zip(weights, updates, strict=True)))
            for name in model
        }
