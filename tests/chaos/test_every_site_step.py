"""A site, or its child alone, is killed before and after everything that others can see; the model is the same."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.invariants import accepted_sites, check_ended
from tests.chaos.stages import Stage, stage
from tests.chaos.steps import Target, disturb
from tests.chaos.table import Table

SITES = ("alpha", "beta")
ROUNDS = 3
SHORT = 5  # points that are tried in `make test`


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path, *SITES) as made:
        yield made


def submit(here: Stage) -> str:
    return here.submit(rounds=ROUNDS, test_every=1, trainer="constant").job_id


@pytest.mark.timeout(1800)
def test_a_site_killed_at_any_step_changes_no_bit(here: Stage, full: bool, seed: int, table: Table) -> None:
    chance = random.Random(seed)
    beta = here.sites["beta"]
    here.made.wait(submit(here), "completed", "failed")
    points = beta.passed()
    targets = [Target(point=point, whole=whole) for point in points for whole in (True, False)]
    chosen = targets if full else chance.sample(targets, SHORT)
    done = disturb(here.made, beta, chosen, lambda: submit(here), in_turn=True)
    assert done.missed == []
    for job_id in done.jobs:
        check_ended(here.made, job_id, num_rounds=ROUNDS)
        assert set(accepted_sites(here.made, job_id).values()) == {SITES}
    for target in done.hit:
        who = "a site's worker and child killed" if target.whole else "the site's process at work killed"
        table.record(who, target.point)
