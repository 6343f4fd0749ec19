"""The model store's service over real HTTP: calls, uploads, downloads, access, start and end."""

import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from blake3 import blake3

from common.errors import InvalidSettings, PortInUse
from common.settings import Settings
from store.blobs import BLOCK_BYTES, Blob
from store.database import reading, writing
from store.export import export_single
from store.model_stores import grant
from store.models import ModelInfo, add_model
from store.opening import OpenStore, open_store
from store.service.downloads import Part, find_part
from store.service.methods import Methods
from store.service.serving import listen
from store.tables import received_blobs
from store.tenants import add_tenant, get_tenant, operator, set_tenant_enabled
from store.tensors import Array, write_shard
from store.weights import store_weights
from tests.servers import free_ports, wait_for
from tests.store_server import StoreServer, store_server

STORE = "ddc:my_first_model_store"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with store_server(tmp_path_factory.mktemp("service")) as started:
        call(started, "fl.initialize_model_store", model_store_ddc=STORE)
        yield started


@pytest.fixture(scope="module")
def opened(server: StoreServer) -> Iterator[OpenStore]:
    """The same records and blobs, as another process has them."""
    with open_store(server.settings) as store:
        yield store


@pytest.fixture(scope="module")
def keys_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with store_server(tmp_path_factory.mktemp("keys"), http_access="keys") as started:
        yield started


@pytest.fixture(scope="module")
def keys_opened(keys_server: StoreServer) -> Iterator[OpenStore]:
    with open_store(keys_server.settings) as store:
        yield store


def request(
    server: StoreServer, verb: str, path: str, headers: Mapping[str, str] | None = None, **more: Any
) -> urllib3.BaseHTTPResponse:
    with urllib3.PoolManager(retries=False, timeout=30) as pool:
        return pool.request(verb, server.url + path, headers=dict(headers or {}), redirect=False, **more)


def rpc(server: StoreServer, document: object, headers: Mapping[str, str] | None = None) -> Any:
    response = request(server, "POST", "/jsonrpc", headers, json=document)
    return response.json() if response.data else None


def call(server: StoreServer, method: str, headers: Mapping[str, str] | None = None, **params: Any) -> Any:
    answer = rpc(server, {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}, headers)
    return answer["result"] if "result" in answer else answer["error"]


def put(
    server: StoreServer,
    data: bytes,
    *,
    method: str = "fl.put_model",
    headers: Mapping[str, str] | None = None,
    fields: Mapping[str, str] | None = None,
    **more_fields: str,
) -> Any:
    """Put a file and return the whole answer."""
    form = {"model_store_ddc": STORE, **(fields or {}), **more_fields, "file": ("model", data)}
    return request(server, "POST", f"/jsonrpc/upload/{method}", headers, fields=form).json()


def form_of(data: bytes, boundary: str | None = None) -> tuple[bytes, str]:
    """Return the body and the content type of an upload."""
    return urllib3.encode_multipart_formdata([("model_store_ddc", STORE), ("file", ("model", data))], boundary)


def load(server: StoreServer, model_id: str, headers: Mapping[str, str] | None = None) -> urllib3.BaseHTTPResponse:
    path = f"/jsonrpc/download/fl.load_model?model_store_ddc={STORE}&model_id={model_id}"
    return request(server, "GET", path, headers)


def load_request(model_id: str, request_id: object = 5) -> dict[str, Any]:
    params = {"model_store_ddc": STORE, "model_id": model_id}
    return {"jsonrpc": "2.0", "id": request_id, "method": "fl.load_model", "params": params}


def scratch(server: StoreServer) -> list[str]:
    return [path.name for path in (server.folder / "blobs" / "scratch").iterdir()]


# --- calls ---------------------------------------------------------------------------------------------------------


def test_the_documents_first_request_is_answered_as_it_shows(server: StoreServer) -> None:
    document = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "fl.initialize_model_store",
        "params": {"model_store_ddc": STORE},
    }
    answer = rpc(server, document)
    assert answer["result"]["model_store_ddc"] == STORE
    assert answer["result"]["created_at"]["_type"] == "datetime"
    assert datetime.fromisoformat(answer["result"]["created_at"]["val"]) < datetime.now(UTC) + timedelta(seconds=60)
    assert (answer["jsonrpc"], answer["id"]) == ("2.0", 1)


def test_a_notification_has_no_answer_and_is_carried_out(server: StoreServer) -> None:
    name = "ddc:by notification"
    document = {"jsonrpc": "2.0", "method": "fl.initialize_model_store", "params": [name]}
    response = request(server, "POST", "/jsonrpc", json=document)
    assert (response.status, response.data) == (204, b"")
    assert call(server, "fl.exists_store", model_store_ddc=name) is True


def test_a_batch_mixes_results_and_errors(server: StoreServer) -> None:
    found = rpc(
        server,
        [
            {"jsonrpc": "2.0", "id": "a", "method": "fl.exists_store", "params": ["ddc:nowhere"]},
            {"jsonrpc": "2.0", "id": "b", "method": "fl.get_model_info", "params": ["ddc:nowhere", "x"]},
            {"jsonrpc": "2.0", "id": "c", "method": "fl.nothing"},
        ],
    )
    assert [each["id"] for each in found] == ["a", "b", "c"]
    assert found[0]["result"] is False
    assert [each["error"]["code"] for each in found[1:]] == [-32001, -32601]


@pytest.mark.parametrize(
    ("params", "what"),
    [
        ({}, "Parameter model_store_ddc is missing"),
        ([], "Parameter model_store_ddc is missing"),
        ({"model_store_ddc": 7}, "Parameter model_store_ddc is wrong: Input should be a valid string"),
        ({"model_store_ddc": STORE, "offset": "1"}, "Parameter offset is wrong"),
        ({"model_store_ddc": STORE, "offset": True}, "Parameter offset is wrong"),
        ({"model_store_ddc": STORE, "offset": -1}, "offset"),
        ({"model_store_ddc": STORE, "limit": 10**30}, "limit"),
        ({"model_store_ddc": STORE, "order": ["-round", 5]}, "Parameter order"),
        ({"model_store_ddc": STORE, "conds": ["="]}, "Parameter conds is wrong"),
        ({"model_store_ddc": STORE, "colour": "red"}, "There is no parameter 'colour'"),
        ([STORE, None, 0, None, None, 1], "give at most 5"),
    ],
)
def test_a_wrong_parameter_is_named(server: StoreServer, params: Any, what: str) -> None:
    answer = rpc(server, {"jsonrpc": "2.0", "id": 1, "method": "fl.get_models", "params": params})
    assert answer["error"]["code"] == -32602
    assert what in answer["error"]["message"]


def test_a_method_that_takes_a_file_says_where(server: StoreServer) -> None:
    for method, where in (("fl.put_model", "/jsonrpc/upload/"), ("fl.load_model", "/jsonrpc/download/")):
        answer = rpc(server, {"jsonrpc": "2.0", "id": 1, "method": method})
        assert answer["error"]["code"] == -32601
        assert where in answer["error"]["data"]


@pytest.mark.parametrize(
    ("verb", "path", "status"),
    [("GET", "/jsonrpc", 405), ("PUT", "/jsonrpc", 405), ("GET", "/nowhere", 404), ("GET", "/jsonrpc/upload/x", 405)],
)
def test_what_is_asked_elsewhere_is_refused_as_jsonrpc(server: StoreServer, verb: str, path: str, status: int) -> None:
    response = request(server, verb, path)
    assert (response.status, response.json()["error"]["code"]) == (status, -32600)


def test_another_content_type_is_refused(server: StoreServer) -> None:
    for headers in ({"Content-Type": "text/plain"}, {}):
        response = request(server, "POST", "/jsonrpc", headers, body=b"{}")
        assert (response.status, response.json()["error"]["code"]) == (415, -32600)


def test_health_needs_no_key(server: StoreServer, keys_server: StoreServer) -> None:
    for each in (server, keys_server):
        assert request(each, "GET", "/health").json()["status"] == "ok"


def test_more_methods_are_called_with_the_caller(opened: OpenStore) -> None:
    def wait(caller: Any, job_id: str, wait_seconds: float = 0) -> list[object]:
        return [caller.is_operator, job_id, wait_seconds]

    methods = Methods(opened, {"job.get": wait})
    caller = operator(opened.settings)
    assert methods.call(caller, "job.get", {"job_id": "a", "wait_seconds": 2}) == [True, "a", 2]
    assert methods.call(caller, "job.get", ["b"]) == [True, "b", 0]


# --- uploads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100_000, 3 * BLOCK_BYTES + 17])
def test_what_is_put_is_loaded(server: StoreServer, size: int) -> None:
    data = os.urandom(size)
    answer = put(server, data, model_description="test model", model_meta='{"additional": "data"}')
    info = answer["result"]
    assert (answer["jsonrpc"], answer["id"]) == ("2.0", None)
    assert (info["model_hash"], info["model_size"]) == (blake3(data).hexdigest(), size)
    assert (info["model_state"], info["model_description"]) == (10, "test model")
    assert info["model_meta"] == {"additional": "data"}
    response = load(server, info["model_id"])
    assert (response.status, response.data) == (200, data)
    assert response.headers["ETag"] == f'"{info["model_hash"]}"'
    assert scratch(server) == []


def test_all_fields_of_an_upload_are_kept(server: StoreServer) -> None:
    answer = put(
        server,
        b"x",
        method="fl.put_aggregated_model",
        model_kind="pt",
        round="7",
        parents='["one", "two"]',
        metrics='{"accuracy": 0.5}',
        num_examples="12",
        id="17",
    )
    info = answer["result"]
    assert answer["id"] == 17
    assert (info["model_state"], info["model_kind"], info["round"], info["num_examples"]) == (30, "pt", 7, 12)
    assert (info["parents"], info["metrics"]) == (["one", "two"], {"accuracy": 0.5})


def test_the_file_may_come_before_the_fields(server: StoreServer) -> None:
    form = [("file", ("model", b"first")), ("model_kind", "last"), ("model_store_ddc", STORE)]
    answer = request(server, "POST", "/jsonrpc/upload/fl.put_model", fields=form).json()
    assert (answer["result"]["model_kind"], answer["result"]["model_size"]) == ("last", 5)


def test_a_file_with_boundaries_in_it_comes_whole(server: StoreServer) -> None:
    boundary = "b" * 20
    data = b"\r\n--" + boundary.encode()[:-1] + b"\r\n--\r\n-" * 1000 + b"\r" * (BLOCK_BYTES + 3) + b"\n--bbb"
    body, kind = form_of(data, boundary)
    for pieces in (iter([body]), (body[start : start + 997] for start in range(0, len(body), 997))):
        response = request(server, "POST", "/jsonrpc/upload/fl.put_model", {"Content-Type": kind}, body=pieces)
        assert response.json()["result"]["model_hash"] == blake3(data).hexdigest()


def test_a_safetensors_file_has_its_tensors_listed(server: StoreServer, tmp_path: Path) -> None:
    write_shard(tmp_path / "model", {"layer.weight": np.zeros((2, 3), np.float32)})
    info = put(server, (tmp_path / "model").read_bytes())["result"]
    found = call(server, "fl.get_model_info", model_store_ddc=STORE, model_id=info["model_id"])
    assert found["tensors"] == {"layer.weight": {"dtype": "F32", "shape": [2, 3]}}


@pytest.mark.parametrize(
    ("fields", "code", "what"),
    [
        ({"model_store_ddc": "ddc:nowhere"}, -32001, "ddc:nowhere"),
        ({"model_store_ddc": "nowhere"}, -32602, "cannot be a model store's name"),
        ({"model_state": "11"}, -32602, "model_state"),
        ({"model_state": "x"}, -32602, "model_state"),
        ({"round": "-1"}, -32602, "round"),
        ({"round": "1.5"}, -32602, "round"),
        ({"parents": "{}"}, -32602, "parents"),
        ({"parents": "[1]"}, -32602, "parents"),
        ({"metrics": "[1]"}, -32602, "metrics"),
        ({"metrics": '{"loss": NaN}'}, -32602, "metrics"),
        ({"model_meta": "nonsense"}, -32602, "model_meta"),
        ({"colour": "red"}, -32602, "There is no field 'colour'"),
        ({"model_kind": "k" * 201}, -32602, "model_kind"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_kept(
    server: StoreServer, fields: dict[str, str], code: int, what: str
) -> None:
    before = call(server, "fl.get_models", model_store_ddc=STORE)
    answer = put(server, b"not kept", fields={"id": "9", **fields})
    assert (answer["error"]["code"], answer["id"]) == (code, 9)
    assert what in answer["error"]["message"]
    assert call(server, "fl.get_models", model_store_ddc=STORE) == before
    assert scratch(server) == []


def test_many_uploads_at_once_are_kept_apart(server: StoreServer) -> None:
    files = [os.urandom(2_000_000 + number) for number in range(12)]
    with ThreadPoolExecutor(len(files)) as threads:
        found = list(threads.map(lambda data: put(server, data)["result"]["model_hash"], files))
    assert found == [blake3(data).hexdigest() for data in files]
    assert scratch(server) == []


def test_a_blob_is_kept_for_whoever_sent_it(server: StoreServer, opened: OpenStore) -> None:
    data = os.urandom(1000)
    blob = Blob(digest=blake3(data).hexdigest(), size=len(data))
    for _ in range(2):
        answer = put(server, data, method="fl.put_blob", digest=blob.digest, size=str(blob.size))
        assert answer["result"] == {"digest": blob.digest, "size": blob.size}
    assert opened.blobs.find(blob.digest) == blob
    with reading(opened.engine) as connection:
        rows = connection.execute(received_blobs.select().where(received_blobs.c.digest == blob.digest)).all()
    assert [(row.tenant_id, row.size) for row in rows] == [("", 1000)]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"digest": "0" * 64, "size": "4"}, -32005),
        ({"digest": blake3(b"blob").hexdigest(), "size": "5"}, -32005),
        ({"digest": "nonsense", "size": "4"}, -32602),
        ({"digest": "0" * 64}, -32602),
    ],
)
def test_a_blob_that_is_not_what_was_announced_is_not_kept(
    server: StoreServer, opened: OpenStore, fields: dict[str, str], code: int
) -> None:
    before = list(opened.blobs.blobs())
    answer = put(server, b"blob", method="fl.put_blob", fields=fields)
    assert answer["error"]["code"] == code
    assert list(opened.blobs.blobs()) == before
    assert scratch(server) == []


# --- downloads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "condition", "part"),
    [
        (None, None, (0, 10, False)),
        ("bytes=2-5", None, (2, 6, True)),
        ("bytes=2-", None, (2, 10, True)),
        ("bytes=-3", None, (7, 10, True)),
        ("bytes=-30", None, (0, 10, True)),
        ("bytes=0-0", None, (0, 1, True)),
        ("bytes=9-20", None, (9, 10, True)),
        ("bytes=10-", None, None),
        ("bytes=-0", None, None),
        ("bytes=5-2", None, (0, 10, False)),
        ("bytes=-", None, (0, 10, False)),
        ("bytes=0-1,4-5", None, (0, 10, False)),
        ("lines=0-1", None, (0, 10, False)),
        ("bytes=0x1-2", None, (0, 10, False)),
        ("bytes=2-5", '"tag"', (2, 6, True)),
        ("bytes=2-5", '"other"', (0, 10, False)),
        ("bytes=2-5", 'W/"tag"', (0, 10, False)),
        ("bytes=2-5", "Sun, 22 Nov 2026 02:00:00 GMT", (0, 10, False)),
    ],
)
def test_a_range_is_what_rfc_9110_says(
    wanted: str | None, condition: str | None, part: tuple[int, int, bool] | None
) -> None:
    expected = None if part is None else Part(start=part[0], end=part[1], is_partial=part[2])
    assert find_part(wanted, condition, '"tag"', 10) == expected


def test_a_cut_download_goes_on_where_it_was(server: StoreServer) -> None:
    data = os.urandom(3 * BLOCK_BYTES + 5)
    model_id = put(server, data)["result"]["model_id"]
    etag = load(server, model_id).headers["ETag"]
    start = BLOCK_BYTES + 7
    response = load(server, model_id, {"Range": f"bytes={start}-", "If-Range": etag})
    assert (response.status, response.data) == (206, data[start:])
    assert response.headers["Content-Range"] == f"bytes {start}-{len(data) - 1}/{len(data)}"
    response = load(server, model_id, {"Range": f"bytes={start}-", "If-Range": '"another"'})
    assert (response.status, response.data) == (200, data)


def test_a_download_is_asked_for_by_a_jsonrpc_request_too(server: StoreServer) -> None:
    model_id = put(server, b"0123456789")["result"]["model_id"]
    path = "/jsonrpc/download/fl.load_model"
    response = request(server, "POST", path, {"Range": "bytes=2-4"}, json=load_request(model_id))
    assert (response.status, response.data) == (206, b"234")
    response = request(server, "POST", path, json=load_request("nothing"))
    assert (response.status, response.json()["id"], response.json()["error"]["code"]) == (404, 5, -32001)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"jsonrpc": "2.0", "method": "fl.get_models"}', b"\xff"])
def test_a_download_asked_for_otherwise_is_refused(server: StoreServer, body: bytes) -> None:
    response = request(server, "POST", "/jsonrpc/download/fl.load_model", body=body)
    assert response.status == 400
    assert response.json()["error"]["code"] in (-32600, -32602)


def test_a_model_that_is_known_is_not_sent_again(server: StoreServer) -> None:
    model_id = put(server, b"known")["result"]["model_id"]
    etag = load(server, model_id).headers["ETag"]
    for tags in (etag, f'"x", {etag}', f"W/{etag}", "*"):
        response = load(server, model_id, {"If-None-Match": tags})
        assert (response.status, response.data, response.headers["ETag"]) == (304, b"", etag)
    assert load(server, model_id, {"If-None-Match": '"x"'}).status == 200


def test_a_range_outside_the_model_is_refused(server: StoreServer) -> None:
    model_id = put(server, b"short")["result"]["model_id"]
    response = load(server, model_id, {"Range": "bytes=5-"})
    assert (response.status, response.headers["Content-Range"]) == (416, "bytes */5")
    assert response.json()["error"]["code"] == -32602


def test_head_tells_size_and_digest(server: StoreServer) -> None:
    info = put(server, b"whole")["result"]
    path = f"/jsonrpc/download/fl.load_model?model_store_ddc={STORE}&model_id={info['model_id']}"
    response = request(server, "HEAD", path)
    assert (response.status, response.data, response.headers["Content-Length"]) == (200, b"", "5")
    assert response.headers["ETag"] == f'"{info["model_hash"]}"'


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        (f"model_store_ddc={STORE}&model_id=nothing", 404, -32001),
        ("model_store_ddc=ddc:nowhere&model_id=nothing", 404, -32001),
        (f"model_store_ddc={STORE}", 400, -32602),
        (f"model_store_ddc={STORE}&model_id=a&colour=red", 400, -32602),
        ("model_store_ddc=../../etc&model_id=passwd", 400, -32602),
    ],
)
def test_what_cannot_be_loaded_is_a_jsonrpc_error(server: StoreServer, query: str, status: int, code: int) -> None:
    response = request(server, "GET", f"/jsonrpc/download/fl.load_model?{query}")
    assert (response.status, response.json()["error"]["code"]) == (status, code)


def test_a_model_of_shards_is_loaded_as_one_file_or_blob_by_blob(
    server: StoreServer, opened: OpenStore, tmp_path: Path
) -> None:
    tensors: dict[str, Array] = {"a": np.arange(1000, dtype=np.float32), "b": np.full((3, 4), 7, np.int64)}
    weights = store_weights(opened.blobs, tensors, shard_bytes=4000)
    info = ModelInfo(
        store=STORE,
        model_hash=weights.index.digest,
        index_hash=weights.index.digest,
        model_size=sum(shard.size for shard in weights.shards),
        shards=tuple(weights.shards),
    )
    with writing(opened.engine) as connection:
        add_model(connection, info)
    export_single(opened.blobs, weights, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    assert load(server, info.model_id).data == whole
    assert load(server, info.model_id, {"Range": "bytes=11-"}).data == whole[11:]
    for blob in (*weights.shards, weights.index):
        with opened.blobs.open(blob) as file:
            assert load(server, f"{info.model_id}&digest={blob.digest}").data == file.read()
    assert load(server, f"{info.model_id}&digest={'0' * 64}").status == 404


def test_a_model_whose_bytes_are_gone_is_not_found(server: StoreServer, opened: OpenStore) -> None:
    info = put(server, os.urandom(100))["result"]
    opened.blobs.delete(info["model_hash"])
    response = load(server, info["model_id"])
    assert (response.status, response.json()["error"]["code"]) == (404, -32001)


def test_a_download_that_breaks_off_is_never_taken_for_whole(server: StoreServer) -> None:
    info = put(server, os.urandom(60 * BLOCK_BYTES))["result"]
    path = f"/jsonrpc/download/fl.load_model?model_store_ddc={STORE}&model_id={info['model_id']}"
    with urllib3.PoolManager(retries=False, timeout=30) as pool:
        response = pool.request("GET", server.url + path, preload_content=False)
        response.read(10)
        os.truncate(server.folder / "blobs" / "blobs" / info["model_hash"], 30 * BLOCK_BYTES)
        with pytest.raises(urllib3.exceptions.ProtocolError):
            response.read()
    assert request(server, "GET", "/health").status == 200


# --- access --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Host": "[::1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"X-Forwarded-For": "10.0.0.1"},
        {"Forwarded": "for=10.0.0.1"},
    ],
)
def test_open_access_is_for_programs_on_this_machine_only(server: StoreServer, headers: dict[str, str]) -> None:
    form = {"model_store_ddc": STORE, "file": ("model", b"x")}
    before = call(server, "fl.get_models", model_store_ddc=STORE)
    answers = [
        request(server, "POST", "/jsonrpc", headers, json={"jsonrpc": "2.0", "id": 1, "method": "fl.get_stores"}),
        request(server, "POST", "/jsonrpc/upload/fl.put_model", headers, fields=form),
        request(server, "GET", f"/jsonrpc/download/fl.load_model?model_store_ddc={STORE}&model_id=a", headers),
    ]
    assert [(each.status, each.json()["error"]["code"]) for each in answers] == [(403, -32003)] * 3
    assert call(server, "fl.get_models", model_store_ddc=STORE) == before


def test_open_access_lets_this_machine_in_under_any_of_its_names(server: StoreServer) -> None:
    for host in (f"localhost:{server.port}", "127.0.0.1", "127.0.0.7:80", "[::1]:80"):
        for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}):
            assert call(server, "fl.exists_store", headers, model_store_ddc=STORE) is True


def test_without_the_right_keys_nothing_is_told(keys_server: StoreServer, keys_opened: OpenStore) -> None:
    with writing(keys_opened.engine) as connection:
        tenant, secret = add_tenant(connection, "disabled one")
        set_tenant_enabled(connection, tenant.name, False)
    wrong: list[dict[str, str]] = [
        {},
        {"APIKey": tenant.api_key},
        {"Secret": secret},
        {"APIKey": tenant.api_key, "Secret": "wrong"},
        {"APIKey": tenant.api_key, "Secret": secret},
        {"APIKey": "nobody", "Secret": secret},
    ]
    for headers in wrong:
        for verb, path in (
            ("POST", "/jsonrpc"),
            ("POST", "/jsonrpc/upload/fl.put_model"),
            ("GET", "/jsonrpc/download/fl.load_model?model_store_ddc=ddc:a&model_id=b"),
        ):
            response = request(keys_server, verb, path, headers, **({"json": {}} if verb == "POST" else {}))
            assert (response.status, response.json()["error"]["code"]) == (401, -32003)
            assert "WWW-Authenticate" in response.headers


def tenant_headers(opened: OpenStore, name: str) -> dict[str, str]:
    with writing(opened.engine) as connection:
        tenant, secret = add_tenant(connection, name)
    return {"APIKey": tenant.api_key, "Secret": secret}


def test_a_tenant_sees_its_own_stores_and_those_opened_to_it(keys_server: StoreServer, keys_opened: OpenStore) -> None:
    owner, other = tenant_headers(keys_opened, "owner"), tenant_headers(keys_opened, "other")
    call(keys_server, "fl.initialize_model_store", owner, model_store_ddc=STORE)
    info = put(keys_server, b"owned", headers=owner)["result"]
    with reading(keys_opened.engine) as connection:
        assert info["tenant_id"] == get_tenant(connection, "owner").tenant_id
        other_id = get_tenant(connection, "other").tenant_id
    assert load(keys_server, info["model_id"], owner).data == b"owned"
    assert load(keys_server, info["model_id"], other).status == 404
    assert put(keys_server, b"x", headers=other)["error"]["code"] == -32001
    with writing(keys_opened.engine) as connection:
        grant(connection, STORE, other_id, may_write=False)
    assert load(keys_server, info["model_id"], other).data == b"owned"
    form = {"model_store_ddc": STORE, "file": ("model", b"x")}
    response = request(keys_server, "POST", "/jsonrpc/upload/fl.put_model", other, fields=form)
    assert (response.status, response.json()["error"]["code"]) == (403, -32003)
    with writing(keys_opened.engine) as connection:
        grant(connection, STORE, other_id, may_write=True)
    assert put(keys_server, b"x", headers=other)["result"]["tenant_id"] == other_id


def test_a_disabled_tenant_is_out_within_seconds(keys_server: StoreServer, keys_opened: OpenStore) -> None:
    headers = tenant_headers(keys_opened, "soon disabled")
    assert call(keys_server, "fl.get_stores", headers) == []
    with writing(keys_opened.engine) as connection:
        set_tenant_enabled(connection, "soon disabled", False)

    def is_out() -> bool:
        return request(keys_server, "POST", "/jsonrpc", headers, json={}).status == 401

    wait_for(is_out, seconds=8, what="tenant out")


# --- start and end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
def test_open_access_listens_on_loopback_only(host: str) -> None:
    with pytest.raises(InvalidSettings, match="access is open"):
        listen(Settings(http_host=host))


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortInUse, match="FEDCHORD_HTTP_PORT"):
            listen(Settings(http_port=taken.getsockname()[1]))


def test_an_address_that_is_not_ours_is_told() -> None:
    with pytest.raises(InvalidSettings, match=r"192\.0\.2\.1"):
        listen(Settings(http_host="192.0.2.1", http_access="keys", http_port=free_ports(1)[0]))


def test_ipv6_loopback_is_served(tmp_path: Path) -> None:
    with store_server(tmp_path, http_host="::1") as started:
        assert started.url.startswith("http://[::1]:")
        assert call(started, "fl.get_stores") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_service_whatever_is_under_way(tmp_path: Path, number: signal.Signals) -> None:
    with store_server(tmp_path) as started:
        call(started, "fl.initialize_model_store", model_store_ddc=STORE)
        model_id = put(started, bytes(40 * BLOCK_BYTES))["result"]["model_id"]
        address = ("127.0.0.1", started.port)
        with socket.create_connection(address) as uploading, socket.create_connection(address) as downloading:
            uploading.sendall(
                b"POST /jsonrpc/upload/fl.put_model HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            )
            downloading.sendall(
                f"GET /jsonrpc/download/fl.load_model?model_store_ddc={STORE}&model_id={model_id} HTTP/1.1\r\n"
                "Host: localhost\r\n\r\n".encode()
            )
            assert downloading.recv(100)
            started.process.send_signal(number)
            assert started.process.wait(timeout=10) == 0
        assert scratch(started) == []


def test_a_service_that_is_killed_in_a_put_has_nothing_half_made(tmp_path: Path) -> None:
    data = os.urandom(30 * BLOCK_BYTES)
    with store_server(tmp_path) as started:
        call(started, "fl.initialize_model_store", model_store_ddc=STORE)

        def send() -> None:
            body, kind = form_of(data)
            with pytest.raises(urllib3.exceptions.HTTPError):
                request(started, "POST", "/jsonrpc/upload/fl.put_model", {"Content-Type": kind}, body=slowly(body))

        half = threading.Event()

        def slowly(body: bytes) -> Iterator[bytes]:
            for start in range(0, len(body), BLOCK_BYTES):
                if start > len(body) // 2:
                    half.set()
                    dead.wait(10)
                yield body[start : start + BLOCK_BYTES]

        dead = threading.Event()
        with ThreadPoolExecutor(1) as threads:
            sending = threads.submit(send)
            assert half.wait(10)
            started.process.kill()
            started.process.wait()
            dead.set()
            sending.result()
    (left,) = (tmp_path / "blobs" / "scratch").iterdir()
    assert left.name.startswith("upload-")
    with store_server(tmp_path) as again:
        assert call(again, "fl.get_models", model_store_ddc=STORE) == []
        assert put(again, data)["result"]["model_hash"] == blake3(data).hexdigest()
        assert [info["model_size"] for info in call(again, "fl.get_models", model_store_ddc=STORE)] == [len(data)]
