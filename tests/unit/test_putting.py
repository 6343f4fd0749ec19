"""Facts about what may be put, how it is recorded, and how it comes back."""

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from common.errors import Conflict, InvalidInput, NotFound, TooLarge
from common.settings import Settings
from store.blobs import BLOCK_BYTES, Blob, hash_bytes, hash_file
from store.database import reading, writing
from store.downloading import prepare_download
from store.export import export_single
from store.model_stores import add_store, remove_store
from store.models import ModelInfo, ModelState, add_model, find_models, get_model
from store.new_models import MAX_DEPTH
from store.opening import OpenStore, open_store
from store.putting import NewModel, check_new_model, parse_meta, put_file, put_shards, spooled
from store.tensors import Array
from store.weights import load_index, store_weights

DDC = "ddc:digits"
TENSORS: dict[str, Array] = {
    "layer.weight": np.arange(700_000, dtype=np.float64).reshape(700, 1000),  # several blocks
    "layer.bias": np.arange(10, dtype=np.float32),
    "steps": np.array(7, np.int64),
    "empty": np.empty((0, 3), np.float32),
    "mask": np.array([True, False, True]),
    **{f"many.{number}": np.full(3, number, np.int16) for number in range(50)},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenStore]:
    folder = tmp_path_factory.mktemp("node")
    settings = Settings(
        database_url=f"sqlite:///{folder}/records.db",
        blob_folder=folder / "blobs",
        store_key_file=folder / "store.key",
        max_model_gigabytes=0.1,
    )
    with open_store(settings) as store:
        with writing(store.engine) as connection:
            add_store(connection, DDC)
        yield store
        assert list(store.blobs.scratch().iterdir()) == []


@pytest.fixture(scope="module")
def sharded(store: OpenStore) -> ModelInfo:
    """Give a model of several shards."""
    weights = store_weights(store.blobs, TENSORS, 1_000_000)
    return put_shards(store, DDC, None, weights.shards, weights.index.digest, NewModel())


@pytest.fixture
def settings() -> Settings:
    return Settings()


def put(store: OpenStore, data: bytes, new: NewModel | None = None) -> ModelInfo:
    with spooled(store, [data]) as (path, blob):
        return put_file(store, DDC, path, blob, new or NewModel())


def load(store: OpenStore, info: ModelInfo, start: int = 0) -> bytes:
    return b"".join(prepare_download(store, info).open(start))


def nested(depth: int, inside: Any = 1) -> Any:
    for _ in range(depth - 1):
        inside = [inside]
    return {"a": inside}


class TestFiles:
    def test_a_store_of_the_same_name_that_came_meanwhile_is_another_one(
        self, store: OpenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with writing(store.engine) as connection:
            add_store(connection, "ddc:passing")
        keep = store.blobs.put

        def put_slowly(path: Path, *, blob: Blob | None = None) -> Blob:
            with writing(store.engine) as connection:
                remove_store(connection, "ddc:passing")
                add_store(connection, "ddc:passing", tenant_id="another")
            return keep(path, blob=blob)

        monkeypatch.setattr(store.blobs, "put", put_slowly)
        with spooled(store, [b"a model"]) as (path, blob), pytest.raises(NotFound, match="deleted meanwhile"):
            put_file(store, "ddc:passing", path, blob, NewModel())
        with reading(store.engine) as connection:
            assert find_models(connection, store="ddc:passing") == ()

    def test_any_bytes_are_a_model(self, store: OpenStore) -> None:
        new = NewModel(
            model_kind="pickle",
            model_description="Größe",
            model_meta={"additonal": "additional data"},
            model_state=20,
            round=3,
            parents=["p"],
            metrics={"loss": 0.5},
            num_examples=1 << 40,
            location=[8.4, 49],
            start_datetime=datetime(2026, 1, 1, tzinfo=UTC),
            tenant_id="t",
            hop_count=1,
        )
        info = put(store, b"any bytes", new)
        assert info == ModelInfo(
            model_id=info.model_id,
            store=DDC,
            tenant_id="t",
            model_kind="pickle",
            model_description="Größe",
            model_meta={"additonal": "additional data"},
            model_state=ModelState.FEEDBACKED,
            model_hash=hash_bytes(b"any bytes").digest,
            model_size=9,
            round=3,
            hop_count=1,
            start_datetime=datetime(2026, 1, 1, tzinfo=UTC),
            location=[8.4, 49],
            parents=("p",),
            num_examples=1 << 40,
            metrics={"loss": 0.5},
            shards=(hash_bytes(b"any bytes"),),
            created_at=info.created_at,
            sequence=info.sequence,
        )
        with reading(store.engine) as connection:
            assert get_model(connection, info.model_id) == info
        assert load(store, info) == b"any bytes"
        assert load(store, info, 4) == b"bytes"
        assert load(store, info, 9) == b""

    def test_nothing_is_a_model_too(self, store: OpenStore) -> None:
        info = put(store, b"")
        assert (info.model_size, info.index_hash, load(store, info)) == (0, None, b"")

    def test_a_safetensors_file_is_known_by_what_it_is(self, store: OpenStore, tmp_path: Path) -> None:
        save_file(TENSORS, tmp_path / "file")
        data = (tmp_path / "file").read_bytes()
        info = put(store, data, NewModel(model_kind="whatever its name"))
        assert info.model_hash == hash_bytes(data).digest
        assert info.index_hash not in (None, info.model_hash)
        assert info.index_hash is not None
        weights = load_index(store.blobs, info.index_hash)
        assert weights.shards == (hash_bytes(data),)
        assert weights.schema.keys() == TENSORS.keys()
        assert load(store, info) == data

    @pytest.mark.parametrize(
        "data",
        [
            struct.pack("<Q", 2**63) + b"{}",
            struct.pack("<Q", 100) + b"{}",
            struct.pack("<Q", 10_000) + b"[" * 10_000,
            struct.pack("<Q", 1_000_006) + b'{"a":' + b"[" * 1_000_001,
            struct.pack("<Q", 9 << 20) + b"{}" + b" " * ((9 << 20) - 2),  # a header that is too large to be parsed
            b"PK\x03\x04 any other format",
        ],
    )
    def test_what_only_looks_like_safetensors_is_opaque(self, store: OpenStore, data: bytes) -> None:
        assert put(store, data).index_hash is None

    def test_the_same_bytes_put_twice_are_two_models_and_one_blob(self, store: OpenStore) -> None:
        first, second = put(store, b"twice"), put(store, b"twice")
        assert first.model_id != second.model_id
        assert first.shards == second.shards

    def test_more_than_the_limit_is_refused_on_the_way(self, store: OpenStore) -> None:
        taken = []

        def blocks() -> Iterator[bytes]:
            for number in range(1000):
                taken.append(number)
                yield bytes(BLOCK_BYTES)

        with pytest.raises(TooLarge, match=r"larger than 0\.1 GB"), spooled(store, blocks()):
            pass
        assert len(taken) == 96  # 0.1 GB are 95.4 MiB

    def test_a_store_that_is_not_there_or_goes_meanwhile_gets_nothing(self, store: OpenStore) -> None:
        with spooled(store, [b"lost"]) as (path, blob), pytest.raises(NotFound, match="ddc:none"):
            put_file(store, "ddc:none", path, blob, NewModel())
        with writing(store.engine) as connection:
            add_store(connection, "ddc:going")
        going = _RemovesStore(store, "ddc:going")
        with (
            spooled(store, [b"lost"]) as (path, blob),
            pytest.raises(NotFound, match="ddc:going was deleted meanwhile"),
        ):
            put_file(going.store, "ddc:going", path, blob, NewModel())
        with reading(store.engine) as connection:
            assert find_models(connection, store="ddc:going") == ()

    def test_of_a_file_that_cannot_be_put_nothing_is_kept(self, store: OpenStore) -> None:
        blob = hash_bytes(b"refused")
        with spooled(store, [b"refused"]) as (path, _), pytest.raises(InvalidInput, match="round"):
            put_file(store, DDC, path, blob, NewModel(round=-1))
        with pytest.raises(NotFound):
            store.blobs.find(blob.digest)


class _RemovesStore:
    """A node in which the model store goes as soon as the bytes have come."""

    def __init__(self, store: OpenStore, name: str) -> None:
        self._blobs = store.blobs
        self._engine = store.engine
        self._name = name
        self.store = replace(store, blobs=self)  # type: ignore[arg-type]  # what is asked of it is there

    def put(self, path: Path, *, blob: Blob | None = None) -> Blob:
        """Keep the file and remove the model store."""
        with writing(self._engine) as connection:
            remove_store(connection, self._name)
        return self._blobs.put(path, blob=blob)


class TestShards:
    def test_they_are_the_model_that_their_hash_says(self, store: OpenStore) -> None:
        weights = store_weights(store.blobs, TENSORS, 100_000)
        assert len(weights.shards) > 2
        info = put_shards(store, DDC, weights.index, weights.shards, weights.index.digest, NewModel())
        assert (info.model_hash, info.index_hash) == (weights.index.digest, weights.index.digest)
        assert (info.shards, info.model_size) == (weights.shards, weights.size)

    def test_their_index_is_kept_even_if_only_they_were_sent(self, store: OpenStore) -> None:
        weights = store_weights(store.blobs, {"only": np.arange(5)}, 100_000)
        store.blobs.delete(weights.index.digest)
        info = put_shards(store, DDC, None, weights.shards, weights.index.digest, NewModel())
        assert info.index_hash == weights.index.digest
        assert load_index(store.blobs, weights.index.digest) == weights

    def test_a_file_is_recorded_as_if_it_had_been_put(self, store: OpenStore) -> None:
        weights = store_weights(store.blobs, {"only": np.arange(6)}, 100_000)
        (shard,) = weights.shards
        info = put_shards(store, DDC, None, [shard], shard.digest, NewModel())
        assert (info.model_hash, info.index_hash) == (shard.digest, weights.index.digest)
        opaque = put(store, b"opaque")
        again = put_shards(store, DDC, None, opaque.shards, opaque.model_hash, NewModel())
        assert (again.model_hash, again.index_hash) == (opaque.model_hash, None)

    def test_others_are_refused(self, store: OpenStore) -> None:
        weights, opaque = store_weights(store.blobs, TENSORS, 100_000), put(store, b"opaque").shards[0]
        missing = hash_bytes(b"never stored")
        for index, shards, model_hash, said in [
            (None, (), weights.index.digest, "1 to 10000 shards, not 0"),
            (None, weights.shards[1:], weights.index.digest, "hash is"),
            (None, weights.shards[::-1], weights.index.digest, "hash is"),
            (None, weights.shards, "0" * 64, "hash is 0000"),
            (None, [opaque], "0" * 64, "safetensors"),
            (None, [missing], missing.digest, "no blob"),
            (None, [replace(opaque, size=5)], opaque.digest, "has 6 bytes, not 5"),
            (missing, weights.shards, weights.index.digest, "not the index"),
            (weights.index, [opaque], opaque.digest, "not the index"),
            (None, [weights.shards[0]] * 2, weights.index.digest, "two shards"),
        ]:
            with pytest.raises((InvalidInput, NotFound), match=said):
                put_shards(store, DDC, index, shards, model_hash, NewModel())

    def test_a_copy_is_recorded_once(self, store: OpenStore) -> None:
        blob = put(store, b"copied").shards[0]
        new = NewModel(origin_node="n", origin_model_id="m", model_kind="first")
        first = put_shards(store, DDC, None, [blob], blob.digest, new)
        assert put_shards(store, DDC, None, [blob], blob.digest, replace(new, model_kind="second")) == first
        with pytest.raises(Conflict), writing(store.engine) as connection:
            add_model(connection, replace(first, model_id="another"))


class TestDownloads:
    def test_shards_come_as_the_one_file_that_an_export_writes(
        self, store: OpenStore, sharded: ModelInfo, tmp_path: Path
    ) -> None:
        export_single(store.blobs, load_index(store.blobs, sharded.model_hash), tmp_path / "exported")
        download = prepare_download(store, sharded)
        (tmp_path / "loaded").write_bytes(b"".join(download.open(0)))
        assert (tmp_path / "loaded").read_bytes() == (tmp_path / "exported").read_bytes()
        assert Blob(digest=download.digest, size=download.size) == hash_file(tmp_path / "loaded")
        assert download.file_name == f"{sharded.model_id}.safetensors"
        loaded = load_file(tmp_path / "loaded")
        assert loaded.keys() == TENSORS.keys()
        assert all(np.array_equal(loaded[name], tensor) for name, tensor in TENSORS.items())
        assert max(map(len, download.open(0))) <= BLOCK_BYTES

    @examples(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_they_come_from_any_offset(self, store: OpenStore, sharded: ModelInfo, data: st.DataObject) -> None:
        download = prepare_download(store, sharded)
        whole = _whole(store, sharded)
        start = data.draw(st.integers(0, download.size) | st.integers(0, 5000) | st.integers(5_590_000, download.size))
        assert b"".join(download.open(start)) == whole[start:]

    def test_one_blob_can_be_had_by_itself(self, store: OpenStore, sharded: ModelInfo) -> None:
        shard = sharded.shards[1]
        download = prepare_download(store, sharded, shard.digest)
        assert hash_bytes(b"".join(download.open(0))) == Blob(digest=download.digest, size=download.size) == shard
        index = prepare_download(store, sharded, sharded.index_hash)
        assert hash_bytes(b"".join(index.open(0))).digest == sharded.index_hash

    def test_not_one_of_another_model(self, store: OpenStore, sharded: ModelInfo) -> None:
        other = put(store, b"another model's")
        for digest in (other.model_hash, "nonsense", "../../etc/passwd"):
            with pytest.raises(NotFound, match="has no blob"):
                prepare_download(store, sharded, digest)

    def test_an_offset_outside_is_refused(self, store: OpenStore, sharded: ModelInfo) -> None:
        for info in (sharded, put(store, b"small")):
            for start in (-1, info.model_size + 100_000):
                with pytest.raises(InvalidInput, match="is not in a body"):
                    list(prepare_download(store, info).open(start))

    def test_a_record_without_bytes_has_none(self, store: OpenStore) -> None:
        with writing(store.engine) as connection:
            info = add_model(connection, ModelInfo(store=DDC, model_hash="0" * 64, model_size=0))
        with pytest.raises(NotFound, match="without bytes"):
            prepare_download(store, info)


def _whole(store: OpenStore, info: ModelInfo) -> bytes:
    if info.model_id not in _bodies:
        _bodies[info.model_id] = load(store, info)
    return _bodies[info.model_id]


_bodies: dict[str, bytes] = {}


class TestNewModels:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"model_kind": "a" * 201}, "model_kind is text of at most 200"),
            ({"model_kind": "a\0"}, "model_kind is text"),
            ({"model_kind": 5}, "model_kind is text"),
            ({"model_description": "a" * 10_001}, "model_description is text of at most 10000"),
            ({"model_description": "\ud800"}, "model_description is text"),
            ({"model_state": 15}, r"model_state '15' is none; use one of 10 \(CREATED\)"),
            ({"model_state": True}, "model_state"),
            ({"model_state": "20"}, "model_state"),
            ({"round": -1}, "round is a whole number"),
            ({"round": 2**31}, "round is a whole number"),
            ({"round": 1.0}, "round is a whole number"),
            ({"round": True}, "round is a whole number"),
            ({"hop_count": 1001}, "hop_count is a whole number from 0 to 1000"),
            ({"num_examples": 2**63}, "num_examples is a whole number"),
            ({"parents": "abc"}, "parents is a list"),
            ({"parents": ["a"] * 10_001}, "parents is a list of at most"),
            ({"parents": [5]}, "parents is text"),
            ({"parents": ["a\0"]}, "parents is text"),
            ({"metrics": [1]}, "metrics is not a JSON object"),
            ({"metrics": {"loss": float("nan")}}, "metrics is not the JSON that is kept"),
            ({"model_meta": {"a": object()}}, "model_meta is not the JSON that is kept"),
            ({"model_meta": nested(MAX_DEPTH + 1)}, "deeper than 32"),
            ({"model_meta": nested(100_000)}, "deeper than 32"),
            ({"model_meta": {"a": "x" * 65_536}}, "64 KiB is the limit"),
            ({"location": [1]}, "location is"),
            ({"location": [1, float("inf")]}, "location is"),
            ({"location": [1, True]}, "location is"),
            ({"location": "xyz"}, "location is"),
            ({"start_datetime": datetime(2026, 1, 1)}, "start_datetime is a time with its zone"),
            ({"end_datetime": "now"}, "end_datetime is a time with its zone"),
            ({"tenant_id": "a" * 201}, "tenant_id is text"),
            ({"origin_node": "n"}, "give both or none"),
            ({"origin_node": "n", "origin_model_id": "m\0"}, "origin_model_id is text"),
        ],
    )
    def test_what_cannot_be_kept_is_named(self, settings: Settings, changes: Any, said: str) -> None:
        with pytest.raises(InvalidInput, match=said) as raised:
            check_new_model(settings, NewModel(**changes))
        assert len(raised.value.message) < 500

    @pytest.mark.parametrize(
        "changes",
        [{"location": location} for location in (None, [1, 2.5], (0, 0), "0101000000", "")]
        + [{"model_kind": "a" * 200}, {"round": 2**31 - 1}, {"model_meta": nested(MAX_DEPTH)}],
    )
    def test_what_can_be_kept_is(self, settings: Settings, changes: Any) -> None:
        check_new_model(settings, NewModel(**changes))


class TestMeta:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "is not the JSON"),
            ("[]", "is not a JSON object"),
            ("null", "is not a JSON object"),
            ('{"a": NaN}', "NaN is not JSON"),
            ('{"a": -Infinity}', "Infinity is not JSON"),
            ('{"a": 1e999}', "not finite"),
            ('{"a": [1, {"b": -1e999}]}', "not finite"),
            ('{"a": "\\u0000"}', "NUL"),
            ('{"\\u0000": 1}', "NUL"),
            ('{"a": ["\\ud800"]}', "half of a character"),
            ('{"a": ' + "9" * 5000 + "}", "is not the JSON"),
            (json.dumps(nested(MAX_DEPTH + 1)), "deeper than 32"),
            ('{"a":' * 10_000 + "1" + "}" * 10_000, "deeper than 32"),
            ("[" * 30_000, "deeper than 32"),
            ('{"a": "' + "x" * 65_536 + '"}', "64 KiB is the limit"),
            ("{", "is not the JSON"),
            (b'{"a": "\xff"}', "is not the JSON"),
        ],
    )
    def test_what_cannot_be_kept_is_refused(self, settings: Settings, text: str | bytes, said: str) -> None:
        with pytest.raises(InvalidInput, match=said) as raised:
            parse_meta(text, settings)
        assert len(raised.value.message) < 500

    @given(
        st.dictionaries(
            st.text(max_size=5).filter(lambda text: "\0" not in text),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers(-(10**300), 10**300)
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(max_size=10).filter(lambda text: "\0" not in text),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=8,
            ),
            max_size=5,
        )
    )
    def test_all_other_json_is_kept_as_it_is(self, meta: dict[str, Any]) -> None:
        assert parse_meta(json.dumps(meta), Settings()) == meta
        assert parse_meta(json.dumps(meta, ensure_ascii=False).encode(), Settings()) == meta
