"""Putting updates together: right numbers, whole integers, the same bits however the work is cut up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidInput, InvalidTensors
from coordinator import aggregation
from coordinator.aggregation import Contribution, Moments, aggregate, shares, weigh, weighted_metrics
from coordinator.strategies import STRATEGIES
from coordinator.strategies.base import Strategy
from coordinator.strategies.fedavg import FedAvg
from coordinator.strategies.fedmedian import FedMedian
from coordinator.strategies.optimizer import ServerOptimizer
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


@dataclass(frozen=True)
class Late:
    """An update that was trained from an earlier model than the round's."""

    update: Tensors
    base: Tensors
    staleness: int = 1
    num_examples: int = 1


def combine_late(
    current: Tensors, /, updates: Sequence[Late], strategy: Strategy | None = None, **options: Any
) -> Tensors:
    target = InMemory({name: np.zeros_like(tensor) for name, tensor in current.items()})
    contributions = [
        Contribution(
            update=InMemory(each.update),
            num_examples=each.num_examples,
            staleness=each.staleness,
            base=InMemory(each.base) if each.staleness else None,
        )
        for each in updates
    ]
    options = {"current": InMemory(current), **options}
    aggregate(strategy or FedAvg(), schema_of(current), contributions, target, **options)
    return target.tensors


def vector(*values: float) -> Tensors:
    return {"w": np.float32(values)}


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


@pytest.mark.parametrize(
    ("examples", "staleness", "discount", "weights"),
    [
        ([1, 3], [0, 0], 0.5, (0.25, 0.75)),
        ([1, 3], [3, 0], 0.5, (0.125, 0.75)),  # 1/4 / sqrt(1 + 3)
        ([1, 1], [1, 3], 1.0, (0.25, 0.125)),  # 1/2 / 2, 1/2 / 4
        ([1, 1], [1, 3], 0.0, (0.5, 0.5)),
    ],
)
def test_a_stale_update_weighs_less(
    examples: list[int], staleness: list[int], discount: float, weights: tuple[float, ...]
) -> None:
    assert weigh(examples, staleness, discount) == weights


@pytest.mark.parametrize(
    ("updates", "discount", "result"),
    [
        # current 10; one update of this round to 14, and one of three rounds ago that went from 2 to 6, so changed +4
        ([Late(vector(14), vector(), 0), Late(vector(6), vector(2), 3)], 0.0, 14),  # 10 + 4/2 + 4/2
        ([Late(vector(14), vector(), 0), Late(vector(6), vector(2), 3)], 0.5, 13),  # 10 + 4/2 + 4/2 / sqrt(4)
        ([Late(vector(14), vector(), 0), Late(vector(6), vector(2), 3)], 1.0, 12.5),  # 10 + 4/2 + 4/2 / 4
        ([Late(vector(6), vector(2), 3), Late(vector(14), vector(), 0)], 0.5, 13),  # in any place
        ([Late(vector(6), vector(2), 3)], 0.5, 12),  # 10 + 4 / sqrt(4): all are stale
        ([Late(vector(6), vector(2), 3, 3), Late(vector(6), vector(14), 1, 1)], 1.0, 9.75),  # 10 + 4*3/4/4 - 8/4/2
    ],
)  # fmt: skip
def test_a_stale_update_counts_with_what_it_changes(updates: list[Late], discount: float, result: float) -> None:
    assert combine_late(vector(10), updates, discount=discount)["w"].tolist() == [result]


def test_the_median_takes_a_stale_update_in_full_and_not_the_current_model() -> None:
    late = [Late(vector(6), vector(2), 5), Late(vector(20), vector(), 0), Late(vector(30), vector(), 0)]
    assert combine_late(vector(10), late, FedMedian(), discount=0.5)["w"].tolist() == [20]  # of 14, 20, 30


def test_whole_numbers_of_a_stale_update_are_taken_as_they_are() -> None:
    current, base = {"n": np.array([9, 9])}, {"n": np.array([5, 5])}
    late = [Late({"n": np.array([6, 8])}, base), Late({"n": np.array([7, 7])}, {}, 0)]
    assert combine_late(current, late, discount=0.5)["n"].tolist() == [7, 8]


def test_what_a_stale_update_changes_is_not_rounded_to_the_models_dtype() -> None:
    short = ml_dtypes.bfloat16  # of 8 bits: 256 + 1 is 256
    values = {name: {"w": np.array([value], short)} for name, value in (("u", 3), ("b", 2), ("g", 256))}
    late = [Late(values["u"], values["b"], 1), Late({"w": np.array([259], short)}, {}, 0)]
    assert late[1].update["w"][0] == 260  # 259 is rounded
    assert combine_late(values["g"], late)["w"][0] == 258  # (257 + 260) / 2, rounded once


def test_a_complex_tensor_of_a_stale_update_counts_by_parts() -> None:
    parts = {name: {"w": np.complex64([value])} for name, value in (("u", 3 + 4j), ("b", 1 + 1j), ("g", 10j))}
    assert combine_late(parts["g"], [Late(parts["u"], parts["b"])])["w"].tolist() == [2 + 13j]


def test_a_stale_update_that_leads_to_infinity_is_no_model() -> None:
    huge = [Late(vector(3e38), vector(-3e38))]
    with pytest.raises(InvalidTensors, match="'w' is not finite"):
        combine_late(vector(0), huge)


def test_a_stale_update_without_its_base_is_a_mistake() -> None:
    with pytest.raises(InvalidInput, match="needs the models that it starts from"):
        combine_late(vector(0), [Late(vector(1), vector(0))], current=None)


def bits_of(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(STRATEGIES)),
    examples=st.lists(st.integers(1, 10**9), min_size=1, max_size=5),
    staleness=st.lists(st.integers(0, 4), min_size=5, max_size=5),
    size=st.integers(1, 300),
    block=st.integers(1, 80),
    threads=st.integers(1, 3),
    is_first=st.booleans(),
)
def test_neither_blocks_nor_threads_change_a_bit_of_stale_updates_and_optimizers(
    name: str, examples: list[int], staleness: list[int], size: int, block: int, threads: int, is_first: bool
) -> None:
    late = [
        Late({"w": bits_of(10 + n, size)}, {"w": bits_of(20 + n, size)}, staleness[n], count)
        for n, count in enumerate(examples)
    ]
    strategy = STRATEGIES[name]()

    def made() -> dict[str, bytes]:
        after, before = InMemory({}), None
        moments = None
        if isinstance(strategy, ServerOptimizer):
            after = InMemory({f"{state}/w": np.empty(size, np.float32) for state in strategy.state_names})
            kept = InMemory({f"{state}/w": abs(bits_of(9, size)) for state in strategy.state_names})
            before = None if is_first else dict.fromkeys(strategy.state_names, kept)
            moments = Moments(before=before, after=after)
        model = combine_late({"w": bits_of(1, size)}, late, strategy, discount=0.5, moments=moments, threads=threads)
        return {key: value.tobytes() for key, value in (model | after.tensors).items()}

    whole = made()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregation, "BLOCK_ELEMENTS", block)
        assert made() == whole


@settings(max_examples=50, deadline=None)
@given(
    examples=st.lists(st.integers(1, 10**12), min_size=1, max_size=6),
    discount=st.floats(0, 4),
    has_current=st.booleans(),
)
def test_without_a_stale_update_the_discount_changes_no_bit(
    examples: list[int], discount: float, has_current: bool
) -> None:
    updates = [bits_of(number, 50) for number in range(len(examples))]
    late = [Late({"w": update}, {}, 0, count) for update, count in zip(updates, examples, strict=True)]
    options = {} if has_current else {"current": None}
    found = combine_late({"w": bits_of(99, 50)}, late, discount=discount, **options)["w"]
    assert found.tobytes() == reference(updates, examples).tobytes()


@settings(max_examples=50, deadline=None)
@given(
    examples=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    staleness=st.lists(st.integers(0, 20), min_size=6, max_size=6),
    discount=st.floats(0, 4),
)
def test_the_new_model_is_the_current_one_and_the_weighted_changes(
    examples: list[int], staleness: list[int], discount: float
) -> None:
    current = bits_of(1, 50)
    late = [
        Late({"w": bits_of(10 + n, 50)}, {"w": bits_of(20 + n, 50)}, staleness[n], count)
        for n, count in enumerate(examples)
    ]
    expected = current.astype(np.float64)
    for each, count in zip(late, examples, strict=True):
        base = each.base["w"] if each.staleness else current
        weight = count / sum(examples) * (1 + each.staleness) ** -discount
        expected += weight * (each.update["w"].astype(np.float64) - base)
    found = combine_late({"w": current}, late, discount=discount)["w"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


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
