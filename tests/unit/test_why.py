"""What `fedchord why` says: a pure function of the facts."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from common.dead_letters import DeadLetter
from common.heartbeats import Heartbeat
from common.progress import ProgressReport
from common.settings import Settings
from coordinator.jobfile import JobSpec, LateTable, ParticipationTable
from coordinator.jobs import JobState, new_job
from coordinator.members import Member
from coordinator.owing import clock, next_asking
from coordinator.parts import Part
from coordinator.rounds import Round
from coordinator.situation import Lease, Situation, Unsent
from coordinator.states import PartState, RoundKind, RoundState
from coordinator.why import Explanation, explain
from store.parties import PartyInfo

NOW = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)
SITES = ("alpha", "beta", "gamma")


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


JOB = replace(
    new_job(
        JobSpec(name="digits", trainer="mlp", rounds=5, min_sites=2), sites=SITES, model_id="model-0", submitted_by="me"
    ),
    job_id="3f9a0000-0000",
    state=JobState.RUNNING,
    created_at=ago(100),
    started_at=ago(99),
)
ROUND = Round(
    job_id=JOB.job_id,
    kind=RoundKind.TRAIN,
    number=4,
    input_model_id="model-0",
    deadline_at=NOW + timedelta(seconds=600),
    created_at=ago(61),
    published_at=ago(60),
)


def part(site: str, state: PartState = PartState.WAITING, reason: str = "") -> Part:
    return Part(
        job_id=JOB.job_id,
        round_id=ROUND.round_id,
        site=site,
        position=SITES.index(site),
        state=state,
        reason=reason,
        answered_at=None if state is PartState.WAITING else ago(30),
    )


def party(site: str, **changes: Any) -> PartyInfo:
    known: dict[str, Any] = {"tenant_id": "", "tenant_name": "", "description": "", "hop_count": 0, "reason": ""}
    known |= {"created_at": NOW, "updated_at": NOW, "public_key": "key", "enabled": True, "id": site, "site": site}
    return PartyInfo(**{**known, **changes})


def beat(**changes: Any) -> Heartbeat:
    known: dict[str, Any] = {"version": "0.1.0", "boot_id": "b", "at": ago(1).timestamp(), "cpu_percent": 0.0}
    known |= {"memory_total": 1, "memory_available": 1, "disk_free": 1, "slots": 1, "free_slots": 1}
    return Heartbeat(**{**known, **changes})


OPEN = Situation(
    now=NOW,
    settings=Settings(),
    job=JOB,
    round=ROUND,
    parts=(part("alpha", PartState.ACCEPTED), part("beta"), part("gamma")),
    parties={site: party(site) for site in SITES},
    heartbeats={"beta": beat(), "gamma": beat()},
    queued={"beta": 0, "gamma": 0},
    workers=("coordinator@here",),
)
TASK = part("beta").task_id
TITLE = "digits: train round 4 at beta"


def about(explanation: Explanation, site: str) -> str:
    return next(detail for detail in explanation.details if detail.startswith(site))


def test_an_open_round_says_who_owes_an_answer_since_when_and_until_when() -> None:
    told = explain(OPEN)
    assert told.summary == "Job digits: train round 4 waits for the answers of 2 of 3 sites: beta, gamma."
    assert (told.since, told.until) == (ROUND.published_at, ROUND.deadline_at)
    assert "Answered well: alpha." in told.details
    assert told.actions == ("Wait, or end the job: `fedchord abort 3f9a0000`.",)


@pytest.mark.parametrize(
    ("changes", "said", "advice"),
    [
        ({"heartbeats": {"beta": beat(tasks=(TASK,), working_on=(TITLE,))}},
         "is alive and works on this very part (heartbeat 1 s old)", ""),
        ({"heartbeats": {"beta": beat(tasks=("other", TASK), working_on=("mnist: train round 1 at beta",))}},
         "has this part in hand, to be next (heartbeat 1 s old). At work before it: mnist: train round 1 at beta.", ""),
        ({"heartbeats": {"beta": beat(tasks=("other",), working_on=("mnist: test",))}, "queued": {"beta": 2}},
         "is alive and busy with something else (heartbeat 1 s old): mnist: test (messages on its queue: 2).", ""),
        ({"heartbeats": {"beta": beat()}, "queued": {"beta": 1}},
         "is alive and idle (heartbeat 1 s old), but has not taken its message (messages on its queue: 1).",
         "worker of beta restarted"),
        ({"heartbeats": {"beta": beat()}},
         f"is alive and idle (heartbeat 1 s old): the question or its answer is lost, or the answer is on its way. "
         f"It is asked again about {clock(NOW + timedelta(seconds=20))}", ""),  # 60 s ago + 5 + 5 + 10 + 20 + 40
        ({"heartbeats": {"beta": beat()}, "workers": ()},
         "A coordinator worker, once one runs, takes the answer or asks again.", ""),
        ({"heartbeats": {}, "queued": {"beta": 1}},
         f"has no heartbeat: its message waits on its queue since {clock(ago(60))}", "worker of beta started"),
        ({"heartbeats": {}, "taken_at": {"beta": ago(20)}},
         f"has no heartbeat: it took a message at {clock(ago(20))} and has gone since.", "worker of beta started"),
        ({"heartbeats": {}}, "has no heartbeat, and no message waits on its queue.", "worker of beta started"),
        ({"parties": {"beta": party("beta", enabled=False, reason="moves"), "gamma": party("gamma")}},
         "It is disabled (moves), which counts from the next round on.", ""),
        ({"parties": {"gamma": party("gamma")}}, "was removed: no answer of it is accepted", "sites add beta"),
        ({"broker_trouble": "The broker does not answer; start it."}, "what it is at is not known", ""),
    ],
    ids=["at work", "next", "busy", "stuck", "idle", "idle, no coordinator", "away", "gone with it", "lost", "disabled",
         "removed", "no broker"],
)  # fmt: skip
def test_of_each_site_that_owes_an_answer_it_says_what_it_is_at(
    changes: dict[str, Any], said: str, advice: str
) -> None:
    told = explain(replace(OPEN, **changes))
    assert said in about(told, "beta")
    assert not advice or any(advice in action for action in told.actions)


@pytest.mark.parametrize(
    ("states", "kind", "said"),
    [
        ("aww", RoundKind.TRAIN, "1 answered well and the quorum is 2: 1 of the 2 that are missing must answer by"),
        ("aaw", RoundKind.TRAIN, "2 answered well and the quorum is 2: at {deadline} the round goes on without who is"),
        ("qdw", RoundKind.TRAIN, "0 answered well and 1 may, but the quorum is 2: it cannot be met any more"),
        ("qdw", RoundKind.TEST, "A test round needs no quorum: at {deadline} it closes"),
    ],
)
def test_it_says_whether_the_quorum_can_be_met_and_what_the_deadline_does(
    states: str, kind: RoundKind, said: str
) -> None:
    letters = {
        "a": PartState.ACCEPTED,
        "w": PartState.WAITING,
        "q": PartState.QUARANTINED,
        "d": PartState.DECLINED,
    }
    parts = tuple(part(site, letters[letter], "no") for site, letter in zip(SITES, states, strict=True))
    told = explain(replace(OPEN, round=replace(ROUND, kind=kind), parts=parts))
    assert any(said.format(deadline=clock(ROUND.deadline_at)) in detail for detail in told.details), told.details


def test_a_quorum_that_cannot_be_met_any_more_comes_with_the_way_out_first() -> None:
    parts = (part("alpha", PartState.QUARANTINED, "NaN"), part("beta", PartState.FAILED, "no memory"), part("gamma"))
    told = explain(replace(OPEN, parts=parts))
    assert told.actions[0] == "Do not wait for the deadline: end the job: `fedchord abort 3f9a0000`."
    assert {"alpha quarantined: NaN.", "beta failed: no memory."} <= set(told.details)


def test_past_the_deadline_it_says_who_should_have_closed_the_round() -> None:
    late = replace(OPEN, round=replace(ROUND, deadline_at=ago(1)))
    assert any(f"The deadline passed at {clock(ago(1))}" in detail for detail in explain(late).details)
    stuck = explain(replace(OPEN, round=replace(ROUND, deadline_at=ago(50))))
    assert (
        stuck.details[0] == f"Coordinator worker coordinator@here runs, but has not taken it up since {clock(ago(50))}."
    )
    assert "Read the coordinator's log" in stuck.actions[0]


def test_a_broker_that_is_away_is_the_answer() -> None:
    told = explain(replace(OPEN, broker_trouble="The broker at redis://x does not answer; start it."))
    assert told.details[0] == "The broker at redis://x does not answer; start it."
    assert told.actions[0].startswith("Start the broker")


def test_a_job_that_nobody_takes_up_says_that_no_coordinator_worker_answers() -> None:
    submitted = replace(OPEN, job=replace(JOB, state=JobState.SUBMITTED), round=None, parts=(), workers=())
    told = explain(replace(submitted, answers_queued=1))
    assert told.summary == "Job digits is recorded and waits for a coordinator worker to plan its first round."
    assert told.since == JOB.created_at
    assert told.details == ("No coordinator worker answers (messages on its queue: 1).",)
    assert "celery -A coordinator worker" in told.actions[0]


def test_a_job_that_was_submitted_a_moment_ago_says_when_it_is_taken_up() -> None:
    fresh = replace(JOB, state=JobState.SUBMITTED, created_at=ago(0.5))
    told = explain(replace(OPEN, job=fresh, round=None, parts=()))
    assert told.details == ("Coordinator worker coordinator@here takes it up at its next sweep, within 3 s.",)
    assert told.actions == ()


def test_a_round_that_is_planned_and_not_sent_says_so() -> None:
    told = explain(replace(OPEN, round=replace(ROUND, published_at=None), workers=()))
    assert "is planned, but its messages are not known to have been sent" in told.summary
    assert told.details[0] == "No coordinator worker answers."


def test_a_round_with_every_answer_waits_for_a_coordinator_worker() -> None:
    parts = tuple(part(site, PartState.ACCEPTED) for site in SITES)
    told = explain(replace(OPEN, parts=parts, workers=()))
    assert "has every answer and waits for a coordinator worker" in told.summary
    assert told.since == ago(30)


@pytest.mark.parametrize(
    ("until", "said", "details"),
    [
        (NOW + timedelta(seconds=3), "is being aggregated", "Process p1 holds the round's lease until"),
        (ago(2), "who aggregated it has gone", "aggregates it again at its next sweep, within 3 s"),
        (ago(60), "who aggregated it has gone", "has not taken it up since"),
    ],
)
def test_a_round_that_aggregates_says_who_holds_its_lease_and_what_if_it_runs_out(
    until: datetime, said: str, details: str
) -> None:
    parts = tuple(part(site, PartState.ACCEPTED) for site in SITES)
    aggregating = replace(ROUND, state=RoundState.AGGREGATING)
    told = explain(replace(OPEN, round=aggregating, parts=parts, lease=Lease(owner="p1", until=until)))
    assert said in told.summary
    assert any(details in detail for detail in told.details), told.details


def test_an_aggregation_that_waits_for_the_object_store_says_so() -> None:
    parts = tuple(part(site, PartState.ACCEPTED) for site in SITES)
    away = replace(
        OPEN,
        round=replace(ROUND, state=RoundState.AGGREGATING),
        parts=parts,
        lease=Lease(owner="p1", until=ago(9)),
        store_trouble="The object store does not answer.",
    )
    told = explain(away)
    assert "The object store does not answer." in told.details
    assert told.actions == ("Mend the object store: `fedchord doctor` says how.",)


def test_the_site_that_builds_the_first_model_is_named() -> None:
    start = replace(ROUND, kind=RoundKind.START, number=0, input_model_id=None)
    told = explain(replace(OPEN, round=start))
    assert told.summary.startswith("Job digits: the start waits")
    assert "alpha was asked to build the first model; if it does not, another site is asked." in told.details


def test_a_job_that_ended_well_says_so() -> None:
    done = replace(JOB, state=JobState.COMPLETED, finished_at=ago(5), model_id="model-5")
    told = explain(replace(OPEN, job=done, parts=()))
    assert told.summary == "Job digits has ended well: all of its 5 training rounds are done. It waits for nothing."
    assert (told.since, told.until, told.details) == (ago(5), None, ("Its global model is model-5.",))


def test_a_job_that_failed_says_why_with_the_sites_reasons() -> None:
    failed = replace(JOB, state=JobState.FAILED, finished_at=ago(5), reason="the quorum is 2")
    parts = (part("alpha", PartState.ACCEPTED), part("beta", PartState.DECLINED, "no consent"), part("gamma"))
    told = explain(replace(OPEN, job=failed, parts=parts, round=replace(ROUND, state=RoundState.FAILED)))
    assert told.summary == "Job digits has failed: the quorum is 2."
    assert "beta declined: no consent." in told.details
    assert any('model = "model-0"' in action for action in told.actions)


def test_notices_that_are_not_sent_are_told_of_a_job_that_has_ended() -> None:
    done = replace(JOB, state=JobState.ABORTED, finished_at=ago(5), reason="wrong data")
    unsent = Unsent(sites=("alpha", "beta"), since=ago(5))
    told = explain(replace(OPEN, job=done, parts=(), unsent=unsent, broker_trouble="The broker does not answer."))
    assert told.summary == "Job digits was aborted: wrong data."
    assert f"Notices to alpha, beta are recorded since {clock(ago(5))} and not known to have been sent." in told.details
    assert any(action.startswith("Start the broker") for action in told.actions)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, 5), (5, 5), (6, 10), (11, 20), (21, 40), (41, 80), (5000, 5440)],  # 5, +5, +10, +20, … +600 at the most
)
def test_an_idle_site_is_asked_again_ever_more_rarely(seconds: float, expected: float) -> None:
    published = ago(0)
    found = next_asking(published, published + timedelta(seconds=seconds), 5.0)
    assert (found - published).total_seconds() == expected


KEEPING = replace(JOB, spec=JOB.spec.model_copy(update={"late": LateTable(policy="keep")}))


def test_it_says_how_far_a_site_is_that_reports_progress() -> None:
    report = ProgressReport(task_id=TASK, fraction=0.4, text="epoch 2 of 5", at=0)
    beats = {"beta": beat(tasks=(TASK,), working_on=(TITLE,))}
    told = explain(replace(OPEN, heartbeats=beats, progress={TASK: report}))
    assert "works on this very part (heartbeat 1 s old): 40 % done, epoch 2 of 5." in about(told, "beta")


def test_it_says_who_is_paused_who_has_left_and_who_is_still_at_an_earlier_round() -> None:
    until = NOW + timedelta(seconds=30)
    members = {
        "beta": Member(site="beta", paused_until=until, reason="3 rounds in a row: no memory"),
        "delta": Member(site="delta", has_left=True, reason="by the operator"),
    }
    late = Part(job_id=JOB.job_id, round_id=f"{JOB.job_id}.train.3", site="gamma", position=0, state=PartState.LATE)
    told = explain(replace(OPEN, job=KEEPING, parts=(part("alpha"),), members=members, late=(late,)))
    assert about(told, "beta") == f"beta is paused until {clock(until)}: 3 rounds in a row: no memory."
    assert about(told, "delta") == "delta has left the job: by the operator."
    assert about(told, "gamma") == "gamma is still at its part of round 3, which may count later."


def test_it_says_when_a_round_is_full_and_counts_what_is_kept() -> None:
    rules = ParticipationTable(target_sites=3)
    job = replace(KEEPING, spec=KEEPING.spec.model_copy(update={"participation": rules}))
    kept = Part(job_id=JOB.job_id, round_id=f"{JOB.job_id}.train.3", site="delta", position=0, state=PartState.KEPT)
    told = explain(replace(OPEN, job=job, late=(kept,)))
    assert "It is full with 3 updates and has 2: then it waits for no other." in told.details
    assert any(detail.startswith("2 answered well and the quorum is 2") for detail in told.details)


def test_it_says_that_progress_gives_more_time() -> None:
    job = replace(JOB, spec=JOB.spec.model_copy(update={"round_extension_seconds": 90.0, "min_sites": 1}))
    told = explain(replace(OPEN, job=job))
    assert any("unless they report progress then: that gives them up to 90 s more" in each for each in told.details)


def test_an_update_that_stands_out_is_not_counted_as_good() -> None:
    far = replace(part("alpha", PartState.ACCEPTED), update_norm=1e6, global_norm=1.0)
    near = replace(part("beta", PartState.ACCEPTED), update_norm=1.0, global_norm=1.0)
    told = explain(replace(OPEN, parts=(far, near, part("gamma"))))
    assert about(told, "alpha").startswith("alpha stands out so far: The update is 1e+06 away from the global model")
    assert any(detail.startswith("1 answered well and the quorum is 2") for detail in told.details)


def test_a_heartbeat_from_before_the_question_says_nothing_of_the_answer() -> None:
    just = replace(ROUND, published_at=ago(0.5), created_at=ago(0.6))
    said = about(explain(replace(OPEN, round=just)), "beta")
    assert said == "beta is alive, and was asked after its last heartbeat: the next one tells what it is at."
    behind = {"beta": beat(at=ago(3600).timestamp()), "gamma": beat()}  # a clock that is an hour behind hides nothing
    assert "is alive and idle" in about(explain(replace(OPEN, heartbeats=behind)), "beta")


@pytest.mark.parametrize(("seconds", "is_told"), [(59, True), (62, False)])
def test_an_answer_that_was_set_aside_since_the_round_began_is_told(seconds: float, is_told: bool) -> None:
    letter = DeadLetter(queue="coordinator", at=ago(seconds), reason="update_ready failed: no", size=1, begins=b"")
    told = explain(replace(OPEN, set_aside=(letter, replace(letter, at=None))))
    assert any("from queue coordinator: update_ready failed: no" in detail for detail in told.details) is is_told
    assert any("fedchord dead-letters" in action for action in told.actions) is is_told
