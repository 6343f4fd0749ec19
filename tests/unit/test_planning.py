"""What a job does next, as a table."""

import pytest

from coordinator.choosing import candidates
from coordinator.jobfile import JobSpec
from coordinator.jobs import Job, new_job
from coordinator.planning import Step, next_step
from coordinator.states import RoundKind
from tests.federation import heartbeat

START, TRAIN, TEST, SWAG = RoundKind.START, RoundKind.TRAIN, RoundKind.TEST, RoundKind.SWAG


def job(*, model_id: str | None = "model", sites: tuple[str, ...] = ("a", "b", "c"), **spec: object) -> Job:
    values = {"name": "test", "trainer": "t", "rounds": 3, **spec}
    return new_job(JobSpec.model_validate(values), sites=sites, model_id=model_id, submitted_by="")


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        ({}, ["start 0", "train 1", "test 1", "train 2", "test 2", "train 3", "test 3"]),
        ({"test_every": 0}, ["start 0", "train 1", "train 2", "train 3"]),
        ({"test_every": 2}, ["start 0", "train 1", "train 2", "test 2", "train 3", "test 3"]),  # and the last
        ({"test_every": 0, "swag": True}, ["start 0", "train 1", "train 2", "train 3", "swag 3"]),
        ({"rounds": 1, "swag": True}, ["start 0", "train 1", "test 1", "swag 1"]),
        ({"rounds": 0}, ["start 0", "test 0"]),
        ({"rounds": 0, "test_every": 0}, ["start 0"]),
        ({"rounds": 0, "test_every": 5, "swag": True}, ["start 0", "test 0", "swag 0"]),
        ({"rounds": 0, "test_every": 0, "swag": True}, ["start 0", "swag 0"]),
    ],
)
def test_a_job_goes_through_its_rounds_in_order(spec: dict[str, object], steps: list[str]) -> None:
    taken, step = [], next_step(job(**spec), None)
    while step is not None:
        taken.append(f"{step.kind} {step.number}")
        step = next_step(job(**spec), step)
    assert taken == steps


def test_the_start_is_repeated_until_there_is_a_model() -> None:
    assert next_step(job(model_id=None), Step(kind=START, number=0)) == Step(kind=START, number=1)
    assert next_step(job(), Step(kind=START, number=1)) == Step(kind=TRAIN, number=1)
    assert next_step(job(rounds=0), Step(kind=START, number=1)) == Step(kind=TEST, number=0)
    assert next_step(job(rounds=0, swag=True, test_every=0), Step(kind=START, number=1)) == Step(kind=SWAG, number=0)


@pytest.mark.parametrize(
    ("enabled", "alive", "chosen"),
    [
        ("abc", "abc", "abc"),
        ("abc", "ab", "ab"),  # two of three are a quorum
        ("abc", "a", "abc"),  # too few are alive: ask everybody, a queue keeps its messages
        ("ab", "abc", "ab"),  # a disabled site is never asked
        ("abc", "abcd", "abc"),  # nor one that is not in the job
        ("a", "a", "a"),  # the caller sees that this is no quorum
    ],
)
def test_the_sites_that_are_asked(enabled: str, alive: str, chosen: str) -> None:
    found = candidates(job(), enabled=frozenset(enabled), alive=dict.fromkeys(alive, heartbeat(("t",))))
    assert "".join(each.site for each in found) == chosen
