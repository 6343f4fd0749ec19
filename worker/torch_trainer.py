"""A trainer for torch: you give the model and the data, it supplies the loop."""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from common.errors import Declined
from worker.seeds import seeded
from worker.torch_optimizers import Optimizer, OptimizerName, make_optimizer
from worker.torch_tensors import load_tensors, tensors_of, to_numpy
from worker.trainer import Evaluation, Fit, JobContext, RoundContext, Tensors, Trainer, read_config

_TEST_BATCH = 256  # examples, at least: nothing is kept for a backward pass, so it may be larger than in training


class TorchConfig(BaseModel):
    """The keys of a job's [config] that every torch trainer knows; a trainer with more makes a subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    local_epochs: int = Field(1, ge=1)  # passes over the site's data in one round
    batch_size: int = Field(32, ge=1)  # examples
    learning_rate: float = Field(0.05, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)  # of sgd
    weight_decay: float = Field(0.0, ge=0)
    optimizer: OptimizerName = "sgd"  # begins anew in every round
    proximal_mu: float = Field(0.0, ge=0)  # FedProx: the pull towards the global model, arXiv 1812.06127
    device: str = "auto"  # "auto" takes a graphics card if there is one; or "cpu", "cuda:1", …


class TorchTrainer(Trainer):
    """Train a torch module: give `model`, `train_data` and `test_data`; change `loss`, `metrics` or `forward` at will.

    Annotate `config` with your own subclass of TorchConfig to have keys of your own in the job file.
    """

    config: TorchConfig

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.config = read_config(_config_class(type(self)), context.config)
        self.device = _device(self.config.device)

    # --- what you write ------------------------------------------------------------------------------------------

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a new model; torch's random numbers are seeded with the job's seed."""

    @abstractmethod
    def train_data(self) -> Dataset[Any]:
        """Return the site's training examples, each (input, …, target); read once. A TensorDataset is fastest.

        Random numbers are seeded as for the model.
        """

    @abstractmethod
    def test_data(self) -> Dataset[Any]:
        """Return the site's test examples; read once, with random numbers seeded as for the model."""

    def loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Return the batch's mean loss: cross entropy."""
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, float]:
        """Return the batch's mean of everything else that is measured in a test: accuracy."""
        return {"accuracy": (outputs.argmax(1) == targets).double().mean().item()}

    def forward(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        """Return the batch's outputs and targets: the last of a batch is its targets, the others are inputs."""
        *inputs, targets = batch
        return model(*inputs), targets

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """Return a new optimizer, by the config; any of `torch.optim` will do."""
        config = self.config
        return make_optimizer(
            config.optimizer,
            parameters,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )

    # --- what the site calls -------------------------------------------------------------------------------------

    def build(self) -> dict[str, npt.NDArray[Any]]:
        """Return the tensors of a new model."""
        return tensors_of(self._new_model())

    def num_examples(self) -> int:
        """Return how many training examples there are."""
        return _length(self._train_data)

    def fit(self, tensors: Tensors, step: RoundContext) -> Fit:
        """Train for the local epochs; `train_loss` is the last epoch's mean, without the proximal term."""
        model = self._load(tensors)
        train_loss = self._train(model, step)
        return Fit(tensors=tensors_of(model), num_examples=self.num_examples(), metrics={"train_loss": train_loss})

    def moments(self, tensors: Tensors, step: RoundContext) -> Fit:
        """Train for the local epochs; return the means over the epochs' ends of each floating tensor and its square.

        Source: Maddox et al., A Simple Baseline for Bayesian Uncertainty in Deep Learning, arXiv 1902.02476.
        """
        model = self._load(tensors)
        sums: dict[str, torch.Tensor] = {}

        def accumulate() -> None:
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    value = tensor.detach().float()
                    for key, term in ((f"first/{name}", value), (f"second/{name}", value.square())):
                        sums[key] = sums[key] + term if key in sums else term.clone()

        train_loss = self._train(model, step, after_epoch=accumulate)
        return Fit(
            tensors={key: to_numpy(total / self.config.local_epochs) for key, total in sums.items()},
            num_examples=self.num_examples(),
            metrics={"train_loss": train_loss},
        )

    def evaluate(self, tensors: Tensors, step: RoundContext) -> Evaluation:
        """Return the mean loss and metrics over the site's test examples."""
        return self.measure(tensors, self._test_data, step)

    def measure(self, tensors: Tensors, data: Dataset[Any], step: RoundContext) -> Evaluation:
        """Return the mean loss and metrics over any examples."""
        if (num_examples := _length(data)) == 0:
            raise Declined("This site has no test examples; leave it out of test rounds.")
        model = self._load(tensors).eval()
        sums: dict[str, float] = {}
        done = 0
        with self._seeded(step.seed), torch.inference_mode():
            for batch in self._batches(
                data, torch.split(torch.arange(num_examples), max(_TEST_BATCH, self.config.batch_size))
            ):
                outputs, targets = self.forward(model, batch)
                count = len(targets)
                measured = {"loss": self.loss(outputs, targets).item(), **self.metrics(outputs, targets)}
                for name, mean in measured.items():
                    sums[name] = sums.get(name, 0.0) + mean * count
                done += count
                step.report(done / num_examples, "test")
        return Evaluation(num_examples=done, metrics={name: total / done for name, total in sums.items()})

    # --- the loop ------------------------------------------------------------------------------------------------

    def _train(self, model: nn.Module, step: RoundContext, after_epoch: Callable[[], None] = lambda: None) -> float:
        """Train the model in place; return the last epoch's mean loss."""
        num_examples = self.num_examples()
        if num_examples == 0:
            raise Declined("This site has no training examples; leave it out of the job.")
        config = self.config
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        anchors = [parameter.detach().clone() for parameter in parameters] if config.proximal_mu else []
        optimizer = self.optimizer(parameters)
        order = torch.Generator().manual_seed(step.seed)
        model.train()
        with self._seeded(step.seed):
            for epoch in range(config.local_epochs):
                text = f"epoch {epoch + 1} of {config.local_epochs}"
                loss_sum, seen = torch.zeros((), dtype=torch.float64, device=self.device), 0
                batches = _split(torch.randperm(num_examples, generator=order), config.batch_size)
                for position, batch in enumerate(self._batches(self._train_data, batches)):
                    outputs, targets = self.forward(model, batch)
                    loss = self.loss(outputs, targets)
                    model.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]  # torch's own lack of annotations
                    _pull(parameters, anchors, config.proximal_mu)
                    optimizer.step()
                    loss_sum += loss.detach() * len(targets)
                    seen += len(targets)
                    step.report((epoch + (position + 1) / len(batches)) / config.local_epochs, text)
                after_epoch()
        return loss_sum.item() / seen

    def _new_model(self) -> nn.Module:
        with self._seeded(self.context.seed):
            return self.model()

    def _load(self, tensors: Tensors) -> nn.Module:
        """Return a new model with the tensors' values; new, so that no part depends on the one before."""
        model = self._new_model()
        load_tensors(model, tensors)
        return model.to(self.device)

    @cached_property
    def _train_data(self) -> Dataset[Any]:
        with self._seeded(self.context.seed):  # a split drawn at random is the same when the trainer is made anew
            return self.train_data()

    @cached_property
    def _test_data(self) -> Dataset[Any]:
        with self._seeded(self.context.seed):
            return self.test_data()

    def _batches(self, data: Dataset[Any], indices: tuple[torch.Tensor, ...]) -> Iterator[Any]:
        if isinstance(data, TensorDataset):  # ten times as fast as a DataLoader for small examples
            for index in indices:
                yield tuple(tensor[index].to(self.device) for tensor in data.tensors)
        else:
            for batch in DataLoader(data, batch_sampler=[index.tolist() for index in indices]):
                yield _move(batch, self.device)

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Seed Python's, numpy's and torch's random numbers; put them back afterwards."""
        cards = [self.device] if self.device.type == "cuda" else []
        with seeded(seed), torch.random.fork_rng(devices=cards):
            torch.manual_seed(seed)
            yield


def _config_class(trainer: type[TorchTrainer]) -> type[TorchConfig]:
    """Return the class that the trainer, or the nearest of its bases, annotates `config` with."""
    owner = next(base for base in trainer.__mro__ if "config" in inspect.get_annotations(base))
    return cast(type[TorchConfig], inspect.get_annotations(owner, eval_str=True)["config"])


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Declined(
            f'The job\'s config is not valid: device: {name!r} is not there; use "auto" or "cpu".'
        ) from error
    return device


def _length(data: Dataset[Any]) -> int:
    if not isinstance(data, Sized):
        raise Declined("The trainer's dataset has no length; give a map-style dataset.")
    return len(data)


def _split(order: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Split the order into batches; a last batch of one joins the one before, since BatchNorm cannot train on one."""
    batches = torch.split(order, batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1:
        return (*batches[:-2], torch.cat(batches[-2:]))
    return batches


def _pull(parameters: list[nn.Parameter], anchors: list[torch.Tensor], mu: float) -> None:
    """Add the gradient of the proximal term, mu/2 times the squared distance to the global model."""
    for parameter, anchor in zip(parameters, anchors, strict=False):  # no anchors without a term
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchor, alpha=mu)


def _move(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _move(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_move(value, device) for value in batch]
    return batch
