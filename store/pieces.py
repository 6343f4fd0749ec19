"""Read and write a model's tensors piece by piece, so that memory depends on the size of a piece, not of a model."""

import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from common.errors import InvalidInput, InvalidTensors
from store.blobs import BLOCK_BYTES, Blob, BlobStore, disk_errors, new_hasher, write_all
from store.index import Weights, plan_shards
from store.tensors import (
    Array,
    Schema,
    TensorLocation,
    TensorSpec,
    byte_blocks,
    lay_out,
    numpy_dtype,
    read_header,
    read_into,
)
from store.weights import SHARD_METADATA, keep_index, positions


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
        self._shards: list[_NewShard] = []

    def __enter__(self) -> Self:
        """Create the shard files in their full size, with their headers."""
        try:
            for names in self._plan:
                path = self._store.scratch() / secrets.token_hex(16)
                self._shards.append(_NewShard(path, {name: self._schema[name] for name in names}))
        except BaseException:
            self._remove()
            raise
        self._shard_of = positions(self._plan)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was not finished."""
        self._remove()

    def write(self, name: str, start: int, values: Array) -> None:
        """Write the values, of the tensor's dtype, as its elements from `start` on; write no element twice."""
        _check_piece(name, self._schema[name], start, values)
        self._shards[self._shard_of[name]].write(name, start, values)
        with self._lock:
            self._missing[name] -= values.size

    def finish(self) -> Weights:
        """Store the shards and the index; raise InvalidInput when something was not written."""
        if wrong := [name for name, count in self._missing.items() if count]:
            raise InvalidInput(f"Tensors {wrong[:5]} were not written exactly once; write every element, then finish.")
        blobs = [(shard.path, shard.close()) for shard in self._shards]
        shards = [self._store.put(path, blob=blob) for path, blob in blobs]
        return keep_index(self._store, self._schema, self._shard_of, shards)

    def _remove(self) -> None:
        for shard in self._shards:
            shard.remove()


class _NewShard:
    """A shard's file while it is written: hashed as far as it is written without a gap, by whoever writes next.

    Hashing takes longer than writing, so it must not wait for the end; in order, it is nearly done by then.
    """

    def __init__(self, path: Path, schema: Schema) -> None:
        self.path = path
        head, self._locations = lay_out(schema, SHARD_METADATA)
        self._size = max((location.end for location in self._locations.values()), default=len(head))
        self._hasher = new_hasher()
        self._hasher.update(head)
        self._hashed = len(head)  # bytes from the file's beginning
        self._written: dict[int, int] = {}  # begin and end of what is written and not hashed
        self._is_hashing = False
        self._lock = threading.Lock()
        with disk_errors(path.parent):
            self._file = path.open("x+b", buffering=0)
            write_all(self._file, head)
            self._file.truncate(self._size)

    def write(self, name: str, start: int, values: Array) -> None:
        """Write the values at their place; hash what that has completed, unless another thread is at it."""
        begin = offset = self._locations[name].begin + start * values.itemsize
        with disk_errors(self.path.parent):
            for block in byte_blocks(values):
                view = memoryview(block)
                while view:
                    count = os.pwrite(self._file.fileno(), view, offset)
                    view, offset = view[count:], offset + count
        with self._lock:
            if offset > begin:
                self._written[begin] = offset
            if self._is_hashing:
                return
            self._is_hashing = True
        while (end := self._next()) is not None:
            self._hash(end)

    def close(self) -> Blob:
        """Hash what is left and close the file; return the shard's blob."""
        self._hash(self._size)
        self._file.close()
        return Blob(digest=self._hasher.hexdigest(), size=self._size)

    def remove(self) -> None:
        """Close and remove the file, unless the store has taken it over."""
        self._file.close()
        with disk_errors(self.path.parent):
            self.path.unlink(missing_ok=True)

    def _next(self) -> int | None:
        """Return how far can be hashed now; None, and let another thread do so, if no further than it is."""
        with self._lock:
            end = self._hashed
            while (following := self._written.pop(end, None)) is not None:
                end = following
            self._is_hashing = end > self._hashed
            return end if self._is_hashing else None

    def _hash(self, end: int) -> None:
        with disk_errors(self.path.parent):
            buffer = memoryview(bytearray(min(BLOCK_BYTES, end - self._hashed)))
            while self._hashed < end:
                block = buffer[: end - self._hashed]
                read_into(self._file, self._hashed, block)
                self._hasher.update(block)
                self._hashed += len(block)


def _check_piece(name: str, spec: TensorSpec, start: int, values: Array) -> None:
    if values.dtype != numpy_dtype(spec.dtype) or not 0 <= start <= start + values.size <= spec.num_elements:
        raise InvalidInput(
            f"{values.size} elements of {values.dtype} from {start} on are no piece of tensor {name!r}, which has "
            f"{spec.num_elements} of {spec.dtype}; use its dtype and stay inside."
        )
