"""Random faults at random moments, for some minutes, and what must be true after each of them.

    python -m tests.chaos.campaign --minutes 5 --seed 7

Two coordinators and four sites, all processes, run job after job, some at once: some wait for everybody, some ask more
sites than they need, some are asynchronous. Again and again something is killed, stopped, cut off, locked, filled up or
shuffled, and comes back; after each time the records are checked. At the end every job must have ended with the model
that comes of what was recorded, to the bit: the plain loop's or, with late updates, what `fedchord verify` recomputes.
The same seed gives the same faults in one order; the moments differ by how fast the machine is.
"""

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil

from common.errors import Conflict
from common.queues import COORDINATOR_QUEUE, site_queue
from coordinator.jobs import LIVE, Job
from coordinator.membership import join, leave
from tests.chaos import processes
from tests.chaos.imp import imp
from tests.chaos.invariants import check_always, check_ended, check_explained
from tests.chaos.processes import Program
from tests.chaos.services import locked
from tests.chaos.stages import Stage, pass_time, stage
from tests.chaos.table import Table
from tests.federation import wait_until

SITES = ("alpha", "beta", "gamma", "delta")
ROUNDS = 8
AT_ONCE = 2  # jobs
MOST_BYTES = 200_000  # of a file on a full disk: less than a model has
RULES: tuple[dict[str, object], ...] = (  # who counts
    {},
    {},
    {"participation": {"choose": "random", "target_sites": 2, "over_selection": 1.5}, "late": {"policy": "drop"}},
    {"participation": {"target_sites": 3}, "late": {"policy": "count"}},
    {"participation": {"target_sites": 2}, "late": {"policy": "keep", "max_staleness": 3}},
)
END_SECONDS = 180.0  # within which every job must have ended once nothing is disturbed any more


@dataclass(kw_only=True)
class Campaign:
    """What has been done so far."""

    here: Stage
    chance: random.Random
    log: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    jobs: list[Job] = field(default_factory=list)
    began_at: float = field(default_factory=time.monotonic)

    def say(self, words: str) -> None:
        """Note it with the time."""
        self.log.append(f"{time.monotonic() - self.began_at:7.2f} s  {words}")

    def keep_busy(self) -> None:
        """Submit jobs until there are enough at once."""
        live = [job for job in self.jobs if self.here.made.job(job.job_id).state in LIVE]
        for _ in range(AT_ONCE - len(live)):
            changes = {
                "test_every": self.chance.choice([0, 2]),
                "config": {"seconds": self.chance.choice([0.0, 0.1, 0.3]), "megabytes": self.chance.choice([0.1, 1])},
                "min_sites": 2,
            }
            job = self.here.submit(rounds=ROUNDS, **changes, **self.chance.choice(RULES))
            self.jobs.append(job)
            self.say(f"submitted {job.job_id[:8]}")

    def disturb(self) -> None:
        """Do one thing, and undo it."""
        faults = [each for each in FAULTS if each.__name__ not in self.unsuited()]
        fault = self.chance.choice(faults)
        self.say(f"begin: {fault.__name__}")
        for words in fault(self):
            self.say(f"  {words}")
        self.faults[(fault.__doc__ or "").partition("\n")[0].rstrip(".").lower()] += 1

    def unsuited(self) -> set[str]:
        """Return the faults that the stage has no service for."""
        if self.here.postgres is None:
            return {"kill_the_database", "take_the_store_away", "slow_the_store"}
        return {"lock_the_database", "jump_the_clock"}

    def a_coordinator(self) -> Program:
        """Return one of them."""
        return self.chance.choice(list(self.here.coordinators.values()))

    def a_site(self) -> Program:
        """Return one of them."""
        return self.chance.choice(list(self.here.sites.values()))

    def wait(self, longest: float) -> None:
        """Let some time pass; its length is what is tried."""
        pass_time(self.chance.uniform(0, longest))


def kill_a_coordinator(campaign: Campaign) -> Iterator[str]:
    """A coordinator killed, and started again."""
    program = campaign.a_coordinator()
    program.kill()
    yield "killed"
    campaign.wait(2)
    program.start()


def kill_both_coordinators(campaign: Campaign) -> Iterator[str]:
    """Both coordinators killed, and started again."""
    for program in campaign.here.coordinators.values():
        program.kill()
    yield "killed"
    campaign.wait(1)
    for program in campaign.here.coordinators.values():
        program.start()


def kill_at_a_step(campaign: Campaign) -> Iterator[str]:
    """A coordinator or a site killed at a step."""
    program = campaign.chance.choice([campaign.a_coordinator(), campaign.a_site()])
    if not (points := program.passed()):
        return
    point = campaign.chance.choice(points)
    yield point
    program.aim(point, whole=campaign.chance.random() < 0.7)
    pass_time(4, unless=lambda: (program.folder / "died").exists())
    yield "hit" if program.is_hit() else "not reached"
    program.spare()
    pass_time(0.2, unless=lambda: not program.is_running)
    if not program.is_running:
        program.start()


def stop_a_coordinator(campaign: Campaign) -> Iterator[str]:
    """A coordinator stands still for a while."""
    program = campaign.a_coordinator()
    program.signal_all(signal.SIGSTOP)
    yield "stopped"
    campaign.wait(4)
    program.signal_all(signal.SIGCONT)


def kill_a_site(campaign: Campaign) -> Iterator[str]:
    """A site killed, and started again."""
    program = campaign.a_site()
    how = campaign.chance.choice([Program.kill, Program.kill_parent, Program.kill_child])
    how(program)
    yield f"{how.__name__} {program.log.name}"
    campaign.wait(3)
    if not program.is_running:
        program.start()


def stop_a_site(campaign: Campaign) -> Iterator[str]:
    """A site stands still for a while."""
    program = campaign.a_site()
    program.signal_all(signal.SIGSTOP)
    yield f"stopped {program.log.name}"
    campaign.wait(4)
    program.signal_all(signal.SIGCONT)


def let_a_site_leave(campaign: Campaign) -> Iterator[str]:
    """A site taken out of a job by a command that is killed, and taken back."""
    made = campaign.here.made
    live = [job for job in campaign.jobs if made.job(job.job_id).state in LIVE]
    if not live:
        return
    job, site = campaign.chance.choice(live), campaign.chance.choice(SITES)
    command = processes.command(made, "leave", job.job_id, site)
    command.start()
    campaign.wait(2)
    command.kill()
    yield f"killed while {site} left {job.job_id[:8]}"
    with suppress(Conflict):  # the job has ended meanwhile
        if site in made.job(job.job_id).sites:
            leave(made.services, job.job_id, site, "it is called again")
        campaign.wait(1)
        join(made.services, job.job_id, site)


def lose_the_broker(campaign: Campaign) -> Iterator[str]:
    """The broker killed, and back with nothing."""
    campaign.here.broker.kill()
    yield "killed"
    campaign.wait(2)
    campaign.here.broker.start()


def take_the_broker_away(campaign: Campaign) -> Iterator[str]:
    """The broker away for a while."""
    how = campaign.chance.choice(["refuse", "hang"])
    getattr(campaign.here.broker_proxy, how)()
    yield how
    campaign.wait(4)
    campaign.here.broker_proxy.restore()


def shuffle_the_queues(campaign: Campaign) -> Iterator[str]:
    """The messages doubled and shuffled for a while."""
    url = f"redis://127.0.0.1:{campaign.here.broker.port}/0"
    queues = [COORDINATOR_QUEUE, *(site_queue(name) for name in SITES)]
    with imp(url, queues, seed=campaign.chance.randrange(2**31)) as doubled:
        campaign.wait(4)
    yield f"doubled {sum(doubled)} messages"


def lock_the_database(campaign: Campaign) -> Iterator[str]:
    """The database locked for a while."""
    with locked(campaign.here.made.folder / "fedchord.db"):
        yield "locked"
        campaign.wait(4)


def kill_the_database(campaign: Campaign) -> Iterator[str]:
    """The database killed, and back."""
    assert campaign.here.postgres is not None
    campaign.here.postgres.kill()
    yield "killed"
    campaign.wait(3)
    campaign.here.postgres.start_again()


def take_the_store_away(campaign: Campaign) -> Iterator[str]:
    """The object store away for a while, or answering 503."""
    assert campaign.here.store_proxy is not None
    how = campaign.chance.choice(["refuse", "hang", "answer_503"])
    getattr(campaign.here.store_proxy, how)()
    yield how
    campaign.wait(4)
    campaign.here.store_proxy.restore()


def slow_the_store(campaign: Campaign) -> Iterator[str]:
    """The object store slow, and cut off again and again."""
    assert campaign.here.store_proxy is not None
    campaign.here.store_proxy.degrade(bytes_per_second=5e6, cut_after_bytes=3_000_000)
    campaign.wait(4)
    yield f"{campaign.here.store_proxy.cuts} connections cut so far"
    campaign.here.store_proxy.restore()


def fill_the_disk(campaign: Campaign) -> Iterator[str]:
    """The disk of a coordinator full for a while."""
    program = campaign.a_coordinator()
    program.fill_disk(MOST_BYTES)
    yield "full"
    campaign.wait(3)
    program.fill_disk(None)


def jump_the_clock(campaign: Campaign) -> Iterator[str]:
    """The clocks of the coordinators jump by an hour, and back."""
    seconds = campaign.chance.choice([3600, -3600])
    for program in campaign.here.coordinators.values():
        program.set_clock(seconds)
    yield f"{seconds:+d} s"
    campaign.wait(3)
    for program in campaign.here.coordinators.values():
        program.set_clock(0)


FAULTS: tuple[Callable[[Campaign], Iterator[str]], ...] = (
    kill_a_coordinator,
    kill_both_coordinators,
    kill_at_a_step,
    kill_at_a_step,
    stop_a_coordinator,
    kill_a_site,
    kill_a_site,
    stop_a_site,
    let_a_site_leave,
    lose_the_broker,
    take_the_broker_away,
    shuffle_the_queues,
    lock_the_database,
    kill_the_database,
    take_the_store_away,
    slow_the_store,
    fill_the_disk,
    jump_the_clock,
)


def run(folder: Path, *, minutes: float, seed: int, services: bool, table: Table, say: Callable[[str], None]) -> None:
    """Run a campaign; raise AssertionError, with what was done, as soon as something is not as it must be."""
    before = set(psutil.Process().children(recursive=True))  # other tests' servers
    with ExitStack() as stack:
        here = stack.enter_context(stage(folder, *SITES, coordinators=2, services=services, seed=seed))
        campaign = Campaign(here=here, chance=random.Random(seed))
        try:
            _go(campaign, minutes)
        except BaseException:
            say(f"seed {seed}, what was done:\n" + "\n".join(campaign.log))
            raise
        for fault, runs in campaign.faults.items():
            table.record(fault, "at random moments of several jobs (campaign)", runs=runs)
        say(
            f"seed {seed}: {sum(campaign.faults.values())} faults of {len(campaign.faults)} kinds, "
            f"{len(campaign.jobs)} jobs, every one with the model that comes of what was recorded."
        )
    left = [each for each in psutil.Process().children(recursive=True) if each not in before and each.is_running()]
    left = [each for each in left if each.status() != psutil.STATUS_ZOMBIE]
    assert left == [], "processes are left"


def _go(campaign: Campaign, minutes: float) -> None:
    here = campaign.here
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        campaign.keep_busy()
        campaign.disturb()
        check_always(here.made)
        check_explained(here.made)
        campaign.wait(1.5)
    campaign.say("peace")
    here.revive()
    left = time.monotonic() + END_SECONDS
    for job in campaign.jobs:
        wait_until(
            lambda job=job: here.made.job(job.job_id).state not in LIVE,  # type: ignore[misc]
            seconds=max(1.0, left - time.monotonic()),
            what=f"job {job.job_id} to end",
        )
    for job in campaign.jobs:
        check_ended(here.made, job.job_id, num_rounds=ROUNDS, whole_chain=True)
    check_always(here.made, late_seconds=3)


@click.command(help="Disturb jobs at random for some minutes, and check that nothing is stuck, lost or done twice.")
@click.option("--minutes", type=float, default=5.0, show_default=True)
@click.option("--seed", type=int, default=None, help="Drawn and printed if it is not given.")
@click.option("--services", is_flag=True, help="Over PostgreSQL and SeaweedFS instead of SQLite and a folder.")
@click.option("--table", type=click.Path(path_type=Path), default=None, help="A folder for the rows.")
def main(minutes: float, seed: int | None, services: bool, table: Path | None) -> None:
    """Run a campaign."""
    chosen = random.randrange(2**32) if seed is None else seed
    click.echo(f"seed {chosen}")
    with tempfile.TemporaryDirectory(prefix="fedchord-campaign-") as folder:
        try:
            run(Path(folder), minutes=minutes, seed=chosen, services=services, table=Table(table), say=click.echo)
        except AssertionError as error:
            sys.exit(f"seed {chosen}: {error}")


if __name__ == "__main__":
    main()
