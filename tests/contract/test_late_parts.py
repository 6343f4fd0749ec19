"""Where an update counts that has missed its round."""

from datetime import timedelta

import pytest
from sqlalchemy import Engine

from coordinator.jobfile import JobSpec
from coordinator.jobs import add_job, new_job
from coordinator.parts import Part, answer_part, count_kept, find_carried, find_parts, leave_parts
from coordinator.rounds import Round, add_round, claim_round
from coordinator.states import PartState, RoundKind
from store.database import writing
from store.tables import utc_now

SPEC = JobSpec.model_validate({"name": "late", "trainer": "t", "rounds": 2, "late": {"policy": "keep"}})


@pytest.mark.parametrize("claimed_in", [1, 2])
def test_an_update_that_misses_its_round_counts_once(engine: Engine, claimed_in: int) -> None:
    with writing(engine) as connection:
        job = add_job(connection, new_job(SPEC, sites=("a", "b"), model_id=None, submitted_by=""))
        for number in (1, 2):
            round_ = Round(
                job_id=job.job_id,
                kind=RoundKind.TRAIN,
                number=number,
                input_model_id=None,
                deadline_at=utc_now() + timedelta(hours=1),
            )
            add_round(connection, round_, ["a", "b"] if number == 1 else ["a"])
        first, second = f"{job.job_id}.train.1", f"{job.job_id}.train.2"
        a, b = find_parts(connection, first)
        leave_parts(connection, [b], PartState.LATE, "no answer before the deadline")
        late = Part(job_id=job.job_id, round_id=first, site="b", position=1, state=PartState.LATE)
        assert answer_part(connection, late, PartState.KEPT, expected=PartState.LATE)
        for part in (a, *find_parts(connection, second)):
            assert answer_part(connection, part, PartState.ACCEPTED)
        round_id = first if claimed_in == 1 else second
        assert claim_round(connection, round_id, "me", 60)
        count_kept(connection, round_id)
        own = [part.task_id for part in find_parts(connection, round_id) if part.state is PartState.ACCEPTED]
        carried = [part.task_id for part in find_carried(connection, job.job_id, round_id)]
    assert own == ([f"{first}.a", f"{first}.b"] if claimed_in == 1 else [f"{second}.a"])
    assert carried == ([] if claimed_in == 1 else [f"{first}.b"])
