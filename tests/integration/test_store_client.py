"""Every request of the model store's document, through `Api` and as plain HTTP, on a folder and on a real S3 server."""

import inspect
import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import urllib3
from blake3 import blake3

from common.errors import (
    AccessDenied,
    FedChordError,
    InvalidInput,
    InvalidSettings,
    NotFound,
    NoUpstream,
    TooLarge,
    Unavailable,
)
from store.blobs import BLOCK_BYTES
from store.client import Api, FlEvents, set_logger
from store.client.session import Session
from store.database import writing
from store.local import LocalApi
from store.opening import open_store
from store.tenants import add_tenant
from store.tensors import write_shard
from store.wire import to_wire
from tests.odd_services import CuttingLine, HoldingLine, hang, odd_service, say, trickle, trickle_head
from tests.servers import S3Server, free_ports, seaweedfs
from tests.store_server import StoreServer, store_server

STORE = "ddc:my_first_model_store"
META = {"additonal": "additional data"}  # as the document spells it

MODEL_INFO = {
    "model_id", "tenant_id", "model_store_ddc", "model_kind", "model_description", "model_meta", "model_state",
    "model_hash", "model_size", "round", "hop_count", "start_datetime", "end_datetime", "location", "parents", "job_id",
    "site", "num_examples", "metrics", "shards", "index_hash", "origin", "created_at", "kept", "expired_at",
    "expired_reason",
}  # fmt: skip
PARTY_INFO = {"id", "tenant_id", "tenant_name", "description", "hop_count", "created_at", "updated_at"}
TENANT_ID = "0c6ca2a6-3c55-4b8f-9c43-3f0e2a1f8d10"


class Way(Protocol):
    """How somebody speaks to a service; results are in the wire's form."""

    url: str

    def ask(self, method: str, **params: Any) -> Any:
        """Return the result of a method."""

    def put(self, method: str, path: Path, **fields: Any) -> Any:
        """Return the result of a method that takes a file."""

    def load(self, model_store_ddc: str, model_id: str) -> bytes:
        """Return a model."""


class ByApi:
    """From Python, as the document shows."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.api = Api(url)

    def ask(self, method: str, **params: Any) -> Any:
        return to_wire(getattr(self.api, method.removeprefix("fl."))(*params.values()))

    def put(self, method: str, path: Path, **fields: Any) -> Any:
        ddc = fields.pop("model_store_ddc")
        return to_wire(getattr(self.api, method.removeprefix("fl."))(ddc, str(path), **fields))

    def load(self, model_store_ddc: str, model_id: str) -> bytes:
        result = self.api.load_model(model_store_ddc, model_id)
        return b"".join(result)


class ByHttp:
    """As with curl."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, method: str, **params: Any) -> Any:
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        if not params:
            del request["params"]
        with urllib3.PoolManager(timeout=30) as pool:
            answer = pool.request("POST", f"{self.url}/jsonrpc", json=request).json()
        assert (answer["jsonrpc"], answer["id"]) == ("2.0", 1)
        return answer["result"] if "result" in answer else answer["error"]

    def put(self, method: str, path: Path, **fields: Any) -> Any:
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        form: dict[str, Any] = {**texts, "file": (path.name, path.read_bytes())}
        with urllib3.PoolManager(timeout=30) as pool:
            answer = pool.request("POST", f"{self.url}/jsonrpc/upload/{method}", fields=form).json()
        assert (answer["jsonrpc"], answer["id"]) == ("2.0", None)
        return answer["result"]

    def load(self, model_store_ddc: str, model_id: str) -> bytes:
        params = {"model_store_ddc": model_store_ddc, "model_id": model_id}
        request = {"jsonrpc": "2.0", "id": 1, "method": "fl.load_model", "params": params}
        with urllib3.PoolManager(timeout=30) as pool:
            return pool.request("POST", f"{self.url}/jsonrpc/download/fl.load_model", json=request).data


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with seaweedfs() as server:
        yield server


def s3_settings(s3: S3Server, bucket: str) -> dict[str, str]:
    return {
        "blob_store": "s3",
        "s3_endpoint": s3.endpoint,
        "s3_access_key": s3.access_key,
        "s3_secret_key": s3.secret_key,
        "s3_secure": "false",
        "s3_bucket": bucket,
    }


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """The upstream of both edges."""
    with store_server(tmp_path_factory.mktemp("centre")) as server:
        yield server


@pytest.fixture(scope="module", params=["folder", "s3"])
def edge(
    request: pytest.FixtureRequest, centre: StoreServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StoreServer]:
    more = {"upstream_url": centre.url, "tenant_id": TENANT_ID, "tenant_name": "my tenant name"}
    if request.param == "s3":
        more |= s3_settings(request.getfixturevalue("s3"), "edge")
    with store_server(tmp_path_factory.mktemp("edge"), **more) as server:
        yield server


@pytest.fixture(params=[ByApi, ByHttp])
def way(request: pytest.FixtureRequest, edge: StoreServer, centre: StoreServer) -> Way:
    """The edge, with one empty model store; and the same at the centre."""
    for url in (edge.url, centre.url):
        with Api(url) as api:
            api.delete_store(STORE, raise_if_no_exists=False)
            api.initialize_model_store(STORE)
    opened: Way = request.param(edge.url)
    return opened


@pytest.fixture
def model_1(tmp_path: Path) -> Path:
    path = tmp_path / "model_1"
    path.write_bytes(os.urandom(100_000))
    return path


def put_model_1(way: Way, path: Path) -> Any:
    return way.put("fl.put_model", path, model_store_ddc=STORE, model_description="test model", model_meta=META)


def is_datetime(value: Any) -> bool:
    return (
        set(value) == {"_type", "val"} and value["_type"] == "datetime" and bool(datetime.fromisoformat(value["val"]))
    )


# --- the document, method by method --------------------------------------------------------------------------------


def test_get_server_version_returns_the_version(way: Way) -> None:
    assert way.ask("fl.get_server_version") == version("fedchord")


def test_initialize_model_store_returns_its_information(way: Way) -> None:
    result = way.ask("fl.initialize_model_store", model_store_ddc="ddc:another")
    assert result["model_store_ddc"] == "ddc:another"
    assert result["id"]
    assert is_datetime(result["created_at"])
    assert way.ask("fl.initialize_model_store", model_store_ddc="ddc:another") == result
    assert way.ask("fl.delete_store", model_store_ddc="ddc:another") == 1


def test_exists_store_tells_whether_it_is_there(way: Way) -> None:
    assert way.ask("fl.exists_store", model_store_ddc=STORE) is True
    assert way.ask("fl.exists_store", model_store_ddc="ddc:other") is False


def test_delete_store_returns_1_and_for_a_missing_one_0_or_an_error(way: Way) -> None:
    assert way.ask("fl.delete_store", model_store_ddc=STORE) == 1
    assert way.ask("fl.delete_store", model_store_ddc=STORE, raise_if_no_exists=False) == 0
    if isinstance(way, ByApi):
        with pytest.raises(NotFound):
            way.ask("fl.delete_store", model_store_ddc=STORE)
    else:
        assert way.ask("fl.delete_store", model_store_ddc=STORE)["code"] == -32001


def test_an_unknown_method_is_answered_as_the_document_shows(way: Way) -> None:
    if isinstance(way, ByApi):
        with pytest.raises(Unavailable, match="Method not found"):
            way.api.call("fl.no_such_method")
    else:
        answer = way.ask("fl.no_such_method")
        assert (answer["code"], answer["message"]) == (-32601, "Method not found")


def test_put_model_returns_its_model_info(way: Way, model_1: Path) -> None:
    info = put_model_1(way, model_1)
    assert set(info) == MODEL_INFO
    assert is_datetime(info["created_at"])
    digest = blake3(model_1.read_bytes()).hexdigest()
    expected = {
        "tenant_id": TENANT_ID,
        "model_store_ddc": STORE,
        "model_description": "test model",
        "model_meta": META,
        "model_state": 10,
        "model_hash": digest,
        "model_size": 100_000,
        "hop_count": 0,
        "shards": [{"digest": digest, "size": 100_000}],
    }
    assert {name: info[name] for name in expected} == expected


def test_put_aggregated_model_returns_its_model_info(way: Way, model_1: Path) -> None:
    info = way.put(
        "fl.put_aggregated_model",
        model_1,
        model_store_ddc=STORE,
        model_description="test model",
        model_meta=META,
        round=3,
        parents=["a", "b"],
        metrics={"accuracy": 0.5},
        num_examples=7,
    )
    assert (info["model_state"], info["round"], info["parents"]) == (30, 3, ["a", "b"])
    assert (info["metrics"], info["num_examples"], info["model_meta"]) == ({"accuracy": 0.5}, 7, META)


def test_load_model_returns_the_models_bytes(way: Way, model_1: Path) -> None:
    info = put_model_1(way, model_1)
    assert way.load(STORE, info["model_id"]) == model_1.read_bytes()


def test_feedback_returns_the_upstreams_model_info(way: Way, centre: StoreServer, model_1: Path) -> None:
    info = put_model_1(way, model_1)
    above = way.ask("fl.feedback", model_store_ddc=STORE, model_id=info["model_id"])
    assert (above["model_state"], above["hop_count"]) == (20, 1)
    assert above["model_id"] != info["model_id"]
    kept = ("model_hash", "model_size", "model_kind", "model_description", "model_meta", "tenant_id")
    assert {name: above[name] for name in kept} == {name: info[name] for name in kept}
    assert ByHttp(centre.url).load(STORE, above["model_id"]) == model_1.read_bytes()


def test_request_transfer_brings_the_newest_aggregated_model(way: Way, centre: StoreServer, model_1: Path) -> None:
    above = ByHttp(centre.url).put("fl.put_aggregated_model", model_1, model_store_ddc=STORE)
    info = way.ask("fl.request_transfer", model_store_ddc=STORE)
    assert (info["model_state"], info["hop_count"], info["model_hash"]) == (40, 1, above["model_hash"])
    assert info["model_store_ddc"] == STORE
    assert way.load(STORE, info["model_id"]) == model_1.read_bytes()


def test_proxy_request_transfer_info_returns_it_without_moving_it(way: Way, centre: StoreServer, model_1: Path) -> None:
    above = ByHttp(centre.url).put("fl.put_aggregated_model", model_1, model_store_ddc=STORE)
    info = way.ask("fl.proxy_request_transfer_info", model_store_ddc=STORE)
    assert (info["model_id"], info["model_state"]) == (above["model_id"], 30)
    assert way.ask("fl.get_models", model_store_ddc=STORE) == []


def test_get_model_info_returns_it(way: Way, model_1: Path) -> None:
    info = put_model_1(way, model_1)
    assert way.ask("fl.get_model_info", model_store_ddc=STORE, model_id=info["model_id"]) == info


def test_get_model_info_of_safetensors_lists_the_tensors(way: Way, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, {"layer.weight": np.ones((2, 3), np.float32)})
    info = way.put("fl.put_model", path, model_store_ddc=STORE)
    found = way.ask("fl.get_model_info", model_store_ddc=STORE, model_id=info["model_id"])
    assert found["tensors"] == {"layer.weight": {"dtype": "F32", "shape": [2, 3]}}


def test_exists_model_tells_whether_it_is_there(way: Way, model_1: Path) -> None:
    info = put_model_1(way, model_1)
    assert way.ask("fl.exists_model", model_store_ddc=STORE, model_id=info["model_id"]) is True
    assert way.ask("fl.exists_model", model_store_ddc=STORE, model_id="other") is False


def test_delete_model_returns_1_and_for_a_missing_one_0_or_an_error(way: Way, model_1: Path) -> None:
    model_id = put_model_1(way, model_1)["model_id"]
    assert way.ask("fl.delete_model", model_store_ddc=STORE, model_id=model_id) == 1
    assert way.ask("fl.delete_model", model_store_ddc=STORE, model_id=model_id, raise_if_no_exists=False) == 0
    if isinstance(way, ByApi):
        with pytest.raises(NotFound):
            way.ask("fl.delete_model", model_store_ddc=STORE, model_id=model_id)
    else:
        assert way.ask("fl.delete_model", model_store_ddc=STORE, model_id=model_id)["code"] == -32001


def test_delete_all_model_returns_how_many(way: Way, model_1: Path) -> None:
    for _ in range(3):
        put_model_1(way, model_1)
    assert way.ask("fl.delete_all_model", model_store_ddc=STORE) == 3
    assert way.ask("fl.get_models", model_store_ddc=STORE) == []


def test_get_models_lists_the_newest_first_and_filters(way: Way, model_1: Path) -> None:
    first, second = put_model_1(way, model_1), put_model_1(way, model_1)
    third = way.put("fl.put_aggregated_model", model_1, model_store_ddc=STORE)
    assert way.ask("fl.get_models", model_store_ddc=STORE) == [third, second, first]
    found = way.ask(
        "fl.get_models", model_store_ddc=STORE, conds={"=": ["model_state", 10]}, offset=1, limit=5, order="-created_at"
    )
    assert found == [first]


def test_get_model_info_latest_returns_the_newest(way: Way, model_1: Path) -> None:
    put_model_1(way, model_1)
    newest = put_model_1(way, model_1)
    assert way.ask("fl.get_model_info_latest", model_store_ddc=STORE) == newest


def test_get_latest_feedbacked_models_lists_the_newest_of_each_origin(
    way: Way, centre: StoreServer, model_1: Path
) -> None:
    first = way.put("fl.put_model", model_1, model_store_ddc=STORE, round=1)
    second = way.put("fl.put_model", model_1, model_store_ddc=STORE, round=2)
    above = [way.ask("fl.feedback", model_store_ddc=STORE, model_id=each["model_id"]) for each in (first, second)]
    looking = type(way)(centre.url)  # type: ignore[call-arg]  # every way is made of a URL
    assert looking.ask("fl.get_latest_feedbacked_models", model_store_ddc=STORE) == [above[1]]
    assert looking.ask("fl.get_latest_feedbacked_models", model_store_ddc=STORE, round=1) == [above[0]]


def test_get_latest_aggregated_model_returns_the_newest(way: Way, model_1: Path) -> None:
    newest = way.put("fl.put_aggregated_model", model_1, model_store_ddc=STORE)
    put_model_1(way, model_1)
    assert way.ask("fl.get_latest_aggregated_model", model_store_ddc=STORE) == newest


def test_get_latest_transferred_model_returns_the_newest(way: Way, centre: StoreServer, model_1: Path) -> None:
    ByHttp(centre.url).put("fl.put_aggregated_model", model_1, model_store_ddc=STORE)
    newest = way.ask("fl.request_transfer", model_store_ddc=STORE)
    assert way.ask("fl.get_latest_transferred_model", model_store_ddc=STORE) == newest


def test_parties_are_created_listed_and_deleted_at_the_upstream(way: Way, centre: StoreServer) -> None:
    party = way.ask("fl.create_party", description="my description")
    assert set(party) == PARTY_INFO
    assert (party["tenant_id"], party["tenant_name"]) == (TENANT_ID, "my tenant name")
    assert (party["description"], party["hop_count"]) == ("my description", 1)
    assert is_datetime(party["created_at"])
    assert is_datetime(party["updated_at"])
    assert way.ask("fl.get_parties") == [party] == ByHttp(centre.url).ask("fl.get_parties")
    assert way.ask("fl.delete_party", id=party["id"]) == 1
    assert way.ask("fl.delete_party", id=party["id"]) == 0
    assert way.ask("fl.get_parties") == []


# --- the client ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A service on its own."""
    with store_server(tmp_path_factory.mktemp("plain")) as server:
        with Api(server.url) as api:
            api.initialize_model_store(STORE)
        yield server


@pytest.fixture
def api(plain: StoreServer) -> Iterator[Api]:
    with Api(plain.url) as opened:
        yield opened


def test_api_and_local_api_have_the_same_methods_with_the_same_parameters() -> None:
    def methods(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
        return {
            name: [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
            for name, function in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    ours, local = methods(Api), methods(LocalApi)
    transport = methods(Session).keys() | {"load_blob", "receive_blob", "put_blob"}
    assert {name: parameters for name, parameters in ours.items() if name not in transport} == {
        name: parameters for name, parameters in local.items() if name != "prepare_download"
    }


def test_an_api_without_arguments_is_that_of_the_settings(plain: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCHORD_STORE_URL", plain.url)
    assert Api().exists_store(STORE)


def test_fl_events_are_the_model_states() -> None:
    assert (FlEvents.CREATED, FlEvents.FEEDBACKED, FlEvents.AGGREGATED, FlEvents.TRANSFERRED) == (10, 20, 30, 40)


def test_datetimes_come_back_aware_and_in_the_local_zone(api: Api) -> None:
    created_at = api.put_model(STORE, io.BytesIO(b"1"))["created_at"]
    assert created_at.utcoffset() == datetime.now().astimezone().utcoffset()
    assert abs(created_at.timestamp() - time.time()) < 60


def test_a_model_is_put_from_a_path_an_open_file_and_a_pipe(api: Api, tmp_path: Path) -> None:
    data = os.urandom(3 * BLOCK_BYTES + 7)
    path = tmp_path / 'mödel "1"\r\n.bin'
    path.write_bytes(data)
    read_end, write_end = os.pipe()

    def write() -> None:
        with os.fdopen(write_end, "wb") as end:
            end.write(data)

    writer = threading.Thread(target=write)
    writer.start()
    with path.open("rb") as file, os.fdopen(read_end, "rb", buffering=0) as pipe:
        infos = [api.put_model(STORE, each) for each in (str(path), path, file, pipe, io.BytesIO(data))]
    writer.join()
    assert {info["model_hash"] for info in infos} == {blake3(data).hexdigest()}


def test_an_open_file_is_put_from_where_it_stands(api: Api) -> None:
    file = io.BytesIO(b"before-after")
    file.seek(7)
    assert b"".join(api.load_model(STORE, api.put_model(STORE, file)["model_id"])) == b"after"


def test_an_empty_file_is_put_and_loaded(api: Api) -> None:
    info = api.put_model(STORE, io.BytesIO(b""))
    assert b"".join(api.load_model(STORE, info["model_id"])) == b""


@pytest.mark.parametrize(
    ("file", "error"),
    [("no-such-file", NotFound), (io.StringIO("text"), InvalidInput), (None, InvalidInput), (".", InvalidInput)],
)
def test_what_is_no_file_is_refused_before_anything_is_sent(api: Api, file: Any, error: type[Exception]) -> None:
    before = len(api.get_models(STORE))
    with pytest.raises(error):
        api.put_model(STORE, file)
    assert len(api.get_models(STORE)) == before


def test_a_file_that_shrinks_while_it_is_sent_is_not_stored(api: Api) -> None:
    class Shrinking(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(size) if self.tell() < 300_000 else b""

    before = len(api.get_models(STORE))
    with pytest.raises(InvalidInput, match="changed while"):
        api.put_model(STORE, Shrinking(bytes(1_000_000)))
    assert len(api.get_models(STORE)) == before


def test_meta_that_is_no_json_is_refused(api: Api) -> None:
    for meta in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(InvalidInput):
            api.put_model(STORE, io.BytesIO(b"1"), model_meta=meta)


def test_errors_of_the_service_come_back_as_what_they_are(api: Api) -> None:
    with pytest.raises(NotFound):
        api.load_model(STORE, "no such model")
    with pytest.raises(NotFound):
        api.put_model("ddc:nowhere", io.BytesIO(b"1"))
    with pytest.raises(InvalidInput):
        api.initialize_model_store("../escape")
    with pytest.raises(InvalidInput):
        api.get_models(STORE, {"=": ["no_such_field", 1]})
    with pytest.raises(NoUpstream):
        api.feedback(STORE, api.put_model(STORE, io.BytesIO(b"1"))["model_id"])
    with pytest.raises(TooLarge):
        api.put_model(STORE, io.BytesIO(b"1"), model_meta={"long": "x" * 100_000})


def test_a_tenant_needs_its_key_and_secret(tmp_path: Path) -> None:
    with store_server(tmp_path, http_access="keys") as server:
        with open_store(server.settings) as store, writing(store.engine) as connection:
            tenant, secret = add_tenant(connection, "hospital")
            _, other_secret = add_tenant(connection, "other")
        with Api(server.url, api_key=tenant.api_key, secret=secret) as ours:
            ours.initialize_model_store(STORE)
            model_id = ours.put_model(STORE, io.BytesIO(b"1"))["model_id"]
            assert b"".join(ours.load_model(STORE, model_id)) == b"1"
        assert secret not in repr(ours) + repr(vars(ours))
        for key, wrong in (("", ""), (tenant.api_key, other_secret)):
            with Api(server.url, api_key=key, secret=wrong) as theirs:
                with pytest.raises(AccessDenied):
                    theirs.get_stores()
                with pytest.raises(AccessDenied):
                    theirs.load_model(STORE, model_id)
                with pytest.raises(AccessDenied):
                    theirs.put_model(STORE, io.BytesIO(bytes(20 << 20)))


def test_keys_that_cannot_be_headers_are_refused() -> None:
    with pytest.raises(InvalidSettings):
        Api("http://127.0.0.1:1", api_key="a\r\nHost: evil")
    for url in ("ftp://127.0.0.1", "http://user@host", "http://host/?q", "no url", "http://"):
        with pytest.raises(InvalidInput):
            Api(url)


def test_a_service_that_is_not_there_is_unavailable_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable, match="does not answer"):
        Api(f"http://127.0.0.1:{free_ports(1)[0]}").get_stores()
    assert time.monotonic() - started < 5


def test_killing_the_service_in_a_put_leaves_nothing_and_it_can_be_repeated(tmp_path: Path) -> None:
    data = os.urandom(8 * BLOCK_BYTES)
    (port,) = free_ports(1)
    with store_server(tmp_path, http_port=str(port)) as server, Api(server.url) as api:
        api.initialize_model_store(STORE)
        with HoldingLine(port, 4 * BLOCK_BYTES) as line, Api(line.url) as cut, ThreadPoolExecutor(1) as pool:
            putting = pool.submit(cut.put_model, STORE, io.BytesIO(data))
            assert line.held.wait(20)
            server.process.kill()
            server.process.wait()
            line.release.set()
            with pytest.raises(Unavailable):
                putting.result()
    with store_server(tmp_path, http_port=str(port)) as server, Api(server.url) as api:
        assert api.get_models(STORE) == []
        assert list((tmp_path / "blobs" / "blobs").iterdir()) == []
        assert b"".join(api.load_model(STORE, api.put_model(STORE, io.BytesIO(data))["model_id"])) == data


# --- downloads -----------------------------------------------------------------------------------------------------


def test_a_download_that_is_cut_goes_on_where_it_was(plain: StoreServer, api: Api) -> None:
    data = os.urandom(5 * BLOCK_BYTES + 3)
    model_id = api.put_model(STORE, io.BytesIO(data))["model_id"]
    with CuttingLine(plain.port, [100, 1_000_000, 60_000, 2_000_000]) as line, Api(line.url) as cut:
        assert b"".join(cut.load_model(STORE, model_id)) == data
        assert line.connections == 5


def test_a_download_goes_on_after_the_service_was_killed_and_started_again(tmp_path: Path) -> None:
    data = os.urandom(30 * BLOCK_BYTES)
    (port,) = free_ports(1)
    with store_server(tmp_path, http_port=str(port)) as server, Api(server.url) as api:
        api.initialize_model_store(STORE)
        loading = api.load_model(STORE, api.put_model(STORE, io.BytesIO(data))["model_id"])
        begun = next(loading)
    with store_server(tmp_path, http_port=str(port)):
        assert begun + b"".join(loading) == data


def test_a_model_that_is_deleted_while_it_is_cut_is_not_found(plain: StoreServer, api: Api) -> None:
    model_id = api.put_model(STORE, io.BytesIO(os.urandom(20 * BLOCK_BYTES)))["model_id"]
    with CuttingLine(plain.port, [BLOCK_BYTES]) as line, Api(line.url) as cut:
        loading = cut.load_model(STORE, model_id)
        next(loading)
        api.delete_model(STORE, model_id)
        with pytest.raises(NotFound):
            b"".join(loading)


def test_other_bytes_than_those_of_the_digest_are_refused_before_the_last_block() -> None:
    data, other = b"a" * 10_000, b"b" * 10_000
    answer = say(other, headers={"ETag": f'"{blake3(data).hexdigest()}"'})
    with odd_service({"/jsonrpc/download/fl.load_model": answer}) as url, Api(url) as api:
        received: list[bytes] = []
        with pytest.raises(Unavailable, match="is not the model"):
            received.extend(api.load_model(STORE, "1"))
        assert b"".join(received) != other


def test_a_download_is_not_taken_from_a_server_that_gives_no_digest() -> None:
    with odd_service({"/jsonrpc/download/fl.load_model": say(b"model")}) as url, pytest.raises(Unavailable):
        Api(url).load_model(STORE, "1")


def test_a_blob_is_written_to_a_file_that_is_there_when_it_is_whole(api: Api, tmp_path: Path) -> None:
    data = os.urandom(2 * BLOCK_BYTES)
    info = api.put_model(STORE, io.BytesIO(data))
    blob = api.load_blob(STORE, info["model_id"], info["model_hash"], tmp_path / "blob")
    assert ((tmp_path / "blob").read_bytes(), blob.size) == (data, len(data))
    with pytest.raises(NotFound):
        api.load_blob(STORE, info["model_id"], "0" * 64, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


def test_clients_that_read_and_delete_the_same_model_get_all_of_it_or_not_found(api: Api) -> None:
    data = os.urandom(BLOCK_BYTES + 1)

    def load(model_id: str) -> bool:
        try:
            assert b"".join(api.load_model(STORE, model_id)) == data
        except NotFound:
            return False
        return True

    def delete(model_id: str) -> int:
        try:
            return api.delete_model(STORE, model_id)
        except NotFound:
            return 0

    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            model_id = api.put_model(STORE, io.BytesIO(data))["model_id"]
            loads = [pool.submit(load, model_id) for _ in range(3)]
            deletes = [pool.submit(delete, model_id) for _ in range(2)]
            loads += [pool.submit(load, model_id) for _ in range(3)]
            assert sum(each.result() for each in deletes) == 1
            assert {each.result() for each in loads} <= {True, False}
            assert not api.exists_model(STORE, model_id)


# --- services that answer badly ------------------------------------------------------------------------------------

BAD_ANSWERS = {
    "html": say(b"<html>It works!</html>", kind="text/html"),
    "html of a proxy": say(b"<html>Bad Gateway</html>", kind="text/html", status=502),
    "nothing": say(b""),
    "no json": say(b"{"),
    "deep json": say(b"[" * 100_000),
    "a list": say(b"[]"),
    "no json-rpc": say(b'{"result": []}'),
    "another version": say(b'{"jsonrpc": "1.0", "id": 1, "result": []}'),
    "another id": say(b'{"jsonrpc": "2.0", "id": 99, "result": []}'),
    "result and error": say(b'{"jsonrpc": "2.0", "id": 1, "result": [], "error": {"code": 1, "message": "x"}}'),
    "an error without code": say(b'{"jsonrpc": "2.0", "id": 1, "error": {"message": "x"}}'),
    "another type": say(b'{"jsonrpc": "2.0", "id": 1, "result": "text"}'),
    "a wrong datetime": say(b'{"jsonrpc": "2.0", "id": 1, "result": [{"_type": "datetime", "val": "never"}]}'),
    "a redirection": say(b"", status=302, headers={"Location": "http://127.0.0.1:1/"}),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_an_answer_that_makes_no_sense_is_unavailable(kind: str) -> None:
    with odd_service({"fl.get_stores": BAD_ANSWERS[kind]}) as url, Api(url) as api, pytest.raises(Unavailable):
        api.get_stores()


def test_an_answer_without_end_is_refused() -> None:
    with (
        odd_service({"fl.get_stores": say(b" " * 3_000_000)}) as url,
        Api(url, max_reply_bytes=1_000_000) as api,
        pytest.raises(Unavailable, match="more than 1000000 bytes"),
    ):
        api.get_stores()


@pytest.mark.parametrize("answer", [hang, trickle, trickle_head])
def test_an_answer_that_does_not_come_in_time_is_unavailable(answer: Any) -> None:
    with odd_service({"fl.get_stores": answer}) as url, Api(url, timeout_seconds=0.5) as api:
        started = time.monotonic()
        with pytest.raises(Unavailable):
            api.get_stores()
        assert 0.4 < time.monotonic() - started < 5


def test_an_unknown_error_code_is_an_error_of_ours_without_control_characters() -> None:
    answer = say(b'{"jsonrpc": "2.0", "id": 1, "error": {"code": -1, "message": "bad\\u001b[31m"}}')
    with odd_service({"fl.get_stores": answer}) as url, Api(url) as api, pytest.raises(FedChordError) as caught:
        api.get_stores()
    assert (type(caught.value), caught.value.message) == (FedChordError, "bad [31m")


# --- the log -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What goes to a logger of the user's."""
    found: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    handler = Handler()
    logger = logging.getLogger("your_logger")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    set_logger(logger)
    yield found
    logger.removeHandler(handler)
    set_logger(logging.getLogger("store.client"))


def test_transfers_are_logged_at_info_and_other_calls_at_debug(api: Api, lines: list[logging.LogRecord]) -> None:
    info = api.put_model(STORE, io.BytesIO(b"1"))
    api.put_aggregated_model(STORE, io.BytesIO(b"1"))
    b"".join(api.load_model(STORE, info["model_id"]))
    api.get_models(STORE)
    api.get_server_version()
    with pytest.raises(NoUpstream):
        api.feedback(STORE, info["model_id"])
    with pytest.raises(NoUpstream):
        api.request_transfer(STORE)
    levels = {line.funcName: line.levelname for line in lines}
    transfers = ("put_model", "put_aggregated_model", "load_model", "feedback", "request_transfer")
    assert levels == {
        **dict.fromkeys(transfers, "INFO"),
        "get_models": "DEBUG",
        "get_server_version": "DEBUG",
    }
    assert {line.filename for line in lines} == {"api.py"}
