"""What must be true of the records at any moment, whatever was done to the processes and services."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta

import numpy as np
from sqlalchemy import select

from coordinator.aggregation import shares
from coordinator.jobs import LIVE, JobState, find_jobs
from coordinator.parts import find_carried, find_parts
from coordinator.rounds import find_rounds
from coordinator.situation import gather
from coordinator.states import PartState, RoundKind, RoundState
from coordinator.verifying import Result, verify
from coordinator.why import explain
from store.database import reading
from store.models import find_models, get_model
from store.tables import rounds, utc_now
from tests.federation import Federation

LATE_SECONDS = 10.0  # a round may be open past its deadline for so long: some sweeps, and a coordinator's start


def check_always(made: Federation, *, late_seconds: float = LATE_SECONDS) -> None:
    """Fail if something is stuck, counted twice, lost, or aggregated twice."""
    with reading(made.services.engine) as connection:
        late = utc_now() - timedelta(seconds=late_seconds)
        overdue = select(rounds.c.round_id).where(rounds.c.state == RoundState.OPEN.value, rounds.c.deadline_at < late)
        assert connection.execute(overdue).scalars().all() == [], "rounds are open past their deadline"
        jobs = find_jobs(connection)
    for job in jobs:
        _check_job(made, job.job_id)


def _check_job(made: Federation, job_id: str) -> None:
    with reading(made.services.engine) as connection:
        models = find_models(connection, job_id=job_id, kind="global")
        planned = [each for each in find_rounds(connection, job_id) if each.kind is RoundKind.TRAIN]
        counted = {
            each.round_id: [
                part.model_id
                for part in find_parts(connection, each.round_id)
                if part.state is PartState.ACCEPTED and part.counted_in in (None, each.round_id)
            ]
            + [part.model_id for part in find_carried(connection, job_id, each.round_id)]
            for each in planned
        }
    twice = [number for number, count in Counter(model.round for model in models).items() if count > 1]
    assert twice == [], f"job {job_id}: rounds that were aggregated twice"
    by_id = {model.model_id: model for model in models}
    for round_ in planned:
        if round_.state is not RoundState.CLOSED:
            continue
        assert round_.output_model_id in by_id, f"{round_.round_id} has no model"
        parents = by_id[round_.output_model_id].parents
        assert len(set(parents)) == len(parents), f"{round_.round_id}: an update is counted twice"
        expected = [round_.input_model_id, *counted[round_.round_id]]
        assert sorted(map(str, parents)) == sorted(map(str, expected)), f"{round_.round_id}: not what was accepted"


def check_explained(made: Federation) -> None:
    """Fail unless each job that goes on can say in a sentence why, and since when."""
    services = made.services
    with reading(services.engine) as connection:
        going_on = find_jobs(connection, states=LIVE)
    for job in going_on:
        said = explain(gather(services.settings, services.engine, services.app, job.job_id, check_store=lambda: ""))
        assert said.summary, job
        assert said.since is not None, said


def accepted_sites(made: Federation, job_id: str) -> dict[int, tuple[str, ...]]:
    """Return the sites that count in each training round, by what was recorded of their parts."""
    with reading(made.services.engine) as connection:
        planned = [each for each in find_rounds(connection, job_id) if each.kind is RoundKind.TRAIN]
        return {
            each.number: tuple(
                part.site for part in find_parts(connection, each.round_id) if part.state is PartState.ACCEPTED
            )
            for each in planned
            if each.state is RoundState.CLOSED
        }


def constant_loop(accepted: Mapping[int, tuple[str, ...]]) -> np.float32:
    """Return the value that ConstantTrainer's plain loop gives, over the sites that count in each round."""
    value = np.float32(0)
    for number in sorted(accepted):
        total = np.float32(0)
        sites = sorted(accepted[number])
        for site, weight in zip(sites, shares([1] * len(sites)), strict=True):
            constant = np.float32(int.from_bytes(hashlib.sha256(site.encode()).digest()[:2], "big") / 2**16)
            total += (value + constant) * np.float32(weight)
        value = total
    return value


def check_ended(made: Federation, job_id: str, *, num_rounds: int, whole_chain: bool = False) -> None:
    """Fail unless the job of a ConstantTrainer is complete and its model the plain loop's, to the bit.

    Late updates that are kept count by their staleness: such a model is what recomputing it gives.
    """
    job = made.job(job_id)
    assert job.state is JobState.COMPLETED, f"{job.state}: {job.reason}"
    accepted = accepted_sites(made, job_id)
    assert sorted(accepted) == list(range(1, num_rounds + 1))
    if job.spec.late.policy != "keep":
        expected = constant_loop(accepted)
        assert {tensor.tobytes() for tensor in made.model(job_id).values()} == {
            np.full(tensor.shape, expected, np.float32).tobytes() for tensor in made.model(job_id).values()
        }
    assert job.model_id is not None
    verdicts = list(verify(made.services, job.model_id, whole_chain=whole_chain))
    assert verdicts[0].result is Result.SAME, verdicts
    assert all(each.result in (Result.SAME, Result.INTACT) for each in verdicts), verdicts
    with reading(made.services.engine) as connection:
        assert get_model(connection, job.model_id).round == num_rounds
