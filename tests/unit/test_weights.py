"""A model goes into a store and comes out the same, whole, in pieces, or as files that other tools read."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from common.errors import InvalidInput, InvalidTensors, NotFound
from store.blobs import Blob
from store.export import export_single, export_weights
from store.folder import FolderStore
from store.index import build_index, parse_index, plan_shards, shard_file
from store.pieces import WeightsReader, WeightsWriter
from store.tensors import Array, Schema, TensorSpec, schema_of, write_shard
from store.weights import (
    inspect_shards,
    load_index,
    load_weights,
    register_shards,
    store_weights,
    write_weights,
)

TENSORS: dict[str, Array] = {
    "layer.weight": np.arange(600, dtype=np.float32).reshape(20, 30).T,
    "layer.bias": np.arange(30, dtype=np.float64),
    "half": np.arange(7).astype(ml_dtypes.bfloat16),
    "steps": np.array(2**53 + 1, np.int64),
    "empty": np.zeros((0, 3), np.float16),
    "mask": np.array([True, False, True]),
}


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    opened = FolderStore(tmp_path / "store")
    opened.prepare()
    return opened


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


def bytes_of(count: int) -> TensorSpec:
    return TensorSpec(dtype="U8", shape=(count,))


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def stored(store: FolderStore) -> set[Blob]:
    assert list(store.scratch().iterdir()) == []
    return set(store.blobs())


# --- the plan ------------------------------------------------------------------------------------------------------


def test_shards_are_filled_by_name_and_a_large_tensor_is_alone() -> None:
    schema = {"d": bytes_of(10), "a": bytes_of(40), "c": bytes_of(500), "b": bytes_of(60), "e": bytes_of(90)}
    # a + b = 100 fit, c is larger than a shard, d + e = 100 fit
    assert plan_shards(schema, 100) == (("a", "b"), ("c",), ("d", "e"))
    assert plan_shards({}, 100) == ()


@given(sizes=st.dictionaries(st.text(max_size=3), st.integers(0, 50), max_size=12), shard_bytes=st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_a_plan_holds_every_tensor_once_and_no_more_than_fits(sizes: dict[str, int], shard_bytes: int) -> None:
    schema: Schema = {name: bytes_of(size) for name, size in sizes.items()}
    plan = plan_shards(schema, shard_bytes)
    assert [name for names in plan for name in names] == sorted(sizes)
    assert all(len(names) == 1 or sum(sizes[name] for name in names) <= shard_bytes for names in plan)
    assert plan == plan_shards({name: schema[name] for name in reversed(list(schema))}, shard_bytes)


# --- the index -----------------------------------------------------------------------------------------------------


def test_the_index_is_the_one_of_hugging_face_and_more(store: FolderStore) -> None:
    weights = store_weights(store, {"b": np.zeros(2, np.float32), "a": np.zeros(3, np.int8)}, shard_bytes=8)
    with store.open(weights.index) as file:
        data = file.read()
    assert json.loads(data) == {
        "metadata": {"total_size": 11},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
        "shards": [
            {"file": shard_file(position, 2), "digest": shard.digest, "size": shard.size}
            for position, shard in enumerate(weights.shards)
        ],
        "tensors": {"a": {"dtype": "I8", "shape": [3]}, "b": {"dtype": "F32", "shape": [2]}},
    }
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()


def test_equal_weights_have_equal_digests(store: FolderStore) -> None:
    one = store_weights(store, TENSORS, shard_bytes=1000)
    other = store_weights(store, {name: TENSORS[name].copy() for name in reversed(TENSORS)}, shard_bytes=1000)
    changed = store_weights(store, {**TENSORS, "steps": np.array(2**53, np.int64)}, shard_bytes=1000)
    assert one == other
    assert one.index.digest != changed.index.digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"a"', b'"b"'),
        (b"[3]", b"[3.0]"),
        (b"[3]", b"[-3]"),
        (b"[3]", b"[ 3]"),
        (b"I8", b"I9"),
        (b"00001.s", b"00002.s"),
        (b'"size":1', b'"size":1.'),
        (b'"shards"', b'"sharks"'),
        (b"{", b"["),
        (b"}", b""),
    ],
)
def test_an_index_that_is_not_ours_is_refused(old: bytes, new: bytes) -> None:
    data = build_index({"a": TensorSpec(dtype="I8", shape=(3,))}, {"a": 0}, [Blob(digest="0" * 64, size=10)])
    assert parse_index(data).size == 10
    with pytest.raises(InvalidTensors, match="index"):
        parse_index(data.replace(old, new, 1))


def test_an_index_that_is_missing_is_not_found(store: FolderStore) -> None:
    with pytest.raises(NotFound):
        load_index(store, "0" * 64)


# --- whole models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 1000, 1 << 30])
def test_what_is_stored_is_loaded(store: FolderStore, shard_bytes: int) -> None:
    weights = store_weights(store, TENSORS, shard_bytes)
    assert load_index(store, weights.index) == load_index(store, weights.index.digest) == weights
    assert same(load_weights(store, weights), TENSORS)
    assert weights.size == sum(shard.size for shard in weights.shards)
    assert stored(store) == {*weights.shards, weights.index}


def test_what_a_site_writes_is_what_the_coordinator_registers(store: FolderStore, tmp_path: Path) -> None:
    written = write_weights(tmp_path, TENSORS, 1000)
    assert [path.name for path, _ in written] == [
        shard_file(position, len(written)) for position in range(len(written))
    ]
    shards = [store.put(path, blob=blob) for path, blob in written]
    inspected = inspect_shards(store, shards)
    assert stored(store) == set(shards)
    assert register_shards(store, shards) == inspected == store_weights(store, TENSORS, 1000)
    assert inspected.schema == schema_of(TENSORS)


def test_a_tensor_in_two_shards_is_refused(store: FolderStore, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    blobs = [write_shard(path, {"twice": np.full(3, number)}) for number, path in enumerate(paths)]
    shards = [store.put(path, blob=blob) for path, blob in zip(paths, blobs, strict=True)]
    with pytest.raises(InvalidTensors, match="twice"):
        register_shards(store, shards)


def test_a_shard_that_is_no_safetensors_is_refused(store: FolderStore) -> None:
    path = store.scratch() / "file"
    path.write_bytes(b"\x80\x04pickle? no")
    with pytest.raises(InvalidTensors):
        register_shards(store, [store.put(path)])


def test_exported_files_are_read_by_the_library(store: FolderStore, tmp_path: Path) -> None:
    tensors = {name: TENSORS[name] for name in TENSORS if name != "half"}  # the library's numpy side knows no bfloat16
    weights = store_weights(store, tensors, shard_bytes=300)
    (tmp_path / "out").mkdir()
    paths = export_weights(store, weights, tmp_path / "out")
    weight_map = json.loads(paths[-1].read_bytes())["weight_map"]
    assert paths[-1].name == "model.safetensors.index.json"
    assert set(paths) == set((tmp_path / "out").iterdir())
    for path in paths[:-1]:
        loaded = load_file(path)
        assert same(loaded, {name: tensors[name] for name in tensors if weight_map[name] == path.name})


def test_a_model_is_exported_as_one_file(store: FolderStore, tmp_path: Path) -> None:
    tensors = {**TENSORS, "large": np.arange(700_000, dtype=np.float32)}
    del tensors["half"]
    weights = store_weights(store, tensors, shard_bytes=300)
    export_single(store, weights, tmp_path / "model.safetensors")
    assert same(load_file(tmp_path / "model.safetensors"), tensors)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "model.safetensors"}


def test_an_export_that_fails_leaves_what_was_there(store: FolderStore, tmp_path: Path) -> None:
    weights = store_weights(store, TENSORS, shard_bytes=1000)
    store.delete(weights.shards[-1].digest)
    (tmp_path / "model.safetensors").write_bytes(b"before")
    with pytest.raises(NotFound):
        export_single(store, weights, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"store", "model.safetensors"}


# --- pieces --------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_piece_is_read(store: FolderStore, data: st.DataObject) -> None:
    weights = store_weights(store, TENSORS, shard_bytes=1000)
    with WeightsReader(store, weights) as reader:
        for _ in range(5):
            name = data.draw(st.sampled_from(sorted(TENSORS)))
            flat = TENSORS[name].reshape(-1)
            start = data.draw(st.integers(0, flat.size))
            out = np.empty(data.draw(st.integers(0, flat.size - start)), flat.dtype)
            reader.read(name, start, out)
            assert np.array_equal(out, flat[start : start + out.size])


def test_pieces_that_are_none_are_refused(store: FolderStore) -> None:
    weights = store_weights(store, TENSORS, shard_bytes=1000)
    with WeightsReader(store, weights) as reader, WeightsWriter(store, weights.schema, 1000) as writer:
        for use in (reader.read, writer.write):
            for start, array in (
                (-1, np.zeros(1)),
                (30, np.zeros(1)),
                (0, np.zeros(31)),
                (0, np.zeros(1, np.float32)),
                (0, np.zeros(1, ">f8")),
            ):
                with pytest.raises(InvalidInput, match="no piece"):
                    use("layer.bias", start, array)
        with pytest.raises(InvalidInput, match="not contiguous"):
            reader.read("layer.bias", 0, np.zeros(20)[::2])


def test_threads_share_a_reader_across_shards(store: FolderStore) -> None:
    tensors: dict[str, Array] = {f"t{number}": np.full(5000, number, np.int32) for number in range(8)}
    weights = store_weights(store, tensors, shard_bytes=1)
    before = open_files()

    with WeightsReader(store, weights) as reader:

        def read(attempt: int) -> bool:
            number = attempt * 5 % 8
            out = np.empty(1000, np.int32)
            reader.read(f"t{number}", attempt % 4000, out)
            return bool((out == number).all())

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(read, range(400)))
    assert open_files() == before


def test_a_shard_that_is_not_as_the_index_says_is_refused(store: FolderStore) -> None:
    weights = store_weights(store, {"a": np.zeros(4, np.float32)}, shard_bytes=100)
    lying = parse_index(build_index({"a": TensorSpec(dtype="F32", shape=(2, 2))}, {"a": 0}, weights.shards))
    with WeightsReader(store, lying) as reader, pytest.raises(InvalidTensors, match="as the index says"):
        reader.read("a", 0, np.zeros(4, np.float32))


@pytest.mark.parametrize("shard_bytes", [1, 1000, 1 << 30])
def test_what_is_written_in_pieces_is_what_is_stored_whole(store: FolderStore, shard_bytes: int) -> None:
    pieces = [
        (name, start, np.ascontiguousarray(tensor).reshape(-1)[start : start + 11])
        for name, tensor in TENSORS.items()
        for start in range(0, tensor.size, 11)
    ]
    order = np.random.default_rng(0).permutation(len(pieces))
    with WeightsWriter(store, schema_of(TENSORS), shard_bytes) as writer:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda position: writer.write(*pieces[position]), order))
        written = writer.finish()
    assert written == store_weights(store, TENSORS, shard_bytes)
    assert stored(store) == {*written.shards, written.index}


def test_unfinished_output_leaves_nothing(store: FolderStore) -> None:
    def fail() -> None:
        with WeightsWriter(store, schema_of(TENSORS), 1000) as writer:
            writer.write("layer.bias", 0, np.zeros(3))
            raise RuntimeError("the strategy failed")

    with pytest.raises(RuntimeError, match="strategy"):
        fail()
    assert stored(store) == set()


def test_output_with_a_hole_is_refused(store: FolderStore) -> None:
    with WeightsWriter(store, schema_of(TENSORS), 1000) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, 0, tensor.reshape(-1)[: max(0, tensor.size - (name == "mask"))])
        with pytest.raises(InvalidInput, match="mask"):
            writer.finish()
    assert stored(store) == set()


def test_two_writers_at_once_do_not_meet(store: FolderStore) -> None:
    together = threading.Barrier(2)

    def write(_: int) -> object:
        with WeightsWriter(store, schema_of(TENSORS), 1000) as writer:
            together.wait()
            for name, tensor in TENSORS.items():
                writer.write(name, 0, tensor.reshape(-1))
            return writer.finish()

    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(write, range(2))
    assert one == other == store_weights(store, TENSORS, 1000)
