"""The same facts about the records, over SQLite and over a real PostgreSQL."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, TypeVar

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, exc, insert, inspect, select, text, update

from common.errors import Conflict, DatabaseUnavailable, InvalidInput, NotFound
from store.blobs import Blob
from store.database import open_database, reading, revision, upgrade, writing
from store.lineage import lineage
from store.migrations import HEAD
from store.models import (
    ModelInfo,
    ModelState,
    add_model,
    delete_model,
    find_model,
    find_models,
    get_model,
    get_models,
    latest_model,
    new_model_id,
    set_metrics,
)
from store.parties import PartyInfo, enroll_site, get_site, remove_site, set_enabled, sites
from store.tables import audit, jobs, metadata, parts, rounds, utc_now
from tests.contract.postgres import PostgresServer

DIGEST = "0" * 64
Result = TypeVar("Result")


def job(job_id: str = "job", **changes: Any) -> dict[str, Any]:
    return {"job_id": job_id, "name": "digits", "state": "QUEUED", "spec": {}, "num_rounds": 3, "sites": [], **changes}


def model(**changes: Any) -> ModelInfo:
    return replace(ModelInfo(store="ddc:digits", model_hash=DIGEST, model_size=7), **changes)


class TestMigrations:
    def test_they_make_what_the_tables_declare(self, engine: Engine) -> None:
        with reading(engine) as connection:
            context = MigrationContext.configure(
                connection, opts={"compare_type": True, "compare_server_default": True}
            )
            assert compare_metadata(context, metadata) == []
        assert revision(engine) == HEAD

    def test_a_database_is_upgraded_once(self, fresh: Engine) -> None:
        assert [upgrade(fresh), upgrade(fresh)] == [True, False]

    def test_of_processes_that_start_at_once_one_upgrades(self, database_url: str) -> None:
        code = (
            "import sys; from store.database import open_database, upgrade\n"
            "print('ready', flush=True); sys.stdin.readline()\n"
            "print(upgrade(open_database(sys.argv[1])))"
        )
        command = [sys.executable, "-W", "error", "-c", code, database_url]
        processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        said = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
        assert said == ["False", "False", "False", "True"]

    def test_one_that_fails_leaves_nothing(self, fresh: Engine) -> None:
        with writing(fresh) as connection:
            connection.execute(text("CREATE TABLE parts (a INTEGER)"))  # ours comes last, and cannot be made now
        with pytest.raises(exc.DBAPIError):
            upgrade(fresh)
        assert inspect(fresh).get_table_names() == ["parts"]

    def test_a_database_of_a_newer_version_is_refused(self, engine: Engine) -> None:
        with writing(engine) as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(Conflict, match=r"9999.*upgrade this installation"):
            upgrade(engine)


class TestTransactions:
    def test_what_a_block_wrote_is_undone_if_it_raises(self, engine: Engine) -> None:
        with writing(engine) as connection:
            connection.execute(insert(jobs), job("kept"))

        def fail() -> None:
            with writing(engine) as connection:
                connection.execute(insert(jobs), job("undone"))
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        with reading(engine) as connection:
            assert connection.scalars(select(jobs.c.job_id)).all() == ["kept"]

    def test_a_reader_sees_each_commit_and_stops_no_writer(self, engine: Engine) -> None:
        with reading(engine) as reader:
            assert reader.scalars(select(jobs.c.job_id)).all() == []
            with writing(engine) as writer:
                writer.execute(insert(jobs), job())
                assert reader.scalars(select(jobs.c.job_id)).all() == []
            assert reader.scalars(select(jobs.c.job_id)).all() == ["job"]

    def test_reading_holds_no_transaction_so_that_a_change_is_kept_at_once(self, engine: Engine) -> None:
        with reading(engine) as connection, reading(engine) as other:  # of the pool that writers use too
            connection.execute(insert(jobs), job())
            assert other.scalars(select(jobs.c.job_id)).all() == ["job"]
        with pytest.raises(exc.IntegrityError), writing(engine) as connection:
            connection.execute(insert(jobs), [job("undone"), job()])
        with reading(engine) as connection:
            assert connection.scalars(select(jobs.c.job_id)).all() == ["job"]

    def test_a_savepoint_can_be_undone_alone(self, engine: Engine) -> None:
        with writing(engine) as connection:
            connection.execute(insert(jobs), job("kept"))
            with pytest.raises(exc.IntegrityError), connection.begin_nested():
                connection.execute(insert(jobs), job("kept"))
            connection.execute(insert(jobs), job("kept too"))
        with reading(engine) as connection:
            assert connection.scalars(select(jobs.c.job_id)).all() == ["kept", "kept too"]

    def test_of_writers_that_compare_and_set_at_once_one_wins(self, engine: Engine) -> None:
        with writing(engine) as connection:
            connection.execute(insert(jobs), job(state="QUEUED"))

        def start() -> int:
            with writing(engine) as connection:
                mine = update(jobs).where(jobs.c.job_id == "job", jobs.c.state == "QUEUED").values(state="RUNNING")
                return connection.execute(mine).rowcount

        assert sorted(at_once(8, start)) == [0, 0, 0, 0, 0, 0, 0, 1]

    def test_writers_wait_for_each_other(self, engine: Engine) -> None:
        with writing(engine) as connection:
            connection.execute(insert(jobs), job())

        def count() -> None:
            for _ in range(20):
                with writing(engine) as connection:
                    connection.scalar(select(jobs.c.state))  # a read first is what deadlocks without BEGIN IMMEDIATE
                    connection.execute(update(jobs).values(current_round=jobs.c.current_round + 1))

        at_once(6, count)
        with reading(engine) as connection:
            assert connection.scalar(select(jobs.c.current_round)) == 120  # 6 writers times 20


class TestTables:
    def test_times_come_back_equal_and_in_utc(self, engine: Engine) -> None:
        at = datetime(2026, 3, 29, 2, 30, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
        with writing(engine) as connection:
            connection.execute(insert(jobs), job(started_at=at))
        with reading(engine) as connection:
            found = connection.execute(select(jobs.c.started_at, jobs.c.finished_at)).one()
            assert connection.scalar(select(jobs.c.job_id).where(jobs.c.started_at < at)) is None
            assert connection.scalar(select(jobs.c.job_id).where(jobs.c.started_at <= at)) == "job"
        assert found == (at, None)
        assert found.started_at.tzinfo is UTC

    @pytest.mark.parametrize(
        ("column", "value", "said"),
        [
            ("started_at", datetime(2026, 1, 1), "has no zone"),
            ("spec", {"accuracy": float("nan")}, "not JSON compliant"),
            ("spec", {"model": object()}, "not JSON serializable"),
        ],
    )
    def test_a_value_that_cannot_be_stored_is_refused(self, engine: Engine, column: str, value: Any, said: str) -> None:
        with pytest.raises(InvalidInput, match=said), writing(engine) as connection:
            connection.execute(insert(jobs), job(**{column: value}))

    @pytest.mark.parametrize(
        "value", [{"b": 1, "a": 2}, {"large": 1e22, "small": 5e-324, "whole": 1.0}, {"text": "é\x00\ud800"}, [None, {}]]
    )
    def test_json_comes_back_to_the_letter(self, engine: Engine, value: object) -> None:
        with writing(engine) as connection:
            connection.execute(insert(jobs), job(spec=value))
        with reading(engine) as connection:
            assert repr(connection.scalar(select(jobs.c.spec))) == repr(value)  # order of keys and types as well

    def test_rounds_and_parts_are_unique_and_belong_to_something(self, engine: Engine) -> None:
        round_ = {"job_id": "job", "number": 1, "kind": "train", "state": "OPEN", "group_id": "g", "body_task_id": "b"}
        round_ |= {"round_id": "r1", "deadline_at": utc_now()}
        part = {"task_id": "t1", "round_id": "r1", "job_id": "job", "site": "site-01", "position": 0, "state": "SENT"}
        with writing(engine) as connection:
            connection.execute(insert(jobs), job())
            connection.execute(insert(rounds), round_)
            connection.execute(insert(parts), part)
            for table, row in [
                (rounds, round_ | {"round_id": "r2"}),  # a second training round 1
                (rounds, round_ | {"round_id": "r2", "number": 2, "job_id": "no such job"}),
                (parts, part | {"task_id": "t2", "position": 1}),  # a second part of the same site
                (parts, part | {"task_id": "t2", "site": "site-02"}),  # a second part at the same position
                (parts, part | {"task_id": "t2", "site": "site-02", "position": 1, "round_id": "no such round"}),
            ]:
                with pytest.raises(exc.IntegrityError), connection.begin_nested():
                    connection.execute(insert(table), row)
            found = connection.execute(select(parts)).one()
        assert (found.attempt, found.reason, found.metrics, found.shards) == (1, "", {}, [])

    def test_audit_entries_are_numbered(self, engine: Engine) -> None:
        with writing(engine) as connection:
            for subject in ("a", "b"):
                connection.execute(insert(audit), {"actor": "me", "action": "job.submitted", "subject": subject})
            assert connection.execute(select(audit.c.id, audit.c.subject)).all() == [(1, "a"), (2, "b")]


class TestModels:
    def test_a_model_comes_back_whole(self, engine: Engine) -> None:
        info = ModelInfo(
            store="ddc:digits",
            tenant_id="tenant",
            model_kind="update",
            model_description="Größe",
            model_meta={"layers": [64, 10]},
            model_state=ModelState.FEEDBACKED,
            model_hash=DIGEST,
            model_size=1 << 40,
            round=3,
            hop_count=1,
            start_datetime=utc_now() - timedelta(minutes=1),
            end_datetime=utc_now(),
            location=[8.4, 49.0],
            parents=(new_model_id(),),
            job_id="job",
            site="site-01",
            num_examples=1 << 33,
            metrics={"loss": 0.1},
            shards=(Blob(digest=DIGEST, size=1 << 40),),
        )
        with writing(engine) as connection:
            added = add_model(connection, info)
        assert added == replace(info, sequence=1)
        with reading(engine) as connection:
            assert get_model(connection, info.model_id) == added

    def test_several_come_back_in_the_order_asked_for(self, engine: Engine) -> None:
        with writing(engine) as connection:
            a, b = (add_model(connection, model()) for _ in range(2))
            assert get_models(connection, [b.model_id, a.model_id, b.model_id]) == (b, a, b)
            assert get_models(connection, []) == ()
            with pytest.raises(NotFound, match="nothing"):
                get_models(connection, [a.model_id, "nothing"])

    def test_metrics_are_replaced(self, engine: Engine) -> None:
        with writing(engine) as connection:
            info = add_model(connection, model(metrics={"loss": 2.0}))
            set_metrics(connection, info.model_id, {"accuracy": 0.9})
            assert get_model(connection, info.model_id) == replace(info, metrics={"accuracy": 0.9})
            with pytest.raises(NotFound, match="nothing"):
                set_metrics(connection, "nothing", {})

    def test_an_id_is_used_once(self, engine: Engine) -> None:
        info = model()
        with writing(engine) as connection:
            add_model(connection, info)
        with pytest.raises(Conflict, match=info.model_id), writing(engine) as connection:
            add_model(connection, info)

    def test_models_are_found_by_all_that_is_asked_for(self, engine: Engine) -> None:
        with writing(engine) as connection:
            first = add_model(connection, model(job_id="a", round=1))
            second = add_model(connection, model(job_id="a", round=2, model_state=ModelState.AGGREGATED))
            third = add_model(connection, model(store="other", job_id="b", round=2, model_kind="update"))
        with reading(engine) as connection:
            assert find_models(connection) == (third, second, first)
            assert find_models(connection, newest_first=False) == (first, second, third)
            assert find_models(connection, limit=1, offset=1) == (second,)
            assert find_models(connection, offset=2) == (first,)
            assert find_models(connection, store="ddc:digits") == (second, first)
            assert find_models(connection, job_id="a", round=1) == (first,)
            assert find_models(connection, round=2) == (third, second)
            assert find_models(connection, kind="update") == (third,)
            assert find_models(connection, state=ModelState.AGGREGATED) == (second,)
            assert find_models(connection, store="other", job_id="a") == ()
            assert latest_model(connection) == third
            assert latest_model(connection, store="ddc:digits", state=ModelState.CREATED) == first
            assert latest_model(connection, store="no such store") is None

    def test_a_model_is_found_by_its_id_or_by_what_it_alone_begins_with(self, engine: Engine) -> None:
        with writing(engine) as connection:
            found = {name: add_model(connection, model(model_id=name)) for name in ("ab", "abc1", "abc2", "x%y", "x_y")}
        with reading(engine) as connection:
            assert find_model(connection, "ab") == found["ab"]
            assert find_model(connection, "abc1") == found["abc1"]
            assert find_model(connection, "x%") == found["x%y"]
            assert find_model(connection, "x_") == found["x_y"]
            for several in ("a", "abc", "x"):
                with pytest.raises(NotFound, match=f"More than one model .* '{several}'"):
                    find_model(connection, several)
            for none in ("", "b", "%", "abc12"):
                with pytest.raises(NotFound, match=f"no model .* '{none}'"):
                    find_model(connection, none)

    def test_a_deleted_model_is_gone_and_its_number_is_not_given_out_again(self, engine: Engine) -> None:
        with writing(engine) as connection:
            gone = add_model(connection, model())
            delete_model(connection, gone.model_id)
            assert add_model(connection, model()).sequence == gone.sequence + 1
            with pytest.raises(NotFound, match=gone.model_id):
                get_model(connection, gone.model_id)
            with pytest.raises(NotFound, match=gone.model_id):
                delete_model(connection, gone.model_id)

    def test_a_model_that_a_job_goes_on_from_is_kept(self, engine: Engine) -> None:
        with writing(engine) as connection:
            info = add_model(connection, model())
            connection.execute(insert(jobs), job("digits-7", model_id=info.model_id))
            with pytest.raises(Conflict, match="digits-7"):
                delete_model(connection, info.model_id)
            connection.execute(update(jobs).values(finished_at=utc_now()))
            delete_model(connection, info.model_id)


class TestLineage:
    def test_a_shared_parent_is_followed_once(self, engine: Engine) -> None:
        with writing(engine) as connection:
            start = add_model(connection, model())
            left = add_model(connection, model(parents=(start.model_id,)))
            right = add_model(connection, model(parents=(start.model_id,)))
            end = add_model(connection, model(parents=(left.model_id, right.model_id)))
        with reading(engine) as connection:
            walked = [(depth, found.model, found.followed) for depth, found in lineage(connection, end.model_id).walk()]
        assert walked == [(0, end, True), (1, left, True), (2, start, True), (1, right, True), (2, start, False)]

    def test_a_deleted_parent_keeps_its_place(self, engine: Engine) -> None:
        with writing(engine) as connection:
            child = add_model(connection, model(parents=("deleted",)))
            (parent,) = lineage(connection, child.model_id).parents
        assert (parent.model_id, parent.model, parent.parents) == ("deleted", None, ())

    def test_it_ends_even_in_a_circle(self, engine: Engine) -> None:
        with writing(engine) as connection:
            add_model(connection, model(model_id="a", parents=("b", "a")))
            add_model(connection, model(model_id="b", parents=("a",)))
            walked = [(depth, found.model_id, found.followed) for depth, found in lineage(connection, "a").walk()]
        assert walked == [(0, "a", True), (1, "b", True), (2, "a", False), (1, "a", False)]

    def test_it_goes_back_to_the_first_of_many_and_stops_where_asked(self, engine: Engine) -> None:
        with writing(engine) as connection:
            parents: tuple[str, ...] = ()
            for _ in range(1500):  # more than Python nests calls
                last = add_model(connection, model(parents=parents))
                parents = (last.model_id,)
            assert [depth for depth, _ in lineage(connection, last.model_id).walk()] == list(range(1500))
            few = list(lineage(connection, last.model_id, max_models=2).walk())
        assert [(depth, found.followed) for depth, found in few] == [(0, True), (1, True), (2, False)]

    def test_made_up_parents_do_not_fill_the_memory(self, engine: Engine) -> None:
        with writing(engine) as connection:
            parents = tuple(f"p{number}" for number in range(100))
            ids = tuple(add_model(connection, model(parents=parents)).model_id for _ in range(30))
            last = add_model(connection, model(parents=ids))
            found = list(lineage(connection, last.model_id, max_parents=1000).walk())
        assert [each.model_id for depth, each in found if depth == 1] == list(ids)
        assert sum(depth == 1 and each.followed for depth, each in found) == 10
        assert sum(depth == 2 for depth, _ in found) == 1000

    def test_of_no_such_model_there_is_none(self, engine: Engine) -> None:
        with reading(engine) as connection, pytest.raises(NotFound, match="nothing"):
            lineage(connection, "nothing")


class TestSites:
    def test_an_enrolled_site_is_a_party(self, engine: Engine) -> None:
        with writing(engine) as connection:
            party = enroll_site(connection, "site-01", "key", tenant_id="t", tenant_name="Klinik", description="d")
        with reading(engine) as connection:
            assert get_site(connection, "site-01") == party
        assert party == PartyInfo(
            id=party.id,
            tenant_id="t",
            tenant_name="Klinik",
            description="d",
            hop_count=0,
            created_at=party.created_at,
            updated_at=party.created_at,
            site="site-01",
            public_key="key",
            enabled=True,
            reason="",
        )

    def test_enrolling_again_changes_nothing_and_another_key_is_refused(self, engine: Engine) -> None:
        with writing(engine) as connection:
            enroll_site(connection, "site-01", "key")
            disabled = set_enabled(connection, "site-01", False, "audit")
            assert enroll_site(connection, "site-01", "key", description="new") == disabled
            with pytest.raises(Conflict, match="site-01 is enrolled with another public key"):
                enroll_site(connection, "site-01", "another key")
            assert sites(connection) == (disabled,)

    def test_a_name_that_cannot_be_a_queue_is_refused(self, engine: Engine) -> None:
        with writing(engine) as connection, pytest.raises(InvalidInput, match="Site_1"):
            enroll_site(connection, "Site_1", "key")

    def test_of_those_that_enroll_one_name_at_once_all_get_the_same_site(self, engine: Engine) -> None:
        def enroll() -> PartyInfo:
            with writing(engine) as connection:
                return enroll_site(connection, "site-01", "key")

        assert len({party.id for party in at_once(6, enroll)}) == 1

    def test_sites_are_listed_by_name_and_by_whether_they_may_take_part(self, engine: Engine) -> None:
        with writing(engine) as connection:
            b, a = enroll_site(connection, "b", "key"), enroll_site(connection, "a", "key")
            assert sites(connection) == (a, b)
            b = set_enabled(connection, "b", False, "maintenance")
            assert (b.enabled, b.reason) == (False, "maintenance")
            assert b.updated_at > a.updated_at
            assert sites(connection, enabled=True) == (a,)
            assert sites(connection, enabled=False) == (b,)
            assert set_enabled(connection, "b", True, "not kept").reason == ""

    def test_a_removed_site_is_gone(self, engine: Engine) -> None:
        with writing(engine) as connection:
            enroll_site(connection, "site-01", "key")
            remove_site(connection, "site-01")
            for use in (get_site, remove_site, lambda connection, name: set_enabled(connection, name, True)):
                with pytest.raises(NotFound, match="site-01"):
                    use(connection, "site-01")
            enroll_site(connection, "site-01", "another key")


class TestPostgresql:
    def test_a_connection_that_the_server_cut_is_replaced(self, postgres_server: PostgresServer) -> None:
        engine = open_database(postgres_server.new_database())
        upgrade(engine)
        cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{engine.url.database}'"
        postgres_server.execute(cut)
        with reading(engine) as connection:
            assert connection.scalar(text("SELECT 1")) == 1

        def write() -> None:
            with writing(engine) as connection:
                connection.execute(insert(jobs), job())
                postgres_server.execute(cut)
                connection.execute(select(jobs))

        with pytest.raises(DatabaseUnavailable, match="check that it runs"):
            write()
        with reading(engine) as connection:
            assert connection.execute(select(jobs)).all() == []
        engine.dispose()

    def test_a_wrong_password_is_told_without_telling_it(self, postgres_server: PostgresServer) -> None:
        url = postgres_server.new_database().replace("not%2Fa", "quite%20wrong")
        with pytest.raises(DatabaseUnavailable, match=r"fedchord:\*\*\*@127.* password authentication") as raised:
            open_database(url)
        assert "wrong" not in str(raised.value)


def at_once(number: int, do: Callable[[], Result]) -> list[Result]:
    """Return what the same call gives in several threads that start together."""
    barrier = threading.Barrier(number)

    def wait_and_do(_: int) -> Result:
        barrier.wait(timeout=30)
        return do()

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(wait_and_do, range(number)))
