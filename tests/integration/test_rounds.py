"""Rounds through a real Valkey and a real coordinator process, with sites that follow a script."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from common.dead_letters import dead_letter_key
from common.errors import Conflict, InvalidJobFile
from common.messages import (
    ClientRemoved,
    ModelTestRound,
    Shard,
    SwagRoundStart,
    TrainingFinished,
    UpdateReady,
    UpdateRoundStart,
)
from common.queues import cancel_key
from common.signing import SigningKey
from coordinator.jobs import JobState, find_jobs
from coordinator.parts import Part
from coordinator.progress import JobProgress, job_progress
from coordinator.states import RoundKind, RoundState
from coordinator.submitting import abort, submit
from store.database import reading, writing
from store.lineage import lineage
from store.models import ModelInfo, add_model, find_models
from store.parties import set_enabled
from store.weights import store_weights
from tests.federation import Federation, ScriptedSite, federation, wait_until

FIRST = {"w": np.zeros(3, np.float32), "n": np.array(0, np.int64)}


def update(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(3, value, np.float32), "n": np.array(int(value), np.int64)}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three sites and one coordinator process for all tests of this module that disturb neither."""
    with federation(tmp_path_factory.mktemp("federation"), "alpha", "beta", "gamma") as made, made.coordinator():
        yield made


def begin(running: Federation, *names: str, **spec: Any) -> tuple[str, list[ScriptedSite]]:
    """Submit a job for the sites and answer its start."""
    sites = [running.sites[name] for name in names]
    for site in sites:
        site.forget()  # what a test before this one has left
    job = submit(running.services, running.spec(sites=names, **spec))
    for site in sites:
        site.start(FIRST)
    return job.job_id, sites


def finish(*sites: ScriptedSite) -> TrainingFinished:
    """Take the last message of a job from each site's queue."""
    messages = [site.receive() for site in sites]
    assert all(isinstance(message, TrainingFinished) for message in messages), messages
    last = messages[-1]
    assert isinstance(last, TrainingFinished)
    return last


def progress(running: Federation, job_id: str) -> JobProgress:
    return job_progress(running.services, job_id)


def parts(running: Federation, job_id: str) -> dict[str, Part]:
    return {part.site: part for part in progress(running, job_id).parts}


def test_a_job_trains_tests_and_finishes(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta", test_every=1)
    for site, value, examples in ((alpha, 1.0, 1), (beta, 4.0, 2)):
        message = site.receive()
        assert isinstance(message, UpdateRoundStart)
        assert site.tensors(message)["w"].tolist() == [0, 0, 0]
        site.answer(message, update(value), num_examples=examples, metrics={"train_loss": value})
    for site, accuracy, examples in ((alpha, 0.5, 1), (beta, 0.8, 2)):
        message = site.receive()
        assert isinstance(message, ModelTestRound)
        assert site.tensors(message)["w"].tolist() == [3, 3, 3]  # (1*1 + 2*4) / 3
        site.answer(message, num_examples=examples, metrics={"accuracy": accuracy})
    assert finish(alpha, beta).state == "completed"
    model = running.model(job_id)
    assert model["w"].tolist() == [3, 3, 3]
    assert model["n"] == 4  # a counter is not averaged
    assert progress(running, job_id).metric("accuracy") == ((1, pytest.approx(0.7)),)


def test_nobody_listens_for_results_that_nobody_waits_for(running: Federation) -> None:
    def subscriptions() -> int:
        return int(running.services.broker.info("commandstats").get("cmdstat_subscribe", {}).get("calls", 0))

    before = subscriptions()
    _, (alpha, beta) = begin(running, "alpha", "beta")
    for site in (alpha, beta):
        site.answer(site.receive(), update(1))
    finish(alpha, beta)
    assert subscriptions() == before
    assert running.services.broker.pubsub_channels("celery-task-meta-*") == []


def test_a_model_knows_its_parents(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta")
    for site in (alpha, beta):
        site.answer(site.receive(), update(1))
    finish(alpha, beta)
    model_id = running.job(job_id).model_id
    assert model_id is not None
    with reading(running.services.engine) as connection:
        kinds = [
            (depth, node.model.model_kind, node.model.site)
            for depth, node in lineage(connection, model_id).walk()
            if node.model
        ]
    assert (0, "global", None) in kinds
    assert {(1, "update", "alpha"), (1, "update", "beta")} <= set(kinds)
    assert any(kind == "initial" for _, kind, _ in kinds)


@pytest.mark.parametrize(
    ("bad", "examples", "reason"),
    [
        ({"w": np.zeros(3, np.float32)}, 1, "Tensor 'n' is missing"),
        ({**update(1), "x": np.zeros(1)}, 1, "Tensor 'x' is not in the global model"),
        ({**update(1), "w": np.zeros(4, np.float32)}, 1, r"has shape \(4,\); expected \(3,\)"),
        ({**update(1), "w": np.zeros(3, np.float16)}, 1, "has dtype F16; expected F32"),
        ({**update(1), "w": np.float32([0, np.nan, 0])}, 1, "Tensor 'w' is not finite: element 1 is NaN"),
        ({**update(1), "w": np.float32([0, 0, -np.inf])}, 1, "Tensor 'w' is not finite: element 2 is infinite"),
        ({**update(1), "w": np.zeros(10**5, np.float32)}, 1, "The update has .* bytes; the global model has 20"),
        (update(1), 0, "num_examples is 0"),
        (update(1), -5, "num_examples is -5"),
        (update(1), 10**15, "num_examples is 1000000000000000"),
    ],
    ids=["name missing", "name added", "shape", "dtype", "nan", "inf", "size", "none", "negative", "absurd"],
)  # fmt: skip
def test_a_bad_update_is_quarantined_with_its_reason_and_the_round_goes_on(
    running: Federation, bad: dict[str, np.ndarray], examples: int, reason: str
) -> None:
    job_id, (alpha, beta, gamma) = begin(running, "alpha", "beta", "gamma", min_sites=2)
    alpha.answer(alpha.receive(), bad, num_examples=examples)
    for site in (beta, gamma):
        site.answer(site.receive(), update(2))
    assert finish(alpha, beta, gamma).state == "completed"
    part = parts(running, job_id)["alpha"]
    assert part.state == "quarantined"
    assert re.search(reason, part.reason), part.reason
    assert running.model(job_id)["w"].tolist() == [2, 2, 2]


def test_an_update_with_another_digest_than_announced_is_quarantined(running: Federation) -> None:
    job_id, (alpha, beta, gamma) = begin(running, "alpha", "beta", "gamma", min_sites=2)
    message = alpha.receive()
    assert isinstance(message, UpdateRoundStart)
    (shard,) = alpha.upload(message, update(9))
    lie = shard.model_copy(update={"digest": "0" * 64})
    alpha.answer(message, shards=(lie,))
    for site in (beta, gamma):
        site.answer(site.receive(), update(2))
    finish(alpha, beta, gamma)
    assert parts(running, job_id)["alpha"].state == "quarantined"


def test_an_update_that_was_announced_but_never_uploaded_is_quarantined(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta", min_sites=1)
    message = alpha.receive()
    alpha.answer(message, shards=(Shard(digest="0" * 64, size=100),))
    beta.answer(beta.receive(), update(2))
    finish(alpha, beta)
    assert parts(running, job_id)["alpha"].state == "quarantined"


def test_a_site_that_declines_counts_as_an_answer(running: Federation) -> None:
    job_id, (alpha, beta, gamma) = begin(running, "alpha", "beta", "gamma", min_sites=2)
    alpha.decline(alpha.receive(), "no consent for this study")
    for site in (beta, gamma):
        site.answer(site.receive(), update(2))
    assert finish(alpha, beta, gamma).state == "completed"
    part = parts(running, job_id)["alpha"]
    assert (part.state, part.reason) == ("declined", "no consent for this study")


def test_a_job_without_a_quorum_fails_with_every_sites_reason(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta", min_sites=2)
    alpha.decline(alpha.receive(), "out of memory", failed=True)
    beta.answer(beta.receive(), update(2))
    ended = finish(alpha, beta)
    assert ended.state == "failed"
    reason = running.job(job_id).reason
    assert reason == ended.reason
    assert "1 of 2 sites answered well, but the quorum is 2. alpha failed: out of memory" in reason


def test_a_site_that_declines_the_start_is_out_of_the_job(running: Federation) -> None:
    job = submit(running.services, running.spec(sites=("alpha", "beta", "gamma"), min_sites=2))
    alpha, beta, gamma = (running.sites[name] for name in ("alpha", "beta", "gamma"))
    gamma.decline(gamma.receive(), "the trainer is not on this site's list")
    alpha.start(FIRST)
    beta.start(FIRST)
    removed = gamma.receive()
    assert isinstance(removed, ClientRemoved)
    assert removed.reason == "the trainer is not on this site's list"
    for site in (alpha, beta):
        site.answer(site.receive(), update(1))
    finish(alpha, beta, gamma)
    assert running.job(job.job_id).sites == ("alpha", "beta")


def test_another_site_builds_the_first_model_when_the_first_one_cannot(running: Federation) -> None:
    job = submit(running.services, running.spec(sites=("alpha", "beta"), min_sites=1))
    alpha, beta = running.sites["alpha"], running.sites["beta"]
    alpha.decline(alpha.receive(), "no", failed=True)
    beta.start(FIRST)
    again = beta.receive()
    alpha.decline(alpha.receive(), "no", failed=True)
    assert getattr(again, "build_model", False)
    beta.answer(again, FIRST)
    for site in (alpha, beta):
        site.answer(site.receive(), update(1))
    finish(alpha, beta)
    assert running.job(job.job_id).state is JobState.COMPLETED


def test_a_site_that_was_not_asked_for_the_first_model_cannot_give_one(running: Federation) -> None:
    services = running.services
    known = store_weights(services.blobs, update(666), services.settings.shard_bytes)  # as from an earlier job
    ours = store_weights(services.blobs, update(7), services.settings.shard_bytes)
    given = ModelInfo(
        store="test",
        model_hash=ours.index.digest,
        index_hash=ours.index.digest,
        model_size=ours.size,
        shards=ours.shards,
    )
    with writing(services.engine) as connection:
        add_model(connection, given)
    job = submit(services, running.spec(sites=("alpha", "beta"), min_sites=1, initial_model={"model": given.model_id}))
    alpha, beta = running.sites["alpha"], running.sites["beta"]
    shards = tuple(Shard(digest=shard.digest, size=shard.size) for shard in known.shards)
    alpha.answer(alpha.receive(), shards=shards)
    beta.start()
    message = beta.receive()
    assert beta.tensors(message)["w"].tolist() == [7, 7, 7]
    assert running.job(job.job_id).model_id == given.model_id
    alpha.answer(alpha.receive(), update(1))
    beta.answer(message, update(1))
    finish(alpha, beta)


def test_an_update_of_more_shards_than_tensors_is_quarantined_unread(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta", min_sites=1)
    alpha.answer(alpha.receive(), shards=(Shard(digest="0" * 64, size=10),) * 3)
    beta.answer(beta.receive(), update(2))
    finish(alpha, beta)
    assert parts(running, job_id)["alpha"].reason == "The update has 3 shards; there can be 2."


def test_no_metric_can_end_a_job(running: Federation) -> None:
    """Its name may be one of a log record's own, and its value such that a sum overflows."""
    job_id, (alpha, beta) = begin(running, "alpha", "beta", rounds=2)
    metrics: dict[str, float | None] = {"message": 1.0, "name": 2.0, "huge": 1e308, "a\x00b": 1.0, "job": 3.0}
    for _ in range(2):
        for site in (alpha, beta):
            site.answer(site.receive(), update(1), num_examples=100, metrics=metrics)
    assert finish(alpha, beta).state == "completed"
    newest = progress(running, job_id).newest
    assert newest is not None
    assert newest.metrics == {"message": 1.0, "name": 2.0, "a\x00b": 1.0, "job": 3.0}
    assert "cannot be aggregated" not in running.log()


def test_references_live_as_long_as_the_longest_round_that_a_job_may_have(running: Federation) -> None:
    longest = running.services.settings.reference_seconds
    with pytest.raises(InvalidJobFile, match=r"round_deadline_seconds: it is .* raise FEDCHORD_REFERENCE_SECONDS"):
        submit(running.services, running.spec(round_deadline_seconds=longest + 1))
    _, (alpha,) = begin(running, "alpha", round_deadline_seconds=longest)
    message = alpha.receive()
    assert isinstance(message, UpdateRoundStart)
    expires_at = int(Path(message.model.shards[0].url).name.partition("-")[0])
    assert expires_at > message.deadline_at + 60
    alpha.answer(message, update(1))
    finish(alpha)


def test_an_answer_that_comes_twice_counts_once(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta")
    message = alpha.receive()
    result = alpha.answer(message, update(1), num_examples=1)
    for _ in range(5):
        alpha.send(result)
    beta.answer(beta.receive(), update(3), num_examples=1)
    finish(alpha, beta)
    assert running.model(job_id)["w"].tolist() == [2, 2, 2]
    with reading(running.services.engine) as connection:
        assert len(find_models(connection, job_id=job_id, kind="update")) == 2


def test_nobody_can_answer_for_another_site(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta")
    first, second = alpha.receive(), beta.receive()
    lie = UpdateReady(job_id=job_id, round=1, task_id=second.task_id, num_examples=10**6)  # type: ignore[attr-defined]
    alpha.send(lie)  # with its own, valid signature
    alpha.send(lie.model_copy(update={"task_id": first.task_id}), key=SigningKey.generate())  # type: ignore[attr-defined]
    alpha.send(lie.model_copy(update={"task_id": "no.such.part"}))
    alpha.answer(first, update(1))
    beta.answer(second, update(3))
    assert finish(alpha, beta).state == "completed"
    assert running.model(job_id)["w"].tolist() == [2, 2, 2]


def test_what_is_no_message_does_not_stop_the_coordinator(running: Federation) -> None:
    alpha = running.sites["alpha"]
    for junk in (b"", b"\xc1", b"junk", None, {"a": 1}, [1], "text", 7):
        alpha.app.send_task("coordinator.update_ready", args=[junk], queue="coordinator")
    alpha.app.send_task("coordinator.no_such_task", args=[], queue="coordinator")
    _, (alpha, beta) = begin(running, "alpha", "beta")
    for site in (alpha, beta):
        site.answer(site.receive(), update(1))
    assert finish(alpha, beta).state == "completed"


def element(*, body: object = ([], {}, {}), **changes: object) -> bytes:
    """Return a task's message as Celery writes it to the queue, but for the changes: of headers, or of `properties`."""
    message: dict[str, Any] = {
        "body": base64.b64encode(msgpack.packb(body)).decode(),
        "content-type": changes.pop("content_type", "application/x-msgpack"),
        "content-encoding": "binary",
        "headers": {"task": "coordinator.update_ready", "id": "x", "retries": 0, "timelimit": [None, None]},
        "properties": {
            "delivery_tag": "t",
            "delivery_info": {"exchange": "", "routing_key": "coordinator"},
            "body_encoding": "base64",
        },
    }
    message["headers"].update(changes)
    return json.dumps(message).encode()


@pytest.mark.parametrize(
    "element",
    [b"", b"not json", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b'{"properties": 1}', b"7" * 10**6,
     b'"' + b"7" * 17 * 2**20 + b'"', element(task={}), element(task=[1]), element(id={"a": 1}), element(id=None),
     element(timelimit=5), element(timelimit=[1]), element(eta=[]), element(expires={}), element(stamped_headers=5),
     element(content_type=None), element(content_type={"a": 1}), element(body=None), element(body=3), element(body=[1]),
     element(compression="application/x-gzip"), element(retries="1"), element(group=["g"]),
     element(body=([], {}, {"callbacks": [{"task": "site.training_start", "options": {"queue": "site.beta"}}]}))],
    ids=["empty", "text", "list", "dict", "null", "bytes", "deep", "no properties", "large", "huge", "dict as task",
         "list as task", "dict as id", "no id", "number as time limits", "one time limit", "list as eta",
         "dict as expiry", "stamps", "no content type", "dict as content type", "no body", "number as body",
         "short body", "compressed", "text as retries", "list as group", "callbacks"],
)  # fmt: skip
def test_a_poisonous_element_is_set_aside_with_its_reason(running: Federation, element: bytes) -> None:
    broker = running.services.broker
    broker.delete(dead_letter_key("coordinator"))
    broker.lpush("coordinator", element)
    wait_until(lambda: broker.llen(dead_letter_key("coordinator")), what="the dead letter")
    letter = json.loads(broker.lrange(dead_letter_key("coordinator"), 0, -1)[0])
    assert letter["bytes"] == len(element)
    assert letter["reason"]
    _, (alpha,) = begin(running, "alpha")  # and the coordinator goes on
    alpha.answer(alpha.receive(), update(1))
    assert finish(alpha).state == "completed"


def test_a_site_with_no_worker_cannot_hold_a_round_past_its_deadline(running: Federation) -> None:
    job_id, (alpha, beta, gamma) = begin(
        running, "alpha", "beta", "gamma", min_sites=2, rounds=2, round_deadline_seconds=1.0
    )
    silent = gamma.receive()
    for site in (alpha, beta):
        site.answer(site.receive(), update(1))
    for site in (alpha, beta):  # the second round has come although gamma has not answered the first
        site.answer(site.receive(), update(5))
    late = gamma.receive()
    gamma.answer(silent, update(100))  # too late for its round, and not for the next
    gamma.answer(late, update(5))
    assert finish(alpha, beta, gamma).state == "completed"
    assert running.model(job_id)["w"].tolist() == [5, 5, 5]
    rounds = [round_ for round_ in progress(running, job_id).rounds if round_.kind is RoundKind.TRAIN]
    assert rounds[0].closed_at is not None
    overtime = (rounds[0].closed_at - rounds[0].deadline_at).total_seconds()
    assert 0 <= overtime < 5


def test_an_aborted_job_ends_at_once_everywhere(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta", rounds=100)
    message = alpha.receive()
    beta.receive()
    abort(running.services, job_id, "a mistake")
    assert running.services.broker.get(cancel_key("alpha", job_id)) == b"a mistake"
    ended = finish(alpha, beta)
    assert (ended.state, ended.reason) == ("aborted", "a mistake")
    alpha.answer(message, update(1))
    with pytest.raises(Conflict, match="has ended: it is aborted"):
        abort(running.services, job_id, "again")
    states = {round_.state for round_ in progress(running, job_id).rounds}
    assert states == {RoundState.CLOSED, RoundState.ABORTED}


def test_a_swag_round_collects_both_moments(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta", swag=True)
    for site in (alpha, beta):
        site.answer(site.receive(), update(1))
    for site, value in ((alpha, 1.0), (beta, 3.0)):
        message = site.receive()
        assert isinstance(message, SwagRoundStart)
        moments = {"first/w": np.full(3, value, np.float32), "second/w": np.full(3, value**2, np.float32)}
        site.answer(message, moments)
    assert finish(alpha, beta).state == "completed"
    assert running.model(job_id)["w"].tolist() == [1, 1, 1]  # the global model stays
    with reading(running.services.engine) as connection:
        newest = find_models(connection, job_id=job_id, kind="moments", limit=1)[0]
    assert newest.site is None
    assert newest.model_state == 30


def test_a_first_model_that_no_site_could_train_is_refused(running: Federation, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.float32([0, np.nan])}, tmp_path / "nan.safetensors")
    with pytest.raises(InvalidJobFile, match="cannot be trained: Tensor 'w' is not finite: element 1 is NaN"):
        submit(running.services, running.spec(initial_model={"file": tmp_path / "nan.safetensors"}))


def test_a_job_can_go_on_from_a_stored_model_and_from_a_file(running: Federation, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(update(7), tmp_path / "seven.safetensors")
    job_id, (alpha,) = begin(running, "alpha", initial_model={"file": tmp_path / "seven.safetensors"})
    message = alpha.receive()
    assert alpha.tensors(message)["w"].tolist() == [7, 7, 7]
    alpha.answer(message, update(8))
    finish(alpha)
    job_id, (alpha,) = begin(running, "alpha", initial_model={"model": running.job(job_id).model_id})
    message = alpha.receive()
    assert alpha.tensors(message)["w"].tolist() == [8, 8, 8]
    alpha.answer(message, update(9))
    finish(alpha)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"sites": ("alpha", "delta")}, "sites: no site 'delta'; enrolled are alpha, beta, gamma"),
        ({"trainer": "unknown"}, "trainer: 'unknown' is not on the list of alpha, beta, gamma; offered are constant"),
        ({"config": {"x": 2**70}}, "config or strategy: a value cannot be sent .*use finite numbers"),
        ({"config": {"x": float("nan")}}, "config or strategy: a value cannot be sent"),
        ({"config": {"x": "x" * 2**20}}, "config: it has 104.* bytes and may have 1048576; put data at the sites"),
        ({"strategy": {"name": "fedprox", "mu": float("inf")}}, "config or strategy: a value cannot be sent"),
        ({"min_sites": 4}, "min_sites: the quorum is 4, but the job has 3 sites"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_anything_has_changed(
    running: Federation, spec: dict[str, Any], reason: str
) -> None:
    with reading(running.services.engine) as connection:
        before = find_jobs(connection)
    with pytest.raises(InvalidJobFile, match=reason):
        submit(running.services, running.spec(**spec))
    with reading(running.services.engine) as connection:
        assert find_jobs(connection) == before


def test_a_disabled_site_is_not_asked(running: Federation) -> None:
    with writing(running.services.engine) as connection:
        set_enabled(connection, "gamma", False, "maintenance")
    try:
        with pytest.raises(InvalidJobFile, match=r"site 'gamma' is disabled \(maintenance\)"):
            submit(running.services, running.spec(sites=("gamma",)))
        job = submit(running.services, running.spec())
        assert job.sites == ("alpha", "beta")
        abort(running.services, job.job_id, "seen enough")
        for name in job.sites:
            wait_until(lambda name=name: isinstance(running.sites[name].receive(), TrainingFinished))
    finally:
        with writing(running.services.engine) as connection:
            set_enabled(connection, "gamma", True)
