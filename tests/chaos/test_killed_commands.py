"""`fedchord submit` and `fedchord abort` are killed before and after everything that others can see."""

import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from coordinator.jobs import Job, JobState, find_jobs
from coordinator.submitting import submit
from store.database import reading
from store.tables import outbox
from tests.chaos import play, processes
from tests.chaos.table import SAME, Table, failed_at_once
from tests.federation import Federation, federation, wait_until
from tests.integration.test_recovery import train

SHORT = 3  # points of each command that are tried in `make test`
JOB = """
name = "{name}"
trainer = "constant"
rounds = 4
test_every = 2
swag = true
min_sites = 2
round_deadline_seconds = 600

[initial_model]
file = "initial.safetensors"
"""


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path, *play.SITES) as made, play.playing(made):
        coordinator = processes.coordinator(made)
        with processes.running(coordinator):
            processes.wait_ready(coordinator)
            yield made


def run_killed(made: Federation, point: str | None, *arguments: str) -> list[str] | None:
    """Run a command that dies at the point, or not at all; return the points that it passed, None if it lived."""
    program = processes.command(made, *arguments)
    (program.folder / "passed").unlink(missing_ok=True)
    if point is not None:
        program.aim(point)
    code = program.start().wait(60)
    if point is not None and not program.is_hit():
        program.spare()
        return None
    assert code == (-signal.SIGKILL if point is not None else 0), program.said()
    return program.passed()


def try_points(made: Federation, full: bool, seed: int, run: Callable[[str | None], list[str] | None]) -> Iterator[str]:
    """Run the command at peace, then killed at its points; give each point."""
    points = run(None)
    assert points
    for point in points if full else random.Random(seed).sample(points, SHORT):
        # a notice that the coordinator's sweep has sent first is no point of the command's
        wait_until(partial(run, point), seconds=60, what=point)
        yield point


def jobs_named(made: Federation, name: str) -> list[Job]:
    with reading(made.services.engine) as connection:
        return [job for job in find_jobs(connection) if job.name == name]


@pytest.mark.timeout(600)
def test_a_submission_killed_at_any_step_is_there_whole_or_not_at_all(
    made: Federation, full: bool, seed: int, table: Table
) -> None:
    save_file(train("alpha", 0, {})[0], made.folder / "initial.safetensors")
    file = made.folder / "job.toml"
    numbers = count()

    def run(point: str | None) -> list[str] | None:
        name = f"submitted {next(numbers)}"
        file.write_text(JOB.format(name=name))
        passed = run_killed(made, point, "submit", str(file))
        if not jobs_named(made, name):  # then it is submitted again
            run_killed(made, None, "submit", str(file))
        (job,) = jobs_named(made, name)
        made.wait(job.job_id, "completed", "failed", seconds=60)
        wait_until(play.is_played(made, job.job_id), what="the last notice")
        return passed

    for point in try_points(made, full, seed, run):
        table.record("`fedchord submit` killed, and called again if it recorded no job", point, SAME)


@pytest.mark.timeout(600)
def test_an_abort_killed_at_any_step_is_done_whole_or_not_at_all(
    made: Federation, full: bool, seed: int, table: Table
) -> None:
    def run(point: str | None) -> list[str] | None:
        job = submit(made.services, play.spec(made, rounds=100_000, test_every=0))
        wait_until(lambda: made.job(job.job_id).current_round > 0, what="a round")
        passed = run_killed(made, point, "abort", job.job_id)
        if made.job(job.job_id).state is JobState.RUNNING:  # then it is asked for again
            run_killed(made, None, "abort", job.job_id)
        ended = made.job(job.job_id)
        assert (ended.state, ended.reason) == (JobState.ABORTED, "by the operator")
        wait_until(lambda: told(made, job.job_id) == set(play.SITES), what="the sites to be told")
        return passed

    for point in try_points(made, full, seed, run):
        outcome = failed_at_once("“by the operator”")
        table.record("`fedchord abort` killed, and called again if the job went on", point, outcome)


def told(made: Federation, job_id: str) -> set[str]:
    """Return the sites to whom the notice of the job's end was sent."""
    with reading(made.services.engine) as connection:
        rows = connection.execute(outbox.select().where(outbox.c.job_id == job_id)).mappings()
        return {row["site"] for row in rows if row["kind"] == "TRAINING_FINISHED" and row["sent_at"]}
