"""Models and parties go up and down between real services, and nothing half-made is ever seen."""

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from common.errors import (
    AccessDenied,
    BrokenUpload,
    Conflict,
    FedChordError,
    InvalidInput,
    NotFound,
    NoUpstream,
    TooLarge,
    UpstreamCycle,
    UpstreamUnavailable,
)
from store.blobs import BLOCK_BYTES, Blob
from store.client import Api
from store.database import reading, writing
from store.exchange import neighbour
from store.exchange.neighbour import Neighbour
from store.model_stores import add_store
from store.models import ModelInfo, ModelState, add_model
from store.opening import open_store
from store.tenants import add_tenant
from store.tensors import Array
from store.upstreams import choose_upstream
from store.weights import store_weights
from tests.odd_services import HoldingLine, hang, odd_service, result, say, say_json, trickle
from tests.servers import free_ports, wait_for
from tests.store_server import StoreServer, store_server

STORE = "ddc:digits"


class Level:
    """A running node, and its API."""

    def __init__(self, server: StoreServer) -> None:
        self.server = server
        self.api = Api(server.url)
        self.api.initialize_model_store(STORE)

    def put(self, data: bytes | None = None, **more: Any) -> dict[str, Any]:
        return self.api.put_model(STORE, io.BytesIO(os.urandom(5000) if data is None else data), **more)

    def aggregate(self, data: bytes | None = None, **more: Any) -> dict[str, Any]:
        return self.api.put_aggregated_model(STORE, io.BytesIO(os.urandom(5000) if data is None else data), **more)

    def load(self, model_id: str) -> bytes:
        return b"".join(self.api.load_model(STORE, model_id))

    def models(self) -> list[dict[str, Any]]:
        return self.api.get_models(STORE)

    def feeds(self, url: str, **more: Any) -> dict[str, Any]:
        return self.api.create_upstream_info(STORE, url, **more)

    @property
    def blobs(self) -> Path:
        return self.server.folder / "blobs" / "blobs"

    def scratch(self) -> list[Path]:
        return list((self.server.folder / "blobs" / "scratch").iterdir())

    def kill(self) -> None:
        self.server.process.send_signal(signal.SIGKILL)
        self.server.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Level]]:
    """Start nodes in folders of their own; one in a folder that was used goes on from it."""
    with ExitStack() as stack:

        def started(name: str, **more: str) -> Level:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            level = Level(stack.enter_context(store_server(folder, **more)))
            stack.callback(level.api.close)
            return level

        yield started


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Level, Level, Level]]:
    """A root, a node that feeds it, and a leaf that feeds that one."""
    with ExitStack() as stack:
        found: list[Level] = []
        for name in ("root", "middle", "leaf"):
            more = {"upstream_url": found[-1].server.url} if found else {}
            more |= {"tenant_id": f"tenant-{name}", "tenant_name": f"The {name}"}
            found.append(Level(stack.enter_context(store_server(tmp_path_factory.mktemp(name), **more))))
        yield found[0], found[1], found[2]
        for level in found:
            level.api.close()


@pytest.fixture
def root(levels: tuple[Level, Level, Level]) -> Level:
    return _emptied(levels[0])


@pytest.fixture
def middle(levels: tuple[Level, Level, Level]) -> Level:
    return _emptied(levels[1])


@pytest.fixture
def leaf(levels: tuple[Level, Level, Level]) -> Level:
    return _emptied(levels[2])


def _emptied(level: Level) -> Level:
    level.api.delete_all_model(STORE)
    for party in level.api.get_parties(here=True):
        level.api.delete_party(party["id"])
    return level


def sharded(level: Level, tensors: dict[str, Array], state: ModelState, **more: Any) -> ModelInfo:
    """Record a model of several shards, as a job does."""
    with open_store(level.server.settings) as store:
        weights = store_weights(store.blobs, tensors, 1 << 20)
        info = ModelInfo(
            store=STORE,
            model_hash=weights.index.digest,
            index_hash=weights.index.digest,
            model_size=weights.size,
            model_state=state,
            shards=weights.shards,
            **more,
        )
        with writing(store.engine) as connection:
            add_store(connection, STORE)
            return add_model(connection, info)


def tensors(seed: int) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {f"layer{number}": generator.random((1 << 18) + number, np.float32) for number in range(4)}  # 1 MiB each


# --- up ------------------------------------------------------------------------------------------------------------


def test_feedback_makes_a_copy_above_with_a_new_id_and_one_hop(middle: Level, root: Level) -> None:
    data = os.urandom(3 * BLOCK_BYTES)
    model = middle.put(
        data, model_kind="pt", model_description="mine", model_meta={"a": {"_type": "datetime", "val": "x"}}, round=4,
        metrics={"loss": 0.5}, num_examples=9,
    )  # fmt: skip
    copy = middle.api.feedback(STORE, model["model_id"])
    assert copy["model_id"] != model["model_id"]
    kept = (
        "model_hash", "model_size", "model_kind", "model_description", "model_meta", "tenant_id", "round", "metrics",
        "num_examples", "start_datetime", "end_datetime", "shards",
    )  # fmt: skip
    assert {name: copy[name] for name in kept} == {name: model[name] for name in kept}
    assert (copy["model_state"], copy["hop_count"], copy["model_store_ddc"]) == (ModelState.FEEDBACKED, 1, STORE)
    assert copy["origin"]["model_id"] == model["model_id"]
    assert root.models() == [copy]
    assert root.load(copy["model_id"]) == data
    assert middle.models() == [model]


def test_feedback_that_is_repeated_returns_the_same_copy(middle: Level, root: Level) -> None:
    model = middle.put()
    copy = middle.api.feedback(STORE, model["model_id"])
    assert middle.api.feedback(STORE, model["model_id"]) == copy
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda _: middle.api.feedback(STORE, model["model_id"]), range(8)))
    assert again == [copy] * 8
    assert root.models() == [copy]


def test_feedback_of_one_model_at_once_makes_one_copy(middle: Level, root: Level) -> None:
    model = middle.put(os.urandom(BLOCK_BYTES))
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: middle.api.feedback(STORE, model["model_id"]), range(4)))
    assert copies == [copies[0]] * 4
    assert root.models() == [copies[0]]


def test_feedback_of_shards_is_verified_and_can_be_read_above(middle: Level, root: Level) -> None:
    model = sharded(middle, tensors(1), ModelState.AGGREGATED, num_examples=3)
    copy = middle.api.feedback(STORE, model.model_id)
    assert (copy["model_hash"], copy["index_hash"], len(copy["shards"])) == (model.model_hash, model.index_hash, 4)
    assert root.load(copy["model_id"]) == middle.load(model.model_id)


def test_feedback_through_three_levels_counts_the_hops(root: Level, middle: Level, leaf: Level) -> None:
    model = leaf.put()
    first = leaf.api.feedback(STORE, model["model_id"])
    second = middle.api.feedback(STORE, first["model_id"])
    assert [model["hop_count"], first["hop_count"], second["hop_count"]] == [0, 1, 2]
    assert {model["tenant_id"], first["tenant_id"], second["tenant_id"]} == {"tenant-leaf"}
    assert root.models() == [second]


def test_parents_are_told_by_the_ids_that_they_have_there(middle: Level, root: Level) -> None:
    begun = root.aggregate()
    brought = middle.api.request_transfer(STORE)
    update = middle.put(parents=[brought["model_id"], "unknown"])
    copy = middle.api.feedback(STORE, update["model_id"])
    assert copy["parents"] == [begun["model_id"]]
    child = middle.put(parents=[update["model_id"]])
    assert middle.api.feedback(STORE, child["model_id"])["parents"] == [copy["model_id"]]
    root.aggregate(parents=[copy["model_id"], begun["model_id"]])
    down = middle.api.request_transfer(STORE)
    assert down["parents"] == [update["model_id"], brought["model_id"]]


def test_feedback_of_another_stores_or_no_model_is_not_found(middle: Level, root: Level) -> None:
    middle.api.initialize_model_store("ddc:other")
    other = middle.api.put_model("ddc:other", io.BytesIO(b"1"))
    for model_id in (other["model_id"], "none"):
        with pytest.raises(NotFound):
            middle.api.feedback(STORE, model_id)
    assert root.models() == []


def test_bytes_that_are_above_are_not_sent_again(start: Callable[..., Level]) -> None:
    above, edge = start("above"), start("edge")
    edge.feeds(above.server.url)
    data = os.urandom(5000)
    edge.api.feedback(STORE, edge.put(data)["model_id"])
    model = edge.put(data)
    (edge.blobs / model["model_hash"]).unlink()
    assert edge.api.feedback(STORE, model["model_id"])["model_hash"] == model["model_hash"]


def test_what_an_upstream_refuses_is_told_as_its_own(start: Callable[..., Level]) -> None:
    above, edge = start("above", max_model_gigabytes="0.000001"), start("edge")
    edge.feeds(above.server.url)
    with pytest.raises(TooLarge, match="The upstream 'default' at http"):
        edge.api.feedback(STORE, edge.put()["model_id"])
    above.api.delete_store(STORE)
    with pytest.raises(NotFound, match="The upstream 'default' at http"):
        edge.api.feedback(STORE, edge.put(b"1")["model_id"])


def test_a_model_whose_bytes_are_damaged_here_is_not_fed_back(start: Callable[..., Level]) -> None:
    above, edge = start("above"), start("edge")
    edge.feeds(above.server.url)
    model = edge.put()
    (edge.blobs / model["model_hash"]).chmod(0o644)
    (edge.blobs / model["model_hash"]).write_bytes(os.urandom(5000))
    with pytest.raises(BrokenUpload, match="were announced"):
        edge.api.feedback(STORE, model["model_id"])
    assert above.models() == []
    assert above.scratch() == list(above.blobs.iterdir()) == []


# --- down ----------------------------------------------------------------------------------------------------------


def test_request_transfer_brings_the_newest_aggregated_model_down(middle: Level, root: Level) -> None:
    root.aggregate()
    newest = root.aggregate(os.urandom(2 * BLOCK_BYTES), model_meta={"a": 1}, round=7)
    root.put()
    copy = middle.api.request_transfer(STORE)
    assert (copy["model_state"], copy["hop_count"], copy["round"]) == (ModelState.TRANSFERRED, 1, 7)
    assert (copy["model_hash"], copy["model_meta"]) == (newest["model_hash"], {"a": 1})
    assert copy["origin"]["model_id"] == newest["model_id"]
    assert middle.load(copy["model_id"]) == root.load(newest["model_id"])
    assert middle.api.request_transfer(STORE) == copy
    assert middle.models() == [copy]


def test_request_transfer_goes_down_three_levels(root: Level, middle: Level, leaf: Level) -> None:
    newest = root.aggregate()
    copies = [middle.api.request_transfer(STORE), leaf.api.request_transfer(STORE)]
    assert [copy["hop_count"] for copy in copies] == [1, 2]
    assert {copy["model_hash"] for copy in copies} == {newest["model_hash"]}


def test_request_transfer_of_shards_is_verified_and_can_be_read_here(middle: Level, root: Level) -> None:
    model = sharded(root, tensors(2), ModelState.AGGREGATED)
    copy = middle.api.request_transfer(STORE)
    assert (copy["model_hash"], copy["index_hash"]) == (model.model_hash, model.index_hash)
    assert middle.load(copy["model_id"]) == root.load(model.model_id)


def test_request_transfer_without_an_aggregated_model_is_not_found(middle: Level, root: Level) -> None:
    root.put()
    with pytest.raises(NotFound, match="no aggregated model"):
        middle.api.request_transfer(STORE)
    with pytest.raises(NotFound, match="no aggregated model"):
        middle.api.proxy_request_transfer_info(STORE)
    assert middle.models() == []


def test_nothing_is_moved_when_the_bytes_are_here(start: Callable[..., Level]) -> None:
    above, edge = start("above"), start("edge")
    edge.feeds(above.server.url)
    data = os.urandom(5000)
    edge.api.initialize_model_store("ddc:other")
    edge.api.put_model("ddc:other", io.BytesIO(data))
    model = above.aggregate(data)
    (above.blobs / model["model_hash"]).unlink()
    assert edge.load(edge.api.request_transfer(STORE)["model_id"]) == data


def test_a_transfer_that_failed_goes_on_with_the_blob_at_which_it_did(start: Callable[..., Level]) -> None:
    above, edge = start("above"), start("edge")
    edge.feeds(above.server.url)
    model = sharded(above, tensors(3), ModelState.AGGREGATED)
    first, *_, last = (above.blobs / shard.digest for shard in model.shards)
    last.rename(last.with_suffix(".away"))
    with pytest.raises(NotFound):
        edge.api.request_transfer(STORE)
    assert edge.models() == []
    assert edge.scratch() == []
    last.with_suffix(".away").rename(last)
    first.unlink()  # it is at the edge
    assert edge.api.request_transfer(STORE)["model_hash"] == model.model_hash


def test_a_model_larger_than_the_limit_is_not_brought_down(start: Callable[..., Level]) -> None:
    above, edge = start("above"), start("edge", max_model_gigabytes="0.000001")
    edge.feeds(above.server.url)
    above.aggregate()
    with pytest.raises(TooLarge):
        edge.api.request_transfer(STORE)
    assert edge.models() == []


def test_a_node_without_upstream_answers_for_itself(root: Level) -> None:
    model = root.aggregate()
    assert root.api.proxy_request_transfer_info(STORE) == model == root.api.proxy_request_transfer_info()
    with pytest.raises(NoUpstream):
        root.api.request_transfer(STORE)


# --- which upstream ------------------------------------------------------------------------------------------------


def test_of_several_upstreams_the_named_one_or_the_default_is_meant(start: Callable[..., Level]) -> None:
    first, second, edge = start("first"), start("second"), start("edge")
    edge.feeds(first.server.url, alias="one")
    kept = edge.feeds(second.server.url, alias="two", upstream_secret="hush")
    model = edge.put()
    with pytest.raises(NoUpstream, match="one, two"):
        edge.api.feedback(STORE, model["model_id"])
    edge.api.feedback(STORE, model["model_id"], "one")
    edge.api.feedback(STORE, model["model_id"], kept["id"])
    assert len(first.models()) == len(second.models()) == 1
    edge.api.update_upstream_info(kept["id"], alias="default")
    newest = second.aggregate()
    assert edge.api.proxy_request_transfer_info(STORE) == newest
    assert edge.api.request_transfer(STORE)["model_hash"] == newest["model_hash"]
    assert edge.api.delete_upstream_info(kept["id"]) == 1
    assert "hush" not in str(edge.api.list_upstream_info())


def test_an_upstream_may_be_another_model_store_of_the_same_node(start: Callable[..., Level]) -> None:
    node = start("node")
    node.api.initialize_model_store("ddc:all")
    node.feeds(node.server.url, upstream_model_store_ddc="ddc:all")
    copy = node.api.feedback(STORE, node.put()["model_id"])
    assert node.api.get_models("ddc:all") == [copy]


def test_with_keys_a_tenant_feeds_only_what_it_may(start: Callable[..., Level], tmp_path: Path) -> None:
    (tmp_path / "above").mkdir()
    with store_server(tmp_path / "above", http_access="keys") as above:
        with open_store(above.settings) as store, writing(store.engine) as connection:
            one, one_secret = add_tenant(connection, "one")
            two, two_secret = add_tenant(connection, "two")
        edge = start("edge")
        keys = {"upstream_apikey": one.api_key, "upstream_secret": one_secret}
        edge.feeds(above.url, alias="right", **keys)
        edge.feeds(above.url, alias="wrong", **(keys | {"upstream_secret": two_secret}))
        edge.feeds(above.url, alias="other", upstream_apikey=two.api_key, upstream_secret=two_secret)
        model = edge.put()
        with Api(above.url, api_key=one.api_key, secret=one_secret) as ours:
            ours.initialize_model_store(STORE)
            edge.api.feedback(STORE, model["model_id"], "right")
            with pytest.raises(AccessDenied):
                edge.api.feedback(STORE, model["model_id"], "wrong")
            with pytest.raises(NotFound):
                edge.api.feedback(STORE, model["model_id"], "other")
            assert len(ours.get_models(STORE)) == 1
        with Api(above.url, api_key=two.api_key, secret=two_secret) as theirs:
            theirs.initialize_model_store("ddc:theirs")
            answer = theirs.offer_model("ddc:theirs", {**model, "origin": {"node_id": "n", "model_id": "m"}})
            assert answer == {"missing": model["shards"]}  # to know a digest is not to have the bytes


def test_an_offer_of_other_bytes_than_its_hash_says_is_refused(root: Level) -> None:
    model = sharded(root, tensors(4), ModelState.CREATED)
    offered = {**root.api.get_model_info(STORE, model.model_id), "origin": {"node_id": "n", "model_id": "m"}}
    wrongs: tuple[dict[str, Any], ...] = (
        {"model_hash": "0" * 64},
        {"shards": offered["shards"][:2], "model_size": sum(each["size"] for each in offered["shards"][:2])},
        {"model_size": 1},
        {"model_hash": "x"},
        {"origin": None},
        {"origin": {"node_id": "", "model_id": "m"}},
        {"round": -1},
        {"shards": []},
        {"model_meta": []},
        {"model_state": 11},
        {"model_kind": "a\0"},
    )
    for wrong in wrongs:
        with pytest.raises(InvalidInput):
            root.api.offer_model(STORE, {**offered, **wrong})
    assert len(root.models()) == 1
    assert root.api.offer_model(STORE, offered)["model"]["model_hash"] == model.model_hash
    other = root.put()
    with pytest.raises(Conflict):
        root.api.offer_model(STORE, {**other, "origin": offered["origin"]})


# --- cuts ----------------------------------------------------------------------------------------------------------


def test_killing_the_upstream_in_a_feedback_leaves_nothing_and_it_can_be_repeated(start: Callable[..., Level]) -> None:
    (port,) = free_ports(1)
    above, edge = start("above", http_port=str(port)), start("edge", upstream_timeout_seconds="5")
    data = os.urandom(8 * BLOCK_BYTES)
    with HoldingLine(port, 4 * BLOCK_BYTES) as line, ThreadPoolExecutor(1) as pool:
        edge.feeds(line.url)
        model = edge.put(data)
        fed = pool.submit(edge.api.feedback, STORE, model["model_id"])
        assert line.held.wait(20)
        above.kill()
        line.release.set()
        with pytest.raises(UpstreamUnavailable):
            fed.result()
        again = start("above", http_port=str(port))
        assert again.models() == []
        assert list(again.blobs.iterdir()) == []
        copy = edge.api.feedback(STORE, model["model_id"])
    assert again.models() == [copy]
    assert again.load(copy["model_id"]) == data


def test_killing_the_edge_in_a_feedback_leaves_nothing_and_it_can_be_repeated(start: Callable[..., Level]) -> None:
    above, edge = start("above"), start("edge")
    data = os.urandom(32 * BLOCK_BYTES)  # more than lies in the sockets on the way
    with HoldingLine(above.server.port, 4 * BLOCK_BYTES) as line:
        edge.feeds(line.url)
        model = edge.put(data)
        waiting = threading.Thread(target=_ignoring, args=(edge.api.feedback, STORE, model["model_id"]))
        waiting.start()
        assert line.held.wait(20)
        edge.kill()
        line.release.set()
        wait_for(lambda: above.scratch() == [], seconds=20, what="the upstream forgets the half of the upload")
        assert above.models() == []
        assert list(above.blobs.iterdir()) == []
        again = start("edge")
        copy = again.api.feedback(STORE, model["model_id"])
        waiting.join()
    assert above.models() == [copy]
    assert above.load(copy["model_id"]) == data


def test_killing_the_upstream_in_a_transfer_leaves_nothing_and_it_can_be_repeated(
    start: Callable[..., Level], tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    above, edge = start("above", http_port=str(port)), start("edge", upstream_timeout_seconds="5")
    model = sharded(above, tensors(5), ModelState.AGGREGATED)
    with HoldingLine(port, 1200) as line, ThreadPoolExecutor(1) as pool:  # some requests come through
        edge.feeds(line.url)
        moved = pool.submit(edge.api.request_transfer, STORE)
        assert line.held.wait(20)
        above.kill()
        line.release.set()
        with pytest.raises(UpstreamUnavailable):
            moved.result()
        assert edge.models() == []
        assert edge.scratch() == []
        again = start("above", http_port=str(port))
        copy = edge.api.request_transfer(STORE)
    assert edge.load(copy["model_id"]) == again.load(model.model_id)


def _ignoring(call: Callable[..., Any], *arguments: Any) -> None:
    try:
        call(*arguments)
    except FedChordError:
        return


# --- circles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_way_up_that_leads_back_is_refused(start: Callable[..., Level], count: int) -> None:
    nodes = [start(f"node{number}") for number in range(count)]
    for number, node in enumerate(nodes):
        node.feeds(nodes[(number + 1) % count].server.url)
        node.aggregate()
    before = [node.models() for node in nodes]
    for node in nodes:
        with pytest.raises(UpstreamCycle):
            node.api.feedback(STORE, node.models()[0]["model_id"])
        with pytest.raises(UpstreamCycle):
            node.api.request_transfer(STORE)
        with pytest.raises(UpstreamCycle):
            node.api.create_party("round and round")
    assert [node.models() for node in nodes] == before
    assert [node.api.get_parties(here=True) for node in nodes] == [[]] * count
    assert nodes[0].api.proxy_request_transfer_info(STORE)["model_state"] == ModelState.AGGREGATED


def test_a_circle_further_up_is_refused_too(start: Callable[..., Level]) -> None:
    leaf, one, two = start("leaf"), start("one"), start("two")
    leaf.feeds(one.server.url)
    one.feeds(two.server.url)
    two.feeds(one.server.url)
    with pytest.raises(UpstreamCycle):
        leaf.api.feedback(STORE, leaf.put()["model_id"])
    assert one.models() == two.models() == []


# --- upstreams that answer badly -----------------------------------------------------------------------------------

PATH = result([{"node_id": "above", "model_store_ddc": STORE}])
DATA = b"the model"
BLOB = {"digest": blake3(DATA).hexdigest(), "size": len(DATA)}
MODEL = {
    "model_id": "there",
    "model_state": 30,
    "model_hash": BLOB["digest"],
    "model_size": BLOB["size"],
    "shards": [BLOB],
}
LOAD = "/jsonrpc/download/fl.load_model"
RUBBISH = {
    "html": say(b"<html>It works!</html>", kind="text/html"),
    "no json": say(b"{"),
    "nothing": say(b""),
    "a huge body": say(b"[" + b"0," * (6 << 20) + b"0]"),
    "deep json": say(b'{"jsonrpc": "2.0", "id": 1, "result": ' + b"[" * 100_000),
    "another type": result("text"),
    "wrong fields": result([{"node_id": 5, "model_id": [], "id": {}}]),
    "no fields": result([{}]),
    "an object": result({}),
    "null": result(None),
    "a hidden error": say_json({"jsonrpc": "2.0", "id": None, "error": {"code": -32603, "message": "oops"}}),
    "an unknown method": say_json({"jsonrpc": "2.0", "id": None, "error": {"code": -32601, "message": "no"}}),
    "a server error": say(b"Internal Server Error", kind="text/plain", status=500),
    "hang": hang,
    "trickle": trickle,
}


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Level]:
    """An edge that waits for no upstream longer than half a second."""
    with store_server(tmp_path_factory.mktemp("hasty"), upstream_timeout_seconds="0.5") as server:
        level = Level(server)
        yield level
        level.api.close()


@pytest.fixture
def edge(hasty: Level) -> Iterator[Level]:
    yield _emptied(hasty)
    for upstream in hasty.api.list_upstream_info(STORE):
        hasty.api.delete_upstream_info(upstream["id"])


@pytest.mark.parametrize("kind", RUBBISH)
def test_an_upstream_that_answers_rubbish_is_unavailable_and_nothing_is_stored(edge: Level, kind: str) -> None:
    bad = RUBBISH[kind]
    model = edge.put()
    calls: dict[str, Callable[[], Any]] = {
        "fl.get_path": lambda: edge.api.feedback(STORE, model["model_id"]),
        "fl.offer_model": lambda: edge.api.feedback(STORE, model["model_id"]),
        "fl.get_models": lambda: edge.api.request_transfer(STORE),
        "fl.get_parties": edge.api.get_parties,
        "fl.register_party": lambda: edge.api.create_party("mine"),
    }
    for method, call in calls.items():
        with odd_service({"fl.get_path": PATH, method: bad}) as url:
            upstream = edge.feeds(url)
            started = time.monotonic()
            with pytest.raises(UpstreamUnavailable):
                call()
            assert time.monotonic() - started < 5
            edge.api.delete_upstream_info(upstream["id"])
    assert edge.models() == [model]
    assert edge.api.get_parties(here=True) == []
    assert edge.scratch() == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_id": ""},
        {"model_id": "x" * 300},
        {"model_hash": "../../etc/passwd"},
        {"model_hash": "0" * 64},
        {"model_size": -1},
        {"model_size": 10},
        {"model_size": True},
        {"model_state": 11},
        {"shards": []},
        {"shards": [{"digest": "0" * 63, "size": 9}]},
        {"shards": [{"digest": BLOB["digest"], "size": "9"}]},
        {"model_meta": "text"},
        {"model_meta": {"a": "\0"}},
        {"model_meta": {"deep": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}},
        {"hop_count": 10**9},
        {"round": 2**40},
        {"start_datetime": "yesterday"},
        {"location": [1, 2, 3]},
        {"parents": [f"p{number}" for number in range(10_001)]},
    ],
    ids=lambda wrong: str(wrong)[:80],
)
def test_a_model_info_that_makes_no_sense_is_not_taken(edge: Level, wrong: dict[str, Any]) -> None:
    answers = {"fl.get_path": PATH, "fl.get_models": result([{**MODEL, **wrong}]), LOAD: _load(DATA)}
    with odd_service(answers) as url:
        edge.feeds(url)
        with pytest.raises(UpstreamUnavailable):
            edge.api.request_transfer(STORE)
    assert edge.models() == []
    assert edge.scratch() == []


@pytest.mark.parametrize("more", [float("nan"), float("inf"), "half a character: \ud800", [[float("nan")]]], ids=ascii)
def test_what_json_cannot_hold_is_not_told_on(edge: Level, more: Any) -> None:
    model = edge.put(b"a model")
    kept = {**MODEL, "model_state": 20, "model_hash": model["model_hash"], "model_size": 7, "shards": model["shards"]}
    answers = {
        "fl.get_path": PATH,
        "fl.get_models": result([{**MODEL, "model_meta": {"more": more}}]),
        "fl.offer_model": result({"model": {**kept, "more": more}}),
    }
    with odd_service(answers) as url:
        edge.feeds(url)
        with pytest.raises(UpstreamUnavailable, match="JSON"):
            edge.api.proxy_request_transfer_info(STORE)
        with pytest.raises(UpstreamUnavailable, match="JSON"):
            edge.api.feedback(STORE, model["model_id"])


def test_a_blob_that_comes_too_slowly_is_given_up(edge: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(handler: Any, request: Any) -> None:
        handler.send_response(200)
        handler.send_header("ETag", f'"{blob.digest}"')
        handler.send_header("Content-Length", str(blob.size))
        handler.end_headers()
        with contextlib.suppress(ConnectionError):
            while not handler.server.ended.wait(0.05):
                handler.wfile.write(b"a")

    blob = Blob(digest="0" * 64, size=1_000_000)
    monkeypatch.setattr(neighbour, "SLOWEST_BYTES_PER_SECOND", 1e9)
    with odd_service({LOAD: slowly}) as url, open_store(edge.server.settings) as store:
        edge.feeds(url)
        with reading(store.engine) as connection:
            upstream = choose_upstream(connection, store.box, store.settings, STORE)
        began = time.monotonic()
        with Neighbour(store, upstream) as above, pytest.raises(UpstreamUnavailable, match="within"):
            for _ in above.fetch("m", blob):
                pass
        assert time.monotonic() - began < 5


def test_an_offer_of_ten_thousand_parents_is_answered_at_once(root: Level) -> None:
    own = root.put()["model_id"]
    origin = {"node_id": "n", "model_id": "m"}
    parents = [*(f"p{number}" for number in range(9_999)), own]
    began = time.monotonic()
    missing = root.api.offer_model(STORE, {**MODEL, "origin": origin, "parents": parents})
    assert time.monotonic() - began < 1
    assert missing == {"missing": [BLOB]}


@pytest.mark.parametrize(
    "load",
    [
        lambda data, digest: _load(b"other bytes, with their digest"),
        lambda data, digest: _load(b"no model!", digest=digest),
        lambda data, digest: say(data, kind="application/octet-stream"),
        lambda data, digest: say(data, headers={"ETag": f'"{digest}"', "Content-Length": "1000000"}),
        lambda data, digest: say(b"<html>", kind="text/html", status=503),
        lambda data, digest: hang,
    ],
    ids=["other bytes", "a wrong digest", "no digest", "less than it says", "a busy proxy", "nothing"],
)
def test_bytes_that_are_not_the_models_are_not_stored(edge: Level, load: Callable[[bytes, str], Any]) -> None:
    data = os.urandom(9)
    digest = blake3(data).hexdigest()
    model = {**MODEL, "model_hash": digest, "shards": [{"digest": digest, "size": 9}]}
    answers = {"fl.get_path": PATH, "fl.get_models": result([model]), LOAD: load(data, digest)}
    with odd_service(answers) as url:
        edge.feeds(url)
        with pytest.raises(UpstreamUnavailable):
            edge.api.request_transfer(STORE)
    assert edge.models() == []
    assert edge.scratch() == []
    assert not (edge.blobs / digest).exists()


def test_the_same_upstream_that_answers_well_is_used(edge: Level) -> None:
    answers = {"fl.get_path": PATH, "fl.get_models": result([MODEL]), LOAD: _load(DATA)}
    with odd_service(answers) as url:
        edge.feeds(url)
        assert edge.load(edge.api.request_transfer(STORE)["model_id"]) == DATA


@pytest.mark.parametrize(
    "answer",
    [
        {"missing": [{"digest": "0" * 64, "size": 1}]},
        {"missing": []},
        {"model": {**MODEL, "model_state": 20}},
        {"model": {"model_id": "1"}},
    ],
    ids=["another blob", "nothing missing", "another model", "half a model"],
)
def test_an_offer_that_is_answered_with_something_else_is_not_followed(edge: Level, answer: Any) -> None:
    with odd_service({"fl.get_path": PATH, "fl.offer_model": result(answer)}) as url:
        edge.feeds(url)
        with pytest.raises(UpstreamUnavailable):
            edge.api.feedback(STORE, edge.put()["model_id"])


def test_an_upstream_that_keeps_nothing_is_not_sent_to_for_ever(edge: Level) -> None:
    model = edge.put()
    sent = say_json({"jsonrpc": "2.0", "id": None, "result": model["shards"][0]})
    answers = {
        "fl.get_path": PATH,
        "fl.offer_model": result({"missing": model["shards"]}),
        "/jsonrpc/upload/fl.put_blob": sent,
    }
    with odd_service(answers) as url:
        edge.feeds(url)
        with pytest.raises(UpstreamUnavailable, match="does not keep"):
            edge.api.feedback(STORE, model["model_id"])


def test_a_node_above_that_hangs_does_not_keep_a_model_from_the_next_one(start: Callable[..., Level]) -> None:
    with odd_service({"fl.get_path": hang}) as url:
        middle, leaf = start("middle", upstream_timeout_seconds="2"), start("leaf", upstream_timeout_seconds="2")
        middle.feeds(url)
        leaf.feeds(middle.server.url)
        assert leaf.api.feedback(STORE, leaf.put()["model_id"])["hop_count"] == 1


def _load(data: bytes, *, digest: str | None = None) -> Any:
    found = blake3(data).hexdigest() if digest is None else digest
    return say(data, kind="application/octet-stream", headers={"ETag": f'"{found}"'})


# --- parties -------------------------------------------------------------------------------------------------------


def test_a_party_is_registered_at_every_level_with_its_hops(root: Level, middle: Level, leaf: Level) -> None:
    party = leaf.api.create_party("my experiment 1")
    assert (party["hop_count"], party["description"]) == (1, "my experiment 1")
    assert (party["tenant_id"], party["tenant_name"]) == ("tenant-leaf", "The leaf")
    assert leaf.api.get_parties() == [party]
    at = {level: level.api.get_parties(here=True) for level in (leaf, middle, root)}
    assert [[each["hop_count"] for each in found] for found in at.values()] == [[0], [1], [2]]
    assert {each["id"] for found in at.values() for each in found} == {party["id"]}
    assert root.api.get_parties() == at[root]

    own = middle.api.create_party("the middle's own")
    assert own["hop_count"] == 1
    assert [each["id"] for each in root.api.get_parties()] == [party["id"], own["id"]]
    assert leaf.api.delete_party(party["id"]) == 1
    assert [level.api.get_parties(here=True) for level in (leaf, root)] == [[], [own]]
    assert middle.api.delete_party(own["id"]) == 1
    assert root.api.get_parties() == []


def test_a_node_without_upstream_registers_a_party_at_itself(root: Level) -> None:
    party = root.api.create_party()
    assert (party["hop_count"], party["description"], root.api.get_parties()) == (0, "", [party])
    assert root.api.delete_party(party["id"]) == 1
    assert root.api.delete_party(party["id"]) == 0


def test_to_register_a_party_again_changes_nothing_but_its_hops(root: Level) -> None:
    party = root.api.register_party("p1", "t1", "Tenant", "text", 3)
    again = root.api.register_party("p1", "t1", "Tenant", "text", 4)
    assert (again["hop_count"], again["created_at"]) == (4, party["created_at"])
    assert len(root.api.get_parties()) == 1
    with pytest.raises(Conflict):
        root.api.register_party("p1", "t2", "Another", "text", 1)
    for wrong in ({"id": ""}, {"id": "a\0"}, {"hop_count": -1}, {"tenant_name": "x" * 300}, {"description": "\0"}):
        with pytest.raises(InvalidInput):
            root.api.register_party(**({"id": "p2", "tenant_id": "", "tenant_name": ""} | wrong))


def test_a_party_is_registered_nowhere_while_a_node_above_is_gone(start: Callable[..., Level]) -> None:
    root = start("root")
    middle, leaf = start("middle"), start("leaf")
    middle.feeds(root.server.url)
    leaf.feeds(middle.server.url)
    root.kill()
    with pytest.raises(UpstreamUnavailable):
        leaf.api.create_party("mine")
    assert leaf.api.get_parties(here=True) == middle.api.get_parties(here=True) == []


def test_with_keys_a_tenant_deletes_only_the_parties_that_it_registered(tmp_path: Path) -> None:
    with store_server(tmp_path, http_access="keys") as server:
        with open_store(server.settings) as store, writing(store.engine) as connection:
            one, one_secret = add_tenant(connection, "one")
            two, two_secret = add_tenant(connection, "two")
        with (
            Api(server.url, api_key=one.api_key, secret=one_secret) as ours,
            Api(server.url, api_key=two.api_key, secret=two_secret) as theirs,
        ):
            party = ours.register_party("p1", "t1", "Tenant")
            assert theirs.delete_party("p1") == theirs.unregister_party("p1") == 0
            with pytest.raises(Conflict):
                theirs.register_party("p1", "t1", "Tenant")
            assert theirs.get_parties() == [party]
            assert ours.delete_party("p1") == 1
