"""Server optimizers: their arithmetic, to the bit, and the moments that they keep."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidInput, InvalidTensors
from coordinator.aggregation import Contribution, Moments, aggregate, state_schema
from coordinator.strategies import STRATEGIES, make_strategy
from coordinator.strategies.fedadagrad import FedAdagrad
from coordinator.strategies.fedadam import FedAdam
from coordinator.strategies.fedavg import FedAvg
from coordinator.strategies.fedavgm import FedAvgM
from coordinator.strategies.fedyogi import FedYogi
from coordinator.strategies.optimizer import ServerOptimizer
from store.tensors import numpy_dtype, schema_of
from tests.unit.test_aggregation import InMemory, Tensors

OPTIMIZERS = sorted(name for name, strategy in STRATEGIES.items() if issubclass(strategy, ServerOptimizer))


def step(
    optimizer: ServerOptimizer, current: Tensors, updates: Sequence[Tensors], before: Tensors | None = None
) -> tuple[Tensors, Tensors]:
    """Return the new model and the new state."""
    schema = schema_of(current)
    kept_schema = state_schema(optimizer, schema)
    after = {name: np.empty(spec.shape, numpy_dtype(spec.dtype)) for name, spec in kept_schema.items()}
    target, kept = InMemory({name: np.zeros_like(tensor) for name, tensor in current.items()}), InMemory(after)
    readers = None if before is None else dict.fromkeys(optimizer.state_names, InMemory(before))
    aggregate(
        optimizer,
        schema,
        [Contribution(update=InMemory(update), num_examples=1) for update in updates],
        target,
        current=InMemory(current),
        moments=Moments(before=readers, after=kept),
    )
    return target.tensors, kept.tensors


def vector(value: float) -> Tensors:
    return {"w": np.float32([value])}


@pytest.mark.parametrize(
    ("optimizer", "changes", "models", "states"),
    [
        (  # velocity: 4, then 4/2 + 1
            FedAvgM(momentum=0.5, server_learning_rate=2),
            [4, 1],
            [8, 14],
            [{"velocity": 4}, {"velocity": 3}],
        ),
        (FedAvgM(momentum=0), [4, 1], [4, 5], [{"velocity": 4}, {"velocity": 1}]),  # FedAvg
        (  # 3 / (sqrt(9) + 1), then 4 / (sqrt(9 + 16) + 3)
            FedAdagrad(server_learning_rate=1, tau=1),
            [3, 4],
            [3 / 4, np.float32(3 / 4) + np.float32(4) / np.float32(6)],
            [{"first": 3, "second": 9}, {"first": 4, "second": 25}],
        ),
        (  # first 4/2, second 16/4: 2 * 2 / (2 + 2); then first 2/2 + 2/2, second 4*3/4 + 4/4: 2 * 2 / (2 + 2)
            FedAdam(server_learning_rate=2, beta_1=0.5, beta_2=0.75, tau=2),
            [4, 2],
            [1, 2],
            [{"first": 2, "second": 4}, {"first": 2, "second": 4}],
        ),
        (  # as FedAdam at first; then 4 > 1, so second is 4 - 1/4
            FedYogi(server_learning_rate=2, beta_1=0.5, beta_2=0.75, tau=2),
            [4, 1],
            [1, np.float32(1) + np.float32(1.5) / (np.sqrt(np.float32(3.75)) + np.float32(2)) * np.float32(2)],
            [{"first": 2, "second": 4}, {"first": 1.5, "second": 3.75}],
        ),
        (  # 4 < 25, so second is 4 + 25/4
            FedYogi(server_learning_rate=2, beta_1=0.5, beta_2=0.75, tau=2),
            [4, 5],
            [1, np.float32(1) + np.float32(3.5) / (np.sqrt(np.float32(10.25)) + np.float32(2)) * np.float32(2)],
            [{"first": 2, "second": 4}, {"first": 3.5, "second": 10.25}],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ServerOptimizer) else "",
)
def test_two_rounds_by_hand(
    optimizer: ServerOptimizer, changes: list[float], models: list[float], states: list[Mapping[str, float]]
) -> None:
    current, kept = vector(0), None
    for change, model, state in zip(changes, models, states, strict=True):
        update = {"w": current["w"] + np.float32(change)}
        current, kept = step(optimizer, current, [update], kept)
        assert current["w"].tobytes() == np.float32([model]).tobytes()
        assert {name: float(array[0]) for name, array in kept.items()} == {f"{n}/w": v for n, v in state.items()}


def plain(name: str) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Return the optimizer as its paper has it, whole arrays at a time, in float32, with the default options."""
    f = np.float32

    def momentum(x: np.ndarray, mean: np.ndarray, kept: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        velocity = kept.get("velocity/w", f(0)) * f(0.9) + (mean - x)
        return x + velocity * f(1), {"velocity/w": velocity}

    def adaptive(x: np.ndarray, mean: np.ndarray, kept: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        change, beta_1 = mean - x, 0.0 if name == "fedadagrad" else 0.9
        first = kept.get("first/w", f(0)) * f(beta_1) + change * f(1 - beta_1)
        second, square = kept.get("second/w", np.zeros_like(x)), change * change
        second = {
            "fedadagrad": lambda: second + square,
            "fedadam": lambda: second * f(0.99) + square * f(1 - 0.99),
            "fedyogi": lambda: second - square * f(1 - 0.99) * np.sign(second - square),
        }[name]()
        return x + first / (np.sqrt(second) + f(1e-3)) * f(0.1), {"first/w": first, "second/w": second}

    return momentum if name == "fedavgm" else adaptive


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(OPTIMIZERS), rounds=st.integers(1, 5), sites=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_the_state_kept_over_rounds_makes_the_same_bits_as_the_papers_loop(
    name: str, rounds: int, sites: int, seed: int
) -> None:
    values = np.random.default_rng(seed)
    current: Tensors = {"w": values.standard_normal(40).astype(np.float32)}
    expected, expected_state = current["w"], {}
    kept: Tensors | None = None
    optimizer = STRATEGIES[name]()
    assert isinstance(optimizer, ServerOptimizer)
    for _ in range(rounds):
        updates = [{"w": current["w"] + values.standard_normal(40).astype(np.float32)} for _ in range(sites)]
        mean = np.zeros(40, np.float32)
        for update in updates:
            mean += update["w"] * np.float32(1 / sites)
        current, kept = step(optimizer, current, updates, kept)
        expected, expected_state = plain(name)(expected, mean, expected_state)
        assert current["w"].tobytes() == expected.tobytes()
        assert {key: array.tobytes() for key, array in kept.items()} == {
            key: array.tobytes() for key, array in expected_state.items()
        }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_kept_of_floating_tensors_in_the_dtype_of_the_sums(name: str) -> None:
    optimizer = STRATEGIES[name]()
    assert isinstance(optimizer, ServerOptimizer)
    model = {
        "bf16": np.ones((2, 3), ml_dtypes.bfloat16),
        "c64": np.ones(2, np.complex64),
        "f16": np.ones(2, np.float16),
        "f64": np.ones((), np.float64),
        "none": np.empty((0, 2), np.float32),
        "n": np.array([7]),
        "mask": np.array([True]),
    }
    dtypes = {"bf16": "F32", "c64": "C64", "f16": "F32", "f64": "F64", "none": "F32"}
    schema = state_schema(optimizer, schema_of(model))
    assert {key: spec.dtype for key, spec in schema.items()} == {
        f"{state}/{key}": dtype for state in optimizer.state_names for key, dtype in dtypes.items()
    }
    assert all(spec.shape == model[key.partition("/")[2]].shape for key, spec in schema.items())
    update = {key: tensor if tensor.dtype.kind in "biu" else tensor + tensor for key, tensor in model.items()}
    made, kept = step(optimizer, model, [update])
    assert {key: tensor.dtype for key, tensor in made.items()} == {key: tensor.dtype for key, tensor in model.items()}
    assert made["n"].tolist() == [7]
    again, _ = step(optimizer, made, [update], kept)
    assert all(np.isfinite(tensor).all() for tensor in again.values())


def test_the_parts_of_a_complex_tensor_are_stepped_apart() -> None:
    made, kept = step(FedAvgM(), {"w": np.complex64([1j])}, [{"w": np.complex64([3 + 2j])}])
    assert made["w"].tolist() == [3 + 2j]
    assert kept["velocity/w"].tolist() == [3 + 1j]


def test_what_no_site_changes_stays_and_divides_nothing_by_zero() -> None:
    for name in OPTIMIZERS:
        optimizer = STRATEGIES[name]()
        assert isinstance(optimizer, ServerOptimizer)
        made, _ = step(optimizer, vector(2), [vector(2)])
        assert made["w"].tolist() == [2]


def test_a_step_too_far_is_no_model_and_says_what_to_lower() -> None:
    with pytest.raises(InvalidTensors, match="lower the strategy's server_learning_rate"):
        step(FedAvgM(server_learning_rate=1e30), vector(0), [vector(1e30)])
    with pytest.raises(InvalidTensors, match="'second/w' is not finite"):
        step(FedAdam(), vector(0), [vector(1e30)])
    with pytest.raises(InvalidTensors, match="'w' is not finite"):
        step(FedAvgM(server_learning_rate=10), {"w": np.float16([0])}, [{"w": np.float16([6e4])}])


def test_without_moments_an_optimizer_averages() -> None:
    target = InMemory(vector(0))
    updates = [Contribution(update=InMemory(vector(value)), num_examples=1) for value in (1, 3)]
    aggregate(FedAdam(), schema_of(vector(0)), updates, target)
    assert target.tensors["w"].tolist() == [2]


def test_a_strategy_that_keeps_nothing_is_given_no_moments() -> None:
    moments = Moments(before=None, after=InMemory({}))
    updates = [Contribution(update=InMemory(vector(1)), num_examples=1)]
    with pytest.raises(InvalidInput, match="FedAvg keeps no moments"):
        aggregate(FedAvg(), schema_of(vector(0)), updates, InMemory(vector(0)), moments=moments)


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("fedavgm", {"momentum": 1}, "momentum"),
        ("fedavgm", {"server_learning_rate": 0}, "server_learning_rate"),
        ("fedadam", {"beta_2": -0.1}, "beta_2"),
        ("fedyogi", {"tau": 0}, "tau"),
        ("fedadagrad", {"beta_2": 0.9}, "beta_2"),  # it has none
    ],
)
def test_an_option_that_makes_no_sense_is_refused(name: str, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput, match=rf"strategy\.{field}: "):
        make_strategy(name, options)
