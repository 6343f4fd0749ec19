"""One job for one key, however many submit it at once: over SQLite and over a real PostgreSQL."""

import threading
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine

from coordinator.jobfile import JobSpec
from coordinator.jobs import add_job, find_jobs, find_submission, get_job, new_job
from store.database import reading, writing
from store.model_stores import add_store, find_store

SPEC = JobSpec(name="keys", trainer="t", rounds=0)
AT_ONCE = 8


def submit(engine: Engine, key: str | None, together: threading.Barrier | None = None) -> str:
    """Record a job as `submitting.submit` does; return the id of the one that counts."""
    job = new_job(SPEC, sites=("a",), model_id=None, submitted_by="", submission_key=key)
    if together is not None:
        together.wait()
    with writing(engine) as connection:
        recorded = add_job(connection, job)
        if recorded is job:
            add_store(connection, job.model_store)
        return recorded.job_id


def test_of_many_jobs_with_one_key_one_is_recorded(engine: Engine) -> None:
    together = threading.Barrier(AT_ONCE)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ids = set(pool.map(lambda _: submit(engine, "the-key", together), range(AT_ONCE)))
    with reading(engine) as connection:
        recorded = find_jobs(connection)
        assert {job.job_id for job in recorded} == ids
        assert len(recorded) == 1
        assert find_submission(connection, "the-key") == get_job(connection, recorded[0].job_id) == recorded[0]
        assert find_store(connection, "ddc:keys") is not None


def test_jobs_without_a_key_or_with_others_are_jobs_of_their_own(engine: Engine) -> None:
    ids = {submit(engine, key) for key in (None, None, "one", "two", "one")}
    assert len(ids) == 4
    with reading(engine) as connection:
        assert find_submission(connection, None) is None
        assert find_submission(connection, "three") is None
