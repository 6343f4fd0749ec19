"""A job in which everything happens once, played by scripted sites, and the plain loop that its model must equal.

Four sites: delta declines the start. Round 1: all three others are in. Round 2: gamma's update holds a NaN. Round 3:
beta fails. Round 4: gamma's update is a million times too far away, which shows only beside the others. There are test
rounds, moments at the end, and notices to everybody.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from queue import Empty
from typing import Any
from unittest.mock import patch

import numpy as np

from common.messages import ModelTestRound, PartDeclined, SwagRoundStart, TrainingStart, UpdateReady, UpdateRoundStart
from coordinator.aggregation import shares
from coordinator.jobs import JobState
from coordinator.quarantine import find_entries, keep_quarantine
from coordinator.submitting import submit
from store.database import reading
from store.models import find_models
from store.tables import outbox
from tests.chaos import processes
from tests.chaos.steps import Disturbed, Target, disturb
from tests.federation import Federation, ScriptedSite, Tensors, wait_until
from tests.integration.test_recovery import train

SITES = ("alpha", "beta", "delta", "gamma")
ROUNDS = 4
ACCEPTED = {1: ("alpha", "beta", "gamma"), 2: ("alpha", "beta"), 3: ("alpha", "gamma"), 4: ("alpha", "beta")}
BEAT_SECONDS = 10.0
# What is done only when something seems to be lost: a busy machine's job may pass it, and the next one may not.
HEALING = ("dispatch.publish_again", "lease.held_round.renew", "in sweeper.", "in waiting.")


def plain_loop(accepted: Mapping[int, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Train in one process over the sites that count in each round."""
    model: Tensors = train("alpha", 0, {})[0]
    for number in sorted(accepted):
        updates = [train(name, number, model) for name in sorted(accepted[number])]
        total = np.zeros(1000, np.float32)
        for (tensors, _), weight in zip(updates, shares([count for _, count in updates]), strict=True):
            total += tensors["w"] * np.float32(weight)
        model = {"w": total, "n": np.maximum.reduce([tensors["n"] for tensors, _ in updates])}
    return dict(model)


def answer(site: ScriptedSite, message: Any) -> UpdateReady | PartDeclined | None:
    """Answer a message as the play has it; return the answer."""
    name = site.name
    if isinstance(message, TrainingStart):
        if name == "delta":
            return _decline(site, message, "There is no consent for this study.", failed=False)
        return site.answer(message, train(name, 0, {})[0] if message.build_model else None)
    if isinstance(message, UpdateRoundStart):
        tensors, examples = train(name, message.round, site.tensors(message))
        if (name, message.round) == ("beta", 3):
            return _decline(site, message, "The disk is full.", failed=True)
        if (name, message.round) == ("gamma", 2):
            tensors = {**tensors, "w": np.full(1000, np.nan, np.float32)}
        if (name, message.round) == ("gamma", 4):
            tensors = {**tensors, "w": tensors["w"] * np.float32(1e6)}
        return site.answer(message, tensors, num_examples=examples)
    if isinstance(message, ModelTestRound):
        return site.answer(message, metrics={"round": message.round})
    if isinstance(message, SwagRoundStart):
        mean = site.tensors(message)["w"]
        return site.answer(message, {"first/w": mean, "second/w": mean * mean})
    return None


def _decline(site: ScriptedSite, message: Any, reason: str, *, failed: bool) -> PartDeclined:
    declined = PartDeclined(
        job_id=message.job_id, task_id=message.task_id, attempt=message.attempt, reason=reason, failed=failed
    )
    site.send(declined)
    return declined


@contextmanager
def playing(made: Federation) -> Iterator[None]:
    """Let every site answer in a thread of its own, with a receipt for what it is asked again."""
    done = threading.Event()
    with ExitStack() as stack:
        stack.callback(done.set)
        threads = [threading.Thread(target=_serve, args=(site, done), name=name) for name, site in made.sites.items()]
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(done.set)
        yield


def _serve(site: ScriptedSite, done: threading.Event) -> None:
    receipts: dict[str, UpdateReady | PartDeclined] = {}
    beat_at = 0.0
    while not done.is_set():
        if time.monotonic() > beat_at:
            site.beat()
            beat_at = time.monotonic() + BEAT_SECONDS
        try:
            message = site._receive(0.2)
        except Empty:
            continue
        task_id = getattr(message, "task_id", "")
        if task_id in receipts:
            site.send(receipts[task_id])
        elif (given := answer(site, message)) is not None:
            receipts[task_id] = given


def spec(made: Federation, **changes: Any) -> Any:
    """Return the play's job."""
    values = {"rounds": ROUNDS, "test_every": 2, "swag": True, "min_sites": 2, "round_deadline_seconds": 600}
    return made.spec(**{**values, **changes})


def record_points(made: Federation) -> list[str]:
    """Play one job undisturbed; return the points that its coordinator passes."""
    recorded = processes.coordinator(made, "recorded")
    with processes.running(recorded):
        job = submit(made.services, spec(made))
        made.wait(job.job_id, "completed", "failed", seconds=60)
        wait_until(is_played(made, job.job_id), what="the last notice")
    return [point for point in recorded.passed() if not any(name in point for name in HEALING)]


def disturb_coordinator(made: Federation, targets: Iterable[Target]) -> Disturbed:
    """Kill a coordinator at each target while the play goes on; check every job."""
    program = processes.coordinator(made)
    try:
        done = disturb(made, program, targets, lambda: submit(made.services, spec(made)).job_id)
        with patch("coordinator.quarantine._PATIENCE_SECONDS", 0):  # the hourly look, now
            keep_quarantine(made.services)
        for job_id in done.jobs:
            wait_until(is_played(made, job_id), what="the last notice")
    finally:
        program.end()
    return done


def check_played(made: Federation, job_id: str) -> None:
    """Fail unless the job is what the plain loop gives, each round aggregated once, and nothing is left over."""
    job = made.job(job_id)
    assert job.state is JobState.COMPLETED, job.reason
    expected, found = plain_loop(ACCEPTED), made.model(job_id)
    assert {name: tensor.tobytes() for name, tensor in found.items()} == {
        name: np.asarray(tensor).tobytes() for name, tensor in expected.items()
    }
    with reading(made.services.engine) as connection:
        models = find_models(connection, job_id=job_id, kind="global")
        moments = find_models(connection, job_id=job_id, kind="moments")
        entries = find_entries(connection, job_id=job_id)
        notices = connection.execute(outbox.select().where(outbox.c.job_id == job_id)).mappings().all()
    assert sorted(model.round for model in models) == list(range(1, ROUNDS + 1))  # one aggregation a round
    for model in models:
        assert len(set(model.parents)) == len(model.parents) == 1 + len(ACCEPTED[model.round]), model
    assert sum(model.site is None for model in moments) == 1
    assert sorted((entry.site, entry.round_id.rpartition(".")[2], entry.is_stored) for entry in entries) == [
        ("gamma", "2", True),
        ("gamma", "4", True),
    ]
    assert all(made.services.blobs.find(blob.digest) for entry in entries for blob in entry.found if blob)
    assert sorted((notice["kind"], notice["site"]) for notice in notices) == [
        ("CLIENT_REMOVED", "delta"),
        *(("TRAINING_FINISHED", site) for site in SITES),
    ]
    assert all(notice["sent_at"] for notice in notices)


def is_played(made: Federation, job_id: str) -> Callable[[], bool]:
    """Return what asks whether the job is as it must be; the last thing to be recorded is that a notice was sent."""
    end = time.monotonic() + 10

    def ask() -> bool:
        try:
            check_played(made, job_id)
        except AssertionError:
            if time.monotonic() > end:
                raise
            return False
        return True

    return ask
