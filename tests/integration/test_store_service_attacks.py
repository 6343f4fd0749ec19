"""Whatever is sent to the model store's service, it answers with a documented error, keeps nothing, and goes on."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import urllib3

from tests.servers import wait_for
from tests.store_server import StoreServer, store_server

STORE = "ddc:attacked"
BOUNDARY = "boundary"
IDLE_SECONDS = 1.0
MAX_FILE_BYTES = 4_000_000
MOST_MEMORY = 250e6  # bytes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A service that takes files of any size, and waits for one second only."""
    with store_server(tmp_path_factory.mktemp("patient"), http_idle_seconds=str(IDLE_SECONDS)) as started:
        yield started


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A service that takes small files only."""
    folder = tmp_path_factory.mktemp("small")
    with store_server(folder, max_model_gigabytes=str(MAX_FILE_BYTES / 1e9)) as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_is_left(server: StoreServer, small_server: StoreServer) -> Iterator[None]:
    """Prove after each attack that nothing was kept and that the service answers."""
    servers = (server, small_server)
    for each in servers:
        call(each, "fl.initialize_model_store", model_store_ddc=STORE)
    before = [kept(each) for each in servers]
    yield
    for each, kept_before in zip(servers, before, strict=True):
        wait_for(lambda each=each: scratch(each) == [], seconds=10, what="scratch empty")  # type: ignore[misc]  # bound
        assert kept(each) == kept_before
        assert peak_memory(each) < MOST_MEMORY
        assert "Traceback" not in (each.folder / "service.log").read_text()


def kept(server: StoreServer) -> tuple[list[str], list[Any]]:
    """Return what the service has: its files and its records."""
    stores = call(server, "fl.get_stores")
    models = [call(server, "fl.get_models", model_store_ddc=store["model_store_ddc"]) for store in stores]
    files = [str(path.relative_to(server.folder)) for path in server.folder.rglob("*") if path.suffix != ".log"]
    return sorted(name for name in files if not name.startswith("records.db")), [stores, models]


def peak_memory(server: StoreServer) -> int:
    """Return the most memory that the service has had, in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def scratch(server: StoreServer) -> list[str]:
    return [path.name for path in (server.folder / "blobs" / "scratch").iterdir()]


def call(server: StoreServer, method: str, **params: Any) -> Any:
    document = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    with urllib3.PoolManager(retries=False, timeout=20) as pool:
        answer = pool.request("POST", f"{server.url}/jsonrpc", json=document).json()
    return answer["result"] if "result" in answer else answer["error"]


@contextmanager
def connection(server: StoreServer, data: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as opened:
        opened.sendall(data)
        yield opened


def answer(opened: socket.socket) -> tuple[int, Any]:
    """Return the status of the answer and its error's code, or what else its body is."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (block := opened.recv(65536)):
            raise ConnectionResetError(f"closed after {data!r}")
        data += block
    head, _, body = data.partition(b"\r\n\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(headers[b"content-length"]):
        body += opened.recv(65536)
    status = int(head.split()[1])
    try:
        return status, json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return status, body


def is_closed(opened: socket.socket) -> bool:
    """Return whether the service closes the connection within the time-out, after whatever it says."""
    try:
        while opened.recv(65536):
            continue
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def part(name: str, data: bytes, more: str = "") -> bytes:
    return (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode("latin-1")
        + data
        + b"\r\n"
    )


def form(**fields: bytes) -> bytes:
    """Return a whole body, with a small file unless another one is given."""
    given = {"model_store_ddc": STORE.encode(), "file": b"data", **fields}
    return b"".join(part(name, data) for name, data in given.items()) + f"--{BOUNDARY}--\r\n".encode()


def head(length: int | str | None, *more: str, method: str = "fl.put_model") -> bytes:
    lines = [
        f"POST /jsonrpc/upload/{method} HTTP/1.1",
        "Host: localhost",
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}",
        *([] if length is None else [f"Content-Length: {length}"]),
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def upload(server: StoreServer, body: bytes) -> tuple[int, Any]:
    with connection(server, head(len(body)) + body) as opened:
        return answer(opened)


# --- uploads that are not what they say ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        form()[:-4],
        form()[: -len(BOUNDARY) - 8],
        form().replace(b"data", b"data" * 500_000)[:-9],
        part("model_store_ddc", STORE.encode()),
        b"",
        b"nonsense",
        b"--other\r\n\r\n--other--\r\n",
        f"--{BOUNDARY}\r\nnonsense\r\n\r\n--{BOUNDARY}--\r\n".encode(),
        f"--{BOUNDARY}\r\nContent-Disposition: form-data".encode(),
    ],
)
def test_a_truncated_form_is_a_broken_upload(server: StoreServer, body: bytes) -> None:
    assert upload(server, body) == (400, -32005)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (f"--{BOUNDARY}--\r\n".encode(), -32602),  # nothing in it
        (part("model_store_ddc", STORE.encode()) + f"--{BOUNDARY}--\r\n".encode(), -32602),  # no file
        (part("file", b"data") + f"--{BOUNDARY}--\r\n".encode(), -32602),  # no model store
        (f"--{BOUNDARY}\r\nX: y\r\n\r\n\r\n--{BOUNDARY}--\r\n".encode(), -32602),  # no name
        (part("file", b"one") + form(), -32602),  # two files
        (part("model_kind", b"one") + form(model_kind=b"two"), -32602),
        (part("colour", b"red") + form(), -32602),
        (b"".join(part("model_kind", b"") for _ in range(40)) + form(), -32602),
        (form(model_description=b"\xff\xfe"), -32602),
        (form(model_description=b"d" * 10_001), -32602),
        (form(model_description=b"d" * (2 << 20)), -32004),
        (form(model_description=b"d" * 600_000, model_kind=b"k" * 600_000), -32004),
        (form(model_meta=b"{" * 2_000_000), -32004),
        (form(model_meta=b'{"a":' * 10_000 + b"1" + b"}" * 10_000), -32602),
        (form(model_meta=b'{"a": "' + b"x" * 70_000 + b'"}'), -32004),
        (form(model_meta=b'{"a": "\\u0000"}'), -32602),
        (form(model_meta=b'{"a": 1e999}'), -32602),
        (form(metrics=b"[" * 10_000), -32602),
        (form(parents=b"[" * 10_000), -32602),
        (form(round=b"9" * 100_000), -32602),
        (form(model_kind=b"a\0b"), -32602),
        (form(model_store_ddc=b"ddc:.."), -32602),
        (form(model_store_ddc=b"ddc:../../etc/passwd"), -32602),
        (form(model_store_ddc=b"ddc:a\0b"), -32602),
        (form(model_store_ddc=b"ddc:" + b"n" * 10_000), -32602),
        (part("x" * 20_000, b"") + form(), -32005),
        (part("file", b"data", '; filename="' + "f" * 20_000 + '"'), -32005),
    ],
)
def test_what_is_wrong_with_a_form_has_its_code(server: StoreServer, body: bytes, code: int) -> None:
    status, found = upload(server, body)
    assert (status, found) == (413 if code == -32004 else 400, code)


def test_an_encoded_part_is_refused(server: StoreServer) -> None:
    body = form().replace(b'name="file"\r\n', b'name="file"\r\nContent-Transfer-Encoding: base64\r\n')
    assert upload(server, body) == (400, -32602)


@pytest.mark.parametrize("name", ["../../../escaped", "a\x00b", "/etc/passwd", "n" * 10_000, '\\"; name=\\"model_kind'])
def test_the_files_name_leads_nowhere(server: StoreServer, name: str) -> None:
    body = form().replace(b'name="file"', f'name="file"; filename="{name}"'.encode())
    status, found = upload(server, body)
    assert status == 200
    info = json.loads(found)["result"]
    assert call(server, "fl.delete_model", model_store_ddc=STORE, model_id=info["model_id"]) == 1
    assert sorted(path.name for path in (server.folder / "blobs" / "blobs").iterdir()) == [info["model_hash"]]
    (server.folder / "blobs" / "blobs" / info["model_hash"]).unlink()
    assert not (server.folder.parent / "escaped").exists()


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'b' * 9000}",
    ],
)
def test_a_content_type_without_a_usable_boundary_is_refused(server: StoreServer, kind: str) -> None:
    request = head(len(form())).replace(f"multipart/form-data; boundary={BOUNDARY}".encode(), kind.encode())
    with connection(server, request + form()) as opened:
        assert answer(opened) == (400, -32602)


def test_an_upload_to_no_method_is_refused_unread(server: StoreServer) -> None:
    with connection(server, head(10**10, method="fl.nothing")) as opened:
        assert answer(opened) == (404, -32601)


# --- uploads that have another length than they say ----------------------------------------------------------------


def test_ten_gigabytes_announced_and_then_silence_is_a_broken_upload(server: StoreServer) -> None:
    started = time.monotonic()
    with connection(server, head(10**10) + form()[:-10] + bytes(1000)) as opened:
        assert answer(opened) == (400, -32005)
    assert IDLE_SECONDS <= time.monotonic() - started < IDLE_SECONDS + 5


def test_a_byte_now_and_then_is_not_enough(server: StoreServer) -> None:
    with connection(server, head(10_000_000) + form()[:-60]) as opened:
        began = time.monotonic()
        opened.settimeout(IDLE_SECONDS / 5)
        while time.monotonic() - began < 10 * IDLE_SECONDS:
            try:
                opened.sendall(b"d")
                assert opened.recv(12) == b"HTTP/1.1 400"
                break
            except TimeoutError:
                continue
        assert time.monotonic() - began < 3 * IDLE_SECONDS


def test_a_connection_that_is_closed_in_an_upload_leaves_nothing(server: StoreServer) -> None:
    for end in (socket.SHUT_WR, socket.SHUT_RDWR, None):
        with connection(server, head(10**10) + form()[:-10] + bytes(3_000_000)) as opened:
            wait_for(lambda: scratch(server) != [], seconds=10, what="upload begun")
            if end is None:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close by a reset
            else:
                opened.shutdown(end)
        wait_for(lambda: scratch(server) == [], seconds=10, what="upload forgotten")


def test_more_than_a_model_may_have_is_refused_before_it_is_sent(small_server: StoreServer) -> None:
    with connection(small_server, head(10**10, "Expect: 100-continue")) as opened:
        assert answer(opened) == (413, -32004)


def test_more_than_a_model_may_have_is_refused_while_it_comes(small_server: StoreServer) -> None:
    body = form(file=bytes(MAX_FILE_BYTES + 1))
    assert upload(small_server, body) == (413, -32004)
    chunked = b"".join(chunk(body[start : start + 99_999]) for start in range(0, len(body), 99_999))
    with connection(small_server, head(None, "Transfer-Encoding: chunked") + chunked + b"0\r\n\r\n") as opened:
        assert answer(opened) == (413, -32004)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_body_without_end_around_the_form_is_too_large(small_server: StoreServer, place: str) -> None:
    start = head(None, "Transfer-Encoding: chunked") + (b"" if place == "before" else chunk(form()))
    with connection(small_server, start) as opened:
        for _ in range(400):  # 40 MB
            opened.sendall(chunk(b"\r\n" * 50_000))
        assert answer(opened) == (413, -32004)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_more_than_the_disk_has_room_for_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    with store_server(tmp_path, max_model_gigabytes="1e9") as started, connection(started, head(10**17)) as opened:
        assert answer(opened) == (507, -32007)


def test_a_caller_who_reads_late_still_gets_the_refusal(small_server: StoreServer) -> None:
    with connection(small_server, head(10**10)) as opened:
        for _ in range(20):
            opened.sendall(bytes(100_000))
        assert answer(opened) == (413, -32004)
        assert is_closed(opened)


def test_a_content_length_that_is_too_small_ends_the_form_early(server: StoreServer) -> None:
    with connection(server, head(len(form()) - 20) + form()) as opened:
        assert answer(opened) in [(400, -32005), (400, -32600)]  # the rest is no request, which may be told first


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 30, "1, 2", "1\r\nContent-Length: 2"])
def test_a_content_length_that_is_no_length_is_no_request(server: StoreServer, length: str) -> None:
    with connection(server, head(length) + form()) as opened:
        assert answer(opened) == (400, -32600)


def test_a_chunk_that_is_no_chunk_is_no_request(server: StoreServer) -> None:
    with connection(server, head(None, "Transfer-Encoding: chunked") + b"zz\r\nnonsense\r\n") as opened:
        assert answer(opened) == (400, -32600)


@pytest.mark.parametrize("file_first", [False, True])
def test_a_model_store_that_is_deleted_during_an_upload_stays_deleted(server: StoreServer, file_first: bool) -> None:
    name = "ddc:deleted"
    call(server, "fl.initialize_model_store", model_store_ddc=name)
    parts = [part("model_store_ddc", name.encode()), part("file", os.urandom(3_000_000))]
    body = b"".join([*(reversed(parts) if file_first else parts), f"--{BOUNDARY}--\r\n".encode()])
    with connection(server, head(len(body)) + body[:-10]) as opened:
        wait_for(lambda: scratch(server) != [], seconds=10, what="upload begun")
        assert call(server, "fl.delete_store", model_store_ddc=name) == 1
        opened.sendall(body[-10:])
        assert answer(opened) == (404, -32001)
    assert call(server, "fl.exists_store", model_store_ddc=name) is False


# --- connections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"P", b"POST /jsonrpc HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_a_request_whose_headers_do_not_come_is_cut(server: StoreServer, data: bytes) -> None:
    with connection(server, data) as opened:
        assert is_closed(opened)


def test_a_call_whose_body_does_not_come_is_told(server: StoreServer) -> None:
    request = (
        b"POST /jsonrpc HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    )
    with connection(server, request) as opened:
        assert answer(opened) == (400, -32005)


@pytest.mark.parametrize("data", [b"\0" * 100, b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01" * 50])
def test_what_is_not_http_is_refused(server: StoreServer, data: bytes) -> None:
    with connection(server, data) as opened:
        assert answer(opened) == (400, -32600)
        assert is_closed(opened)


def test_a_request_without_a_host_is_refused(server: StoreServer) -> None:
    with connection(server, b"POST /jsonrpc HTTP/1.0\r\nContent-Length: 0\r\n\r\n") as opened:
        assert answer(opened) == (403, -32003)


def test_whoever_reads_nothing_of_a_download_is_cut(server: StoreServer) -> None:
    with urllib3.PoolManager(retries=False, timeout=20) as pool:
        url = f"{server.url}/jsonrpc/upload/fl.put_model"
        answered = pool.request("POST", url, fields={"model_store_ddc": STORE, "file": ("model", bytes(40_000_000))})
    info = answered.json()["result"]
    path = f"/jsonrpc/download/fl.load_model?model_store_ddc={STORE}&model_id={info['model_id']}"

    with connection(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) as opened:
        assert opened.recv(10)
        own_port = opened.getsockname()[1]

        def is_cut() -> bool:
            connections = psutil.Process(server.process.pid).net_connections("tcp")
            return own_port not in {each.raddr.port for each in connections if each.raddr}

        wait_for(is_cut, seconds=20, what="connection cut")
    assert call(server, "fl.delete_model", model_store_ddc=STORE, model_id=info["model_id"]) == 1
    (server.folder / "blobs" / "blobs" / info["model_hash"]).unlink()


def test_three_hundred_silent_connections_stop_nobody(server: StoreServer) -> None:
    opened = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(300)]
    try:
        for each in opened[::2]:
            each.sendall(head(10**9) + form()[:-10])
        assert call(server, "fl.exists_store", model_store_ddc=STORE) is True
    finally:
        for each in opened:
            each.close()


# --- calls ---------------------------------------------------------------------------------------------------------


def post(server: StoreServer, body: bytes) -> tuple[int, Any]:
    lines = "POST /jsonrpc HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connection(server, f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body) as opened:
        return answer(opened)


def request(params: str, method: str = "fl.get_models") -> bytes:
    return f'{{"jsonrpc": "2.0", "id": 1, "method": "{method}", "params": {params}}}'.encode()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"[" * 8_000_000, 200, -32700),
        (b'{"a":' * 1_000_000, 200, -32700),
        (b"[" + b"[]," * 2_600_000 + b"[]]", 200, -32700),
        (b"[" + b"0.1," * 2_000_000 + b"0.1]", 200, -32700),
        (request(f'["{STORE}", ["' + '", "'.join(["x"] * 300_000) + '"]]'), 200, -32602),
        (b" " * ((8 << 20) + 1), 413, -32004),
        (request(f'["{STORE}", {"[" * 100}{"]" * 100}]'), 200, -32700),
        (request(f'["{STORE}", {{"=": ["round", {"9" * 5000}]}}]'), 200, -32700),
        (request(f'["{STORE}", {{"=": ["round", {"9" * 500}]}}]'), 200, -32602),
        (request(f'["{STORE}", {{"~": ["round", 1]}}]'), 200, -32602),
        (request(f'["{STORE}", {{"=": ["secret_hash", 1]}}]'), 200, -32602),
        (request(f'["{STORE}", {{"=": ["round", {{"a": 1}}]}}]'), 200, -32602),
        (request(f'["{STORE}", {{"like": ["model_kind", "a\\u0000b"]}}]'), 200, -32602),
        (request(f'["{STORE}", ' + '{"not": ' * 30 + "{}" + "}" * 30 + "]"), 200, -32602),
        (request(f'["{STORE}", null, 0, null, "round; DROP TABLE model_info"]'), 200, -32602),
        (request('["ddc:../../etc/passwd"]'), 200, -32602),
        (request('["ddc:a\\u0000b"]'), 200, -32602),
        (request(f'["ddc:{"n" * 10_000}"]'), 200, -32602),
        (request(f'["{STORE}", "{"x" * 1_000_000}"]', "fl.get_model_info"), 200, -32001),
        (request(f'["{STORE}", "../../records.db"]', "fl.get_model_info"), 200, -32001),
        (request(f'["{STORE}", "a\\u0000b"]', "fl.delete_model"), 200, -32001),
        (request("[]", "fl.__init__"), 200, -32601),
        (request("[]", "fl.store"), 200, -32601),
        (request("[]", "fl._model"), 200, -32601),
        (request("[]", "m" * 1_000_000), 200, -32601),
    ],
)
def test_a_call_that_means_harm_has_its_code(server: StoreServer, body: bytes, status: int, code: int) -> None:
    assert post(server, body) == (status, code)


def test_a_batch_of_thousands_is_refused_as_a_whole(server: StoreServer) -> None:
    body = b"[" + b",".join([request(f'["{STORE}"]')] * 10_000) + b"]"
    assert post(server, body) == (200, -32600)
