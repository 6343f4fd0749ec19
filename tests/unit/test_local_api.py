"""Facts about the local API that take more than one store, model or tenant to see."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import (
    AccessDenied,
    Conflict,
    FedChordError,
    InvalidInput,
    NotFound,
    NoUpstream,
    UpstreamUnavailable,
)
from common.settings import Settings
from store.database import writing
from store.local import LocalApi
from store.model_stores import grant
from store.opening import OpenStore, open_store
from store.tenants import add_tenant, authenticate, operator
from store.weights import write_weights

DDC = "ddc:digits"
URL = "https://hub.example"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[OpenStore]:
    settings = Settings(
        database_url=f"sqlite:///{tmp_path}/records.db",
        blob_folder=tmp_path / "blobs",
        store_key_file=tmp_path / "store.key",
        tenant_id="ours",
    )
    with open_store(settings) as store:
        yield store


@pytest.fixture
def api(store: OpenStore) -> LocalApi:
    api = LocalApi(store, operator(store.settings))
    api.initialize_model_store(DDC)
    return api


@pytest.fixture
def tenant(store: OpenStore) -> LocalApi:
    with writing(store.engine) as connection:
        made, secret = add_tenant(connection, "tenant")
        return LocalApi(store, authenticate(connection, made.api_key, secret))


def test_the_version_is_that_of_the_installation(api: LocalApi) -> None:
    assert api.get_server_version() == version("fedchord")


def test_a_model_is_put_by_its_path_and_the_file_stays(api: LocalApi, tmp_path: Path) -> None:
    path = tmp_path / "model_1"
    path.write_bytes(b"any bytes")
    for file in (path, str(path), path.open("rb"), BytesIO(b"any bytes")):
        info = api.put_model(DDC, file, model_description="test model", model_meta={"additonal": "additional data"})
        assert b"".join(api.load_model(DDC, info["model_id"])) == b"any bytes"
        assert (info["model_state"], info["tenant_id"]) == (10, "ours")
        if not isinstance(file, str | Path):
            file.close()
    assert path.read_bytes() == b"any bytes"
    assert api.put_aggregated_model(DDC, path)["model_state"] == 30


def test_what_is_no_file_is_refused(api: LocalApi, tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path, StringIO("text"), "a\0b"):
        with pytest.raises((InvalidInput, NotFound)):
            api.put_model(DDC, file)  # type: ignore[arg-type]  # a file of text is what is tried
    assert api.get_models(DDC) == []


def test_only_a_safetensors_model_has_tensors(api: LocalApi, tmp_path: Path) -> None:
    ((path, blob),) = write_weights(tmp_path, {"w": np.zeros((2, 3), np.float32)}, 1000)
    info = api.put_model(DDC, path)
    assert "tensors" not in info
    found = api.get_model_info(DDC, info["model_id"])
    assert found == {**info, "tensors": {"w": {"dtype": "F32", "shape": [2, 3]}}}
    assert found["shards"] == [{"digest": blob.digest, "size": blob.size}]
    opaque = api.put_model(DDC, BytesIO(b"opaque"))
    assert api.get_model_info(DDC, opaque["model_id"]) == opaque
    api.store.blobs.delete(info["index_hash"])  # what is recorded is right all the same
    assert api.get_model_info(DDC, info["model_id"]) == info


def test_a_lineage_shows_no_more_than_the_caller_may_read(api: LocalApi, tenant: LocalApi) -> None:
    secret = api.put_model(DDC, BytesIO(b"a"), model_kind="secret")["model_id"]
    tenant.initialize_model_store("ddc:theirs")
    child = tenant.put_aggregated_model("ddc:theirs", BytesIO(b"b"), round=2, parents=[secret, "deleted"])["model_id"]
    grandchild = tenant.put_aggregated_model("ddc:theirs", BytesIO(b"c"), parents=[child])["model_id"]

    def shown(asked: LocalApi) -> list[tuple[Any, ...]]:
        found = asked.get_lineage("ddc:theirs", grandchild)
        return [(each["model_id"], each["model_kind"], each["round"], each["parents"]) for each in found]

    rest = [(grandchild, "", 0, [child]), (child, "", 2, [secret, "deleted"])]
    assert shown(tenant) == [*rest, (secret, None, None, []), ("deleted", None, None, [])]
    assert shown(api) == [*rest, (secret, "secret", 0, []), ("deleted", None, None, [])]


def test_a_lineage_does_not_go_on_behind_what_the_caller_may_not_read(api: LocalApi, tenant: LocalApi) -> None:
    first = api.put_model(DDC, BytesIO(b"a"))["model_id"]
    second = api.put_model(DDC, BytesIO(b"b"), parents=[first])["model_id"]
    tenant.initialize_model_store("ddc:theirs")
    child = tenant.put_model("ddc:theirs", BytesIO(b"c"), parents=[second])["model_id"]
    found = tenant.get_lineage("ddc:theirs", child)
    assert [(each["model_id"], each["parents"]) for each in found] == [(child, [second]), (second, [])]


def test_an_upstream_of_a_store_that_the_caller_cannot_see_is_as_if_it_were_not_there(
    api: LocalApi, tenant: LocalApi
) -> None:
    made = api.create_upstream_info(DDC, URL)
    for call in (tenant.get_upstream_info, tenant.update_upstream_info, tenant.delete_upstream_info):
        with pytest.raises(NotFound) as told:
            call(made["id"])
        with pytest.raises(NotFound) as missing:
            call("missing")
        assert str(told.value) == str(missing.value).replace("missing", made["id"])
    assert tenant.delete_upstream_info(made["id"], raise_if_no_exists=False) == 0
    assert api.list_upstream_info() == [made]


def test_a_tenants_own_store_does_not_feed_what_the_nodes_key_opens(api: LocalApi, tenant: LocalApi) -> None:
    settings = api.store.settings.model_copy(update={"upstream_url": "http://127.0.0.1:9"})
    store = replace(api.store, settings=settings)
    theirs = LocalApi(store, tenant.caller)
    theirs.initialize_model_store("ddc:secret-above")
    model_id = theirs.put_model("ddc:secret-above", BytesIO(b"a"))["model_id"]
    with pytest.raises(NoUpstream):
        theirs.request_transfer("ddc:secret-above")
    with pytest.raises(NoUpstream):
        theirs.feedback("ddc:secret-above", model_id)
    with pytest.raises(NotFound, match="no upstream"):
        theirs.proxy_request_transfer_info("ddc:secret-above")
    assert len(theirs.get_path("ddc:secret-above")) == 1
    with pytest.raises(UpstreamUnavailable):
        LocalApi(store, api.caller).request_transfer(DDC)


def test_upstreams_are_the_owners_business_and_their_secret_is_nobodys(api: LocalApi, tenant: LocalApi) -> None:
    made = api.create_upstream_info(DDC, URL + "/", "key", "s3cret", "ddc:hub", alias="hub", description="d")
    assert {name: made[name] for name in made if name not in ("id", "created_at", "updated_at")} == {
        "model_store_ddc": DDC,
        "upstream_endpoint": URL,
        "upstream_apikey": "key",
        "upstream_model_store_ddc": "ddc:hub",
        "alias": "hub",
        "description": "d",
        "enabled": True,
    }
    with writing(api.store.engine) as connection:
        grant(connection, DDC, tenant.caller.tenant_id, may_write=True)
    refused: list[Callable[[], object]] = [
        lambda: tenant.create_upstream_info(DDC, URL),
        lambda: tenant.update_upstream_info(made["id"], enabled=False),
        lambda: tenant.delete_upstream_info(made["id"]),
        lambda: tenant.get_upstream_info(made["id"]),
        lambda: tenant.list_upstream_info(DDC),
    ]
    for call in refused:
        with pytest.raises(AccessDenied, match="belongs to another tenant"):
            call()
    assert tenant.list_upstream_info() == []
    tenant.initialize_model_store("ddc:theirs")
    with pytest.raises(AccessDenied, match="Only an operator says where"):
        tenant.create_upstream_info("ddc:theirs", URL)
    theirs = api.create_upstream_info("ddc:theirs", URL)
    with pytest.raises(AccessDenied, match="Only an operator says where"):
        tenant.update_upstream_info(theirs["id"], upstream_endpoint="http://127.0.0.1:1")
    assert tenant.list_upstream_info() == [theirs] == tenant.list_upstream_info("ddc:theirs")
    assert api.list_upstream_info() == [made, theirs]
    changed = api.update_upstream_info(made["id"], description="", upstream_secret="another")
    assert (
        changed == {**made, "description": "", "updated_at": changed["updated_at"]} == api.get_upstream_info(made["id"])
    )
    assert "s3cret" not in str(changed)
    assert [api.delete_upstream_info(made["id"]), api.delete_upstream_info(made["id"], False)] == [1, 0]
    with pytest.raises(NotFound):
        api.delete_upstream_info(made["id"])


def test_a_name_that_another_has_is_told_and_not_taken(api: LocalApi, tenant: LocalApi) -> None:
    for caller, name in ((tenant, DDC), (api, tenant.initialize_model_store("ddc:theirs")["model_store_ddc"])):
        with pytest.raises(Conflict, match="of another tenant"):
            caller.initialize_model_store(name)


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "x" * 10_000, "../../etc", "'; DROP TABLE jobs; --"])
def test_text_that_no_database_takes_does_no_harm(api: LocalApi, text: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: api.get_model_info(DDC, text),
        lambda: api.get_lineage(DDC, text),
        lambda: api.prepare_download(DDC, text),
        lambda: api.delete_model(DDC, text),
        lambda: api.get_model_info_latest(DDC, text),
        lambda: api.get_upstream_info(text),
        lambda: api.delete_upstream_info(text),
        lambda: api.exists_store(text),
        lambda: api.initialize_model_store(text),
        lambda: api.get_models(DDC, {text: 1}),
        lambda: api.get_models(DDC, order=text),
        lambda: api.feedback(DDC, "x", text),
        lambda: api.request_transfer(DDC, text),
    ]
    for call in calls:
        with pytest.raises(FedChordError) as raised:
            call()
        assert isinstance(raised.value, InvalidInput | NotFound)
        raised.value.message.encode()  # it can be sent
        assert len(raised.value.message) < 1000
    assert not api.exists_model(DDC, text)


@pytest.mark.parametrize("value", [-1, 2**31, 2**63, 10**30, True, 1.5, "1"])
def test_a_number_out_of_its_range_is_refused(api: LocalApi, value: Any) -> None:
    for call in (
        lambda: api.get_model_info_latest(DDC, round=value),
        lambda: api.get_latest_feedbacked_models(DDC, value),
        lambda: api.get_models(DDC, {"=": ["round", value]}) if value != -1 else api.get_models(DDC, offset=-1),
    ):
        with pytest.raises(InvalidInput, match="is a whole number"):
            call()
