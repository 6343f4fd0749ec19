"""Whatever is asked of the model store in whatever order, it answers as a simple model in memory does."""

import operator as comparison
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.errors import AccessDenied, Conflict, FedChordError, NotFound
from common.settings import Settings
from store.blobs import hash_bytes
from store.database import writing
from store.local import LocalApi
from store.model_stores import grant, revoke
from store.models import ModelState
from store.opening import OpenStore, open_store
from store.tenants import Caller, add_tenant, operator

NAMES = ("ddc:one", "ddc:two", "ddc:three")  # the operator's, tenant a's, and one that comes and goes
KINDS = ("", "update", "global")
TENANTS = ("a", "b")
Result = TypeVar("Result")

stores = st.sampled_from(NAMES)
full_stores = st.sampled_from((*NAMES, *(3 * ("ddc:two",))))
rarely_kept = st.sampled_from((*NAMES, *(5 * ("ddc:three",))))  # what is deleted all the time never holds much
callers = st.sampled_from(["operator", *TENANTS])
kinds = st.sampled_from(KINDS)
rounds = st.integers(0, 2)
comparisons = st.sampled_from(
    [("=", comparison.eq), ("!=", comparison.ne), ("<", comparison.lt), (">=", comparison.ge)]
)
Put = tuple[bytes, str, int, int]  # data, kind, state, round
some_puts: st.SearchStrategy[list[Put]] = st.lists(
    st.tuples(st.binary(max_size=9), kinds, st.sampled_from(ModelState).map(int), rounds), min_size=1, max_size=6
)
picks = st.integers(0, 7)  # which of the models, counted from the newest


@dataclass
class Kept:
    """A model as the model in memory knows it."""

    model_id: str
    data: bytes
    kind: str
    state: int
    round: int
    tenant: str  # "" for the operator


@dataclass
class Ddc:
    """A model store as the model in memory knows it."""

    owner: str  # "" for the operator
    grants: dict[str, bool] = field(default_factory=dict)  # whether a tenant may write
    models: list[Kept] = field(default_factory=list)  # in the order in which they were put


@cache
def empty_node() -> Path:
    """Make one node with two tenants, of which every example gets a copy: to make the tables takes longest."""
    folder = Path(tempfile.mkdtemp(prefix="fedchord-state-"))
    with open_store(settings_of(folder)) as store, writing(store.engine) as connection:
        for name in TENANTS:
            (folder / name).write_text(add_tenant(connection, name)[0].tenant_id)
    return folder


def settings_of(folder: Path) -> Settings:
    """Return the settings of a node in the folder."""
    return Settings(
        database_url=f"sqlite:///{folder}/records.db", blob_folder=folder / "blobs", store_key_file=folder / "store.key"
    )


class StoreMachine(RuleBasedStateMachine):
    """Ask the model store and the model in memory the same."""

    @initialize(may_write=st.booleans(), puts=some_puts)
    def start(self, may_write: bool, puts: list[Put]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fedchord-state-"))
        shutil.copytree(empty_node(), self.folder, dirs_exist_ok=True)
        self.store: OpenStore = open_store(settings_of(self.folder))
        self.ids = {name: (self.folder / name).read_text() for name in TENANTS} | {"operator": ""}
        who = {name: Caller(tenant_id=self.ids[name], tenant_name=name, is_operator=False) for name in TENANTS}
        who["operator"] = operator(self.store.settings)
        self.apis = {name: LocalApi(self.store, caller) for name, caller in who.items()}
        self.ddcs: dict[str, Ddc] = {}
        for caller, name in (("operator", NAMES[0]), ("a", NAMES[1])):  # else most calls would find no store
            self.create_store(caller, name)
        self.open_to(NAMES[1], "b", may_write)
        for caller in ("a", "operator", "b"):
            self.put(caller, NAMES[1], puts)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)

    # --- model stores

    @rule(caller=callers, name=stores)
    def create_store(self, caller: str, name: str) -> None:
        known = self.ddcs.get(name)
        refused = Conflict if known is not None and known.owner != self.ids[caller] else None
        made = self.ask(refused, lambda: self.apis[caller].initialize_model_store(name))
        if made is not None:
            assert (made["model_store_ddc"], made["tenant_id"]) == (name, self.ids[caller])
            self.ddcs.setdefault(name, Ddc(owner=self.ids[caller]))

    @rule(caller=callers, name=rarely_kept, must_exist=st.booleans())
    def delete_store(self, caller: str, name: str, must_exist: bool) -> None:
        refused = self.refusal(caller, name, write=False)
        if refused is None and caller != "operator" and self.ddcs[name].owner != self.ids[caller]:
            refused = AccessDenied
        api = self.apis[caller]
        if refused is NotFound and not must_exist:
            assert api.delete_store(name, False) == 0
        elif self.ask(refused, lambda: api.delete_store(name, must_exist)) is not None:
            del self.ddcs[name]

    @rule(name=full_stores, tenant=st.sampled_from(TENANTS), may_write=st.booleans())
    def open_to(self, name: str, tenant: str, may_write: bool) -> None:
        if name in self.ddcs:
            with writing(self.store.engine) as connection:
                grant(connection, name, self.ids[tenant], may_write=may_write)
            self.ddcs[name].grants[tenant] = may_write

    @rule(name=full_stores, tenant=st.sampled_from(TENANTS))
    def close_to(self, name: str, tenant: str) -> None:
        if name in self.ddcs:
            with writing(self.store.engine) as connection:
                closed = revoke(connection, name, self.ids[tenant])
            assert closed == (self.ddcs[name].grants.pop(tenant, None) is not None)

    @rule(caller=callers)
    def list_stores(self, caller: str) -> None:
        found = [store["model_store_ddc"] for store in self.apis[caller].get_stores()]
        assert found == sorted(name for name in self.ddcs if self.refusal(caller, name, write=False) is None)
        assert all(self.apis[caller].exists_store(name) == (name in found) for name in NAMES)

    # --- models

    @rule(caller=callers, name=full_stores, puts=some_puts)
    def put(self, caller: str, name: str, puts: list[Put]) -> None:
        api = self.apis[caller]
        for data, kind, state, round_ in puts:
            put = api.put_aggregated_model if state == ModelState.AGGREGATED else api.put_model
            more: dict[str, Any] = {} if put == api.put_aggregated_model else {"model_state": state}
            made = self.ask(
                self.refusal(caller, name, write=True),
                lambda: put(name, BytesIO(data), kind, model_meta={"n": len(data)}, round=round_, **more),  # noqa: B023
            )
            if made is not None:
                kept = Kept(
                    model_id=made["model_id"], data=data, kind=kind, state=state, round=round_, tenant=self.ids[caller]
                )
                self.check(made, name, kept)
                self.ddcs[name].models.append(kept)

    @rule(caller=callers, name=stores, pick=picks, elsewhere=stores)
    def look_at(self, caller: str, name: str, pick: int, elsewhere: str) -> None:
        kept = self.picked(name, pick)
        model_id = "no-such-model" if kept is None else kept.model_id
        api = self.apis[caller]
        refused = self.refusal(caller, name, write=False)
        exists = self.ask(refused, lambda: api.exists_model(name, model_id))
        assert exists == (None if refused else kept is not None)
        refused = refused or (NotFound if kept is None else None)
        info = self.ask(refused, lambda: api.get_model_info(name, model_id))
        data = self.ask(refused, lambda: b"".join(api.load_model(name, model_id)))
        if kept is not None and info is not None:
            self.check(info, name, kept)
            assert data == kept.data
        if elsewhere != name:  # a model of another store is none of this one
            refused = self.refusal(caller, elsewhere, write=False) or NotFound
            self.ask(refused, lambda: api.get_model_info(elsewhere, model_id))

    @rule(caller=callers, name=stores, pick=picks, must_exist=st.booleans())
    def delete(self, caller: str, name: str, pick: int, must_exist: bool) -> None:
        kept = self.picked(name, pick)
        model_id = "no-such-model" if kept is None else kept.model_id
        refused = self.refusal(caller, name, write=True)
        if refused is None and kept is None and must_exist:
            refused = NotFound
        deleted = self.ask(refused, lambda: self.apis[caller].delete_model(name, model_id, must_exist))
        assert deleted == (None if refused else int(kept is not None))
        if deleted:
            self.ddcs[name].models = [each for each in self.ddcs[name].models if each is not kept]

    @rule(caller=callers, name=rarely_kept)
    def delete_all(self, caller: str, name: str) -> None:
        count = self.ask(self.refusal(caller, name, write=True), lambda: self.apis[caller].delete_all_model(name))
        if count is not None:
            assert count == len(self.ddcs[name].models)
            self.ddcs[name].models = []

    @rule(
        caller=callers,
        name=full_stores,
        about=st.sampled_from(["state", "round"]),
        sign=comparisons,
        value=st.sampled_from([0, 1, 2, 10, 20, 30, 40]),
        kind=kinds | st.none(),
        negated=st.booleans(),
        offset=st.integers(0, 3),
        limit=st.integers(0, 4) | st.none(),
        order=st.sampled_from([None, "-created_at", "created_at", "-round", ["model_kind", "-round"]]),
    )
    def list_models(
        self,
        caller: str,
        name: str,
        about: str,
        sign: tuple[str, Callable[[int, int], bool]],
        value: int,
        kind: str | None,
        negated: bool,
        offset: int,
        limit: int | None,
        order: Any,
    ) -> None:
        wire, holds = sign
        conds: dict[str, Any] = {wire: ["model_state" if about == "state" else "round", value]}
        conds = {"not": conds} if negated else conds
        if kind is not None:
            conds = {"and": [conds, {"in": ["model_kind", [kind]]}]}
        refused = self.refusal(caller, name, write=False)
        found = self.ask(refused, lambda: self.apis[caller].get_models(name, conds, offset, limit, order))
        if found is None:
            return
        expected = [
            kept
            for kept in self.ddcs[name].models
            if holds(getattr(kept, about), value) != negated and kind in (None, kept.kind)
        ]
        self.check_all(found, name, in_order(expected, order)[offset:][:limit])

    @rule(caller=callers, name=full_stores, kind=kinds | st.none(), round_=rounds | st.none())
    def latest(self, caller: str, name: str, kind: str | None, round_: int | None) -> None:
        api = self.apis[caller]
        for state, ask in (
            (None, lambda: api.get_model_info_latest(name, kind, round_)),
            (ModelState.AGGREGATED, lambda: api.get_latest_aggregated_model(name, round_, kind)),
            (ModelState.TRANSFERRED, lambda: api.get_latest_transferred_model(name, round_, kind)),
        ):
            refused = self.refusal(caller, name, write=False)
            such = [
                kept
                for kept in (self.ddcs[name].models if name in self.ddcs else ())
                if state in (None, kept.state) and kind in (None, kept.kind) and round_ in (None, kept.round)
            ]
            found = self.ask(refused or (None if such else NotFound), ask)
            if found is not None:
                self.check(found, name, such[-1])

    @rule(caller=callers, name=full_stores, round_=rounds | st.none())
    def feedbacked(self, caller: str, name: str, round_: int | None) -> None:
        refused = self.refusal(caller, name, write=False)
        found = self.ask(refused, lambda: self.apis[caller].get_latest_feedbacked_models(name, round_))
        if found is None:
            return
        such = [kept for kept in self.ddcs[name].models if kept.state == ModelState.FEEDBACKED]
        wanted = max((kept.round for kept in such), default=None) if round_ is None else round_
        newest = {kept.tenant: kept for kept in such if kept.round == wanted}  # the last of each tenant stays
        self.check_all(found, name, [kept for kept in reversed(such) if newest.get(kept.tenant) is kept])

    @invariant()
    def nothing_unfinished_is_left(self) -> None:
        if hasattr(self, "store"):
            assert list(self.store.blobs.scratch().iterdir()) == []

    # --- the model in memory

    def refusal(self, caller: str, name: str, *, write: bool) -> type[FedChordError] | None:
        """Say how a call on the model store is refused to the caller, if it is."""
        ddc = self.ddcs.get(name)
        if ddc is None:
            return NotFound
        if caller == "operator" or ddc.owner == self.ids[caller]:
            return None
        if caller not in ddc.grants:
            return NotFound
        return AccessDenied if write and not ddc.grants[caller] else None

    def picked(self, name: str, pick: int) -> Kept | None:
        models = self.ddcs[name].models if name in self.ddcs else []
        return models[-1 - pick] if pick < len(models) else None

    def ask(self, refused: type[FedChordError] | None, call: Callable[[], Result]) -> Result | None:
        """Return the result; None when the call is refused in the way that is expected."""
        if refused is None:
            return call()
        with pytest.raises(FedChordError) as raised:
            call()
        assert type(raised.value) is refused
        return None

    def check(self, info: dict[str, Any], name: str, kept: Kept) -> None:
        assert {
            "model_id": kept.model_id,
            "model_store_ddc": name,
            "tenant_id": kept.tenant,
            "model_kind": kept.kind,
            "model_state": kept.state,
            "round": kept.round,
            "model_hash": hash_bytes(kept.data).digest,
            "model_size": len(kept.data),
            "model_meta": {"n": len(kept.data)},
            "hop_count": 0,
            "origin": None,
        }.items() <= info.items()

    def check_all(self, found: list[dict[str, Any]], name: str, expected: Iterable[Kept]) -> None:
        for info, kept in zip(found, expected, strict=True):
            self.check(info, name, kept)


def in_order(models: list[Kept], order: Any) -> list[Kept]:
    """Sort models, which are in the order in which they were put, as the named order says."""
    if order in (None, "-created_at"):
        return models[::-1]
    if order == "-round":
        return sorted(models, key=lambda kept: kept.round)[::-1]
    if order == "created_at":
        return models
    by_round = sorted(models, key=lambda kept: kept.round)[::-1]
    return sorted(by_round, key=lambda kept: kept.kind)


StoreMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStoreState = StoreMachine.TestCase


@pytest.fixture(scope="module", autouse=True)
def _remove_the_empty_node() -> Any:
    yield
    shutil.rmtree(empty_node())
