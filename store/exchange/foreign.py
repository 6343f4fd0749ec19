"""What another node says of a model, a party or a way up: checked field by field before anything is done with it."""

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from store.blobs import Blob
from store.models import ModelState
from store.new_models import MAX_DESCRIPTION_CHARACTERS, MAX_HOPS, MAX_NAME_CHARACTERS, MAX_PARENTS, NewModel

MAX_SHARDS = 10_000
MAX_PATH = 16  # model stores on a way up

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS, pattern=r"^[^\x00]*$")]
Id = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS, pattern=r"^[\x20-\x7e]*$")]


class Foreign(BaseModel):
    """A document of another node, perhaps a newer one with fields that are not known here."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", protected_namespaces=())


class ForeignBlob(Foreign):
    """One blob."""

    digest: Digest
    size: int = Field(ge=0)  # bytes

    @property
    def blob(self) -> Blob:
        """The blob that it names."""
        return Blob(digest=self.digest, size=self.size)


class ForeignOrigin(Foreign):
    """Where a copy came from."""

    node_id: Id
    model_id: Id


class ForeignModel(Foreign):
    """A model_info."""

    model_id: Id
    tenant_id: Text = ""
    model_kind: Text = ""
    model_description: str = ""
    model_meta: dict[str, Any] = {}
    model_state: ModelState = Field(strict=False)
    model_hash: Digest
    model_size: int = Field(ge=0)  # bytes
    round: int = Field(0, ge=0)
    hop_count: int = Field(0, ge=0)
    start_datetime: AwareDatetime | None = None
    end_datetime: AwareDatetime | None = None
    location: list[float] | str | None = None
    parents: list[Id] = Field([], max_length=MAX_PARENTS)
    num_examples: int | None = None
    metrics: dict[str, Any] = {}
    shards: list[ForeignBlob] = Field(min_length=1, max_length=MAX_SHARDS)
    origin: ForeignOrigin | None = None

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if sum(shard.size for shard in self.shards) != self.model_size:
            raise ValueError("model_size is not that of the shards")
        return self

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """The blobs that hold it."""
        return tuple(shard.blob for shard in self.shards)

    def copied(self, *, node_id: str, model_id: str, state: ModelState, parents: Sequence[str]) -> NewModel:
        """Return what is said of a copy of it, one hop further, that comes from that node."""
        return NewModel(
            model_kind=self.model_kind,
            model_description=self.model_description,
            model_meta=self.model_meta,
            model_state=state,
            round=self.round,
            parents=tuple(parents),
            metrics=self.metrics,
            num_examples=self.num_examples,
            location=self.location,
            start_datetime=self.start_datetime,
            end_datetime=self.end_datetime,
            tenant_id=self.tenant_id,
            hop_count=self.hop_count + 1,
            origin_node=node_id,
            origin_model_id=model_id,
        )


class NewParty(Foreign):
    """What is said of a party when it is registered."""

    id: Id
    tenant_id: Text
    tenant_name: Text
    description: str = Field(max_length=MAX_DESCRIPTION_CHARACTERS, pattern=r"^[^\x00]*$")
    hop_count: int = Field(ge=0, le=MAX_HOPS)


class ForeignParty(NewParty):
    """A party_info."""

    created_at: AwareDatetime
    updated_at: AwareDatetime


class ForeignStore(Foreign):
    """A model store on a way up."""

    node_id: Id
    model_store_ddc: Text


class ForeignAnswer(Foreign):
    """What an offer came to: the model's record there, or the blobs that have to be sent first."""

    model: dict[str, Any] | None = None
    missing: list[ForeignBlob] | None = Field(None, max_length=MAX_SHARDS)


def brief(error: ValidationError) -> str:
    """Return what is wrong first, and where."""
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in problem['loc'])[:100]}: {problem['msg']}".removeprefix(": ")
