"""Kill a program at point after point, start it again each time, and keep jobs going on meanwhile."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from coordinator.jobs import LIVE
from tests.chaos.processes import Program
from tests.federation import Federation, wait_until

REACH_SECONDS = 30.0  # for a point, the process's start included
END_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to die."""

    point: str
    number: int = 1  # of the pass at which it dies
    whole: bool = True  # False: of a site only the child dies


@dataclass(kw_only=True)
class Disturbed:
    """What was hit, and what was going on."""

    hit: list[Target] = field(default_factory=list)
    missed: list[Target] = field(default_factory=list)  # points that no process came to
    jobs: list[str] = field(default_factory=list)


def disturb(
    made: Federation, program: Program, targets: Iterable[Target], submit: Callable[[], str], *, in_turn: bool = False
) -> Disturbed:
    """Kill the program at each target while there is always a job; leave it running, and every job ended.

    With `in_turn` a job ends before the next target is aimed at, so that no part of it is hit twice.
    """
    done = Disturbed()
    for target in targets:
        _hit(made, program, target, submit, done)
        if in_turn:
            _end_jobs(made, program, done.jobs[-1:])
    _end_jobs(made, program, done.jobs)
    return done


def _end_jobs(made: Federation, program: Program, jobs: Sequence[str]) -> None:
    def have_ended() -> bool:
        if not program.is_running:  # the last target may have been in the parent, which takes a moment to end
            program.start()
        return not any(made.job(job_id).state in LIVE for job_id in jobs)

    wait_until(have_ended, seconds=END_SECONDS, what="the jobs to end")


def _hit(made: Federation, program: Program, target: Target, submit: Callable[[], str], done: Disturbed) -> None:
    program.aim(target.point, number=target.number, whole=target.whole)
    end = time.monotonic() + REACH_SECONDS
    while not (hit := program.is_hit()) and time.monotonic() < end:
        if not program.is_running:  # the target before this one may have been in the parent
            program.start()
        if not any(made.job(job_id).state in LIVE for job_id in done.jobs[-3:]):
            done.jobs.append(submit())
        time.sleep(0.02)
    if not hit:
        assert program.is_running, program.said()[-4000:]
        program.spare()
        done.missed.append(target)
        return
    done.hit.append(target)
    for key in made.services.broker.scan_iter("begun.*"):  # it was the test that has ended the process, not the message
        made.services.broker.delete(key)
    if target.whole:
        assert program.process is not None
        program.process.wait()
