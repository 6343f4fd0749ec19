"""Facts about several callers who do the same, or the contrary, at once, over every kind of database."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar

import pytest

from common.errors import FedChordError, NotFound, TooLarge
from common.settings import Settings
from store.blobs import hash_bytes
from store.database import reading, writing
from store.exchange.possession import record_received
from store.local import LocalApi
from store.model_stores import grant
from store.models import find_copies, find_models, ids_in_store
from store.opening import OpenStore, open_store
from store.tenants import add_tenant, authenticate, operator

DDC = "ddc:digits"
DATA = b"a model"
BLOB = hash_bytes(DATA)

Result = TypeVar("Result")


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[LocalApi]:
    settings = Settings(
        database_url=database_url, blob_folder=tmp_path / "blobs", store_key_file=tmp_path / "store.key"
    )
    with open_store(settings) as store:
        api = LocalApi(store, operator(settings))
        api.initialize_model_store(DDC)
        yield api


def at_once(*calls: Callable[[], Result]) -> list[Result | FedChordError]:
    """Return what each call returns, or the error that it raises, when all begin together."""
    barrier = Barrier(len(calls))

    def run(call: Callable[[], Result]) -> Result | FedChordError:
        barrier.wait(20)
        try:
            return call()
        except FedChordError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(run, calls))


def tenant_of(store: OpenStore, name: str) -> LocalApi:
    with writing(store.engine) as connection:
        made, secret = add_tenant(connection, name)
        return LocalApi(store, authenticate(connection, made.api_key, secret))


def offered(**more: Any) -> dict[str, Any]:
    return {
        "model_id": "there",
        "model_state": 10,
        "model_hash": BLOB.digest,
        "model_size": BLOB.size,
        "shards": [{"digest": BLOB.digest, "size": BLOB.size}],
        "origin": {"node_id": "node", "model_id": "there"},
        **more,
    }


def test_one_model_that_is_offered_many_times_at_once_is_recorded_once(api: LocalApi) -> None:
    api.put_model(DDC, io.BytesIO(DATA))
    answers = at_once(*[lambda: api.offer_model(DDC, offered())] * 8)
    ids = {answer["model"]["model_id"] for answer in answers if isinstance(answer, dict)}
    assert (len(ids), len(answers)) == (1, 8)
    assert [model["model_id"] for model in api.get_models(DDC, {"=": ["model_state", 20]})] == list(ids)


def test_one_blob_that_is_received_many_times_at_once_is_known_once(api: LocalApi) -> None:
    def receive() -> None:
        with writing(api.store.engine) as connection:
            record_received(connection, api.caller, BLOB)

    assert at_once(*[receive] * 8) == [None] * 8


def test_of_many_that_delete_one_model_at_once_one_does(api: LocalApi) -> None:
    model_id = api.put_model(DDC, io.BytesIO(DATA))["model_id"]
    answers = at_once(*[lambda: api.delete_model(DDC, model_id, raise_if_no_exists=False)] * 8)
    assert sorted(answers, key=str) == [0] * 7 + [1]


def test_a_model_is_never_left_without_its_store(api: LocalApi) -> None:
    for _ in range(10):
        api.initialize_model_store("ddc:passing")
        *puts, deleted = at_once(
            *[lambda: api.put_model("ddc:passing", io.BytesIO(DATA))] * 4, lambda: api.delete_store("ddc:passing")
        )
        assert deleted == 1
        assert all(isinstance(put, dict | NotFound) for put in puts)
        with reading(api.store.engine) as connection:
            assert find_models(connection, store="ddc:passing") == ()


def test_a_digest_alone_gives_a_tenant_nothing(api: LocalApi) -> None:
    secret = api.put_model(DDC, io.BytesIO(DATA))
    tenant = tenant_of(api.store, "curious")
    tenant.initialize_model_store("ddc:theirs")
    assert tenant.offer_model("ddc:theirs", offered()) == {"missing": offered()["shards"]}
    assert tenant.get_models("ddc:theirs") == []
    with pytest.raises(NotFound):
        tenant.prepare_download("ddc:theirs", secret["model_id"], BLOB.digest)
    with writing(api.store.engine) as connection:
        grant(connection, DDC, tenant.caller.tenant_id, may_write=False)
    assert tenant.offer_model("ddc:theirs", offered())["model"]["model_hash"] == BLOB.digest


def test_copies_and_ids_are_found_many_at_a_time(api: LocalApi) -> None:
    own = api.put_model(DDC, io.BytesIO(DATA))["model_id"]
    copy = api.offer_model(DDC, offered(parents=[own, "unknown"]))["model"]
    assert copy["parents"] == [own]
    wanted = ["there", *(f"other-{number}" for number in range(3000))]
    with reading(api.store.engine) as connection:
        assert find_copies(connection, DDC, "node", wanted) == {"there": copy["model_id"]}
        assert find_copies(connection, "ddc:x", "node", wanted) == find_copies(connection, DDC, "n", wanted) == {}
        assert ids_in_store(connection, DDC, [*wanted, own]) == {own}
        assert ids_in_store(connection, "ddc:x", [own]) == set()


def test_records_of_more_bytes_than_asked_for_are_not_read(api: LocalApi) -> None:
    for _ in range(3):
        api.put_model(DDC, io.BytesIO(DATA), model_description="d" * 10_000, parents=["p" * 100] * 100)
    with reading(api.store.engine) as connection:
        assert len(find_models(connection, store=DDC, max_bytes=70_000)) == 3
        assert len(find_models(connection, store=DDC, limit=2, max_bytes=60_000)) == 2
        assert find_models(connection, store="ddc:x", max_bytes=0) == ()
        with pytest.raises(TooLarge, match="limit and offset"):
            find_models(connection, store=DDC, max_bytes=60_000)
