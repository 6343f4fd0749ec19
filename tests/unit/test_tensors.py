"""What is written as safetensors is read the same, by us and by the safetensors library; hostile files are refused."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from safetensors.numpy import load, load_file, save

from common.errors import DiskFull, InvalidTensors, StoreUnavailable
from store.blobs import BLOCK_BYTES, Blob, disk_errors, hash_file
from store.tensors import (
    _DTYPES,
    Array,
    TensorLocation,
    TensorSpec,
    byte_blocks,
    lay_out,
    numpy_dtype,
    read_header,
    read_tensors,
    safetensors_name,
    schema_of,
    write_shard,
)

# What the library's numpy side knows; the others are compared as bytes.
LIBRARY_DTYPES = {"BOOL", "U8", "I8", "U16", "I16", "F16", "U32", "I32", "F32", "C64", "U64", "I64", "F64"}

anywhere = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Draw an array of any dtype, shape, layout, byte order and bits, NaN among them."""
    dtype = _DTYPES[draw(st.sampled_from(sorted(_DTYPES)))]
    shape = draw(st.one_of(st.just(()), array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
    count = int(np.prod(shape, dtype=np.int64))
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    array: Array = np.frombuffer(raw, np.uint8).copy().view(dtype).reshape(shape) if count else np.empty(shape, dtype)
    if dtype == np.bool_:
        array = array.view(np.uint8) % 2 == 1
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "reversed", "big-endian"]))
    if layout == "transposed":
        array = array.T
    elif layout == "strided" and array.ndim:
        array = np.repeat(array, 2, axis=0)[::2]
    elif layout == "reversed" and array.ndim:
        array = array[::-1]
    elif layout == "big-endian":
        array = array.astype(array.dtype.newbyteorder(">"))
    return array


names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=0, max_size=20).filter(
    lambda name: name != "__metadata__"
)
tensor_maps = st.dictionaries(names, arrays(), max_size=6)


def native(array: Array) -> Array:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)


def same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Return whether both have the same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        (native(one[name]).dtype, one[name].shape, native(one[name]).tobytes())
        == (native(other[name]).dtype, other[name].shape, native(other[name]).tobytes())
        for name in one
    )


def file_of(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header_of(data: bytes, folder: Path) -> dict[str, TensorLocation]:
    path = folder / "file"
    path.write_bytes(data)
    with path.open("rb", buffering=0) as file:
        return read_header(file, len(data))


# --- round trips ---------------------------------------------------------------------------------------------------


@anywhere
@given(tensors=tensor_maps, metadata=st.dictionaries(names, st.text(st.characters(codec="utf-8")), max_size=3))
def test_what_is_written_is_read(tmp_path: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    path = tmp_path / os.urandom(8).hex()
    blob = write_shard(path, tensors, metadata=metadata)
    assert blob == hash_file(path)
    assert same(read_tensors(path), tensors)


@anywhere
@given(tensors=tensor_maps)
def test_the_library_reads_what_we_write(tmp_path: Path, tensors: dict[str, Array]) -> None:
    path = tmp_path / os.urandom(8).hex()
    write_shard(path, tensors, metadata={"format": "pt"})
    read = {
        name: (each["dtype"], tuple(each["shape"]), bytes(each["data"]))
        for name, each in deserialize(path.read_bytes())
    }
    assert read == {
        name: (safetensors_name(tensor.dtype), tensor.shape, native(tensor).tobytes())
        for name, tensor in tensors.items()
    }


def deserialize(data: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Let the library read a file, of any dtype."""
    return safetensors.deserialize(data)  # type: ignore[no-untyped-call, no-any-return]  # typed without its argument


@anywhere
@given(tensors=tensor_maps)
def test_we_read_what_the_library_writes(tmp_path: Path, tensors: dict[str, Array]) -> None:
    written = {name: native(each) for name, each in tensors.items() if safetensors_name(each.dtype) in LIBRARY_DTYPES}
    path = tmp_path / os.urandom(8).hex()
    path.write_bytes(save(written, {"by": "the library"}))
    assert same(read_tensors(path), written)


@anywhere
@given(tensors=tensor_maps)
def test_equal_tensors_give_equal_bytes(tmp_path: Path, tensors: dict[str, Array]) -> None:
    one, other = (
        write_shard(tmp_path / os.urandom(8).hex(), order)
        for order in (
            tensors,
            {name: native(tensors[name]) for name in reversed(tensors)},
        )
    )
    assert one == other


@pytest.mark.parametrize("name", sorted(_DTYPES))
def test_every_dtype_has_one_name_and_a_size(name: str) -> None:
    dtype = numpy_dtype(name)
    assert safetensors_name(dtype) == name
    assert TensorSpec(dtype=name, shape=(2, 3)).nbytes == 6 * dtype.itemsize


def test_bfloat16_of_torch_is_bfloat16_here(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3e38, np.inf], ml_dtypes.bfloat16)
    write_shard(tmp_path / "file", {"weight": values})
    read = read_tensors(tmp_path / "file")["weight"]
    assert read.dtype == ml_dtypes.bfloat16
    assert read.view(np.uint16).tolist() == [0x3F80, 0xC020, 0x7F62, 0x7F80]


def test_the_file_is_as_the_format_says(tmp_path: Path) -> None:
    blob = write_shard(tmp_path / "file", {"b": np.array([1, 2], np.uint8), "a": np.array(3, np.int16)})
    header = (
        b'{"a":{"dtype":"I16","shape":[],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}'
    )
    header += b" " * (-len(header) % 8)
    expected = struct.pack("<Q", len(header)) + header + b"\x03\x00\x01\x02"
    assert (tmp_path / "file").read_bytes() == expected
    assert blob == Blob(digest=blake3(expected).hexdigest(), size=len(expected))


def test_a_large_array_that_is_not_contiguous_is_written_in_blocks(tmp_path: Path) -> None:
    square = np.arange(1500 * 1100, dtype=np.float32).reshape(1500, 1100)
    column = np.arange(3 * BLOCK_BYTES, dtype=np.uint8).reshape(1, -1)[:, ::2]
    assert max(len(block) for array in (square.T, column) for block in byte_blocks(array)) <= BLOCK_BYTES
    write_shard(tmp_path / "file", {"square": square.T, "column": column})
    assert same(load_file(tmp_path / "file"), {"square": square.T, "column": column})


def test_read_arrays_can_be_changed_and_the_file_is_not(tmp_path: Path) -> None:
    write_shard(tmp_path / "file", {"weight": np.zeros(5)})
    (tmp_path / "file").chmod(0o444)
    first, second = read_tensors(tmp_path / "file"), read_tensors(tmp_path / "file")
    first["weight"] += 1
    (tmp_path / "file").unlink()
    assert (first["weight"].tolist(), second["weight"].tolist()) == ([1.0] * 5, [0.0] * 5)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["complex128", "object", "U3", "datetime64[s]", "V4", "longdouble"])
def test_arrays_that_safetensors_does_not_know_are_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(InvalidTensors, match="convert them"):
        write_shard(tmp_path / "file", {"weight": np.zeros(2, dtype)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["__metadata__", "a\nb", "x" * 1025, "\ud800"])
def test_names_that_cannot_be_used_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidTensors, match="cannot be used"):
        write_shard(tmp_path / "file", {name: np.zeros(2)})


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("store.tensors.write_all", full)
    with pytest.raises(DiskFull, match="free some space"):
        write_shard(tmp_path / "file", {"weight": np.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_disk_keeps_our_own_errors(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"^ours$"), disk_errors(tmp_path):
        raise StoreUnavailable("ours")


HOSTILE = {
    "nothing": b"",
    "too short": b"1234567",
    "header longer than the file": file_of({}, length=3),
    "header as long as memory": file_of({}, length=2**64 - 1),
    "not JSON": file_of(b"{]"),
    "not an object": file_of(b"[]"),
    "a number": file_of(b"7"),
    "spaces first": file_of(b" {}"),
    "not UTF-8": file_of(b'{"\xff":{}}'),
    "UTF-16": file_of("{}".encode("utf-16-le")),
    "deep": file_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a huge number": file_of(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', b"1"),
    "not a number": file_of(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"1"),
    "the same name twice": file_of(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"1",
    ),
    "the same key twice": file_of(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "an unknown dtype": file_of({"a": entry("F4")}, b"1234"),
    "a dtype that is a list": file_of({"a": entry([])}, b"1234"),  # type: ignore[arg-type]  # hostile
    "no dtype": file_of({"a": {"shape": [4], "data_offsets": [0, 4]}}, b"1234"),
    "another key": file_of({"a": {**entry(), "pickle": 1}}, b"1234"),
    "an entry that is none": file_of({"a": 5}, b"1234"),
    "a negative length": file_of({"a": entry(shape=(-4,))}, b"1234"),
    "two negative lengths": file_of({"a": entry(shape=(-2, -2))}, b"1234"),
    "a length that is true": file_of({"a": entry(shape=(True, 4))}, b"1234"),
    "a length that is a float": file_of({"a": entry(shape=(4.0,))}, b"1234"),
    "a shape that is a number": file_of({"a": entry(shape=4)}, b"1234"),
    "a shape that wraps around": file_of({"a": entry(shape=(2**32, 2**32))}, b""),
    "an empty shape that no memory holds": file_of({"a": entry(shape=(0, 2**62, 4), offsets=(0, 0))}),
    "too many dimensions": file_of({"a": entry(shape=(1,) * 65, offsets=(0, 1))}, b"1"),
    "a shape for other bytes": file_of({"a": entry(shape=(3,))}, b"1234"),
    "offsets backwards": file_of({"a": entry(offsets=(4, 0))}, b"1234"),
    "negative offsets": file_of({"a": entry(offsets=(-4, 0))}, b"1234"),
    "three offsets": file_of({"a": entry(offsets=(0, 2, 4))}, b"1234"),
    "offsets beyond the file": file_of({"a": entry(offsets=(4, 8))}, b"1234"),
    "a hole at the beginning": file_of({"a": entry(offsets=(1, 5))}, b"12345"),
    "a hole between": file_of({"a": entry(), "b": entry(offsets=(5, 9))}, b"123456789"),
    "an overlap": file_of({"a": entry(), "b": entry(offsets=(3, 7))}, b"1234567"),
    "twice the same bytes": file_of({"a": entry(), "b": entry()}, b"1234"),
    "bytes after the end": file_of({"a": entry()}, b"12345"),
    "bytes missing": file_of({"a": entry()}, b"123"),
    "a name that is too long": file_of({"x" * 1025: entry()}, b"1234"),
    "half a character as a name": file_of(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"1234"),
    "a name with control characters": file_of({"a\x1b[31m": entry()}, b"1234"),
    "metadata that is no map": file_of({"__metadata__": [], "a": entry()}, b"1234"),
    "metadata that is no text": file_of({"__metadata__": {"a": 1}, "a": entry()}, b"1234"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(InvalidTensors):
        header_of(HOSTILE[case], tmp_path)


def test_a_header_above_the_callers_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(file_of({"a": entry()}, b"1234"))
    size = (tmp_path / "file").stat().st_size
    with (tmp_path / "file").open("rb", buffering=0) as file, pytest.raises(InvalidTensors, match="limit"):
        read_header(file, size, max_header_bytes=10)


def test_a_file_that_shrinks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(file_of({"a": entry()}, b"1234")[:20])
    with (tmp_path / "file").open("rb", buffering=0) as file, pytest.raises(InvalidTensors, match="ends before"):
        read_header(file, 10_000)


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["F32", "U8"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4),
    ),
    max_leaves=12,
)


@anywhere
@given(
    header=st.one_of(
        st.binary(max_size=60),
        st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), json_values, max_size=3),
        st.dictionaries(
            st.sampled_from(["a", "b", "c"]),
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["U8", "F32", "BF16", "Q9"]),
                    "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3),
                    "data_offsets": st.lists(st.integers(-1, 9), min_size=2, max_size=2),
                }
            ),
            max_size=3,
        ),
    ),
    data=st.binary(max_size=9),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_whatever_comes_is_read_as_the_library_does_or_refused(
    tmp_path: Path, header: object, data: bytes, length: int | None
) -> None:
    raw = file_of(header, data, length=length)
    try:
        locations = header_of(raw, tmp_path)
    except InvalidTensors:
        return
    theirs = {name: (each["dtype"], each["shape"], bytes(each["data"])) for name, each in deserialize(raw)}
    assert theirs == {
        name: (where.spec.dtype, list(where.spec.shape), raw[where.begin : where.end])
        for name, where in locations.items()
    }


@anywhere
@given(tensors=tensor_maps, position=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(tmp_path: Path, tensors: dict[str, Array], position: int, byte: int) -> None:
    path = tmp_path / os.urandom(8).hex()
    write_shard(path, tensors)
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] = byte
    path.write_bytes(raw)
    try:
        read = read_tensors(path)
    except InvalidTensors:
        return
    for name, location in header_of(bytes(raw), tmp_path).items():
        assert read[name].nbytes == location.end - location.begin


def test_the_layout_is_aligned_whatever_the_names(tmp_path: Path) -> None:
    tensors: dict[str, Array] = {"a": np.zeros(3, np.int8), "b": np.zeros(3, np.float64), "c": np.zeros(3, np.float16)}
    _, locations = lay_out(schema_of(tensors), {"format": "pt"})
    assert list(locations) == ["b", "c", "a"]
    assert all(location.begin % tensors[name].itemsize == 0 for name, location in locations.items())
    write_shard(tmp_path / "file", tensors)
    assert load((tmp_path / "file").read_bytes()).keys() == tensors.keys()
