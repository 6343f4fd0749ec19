"""A site's worker is killed or stopped while it trains, comes late, or never comes back."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.jobs import Job
from coordinator.submitting import submit
from tests.chaos import processes
from tests.chaos.invariants import accepted_sites, check_always, check_ended
from tests.chaos.processes import Program
from tests.chaos.table import Table, failed_at_once
from tests.federation import Federation, federation, wait_until

NAMES = ("alpha", "beta", "gamma")
ROUNDS = 3


@dataclass(kw_only=True)
class Fleet:
    """A federation with one coordinator and its sites as processes."""

    made: Federation
    sites: dict[str, Program]
    notes: Path

    def submit(
        self, *, rounds: int = ROUNDS, seconds: float = 0.4, deadline_seconds: float = 60, min_sites: int = 2
    ) -> Job:
        """Submit a job whose rounds take so long."""
        return submit(
            self.made.services,
            self.made.spec(
                trainer="slow",
                rounds=rounds,
                min_sites=min_sites,
                round_deadline_seconds=deadline_seconds,
                config={"seconds": seconds, "notes": str(self.notes)},
            ),
        )

    def began(self, site: str) -> list[int]:
        """Return the rounds whose training the site has begun, each as often as it did."""
        path = self.notes / f"{site}.began"
        return [int(line.split()[1]) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_training(self, site: str, number: int) -> None:
        """Wait until the site trains in the round."""
        wait_until(lambda: number in self.began(site), seconds=60, what=f"{site} to train in round {number}")


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    tmp_path = tmp_path_factory.mktemp("fleet")
    with federation(tmp_path, *NAMES) as made, ExitStack() as stack:
        coordinator = processes.coordinator(made)
        sites = {name: processes.site(made, name) for name in NAMES}
        notes = tmp_path / "notes"
        notes.mkdir()
        stack.enter_context(processes.running(coordinator, *sites.values()))
        processes.wait_ready(coordinator, *sites.values())
        yield Fleet(made=made, sites=sites, notes=notes)


@pytest.fixture
def fleet(lent: Fleet) -> Fleet:
    """Lend the same processes to each test, every site alive."""
    for program in lent.sites.values():
        if not program.is_running:
            program.start()
    wait_until(lambda: lent.made.alive() == set(NAMES), seconds=60, what="all sites to be alive")
    for path in lent.notes.iterdir():
        path.unlink()
    return lent


def finish(fleet: Fleet, job: Job, *, rounds: int = ROUNDS) -> dict[int, tuple[str, ...]]:
    """Wait for the job's end, check it, and return who counted in each round."""
    fleet.made.wait(job.job_id, "completed", "failed", "aborted", seconds=100)
    check_ended(fleet.made, job.job_id, num_rounds=rounds, whole_chain=True)
    check_always(fleet.made)
    return accepted_sites(fleet.made, job.job_id)


@pytest.mark.parametrize(
    ("what", "disturb"),
    [
        ("a site's child killed", Program.kill_child),
        ("a site's worker killed, its children end with it", Program.kill_parent),
        ("a site's worker and its children killed", Program.kill),
    ],
    ids=["child", "parent", "group"],
)
def test_a_site_that_is_killed_while_it_trains_does_its_part_again(
    fleet: Fleet, table: Table, what: str, disturb: Callable[[Program], None]
) -> None:
    job = fleet.submit(seconds=1)
    fleet.wait_training("beta", 2)
    disturb(fleet.sites["beta"])
    if not fleet.sites["beta"].is_running:
        fleet.sites["beta"].start()
    assert finish(fleet, job) == dict.fromkeys(range(1, ROUNDS + 1), NAMES)
    assert fleet.began("beta").count(2) >= 2
    table.record(what, "while it trains, and started again")


def test_a_site_that_never_comes_back_is_not_waited_for_beyond_the_deadline(fleet: Fleet, table: Table) -> None:
    job = fleet.submit(deadline_seconds=5)
    fleet.wait_training("beta", 2)
    fleet.sites["beta"].kill()
    accepted = finish(fleet, job)
    assert accepted == {1: NAMES, 2: ("alpha", "gamma"), 3: ("alpha", "gamma")}
    table.record("a site killed, and gone for ever", "while it trains, the others are a quorum")


def test_a_site_that_is_needed_and_never_comes_back_is_named(fleet: Fleet, table: Table) -> None:
    job = fleet.submit(deadline_seconds=3, min_sites=3)
    fleet.wait_training("beta", 2)
    fleet.sites["beta"].kill()
    ended = fleet.made.wait(job.job_id, "completed", "failed")
    assert "the quorum is 3. beta dropped: no answer before the deadline" in ended.reason
    outcome = failed_at_once("“the quorum is 3. beta dropped: no answer before the deadline”")
    table.record("a site killed, and gone for ever", "while it trains, needed for the quorum; at the deadline", outcome)


def test_a_process_that_is_killed_again_and_again_does_not_stop_the_job(fleet: Fleet, table: Table) -> None:
    job = fleet.submit(seconds=2)
    for number in (1, 2, 3):
        wait_until(lambda number=number: fleet.began("beta").count(1) == number, seconds=60, what="beta to begin")
        fleet.sites["beta"].kill_child()
    accepted = finish(fleet, job)
    assert {"alpha", "gamma"} <= set(accepted[1])  # beta's part has failed, or was asked for again
    assert (accepted[2], accepted[3]) == (NAMES, NAMES)
    table.record("the site's process at work killed, three times in a row", "while it trains, the others are a quorum")


def test_a_site_that_stands_still_for_a_while_counts_all_the_same(fleet: Fleet, table: Table) -> None:
    job = fleet.submit()
    fleet.wait_training("beta", 2)
    fleet.sites["beta"].signal_all(signal.SIGSTOP)
    wait_for_silence(fleet, "beta")
    fleet.sites["beta"].signal_all(signal.SIGCONT)
    assert finish(fleet, job) == dict.fromkeys(range(1, ROUNDS + 1), NAMES)
    table.record("a site stands still until it counts as gone (SIGSTOP)", "while it trains")


def wait_for_silence(fleet: Fleet, site: str) -> None:
    """Wait until the site counts as gone."""
    wait_until(lambda: site not in fleet.made.alive(), seconds=30, what=f"{site} to be silent")


def test_a_site_that_comes_in_mid_job_takes_part_from_the_next_round_on(fleet: Fleet, table: Table) -> None:
    fleet.sites["gamma"].end()
    wait_for_silence(fleet, "gamma")
    job = fleet.submit(rounds=4, seconds=1.5)
    fleet.wait_training("alpha", 1)
    fleet.sites["gamma"].start()
    accepted = finish(fleet, job, rounds=4)
    assert accepted[1] == ("alpha", "beta")
    assert accepted[4] == NAMES
    table.record("a site comes later", "in mid-job")
