"""Describe a model as shards and an index.

The index is JSON, with the keys of Hugging Face's `model.safetensors.index.json` and ours beside them; it is written in
one canonical way, so that equal weights have equal digests. **The digest of a model is the digest of its index.**
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from common.errors import InvalidTensors
from store.blobs import Blob, hash_bytes
from store.tensors import Schema, TensorSpec, numpy_dtype

INDEX_FILE = "model.safetensors.index.json"  # as Hugging Face names it


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Describe a model's tensors and the blobs that hold them."""

    schema: Schema  # what each tensor is, by name
    shard_of: Mapping[str, int]  # position in `shards` of the shard that holds each tensor
    shards: tuple[Blob, ...]  # safetensors files
    index: Blob  # the index's own bytes; its digest is the model's

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


def plan_shards(schema: Schema, shard_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Return the names that each shard holds, from the schema alone.

    Tensors are taken by name and never split: a shard is closed when the next one would make it larger than
    `shard_bytes`, so one that is larger by itself has a shard of its own.
    """
    plan: list[tuple[str, ...]] = []
    names: list[str] = []
    total = 0
    for name in sorted(schema):
        nbytes = schema[name].nbytes
        if names and total + nbytes > shard_bytes:
            plan.append(tuple(names))
            names, total = [], 0
        names.append(name)
        total += nbytes
    if names:
        plan.append(tuple(names))
    return tuple(plan)


def shard_file(position: int, num_shards: int) -> str:
    """Return the file name of a shard, as Hugging Face writes it; positions count from 0."""
    return f"model-{position + 1:05d}-of-{num_shards:05d}.safetensors"


def build_index(schema: Schema, shard_of: Mapping[str, int], shards: Sequence[Blob]) -> bytes:
    """Return the index's bytes."""
    files = [shard_file(position, len(shards)) for position in range(len(shards))]
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in schema.values())},
        "weight_map": {name: files[position] for name, position in shard_of.items()},
        "shards": [
            {"file": file, "digest": shard.digest, "size": shard.size}
            for file, shard in zip(files, shards, strict=True)
        ],
        "tensors": {name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in schema.items()},
    }
    return json.dumps(index, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@lru_cache(maxsize=32)  # every update of a round is held against the same index
def parse_index(data: bytes) -> Weights:
    """Return what an index of ours says; raise InvalidTensors unless it is written exactly as `build_index` does."""
    try:
        index = json.loads(data)
        shards = tuple(Blob(digest=shard["digest"], size=_size(shard["size"])) for shard in index["shards"])
        position_of = {shard["file"]: position for position, shard in enumerate(index["shards"])}
        shard_of = {name: position_of[file] for name, file in index["weight_map"].items()}
        schema = {name: _parse_spec(entry) for name, entry in index["tensors"].items()}
        if shard_of.keys() != schema.keys():
            raise ValueError("it does not say of every tensor what and where it is")
        if build_index(schema, shard_of, shards) != data:
            raise ValueError("it is not in the canonical form")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidTensors(
            f"The index cannot be read ({type(error).__name__}: {str(error)[:200]}); store the model again."
        ) from error
    return describe_weights(schema, shard_of, shards, data)


def describe_weights(
    schema: Schema, shard_of: Mapping[str, int], shards: Sequence[Blob], data: bytes | None = None
) -> Weights:
    """Return the model of these shards, which hold what `shard_of` says; `data` is its index if that is built."""
    return Weights(
        schema=dict(sorted(schema.items())),
        shard_of=dict(sorted(shard_of.items())),
        shards=tuple(shards),
        index=hash_bytes(data if data is not None else build_index(schema, shard_of, shards)),
    )


def _parse_spec(entry: dict[str, Any]) -> TensorSpec:
    numpy_dtype(entry["dtype"])  # raises for one that we cannot read
    return TensorSpec(dtype=entry["dtype"], shape=tuple(_size(length) for length in entry["shape"]))


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value
