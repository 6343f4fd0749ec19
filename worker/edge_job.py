"""What an edge's coordinator tells of a job; nothing in it is believed before it has passed here."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from common.errors import Declined

_Name = Annotated[str, Field(max_length=200)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class EdgePart(_Told):
    """The share of one of the edge's sites in a round."""

    site: _Name
    state: _Name
    num_examples: _Count | None = None


class EdgeRound(_Told):
    """A round of the edge's job."""

    kind: _Name
    number: _Count
    state: _Name
    metrics: dict[str, FiniteFloat] = {}  # means over the sites, weighted by examples
    output_model_id: _Name | None = None
    parts: tuple[EdgePart, ...] = ()

    @property
    def num_examples(self) -> int:
        """Return how many examples the accepted parts stand for."""
        return sum(part.num_examples or 0 for part in self.parts if part.state == "accepted")


class EdgeJob(_Told):
    """A job of the edge's coordinator."""

    job_id: _Name
    state: Literal["submitted", "running", "completed", "failed", "aborted"]
    reason: str = ""
    model_id: _Name | None = None
    num_rounds: _Count = 0
    current_round: _Count = 0
    rounds: tuple[EdgeRound, ...] = ()

    @property
    def is_over(self) -> bool:
        """Return whether the job has ended."""
        return self.state not in ("submitted", "running")

    @property
    def fraction(self) -> float:
        """Return how much of the job is done, 0 to 1."""
        return 1.0 if self.is_over else max(0, self.current_round - 1) / max(1, self.num_rounds)

    def last(self, kind: str) -> EdgeRound:
        """Return the last closed round of the kind; raise Declined if there is none."""
        for round_ in reversed(self.rounds):
            if round_.kind == kind and round_.state == "closed":
                return round_
        raise Declined(f"The edge's job {self.job_id} has no {kind} round; its coordinator must be upgraded.")


def read_edge_job(document: Mapping[str, object] | object) -> EdgeJob:
    """Return the job in the document; raise Declined for what is none."""
    try:
        return EdgeJob.model_validate(document)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the answer"
        raise Declined(
            f"The edge's service does not answer as a coordinator does ({where}: {problem['msg']}); check the url."
        ) from error
