"""The optimizers of the torch trainer: torch's own arithmetic without torch.optim's classes.

`torch.optim.SGD` and its kin import torch's compiler when the first one is made, 1.5 s of processor time in each of a
site's processes; the functions beneath them do not, and give the same bits.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

OptimizerName = Literal["sgd", "adam", "adamw"]

_BETAS = (0.9, 0.999)  # torch's defaults
_EPSILON = 1e-8


class Optimizer(Protocol):
    """What the loop needs of an optimizer; every `torch.optim.Optimizer` is one."""

    def step(self) -> object:
        """Change the parameters by their gradients."""


class Sgd:
    """Stochastic gradient descent with momentum."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, learning_rate: float, momentum: float, weight_decay: float
    ) -> None:
        self._parameters = parameters
        self._learning_rate = learning_rate
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._buffers: dict[int, torch.Tensor | None] = {}  # by the parameter's position

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters by their gradients."""
        positions, parameters, gradients = _with_gradients(self._parameters)
        buffers = [self._buffers.get(position) for position in positions]
        sgd(
            parameters,
            gradients,
            buffers,
            has_sparse_grad=any(gradient.is_sparse for gradient in gradients),
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=self._learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        self._buffers.update(zip(positions, buffers, strict=True))


class Adam:
    """Adam; with `decoupled` weight decay, AdamW."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, learning_rate: float, weight_decay: float, decoupled: bool
    ) -> None:
        self._parameters = parameters
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self._decoupled = decoupled
        self._first: dict[int, torch.Tensor] = {}  # by the parameter's position
        self._second: dict[int, torch.Tensor] = {}
        self._steps: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters by their gradients."""
        positions, parameters, gradients = _with_gradients(self._parameters)
        for position, parameter in zip(positions, parameters, strict=True):
            if position not in self._steps:
                self._first[position] = torch.zeros_like(parameter)
                self._second[position] = torch.zeros_like(parameter)
                self._steps[position] = torch.tensor(0.0)
        adam(
            parameters,
            gradients,
            [self._first[position] for position in positions],
            [self._second[position] for position in positions],
            [],
            [self._steps[position] for position in positions],
            has_complex=any(parameter.is_complex() for parameter in parameters),
            decoupled_weight_decay=self._decoupled,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=self._learning_rate,
            weight_decay=self._weight_decay,
            eps=_EPSILON,
            maximize=False,
        )


def make_optimizer(
    name: OptimizerName,
    parameters: Sequence[nn.Parameter],
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> Optimizer:
    """Return a new optimizer of the parameters."""
    if name == "sgd":
        return Sgd(parameters, learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)
    return Adam(parameters, learning_rate=learning_rate, weight_decay=weight_decay, decoupled=name == "adamw")


def _with_gradients(
    parameters: Sequence[nn.Parameter],
) -> tuple[list[int], list[torch.Tensor], list[torch.Tensor]]:
    """Return those parameters that the last loss depended on, their positions and their gradients."""
    found = [(position, each, each.grad) for position, each in enumerate(parameters) if each.grad is not None]
    return [position for position, _, _ in found], [each for _, each, _ in found], [grad for _, _, grad in found]
