"""Facts about what expires, what never does, and what comes of the bytes, over every kind of database and store."""

import io
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, insert, select, update

from common.errors import Conflict, NotFound, StoreUnavailable
from common.settings import Settings
from store import garbage, s3
from store.blobs import Blob, hash_bytes
from store.database import reading, writing
from store.garbage import UNNAMED, clean, find_unused, kinds_of, remove_unused
from store.keeping import keep_model, lineage_ids, stop_keeping
from store.lineage import lineage
from store.local import LocalApi
from store.models import ModelInfo, ModelState, add_model, delete_model, find_models, get_model, new_model_id
from store.opening import OpenStore, open_store
from store.retention import expire, find_due
from store.tables import jobs, model_info, parts, quarantine, rounds, utc_now
from store.tenants import operator
from tests.servers import S3Server
from tests.workplace import wait_for

DDC = "ddc:digits"
DAY = 24.0  # hours
NOTHING = {"keep_updates_days": 0, "keep_models_days": 0}  # is kept that can go


class Past:
    """A node whose jobs were done some time ago."""

    def __init__(self, store: OpenStore) -> None:
        self.store = store
        self.engine = store.engine
        self.api = LocalApi(store, operator(store.settings))
        self.api.initialize_model_store(DDC)

    def settings(self, **changes: Any) -> Settings:
        return self.store.settings.model_copy(update=changes)

    def blob(self, data: bytes) -> Blob:
        """Store the bytes, as long ago as anything can be."""
        path = self.store.blobs.scratch() / os.urandom(8).hex()
        path.write_bytes(data)
        return self.store.blobs.put(path)

    def job(self, *, ended_hours_ago: float | None = None, spec: dict[str, Any] | None = None) -> str:
        """Record a job; one that goes on if it has not ended."""
        job_id = new_model_id()
        ended = None if ended_hours_ago is None else utc_now() - timedelta(hours=ended_hours_ago)
        values = {"job_id": job_id, "name": "digits", "spec": spec or {}, "num_rounds": 3, "sites": []}
        with writing(self.engine) as connection:
            connection.execute(
                insert(jobs), {**values, "state": "running" if ended is None else "completed", "finished_at": ended}
            )
        return job_id

    def end(self, job_id: str, *, hours_ago: float) -> None:
        with writing(self.engine) as connection:
            ended = utc_now() - timedelta(hours=hours_ago)
            connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(state="completed", finished_at=ended))

    def go_on_from(self, job_id: str, model_id: str) -> None:
        with writing(self.engine) as connection:
            connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(model_id=model_id))

    def model(
        self,
        job_id: str | None,
        kind: str = "global",
        data: bytes | None = None,
        *,
        parents: Sequence[str] = (),
        site: str | None = None,
        hours_ago: float = 100 * DAY,
        meta: dict[str, Any] | None = None,
    ) -> str:
        """Record a model with bytes of its own, or with those that are given."""
        blob = self.blob(data or os.urandom(100))
        info = ModelInfo(
            store=DDC,
            model_kind=kind,
            model_state=ModelState.FEEDBACKED if site else ModelState.AGGREGATED,
            model_meta=meta or {},
            model_hash=blob.digest,
            model_size=blob.size,
            parents=tuple(parents),
            job_id=job_id,
            site=site,
            shards=(blob,),
            created_at=utc_now() - timedelta(hours=hours_ago),
        )
        with writing(self.engine) as connection:
            return add_model(connection, info).model_id

    def update_of(self, job_id: str | None, *parents: str, site: str = "alpha", **options: Any) -> str:
        return self.model(job_id, "update", parents=parents, site=site, **options)

    def get(self, model_id: str) -> ModelInfo:
        with reading(self.engine) as connection:
            return get_model(connection, model_id)

    def due(self, **settings: Any) -> set[str]:
        """Return the ids of what would expire, and let it expire: that is the same."""
        chosen = self.settings(**settings)
        found = find_due(self.engine, chosen)
        assert expire(self.engine, chosen) == found
        assert expire(self.engine, chosen) == []
        assert {each.model_id for each in found} <= self.expired()
        return {each.model_id for each in found}

    def expired(self) -> set[str]:
        with reading(self.engine) as connection:
            found = connection.scalars(select(model_info.c.model_id).where(model_info.c.expired_at.is_not(None)))
            return set(found)

    def expire_earlier(self, hours: float) -> None:
        """Let what has expired have done so some hours earlier."""
        with writing(self.engine) as connection:
            for model_id in self.expired():
                earlier = self.get(model_id).expired_at
                assert earlier is not None
                values = {"expired_at": earlier - timedelta(hours=hours)}
                connection.execute(update(model_info).where(model_info.c.model_id == model_id).values(**values))

    def collect(self) -> set[Blob]:
        """Remove what is unused, however new it is."""
        return set(remove_unused(self.engine, self.store.blobs, older_than_seconds=0))

    def blobs_of(self, *model_ids: str) -> set[Blob]:
        return {shard for model_id in model_ids for shard in self.get(model_id).shards}

    def chain(self, job_id: str, count: int, *, first: str | None = None) -> tuple[list[str], list[str]]:
        """Record a job's rounds; return its global models, and the updates that they were made of."""
        models, updates = ([first] if first else []), []
        for _ in range(count):
            made = [self.update_of(job_id, *models[-1:], site=site) for site in ("alpha", "beta")]
            models.append(self.model(job_id, parents=[*models[-1:], *made]))
            updates += made
        self.go_on_from(job_id, models[-1])
        return models, updates


@pytest.fixture(params=["sqlite-folder", "postgresql-folder", "sqlite-s3"])
def past(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Past]:
    database, blob_store = request.param.split("-")
    values: dict[str, Any] = {"database_url": f"sqlite:///{tmp_path}/records.db"}
    if database == "postgresql":
        values["database_url"] = request.getfixturevalue("postgres_server").new_database()
    if blob_store == "s3":
        server: S3Server = request.getfixturevalue("seaweedfs_server")
        values.update(
            blob_store="s3",
            s3_endpoint=server.endpoint,
            s3_access_key=server.access_key,
            s3_secret_key=server.secret_key,
            s3_bucket="retention",  # for all tests: SeaweedFS has room for a few buckets only
            s3_secure=False,
            cache_folder=tmp_path / "cache",
        )
    folders = {"blob_folder": tmp_path / "blobs", "store_key_file": tmp_path / "store.key"}
    with open_store(Settings(**values, **folders)) as store:
        for blob in list(store.blobs.blobs()):
            store.blobs.delete(blob.digest)
        yield Past(store)


# --- by age ----------------------------------------------------------------------------------------------------------


def test_updates_expire_so_long_after_their_job_and_models_stay(past: Past) -> None:
    old, young = past.job(ended_hours_ago=31 * DAY), past.job(ended_hours_ago=29 * DAY)
    _, updates = past.chain(old, 2)
    past.chain(young, 2)
    moments = past.model(old, "moments", site="alpha")
    whole = past.model(old, "moments")
    initial = past.model(old, "initial", site="beta")
    assert past.due() == {*updates, moments, initial}
    assert past.get(whole).expired_at is None
    assert past.get(moments).expired_reason == "keep_updates_days is 30, and its job ended longer ago."


def test_what_was_added_after_its_job_ended_counts_from_then(past: Past) -> None:
    job = past.job(ended_hours_ago=31 * DAY)
    early, late = past.update_of(job), past.update_of(job, hours_ago=29 * DAY)
    assert past.due() == {early}
    assert past.due(keep_updates_days=28) == {late}


def test_global_models_expire_when_asked_for_and_never_the_last(past: Past) -> None:
    models, updates = past.chain(past.job(ended_hours_ago=31 * DAY), 3)
    assert past.due(keep_models_days=30) == {*updates, *models[:-1]}


def test_nothing_expires_without_bounds(past: Past) -> None:
    past.chain(past.job(ended_hours_ago=1e5), 3)
    assert past.due(keep_updates_days=float("inf")) == set()


# --- by size ---------------------------------------------------------------------------------------------------------


def test_the_oldest_updates_go_until_the_rest_is_within_the_bound(past: Past) -> None:
    live, first, second = past.job(), past.job(ended_hours_ago=1), past.job(ended_hours_ago=2)
    past.update_of(live)
    updates = [past.update_of(job) for job in (first, second, first, second)]
    assert past.due(keep_updates_gigabytes=5e-7) == set()
    assert past.due(keep_updates_gigabytes=2.5e-7) == set(updates[:3])  # 100 bytes each, five of them
    assert past.get(updates[0]).expired_reason.startswith("keep_updates_gigabytes is 2.5e-07, and there was more")
    assert past.due(keep_updates_gigabytes=0) == {updates[3]}


def test_what_is_too_old_goes_first_and_counts_no_more(past: Past) -> None:
    young, old = past.job(ended_hours_ago=1), past.job(ended_hours_ago=40 * DAY)
    first = past.update_of(young)
    second = past.update_of(old)
    assert past.due(keep_updates_gigabytes=1e-7) == {second}
    assert past.due(keep_updates_gigabytes=0) == {first}


def test_final_models_do_not_count_as_too_much(past: Past) -> None:
    models, _ = past.chain(past.job(ended_hours_ago=2 * DAY), 3)
    assert past.due(keep_models_gigabytes=2e-7) == set()
    assert past.due(keep_models_gigabytes=1e-7) == {models[0]}
    assert past.due(keep_models_gigabytes=0) == {models[1]}


# --- never -----------------------------------------------------------------------------------------------------------


def test_nothing_of_a_job_that_goes_on_expires(past: Past) -> None:
    job = past.job()
    models, updates = past.chain(job, 3)
    assert past.due(**NOTHING, keep_updates_gigabytes=0, keep_models_gigabytes=0) == set()
    past.end(job, hours_ago=0)
    assert past.due(**NOTHING) == set(updates)  # sites may still hold references to the global models
    past.end(job, hours_ago=25)
    assert past.due(**NOTHING) == set(models[:-1])


def test_what_a_live_job_began_with_stays(past: Past) -> None:
    models, _ = past.chain(past.job(ended_hours_ago=2 * DAY), 5)
    submitted = past.job(spec={"initial_model": {"file": None, "model": models[0]}})
    past.go_on_from(past.job(), models[1])
    running = past.job()
    values = {"kind": "train", "state": "open", "group_id": "", "body_task_id": "", "deadline_at": utc_now()}
    with writing(past.engine) as connection:
        connection.execute(
            insert(rounds), {**values, "round_id": "r", "job_id": running, "number": 1, "input_model_id": models[2]}
        )
    assert past.due(keep_models_days=0, keep_updates_days=float("inf")) == {models[3]}
    past.end(submitted, hours_ago=1)
    assert past.due(keep_models_days=0, keep_updates_days=float("inf")) == {models[0]}


def test_what_a_job_was_left_with_stays_although_another_job_made_it(past: Past) -> None:
    models, _ = past.chain(past.job(ended_hours_ago=2 * DAY), 3)
    past.go_on_from(past.job(ended_hours_ago=2 * DAY), models[0])
    initial = past.model(made := past.job(ended_hours_ago=2 * DAY), "initial", site="alpha")
    past.go_on_from(made, initial)
    assert past.due(keep_models_days=0, keep_updates_days=1) >= {models[1]}
    assert past.expired().isdisjoint({models[0], models[2], initial})


def test_what_people_put_stays(past: Past) -> None:
    past.update_of(None)
    past.model(None)
    assert past.due(**NOTHING, keep_updates_gigabytes=0, keep_models_gigabytes=0) == set()


def test_an_optimizers_state_lives_as_long_as_its_global_model(past: Past) -> None:
    job = past.job(ended_hours_ago=2 * DAY)
    states = [past.model(job, "optimizer") for _ in range(3)]
    models = [past.model(job, meta={"optimizer": {"model_id": state}}) for state in states]
    past.go_on_from(job, models[2])
    lone = past.model(job, "optimizer")
    past.go_on_from(past.job(), models[0])
    assert past.due(keep_models_days=0) == {models[1], states[1], lone}
    with reading(past.engine) as connection:
        assert lineage_ids(connection, [models[2]]) == {models[2], states[2]}


def test_an_optimizers_state_counts_with_its_global_model(past: Past) -> None:
    job = past.job(ended_hours_ago=2 * DAY)
    states = [past.model(job, "optimizer") for _ in range(3)]
    models = [past.model(job, meta={"optimizer": {"model_id": state}}) for state in states]
    assert past.due(keep_models_gigabytes=4e-7) == {models[0], states[0]}


def test_what_is_kept_stays_with_all_it_comes_from(past: Past) -> None:
    first, _ = past.chain(past.job(ended_hours_ago=40 * DAY), 2)
    job = past.job(ended_hours_ago=40 * DAY)
    models, updates = past.chain(job, 3, first=first[0])
    unused = past.update_of(job, models[0])
    done = keep_model(past.engine, past.store.blobs, models[2], by="me")
    assert (done.model.kept, done.revived, done.gone) == (True, (), ())
    assert done.models == 1 + 2 + 1 + 2 + 1 + 2  # two rounds before it, and one of the first job
    gone = past.due(**NOTHING)
    with reading(past.engine) as connection:
        kept = {each.model_id for _, each in lineage(connection, models[2]).walk()}
    assert gone.isdisjoint(kept)
    assert gone >= {unused, *updates[4:]}
    assert len(kept) == done.models
    with pytest.raises(Conflict, match="--off"), writing(past.engine) as connection:
        delete_model(connection, models[2])
    assert stop_keeping(past.engine, models[2], by="me").model.kept is False
    assert past.due(**NOTHING) == kept - {models[-1], first[-1]}


def test_a_long_chain_takes_a_query_for_each_job(past: Past) -> None:
    job = past.job(ended_hours_ago=40 * DAY)
    before: list[str] = []
    values = {"store": DDC, "model_hash": "0" * 64, "model_size": 0, "job_id": job, "model_kind": "global"}
    with writing(past.engine) as connection:
        for _ in range(3000):
            before.append(add_model(connection, ModelInfo(**values, parents=tuple(before[-1:]))).model_id)
    statements: list[str] = []
    with reading(past.engine) as connection:
        event.listen(past.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
        assert lineage_ids(connection, [before[-1], "unknown"]) == {*before, "unknown"}
    assert len(statements) <= 3


# --- the bytes -------------------------------------------------------------------------------------------------------


def test_the_bytes_stay_for_some_hours_and_then_go(past: Past) -> None:
    models, updates = past.chain(past.job(ended_hours_ago=31 * DAY), 2)
    past.due()
    assert find_unused(past.engine, past.store.blobs, older_than_seconds=24 * 3600) == []
    assert b"".join(past.api.load_model(DDC, updates[0]))  # a download that begins, or goes on, now
    past.expire_earlier(1)
    gone = past.blobs_of(*updates)
    wait_for(
        lambda: set(find_unused(past.engine, past.store.blobs, older_than_seconds=1)) == gone,
        seconds=20,
        what="bytes are older than a second",
    )
    past.due()
    clean(past.settings(keep_unused_hours=24), past.engine, past.store.blobs)
    assert gone <= set(past.store.blobs.blobs())
    settings = past.settings(keep_unused_hours=1 / 3600)
    clean(settings, past.engine, past.store.blobs)
    assert set(past.store.blobs.blobs()) == past.blobs_of(*models)
    clean(settings, past.engine, past.store.blobs)
    assert set(past.store.blobs.blobs()) == past.blobs_of(*models)


def test_bytes_that_another_model_has_stay(past: Past) -> None:
    job = past.job(ended_hours_ago=31 * DAY)
    one, other = past.update_of(job, data=b"same"), past.update_of(job, data=b"own")
    put = past.api.put_model(DDC, io.BytesIO(b"same"))
    assert past.due() == {one, other}
    assert past.collect() == {hash_bytes(b"own")}
    assert b"".join(past.api.load_model(DDC, put["model_id"])) == b"same"
    assert b"".join(past.api.load_model(DDC, one)) == b"same"  # it has expired, and is there by chance


def test_bytes_that_are_held_in_quarantine_stay(past: Past) -> None:
    job = past.job(ended_hours_ago=31 * DAY)
    past.update_of(job, data=b"held")
    blob = hash_bytes(b"held")
    values = {"kind": "train", "state": "closed", "group_id": "", "body_task_id": "", "deadline_at": utc_now()}
    with writing(past.engine) as connection:
        connection.execute(insert(rounds), {**values, "round_id": "r", "job_id": job, "number": 1})
        part = {"task_id": "t", "round_id": "r", "job_id": job, "site": "alpha", "position": 0, "state": "quarantined"}
        connection.execute(insert(parts), part)
        entry = {"task_id": "t", "attempt": 1, "state": "held", "is_stored": True}
        connection.execute(insert(quarantine), {**entry, "found": [{"digest": blob.digest, "size": blob.size}]})
    past.due()
    assert past.collect() == set()


def test_who_asks_for_what_is_gone_is_told_when_and_why_it_went(past: Past) -> None:
    gone = past.update_of(past.job(ended_hours_ago=31 * DAY))
    past.due()
    past.collect()
    past.api.create_upstream_info(DDC, "http://127.0.0.1:9", "key", "secret", DDC)  # where nobody answers
    expected = r"expired on 20.* UTC: keep_updates_days is 30, .*its bytes were removed.*models keep"
    for ask in (past.api.load_model, past.api.prepare_download, past.api.feedback):
        with pytest.raises(NotFound, match=expected):
            ask(DDC, gone)
    info = past.api.get_model_info(DDC, gone)
    assert (info["expired_reason"][:17], info["expired_at"] is not None) == ("keep_updates_days", True)
    assert [each["model_id"] for each in past.api.get_models(DDC, {"!=": ["expired_at", None]})] == [gone]
    assert past.api.get_lineage(DDC, gone)[0]["expired_at"] == info["expired_at"]


def test_a_download_that_is_under_way_ends_although_the_bytes_are_removed(past: Past) -> None:
    data = os.urandom(5 << 20)
    model = past.update_of(past.job(ended_hours_ago=31 * DAY), data=data)
    blocks = past.api.load_model(DDC, model)
    begun = next(blocks)
    past.due()
    assert past.collect() == {hash_bytes(data)}
    assert begun + b"".join(blocks) == data


def test_what_has_expired_comes_back_while_its_bytes_are_there(past: Past) -> None:
    models, updates = past.chain(past.job(ended_hours_ago=31 * DAY), 2)
    past.due(**NOTHING)
    past.store.blobs.delete(past.get(updates[0]).model_hash)
    done = keep_model(past.engine, past.store.blobs, models[1], by="me")
    assert set(done.revived) == {models[0], *updates[1:]}
    assert done.gone == (updates[0],)
    assert past.expired() == {updates[0]}
    assert past.collect() == set()
    again = keep_model(past.engine, past.store.blobs, models[1], by="me")
    assert (again.revived, again.gone, again.models) == ((), done.gone, done.models)
    with pytest.raises(NotFound, match="expired on"):
        keep_model(past.engine, past.store.blobs, updates[0], by="me")
    assert not past.get(updates[0]).kept


def test_the_kinds_of_what_goes_are_told(past: Past) -> None:
    job = past.job(ended_hours_ago=31 * DAY)
    one = past.update_of(job)
    stray = past.blob(b"stray")
    due = [each.model_id for each in find_due(past.engine, past.store.settings)]
    told = find_unused(past.engine, past.store.blobs, older_than_seconds=0, expiring=due)
    assert kinds_of(past.engine, told, expiring=due) == {"update": [*past.blobs_of(one)], UNNAMED: [stray]}
    assert past.due() == set(due)
    removed = remove_unused(past.engine, past.store.blobs, older_than_seconds=0)
    assert set(removed) == set(told)
    assert kinds_of(past.engine, removed) == {"update": [*past.blobs_of(one)], UNNAMED: [stray]}


# --- at once, and cut short ------------------------------------------------------------------------------------------


def test_two_that_clean_at_once_remove_each_blob_once(past: Past) -> None:
    job = past.job(ended_hours_ago=31 * DAY)
    gone = past.blobs_of(*(past.update_of(job) for _ in range(50)))
    barrier = threading.Barrier(4)

    def run(_: int) -> tuple[int, list[Blob]]:
        barrier.wait()
        expired = expire(past.engine, past.store.settings)
        return len(expired), remove_unused(past.engine, past.store.blobs, older_than_seconds=0)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, range(4)))
    assert sorted(count for count, _ in found) == [0, 0, 0, 50]
    removed = [blob for _, blobs in found for blob in blobs]
    assert len(removed) == len(set(removed)) == len(gone)


class KilledError(BaseException):
    """The process ends here."""


def clean_until(past: Past, deletions: int) -> None:
    """Clean, and be killed after so many blobs were removed."""
    delete = past.store.blobs.delete
    left = iter(range(deletions))

    def delete_or_die(digest: str, **options: float) -> bool:
        if next(left, None) is None:
            raise KilledError
        return delete(digest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(past.store.blobs, "delete", delete_or_die)
        expire(past.engine, past.store.settings)
        remove_unused(past.engine, past.store.blobs, older_than_seconds=0)


def test_a_kill_between_the_steps_is_made_up_for_by_the_next_run(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    models, updates = past.chain(past.job(ended_hours_ago=31 * DAY), 3)
    monkeypatch.setattr(garbage, "_LOCKED_SECONDS", 0.0)  # a transaction for each blob
    for deletions in (0, 1, 2):  # after the expiry, and then after one blob, and two more
        with pytest.raises(KilledError):
            clean_until(past, deletions)
        assert past.expired() == set(updates)
        assert past.blobs_of(*models) <= set(past.store.blobs.blobs())
    assert len(set(past.store.blobs.blobs())) == len(models) + len(updates) - 3
    past.collect()
    assert set(past.store.blobs.blobs()) == past.blobs_of(*models)


def test_what_is_kept_in_the_moment_of_expiring_stays_or_comes_back(past: Past) -> None:
    for _ in range(10):
        models, _ = past.chain(past.job(ended_hours_ago=31 * DAY), 2)
        with ThreadPoolExecutor(2) as threads:
            keeping = threads.submit(keep_model, past.engine, past.store.blobs, models[-1], by="me")
            expiring = threads.submit(expire, past.engine, past.settings(**NOTHING))
            keeping.result(30)
            expiring.result(30)
        with reading(past.engine) as connection:
            assert lineage_ids(connection, [models[-1]]).isdisjoint(past.expired())
    assert past.collect() == set()


def test_a_model_that_is_put_of_bytes_that_have_expired_has_them(past: Past) -> None:
    job = past.job(ended_hours_ago=31 * DAY)
    for number in range(10):
        data = b"again %d" % number
        past.update_of(job, data=data)
        past.due()
        with ThreadPoolExecutor(2) as threads:
            put = threads.submit(past.api.put_model, DDC, io.BytesIO(data))
            threads.submit(remove_unused, past.engine, past.store.blobs, older_than_seconds=0).result(30)
        error = put.exception(30)
        if error is None:
            assert b"".join(past.api.load_model(DDC, put.result()["model_id"])) == data
        else:  # its bytes went first, and it says so
            assert isinstance(error, StoreUnavailable), error
            assert "put them again" in error.message


def test_bytes_that_were_put_again_after_the_look_stay(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    job = past.job(ended_hours_ago=31 * DAY)
    past.update_of(job, data=b"again")
    past.due()
    past.expire_earlier(1)
    monkeypatch.setattr(s3, "_CLOCK_SECONDS", 0.0)  # seconds are old here
    blob = hash_bytes(b"again")

    def is_seen() -> bool:
        return find_unused(past.engine, past.store.blobs, older_than_seconds=2) == [blob]

    wait_for(is_seen, seconds=20, what="the bytes are old")
    seen = find_unused(past.engine, past.store.blobs, older_than_seconds=2)
    past.blob(b"again")  # as a job does whose round comes to the same, and whose record comes later
    monkeypatch.setattr(garbage, "find_unused", lambda *_, **__: seen)
    assert remove_unused(past.engine, past.store.blobs, older_than_seconds=2) == []
    assert past.store.blobs.find(blob.digest) == blob


def test_every_record_stays(past: Past) -> None:
    models, updates = past.chain(past.job(ended_hours_ago=31 * DAY), 3)
    past.due(**NOTHING)
    past.collect()
    with reading(past.engine) as connection:
        assert {model.model_id for model in find_models(connection)} == {*models, *updates}
        assert len(list(lineage(connection, models[-1]).walk())) > len(models)
