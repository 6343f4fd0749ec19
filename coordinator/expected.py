"""Say what an update must look like: names, shapes, dtypes, and how much there can be of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import Engine

from common.errors import UpdateRejected
from coordinator.model_weights import index_digest
from coordinator.norms import Reference
from coordinator.rounds import Round
from coordinator.services import Services
from coordinator.states import RoundKind
from store.blobs import Blob
from store.database import reading
from store.index import Weights
from store.models import get_model
from store.tensors import TensorSpec, numpy_dtype
from store.weights import load_index

_HEADER_BYTES = 4096  # of a shard, beyond what its tensors need


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What an update must look like."""

    schema: Mapping[str, TensorSpec] | None = None  # None for the first model, which nobody knows yet
    global_model: Weights | None = None  # what it is held against
    is_moments: bool = False  # it holds both moments of each floating tensor
    max_shards: int = 0
    max_bytes: int = 0  # of all shards, but for what each one's header says of itself

    def most_bytes(self, num_shards: int) -> int:
        """Return how many bytes an update in so many shards can have."""
        return self.max_bytes + num_shards * _HEADER_BYTES

    def reference(self, services: Services) -> Reference | None:
        """Return what the update's values are compared with; None for the first model."""
        if self.schema is None or self.global_model is None:
            return None
        return Reference(services.blobs, self.global_model, self.schema, moments=self.is_moments)

    def check_size(self, shards: Sequence[Blob]) -> None:
        """Refuse by what is announced what is too much to be the update, before a byte of it is read."""
        if len(shards) > self.max_shards:
            raise UpdateRejected(f"The update has {len(shards)} shards; there can be {self.max_shards}.")
        total = sum(shard.size for shard in shards)
        if self.schema is not None and total > self.most_bytes(len(shards)):
            values = sum(spec.nbytes for spec in self.schema.values())
            raise UpdateRejected(f"The update has {total} bytes; the global model has {values}.")


def expected_update(services: Services, round_: Round) -> Expected:
    """Return what a site's update must look like in the round."""
    settings = services.settings
    if round_.kind is RoundKind.TEST:
        return Expected()
    if round_.input_model_id is None:
        return Expected(max_shards=settings.initial_shards, max_bytes=settings.initial_shards * settings.shard_bytes)
    weights = load_index(services.blobs, _index_digest(services.engine, round_.input_model_id))
    is_moments = round_.kind is RoundKind.SWAG
    schema = moments_schema(weights.schema) if is_moments else weights.schema
    values = sum(spec.nbytes for spec in schema.values())
    headers = sum(len(name.encode()) + 256 for name in schema)
    return Expected(
        schema=schema,
        global_model=weights,
        is_moments=is_moments,
        max_shards=len(schema),  # each holds a tensor at least
        max_bytes=values + headers,
    )


@lru_cache(maxsize=64)  # a model never changes, and every update of a round is held against the same one
def _index_digest(engine: Engine, model_id: str) -> str:
    with reading(engine) as connection:
        return index_digest(get_model(connection, model_id))


def moments_schema(schema: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return what a SWAG answer holds for a model: both moments of every floating tensor, in float32."""
    floating = {
        name: TensorSpec(dtype="F32", shape=spec.shape)
        for name, spec in schema.items()
        if numpy_dtype(spec.dtype).kind not in "biuc"
    }
    return {f"{moment}/{name}": spec for moment in ("first", "second") for name, spec in floating.items()}


def check_schema(found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> None:
    """Raise UpdateRejected, naming the first difference, unless names, shapes and dtypes are as expected."""
    if missing := sorted(expected.keys() - found.keys()):
        raise UpdateRejected(f"Tensor {missing[0]!r} is missing ({len(missing)} are).")
    if extra := sorted(found.keys() - expected.keys()):
        raise UpdateRejected(f"Tensor {extra[0][:100]!r} is not in the global model ({len(extra)} are not).")
    for name, spec in expected.items():
        if found[name].shape != spec.shape:
            raise UpdateRejected(f"Tensor {name!r} has shape {found[name].shape}; expected {spec.shape}.")
        if found[name].dtype != spec.dtype:
            raise UpdateRejected(f"Tensor {name!r} has dtype {found[name].dtype}; expected {spec.dtype}.")
