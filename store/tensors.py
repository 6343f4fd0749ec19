"""Read and write tensors as safetensors: 8 bytes of header length, a JSON header, the tensors' bytes.

The format is https://github.com/huggingface/safetensors#format. It is read here, and not by that library, because
updates come from other people's machines: everything in a header is checked before anything is trusted, and reading,
writing and hashing go in bounded pieces.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Never

import ml_dtypes
import numpy as np
import numpy.typing as npt

from common.errors import InvalidTensors
from store.blobs import BLOCK_BYTES, Blob, disk_errors, new_hasher, write_all

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_NAME_CHARACTERS = 1024
MAX_DIMENSIONS = 64  # numpy's own limit

_LENGTH = struct.Struct("<Q")  # the header's length in bytes, which the file begins with
_ALIGNMENT = 8  # bytes; the header is padded so that the data can be mapped
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_BYTES = 2**63 - 1  # the largest file offset

# Those of less than a byte (F4, F6_…) are left out: numpy holds them one a byte, so their files cannot be mapped.
_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Say what a tensor is, without its values."""

    dtype: str  # as safetensors names it: "F32", "BF16", "I64", "BOOL", …
    shape: tuple[int, ...]  # elements along each dimension; () for a single number

    @property
    def num_elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.num_elements * _DTYPES[self.dtype].itemsize


Schema = Mapping[str, TensorSpec]  # what each tensor of a model is, by name


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorLocation:
    """Say where in a file a tensor is."""

    spec: TensorSpec
    begin: int  # offset in the file of its first byte
    end: int  # offset in the file after its last byte


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype, little-endian, of a safetensors name; raise InvalidTensors."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise InvalidTensors(
            f"Tensors of dtype {name[:40]!r} cannot be read; use one of {', '.join(_DTYPES)}."
        ) from None


def safetensors_name(dtype: np.dtype[Any]) -> str:
    """Return the safetensors name of a numpy dtype of either byte order; raise InvalidTensors."""
    try:
        return _NAMES[dtype.newbyteorder("<")]
    except KeyError:
        raise InvalidTensors(
            f"Arrays of {dtype} cannot be stored; convert them to one of {', '.join(_DTYPES)}."
        ) from None


def spec_of(tensor: Array) -> TensorSpec:
    """Return what the array is."""
    return TensorSpec(dtype=safetensors_name(tensor.dtype), shape=tensor.shape)


def schema_of(tensors: Mapping[str, Array]) -> dict[str, TensorSpec]:
    """Return what each array is."""
    return {name: spec_of(tensor) for name, tensor in tensors.items()}


# --- reading -------------------------------------------------------------------------------------------------------


def read_header(file: BinaryIO, size: int, *, max_header_bytes: int = MAX_HEADER_BYTES) -> dict[str, TensorLocation]:
    """Return where each tensor of a file of `size` bytes is, in the order of the data; raise InvalidTensors.

    The tensors are proven to cover the file without hole or overlap, so every location can be read.
    """
    raw_length = bytearray(_LENGTH.size)
    if size < _LENGTH.size:
        raise InvalidTensors(f"A file of {size} bytes is too short for safetensors; write it again.")
    read_into(file, 0, memoryview(raw_length))
    (header_bytes,) = _LENGTH.unpack(raw_length)
    if header_bytes > min(max_header_bytes, size - _LENGTH.size):
        raise InvalidTensors(
            f"The header claims {header_bytes} bytes, more than the file or the limit ({max_header_bytes}) has; "
            "write the file again."
        )
    raw_header = bytearray(header_bytes)
    read_into(file, _LENGTH.size, memoryview(raw_header))
    entries = _parse_json(raw_header)
    _check_metadata(entries.pop("__metadata__", {}))
    data_begin = _LENGTH.size + header_bytes
    locations = {name: _location(name, entry, data_begin) for name, entry in entries.items()}
    ordered = dict(sorted(locations.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = data_begin
    for name, location in ordered.items():
        if location.begin != position:
            raise InvalidTensors(f"Tensor {name!r} does not begin where the one before it ends; write the file again.")
        position = location.end
    if position != size:
        raise InvalidTensors(f"The tensors end at byte {position} of a file of {size} bytes; write the file again.")
    return ordered


def read_tensors(path: Path) -> dict[str, Array]:
    """Map the tensors of one file; see `map_tensors`."""
    with disk_errors(path.parent), path.open("rb", buffering=0) as file:
        return map_tensors(file, os.fstat(file.fileno()).st_size)


def map_tensors(file: BinaryIO, size: int) -> dict[str, Array]:
    """Return writable arrays over a private mapping of the file.

    Nothing is read before it is used, and what is written to an array is the process's own: it reaches neither the
    file nor another mapping. The arrays outlive the open file and its name; only cutting the file short harms them.
    """
    locations = read_header(file, size)
    mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    return {
        name: np.ndarray(where.spec.shape, numpy_dtype(where.spec.dtype), buffer=mapping, offset=where.begin)
        if where.end > where.begin
        else np.empty(where.spec.shape, numpy_dtype(where.spec.dtype))
        for name, where in locations.items()
    }


def read_into(file: BinaryIO, offset: int, buffer: memoryview) -> None:
    """Fill the buffer from the file's offset, without moving its position; raise InvalidTensors at its end."""
    descriptor = file.fileno()
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise InvalidTensors("The file ends before its tensors do; fetch or write it again.")
        buffer = buffer[count:]
        offset += count


def _parse_json(raw: bytearray) -> dict[str, Any]:
    try:
        if not raw.startswith(b"{"):
            raise ValueError("it does not begin with {")
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidTensors(
            f"The header is not the JSON that safetensors has ({error}); write the file again."
        ) from error
    assert isinstance(header, dict)  # it began with {
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is there twice")
    return result


def _refuse_constant(constant: str) -> Never:
    raise ValueError(f"{constant} is not JSON")


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidTensors("The header's __metadata__ is not a map of text to text; write the file again.")


def _location(name: str, entry: object, data_begin: int) -> TensorLocation:
    """Check one entry of the header by itself."""
    if len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        raise InvalidTensors(
            f"Tensor name {name[:40]!a} cannot be used; use up to {MAX_NAME_CHARACTERS} printable characters."
        )
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise InvalidTensors(
            f"The entry of tensor {name!r} has not the keys dtype, shape and data_offsets; write it again."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise InvalidTensors(f"The entry of tensor {name!r} has values of the wrong kind; write it again.")
    item_bytes = numpy_dtype(dtype).itemsize
    if len(shape) > MAX_DIMENSIONS or item_bytes * math.prod(max(1, length) for length in shape) > _MAX_BYTES:
        raise InvalidTensors(f"Tensor {name!r} has a shape that no memory holds; write it again.")
    spec = TensorSpec(dtype=dtype, shape=tuple(shape))
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise InvalidTensors(
            f"Tensor {name!r} has {end - begin} bytes where its shape needs {spec.nbytes}; write it again."
        )
    return TensorLocation(spec=spec, begin=data_begin + begin, end=data_begin + end)


def _are_sizes(values: object) -> bool:
    """Return whether this is a list of numbers that can be sizes; True is none, though Python counts it as 1."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MAX_BYTES for value in values)


# --- writing -------------------------------------------------------------------------------------------------------


def lay_out(schema: Schema, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, TensorLocation]]:
    """Return the first bytes of a file, up to the data, and where in it each tensor goes.

    The same schema gives the same bytes: widest elements first, so that all are aligned, then by name.
    """
    order = sorted(schema, key=lambda name: (-numpy_dtype(schema[name].dtype).itemsize, name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        spec = schema[name]
        if name == "__metadata__" or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
            raise InvalidTensors(f"Tensor name {name[:40]!a} cannot be used; give the tensor another one.")
        end = offset + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    first = _LENGTH.pack(len(text)) + text
    locations = {}
    for name in order:
        begin, end = entries[name]["data_offsets"]
        locations[name] = TensorLocation(spec=schema[name], begin=len(first) + begin, end=len(first) + end)
    return first, locations


def write_shard(
    path: Path, tensors: Mapping[str, Array], *, metadata: Mapping[str, str] = MappingProxyType({})
) -> Blob:
    """Write the arrays to a new file and return its blob; on an error there is no file.

    Equal tensors give equal bytes. Arrays of any layout and byte order are written as they are, a block at a time.
    """
    first, locations = lay_out(schema_of(tensors), metadata)
    hasher = new_hasher()
    hasher.update(first)
    size = len(first)
    with disk_errors(path.parent), path.open("xb", buffering=0) as file:
        try:
            write_all(file, first)
            for name in locations:
                for block in byte_blocks(tensors[name]):
                    hasher.update(block)
                    write_all(file, block)
                    size += len(block)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return Blob(digest=hasher.hexdigest(), size=size)


def byte_blocks(array: Array) -> Iterator[memoryview]:
    """Go through the array's bytes in row-major order and little-endian; copies at most a block of it at a time."""
    stored = array.dtype.newbyteorder("<")
    if array.flags.c_contiguous and array.dtype == stored:
        data = array.reshape(-1).view(np.uint8).data
        for start in range(0, len(data), BLOCK_BYTES):
            yield data[start : start + BLOCK_BYTES]
    elif array.nbytes <= BLOCK_BYTES:
        yield from byte_blocks(np.ascontiguousarray(array, stored))
    else:
        rows = max(1, BLOCK_BYTES * len(array) // array.nbytes)
        for start in range(0, len(array), rows):
            yield from byte_blocks(array[start] if rows == 1 else array[start : start + rows])
