"""Crashes, twins and lost messages: the job ends with the same model, to the bit."""

import hashlib
import os
import random
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from common.broker import connect
from common.errors import BrokerUnavailable, Conflict
from common.heartbeats import read_heartbeats
from common.queues import site_queue
from common.settings import Settings
from coordinator import closing, combining, submitting
from coordinator.aggregation import shares
from coordinator.asking import Asking
from coordinator.combining import OPTIMIZER
from coordinator.jobs import JobState, add_job, get_job, new_job
from coordinator.parts import find_parts, leave_parts
from coordinator.planning import plan_next
from coordinator.progress import job_progress
from coordinator.rounds import claim_round, get_round
from coordinator.states import PartState, RoundKind
from coordinator.submitting import submit
from store.database import reading, writing
from store.models import find_models
from tests.contract.postgres import PostgresServer
from tests.federation import Federation, Tensors, federation, heartbeat, read_model, wait_until
from tests.servers import valkey

NAMES = ("alpha", "beta", "gamma")
ROUNDS = 6


def train(site: str, number: int, tensors: Mapping[str, np.ndarray]) -> tuple[Tensors, int]:
    """Do a step that depends on the site, the round and the global model, and on nothing else."""
    if number == 0:
        return {"w": np.linspace(-1, 1, 1000, dtype=np.float32), "n": np.array(0)}, 1
    seed = int.from_bytes(hashlib.sha256(f"{site} {number}".encode()).digest()[:4], "big")
    step = np.random.default_rng(seed).standard_normal(1000).astype(np.float32)
    return {"w": tensors["w"] * np.float32(0.9) + step, "n": tensors["n"] + number}, 1 + seed % 100


Step = Callable[[np.ndarray, np.ndarray], np.ndarray]  # gives the new model of the model and the updates' mean


def reference(rounds: int, step: Step = lambda model, mean: mean) -> dict[str, np.ndarray]:
    """Train in one process: the plain loop that every federated job must equal."""
    model: Tensors = train("alpha", 0, {})[0]
    for number in range(1, rounds + 1):
        updates = [train(name, number, model) for name in NAMES]
        total = np.zeros(1000, np.float32)
        for (tensors, _), weight in zip(updates, shares([count for _, count in updates]), strict=True):
            total += tensors["w"] * np.float32(weight)
        model = {"w": step(model["w"], total), "n": np.maximum.reduce([tensors["n"] for tensors, _ in updates])}
    return dict(model)


class PlainAdam:
    """FedAdam as the paper has it, with both moments in this process's memory."""

    def __init__(self) -> None:
        self.first, self.second = np.zeros(1000, np.float32), np.zeros(1000, np.float32)

    def __call__(self, model: np.ndarray, mean: np.ndarray) -> np.ndarray:
        real, change = np.float32, mean - model
        self.first = real(0.9) * self.first + real(1 - 0.9) * change
        self.second = real(0.99) * self.second + real(1 - 0.99) * change**2
        return model + self.first / (np.sqrt(self.second) + real(1e-3)) * real(0.1)


@pytest.fixture
def three_sites(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path, *NAMES) as made:
        yield made


def serve_all(made: Federation, stack: ExitStack, *, seed: int = 0) -> None:
    for name, site in made.sites.items():
        stack.enter_context(site.serving(lambda number, tensors, name=name: train(name, number, tensors), seed=seed))


def assert_same_as_reference(made: Federation, job_id: str, rounds: int = ROUNDS, **options: Step) -> None:
    job = made.job(job_id)
    assert job.state is JobState.COMPLETED, job.reason
    expected, found = reference(rounds, **options), made.model(job_id)
    assert {name: tensor.tobytes() for name, tensor in found.items()} == {
        name: np.asarray(tensor).tobytes() for name, tensor in expected.items()
    }
    with reading(made.services.engine) as connection:
        models = find_models(connection, job_id=job_id, kind="global")
    assert sorted(model.round for model in models) == list(range(1, rounds + 1))  # one aggregation a round


def test_a_distributed_job_equals_the_plain_loop_to_the_bit_whatever_order_updates_arrive_in(
    three_sites: Federation,
) -> None:
    with three_sites.coordinator():
        for seed in (1, 2, 3):
            with ExitStack() as stack:
                serve_all(three_sites, stack, seed=seed)
                job = submit(three_sites.services, three_sites.spec(rounds=ROUNDS))
                three_sites.wait(job.job_id, "completed", "failed")
            assert_same_as_reference(three_sites, job.job_id)


def test_two_coordinators_at_once_never_aggregate_a_round_twice(three_sites: Federation) -> None:
    with ExitStack() as stack:
        stack.enter_context(three_sites.coordinator(log="first.log"))
        stack.enter_context(three_sites.coordinator(log="second.log"))
        wait_until(lambda: all(" ready." in three_sites.log(name) for name in ("first.log", "second.log")))
        serve_all(three_sites, stack)
        # two jobs, or the two would take turns so evenly that one of them gets every callback
        jobs = [submit(three_sites.services, three_sites.spec(rounds=20)) for _ in range(2)]
        for job in jobs:
            three_sites.wait(job.job_id, "completed", "failed", seconds=60)
    for job in jobs:
        assert_same_as_reference(three_sites, job.job_id, rounds=20)
    closed = {
        name: re.findall(r"Closed train round (\d+) ", three_sites.log(name)) for name in ("first.log", "second.log")
    }
    assert all(closed.values()), "both have taken part"
    assert sorted(int(number) for numbers in closed.values() for number in numbers) == sorted([*range(1, 21)] * 2)


def kill(process: "subprocess.Popen[bytes]") -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_coordinator_killed_in_mid_round_goes_on_after_a_restart(three_sites: Federation) -> None:
    alpha, beta, gamma = three_sites.sites.values()
    with three_sites.coordinator() as process:
        job = submit(three_sites.services, three_sites.spec(rounds=2))
        for site in (alpha, beta, gamma):
            site.start(train(site.name, 0, {})[0])
        messages = {site.name: site.receive() for site in (alpha, beta, gamma)}
        tensors, examples = train("alpha", 1, alpha.tensors(messages["alpha"]))
        alpha.answer(messages["alpha"], tensors, num_examples=examples)
        wait_until(
            lambda: any(part.state == "accepted" for part in job_progress(three_sites.services, job.job_id).parts)
        )
        kill(process)
    for site in (beta, gamma):  # while no coordinator is there
        tensors, examples = train(site.name, 1, site.tensors(messages[site.name]))
        site.answer(messages[site.name], tensors, num_examples=examples)
    with three_sites.coordinator(), ExitStack() as stack:
        serve_all(three_sites, stack)
        three_sites.wait(job.job_id, "completed", "failed")
    assert_same_as_reference(three_sites, job.job_id, rounds=2)


@pytest.mark.parametrize("seed", range(3))
def test_a_coordinator_that_is_killed_again_and_again_at_random_moments_gets_there(
    three_sites: Federation, seed: int
) -> None:
    job_id = train_while_it_is_killed(three_sites, seed, test_every=2)
    assert_same_as_reference(three_sites, job_id)


@pytest.mark.parametrize("seed", range(3))
def test_an_optimizers_moments_survive_it_when_the_coordinator_is_killed_again_and_again(
    three_sites: Federation, seed: int
) -> None:
    job_id = train_while_it_is_killed(three_sites, seed, strategy={"name": "fedadam"}, test_every=0)
    optimizer = PlainAdam()
    assert_same_as_reference(three_sites, job_id, step=optimizer)
    with reading(three_sites.services.engine) as connection:
        (newest,) = find_models(connection, job_id=job_id, kind="global", limit=1)
        kept = find_models(connection, job_id=job_id, kind=OPTIMIZER)
    assert sorted(state.round for state in kept) == list(range(1, ROUNDS + 1))  # one for each round, and no other
    assert newest.model_meta[OPTIMIZER]["model_id"] == kept[0].model_id
    moments = read_model(three_sites.services, kept[0])
    assert moments["first/w"].tobytes() == optimizer.first.tobytes()
    assert moments["second/w"].tobytes() == optimizer.second.tobytes()


def train_while_it_is_killed(three_sites: Federation, seed: int, **spec: Any) -> str:
    """Train a job to its end while the coordinator is killed at random moments; return the job's id."""
    moments = random.Random(seed)
    with ExitStack() as stack:
        serve_all(three_sites, stack, seed=seed)
        job = submit(three_sites.services, three_sites.spec(rounds=ROUNDS, **spec))
        kills = 0
        while three_sites.job(job.job_id).state in (JobState.SUBMITTED, JobState.RUNNING) and kills < 6:
            log = f"coordinator-{kills}.log"
            with three_sites.coordinator(log=log) as process:
                wait_until(lambda log=log: " ready." in three_sites.log(log))
                time.sleep(moments.uniform(0, 0.25))  # the moment is the point
                kill(process)
            kills += 1
        with three_sites.coordinator():
            three_sites.wait(job.job_id, "completed", "failed", seconds=30)
    return job.job_id


def test_a_round_whose_chord_counters_are_lost_is_closed_all_the_same(three_sites: Federation) -> None:
    with three_sites.coordinator():
        job = submit(three_sites.services, three_sites.spec(rounds=1))
        sites = list(three_sites.sites.values())
        for site in sites:
            site.start(train(site.name, 0, {})[0])
        messages = {site.name: site.receive() for site in sites}
        for key in three_sites.services.broker.scan_iter("celery-taskset-meta-*"):
            three_sites.services.broker.delete(key)
        for site in sites:
            tensors, examples = train(site.name, 1, site.tensors(messages[site.name]))
            site.answer(messages[site.name], tensors, num_examples=examples)
        three_sites.wait(job.job_id, "completed", "failed")
    assert_same_as_reference(three_sites, job.job_id, rounds=1)


def test_a_round_that_was_planned_but_never_sent_is_sent(three_sites: Federation) -> None:
    """A crash between the two leaves the records, from which everything can be sent again."""
    services = three_sites.services
    job = new_job(three_sites.spec(rounds=ROUNDS), sites=NAMES, model_id=None, submitted_by="test")
    with writing(services.engine) as connection:
        add_job(connection, job)
        assert (
            plan_next(
                connection, get_job(connection, job.job_id), None, alive=dict.fromkeys(NAMES, heartbeat(("constant",)))
            )
            is not None
        )
    with three_sites.coordinator(), ExitStack() as stack:
        serve_all(three_sites, stack)
        three_sites.wait(job.job_id, "completed", "failed")
    assert_same_as_reference(three_sites, job.job_id)


def test_a_round_that_cannot_be_sent_keeps_no_other_round_from_its_deadline(three_sites: Federation) -> None:
    services = three_sites.services
    poison = new_job(  # `submit` would refuse it: no message holds such a number
        three_sites.spec(config={"x": 2**70}, round_deadline_seconds=2), sites=NAMES, model_id=None, submitted_by="test"
    )
    with writing(services.engine) as connection:
        add_job(connection, poison)
    with three_sites.coordinator():
        job = submit(services, three_sites.spec(round_deadline_seconds=1))  # which nobody answers
        three_sites.wait(job.job_id, "failed")
        three_sites.wait(poison.job_id, "failed")
    assert "no answer before the deadline" in three_sites.job(job.job_id).reason


def test_an_abort_and_the_end_of_a_round_do_not_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL would end one of two transactions that change a job and its round in different orders."""
    together = threading.Barrier(2)

    def meet(change: Callable[..., bool]) -> Callable[..., bool]:
        def changed(*arguments: Any, **values: Any) -> bool:
            result = change(*arguments, **values)
            with suppress(threading.BrokenBarrierError):  # one of the two has to wait before it comes here
                together.wait(1)
            return result

        return changed

    monkeypatch.setattr("coordinator.closing.close_round", meet(closing.close_round))
    monkeypatch.setattr("coordinator.submitting.finish", meet(submitting.finish))
    with PostgresServer() as server, federation(tmp_path, "alpha", database_url=server.new_database()) as made:
        services = made.services
        job = submit(services, made.spec())
        closing.start_job(services, job.job_id)
        (round_,) = job_progress(services, job.job_id).rounds
        with writing(services.engine) as connection:
            leave_parts(connection, find_parts(connection, round_.round_id), PartState.DROPPED, "test")
        with ThreadPoolExecutor(2) as pool:
            settled = pool.submit(closing.settle_round, services, round_.round_id)
            aborted = pool.submit(submitting.abort, services, job.job_id, "test")
            settled.result(20)
            with suppress(Conflict):  # the round's end may have been first
                aborted.result(20)
        assert made.job(job.job_id).state in (JobState.ABORTED, JobState.FAILED)


def test_a_site_that_never_answers_is_asked_ever_more_rarely(
    three_sites: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = three_sites.services
    job = submit(services, three_sites.spec(sites=("alpha",), round_deadline_seconds=3600))
    closing.start_job(services, job.job_id)
    asking, times = Asking(), []
    heartbeats = read_heartbeats(services.broker, ["alpha"])
    for second in range(200):
        services.broker.delete(site_queue("alpha"))
        monkeypatch.setattr("coordinator.asking.time.monotonic", lambda second=second: float(second))
        asking.ask_again(services, job_progress(services, job.job_id).parts, heartbeats)
        if services.broker.llen(site_queue("alpha")):
            times.append(second)
    assert times == [1, 2, 4, 8, 16, 32, 64, 128]


def test_a_process_may_open_as_many_files_as_a_round_has_updates() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        combining._allow_open_files(512)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (512, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_broker_that_has_stopped_to_answer_is_told_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.broker._ANSWER_SECONDS", 0.3)
    with valkey() as server:
        client = connect(Settings(broker_url=SecretStr(server.url)))
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(BrokerUnavailable, match="The broker does not answer"):
                read_heartbeats(client, ["alpha"])
        finally:
            os.kill(server.pid, signal.SIGCONT)
            client.close()


def test_a_round_whose_aggregating_process_is_gone_is_taken_up_when_the_lease_runs_out(
    three_sites: Federation,
) -> None:
    services = three_sites.services
    sites = list(three_sites.sites.values())
    with three_sites.coordinator() as process:
        job = submit(services, three_sites.spec(rounds=1))
        for site in sites:
            site.start(train(site.name, 0, {})[0])
        messages = {site.name: site.receive() for site in sites}
        kill(process)
    round_ = job_progress(services, job.job_id).newest
    assert round_ is not None
    assert round_.kind is RoundKind.TRAIN
    for site in sites:
        tensors, examples = train(site.name, 1, site.tensors(messages[site.name]))
        site.answer(messages[site.name], tensors, num_examples=examples)
    with three_sites.coordinator(log="gate.log"):  # takes the answers, and finds the round in other hands
        with writing(services.engine) as connection:
            claimed_early = claim_round(connection, round_.round_id, "a process that has died", 2.0)
        three_sites.wait(job.job_id, "completed", "failed")
    assert not claimed_early or "taking it up" in three_sites.log("gate.log")
    assert_same_as_reference(three_sites, job.job_id, rounds=1)


def answered_round(made: Federation) -> str:
    """Bring a job to where its first training round waits to be settled, with no coordinator; return its id."""
    services = made.services
    with made.coordinator() as process:
        job = submit(services, made.spec(rounds=1))
        for site in made.sites.values():
            site.start(train(site.name, 0, {})[0])
        for site in made.sites.values():
            message = site.receive()
        kill(process)
    assert message.round == 1
    round_ = job_progress(services, job.job_id).newest
    assert round_ is not None
    with writing(services.engine) as connection:
        leave_parts(connection, find_parts(connection, round_.round_id), PartState.DROPPED, "test")
    return round_.round_id


def test_an_aggregation_that_ends_its_process_again_and_again_fails_the_job(three_sites: Federation) -> None:
    services = three_sites.services
    round_id = answered_round(three_sites)
    for number in range(closing._MOST_CLAIMS):  # processes that have died
        with writing(services.engine) as connection:
            assert claim_round(connection, round_id, f"process {number}", -1)
    closing.settle_round(services, round_id)
    job_id = round_id.partition(".")[0]
    job = three_sites.job(job_id)
    assert job.state is JobState.FAILED
    assert "it was begun 10 times, and each time the process ended" in job.reason


def test_an_aggregation_that_waits_for_a_service_is_not_held_against_the_round(
    three_sites: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = three_sites.services
    round_id = answered_round(three_sites)

    def away(*_: object) -> None:
        raise BrokerUnavailable("away")

    monkeypatch.setattr("coordinator.closing._settle", away)
    with pytest.raises(BrokerUnavailable):
        closing.settle_round(services, round_id)
    with reading(services.engine) as connection:
        assert get_round(connection, round_id).claims == 0
