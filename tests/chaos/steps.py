"""Kill the coordinator at point after point, start it again each time, and keep jobs going on meanwhile."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from unittest.mock import patch

from coordinator.jobs import LIVE
from coordinator.quarantine import keep_quarantine
from coordinator.submitting import submit
from tests.chaos import play, processes
from tests.chaos.processes import Program
from tests.federation import Federation, wait_until

REACH_SECONDS = 30.0  # for a point, the process's start included
END_SECONDS = 60.0


@dataclass(kw_only=True)
class Disturbed:
    """What was hit, and what was going on."""

    hit: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)  # points that no process came to
    jobs: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)  # all that were passed by any process


def record_points(made: Federation) -> list[str]:
    """Play one job undisturbed; return the points that it passes."""
    recorded = processes.coordinator(made, "recorded")
    with processes.running(recorded):
        job = submit(made.services, play.spec(made))
        made.wait(job.job_id, "completed", "failed", seconds=END_SECONDS)
        wait_until(play.is_played(made, job.job_id), what="the last notice")
    return recorded.passed()


def disturb(made: Federation, targets: Iterable[tuple[str, int]]) -> Disturbed:
    """Kill a coordinator at each target, a point and the number of its pass; let every job end, and check them all."""
    done = Disturbed()
    program = processes.coordinator(made)
    try:
        for point, number in targets:
            _hit(made, program, point, number, done)
        program.start()
        for job_id in done.jobs:
            made.wait(job_id, "completed", "failed", "aborted", seconds=END_SECONDS)
        with patch("coordinator.quarantine._PATIENCE_SECONDS", 0):  # the hourly look, now
            keep_quarantine(made.services)
        for job_id in done.jobs:
            wait_until(play.is_played(made, job_id), what="the last notice")
    finally:
        program.end()
    done.points = program.passed()
    return done


def _hit(made: Federation, program: Program, point: str, number: int, done: Disturbed) -> None:
    program.aim(point, number=number)
    program.start()
    end = time.monotonic() + REACH_SECONDS
    while program.is_running and time.monotonic() < end:
        if not any(made.job(job_id).state in LIVE for job_id in done.jobs[-3:]):
            done.jobs.append(submit(made.services, play.spec(made)).job_id)
        time.sleep(0.02)
    if program.is_hit():
        assert program.process is not None
        program.process.wait()
        done.hit.append(point)
    else:
        assert program.is_running, program.said()[-4000:]
        program.spare()
        program.kill()
        done.missed.append(point)
