"""The gate against what a site may send, through a real broker and a real coordinator process."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from common.messages import Message, Shard, TrainingFinished, UpdateRoundStart
from coordinator.parts import Part
from coordinator.progress import job_progress
from coordinator.submitting import submit
from store.database import reading
from store.models import ModelInfo, find_models
from tests.federation import Federation, ScriptedSite, federation, wait_until

NAMES = ("alpha", "beta", "gamma", "delta")


def model(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(3, value, np.float32), "n": np.array(1, np.int64)}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Four sites and one coordinator process for all tests of this module."""
    with federation(tmp_path_factory.mktemp("federation"), *NAMES) as made, made.coordinator():
        yield made


def begin(running: Federation, *names: str, first: float = 1.0, **spec: Any) -> tuple[str, list[ScriptedSite]]:
    """Submit a job for the sites and answer its start with a model of that value."""
    sites = [running.sites[name] for name in names]
    for site in sites:
        site.forget()
    job = submit(running.services, running.spec(sites=names, **spec))
    for site in sites:
        site.start(model(first))
    return job.job_id, sites


def receive(site: ScriptedSite) -> UpdateRoundStart:
    message = site.receive()
    assert isinstance(message, UpdateRoundStart), message
    return message


def finish(*sites: ScriptedSite) -> TrainingFinished:
    messages: list[Message] = [site.receive() for site in sites]
    assert all(isinstance(message, TrainingFinished) for message in messages), messages
    last = messages[-1]
    assert isinstance(last, TrainingFinished)
    return last


def part(running: Federation, job_id: str, site: str) -> Part:
    return next(part for part in job_progress(running.services, job_id).parts if part.site == site)


def updates(running: Federation, job_id: str) -> dict[str | None, ModelInfo]:
    with reading(running.services.engine) as connection:
        return {found.site: found for found in find_models(connection, job_id=job_id, kind="update")}


@pytest.mark.parametrize(
    ("tensors", "changes", "reason"),
    [
        (None, {}, "There is no update: the answer names no shard"),
        (model(0), {}, "Every value of the update is zero, and the global model's are not"),
        (model(2), {"num_examples": 0}, "num_examples is 0; expected 1 to 1000"),
        (model(2), {"num_examples": -1}, "num_examples is -1; expected"),
        (model(2), {"num_examples": 1001}, "num_examples is 1001; expected 1 to 1000"),
        (model(2), {"num_examples": 2**62}, "num_examples is 4611686018427387904; expected 1 to 1000"),
        (model(8), {}, r"12.1244 away from the global model; \[gate\] max_norm is 10"),
        (model(2), {"job_id": "another-job"}, "for round 1 of job another-job, its task for round 1 of job"),
        (model(2), {"round": 7}, "for round 7 of job .*, its task for round 1 of job"),
    ],
    ids=["empty", "zeros", "no examples", "negative", "job's bound", "absurd", "norm", "other job", "other round"],
)
def test_what_the_gate_refuses_is_quarantined_and_the_round_goes_on(
    running: Federation, tensors: dict[str, np.ndarray] | None, changes: dict[str, Any], reason: str
) -> None:
    gate = {"max_examples": 1000, "max_norm": 10.0}
    job_id, (alpha, beta, gamma) = begin(running, "alpha", "beta", "gamma", min_sites=2, gate=gate)
    alpha.answer(receive(alpha), tensors, **changes)
    for site in (beta, gamma):
        site.answer(receive(site), model(3))
    assert finish(alpha, beta, gamma).state == "completed"
    refused = part(running, job_id, "alpha")
    assert refused.state == "quarantined"
    assert re.search(reason, refused.reason), refused.reason
    assert running.model(job_id)["w"].tolist() == [3, 3, 3]
    assert updates(running, job_id).keys() == {"beta", "gamma"}


def test_an_update_that_changes_nothing_counts_and_its_metrics_say_so(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta")
    alpha.answer(receive(alpha), model(1), metrics={"loss": 0.5})
    beta.answer(receive(beta), model(3))
    assert finish(alpha, beta).state == "completed"
    assert running.model(job_id)["w"].tolist() == [2, 2, 2]
    assert updates(running, job_id)["alpha"].metrics == {"loss": 0.5, "update_norm": 0.0}
    assert updates(running, job_id)["beta"].metrics == {"update_norm": pytest.approx(2 * 3**0.5)}
    accepted = part(running, job_id, "alpha")
    assert (accepted.update_norm, accepted.global_norm) == (0.0, pytest.approx(3**0.5))
    newest = job_progress(running.services, job_id).newest
    assert newest is not None
    assert newest.metrics == {"loss": 0.5}  # the round's are the sites' own


def test_zeros_are_an_update_like_any_other_of_a_global_model_of_zeros(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta", first=0.0)
    for site in (alpha, beta):
        site.answer(receive(site), model(0))
    assert finish(alpha, beta).state == "completed"
    assert running.model(job_id)["w"].tolist() == [0, 0, 0]


def test_an_answer_of_another_attempt_changes_nothing(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta")
    message = receive(alpha)
    alpha.answer(message, num_examples=10**6, attempt=2)
    alpha.answer(message, model(3))
    beta.answer(receive(beta), model(3))
    assert finish(alpha, beta).state == "completed"
    assert part(running, job_id, "alpha").num_examples == 1


def test_a_digest_in_capital_letters_is_no_answer_and_the_right_one_still_counts(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta")
    message = receive(alpha)
    (shard,) = alpha.upload(message, model(3))
    loud = Shard.model_construct(digest=shard.digest.upper(), size=shard.size)
    alpha.answer(message, shards=(loud,))
    alpha.answer(message, shards=(shard,))
    beta.answer(receive(beta), model(3))
    assert finish(alpha, beta).state == "completed"
    assert part(running, job_id, "alpha").state == "accepted"
    assert "An answer is set aside: The UPDATE_READY message is not valid: shards.0.digest" in running.log()


def test_of_two_updates_from_a_site_the_first_counts_also_when_its_slot_is_written_again(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta")
    message = receive(alpha)
    alpha.answer(message, model(3))
    wait_until(lambda: part(running, job_id, "alpha").state == "accepted", what="the first answer")
    alpha.answer(message, model(9), num_examples=100)  # to the same reference, which is still alive
    beta.answer(receive(beta), model(5))
    assert finish(alpha, beta).state == "completed"
    assert running.model(job_id)["w"].tolist() == [4, 4, 4]
    assert part(running, job_id, "alpha").num_examples == 1
    assert updates(running, job_id).keys() == {"alpha", "beta"}


def test_what_was_written_for_an_earlier_round_is_no_update_of_this_one(running: Federation) -> None:
    job_id, (alpha, beta, gamma) = begin(running, "alpha", "beta", "gamma", rounds=2, min_sites=2)
    earlier = receive(alpha)
    for site in (alpha, beta, gamma):
        site.answer(earlier if site is alpha else receive(site), model(3))
    message = receive(alpha)
    shards = alpha.upload(earlier, model(9))  # at the slot of round 1
    alpha.answer(message, shards=shards)
    for site in (beta, gamma):
        site.answer(receive(site), model(4))
    assert finish(alpha, beta, gamma).state == "completed"
    assert running.model(job_id)["w"].tolist() == [4, 4, 4]
    assert "Nothing was written at" in part(running, job_id, "alpha").reason


def test_more_shards_than_tensors_are_quarantined_unread(running: Federation) -> None:
    job_id, (alpha, beta) = begin(running, "alpha", "beta", min_sites=1)
    alpha.answer(receive(alpha), shards=(Shard(digest="0" * 64, size=10),) * 3)
    beta.answer(receive(beta), model(3))
    finish(alpha, beta)
    assert part(running, job_id, "alpha").reason == "The update has 3 shards; there can be 2."


@pytest.mark.parametrize("names", [NAMES, NAMES[:3], NAMES[:2]], ids=["of four", "of three", "of two"])
def test_an_update_scaled_by_a_million_is_quarantined_without_any_setting(
    running: Federation, names: tuple[str, ...]
) -> None:
    job_id, (liar, *honest) = begin(running, *names, min_sites=1)
    liar.answer(receive(liar), model(3e6))
    for number, site in enumerate(honest):
        site.answer(receive(site), model(3 + number))
    assert finish(liar, *honest).state == "completed"
    refused = part(running, job_id, liar.name)
    assert refused.state == "quarantined"
    assert "away from the global model" in refused.reason
    expected = np.mean([3.0 + number for number in range(len(honest))])
    assert running.model(job_id)["w"].tolist() == [expected] * 3
    assert updates(running, job_id).keys() == {site.name for site in honest}
    with reading(running.services.engine) as connection:
        made = find_models(connection, job_id=job_id, kind="global")[0]
    assert made.num_examples == len(honest)
    assert made.model_meta["sites"] == sorted(site.name for site in honest)


def test_the_quorum_is_checked_without_the_outliers(running: Federation) -> None:
    job_id, (liar, *honest) = begin(running, *NAMES, min_sites=4)
    liar.answer(receive(liar), model(-3e6))
    for site in honest:
        site.answer(receive(site), model(3))
    ended = finish(liar, *honest)
    assert ended.state == "failed"
    assert (
        "3 of 4 sites answered well, but the quorum is 4. alpha quarantined: The update is 5.2e+06 away" in ended.reason
    )
    assert part(running, job_id, liar.name).state == "quarantined"


def test_a_job_can_do_without_the_comparison(running: Federation) -> None:
    job_id, sites = begin(running, *NAMES, gate={"outlier_score": 0})
    for site, value in zip(sites, (2e6, 0.5, 0.5, 0.5), strict=True):
        site.answer(receive(site), model(value))
    assert finish(*sites).state == "completed"
    assert running.model(job_id)["w"][0] > 1e5


def test_an_outlier_among_moments_is_found_too(running: Federation) -> None:
    job_id, sites = begin(running, *NAMES, swag=True)
    for site in sites:
        site.answer(receive(site), model(3))
    for site, value in zip(sites, (3e6, 3.5, 2.5, 3.0), strict=True):
        w = np.full(3, value, np.float32)
        site.answer(site.receive(), {"first/w": w, "second/w": w * w})
    assert finish(*sites).state == "completed"
    states = [part(running, job_id, name).state for name in NAMES]
    assert states == ["quarantined", "accepted", "accepted", "accepted"]
    with reading(running.services.engine) as connection:
        moments = [found for found in find_models(connection, job_id=job_id, kind="moments") if found.site is None]
    assert [found.model_meta["sites"] for found in moments] == [["beta", "delta", "gamma"]]
