"""Putting updates together: right numbers, whole integers, the same bits however the work is cut up."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import aggregation
from coordinator.aggregation import Contribution, aggregate, shares, weighted_metrics
from coordinator.strategies import STRATEGIES
from coordinator.strategies.base import Strategy
from coordinator.strategies.fedavg import FedAvg
from coordinator.strategies.fedmedian import FedMedian
from store.tensors import schema_of

Tensors = Mapping[str, np.ndarray]


class InMemory:
    """A model in memory that is read and written in pieces."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = dict(tensors)

    def read(self, name: str, start: int, out: np.ndarray) -> None:
        out[:] = self.tensors[name].reshape(-1)[start : start + out.size]

    def write(self, name: str, start: int, block: np.ndarray) -> None:
        self.tensors[name].reshape(-1)[start : start + block.size] = block


def combine(updates: list[Tensors], examples: list[int], strategy: Strategy | None = None, **options: Any) -> Tensors:
    target = InMemory({name: np.zeros_like(tensor) for name, tensor in updates[0].items()})
    contributions = [
        Contribution(update=InMemory(update), num_examples=count)
        for update, count in zip(updates, examples, strict=True)
    ]
    aggregate(strategy or FedAvg(), schema_of(updates[0]), contributions, target, **options)
    return target.tensors


def reference(updates: list[np.ndarray], examples: list[int]) -> np.ndarray:
    """FedAvg as one would write it down: a sum of products in float32, in order."""
    total = np.zeros(updates[0].shape, np.float32)
    for update, weight in zip(updates, shares(examples), strict=True):
        total += update.astype(np.float32) * np.float32(weight)
    return total.astype(updates[0].dtype)


def test_the_mean_is_weighted_by_examples() -> None:
    result = combine([{"w": np.float32([1, 2])}, {"w": np.float32([4, 8])}], [1, 2])
    assert result["w"].tolist() == [3, 6]  # (1*1 + 2*4) / 3, (1*2 + 2*8) / 3


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_short_floats_are_summed_in_float32_and_rounded_once(dtype: Any) -> None:
    generator = np.random.default_rng(0)
    updates = [generator.standard_normal((3, 5)).astype(dtype) for _ in range(4)]
    result = combine([{"w": update} for update in updates], [1, 2, 3, 4])
    np.testing.assert_array_equal(result["w"], reference(updates, [1, 2, 3, 4]))


def test_float64_keeps_its_precision() -> None:
    result = combine([{"w": np.float64([1.0])}, {"w": np.float64([1.0 + 2**-40])}], [1, 1])
    assert result["w"][0] == 1.0 + 2**-41


def test_a_complex_tensor_is_averaged_by_parts() -> None:
    result = combine([{"w": np.complex64([1 + 4j])}, {"w": np.complex64([3 + 0j])}], [1, 1])
    assert result["w"][0] == 2 + 2j


def test_integers_and_booleans_are_not_averaged_into_nonsense() -> None:
    first = {"count": np.array(7), "mask": np.array([True, False]), "u": np.uint8([250])}
    second = {"count": np.array(3), "mask": np.array([False, False]), "u": np.uint8([251])}
    result = combine([first, second], [1, 100])
    assert result["count"] == 7
    assert result["mask"].tolist() == [True, False]
    assert result["u"].tolist() == [251]


def test_scalars_and_empty_tensors_pass() -> None:
    result = combine([{"s": np.float32(1), "e": np.empty((0, 3), np.float32)}] * 2, [1, 1])
    assert result["s"].shape == ()
    assert result["s"] == 1
    assert result["e"].shape == (0, 3)


@pytest.mark.parametrize("name", STRATEGIES)
def test_neither_blocks_nor_threads_change_a_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    updates: list[Tensors] = [{"w": generator.standard_normal(1000).astype(np.float32)} for _ in range(5)]
    strategy = STRATEGIES[name]()
    whole = combine(updates, [3, 1, 4, 1, 5], strategy, threads=1)["w"]
    monkeypatch.setattr(aggregation, "BLOCK_ELEMENTS", 17)
    cut = combine(updates, [3, 1, 4, 1, 5], strategy, threads=3)["w"]
    assert whole.tobytes() == cut.tobytes()


def test_the_median_is_taken_for_each_coordinate_and_one_wild_update_does_not_move_it() -> None:
    updates: list[Tensors] = [{"w": np.float32(values)} for values in ([1, 5], [2, 4], [1e30, -1e30])]
    assert combine(updates, [1, 1, 10**6], FedMedian())["w"].tolist() == [2, 4]


@settings(max_examples=50)
@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=50))
def test_the_shares_add_up_to_one(examples: list[int]) -> None:
    assert sum(shares(examples)) == pytest.approx(1)


def test_metrics_are_weighted_and_what_is_missing_is_not_zero() -> None:
    metrics = [{"accuracy": 0.5, "loss": 2.0}, {"accuracy": 0.8, "loss": None}, {}]
    assert weighted_metrics(metrics, [1, 2, 7]) == {"accuracy": pytest.approx(0.7), "loss": 2.0}


def test_the_pinned_average_of_a_fixed_seed() -> None:
    generator = np.random.default_rng(42)
    updates: list[Tensors] = [{"w": generator.standard_normal(4).astype(np.float32)} for _ in range(3)]
    assert combine(updates, [10, 20, 30])["w"].view(np.uint32).tolist() == PINNED


PINNED = [3206259515, 3213121342, 1058766274, 1054959480]  # float32 bits, computed by `reference`


def test_a_metric_that_overflows_has_no_mean() -> None:
    assert weighted_metrics([{"a": 1e308, "b": 1.0}, {"a": 1.0, "b": 3.0}], [100, 100]) == {"b": 2.0}
