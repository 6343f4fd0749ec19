"""Read a job file: TOML, checked field by field, every mistake named with its line."""

import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from common.errors import InvalidInput, InvalidJobFile
from common.queues import check_site_name
from coordinator.strategies import make_strategy
from coordinator.strategies.base import Strategy

_EPSILON = 1e-9  # a share of a number of sites that comes out a little over a whole number is that number
_SHOWN_PROBLEMS = 20
_SHOWN_CHARACTERS = 200  # of what somebody wrote, in the message about it
_WORDS = {  # pydantic's words for a type of problem, in ours
    "missing": "is missing",
    "extra_forbidden": "is not a field of a job file",
}


class StrategyTable(BaseModel):
    """The job file's [strategy]: a name, and the strategy's own options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "fedavg"

    def make(self) -> Strategy:
        """Return the strategy; raise InvalidInput for an unknown name or option."""
        return make_strategy(self.name, self.model_extra or {})


class InitialModel(BaseModel):
    """The job file's [initial_model]: where the first global model comes from; a site builds it if this is empty."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Path | None = None  # a .safetensors file
    model: str | None = None  # the id of a stored model

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.file is not None and self.model is not None:
            raise ValueError("give either file or model, not both")
        return self


class GateTable(BaseModel):
    """The job file's [gate]: what the coordinator believes of an update that is otherwise as it must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_examples: int = Field(10**12, ge=1, le=10**12)  # that an answer may stand for
    max_norm: float | None = Field(None, gt=0, allow_inf_nan=False)  # of (update - global model), L2
    outlier_score: float = Field(6.0, ge=0, allow_inf_nan=False)  # 0: do not compare the updates with each other


class ParticipationTable(BaseModel):
    """The job file's [participation]: who is asked in a training round, and for whose answers it waits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choose: str = Field("all", min_length=1, max_length=100)  # all, random, available, or a chooser of the coordinator
    target_sites: int | None = Field(None, ge=1)  # with so many updates a round is full
    target_fraction: float | None = Field(None, gt=0, le=1)  # the same as a share of the job's sites
    over_selection: float = Field(1.0, ge=1, le=100)  # how many are asked, as a multiple of the target
    join: bool = False  # whether sites that are enrolled or enabled later join the job
    absent_seconds: float = Field(60, gt=0, le=30 * 24 * 3600)  # how long a site without a heartbeat is waited for
    pause_after: int = Field(3, ge=0, le=1000)  # rounds in a row without a good answer; 0: never
    pause_seconds: float = Field(60, gt=0, le=24 * 3600)  # the first pause; each further one is twice as long

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.target_sites is not None and self.target_fraction is not None:
            raise ValueError("give target_sites or target_fraction, not both")
        if not self.has_target and self.over_selection > 1:
            raise ValueError("over_selection needs target_sites or target_fraction: it is a multiple of them")
        if not self.has_target and self.choose != "all":
            raise ValueError(f"choose = {self.choose!r} needs target_sites or target_fraction: how many to choose")
        return self

    @property
    def has_target(self) -> bool:
        """Return whether a round can be full before everyone has answered."""
        return self.target_sites is not None or self.target_fraction is not None

    def target(self, num_sites: int) -> int:
        """Return with how many updates a round of a job of so many sites is full."""
        if self.target_fraction is not None:
            return max(1, math.ceil(self.target_fraction * num_sites - _EPSILON))
        return num_sites if self.target_sites is None else min(self.target_sites, num_sites)


class LateTable(BaseModel):
    """The job file's [late]: what becomes of an update that comes when its site is not waited for any more."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["drop", "count", "keep"] = "count"
    within_seconds: float | None = Field(None, gt=0, le=30 * 24 * 3600)  # after the round's end
    max_staleness: int = Field(5, ge=1, le=1000)  # training rounds since the one that the update was asked for in
    discount: float = Field(0.5, ge=0, le=100)  # a weight is divided by (1 + staleness) to this power


class JobSpec(BaseModel):
    """What a job file says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$")
    trainer: str = Field(min_length=1, max_length=100)  # a name on the sites' lists
    rounds: int = Field(ge=0, le=1_000_000)  # training rounds; 0 only builds a model, or tests the given one
    sites: tuple[str, ...] | None = None  # who takes part; every enabled site if it is missing
    min_sites: int | None = Field(None, ge=1)  # the quorum; more than half if it is missing
    min_fraction: float | None = Field(None, gt=0, le=1)  # the same as a share
    round_deadline_seconds: float = Field(3600, gt=0, le=30 * 24 * 3600)
    round_extension_seconds: float = Field(0, ge=0, le=30 * 24 * 3600)  # more, for sites that report progress
    start_deadline_seconds: float | None = Field(None, gt=0, le=30 * 24 * 3600)  # as of any round if it is missing
    seed: int = Field(0, ge=0, lt=2**63)
    test_every: int = Field(1, ge=0)  # a test round after every so many rounds and the last; 0 for none
    swag: bool = False  # after the last round, collect the weights' moments
    config: dict[str, JsonValue] = {}  # the trainer's
    participation: ParticipationTable = ParticipationTable()
    late: LateTable = LateTable()
    strategy: StrategyTable = StrategyTable()
    gate: GateTable = GateTable()
    initial_model: InitialModel = InitialModel()

    @field_validator("sites")
    @classmethod
    def _valid_sites(cls, sites: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if sites is not None:
            if not sites:
                raise ValueError("name at least one site, or leave the field out to take every enabled site")
            if len(set(sites)) != len(sites):
                raise ValueError("a site is named twice")
            for site in sites:
                check_site_name(site)
        return sites

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.sites is not None and self.min_sites is not None and self.min_sites > len(self.sites):
            raise ValueError(f"min_sites is {self.min_sites}, more than the {len(self.sites)} sites named")
        if self.min_sites is not None and self.min_fraction is not None:
            raise ValueError("give min_sites or min_fraction, not both")
        target = self.participation.target_sites
        if self.min_sites is not None and target is not None and self.min_sites > target:
            raise ValueError(f"min_sites is {self.min_sites}, more than target_sites, {target}: no round could count")
        return self

    def quorum(self, num_sites: int) -> int:
        """Return how many good answers a round of a job of so many sites must have to count."""
        if self.min_sites is not None:
            return self.min_sites
        expected = self.participation.target(num_sites)
        if self.min_fraction is not None:
            return max(1, math.ceil(self.min_fraction * expected - _EPSILON))
        return expected // 2 + 1

    def deadline_seconds(self, *, start: bool) -> float:
        """Return how long a round waits for answers."""
        if start and self.start_deadline_seconds is not None:
            return self.start_deadline_seconds
        return self.round_deadline_seconds

    def longest_seconds(self, *, start: bool, train: bool) -> float:
        """Return how long an answer may count, from the moment that its round was planned."""
        seconds = self.deadline_seconds(start=start) + self.round_extension_seconds
        if train and self.late.policy == "keep":
            within = self.late.within_seconds
            seconds += self.round_deadline_seconds if within is None else within
        return seconds


def read_job_file(path: Path) -> JobSpec:
    """Return what the file says; raise InvalidJobFile that names the field, the line and what was expected."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidJobFile(f"Cannot read the job file {path}: {error}.") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidJobFile(f"{path} is not valid TOML: {error}.") from error
    spec = _check(values, lambda field: _place(path, text, field))
    if (file := spec.initial_model.file) is not None:
        located = path.parent / file
        if not located.is_file():
            place = _place(path, text, ("initial_model", "file"))
            raise InvalidJobFile(f"{place}initial_model.file: there is no file {located}.")
        spec = spec.model_copy(update={"initial_model": InitialModel(file=located.resolve())})
    return spec


def check_job(values: object) -> JobSpec:
    """Return the job that somebody sends over the network; raise InvalidJobFile that names the field.

    It cannot name a file, which would be one of this machine's.
    """
    spec = _check(values, lambda field: "")
    if spec.initial_model.file is not None:
        raise InvalidJobFile("initial_model.file: put the file into the model store and name the model instead.")
    return spec


def _check(values: object, place: Callable[[tuple[str, ...]], str]) -> JobSpec:
    """Return the values as a job; `place` says where a field was set, for the error's message."""
    try:
        spec = JobSpec.model_validate(values)
    except ValidationError as error:
        raise InvalidJobFile(_explain(error, place)) from error
    try:
        spec.strategy.make()
    except InvalidInput as error:
        field = error.message.partition(":")[0]
        raise InvalidJobFile(f"{place(tuple(field.split('.')))}{error.message}") from error
    return spec


def _explain(error: ValidationError, place: Callable[[tuple[str, ...]], str]) -> str:
    lines = []
    for problem in error.errors(include_url=False)[:_SHOWN_PROBLEMS]:
        field = tuple(part for part in problem["loc"] if isinstance(part, str))
        given = "" if isinstance(problem["input"], dict) else f", not {_shorten(repr(problem['input']))}"
        words = _WORDS.get(problem["type"]) or f"{problem['msg']}{given}"
        if not field:  # a rule about several fields
            lines.append(f"{place(())}{problem['msg'].removeprefix('Value error, ')}")
            continue
        lines.append(f"{place(field)}{_shorten('.'.join(field))}: {words.removeprefix('Value error, ')}")
    return "\n".join(lines)


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _place(path: Path, text: str, field: tuple[str, ...]) -> str:
    line = find_line(text, field)
    return f"{path}, line {line}: " if line else f"{path}: "


def find_line(text: str, field: tuple[str, ...]) -> int | None:
    """Return the number of the line that sets the field, or opens its table; None if no line does."""
    table: tuple[str, ...] = ()
    best: int | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            table = tuple(part.strip().strip("\"'") for part in header[1].split("."))
            if table == field[: len(table)]:
                best = best or number
        elif (key := re.match(r"\s*([A-Za-z0-9_.\"'-]+)\s*=", line)) is not None:
            path = (*table, *(part.strip("\"'") for part in key[1].split(".")))
            if path == field[: len(path)]:
                return number
    return best
