"""Write, store and load a model's tensors as a whole."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from common.errors import InvalidTensors
from store.blobs import Blob, BlobStore, disk_errors
from store.index import Weights, build_index, describe_weights, parse_index, plan_shards, shard_file
from store.tensors import Array, Schema, TensorLocation, TensorSpec, map_tensors, read_header, schema_of, write_shard

SHARD_METADATA = MappingProxyType({"format": "pt"})  # without it, Hugging Face's transformers refuse the file

Look = Callable[[BinaryIO, Mapping[str, TensorLocation]], None]  # sees a shard's open file

_MAX_INDEX_BYTES = 256 << 20  # an index is parsed in memory


def write_weights(folder: Path, tensors: Mapping[str, Array], shard_bytes: int) -> list[tuple[Path, Blob]]:
    """Write the arrays as shard files in the folder; return each with its blob, hashed on the way."""
    plan = plan_shards(schema_of(tensors), shard_bytes)
    written = []
    for position, names in enumerate(plan):
        path = folder / shard_file(position, len(plan))
        shard = {name: tensors[name] for name in names}
        written.append((path, write_shard(path, shard, metadata=SHARD_METADATA)))
    return written


def store_weights(store: BlobStore, tensors: Mapping[str, Array], shard_bytes: int) -> Weights:
    """Store the arrays as shards with an index."""
    schema = schema_of(tensors)
    plan = plan_shards(schema, shard_bytes)
    shards = []
    for names in plan:
        with _scratch_file(store) as path:
            blob = write_shard(path, {name: tensors[name] for name in names}, metadata=SHARD_METADATA)
            shards.append(store.put(path, blob=blob))
    return keep_index(store, schema, positions(plan), shards)


def inspect_shards(store: BlobStore, shards: Sequence[Blob]) -> Weights:
    """Return what stored shards hold, by their headers, and the index that they would have; nothing is stored.

    Raise InvalidTensors for a shard that is not safetensors, or a tensor that is there twice.
    """
    schema, shard_of = _read_headers(store, shards, None)
    return describe_weights(schema, shard_of, shards)


def register_shards(store: BlobStore, shards: Sequence[Blob], *, look: Look | None = None) -> Weights:
    """Make stored shards a model: let `look` see each open file with what is where in it, then store their index.

    Raise what `inspect_shards` and `look` raise.
    """
    schema, shard_of = _read_headers(store, shards, look)
    return keep_index(store, schema, shard_of, shards)


def _read_headers(
    store: BlobStore, shards: Sequence[Blob], look: Look | None
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    schema: dict[str, TensorSpec] = {}
    shard_of: dict[str, int] = {}
    for position, shard in enumerate(shards):
        with store.open(shard) as file:
            locations = read_header(file, shard.size)
            for name, location in locations.items():
                if name in schema:
                    raise InvalidTensors(f"Tensor {name!r} is in two shards; write every tensor once.")
                schema[name] = location.spec
                shard_of[name] = position
            if look is not None:
                look(file, locations)
    return schema, shard_of


def load_index(store: BlobStore, index: Blob | str) -> Weights:
    """Return the model of an index, given as its blob or its digest."""
    blob = store.find(index) if isinstance(index, str) else index
    if blob.size > _MAX_INDEX_BYTES:
        raise InvalidTensors(f"Blob {blob.digest} of {blob.size} bytes is no index; give a model's digest.")
    with store.open(blob) as file:
        return parse_index(file.read())


def load_weights(store: BlobStore, weights: Weights) -> dict[str, Array]:
    """Map all tensors of a model, by name; see `tensors.map_tensors`."""
    tensors: dict[str, Array] = {}
    for shard in weights.shards:
        with store.open(shard) as file:
            tensors.update(map_tensors(file, shard.size))
    return dict(sorted(tensors.items()))


@contextmanager
def _scratch_file(store: BlobStore) -> Iterator[Path]:
    """Lend the name of a new file in the store's scratch, which is gone at the end unless the store took it over."""
    path = store.scratch() / secrets.token_hex(16)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def keep_index(store: BlobStore, schema: Schema, shard_of: Mapping[str, int], shards: Sequence[Blob]) -> Weights:
    """Store the index of stored shards that hold what `shard_of` says; return the model."""
    data = build_index(schema, shard_of, shards)
    weights = describe_weights(schema, shard_of, shards, data)
    with _scratch_file(store) as path, disk_errors(path.parent):
        path.write_bytes(data)
        store.put(path, blob=weights.index)
    return weights


def positions(plan: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return the number of the shard that holds each tensor."""
    return {name: position for position, names in enumerate(plan) for name in names}
