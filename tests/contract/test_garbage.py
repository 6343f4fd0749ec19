"""Facts about removing what no model needs, over every kind of database; SQLite and PostgreSQL lock differently."""

import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import NotFound, StoreUnavailable
from common.settings import Settings
from store.blobs import Blob, hash_bytes
from store.database import writing
from store.exchange.possession import record_received
from store.garbage import find_unused, remove_unused
from store.local import LocalApi
from store.model_stores import lock_store
from store.opening import OpenStore, open_store
from store.putting import NewModel, put_shards
from store.tenants import operator
from store.weights import store_weights

DDC = "ddc:digits"


@pytest.fixture
def store(database_url: str, tmp_path: Path) -> Iterator[OpenStore]:
    settings = Settings(
        database_url=database_url, blob_folder=tmp_path / "blobs", store_key_file=tmp_path / "store.key"
    )
    with open_store(settings) as store:
        LocalApi(store, operator(settings)).initialize_model_store(DDC)
        yield store


@pytest.fixture
def api(store: OpenStore) -> LocalApi:
    return LocalApi(store, operator(store.settings))


def collect(store: OpenStore) -> set[Blob]:
    """Remove what is unused, however new it is."""
    return set(remove_unused(store.engine, store.blobs, older_than_seconds=0))


def test_what_a_model_needs_stays_and_the_rest_goes(store: OpenStore, api: LocalApi) -> None:
    kept, gone = (api.put_model(DDC, io.BytesIO(data)) for data in (b"kept", b"gone"))
    shared = [api.put_model(DDC, io.BytesIO(b"shared"))["model_id"] for _ in range(2)]
    sharded = store_weights(store.blobs, {"a": np.zeros(9), "b": np.ones(9)}, shard_bytes=72)
    made = put_shards(store, DDC, None, sharded.shards, sharded.index.digest, NewModel())
    for model_id in (gone["model_id"], shared[0]):
        api.delete_model(DDC, model_id)
    assert find_unused(store.engine, store.blobs, older_than_seconds=0) == [hash_bytes(b"gone")]
    assert collect(store) == {hash_bytes(b"gone")}
    assert collect(store) == set()
    assert b"".join(api.load_model(DDC, kept["model_id"])) == b"kept"
    assert b"".join(api.load_model(DDC, shared[1])) == b"shared"
    assert set(store.blobs.blobs()) == {hash_bytes(b"kept"), hash_bytes(b"shared"), *sharded.shards, sharded.index}
    api.delete_model(DDC, made.model_id)
    assert collect(store) == {*sharded.shards, sharded.index}


def test_what_was_put_lately_stays_also_when_the_same_bytes_are_old(store: OpenStore, api: LocalApi) -> None:
    api.delete_model(DDC, api.put_model(DDC, io.BytesIO(b"again"))["model_id"])
    path = next(path for path in store.settings.blob_folder.rglob(hash_bytes(b"again").digest))
    assert find_unused(store.engine, store.blobs, older_than_seconds=3600) == []
    path.chmod(0o644)
    os.utime(path, (0, 0))
    assert find_unused(store.engine, store.blobs, older_than_seconds=3600) == [hash_bytes(b"again")]
    api.delete_model(DDC, api.put_model(DDC, io.BytesIO(b"again"))["model_id"])
    assert find_unused(store.engine, store.blobs, older_than_seconds=3600) == []


def test_a_model_is_not_made_of_bytes_that_are_removed_at_that_moment(store: OpenStore, api: LocalApi) -> None:
    weights = store_weights(store.blobs, {"a": np.zeros(9)}, shard_bytes=1 << 20)
    assert collect(store) == {*weights.shards, weights.index}
    with pytest.raises((StoreUnavailable, NotFound)):
        put_shards(store, DDC, None, weights.shards, weights.index.digest, NewModel())
    assert api.get_models(DDC) == []


def test_a_removal_waits_for_a_put_that_has_the_lock(store: OpenStore, api: LocalApi) -> None:
    weights = store_weights(store.blobs, {"a": np.zeros(9)}, shard_bytes=1 << 20)
    removed: list[Blob] = []
    ended = threading.Event()

    def remove() -> None:
        removed.extend(remove_unused(store.engine, store.blobs, older_than_seconds=0))
        ended.set()

    with writing(store.engine) as connection:
        lock_store(connection, DDC)
        thread = threading.Thread(target=remove)
        thread.start()
        assert not ended.wait(0.3)
        assert store.blobs.find(weights.index.digest) == weights.index
    thread.join(20)
    assert set(removed) == {*weights.shards, weights.index}


def test_what_a_tenant_has_sent_counts_as_sent_no_more(store: OpenStore, api: LocalApi, tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"sent")
    blob = store.blobs.put(path)
    with writing(store.engine) as connection:
        record_received(connection, api.caller, blob)
    assert collect(store) == {blob}
    with writing(store.engine) as connection:
        record_received(connection, api.caller, blob)


@pytest.mark.parametrize("readers", [8])
def test_deleting_loading_and_removing_at_once_gives_the_model_or_says_that_it_is_gone(
    store: OpenStore, api: LocalApi, readers: int
) -> None:
    data = b"x" * (3 << 20)
    model_id = api.put_model(DDC, io.BytesIO(data))["model_id"]
    outcomes: list[object] = []
    start = threading.Barrier(readers + 2)

    def run(action: Callable[[], object]) -> None:
        start.wait()
        try:
            outcomes.append(action())
        except NotFound:
            outcomes.append("gone")

    actions: list[Callable[[], object]] = [lambda: b"".join(api.load_model(DDC, model_id)) == data] * readers
    actions += [lambda: api.delete_model(DDC, model_id), lambda: collect(store) and None]
    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == readers + 2
    assert False not in outcomes
