"""A machine of jobs, models and clean-ups: whatever happens in whatever order, no needed blob ever goes."""

import os
import tempfile
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from sqlalchemy import insert, update

from common.errors import Conflict, NotFound
from common.settings import Settings
from store.database import writing
from store.garbage import find_unused, remove_unused
from store.keeping import keep_model, stop_keeping
from store.models import ModelInfo, add_model, delete_model, new_model_id
from store.opening import open_store
from store.retention import expire, find_due
from store.tables import jobs, model_info, utc_now

GRACE_HOURS = 2
CONTENTS = st.integers(0, 5).map(lambda number: b"content %d" % number)  # few, so that models share them


class Node(RuleBasedStateMachine):
    """A node, and beside it what a person would say of each of its models."""

    live = Bundle("live")
    models = Bundle("models")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.store = open_store(
            Settings(
                database_url=f"sqlite:///{root}/records.db",  # type: ignore[arg-type]
                blob_folder=root / "blobs",
                store_key_file=root / "store.key",
                reference_seconds=3600,
            )
        )
        self.known: dict[str, ModelInfo] = {}  # every model that is recorded
        self.jobs: dict[str, str | None] = {}  # the model that each job is at
        self.began: dict[str, str] = {}  # the model that a job began with
        self.ended: set[str] = set()
        self.kept: set[str] = set()
        self.lost: set[str] = set()  # models whose bytes may be gone by now
        self.seen: dict[str, int] = {}  # by model that expired: for how many hours

    def teardown(self) -> None:
        """Leave nothing."""
        self.store.close()
        self.folder.cleanup()

    @rule(target=live, begins=st.none() | models)
    def submit(self, begins: str | None) -> Any:
        """Begin a job, perhaps from a model; one that was deleted or has expired is refused."""
        if begins is not None and (begins not in self.known or begins in self.seen):
            return multiple()
        return self._submit(begins)

    @rule(target=models, begins=st.none() | models, hours=st.integers(0, 3), data=st.lists(CONTENTS, max_size=3))
    def do_job(self, begins: str | None, hours: int, data: list[bytes]) -> Any:
        """Do a whole job, which ended some hours ago."""
        if begins is not None and (begins not in self.known or begins in self.seen):
            return multiple()
        job_id = self._submit(begins)
        made = []
        for each in data:
            sent = self.send_update(job_id, each)
            made += [sent, self.close_round(job_id, b"made of " + each, [sent], optimizes=True)]
        self.end(job_id, hours)
        return multiple(*made)

    def _submit(self, model_id: str | None) -> str:
        job_id = new_model_id()
        values = {"job_id": job_id, "name": "digits", "state": "running", "num_rounds": 1, "sites": []}
        with writing(self.store.engine) as connection:
            spec = {"initial_model": {"model": model_id}}
            connection.execute(insert(jobs), {**values, "spec": spec, "model_id": model_id})
        self.jobs[job_id] = model_id
        if model_id is not None:
            self.began[job_id] = model_id
        return job_id

    @rule(target=models, job_id=live, data=CONTENTS)
    def send_update(self, job_id: str, data: bytes) -> str:
        """Accept an update."""
        at = self.jobs[job_id]
        return self._add(job_id, "update", data, parents=(at,) if at else (), site="alpha")

    @rule(target=models, job_id=live, data=CONTENTS, parents=st.lists(models, max_size=3), optimizes=st.booleans())
    def close_round(self, job_id: str, data: bytes, parents: list[str], optimizes: bool) -> str:
        """Make a global model, perhaps with the state of an optimizer."""
        meta: dict[str, Any] = {}
        if optimizes:
            meta["optimizer"] = {"model_id": self._add(job_id, "optimizer", b"state of " + data)}
        at = self.jobs[job_id]
        model_id = self._add(job_id, "global", data, parents=(*([at] if at else []), *parents), meta=meta)
        self.jobs[job_id] = model_id
        with writing(self.store.engine) as connection:
            connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(model_id=model_id))
        return model_id

    @rule(target=models, data=CONTENTS)
    def put(self, data: bytes) -> str:
        """Put a model that no job has made."""
        return self._add(None, "weights", data)

    def _add(
        self,
        job_id: str | None,
        kind: str,
        data: bytes,
        *,
        parents: tuple[str, ...] = (),
        site: str | None = None,
        meta: dict[str, Any] | None = None,
    ) -> str:
        path = self.store.blobs.scratch() / new_model_id()
        path.write_bytes(data)
        blob = self.store.blobs.put(path)
        info = ModelInfo(
            store="ddc:digits",
            model_kind=kind,
            model_meta=meta or {},
            model_hash=blob.digest,
            model_size=blob.size,
            parents=parents,
            job_id=job_id,
            site=site,
            shards=(blob,),
        )
        with writing(self.store.engine) as connection:
            self.known[info.model_id] = add_model(connection, info)
        return info.model_id

    @rule(job_id=consumes(live), hours=st.integers(0, 3))
    def end(self, job_id: str, hours: int) -> None:
        """End a job, some hours ago."""
        with writing(self.store.engine) as connection:
            ended = {"state": "completed", "finished_at": utc_now() - timedelta(hours=hours)}
            connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(**ended))
        self.ended.add(job_id)

    @rule(model_id=models, keeps=st.booleans())
    def keep(self, model_id: str, keeps: bool) -> None:
        """Keep a model, or keep it no more."""
        with suppress(NotFound):
            if not keeps:
                stop_keeping(self.store.engine, model_id, by="me")
                self.kept.discard(model_id)
                return
            done = keep_model(self.store.engine, self.store.blobs, model_id, by="me")
            self.kept.add(model_id)
            self.lost -= set(done.revived)
            for revived in done.revived:
                self.seen.pop(revived, None)
            assert set(done.gone) <= self.lost

    @rule(model_id=models)
    def delete(self, model_id: str) -> None:
        """Delete a model, unless that is refused."""
        with suppress(NotFound, Conflict):
            with writing(self.store.engine) as connection:
                delete_model(connection, model_id)
            assert model_id not in self.kept
            self.known.pop(model_id)
            self.seen.pop(model_id, None)
            self.lost.discard(model_id)

    @rule(hours=st.integers(1, 5))
    def wait(self, hours: int) -> None:
        """Let time pass: everything is so much older."""
        older = timedelta(hours=hours)
        with writing(self.store.engine) as connection:
            for table, column, key in (
                (jobs, jobs.c.finished_at, jobs.c.job_id),
                (model_info, model_info.c.expired_at, model_info.c.model_id),
                (model_info, model_info.c.created_at, model_info.c.model_id),
            ):
                for name, at in connection.execute(table.select().with_only_columns(key, column)).all():
                    if at is not None:
                        connection.execute(update(table).where(key == name).values({column.name: at - older}))
        self.seen = {model_id: hours + before for model_id, before in self.seen.items()}

    @rule(days=st.sampled_from([0, 0.1, 1e9]), gigabytes=st.sampled_from([1e9, 6e-8, 0]), collects=st.booleans())
    def clean(self, days: float, gigabytes: float, collects: bool) -> None:
        """Clean up, and perhaps be killed between the two steps; a look at it first says what it will do."""
        chosen = self.store.settings.model_copy(
            update={
                "keep_updates_days": days,
                "keep_models_days": days,
                "keep_updates_gigabytes": gigabytes,
                "keep_models_gigabytes": gigabytes,
            }
        )
        needed = self._needed()
        due = find_due(self.store.engine, chosen)
        assert expire(self.store.engine, chosen) == due
        ids = {each.model_id for each in due}
        assert ids.isdisjoint(needed)
        self.seen.update(dict.fromkeys(ids, 0))
        if not collects:
            return
        for path in (self.store.settings.blob_folder / "blobs").iterdir():  # all of them are old files
            os.utime(path, (0, 0))
        seconds = GRACE_HOURS * 3600
        told = find_unused(self.store.engine, self.store.blobs, older_than_seconds=seconds)
        assert set(remove_unused(self.store.engine, self.store.blobs, older_than_seconds=seconds)) == set(told)
        self.lost |= {model_id for model_id, hours in self.seen.items() if hours >= GRACE_HOURS}
        there = set(self.store.blobs.blobs())
        wanted = {shard for model_id in self.known.keys() - self.lost for shard in self.known[model_id].shards}
        assert there == wanted  # nothing that is needed is gone, and nothing else is left

    @invariant()
    def nothing_that_is_needed_is_gone(self) -> None:
        """Look for the blobs of every model that must have them."""
        there = set(self.store.blobs.blobs())
        for model_id in self.known.keys() - self.lost:
            assert set(self.known[model_id].shards) <= there

    def _needed(self) -> set[str]:
        """Return the models that must not expire, as a person would count them."""
        live = self.jobs.keys() - self.ended
        needed = {model_id for model_id, model in self.known.items() if model.job_id is None or model.job_id in live}
        needed |= {model_id for model_id in self.jobs.values() if model_id is not None}
        needed |= {self.began[job_id] for job_id in live if job_id in self.began}
        needed |= {state for model_id in needed for state in self._state_of(model_id)}
        waiting = list(self.kept)
        while waiting:
            model_id = waiting.pop()
            if model_id in self.known:
                needed.add(model_id)
                waiting += [*self.known[model_id].parents, *self._state_of(model_id)]
        return needed

    def _state_of(self, model_id: str) -> list[str]:
        model = self.known.get(model_id)
        return [model.model_meta["optimizer"]["model_id"]] if model and "optimizer" in model.model_meta else []


Node.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestNode = Node.TestCase
