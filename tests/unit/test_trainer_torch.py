"""The torch trainer: the loop, its repeatability, and tensors that survive the trip to numpy and back."""

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from common.errors import Declined, InvalidTensors
from worker.torch_optimizers import OptimizerName, make_optimizer
from worker.torch_tensors import load_tensors, tensors_of, to_numpy, to_torch
from worker.torch_trainer import TorchConfig, TorchTrainer
from worker.trainer import Cancelled, JobContext, RoundContext

STEP = RoundContext(round=1, seed=7)
PINNED_TRAIN_LOSS = 0.0919072
PINNED_TEST_LOSS = 0.107563


class Config(TorchConfig):
    """With a key of the test's own."""

    dropout: float = 0.0


class Listed(Dataset[Any]):
    """The same examples, but not as a TensorDataset."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class Blobs(TorchTrainer):
    """Three classes of points in the plane."""

    config: Config
    num_train = 20
    num_test = 300
    listed = False

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(self.config.dropout), nn.Linear(8, 3))

    def train_data(self) -> Dataset[Any]:
        data = points(self.num_train, seed=1)
        return Listed(data) if self.listed else data

    def test_data(self) -> Dataset[Any]:
        data = points(self.num_test, seed=2)
        return Listed(data) if self.listed else data


def points(count: int, *, seed: int) -> TensorDataset:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    centres = np.array([[0, 1], [1, -1], [-1, -1]])
    places = centres[labels] + 0.3 * rng.standard_normal((count, 2))
    return TensorDataset(torch.tensor(places, dtype=torch.float32), torch.tensor(labels))


def make(trainer: type[TorchTrainer] = Blobs, **config: Any) -> Any:
    context = JobContext(
        site="alpha",
        job_id="job",
        job_name="test",
        trainer="blobs",
        config=config,
        seed=3,
        data=Path("data"),
        folder=Path("folder"),
    )
    return trainer(context)


def same(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_fit_learns_and_reports_pinned_losses() -> None:
    trainer = make(local_epochs=20, batch_size=4, learning_rate=0.1)
    first = trainer.build()
    fit = trainer.fit(first, STEP)
    before, after = trainer.evaluate(first, STEP), trainer.evaluate(fit.tensors, STEP)
    assert fit.num_examples == 20
    assert after.num_examples == 300
    assert fit.metrics["train_loss"] == pytest.approx(PINNED_TRAIN_LOSS, rel=1e-3)
    assert after.metrics["loss"] == pytest.approx(PINNED_TEST_LOSS, rel=1e-3)
    assert after.metrics["accuracy"] > 0.95 > before.metrics["accuracy"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_part_gives_the_same_bits_whenever_and_wherever_it_is_done(optimizer: str) -> None:
    config: dict[str, Any] = {
        "local_epochs": 2,
        "optimizer": optimizer,
        "dropout": 0.5,
        "learning_rate": 0.01,
        "momentum": 0.5,
    }
    trainer = make(**config)
    first = trainer.build()
    once = trainer.fit(first, STEP)
    trainer.fit(first, replace(STEP, seed=8))  # another part in between
    torch.manual_seed(99)
    assert same(once.tensors, trainer.fit(first, STEP).tensors)
    elsewhere = make(**config)
    assert same(first, elsewhere.build())
    assert same(once.tensors, elsewhere.fit(first, STEP).tensors)
    assert not same(once.tensors, trainer.fit(first, replace(STEP, seed=8)).tensors)


def test_data_that_is_drawn_at_random_is_the_same_when_the_trainer_is_made_anew() -> None:
    class Drawn(Blobs):
        def train_data(self) -> Dataset[Any]:
            return points(20, seed=int(torch.randint(1000, ())) + random.randrange(1000))

        def test_data(self) -> Dataset[Any]:
            return points(30, seed=np.random.randint(1000))

    trainer, elsewhere = make(Drawn), make(Drawn)
    first = trainer.build()
    fit, evaluation = trainer.fit(first, STEP), trainer.evaluate(first, STEP)
    torch.manual_seed(99)
    assert elsewhere.evaluate(first, STEP) == evaluation
    elsewhere.fit(first, replace(STEP, seed=8))  # another part is the first to need the data
    assert same(elsewhere.fit(first, STEP).tensors, fit.tensors)


def test_fit_leaves_the_global_model_as_it_was() -> None:
    trainer = make()
    first = trainer.build()
    copies = {name: tensor.copy() for name, tensor in first.items()}
    trainer.fit(first, STEP)
    assert same(first, copies)


def test_a_data_loader_gives_the_same_bits_as_a_tensor_dataset() -> None:
    class ListedBlobs(Blobs):
        listed = True

    plain, listed = make(batch_size=8), make(ListedBlobs, batch_size=8)
    first = plain.build()
    assert same(plain.fit(first, STEP).tensors, listed.fit(first, STEP).tensors)
    assert plain.evaluate(first, STEP) == listed.evaluate(first, STEP)


def test_test_metrics_are_means_over_examples_not_over_batches() -> None:
    trainer = make()
    tensors = trainer.build()
    model = trainer.model()
    load_tensors(model, tensors)
    inputs, targets = points(300, seed=2).tensors  # tested in batches of 256 and 44
    with torch.no_grad():
        outputs = model(inputs)
    measured = trainer.evaluate(tensors, STEP).metrics
    assert measured["loss"] == pytest.approx(nn.functional.cross_entropy(outputs, targets).item())
    assert measured["accuracy"] == pytest.approx((outputs.argmax(1) == targets).double().mean().item())


def test_batch_norm_survives_a_last_batch_of_one() -> None:
    class Normed(Blobs):
        num_train = 9

        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    trainer = make(Normed, batch_size=4)
    fit = trainer.fit(trainer.build(), STEP)
    assert fit.tensors["1.num_batches_tracked"] == 2  # batches of 4 and 5
    assert fit.tensors["1.num_batches_tracked"].dtype == np.int64


def test_random_numbers_of_the_process_are_left_alone() -> None:
    trainer = make(dropout=0.5)
    first = trainer.build()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = (random.random(), np.random.random(), torch.rand(1).item())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    trainer.build()
    trainer.fit(first, STEP)
    trainer.evaluate(first, STEP)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected


def test_progress_is_reported_for_every_batch_and_may_stop_the_part() -> None:
    seen: list[tuple[float, str]] = []

    def report(fraction: float, text: str) -> None:
        seen.append((fraction, text))
        if fraction > 0.6:
            raise Cancelled("The job was stopped.")

    trainer = make(local_epochs=2, batch_size=10)
    with pytest.raises(Cancelled):
        trainer.fit(trainer.build(), replace(STEP, report=report))
    assert seen == [(0.25, "epoch 1 of 2"), (0.5, "epoch 1 of 2"), (0.75, "epoch 2 of 2")]


def test_a_site_without_examples_declines() -> None:
    class Empty(Blobs):
        num_train = num_test = 0

    trainer = make(Empty)
    assert trainer.num_examples() == 0
    with pytest.raises(Declined, match="no training examples"):
        trainer.fit(trainer.build(), STEP)
    with pytest.raises(Declined, match="no test examples"):
        trainer.evaluate(trainer.build(), STEP)


def test_training_does_not_import_torch_s_compiler() -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); from tests.unit import test_trainer_torch as t; "
        "trainer = t.make(); trainer.evaluate(trainer.fit(trainer.build(), t.STEP).tensors, t.STEP); "
        "print('torch._dynamo' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- optimizers and the proximal term ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01)),
    ],
)
def test_optimizers_give_the_same_bits_as_torch_s_own(
    name: OptimizerName, theirs: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    torch.manual_seed(0)
    start = [torch.randn(3, 2), torch.randn(4), torch.randn(1)]
    left, right = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    ours = make_optimizer(name, left, learning_rate=0.1, momentum=0.9, weight_decay=0.01)
    reference = theirs(right)
    for position in range(5):
        gradients = [torch.randn_like(tensor) for tensor in start]
        for mine, other, gradient in zip(left, right, gradients, strict=True):
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        if position < 2:
            left[2].grad = right[2].grad = None  # takes no part yet
        ours.step()
        reference.step()
    assert all(torch.equal(mine, other) for mine, other in zip(left, right, strict=True))


def test_any_optimizer_of_torch_may_be_used() -> None:
    class Rms(Blobs):
        def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.RMSprop(parameters, lr=0.01)

    trainer = make(Rms)
    assert trainer.fit(trainer.build(), STEP).metrics["train_loss"] > 0


def test_the_proximal_term_has_the_gradient_that_the_paper_gives_it() -> None:
    class Explicit(Blobs):
        """Adds mu/2 |w - w0|^2 to the loss itself."""

        def fit(self, tensors: Any, step: RoundContext) -> Any:
            self.anchors = [to_torch(tensors[name]).clone() for name in ("0.weight", "0.bias", "3.weight", "3.bias")]
            return super().fit(tensors, step)

        def forward(self, model: nn.Module, batch: Any) -> Any:
            outputs, targets = super().forward(model, batch)
            distance = sum(
                (parameter - anchor).square().sum()
                for parameter, anchor in zip(model.parameters(), self.anchors, strict=True)
            )
            return outputs, (targets, distance, len(targets))

        def loss(self, outputs: Any, targets: Any) -> torch.Tensor:
            labels, distance, _ = targets
            return super().loss(outputs, labels) + torch.as_tensor(0.5 / 2 * distance)

    config: dict[str, Any] = {"local_epochs": 3, "batch_size": 20, "learning_rate": 0.5}
    first = make().build()
    proximal = make(**config, proximal_mu=0.5).fit(first, STEP).tensors
    explicit = make(Explicit, **config)
    explicit = explicit.fit(first, STEP).tensors
    plain = make(**config).fit(first, STEP).tensors
    for name, tensor in proximal.items():
        np.testing.assert_allclose(tensor, explicit[name], rtol=1e-5, atol=1e-6)
    assert sum(abs(proximal[name] - first[name]).sum() for name in first) < sum(
        abs(plain[name] - first[name]).sum() for name in first
    )


def test_moments_are_means_over_the_epochs_ends() -> None:
    class Normed(Blobs):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    first = make(Normed).build()
    after_one = make(Normed, batch_size=10).fit(first, STEP).tensors
    after_two = make(Normed, batch_size=10, local_epochs=2).fit(first, STEP).tensors
    moments = make(Normed, batch_size=10, local_epochs=2).moments(first, STEP)
    floating = [name for name in first if first[name].dtype == np.float32]
    assert set(moments.tensors) == {f"{which}/{name}" for which in ("first", "second") for name in floating}
    for name in floating:
        one, two = after_one[name], after_two[name]
        np.testing.assert_allclose(moments.tensors[f"first/{name}"], (one + two) / 2, rtol=1e-6)
        np.testing.assert_allclose(moments.tensors[f"second/{name}"], (one**2 + two**2) / 2, rtol=1e-6)
        assert moments.tensors[f"first/{name}"].dtype == np.float32


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"learning_rat": 0.1}, "learning_rat"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"dropout": "much"}, "dropout"),
        ({"device": "abacus"}, "device"),
    ],
)
def test_a_wrong_key_or_value_of_the_config_is_declined_by_its_name(config: dict[str, Any], key: str) -> None:
    with pytest.raises(Declined, match=key):
        make(**config)


def test_the_defaults_are_those_that_the_docs_show() -> None:
    assert make().config.model_dump() == {
        "local_epochs": 1,
        "batch_size": 32,
        "learning_rate": 0.05,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "optimizer": "sgd",
        "proximal_mu": 0.0,
        "device": "auto",
        "dropout": 0.0,
    }


# --- tensors ----------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Has every sort of tensor that a state dict may have."""

    def __init__(self, fill: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 3), float(fill)))
        self.tied = self.weight
        self.register_buffer("steps", torch.tensor(fill))
        self.register_buffer("small", torch.tensor([fill], dtype=torch.uint8))
        self.register_buffer("mask", torch.tensor([fill > 1, False]))
        self.register_buffer("halves", torch.full((2,), fill / 3, dtype=torch.float16))
        self.register_buffer("brain", torch.full((2, 2), fill / 3, dtype=torch.bfloat16))
        self.register_buffer("brain_scalar", torch.tensor(fill / 3, dtype=torch.bfloat16))
        self.register_buffer("eight", torch.full((2,), fill / 3).to(torch.float8_e4m3fn))
        self.register_buffer("doubles", torch.tensor(fill / 3, dtype=torch.float64))
        self.register_buffer("turned", (fill * torch.arange(6.0)).reshape(2, 3).t())
        self.register_buffer("complexes", torch.tensor([complex(fill, 1)]).conj())
        self.register_buffer("empty", torch.empty(0, 3))


def test_every_sort_of_tensor_survives_the_trip() -> None:
    source, target = Everything(2), Everything(1)
    arrays = {name: array.copy() for name, array in tensors_of(source).items()}
    assert arrays["steps"].shape == ()
    assert arrays["steps"].dtype == np.int64
    assert arrays["brain"].dtype == ml_dtypes.bfloat16
    assert arrays["eight"].dtype == ml_dtypes.float8_e4m3fn
    assert arrays["turned"].tolist() == [[0, 6], [2, 8], [4, 10]]
    load_tensors(target, arrays)
    for name, tensor in source.state_dict().items():
        found = target.state_dict()[name]
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found.float() if "eight" in name else found, tensor.float() if "eight" in name else tensor)
    assert target.tied is target.weight


@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_read_only_and_foreign_arrays_become_tensors(dtype: str) -> None:
    array = np.arange(3).astype(dtype)
    array.flags.writeable = False
    assert to_torch(array).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bias"), "lacks 'bias'"),
        (lambda t: t.update(extra=np.zeros(1)), "lacks 'extra'"),
        (lambda t: t.update(bias=np.zeros(3, np.float32)), r"float32 \(3,\).*float32 \(2,\)"),
        (lambda t: t.update(bias=np.zeros(2, np.float64)), "float64"),
    ],
)
def test_another_model_s_tensors_are_refused(change: Callable[[Any], Any], message: str) -> None:
    tensors = dict(tensors_of(nn.Linear(3, 2)))
    change(tensors)
    with pytest.raises(InvalidTensors, match=message):
        load_tensors(nn.Linear(3, 2), tensors)


def test_a_sparse_tensor_is_refused() -> None:
    with pytest.raises(InvalidTensors, match="dense"):
        to_numpy(torch.eye(2).to_sparse())
