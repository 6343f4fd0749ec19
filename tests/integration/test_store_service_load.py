"""However many callers are slow, or ask for much, the others are served and the service's memory stays bounded."""

import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import urllib3

from common.errors import TooLarge
from store.client import Api
from store.local import LocalApi
from store.opening import open_store
from store.service.methods import WAITING_METHODS
from store.service.rpc import MAX_ANSWER_BYTES
from store.tenants import operator
from tests.odd_services import hang, odd_service
from tests.servers import wait_for
from tests.store_server import StoreServer, store_server

STORE = "ddc:loaded"
MOST_MEMORY = 250e6  # bytes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A service whose upstream hangs."""
    with (
        odd_service({"fl.get_models": hang}) as upstream,
        store_server(tmp_path_factory.mktemp("node"), upstream_url=upstream) as started,
    ):
        yield started


@pytest.fixture
def api(server: StoreServer) -> Iterator[Api]:
    with Api(server.url, timeout_seconds=20) as api:
        api.initialize_model_store(STORE)
        yield api
        api.delete_store(STORE)


def peak_memory(server: StoreServer) -> int:
    """Return the most memory that the service has had, in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_readers_that_take_nothing_do_not_fill_the_memory(server: StoreServer, api: Api) -> None:
    model = api.put_model(STORE, io.BytesIO(bytes(20_000_000)))["model_id"]
    request = (
        f"GET /jsonrpc/download/fl.load_model?model_store_ddc={STORE}&model_id={model} HTTP/1.1\r\n"
        "Host: localhost\r\n\r\n"
    )
    with ExitStack() as stack:
        readers = []
        for _ in range(150):
            reader = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.sendall(request.encode())
            readers.append(reader)
        assert readers[0].recv(15) == b"HTTP/1.1 200 OK"
        assert api.get_server_version()
        wait_for(lambda: peak_memory(server) > 120e6, seconds=20, what="blocks in memory")
        time_is_up = time.monotonic() + 2
        while time.monotonic() < time_is_up:
            assert peak_memory(server) < MOST_MEMORY
    assert b"".join(api.load_model(STORE, model)) == bytes(20_000_000)


def test_calls_that_wait_for_an_upstream_do_not_keep_others_waiting(server: StoreServer, api: Api) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "fl.proxy_request_transfer_info", "params": [STORE]}
    escaped = json.dumps(body).replace("fl.proxy", "fl\\u002eproxy").encode()
    started = threading.Semaphore(0)

    def wait() -> None:
        headers = {"Content-Type": "application/json"}
        with urllib3.PoolManager(retries=False, timeout=4) as pool:
            started.release()
            with pytest.raises(urllib3.exceptions.ReadTimeoutError):
                pool.request("POST", f"{server.url}/jsonrpc", body=escaped, headers=headers)

    waiting = [threading.Thread(target=wait) for _ in range(100)]
    for each in waiting:
        each.start()
    for _ in waiting:
        started.acquire()
    slowest = 0.0
    while any(each.is_alive() for each in waiting):
        began = time.monotonic()
        assert api.get_models(STORE) == []
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 2


def test_every_method_that_waits_is_a_method() -> None:
    assert all(callable(getattr(LocalApi, name)) for name in WAITING_METHODS)


def test_more_records_than_the_memory_should_hold_are_refused_and_a_page_of_them_is_told(
    server: StoreServer, api: Api
) -> None:
    parents = [f"{number:0200}" for number in range(4000)]
    with open_store(server.settings) as store:
        local = LocalApi(store, operator(server.settings))
        for _ in range(70):
            local.put_model(STORE, io.BytesIO(b"model"), parents=parents)
    before = peak_memory(server)
    with pytest.raises(TooLarge, match="limit and offset"):
        api.get_models(STORE)
    assert len(api.get_models(STORE, limit=10, offset=65)) == 5
    assert peak_memory(server) < before + 100e6


def test_a_batch_is_not_answered_with_more_than_the_memory_should_hold(server: StoreServer, api: Api) -> None:
    parents = [f"{number:0200}" for number in range(4000)]
    with open_store(server.settings) as store:
        local = LocalApi(store, operator(server.settings))
        for _ in range(50):
            local.put_model(STORE, io.BytesIO(b"model"), parents=parents)
    asked = [{"jsonrpc": "2.0", "id": id, "method": "fl.get_models", "params": [STORE]} for id in range(4)]
    with urllib3.PoolManager(retries=False) as pool:
        answered: list[dict[str, Any]] = pool.request("POST", f"{server.url}/jsonrpc", json=asked, timeout=60).json()
    assert ["result" in each for each in answered] == [True, True, False, False]
    assert answered[3]["error"]["code"] == -32004
    assert str(MAX_ANSWER_BYTES) in answered[3]["error"]["message"]
