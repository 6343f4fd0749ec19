"""The Trainer API: the one class that a data scientist writes so that a site can train."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, JsonValue, ValidationError

from common.errors import Declined, InvalidTensors

Tensors = Mapping[str, npt.NDArray[Any]]  # a model or an update, by name
Report = Callable[[float, str], None]  # told the fraction done, 0 to 1, and what is being done

Config = TypeVar("Config", bound=BaseModel)


def _report_nothing(fraction: float, text: str) -> None:
    """Take no notice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobContext:
    """What a trainer knows for the whole of a job."""

    site: str  # the site's name
    job_id: str
    job_name: str
    trainer: str  # the name on the site's list
    config: Mapping[str, JsonValue]  # the job file's [config]
    seed: int  # the job's, the same at every site
    data: Path  # the site's data
    folder: Path  # the trainer's own for this job at this site; kept until the job ends


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundContext:
    """What a trainer knows of one part: this site's share of one round."""

    round: int  # counted from 1; 0 before the first training round
    seed: int  # of this part, see `derive_seed`
    report: Report = _report_nothing  # call it often: it raises Cancelled when the part is not wanted any more
    seconds_left: float | None = None  # until the part's deadline, as this is made; None if there is none


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What training gives."""

    tensors: Tensors  # all tensors of the model, trained
    num_examples: int  # how many training examples they stand for: the update's weight
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What evaluating gives."""

    num_examples: int  # how many examples the metrics are means over
    metrics: Mapping[str, float] = field(default_factory=dict)


class Cancelled(Declined):
    """The part is not wanted any more."""


class Trainer(ABC):
    """Build, train and evaluate one kind of model on one site's data.

    A site makes one trainer for a job and may keep it between rounds, or make it anew at any time: nothing that a
    result depends on may be kept in it. Raise Declined to tell the coordinator why a part cannot be done.
    """

    def __init__(self, context: JobContext) -> None:
        self.context = context

    @abstractmethod
    def build(self) -> Tensors:
        """Return the job's first model, made from `context.seed` alone."""

    @abstractmethod
    def fit(self, tensors: Tensors, step: RoundContext) -> Fit:
        """Train the model on the site's data; its tensors are the caller's own and may be written into."""

    @abstractmethod
    def evaluate(self, tensors: Tensors, step: RoundContext) -> Evaluation:
        """Measure the model on the site's data."""

    @abstractmethod
    def num_examples(self) -> int:
        """Return how many training examples the site has."""

    def begin_job(self, step: RoundContext, *, build: bool) -> tuple[Tensors | None, int]:
        """Return the job's first model, if this site is to build it, and the number of training examples."""
        return (self.build() if build else None), self.num_examples()

    def moments(self, tensors: Tensors, step: RoundContext) -> Fit:
        """Train on and return the weights' moments as float32 tensors `first/<name>` and `second/<name>` (SWAG)."""
        raise Declined(f"Trainer {self.context.trainer!r} gives no moments of its weights; leave SWAG rounds out.")

    def finish(self, tensors: Tensors | None, state: str) -> None:  # noqa: B027 (a hook: most trainers have nothing to do)
        """Take leave of the job, which ended in the state; the tensors are the final model's, if there is one."""


def derive_seed(job_seed: int, round_number: int, site: str) -> int:
    """Return a part's own seed, 0 to 2^63-1: the same whenever and wherever the part is done."""
    digest = hashlib.sha256(f"{job_seed}/{round_number}/{site}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def read_config(model: type[Config], values: Mapping[str, JsonValue]) -> Config:
    """Return the job's config as the pydantic model; raise Declined that names each key that is wrong."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)
        )
        known = ", ".join(model.model_fields)
        raise Declined(
            f"The job's config is not valid: {problems}. Correct the job file; its keys are {known}."
        ) from error


def check_tensors(tensors: object) -> dict[str, npt.NDArray[Any]]:
    """Return what a trainer gave as tensors; raise InvalidTensors unless it is arrays by name."""
    if not isinstance(tensors, Mapping) or not tensors:
        raise InvalidTensors(f"The trainer gave {type(tensors).__name__} instead of arrays by name; correct it.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray | np.generic):
            raise InvalidTensors(
                f"The trainer gave {type(tensor).__name__} as tensor {str(name)[:80]!r}; give a numpy array."
            )
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}
