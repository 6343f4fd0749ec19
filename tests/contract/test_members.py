"""Sites that fail, pause, leave and join, and answers that count late, over SQLite and PostgreSQL."""

from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import Engine

from coordinator.jobfile import JobSpec
from coordinator.jobs import Job, add_job, new_job
from coordinator.members import Member, find_members, forget_member, note_answers, set_left
from coordinator.parts import (
    SURPLUS,
    Part,
    answer_part,
    count_good,
    count_kept,
    drop_stale,
    find_carried,
    find_in,
    find_parts,
    leave_parts,
    raise_attempt,
)
from coordinator.rounds import (
    Round,
    add_round,
    claim_round,
    close_round,
    end_lease,
    extend_round,
    find_rounds,
    forgive_claim,
    get_round,
)
from coordinator.states import PartState, RoundKind, RoundState
from store.database import reading, writing
from store.tables import utc_now

SITES = ("a", "b", "c")


@pytest.fixture
def job(engine: Engine) -> Job:
    spec = JobSpec.model_validate(
        {"name": "j", "trainer": "t", "rounds": 9, "participation": {"pause_after": 2, "pause_seconds": 10}}
    )
    made = new_job(spec, sites=SITES, model_id=None, submitted_by="")
    with writing(engine) as connection:
        add_job(connection, made)
    return made


def plan(engine: Engine, job: Job, number: int, *, kind: RoundKind = RoundKind.TRAIN) -> Round:
    round_ = Round(
        job_id=job.job_id,
        kind=kind,
        number=number,
        input_model_id="m",
        deadline_at=utc_now() + timedelta(seconds=60),
    )
    with writing(engine) as connection:
        assert add_round(connection, round_, SITES)
    return round_


def parts(engine: Engine, round_: Round) -> dict[str, Part]:
    with reading(engine) as connection:
        return {part.site: part for part in find_parts(connection, round_.round_id)}


def note(engine: Engine, job: Job, state: PartState, *, code: str = "") -> Member | None:
    part = Part(job_id=job.job_id, round_id="r", site="a", position=0, state=state, code=code, reason="why")
    with writing(engine) as connection:
        note_answers(connection, job, [part])
        return find_members(connection, job.job_id).get("a")


def seconds(member: Member | None) -> float:
    assert member is not None
    assert member.paused_until is not None
    return round((member.paused_until - utc_now()).total_seconds())


def test_a_site_is_paused_after_so_many_failures_and_each_time_twice_as_long(engine: Engine, job: Job) -> None:
    first = note(engine, job, PartState.FAILED)
    assert first == Member(site="a", failures=1)
    assert [seconds(note(engine, job, PartState.DROPPED)) for _ in range(4)] == [10, 20, 40, 80]
    assert note(engine, job, PartState.ACCEPTED) is None


@pytest.mark.parametrize(
    ("state", "code", "failures"),
    [
        (PartState.QUARANTINED, "", 1),
        (PartState.DECLINED, "", 1),
        (PartState.DROPPED, SURPLUS, None),
        (PartState.LATE, "", None),
        (PartState.WAITING, "", None),
    ],
)
def test_what_counts_as_a_failure(engine: Engine, job: Job, state: PartState, code: str, failures: int | None) -> None:
    member = note(engine, job, state, code=code)
    assert (member and member.failures) == failures


def test_a_site_that_has_left_stays_so_until_it_is_taken_back(engine: Engine, job: Job) -> None:
    with writing(engine) as connection:
        set_left(connection, job, "a", "it moves")
    assert note(engine, job, PartState.ACCEPTED) == Member(site="a", reason="it moves", has_left=True)
    with writing(engine) as connection:
        forget_member(connection, job, "a")
        assert find_members(connection, job.job_id) == {}


def test_a_late_answer_is_kept_and_counts_in_the_next_training_round_alone(engine: Engine, job: Job) -> None:
    first = plan(engine, job, 1)
    a, b, _ = parts(engine, first).values()
    with writing(engine) as connection:
        assert answer_part(connection, a, PartState.ACCEPTED, model_id="u1")
        assert leave_parts(connection, [a, b], PartState.LATE, "slow") == (b,)  # the first has its answer
        (late,) = find_in(connection, (PartState.LATE,), job_id=job.job_id)
        assert not answer_part(connection, late, PartState.KEPT)  # it is not waiting any more
    test, second, third = plan(engine, job, 1, kind=RoundKind.TEST), plan(engine, job, 2), plan(engine, job, 3)
    with writing(engine) as connection:
        assert answer_part(connection, late, PartState.KEPT, expected=PartState.LATE, model_id="u2")
        assert not answer_part(connection, late, PartState.KEPT, expected=PartState.LATE)
        assert count_good(connection, job.job_id, second.round_id) == 1
        for each in (test, second, third):
            count_kept(connection, each.round_id)
        carried = {each.round_id: find_carried(connection, job.job_id, each.round_id) for each in (test, second, third)}
    assert [part.model_id for part in carried[second.round_id]] == ["u2"]
    assert carried[test.round_id] == carried[third.round_id] == []
    assert parts(engine, first)["b"].counted_in == second.round_id


def test_what_is_too_stale_is_dropped_and_who_still_owed_it_is_told(engine: Engine, job: Job) -> None:
    first, second = plan(engine, job, 1), plan(engine, job, 2)
    with writing(engine) as connection:
        a, b, _ = find_parts(connection, first.round_id)
        leave_parts(connection, [a, b], PartState.LATE, "slow")
        assert answer_part(connection, replace(a, state=PartState.LATE), PartState.KEPT, expected=PartState.LATE)
        leave_parts(connection, find_parts(connection, second.round_id), PartState.LATE, "slow")
        assert [part.task_id for part in drop_stale(connection, job.job_id, 2, "too old")] == [b.task_id]
    assert [part.state for part in parts(engine, first).values()] == ["dropped", "dropped", "waiting"]
    assert {part.state for part in parts(engine, second).values()} == {PartState.LATE}


def test_each_attempt_may_answer_and_the_first_that_counts_ends_the_others(engine: Engine, job: Job) -> None:
    first = plan(engine, job, 1)
    part = parts(engine, first)["a"]
    with writing(engine) as connection:
        assert raise_attempt(connection, part)
        assert not raise_attempt(connection, part)  # by who has not seen the first
        assert answer_part(connection, replace(part, attempt=1), PartState.ACCEPTED, model_id="u1")
        assert not answer_part(connection, replace(part, attempt=2), PartState.ACCEPTED, model_id="u2")
        assert not raise_attempt(connection, replace(part, attempt=1))
    answered = parts(engine, first)["a"]
    assert (answered.attempt, answered.model_id) == (1, "u1")


def test_an_attempt_that_was_never_given_out_answers_nothing(engine: Engine, job: Job) -> None:
    part = parts(engine, plan(engine, job, 1))["a"]
    with writing(engine) as connection:
        assert not answer_part(connection, replace(part, attempt=2), PartState.ACCEPTED)


def test_a_claim_is_counted_unless_it_is_forgiven(engine: Engine, job: Job) -> None:
    round_ = plan(engine, job, 1)
    with writing(engine) as connection:
        assert not claim_round(connection, round_.round_id, "x", 60)  # answers are missing
        leave_parts(connection, find_parts(connection, round_.round_id), PartState.DROPPED, "")
        assert claim_round(connection, round_.round_id, "x", 60)
        assert get_round(connection, round_.round_id).claims == 1
        assert not claim_round(connection, round_.round_id, "y", 60)
        assert not forgive_claim(connection, round_.round_id, "y")
        assert forgive_claim(connection, round_.round_id, "x")
        assert get_round(connection, round_.round_id).claims == 0


def test_a_lease_that_somebody_has_renewed_is_not_ended(engine: Engine, job: Job) -> None:
    round_ = plan(engine, job, 1)
    with writing(engine) as connection:
        leave_parts(connection, find_parts(connection, round_.round_id), PartState.DROPPED, "")
        claim_round(connection, round_.round_id, "x", 60)
        assert not end_lease(connection, round_.round_id, "x", utc_now())
        assert not claim_round(connection, round_.round_id, "y", 60)


def test_a_deadline_is_moved_once_and_only_while_the_round_is_open(engine: Engine, job: Job) -> None:
    round_ = plan(engine, job, 1)
    later = round_.deadline_at + timedelta(seconds=10)
    with writing(engine) as connection:
        assert extend_round(connection, round_, later)
        assert not extend_round(connection, round_, later)
        leave_parts(connection, find_parts(connection, round_.round_id), PartState.DROPPED, "")
        claim_round(connection, round_.round_id, "x", 60)
        assert close_round(connection, round_.round_id, "x", RoundState.CLOSED)
        assert not extend_round(connection, replace(round_, deadline_at=later), later + timedelta(seconds=1))


def test_rounds_are_in_the_order_of_the_plan_whatever_the_clocks_said(engine: Engine, job: Job) -> None:
    kinds = (RoundKind.START, RoundKind.START, RoundKind.TRAIN, RoundKind.TEST, RoundKind.TRAIN, RoundKind.SWAG)
    plans = list(zip(kinds, (0, 1, 1, 1, 2, 2), strict=True))
    for kind, number in reversed(plans):
        plan(engine, job, number, kind=kind)
    with reading(engine) as connection:
        assert [(each.kind, each.number) for each in find_rounds(connection, job.job_id)] == plans
