"""Who counts: targets, over-selection, late updates, sites that go, come, fail and are paused, through real queues."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from common.errors import Conflict, InvalidJobFile, NotFound
from common.messages import (
    COORDINATOR,
    ClientRemoved,
    Envelope,
    Message,
    TrainingFinished,
    TrainingStart,
    UpdateReady,
    UpdateRoundStart,
)
from common.progress import ProgressReport, write_progress
from common.queues import cancel_key, heartbeat_key
from coordinator import gate
from coordinator.jobs import JobState
from coordinator.members import find_members
from coordinator.membership import join, leave
from coordinator.parts import Part, find_parts
from coordinator.progress import job_progress
from coordinator.rounds import find_rounds
from coordinator.states import PartState, RoundKind, RoundState
from coordinator.submitting import submit
from store.database import reading
from store.models import find_models, get_models
from tests.federation import Federation, ScriptedSite, federation, wait_until

NAMES = ("alpha", "beta", "gamma", "delta")
FIRST = {"w": np.zeros(3, np.float32)}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Four sites and one coordinator process for all tests of this module."""
    settings = {"choosers": {"last": "tests.choosers:last", "wrong": "tests.choosers:wrong"}}
    with federation(tmp_path_factory.mktemp("federation"), *NAMES, **settings) as made, made.coordinator():
        yield made


def begin(running: Federation, *names: str, **spec: Any) -> tuple[str, dict[str, ScriptedSite]]:
    """Submit a job for the sites and answer its start."""
    sites = {name: running.sites[name] for name in names}
    for site in running.sites.values():
        site.forget()  # what a test before this one has left
        site.beat()
        if site.name not in names:
            running.services.broker.delete(heartbeat_key(site.name))
    job = submit(running.services, running.spec(**{"sites": names, "min_sites": 1, **spec}))
    start(sites.values())
    return job.job_id, sites


def start(sites: Iterable[ScriptedSite]) -> None:
    for site in sites:
        message = receive(site)
        assert isinstance(message, TrainingStart), message
        site.answer(message, FIRST if message.build_model else None)


def ask(site: ScriptedSite) -> UpdateRoundStart:
    message = receive(site)
    assert isinstance(message, UpdateRoundStart), message
    return message


def receive(site: ScriptedSite) -> Message:
    """Return the site's next message.

    Pass over what asks again, for these sites look idle, and over the end of a job, which may be one of a test before.
    """
    while isinstance(message := site.receive(), TrainingFinished) or getattr(message, "attempt", 1) > 1:
        continue
    return message


def give(site: ScriptedSite, message: Message, value: float, *, num_examples: int = 1) -> None:
    site.answer(message, {"w": np.full(3, value, np.float32)}, num_examples=num_examples)


def parts(running: Federation, job_id: str, number: int) -> dict[str, Part]:
    with reading(running.services.engine) as connection:
        return {part.site: part for part in find_parts(connection, f"{job_id}.train.{number}")}


def wait_closed(running: Federation, job_id: str, number: int) -> None:
    def closed() -> bool:
        with reading(running.services.engine) as connection:
            found = find_rounds(connection, job_id)
        return any(
            each.kind is RoundKind.TRAIN and each.number == number and each.state is RoundState.CLOSED for each in found
        )

    wait_until(closed, what=f"train round {number} to close")


def is_cancelled(running: Federation, site: str, task_id: str) -> bool:
    return bool(running.services.broker.exists(cancel_key(site, task_id)))


def test_a_round_asks_130_percent_and_closes_at_the_first_100_percent(running: Federation) -> None:
    rules = {"choose": "random", "target_sites": 3, "over_selection": 4 / 3}
    job_id, sites = begin(running, *NAMES, participation=rules)
    messages = {name: ask(site) for name, site in sites.items()}
    for name in ("alpha", "beta", "gamma"):
        give(sites[name], messages[name], 3)
    ended = running.wait(job_id, "completed", "failed")
    assert ended.state is JobState.COMPLETED, ended.reason
    surplus = parts(running, job_id, 1)["delta"]
    assert (surplus.state, surplus.code) == (PartState.DROPPED, "surplus")
    assert is_cancelled(running, "delta", messages["delta"].task_id)
    with reading(running.services.engine) as connection:  # to be too many is no failure
        assert "delta" not in find_members(connection, job_id)


def test_an_update_that_stands_out_does_not_fill_a_round(running: Federation) -> None:
    rules = {"choose": "random", "target_sites": 3, "over_selection": 4 / 3}
    job_id, sites = begin(running, *NAMES, min_sites=3, participation=rules)
    messages = {name: ask(site) for name, site in sites.items()}
    for name, value in (("alpha", 3e6), ("beta", 3), ("gamma", 4), ("delta", 5)):
        give(sites[name], messages[name], value)
        wait_until(lambda name=name: parts(running, job_id, 1)[name].state is not PartState.WAITING, what="the answer")
    ended = running.wait(job_id, "completed", "failed")
    assert ended.state is JobState.COMPLETED, ended.reason
    states = [parts(running, job_id, 1)[name].state for name in NAMES]
    assert states == ["quarantined", "accepted", "accepted", "accepted"]


def test_the_choice_at_random_is_that_of_the_seed(running: Federation) -> None:
    chosen = []
    for seed in (1, 1, 2):
        rules = {"choose": "random", "target_sites": 2}
        job_id, sites = begin(running, *NAMES, rounds=3, seed=seed, participation=rules)
        asked = []
        for number in (1, 2, 3):
            wait_until(lambda job_id=job_id, number=number: parts(running, job_id, number), what="the round")
            names = tuple(parts(running, job_id, number))
            for name in names:
                give(sites[name], ask(sites[name]), 1)
            asked.append(names)
        running.wait(job_id, "completed", "failed")
        chosen.append(asked)
    assert chosen[0] == chosen[1] != chosen[2]
    assert all(len(names) == 2 for names in chosen[0])
    assert len(set(chosen[0])) > 1


def test_the_available_ones_are_those_with_most_to_spare(running: Federation) -> None:
    job_id, sites = begin(running, *NAMES, rounds=1, participation={"choose": "all"})
    for site in sites.values():
        give(site, ask(site), 1)
    running.wait(job_id, "completed")
    for site in running.sites.values():
        site.forget()
    job = submit(
        running.services, running.spec(min_sites=1, participation={"choose": "available", "target_fraction": 0.5})
    )
    for name, busy in (("alpha", 90.0), ("beta", 10.0), ("gamma", 50.0), ("delta", 20.0)):
        running.sites[name].beat(cpu_percent=busy)
    start(running.sites.values())
    wait_until(lambda: parts(running, job.job_id, 1), what="the round")
    assert sorted(parts(running, job.job_id, 1)) == ["beta", "delta"]
    for name in ("beta", "delta"):
        give(running.sites[name], ask(running.sites[name]), 1)
    running.wait(job.job_id, "completed")


def test_an_operators_function_chooses(running: Federation) -> None:
    job_id, sites = begin(running, *NAMES, participation={"choose": "last", "target_sites": 1})
    give(sites["gamma"], ask(sites["gamma"]), 1)
    running.wait(job_id, "completed")
    assert list(parts(running, job_id, 1)) == ["gamma"]


def test_a_job_whose_chooser_fails_ends_with_the_reason(running: Federation) -> None:
    job_id, _ = begin(running, *NAMES, participation={"choose": "wrong", "target_sites": 1})
    assert "ZeroDivisionError" in running.wait(job_id, "failed").reason


def test_a_chooser_that_the_operator_does_not_know_is_refused_at_once(running: Federation) -> None:
    with pytest.raises(InvalidJobFile, match="no chooser 'mine'; there are all, random, available, last, wrong"):
        submit(running.services, running.spec(participation={"choose": "mine", "target_sites": 1}))


def test_a_late_update_counts_in_the_next_round_by_its_discount(running: Federation) -> None:
    job_id, sites = begin(
        running, "alpha", "beta", rounds=2, participation={"target_sites": 1}, late={"policy": "keep", "discount": 1}
    )
    alpha, beta = sites["alpha"], sites["beta"]
    late = ask(beta)
    give(alpha, ask(alpha), 4)  # round 1 is full: 4
    wait_closed(running, job_id, 1)
    assert parts(running, job_id, 1)["beta"].state is PartState.LATE
    assert not is_cancelled(running, "beta", late.task_id)
    second = ask(alpha)  # beta is at work and is not asked
    assert list(parts(running, job_id, 2)) == ["alpha"]
    give(beta, late, 8)  # moves the first model, zeros, by 8: one round late, that counts half
    running.wait(job_id, "completed")
    assert running.model(job_id)["w"].tolist() == [8, 8, 8]  # 4 + 8 / 2
    assert parts(running, job_id, 1)["beta"].counted_in == f"{job_id}.train.2"
    give(alpha, second, 100)  # nobody waits for it


def test_an_update_that_comes_just_as_its_round_gets_full_counts_in_the_next_one(
    running: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, sites = begin(
        running, "alpha", "beta", rounds=2, participation={"target_sites": 1}, late={"policy": "keep"}
    )
    alpha, beta = sites["alpha"], sites["beta"]
    late, message = ask(beta), ask(alpha)
    check = gate._receive_update

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(gate, "_receive_update", check)
        give(alpha, message, 4)
        wait_closed(running, job_id, 1)
        return check(*arguments)

    monkeypatch.setattr(gate, "_receive_update", meanwhile)
    answer = UpdateReady(
        job_id=job_id,
        round=late.round,
        task_id=late.task_id,
        num_examples=1,
        shards=beta.upload(late, {"w": np.full(3, 8, np.float32)}),
    )
    sealed = Envelope.seal(answer, sender="beta", recipient=COORDINATOR, key=beta.key)
    gate.receive_answer(running.services, sealed)
    running.wait(job_id, "completed")
    assert parts(running, job_id, 1)["beta"].counted_in == f"{job_id}.train.2"


def test_asynchronous_training_fills_a_buffer_with_whatever_comes(running: Federation) -> None:
    """FedBuff with a buffer of two: no site waits for a slow one, and what is slow counts when it comes."""
    job_id, sites = begin(
        running, *NAMES, rounds=4, participation={"target_sites": 2}, late={"policy": "keep", "max_staleness": 10}
    )
    slow = ask(sites["delta"])
    pending = {name: ask(sites[name]) for name in ("alpha", "beta", "gamma")}
    for number in (1, 2, 3):
        for name in ("alpha", "beta") if number % 2 else ("gamma", "alpha"):
            give(sites[name], pending[name], number)
        wait_closed(running, job_id, number)
        for name in ("alpha", "beta") if number % 2 else ("gamma", "alpha"):
            pending[name] = ask(sites[name])
    give(sites["delta"], slow, 7)
    give(sites["beta"], pending["beta"], 4)
    ended = running.wait(job_id, "completed", "failed")
    assert ended.state is JobState.COMPLETED, ended.reason
    with reading(running.services.engine) as connection:
        models = sorted(find_models(connection, job_id=job_id, kind="global"), key=lambda model: model.round)
        last = get_models(connection, models[-1].parents[1:])
    assert len(models) == 4
    assert ("delta", 1) in {(model.site, model.round) for model in last}
    counted = [parent for model in models for parent in model.parents[1:]]
    assert len(counted) == len(set(counted)), "no update counts twice"


def test_a_late_answer_is_dropped_when_it_is_too_late(running: Federation) -> None:
    job_id, sites = begin(
        running,
        "alpha",
        "beta",
        rounds=3,
        participation={"target_sites": 1},
        late={"policy": "keep", "max_staleness": 1},
    )
    alpha, beta = sites["alpha"], sites["beta"]
    late = ask(beta)
    for number in (1, 2):
        give(alpha, ask(alpha), 1)
        wait_closed(running, job_id, number)
    assert parts(running, job_id, 1)["beta"].state is PartState.DROPPED
    wait_until(lambda: is_cancelled(running, "beta", late.task_id), what="beta to be told")
    give(beta, late, 1000)
    give(beta, ask(beta), 1)  # it takes part in round 3
    running.wait(job_id, "completed")
    assert "max_staleness" in parts(running, job_id, 1)["beta"].reason


def test_a_site_that_reports_progress_is_given_more_time_and_a_silent_one_is_not(running: Federation) -> None:
    job_id, sites = begin(
        running,
        "alpha",
        "beta",
        "gamma",
        round_deadline_seconds=1,
        start_deadline_seconds=20,
        round_extension_seconds=20,
    )
    messages = {name: ask(site) for name, site in sites.items()}
    report = ProgressReport(task_id=messages["alpha"].task_id, fraction=0.5, text="epoch 1 of 2", at=0)
    write_progress(running.services.broker, report, "alpha", 30)
    wait_until(lambda: parts(running, job_id, 1)["beta"].state is PartState.DROPPED, what="beta to be dropped")
    assert parts(running, job_id, 1)["gamma"].state is PartState.DROPPED
    assert parts(running, job_id, 1)["alpha"].state is PartState.WAITING
    give(sites["beta"], messages["beta"], 5)  # late, but its round is still open
    wait_until(lambda: parts(running, job_id, 1)["beta"].state is PartState.ACCEPTED, what="beta to count")
    give(sites["alpha"], messages["alpha"], 1)
    running.wait(job_id, "completed")
    assert running.model(job_id)["w"].tolist() == [3, 3, 3]


def test_with_the_policy_drop_a_late_answer_never_counts(running: Federation) -> None:
    times = {"round_deadline_seconds": 1, "start_deadline_seconds": 20, "round_extension_seconds": 20}
    job_id, sites = begin(running, "alpha", "beta", **times, late={"policy": "drop"})
    messages = {name: ask(site) for name, site in sites.items()}
    report = ProgressReport(task_id=messages["alpha"].task_id, fraction=0.5, at=0)
    write_progress(running.services.broker, report, "alpha", 30)
    wait_until(lambda: parts(running, job_id, 1)["beta"].state is PartState.DROPPED, what="beta to be dropped")
    give(sites["beta"], messages["beta"], 5)
    give(sites["alpha"], messages["alpha"], 1)
    running.wait(job_id, "completed")
    assert running.model(job_id)["w"].tolist() == [1, 1, 1]


def test_a_site_without_a_heartbeat_is_not_waited_for_if_the_others_are_a_quorum(running: Federation) -> None:
    job_id, sites = begin(running, "alpha", "beta", round_deadline_seconds=600, participation={"absent_seconds": 0.5})
    ask(sites["beta"])
    running.services.broker.delete(heartbeat_key("beta"))
    give(sites["alpha"], ask(sites["alpha"]), 1)
    running.wait(job_id, "completed")
    assert parts(running, job_id, 1)["beta"].reason == "no heartbeat for 0.5 s"


def test_a_site_without_a_heartbeat_is_waited_for_while_the_quorum_needs_it(running: Federation) -> None:
    job_id, sites = begin(running, "alpha", "beta", min_sites=2, participation={"absent_seconds": 0.5})
    message = ask(sites["beta"])
    running.services.broker.delete(heartbeat_key("beta"))
    give(sites["alpha"], ask(sites["alpha"]), 1)
    wait_until(lambda: "Site beta has gone" in running.log(), what="the log to tell")
    wait_until(lambda: parts(running, job_id, 1)["alpha"].state is PartState.ACCEPTED, what="alpha's answer")
    assert parts(running, job_id, 1)["beta"].state is PartState.WAITING
    give(sites["beta"], message, 1)
    running.wait(job_id, "completed")


def test_a_site_that_fails_again_and_again_is_paused_and_then_tried_once_more(running: Federation) -> None:
    rules = {"pause_after": 2, "pause_seconds": 3600}
    job_id, sites = begin(running, "alpha", "beta", rounds=4, participation=rules)
    alpha, beta = sites["alpha"], sites["beta"]
    for number in (1, 2):
        beta.decline(ask(beta), "no memory", failed=True)
        give(alpha, ask(alpha), 1)
        wait_closed(running, job_id, number)
    with reading(running.services.engine) as connection:
        member = find_members(connection, job_id)["beta"]
    assert member.reason == "2 rounds in a row without a good answer, the last failed: no memory"
    assert list(parts(running, job_id, 3)) == ["alpha"]
    join(running.services, job_id, "beta")  # a person ends the pause
    give(alpha, ask(alpha), 1)
    give(beta, ask(beta), 1)
    give(alpha, ask(alpha), 1)
    running.wait(job_id, "completed")
    with reading(running.services.engine) as connection:
        assert find_members(connection, job_id) == {}


def test_a_site_joins_a_job_that_is_open_to_it_in_the_next_round(running: Federation) -> None:
    job_id, sites = begin(running, "alpha", rounds=2, participation={"join": True})
    message = ask(sites["alpha"])
    running.sites["beta"].beat()
    running.sites["gamma"].beat(trainers=("other",))
    give(sites["alpha"], message, 1)
    give(running.sites["beta"], ask(running.sites["beta"]), 3)
    give(sites["alpha"], ask(sites["alpha"]), 1)
    running.wait(job_id, "completed")
    assert running.job(job_id).sites == ("alpha", "beta")
    assert running.model(job_id)["w"].tolist() == [2, 2, 2]


def test_a_site_leaves_a_job_in_mid_round(running: Federation) -> None:
    job_id, sites = begin(running, "alpha", "beta", rounds=2)
    message = ask(sites["beta"])
    leave(running.services, job_id, "beta", "its data are wrong")
    give(sites["alpha"], ask(sites["alpha"]), 1)
    told = sites["beta"].receive()
    assert isinstance(told, ClientRemoved)
    assert told.reason == "its data are wrong"
    give(sites["beta"], message, 100)  # nobody takes it any more
    give(sites["alpha"], ask(sites["alpha"]), 1)
    running.wait(job_id, "completed")
    assert running.model(job_id)["w"].tolist() == [1, 1, 1]
    assert running.job(job_id).sites == ("alpha",)


def test_what_join_and_leave_refuse(running: Federation) -> None:
    job_id, sites = begin(running, "alpha", "beta", min_sites=2)
    with pytest.raises(Conflict, match="its quorum is 2; end the job instead"):
        leave(running.services, job_id, "beta", "")
    with pytest.raises(NotFound, match="'delta' is not in job"):
        leave(running.services, job_id, "delta", "")
    with pytest.raises(NotFound, match="no site 'omega'"):
        join(running.services, job_id, "omega")
    running.sites["delta"].beat(trainers=("other",))
    with pytest.raises(Conflict, match="does not offer the trainer 'constant'; it offers other"):
        join(running.services, job_id, "delta")
    for site in sites.values():
        give(site, ask(site), 1)
    running.wait(job_id, "completed")
    with pytest.raises(Conflict, match="has ended: it is completed"):
        join(running.services, job_id, "gamma")


def test_a_site_that_is_asked_again_writes_to_another_place(running: Federation) -> None:
    """The copy that came first may be lost, or at work in a process that nobody hears of: both may answer."""
    job_id, sites = begin(running, "alpha")
    first = ask(sites["alpha"])
    again = sites["alpha"].receive()
    assert isinstance(again, UpdateRoundStart)
    assert (first.attempt, again.attempt) == (1, 2)
    assert set(first.upload_urls).isdisjoint(again.upload_urls)
    sites["alpha"].upload(again, {"w": np.full(3, 9, np.float32)})  # it is still at work on that one
    give(sites["alpha"], first, 1)
    running.wait(job_id, "completed")
    assert parts(running, job_id, 1)["alpha"].attempt == 1
    assert running.model(job_id)["w"].tolist() == [1, 1, 1]


def test_a_site_that_comes_back_takes_part_again(running: Federation) -> None:
    job_id, sites = begin(running, "alpha", "beta", rounds=3, participation={"absent_seconds": 0.3})
    alpha, beta = sites["alpha"], sites["beta"]
    stale = ask(beta)
    running.services.broker.delete(heartbeat_key("beta"))
    give(alpha, ask(alpha), 1)
    second = ask(alpha)
    assert list(parts(running, job_id, 2)) == ["alpha"]
    beta.beat()
    give(beta, stale, 100)  # what it had trained when it went; its round has ended
    give(alpha, second, 1)
    give(alpha, ask(alpha), 1)
    give(beta, ask(beta), 3)
    running.wait(job_id, "completed")
    assert running.model(job_id)["w"].tolist() == [2, 2, 2]
    assert job_progress(running.services, job_id).rounds_done == 3
