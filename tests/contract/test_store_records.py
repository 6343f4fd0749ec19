"""The same facts about the records of model stores, tenants, upstreams and parties, over SQLite and PostgreSQL."""

import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from alembic import command
from sqlalchemy import Connection, Engine, insert, select, text, update

from common.errors import AccessDenied, Conflict, InvalidInput, InvalidSettings, NotFound, NoUpstream
from common.settings import Settings
from store.conditions import parse_condition, parse_order
from store.database import reading, revision, upgrade, writing
from store.migrations import HEAD, migration_config
from store.model_stores import (
    add_store,
    check_access,
    check_owner,
    find_store,
    get_store,
    grant,
    remove_store,
    revoke,
    visible_stores,
)
from store.models import (
    ModelInfo,
    ModelState,
    add_model,
    count_models,
    delete_models,
    find_by_hash,
    find_copy,
    find_models,
    get_model,
    latest_feedbacked,
)
from store.opening import OpenStore, open_store
from store.parties import add_party, enroll_site, parties, remove_party, sites
from store.putting import NewModel, put_file, spooled
from store.tables import jobs, metadata, store_grants, tenants, upstreams, utc_now
from store.tenants import Caller, add_tenant, authenticate, operator, renew_secret, set_tenant_enabled
from store.tenants import tenants as list_tenants
from store.upstreams import (
    SecretBox,
    add_upstream,
    choose_upstream,
    get_upstream,
    remove_upstream,
    update_upstream,
)
from store.upstreams import upstreams as list_upstreams

DIGESTS = [f"{number:064x}" for number in range(10)]
OPERATOR = Caller(tenant_id="", tenant_name="", is_operator=True)
Result = TypeVar("Result")


@pytest.fixture
def box(tmp_path: Path) -> SecretBox:
    return SecretBox(tmp_path / "store.key")


def model(**changes: Any) -> ModelInfo:
    return replace(ModelInfo(store="ddc:digits", model_hash=DIGESTS[0], model_size=7), **changes)


def job(job_id: str = "job", **changes: Any) -> dict[str, Any]:
    return {"job_id": job_id, "name": "digits", "state": "running", "spec": {}, "num_rounds": 3, "sites": [], **changes}


def new_caller(connection: Connection, name: str) -> Caller:
    tenant, secret = add_tenant(connection, name)
    return authenticate(connection, tenant.api_key, secret)


class TestMigration:
    def test_models_of_the_first_version_get_their_store_and_their_index(self, fresh: Engine) -> None:
        with writing(fresh) as connection:
            command.upgrade(migration_config(connection), "0001")
        first, last = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 3, tzinfo=UTC)
        table = metadata.tables["model_info"]
        common = {"tenant_id": "", "model_kind": "global", "model_description": "", "model_meta": {}, "model_state": 30}
        common |= {"model_size": 7, "round": 1, "hop_count": 0, "parents": [], "metrics": {}}
        rows = [
            {"model_id": "a", "store": "ddc:x", "model_hash": "ha", "shards": [{"digest": "d", "size": 7}], "at": last},
            {"model_id": "b", "store": "ddc:x", "model_hash": "hb", "shards": [], "at": first},
            {"model_id": "c", "store": "ddc:y", "model_hash": "hc", "shards": [], "at": last},
        ]
        new = {"index_hash", "origin_node", "origin_model_id", "kept", "expired_at", "expired_reason"}
        old = [column for column in table.columns if column.name not in {"sequence", *new}]
        with writing(fresh) as connection:
            for row in rows:
                values = {**common, **row, "created_at": row["at"]}
                # The statement names the old columns only.
                bound = {column.name: values.get(column.name) for column in old}
                connection.execute(insert(table).values(bound))
        assert upgrade(fresh)
        with reading(fresh) as connection:
            assert connection.execute(
                select(table.c.model_id, table.c.index_hash).order_by(table.c.sequence)
            ).all() == [
                ("a", "ha"),
                ("b", None),
                ("c", None),
            ]
            found = visible_stores(connection, OPERATOR)
        assert [(store.name, store.tenant_id, store.created_at) for store in found] == [
            ("ddc:x", "", first),
            ("ddc:y", "", last),
        ]

    def test_it_can_be_taken_back(self, engine: Engine) -> None:
        with writing(engine) as connection:
            command.downgrade(migration_config(connection), "0001")
        assert revision(engine) == "0001"
        assert upgrade(engine)
        assert revision(engine) == HEAD


class TestModelStores:
    def test_a_store_is_made_once_and_only_by_one_tenant(self, engine: Engine) -> None:
        with writing(engine) as connection:
            ours = add_store(connection, "ddc:digits", tenant_id="a", description="Ziffern")
            assert add_store(connection, "ddc:digits", tenant_id="a", description="not kept") == ours
            with pytest.raises(Conflict, match=r"ddc:digits already, of another tenant"):
                add_store(connection, "ddc:digits", tenant_id="b")
            assert get_store(connection, "ddc:digits") == ours
            assert find_store(connection, "ddc:other") is None
            with pytest.raises(NotFound, match="ddc:other"):
                get_store(connection, "ddc:other")

    @pytest.mark.parametrize("name", ["ddc:a", "ddc:0", f"ddc:{'a' * 100}", "ddc:My store_1.x-y", "ddc:a..b"])
    def test_a_name_may_have_these_characters(self, engine: Engine, name: str) -> None:
        with writing(engine) as connection:
            assert add_store(connection, name).name == name

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "ddc:",
            "a",
            "DDC:a",
            "ddc:.a",
            "ddc:..",
            "ddc:../a",
            "ddc:a/b",
            "ddc:a\\b",
            "ddc:a\0b",
            "ddc:a\n",
            "ddc:é",
            "ddc: a",
            "ddc:-a",
            f"ddc:{'a' * 101}",
            f"ddc:{'a' * 10_000}",
            "ddc:a\ud800",
            "ddc:a;DROP TABLE jobs",
        ],
    )
    def test_another_name_is_refused_and_shown_only_in_part(self, engine: Engine, name: str) -> None:
        with writing(engine) as connection:
            for use in (add_store, lambda connection, name: check_access(connection, OPERATOR, name, write=False)):
                with pytest.raises(InvalidInput, match="cannot be a model store's name; write ddc:") as raised:
                    use(connection, name)
                assert len(raised.value.message) < 400

    def test_of_those_that_make_one_at_once_all_get_the_same(self, engine: Engine) -> None:
        def make() -> str:
            with writing(engine) as connection:
                return add_store(connection, "ddc:digits").id

        assert len(set(at_once(6, make))) == 1

    def test_a_tenant_sees_its_own_and_what_is_opened_to_it(self, engine: Engine) -> None:
        with writing(engine) as connection:
            a, b = new_caller(connection, "a"), new_caller(connection, "b")
            own = add_store(connection, "ddc:own", tenant_id=b.tenant_id)
            other = add_store(connection, "ddc:other", tenant_id=a.tenant_id)
            operators = add_store(connection, "ddc:operators")
            assert visible_stores(connection, OPERATOR) == (operators, other, own)
            assert visible_stores(connection, b) == (own,)
            assert check_access(connection, b, "ddc:own", write=True) == own
            for hidden in ("ddc:other", "ddc:operators", "ddc:missing"):  # all the same to who may not see it
                with pytest.raises(NotFound, match=f"no model store '{hidden}' that you may use"):
                    check_access(connection, b, hidden, write=False)

            grant(connection, "ddc:other", b.tenant_id, may_write=False)
            assert visible_stores(connection, b) == (other, own)
            assert check_access(connection, b, "ddc:other", write=False) == other
            with pytest.raises(AccessDenied, match="may read model store ddc:other but not change it"):
                check_access(connection, b, "ddc:other", write=True)

            grant(connection, "ddc:other", b.tenant_id, may_write=True)
            assert check_access(connection, b, "ddc:other", write=True) == other
            with pytest.raises(AccessDenied, match="belongs to another tenant"):
                check_owner(connection, b, "ddc:other")
            assert check_owner(connection, OPERATOR, "ddc:other") == other

            assert [revoke(connection, "ddc:other", b.tenant_id) for _ in range(2)] == [1, 0]
            assert visible_stores(connection, b) == (own,)
            with pytest.raises(NotFound, match="no tenant 'nobody'"):
                grant(connection, "ddc:other", "nobody", may_write=False)

    def test_it_goes_with_all_that_is_in_it(self, engine: Engine, box: SecretBox) -> None:
        with writing(engine) as connection:
            for name in ("ddc:digits", "ddc:kept"):
                add_store(connection, name)
                add_upstream(connection, box, name, url="http://127.0.0.1:1")
                grant(connection, name, add_tenant(connection, name)[0].tenant_id, may_write=True)
                add_model(connection, model(store=name))
                add_model(connection, model(store=name))
            assert remove_store(connection, "ddc:digits") == 2
            assert [store.name for store in visible_stores(connection, OPERATOR)] == ["ddc:kept"]
            assert count_models(connection, "ddc:digits") == 0
            assert count_models(connection, "ddc:kept") == 2
            assert len(connection.execute(select(store_grants)).all()) == 1
            assert [upstream.store for upstream in list_upstreams(connection)] == ["ddc:kept"]
            with pytest.raises(NotFound, match="ddc:digits"):
                remove_store(connection, "ddc:digits")

    def test_it_stays_while_a_job_uses_it(self, engine: Engine) -> None:
        with writing(engine) as connection:
            for name in ("ddc:digits", "ddc:start"):
                add_store(connection, name)
            start = add_model(connection, model(store="ddc:start"))
            connection.execute(insert(jobs), job("job-1", model_id=start.model_id))
            with pytest.raises(Conflict, match=r"Job job-1 puts its models into ddc:digits"):
                remove_store(connection, "ddc:digits")
            for removed in (remove_store, delete_models):
                with pytest.raises(Conflict, match=f"{start.model_id} is the current one of job job-1"):
                    removed(connection, "ddc:start")
            connection.execute(update(jobs).values(finished_at=utc_now()))
            assert (remove_store(connection, "ddc:digits"), remove_store(connection, "ddc:start")) == (0, 1)

    def test_a_model_that_is_put_while_its_store_goes_is_not_left_over(self, database_url: str, tmp_path: Path) -> None:
        with open_node(database_url, tmp_path) as store:
            for _ in range(5):
                with writing(store.engine) as connection:
                    add_store(connection, "ddc:digits")

                def put() -> object:
                    try:
                        with spooled(store, [b"bytes"]) as (path, blob):
                            return put_file(store, "ddc:digits", path, blob, NewModel())
                    except NotFound as error:
                        return error

                def remove() -> object:
                    with writing(store.engine) as connection:
                        return remove_store(connection, "ddc:digits")

                with ThreadPoolExecutor(4) as pool:
                    for future in [pool.submit(put), pool.submit(put), pool.submit(remove), pool.submit(put)]:
                        future.result(timeout=30)
                with reading(store.engine) as connection:
                    assert find_models(connection) == ()
                assert list(store.blobs.scratch().iterdir()) == []


class TestTenants:
    def test_who_has_key_and_secret_is_known(self, engine: Engine) -> None:
        with writing(engine) as connection:
            tenant, secret = add_tenant(connection, "Klinik Süd")
            root, root_secret = add_tenant(connection, "root", is_operator=True)
            assert list_tenants(connection) == (tenant, root)
            assert authenticate(connection, tenant.api_key, secret) == Caller(
                tenant_id=tenant.tenant_id, tenant_name="Klinik Süd", is_operator=False
            )
            assert authenticate(connection, root.api_key, root_secret).is_operator
            stored = connection.execute(select(tenants)).all()
        assert not any(secret in str(value) for row in stored for value in row)

    def test_all_others_are_told_the_same(self, engine: Engine) -> None:
        with writing(engine) as connection:
            tenant, secret = add_tenant(connection, "a")
            disabled, disabled_secret = add_tenant(connection, "b")
            assert not set_tenant_enabled(connection, "b", False).enabled
            said = set()
            for key, word in [
                (tenant.api_key, ""),
                (tenant.api_key, secret + "x"),
                (tenant.api_key, disabled_secret),
                ("", ""),
                ("unknown", secret),
                ("nul\0", "\ud800"),
                (disabled.api_key, disabled_secret),
            ]:
                with pytest.raises(AccessDenied) as raised:
                    authenticate(connection, key, word)
                said.add(raised.value.message)
            assert len(said) == 1
            set_tenant_enabled(connection, disabled.tenant_id, True)
            assert authenticate(connection, disabled.api_key, disabled_secret).tenant_name == "b"

    def test_a_renewed_secret_ends_the_old_one(self, engine: Engine) -> None:
        with writing(engine) as connection:
            tenant, old = add_tenant(connection, "a")
            new = renew_secret(connection, "a")
            assert authenticate(connection, tenant.api_key, new).tenant_id == tenant.tenant_id
            with pytest.raises(AccessDenied):
                authenticate(connection, tenant.api_key, old)
            with pytest.raises(NotFound, match="no tenant 'b'"):
                renew_secret(connection, "b")

    def test_a_name_is_used_once_and_is_text(self, engine: Engine) -> None:
        with writing(engine) as connection:
            add_tenant(connection, "a")
            with pytest.raises(Conflict, match="tenant 'a' already"):
                add_tenant(connection, "a")
            for name in ("", " a", "a\n", "a\0", "a" * 201):
                with pytest.raises(InvalidInput, match="cannot be a tenant's name"):
                    add_tenant(connection, name)

    def test_the_operator_is_the_settings_organisation(self) -> None:
        assert operator(Settings(tenant_id="t", tenant_name="n")) == Caller(
            tenant_id="t", tenant_name="n", is_operator=True
        )


class TestUpstreams:
    @pytest.fixture
    def connection(self, engine: Engine) -> Iterator[Connection]:
        with writing(engine) as connection:
            add_store(connection, "ddc:a")
            add_store(connection, "ddc:b")
            yield connection

    def test_one_is_changed_and_removed(self, connection: Connection, box: SecretBox) -> None:
        added = add_upstream(connection, box, "ddc:a", url="https://hub.example:8443/base/", secret="s3cret")
        assert (added.url, added.upstream_store, added.alias, added.enabled) == (
            "https://hub.example:8443/base",
            "ddc:a",
            "default",
            True,
        )
        assert added.secret.get_secret_value() == ""  # nothing but a choice decrypts it
        assert "s3cret" not in repr(connection.execute(select(upstreams)).all())
        changed = update_upstream(connection, box, added.id, alias="hub", enabled=False, upstream_store="ddc:z")
        expected = replace(added, alias="hub", enabled=False, upstream_store="ddc:z", updated_at=changed.updated_at)
        assert changed == expected == get_upstream(connection, added.id)
        assert (list_upstreams(connection, "ddc:a"), list_upstreams(connection, "ddc:b")) == ((changed,), ())
        assert [remove_upstream(connection, added.id) for _ in range(2)] == [1, 0]
        for use in (get_upstream, lambda connection, id: update_upstream(connection, box, id, alias="x")):
            with pytest.raises(NotFound, match=added.id):
                use(connection, added.id)

    def test_an_alias_is_used_once_for_a_store(self, connection: Connection, box: SecretBox) -> None:
        add_upstream(connection, box, "ddc:a", url="http://h")
        add_upstream(connection, box, "ddc:b", url="http://h")
        second = add_upstream(connection, box, "ddc:a", url="http://h", alias="second")
        with pytest.raises(Conflict, match="ddc:a has an upstream 'default' already"):
            add_upstream(connection, box, "ddc:a", url="http://h")
        with pytest.raises(Conflict, match="ddc:a has an upstream 'default' already"):
            update_upstream(connection, box, second.id, alias="default")
        assert len(list_upstreams(connection)) == 3

    @pytest.mark.parametrize(
        "field",
        [{"url": url} for url in ("", "hub", "ftp://h", "http://", "http://h:0", "http://h:x", "http://h/a b")]
        + [{"url": url} for url in ("http://u:p@h", "http://h?a=1", "http://h#x", "http://h?", "file:///etc/passwd")]
        + [{"url": "http://h\n"}, {"url": "http://" + "h" * 2000}, {"url": "http://é"}]
        + [{"alias": ""}, {"alias": "a\n"}, {"alias": "a" * 101}, {"upstream_store": "x"}, {"secret": "a\r\nb: c"}]
        + [{"api_key": "é"}, {"description": "a\0"}, {"description": "a" * 10_001}],
    )
    def test_a_field_that_cannot_be_is_refused(self, connection: Connection, box: SecretBox, field: Any) -> None:
        with pytest.raises(InvalidInput) as raised:
            add_upstream(connection, box, "ddc:a", **({"url": "http://h"} | field))
        assert "u:p" not in raised.value.message
        added = add_upstream(connection, box, "ddc:a", url="http://h")
        with pytest.raises(InvalidInput):
            update_upstream(connection, box, added.id, **field)
        assert list_upstreams(connection) == (added,)

    def test_of_no_store_there_is_none_nor_other_fields(self, connection: Connection, box: SecretBox) -> None:
        with pytest.raises(NotFound, match="ddc:none"):
            add_upstream(connection, box, "ddc:none", url="http://h")
        added = add_upstream(connection, box, "ddc:a", url="http://h")
        with pytest.raises(InvalidInput, match="'store' cannot be changed"):
            update_upstream(connection, box, added.id, store="ddc:b")

    def test_the_one_that_is_meant_is_chosen(self, connection: Connection, box: SecretBox) -> None:
        plain = Settings()
        set_ = Settings(upstream_url="http://up/", upstream_api_key="k", upstream_secret="s")

        def choose(alias: str | None = None, settings: Settings = plain) -> str:
            chosen = choose_upstream(connection, box, settings, "ddc:a", alias)
            return f"{chosen.alias} {chosen.url} {chosen.upstream_store} {chosen.secret.get_secret_value()}"

        with pytest.raises(NoUpstream, match="ddc:a has no upstream"):
            choose()
        assert choose(settings=set_) == "default http://up ddc:a s"
        one = add_upstream(connection, box, "ddc:a", url="http://one", alias="one", secret="s1", upstream_store="ddc:z")
        assert choose() == choose("one") == choose(one.id) == choose(settings=set_) == "one http://one ddc:z s1"
        two = add_upstream(connection, box, "ddc:a", url="http://two", alias="two", secret="s2")
        with pytest.raises(NoUpstream, match="several upstreams; name one of them: one, two"):
            choose(settings=set_)
        assert choose("two") == "two http://two ddc:a s2"
        update_upstream(connection, box, one.id, alias="default")
        assert choose() == "default http://one ddc:z s1"
        update_upstream(connection, box, one.id, enabled=False)
        assert choose() == "two http://two ddc:a s2"
        with pytest.raises(NotFound, match="has no upstream 'three'"):
            choose("three")
        for alias in (None, "default"):
            update_upstream(connection, box, two.id, enabled=False)
            with pytest.raises(NoUpstream, match="no upstream that is enabled"):
                choose(alias, set_)  # who switched them off does not want to feed another one

    def test_another_key_is_told_and_keeps_nothing_from_being_listed(
        self, connection: Connection, box: SecretBox, tmp_path: Path
    ) -> None:
        add_upstream(connection, box, "ddc:a", url="http://h", secret="s")
        assert stat.S_IMODE(box.path.stat().st_mode) == 0o600
        other = SecretBox(tmp_path / "other" / "key")
        with pytest.raises(InvalidSettings, match=r"no key .*/other/key"):
            choose_upstream(connection, other, Settings(), "ddc:a")
        other.seal("makes the key")
        with pytest.raises(InvalidSettings, match=r"other/key is not the one that the upstream's secret was encrypted"):
            choose_upstream(connection, other, Settings(), "ddc:a")
        other.path.write_bytes(b"rubbish")
        with pytest.raises(InvalidSettings, match="holds no key"):
            choose_upstream(connection, other, Settings(), "ddc:a")
        assert len(list_upstreams(connection)) == 1

    def test_of_those_that_make_the_key_at_once_all_use_the_same(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        sealed = at_once(6, lambda: SecretBox(path).seal("secret"))
        assert {SecretBox(path).open(each) for each in sealed} == {"secret"}
        assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


class TestModels:
    def test_a_copy_is_found_by_where_it_came_from_and_recorded_once(self, engine: Engine) -> None:
        with writing(engine) as connection:
            copy = add_model(connection, model(origin_node="n", origin_model_id="m"))
            add_model(connection, model())
            add_model(connection, model())  # without an origin there may be any number
            elsewhere = add_model(connection, model(store="ddc:x", origin_node="n", origin_model_id="m"))
            assert find_copy(connection, "ddc:digits", "n", "m") == copy
            assert find_copy(connection, "ddc:x", "n", "m") == elsewhere
            assert find_copy(connection, "ddc:digits", "n", "other") is None
        with pytest.raises(Conflict), writing(engine) as connection:
            add_model(connection, model(origin_node="n", origin_model_id="m"))

    def test_one_is_found_by_its_hash_in_the_stores_asked_for(self, engine: Engine) -> None:
        with writing(engine) as connection:
            first = add_model(connection, model(index_hash=DIGESTS[2]))
            newer = add_model(connection, model(store="ddc:x"))
            add_model(connection, model(model_hash=DIGESTS[1]))
            assert find_by_hash(connection, ["ddc:digits", "ddc:x"], DIGESTS[0]) == newer
            assert find_by_hash(connection, ["ddc:digits"], DIGESTS[0]) == first
            assert find_by_hash(connection, ["ddc:y"], DIGESTS[0]) is None
            assert get_model(connection, first.model_id).index_hash == DIGESTS[2]

    def test_the_newest_of_each_origin_in_a_round_are_those_fed_back(self, engine: Engine) -> None:
        def add(round: int, tenant: str = "", site: str | None = None, node: str | None = None) -> ModelInfo:
            info = model(round=round, tenant_id=tenant, site=site, model_state=ModelState.FEEDBACKED)
            origin = None if node is None else info.model_id
            return add_model(connection, replace(info, origin_node=node, origin_model_id=origin))

        with writing(engine) as connection:
            add(1, "a")
            a1 = add(1, "a")
            x1, y1 = add(1, site="x"), add(1, site="y")
            add(2, "a", node="n")
            a2, m2 = add(2, "a", node="n"), add(2, "a", node="m")
            add_model(connection, model(round=9))  # not fed back
            add_model(connection, model(round=9, store="ddc:x", model_state=ModelState.FEEDBACKED))
            assert latest_feedbacked(connection, "ddc:digits", 1) == (y1, x1, a1)
            assert latest_feedbacked(connection, "ddc:digits", 2) == (m2, a2)
            assert latest_feedbacked(connection, "ddc:digits") == (m2, a2)
            assert latest_feedbacked(connection, "ddc:digits", 9) == ()
            assert latest_feedbacked(connection, "ddc:none") == ()

    def test_conditions_and_order_mean_the_same_everywhere(self, engine: Engine) -> None:
        start = datetime(2026, 1, 1, tzinfo=UTC)
        with writing(engine) as connection:
            for number in range(6):
                at = None if number == 5 else start + timedelta(hours=number // 2)
                site = [None, "Site_a", "site%b"][number % 3]
                add_model(connection, model(model_id=str(number), round=number, site=site, start_datetime=at))

        def find(conditions: object, order: Any = "round") -> str:
            with reading(engine) as connection:
                found = find_models(
                    connection, conditions=parse_condition(conditions), order=parse_order(order), store="ddc:digits"
                )
                assert count_models(connection, "ddc:digits", parse_condition(conditions)) == len(found)
            return "".join(info.model_id for info in found)

        assert find({}) == "012345"
        assert find({"=": ["round", 2]}) == "2"
        assert find({"<": ["round", 2]}) == "01"
        assert find({"in": ["round", [1, 3, 9]]}) == "13"
        assert find({"in": ["round", []]}) == ""
        assert find({">=": ["round", 2], "<=": ["round", 3]}) == "23"
        assert find({"not": {">=": ["round", 2]}}) == "01"
        assert find({"or": [{"=": ["round", 0]}, {"=": ["round", 5]}]}) == "05"
        assert find({"and": []}) == "012345"
        assert find({"or": []}) == ""
        assert find({"=": ["site", None]}) == "03"
        assert find({"!=": ["site", None]}) == "1245"
        assert find({"!=": ["site", "Site_a"]}) == "0235"  # what is null is not "Site_a"
        assert find({"not": {"=": ["site", "Site_a"]}}) == "0235"
        assert find({"in": ["site", ["Site_a", None]]}) == "0134"
        assert find({"not": {"in": ["site", ["Site_a"]]}}) == "0235"
        assert find({"like": ["site", "site%"]}) == "1245"  # in both cases
        assert find({"like": ["site", r"site\%%"]}) == "25"
        assert find({"like": ["site", "%_a"]}) == "14"
        assert find({"not": {"like": ["site", "%a"]}}) == "0235"
        assert find({">": ["start_datetime", "2026-01-01T00:30:00+00:00"]}) == "234"
        assert find({"<=": ["start_datetime", {"_type": "datetime", "val": "2026-01-01T02:00:00+01:00"}]}) == "0123"
        assert find({"=": ["model_store_ddc", "ddc:digits"]}) == "012345"
        assert find({}, None) == "543210"
        assert find({}, "start_datetime") == "501234"  # null first
        assert find({}, "-start_datetime") == "432105"
        assert find({}, ["-start_datetime", "round"]) == "423015"


class TestParties:
    def add(self, connection: Connection, id: str = "p1", **changes: Any) -> Any:
        given: dict[str, Any] = {
            "tenant_id": "t",
            "tenant_name": "Klinik",
            "description": "d",
            "hop_count": 1,
            "registered_by": "r",
        }
        return add_party(connection, id=id, **(given | changes))

    def test_one_is_registered_once(self, engine: Engine) -> None:
        with writing(engine) as connection:
            party = self.add(connection)
            assert (party.id, party.tenant_id, party.tenant_name, party.hop_count) == ("p1", "t", "Klinik", 1)
            again = self.add(connection, hop_count=2, description="not kept")
            assert again == replace(party, hop_count=2, updated_at=again.updated_at)
            for changes in ({"registered_by": "other"}, {"tenant_id": "other"}):
                with pytest.raises(Conflict, match="p1 was registered by another tenant"):
                    self.add(connection, **changes)
            assert parties(connection) == (again,)

    def test_sites_are_not_listed_among_them_nor_removed_with_them(self, engine: Engine) -> None:
        with writing(engine) as connection:
            site = enroll_site(connection, "site-01", "key")
            self.add(connection)
            second = self.add(connection, "p2", registered_by="")
            with pytest.raises(Conflict):
                self.add(connection, site.id)
            assert [remove_party(connection, "p1", registered_by=by) for by in ("other", "r", "r")] == [0, 1, 0]
            assert parties(connection) == (second,)
            assert [remove_party(connection, id, registered_by=None) for id in ("p2", site.id)] == [1, 0]
            assert sites(connection) == (site,)


class TestOpening:
    def test_a_node_keeps_its_id_whoever_opens_it_first(self, database_url: str, tmp_path: Path) -> None:
        def open_it() -> str:
            with open_node(database_url, tmp_path) as store:
                return store.node_id

        (node_id,) = set(at_once(4, open_it))
        assert open_it() == node_id

    def test_the_jobs_key_of_submission_is_used_once(self, engine: Engine) -> None:
        with writing(engine) as connection:
            connection.execute(insert(jobs), [job("a"), job("b")])
            connection.execute(update(jobs).where(jobs.c.job_id == "a").values(submission_key="k"))
        with pytest.raises(Exception, match=r"(?i)unique"), writing(engine) as connection:
            connection.execute(text("UPDATE jobs SET submission_key = 'k'"))


def open_node(database_url: str, folder: Path) -> OpenStore:
    return open_store(
        Settings(database_url=database_url, blob_folder=folder / "blobs", store_key_file=folder / "store.key")
    )


def at_once(number: int, do: Callable[[], Result]) -> list[Result]:
    """Return what the same call gives in several threads that start together."""
    barrier = threading.Barrier(number)

    def wait_and_do(_: int) -> Result:
        barrier.wait(timeout=30)
        return do()

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(wait_and_do, range(number)))
