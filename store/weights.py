"""Write, store, load and export a model's tensors; read and write them piece by piece.

What the aggregation reads and writes goes through `WeightsReader` and `WeightsWriter`, so that its memory depends on
the size of a piece, not of a model.
"""

import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import BinaryIO, Self

import numpy as np

from common.errors import InvalidInput, InvalidTensors
from store.blobs import BLOCK_BYTES, Blob, BlobStore, disk_errors, hash_file, write_all
from store.index import INDEX_FILE, Weights, build_index, describe_weights, parse_index, plan_shards, shard_file
from store.tensors import (
    Array,
    Schema,
    TensorLocation,
    TensorSpec,
    byte_blocks,
    lay_out,
    map_tensors,
    numpy_dtype,
    read_header,
    read_into,
    schema_of,
    write_shard,
)

__all__ = [
    "SHARD_METADATA",
    "Weights",
    "WeightsReader",
    "WeightsWriter",
    "export_single",
    "export_weights",
    "inspect_shards",
    "load_index",
    "load_weights",
    "plan_shards",
    "register_shards",
    "store_weights",
    "write_weights",
]

SHARD_METADATA = MappingProxyType({"format": "pt"})  # without it, Hugging Face's transformers refuse the file

_MAX_INDEX_BYTES = 256 << 20  # an index is parsed in memory
_HASHING_THREADS = 4  # hashing, not the disk, is what finishing a model waits for


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
    return _keep_index(store, schema, _positions(plan), shards)


def inspect_shards(store: BlobStore, shards: Sequence[Blob]) -> Weights:
    """Return what stored shards hold, by their headers, and the index that they would have; nothing is stored.

    Raise InvalidTensors for a shard that is not safetensors, or a tensor that is there twice.
    """
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
    return describe_weights(schema, shard_of, shards)


def register_shards(store: BlobStore, shards: Sequence[Blob]) -> Weights:
    """Make stored shards a model: inspect them and store their index."""
    weights = inspect_shards(store, shards)
    return _keep_index(store, weights.schema, weights.shard_of, weights.shards)


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


def export_weights(store: BlobStore, weights: Weights, folder: Path) -> list[Path]:
    """Write the shard files and the index into the folder, as Hugging Face names them; return their paths."""
    blobs = {shard_file(position, len(weights.shards)): shard for position, shard in enumerate(weights.shards)}
    blobs[INDEX_FILE] = weights.index
    paths = []
    for name, blob in blobs.items():
        with new_file(folder / name) as path, store.open(blob) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)
        paths.append(folder / name)
    return paths


def export_single(store: BlobStore, weights: Weights, path: Path) -> None:
    """Write the whole model as one safetensors file, a block at a time."""
    first, locations = lay_out(weights.schema, SHARD_METADATA)
    with (
        new_file(path) as temporary,
        temporary.open("wb", buffering=0) as target,
        WeightsReader(store, weights) as reader,
    ):
        write_all(target, first)
        for name, location in locations.items():
            dtype = numpy_dtype(location.spec.dtype)
            block = np.empty(BLOCK_BYTES // dtype.itemsize, dtype)
            for start in range(0, location.spec.num_elements, len(block)):
                piece = block[: location.spec.num_elements - start]
                reader.read(name, start, piece)
                write_all(target, piece.view(np.uint8).data)


class WeightsReader:
    """Read pieces of a model's tensors; any number of threads may share a reader.

    It holds one shard's file open at a time, so take the tensors in the order of the shards.
    """

    def __init__(self, store: BlobStore, weights: Weights) -> None:
        self._store = store
        self._weights = weights
        self._lock = threading.Lock()
        self._current: _OpenShard | None = None

    def read(self, name: str, start: int, out: Array) -> None:
        """Fill `out`, contiguous and of the tensor's dtype, with the elements from `start` on, in row-major order."""
        spec = self._weights.schema[name]
        _check_piece(name, spec, start, out)
        if not out.flags.c_contiguous:
            raise InvalidInput("The array to read into is not contiguous; give one that is.")
        with self._shard(self._weights.shard_of[name]) as shard:
            location = shard.locations.get(name)
            if location is None or location.spec != spec:
                raise InvalidTensors(f"Tensor {name!r} is not in its shard as the index says; store the model again.")
            read_into(shard.file, location.begin + start * out.itemsize, out.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Close the open shard; the reader can be used again."""
        with self._lock:
            self._replace(None)

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the open shard."""
        self.close()

    @contextmanager
    def _shard(self, position: int) -> Iterator["_OpenShard"]:
        """Lend the open shard; it is closed when another one has taken its place and its last reader is done."""
        with self._lock:
            shard = self._current
            if shard is None or shard.position != position:
                shard = _OpenShard.open(self._store, self._weights.shards[position], position)
                self._replace(shard)
            shard.num_readers += 1
        try:
            yield shard
        finally:
            with self._lock:
                shard.num_readers -= 1
                if shard is not self._current and not shard.num_readers:
                    shard.file.close()

    def _replace(self, shard: "_OpenShard | None") -> None:
        if self._current and not self._current.num_readers:
            self._current.file.close()
        self._current = shard


@dataclass(kw_only=True, slots=True)
class _OpenShard:
    position: int  # in the model's list of shards
    file: BinaryIO  # open
    locations: Mapping[str, TensorLocation]  # where each of its tensors is
    num_readers: int = 0  # threads that read from it now

    @classmethod
    def open(cls, store: BlobStore, shard: Blob, position: int) -> Self:
        """Open the shard and read its header."""
        file = store.open(shard)
        try:
            return cls(position=position, file=file, locations=read_header(file, shard.size))
        except BaseException:
            file.close()
            raise


class WeightsWriter:
    """Write a new model piece by piece, in any order, from any number of threads.

    Use it as a context manager; leaving it without `finish` leaves nothing behind.
    """

    def __init__(self, store: BlobStore, schema: Schema, shard_bytes: int) -> None:
        self._store = store
        self._schema = schema
        self._plan = plan_shards(schema, shard_bytes)
        self._lock = threading.Lock()
        self._missing = {name: spec.num_elements for name, spec in schema.items()}  # elements not written yet
        self._places: dict[str, tuple[Path, int]] = {}  # each tensor's file and offset in it
        self._paths: list[Path] = []  # the shards' files

    def __enter__(self) -> Self:
        """Create the shard files in their full size, with their headers."""
        try:
            for names in self._plan:
                self._create({name: self._schema[name] for name in names})
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was not finished."""
        self._remove()

    def write(self, name: str, start: int, values: Array) -> None:
        """Write the values, of the tensor's dtype, as its elements from `start` on; write no element twice."""
        _check_piece(name, self._schema[name], start, values)
        path, begin = self._places[name]
        offset = begin + start * values.itemsize
        with disk_errors(path.parent), path.open("r+b", buffering=0) as file:
            for block in byte_blocks(values):
                file.seek(offset)
                write_all(file, block)
                offset += len(block)
        with self._lock:
            self._missing[name] -= values.size

    def finish(self) -> Weights:
        """Store the shards and the index; raise InvalidInput when something was not written."""
        if wrong := [name for name, count in self._missing.items() if count]:
            raise InvalidInput(f"Tensors {wrong[:5]} were not written exactly once; write every element, then finish.")
        with ThreadPoolExecutor(_HASHING_THREADS) as threads, disk_errors(self._store.scratch()):
            blobs = list(threads.map(hash_file, self._paths))
        shards = [self._store.put(path, blob=blob) for path, blob in zip(self._paths, blobs, strict=True)]
        return _keep_index(self._store, self._schema, _positions(self._plan), shards)

    def _create(self, schema: Schema) -> None:
        path = self._store.scratch() / secrets.token_hex(16)
        first, locations = lay_out(schema, SHARD_METADATA)
        with disk_errors(path.parent), path.open("xb", buffering=0) as file:
            self._paths.append(path)
            write_all(file, first)
            file.truncate(max((location.end for location in locations.values()), default=len(first)))
        self._places.update((name, (path, location.begin)) for name, location in locations.items())

    def _remove(self) -> None:
        with disk_errors(self._store.scratch()):
            for path in self._paths:
                path.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Lend the name of a temporary file beside `path`, which replaces `path` at the end and is gone after an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with disk_errors(path.parent):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _scratch_file(store: BlobStore) -> Iterator[Path]:
    """Lend the name of a new file in the store's scratch, which is gone at the end unless the store took it over."""
    path = store.scratch() / secrets.token_hex(16)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _keep_index(store: BlobStore, schema: Schema, shard_of: Mapping[str, int], shards: Sequence[Blob]) -> Weights:
    weights = describe_weights(schema, shard_of, shards)
    with _scratch_file(store) as path, disk_errors(path.parent):
        path.write_bytes(build_index(schema, shard_of, shards))
        store.put(path, blob=weights.index)
    return weights


def _positions(plan: Sequence[Sequence[str]]) -> dict[str, int]:
    return {name: position for position, names in enumerate(plan) for name in names}


def _check_piece(name: str, spec: TensorSpec, start: int, values: Array) -> None:
    if values.dtype != numpy_dtype(spec.dtype) or not 0 <= start <= start + values.size <= spec.num_elements:
        raise InvalidInput(
            f"{values.size} elements of {values.dtype} from {start} on are no piece of tensor {name!r}, which has "
            f"{spec.num_elements} of {spec.dtype}; use its dtype and stay inside."
        )
