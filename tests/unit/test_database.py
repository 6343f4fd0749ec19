"""Facts about opening a database, and about SQLite alone."""

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, insert, select, text
from sqlalchemy.exc import OperationalError

from common.errors import DatabaseUnavailable, DiskFull, InvalidSettings
from store.database import open_database, reading, upgrade, writing
from store.migrations import HEAD, migration_config
from store.tables import audit, model_info

ENTRY = {"actor": "me", "action": "job.submitted", "subject": "digits"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder to be made" / "records.db"


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{path}", busy_timeout_seconds=0.1)
    upgrade(engine)
    yield engine
    engine.dispose()


def add_entry(engine: Engine, **changes: str) -> None:
    with writing(engine) as connection:
        connection.execute(insert(audit), ENTRY | changes)


def count_entries(engine: Engine) -> int:
    with reading(engine) as connection:
        return len(connection.execute(select(audit.c.id)).all())


def test_head_is_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(migration_config()).get_heads() == [HEAD]


def test_the_file_is_set_up_for_many_processes(engine: Engine) -> None:
    with reading(engine) as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1, "busy_timeout": 100}  # 1: NORMAL


def test_a_database_that_is_up_to_date_needs_no_alembic_and_no_driver_of_another(engine: Engine) -> None:
    code = (
        "import sys; from store.database import open_database, upgrade\n"
        "assert not upgrade(open_database(sys.argv[1]))\n"
        "print(sorted({'alembic', 'psycopg', 'numpy', 'celery'} & set(sys.modules)))"
    )
    url = engine.url.render_as_string()
    done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_process_leaves_the_connections_of_the_one_it_was_forked_from(engine: Engine) -> None:
    add_entry(engine)
    pool = engine.pool
    code = (
        "import os, sys; from store.database import open_database, reading\n"
        "from sqlalchemy import text\n"
        "engine = open_database(sys.argv[1])\n"
        "with reading(engine) as connection: mine = id(connection.connection.driver_connection)\n"
        "child = os.fork()\n"
        "with reading(engine) as connection:\n"
        "    same = id(connection.connection.driver_connection) == mine\n"
        "    assert connection.scalar(text('SELECT count(*) FROM audit')) == 1\n"
        "    assert same == bool(child)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0)"
    )
    subprocess.run([sys.executable, "-c", code, engine.url.render_as_string()], check=True)
    assert engine.pool is pool
    assert count_entries(engine) == 1


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("records.db", "not a URL"),
        ("mysql://user:secret@host/name", "mysql is no database for FedChord"),
        ("postgresql+asyncpg://user:secret@host/name", "asyncpg is no database"),
        ("sqlite://", "name a file"),
        ("sqlite:///:memory:", "name a file"),
        ("secret@:://", "not a URL"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str, said: str) -> None:
    with pytest.raises(InvalidSettings, match=said) as raised:
        open_database(url)
    assert "secret" not in str(raised.value)


def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    url = "postgresql://user:secret@127.0.0.1:1/name"  # nothing listens on port 1
    with pytest.raises(DatabaseUnavailable, match=r"user:\*\*\*@127\.0\.0\.1:1/name.*refused") as raised:
        open_database(url)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_something_else_is_told(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(DatabaseUnavailable, match="not an SQLite database; name another file"):
        open_database(f"sqlite:///{path}")
    assert path.read_bytes() == b"not a database" * 100


def test_a_place_that_cannot_hold_the_file_is_told(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(DatabaseUnavailable, match="cannot be opened; check the folder"):
        open_database(f"sqlite:///{path}")
    file = path / "file"
    file.touch()
    with pytest.raises(DatabaseUnavailable, match="cannot be made"):
        open_database(f"sqlite:///{file}/records.db")


def test_opening_waits_for_a_process_that_is_writing_to_a_file_without_a_log(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable, match="locked it for too long"):
            open_database(f"sqlite:///{path}", busy_timeout_seconds=0.05)
        release = threading.Timer(0.1, other.execute, ["ROLLBACK"])
        release.start()
        open_database(f"sqlite:///{path}").dispose()
        release.join()


def test_a_writer_that_waits_too_long_gives_up_and_a_reader_need_not_wait(engine: Engine, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable, match="locked it for too long"):
            add_entry(engine)
        assert count_entries(engine) == 0
        other.execute("ROLLBACK")
    add_entry(engine)
    assert count_entries(engine) == 1


def test_a_full_disk_is_told_and_nothing_is_half_written(engine: Engine) -> None:
    def fill() -> None:
        with writing(engine) as connection:
            connection.execute(insert(audit), ENTRY)
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")  # what a disk without space does
            connection.execute(insert(audit), ENTRY | {"subject": "x" * 100_000})

    with pytest.raises(DiskFull, match="free some space"):
        fill()
    assert count_entries(engine) == 0


def test_a_mistake_in_a_statement_stays_what_it_is(engine: Engine) -> None:
    with reading(engine) as connection, pytest.raises(OperationalError, match="no such table"):
        connection.execute(text("SELECT * FROM mistake"))


def test_more_threads_than_connections_are_told(engine: Engine) -> None:
    engine.pool._timeout = 0  # type: ignore[attr-defined]  # seconds, 30 otherwise
    held = [engine.connect() for _ in range(15)]  # SQLAlchemy's pool of 5, and 10 more
    with pytest.raises(DatabaseUnavailable, match="run fewer threads"):
        count_entries(engine)
    for connection in held:
        connection.close()


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("SELECT * FROM model_info WHERE store = '' ORDER BY sequence DESC", "ix_model_info_store_sequence"),
        (
            "SELECT * FROM model_info WHERE store = '' AND model_state = 10 ORDER BY sequence DESC",
            "ix_model_info_store_model_state_sequence",
        ),
        (
            "SELECT * FROM model_info WHERE store = '' AND model_kind = '' ORDER BY sequence DESC",
            "ix_model_info_store_model_kind_sequence",
        ),
        (
            "SELECT * FROM model_info WHERE store = '' AND round = 1 ORDER BY sequence DESC",
            "ix_model_info_store_round_sequence",
        ),
        (
            "SELECT * FROM model_info WHERE store = '' ORDER BY start_datetime DESC NULLS LAST, sequence DESC",
            "ix_model_info_store_start_datetime_sequence",
        ),
        (
            "SELECT * FROM model_info WHERE store = '' ORDER BY created_at ASC NULLS FIRST, sequence ASC",
            "ix_model_info_store_created_at_sequence",
        ),
        (
            "SELECT * FROM model_info WHERE store = '' AND origin_node = '' AND origin_model_id = ''",
            "ix_model_info_origin",
        ),
        ("SELECT * FROM model_info WHERE model_hash = '' ORDER BY sequence DESC", "ix_model_info_model_hash"),
        ("SELECT * FROM model_info WHERE job_id = '' ORDER BY sequence DESC", "ix_model_info_job_id_sequence"),
        ("SELECT * FROM rounds WHERE state = '' AND deadline_at < ''", "ix_rounds_state_deadline_at"),
    ],
)
def test_what_is_asked_often_is_read_from_an_index_in_order(engine: Engine, query: str, index: str) -> None:
    with reading(engine) as connection:
        plan = [row.detail for row in connection.execute(text(f"EXPLAIN QUERY PLAN {query}"))]
    assert len(plan) == 1  # a sort would be a second step
    assert f"USING INDEX {index}" in plan[0]


def test_the_newest_that_each_origin_fed_back_are_read_from_an_index_alone(engine: Engine) -> None:
    query = """SELECT max(sequence) FROM model_info WHERE store = '' AND model_state = 20 AND round = 1
        GROUP BY tenant_id, site, origin_node"""
    with reading(engine) as connection:
        plan = [row.detail for row in connection.execute(text(f"EXPLAIN QUERY PLAN {query}"))]
    assert plan == ["SEARCH model_info USING COVERING INDEX ix_model_info_feedbacked (store=? AND round=?)"]


def test_json_is_read_as_it_was_written_and_nothing_stays_nothing(engine: Engine) -> None:
    details: list[object] = [{}, [], {"a": [1, 2.5, None, "é"]}, "", 0, False]
    with writing(engine) as connection:
        for detail in details:
            connection.execute(insert(audit), ENTRY | {"detail": detail})
        assert list(connection.scalars(select(audit.c.detail).order_by(audit.c.id))) == details
        connection.execute(insert(model_info), _model_without_location())
        assert connection.scalar(select(model_info.c.location)) is None


def _model_without_location() -> dict[str, object]:
    texts = dict.fromkeys(("model_id", "store", "tenant_id", "model_kind", "model_description", "model_hash"), "")
    numbers = dict.fromkeys(("model_state", "model_size", "round", "hop_count"), 10)
    return {**texts, **numbers, "model_meta": {}, "parents": [], "metrics": {}, "shards": []}
