"""Progress of a part: when it is stopped, what the coordinator is told, and that an absent broker harms nothing."""

import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from pydantic import SecretStr
from redis import Redis

from common.errors import BrokerUnavailable
from common.progress import ProgressReport, read_progress, remove_progress, write_progress
from common.queues import cancel_key, progress_key
from common.settings import Settings
from tests.servers import ValkeyServer, free_ports, valkey, wait_for
from worker.progress import Progress
from worker.reports import Reports
from worker.trainer import Cancelled

REPORT = ProgressReport(task_id="task", fraction=0.25, text="epoch 1 of 4", at=1.5)


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with valkey() as running:
        yield running


@pytest.fixture
def broker(server: ValkeyServer) -> Iterator[Redis]:
    with Redis.from_url(server.url) as client:
        client.flushdb()
        yield client


def reports(url: str, **more: Any) -> Reports:
    return Reports(Settings(broker_url=SecretStr(url), site_name="alpha", site_folder=Path("nowhere"), **more))


def progress(*, deadline_in: float = 60.0, reasons: list[str] | None = None, **changes: Any) -> Progress:
    """Return the progress of a part; `reasons` are what the coordinator says, one each time that it is asked."""
    answers = iter(reasons or [])
    values: dict[str, Any] = {
        "why_stop": lambda: next(answers, ""),
        "tell": lambda fraction, text: None,
        "tell_seconds": 60.0,
        "seconds_left": deadline_in,
        "label": "part",
    }
    return Progress(**values | changes)


# --- the deadline -----------------------------------------------------------------------------------------------------


def test_the_time_is_the_brokers_if_it_answers_and_else_this_machines(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)  # a site whose clock is an hour ahead
    now, reason = reports(server.url).begin("job", "task")
    assert abs(now - real()) < 5
    assert reason == ""
    (port,) = free_ports(1)
    now, reason = reports(f"redis://127.0.0.1:{port}/0").begin("job", "task")
    assert abs(now - real() - 3600) < 5
    assert reason == ""


def test_why_to_stop_is_told_at_the_beginning(server: ValkeyServer, broker: Redis) -> None:
    broker.set(cancel_key("alpha", "task"), "enough")
    assert reports(server.url).begin("job", "task")[1] == "The part is not wanted any more."
    assert reports(server.url).begin("job", "other")[1] == ""


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_a_stopped_job_ends_its_training() -> None:
    watched = progress(reasons=["", "The job was stopped."])
    watched.check()
    watched(0.1, "epoch 1")  # asked less than a second ago
    with pytest.raises(Cancelled, match="was stopped"):
        watched.check()


def test_a_deadline_that_has_passed_ends_the_training_and_nobody_is_asked() -> None:
    watched = progress(deadline_in=-5, why_stop=lambda: pytest.fail("asked"))
    with pytest.raises(Cancelled, match=r"deadline passed 5\.0 s ago"):
        watched(0.5, "epoch 1")


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_clock_that_jumps_does_not_move_the_deadline(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    watched = progress(deadline_in=60)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    watched.check()
    assert 0 < watched.seconds_left <= 60


# --- telling ----------------------------------------------------------------------------------------------------------


def test_progress_is_told_once_in_so_many_seconds() -> None:
    told: list[tuple[float, str]] = []
    watched = progress(tell=lambda fraction, text: told.append((fraction, text)), tell_seconds=0.05)
    watched(0.0, "at once")
    assert told == []  # a short part has nothing to tell
    wait_for(lambda: watched(0.5, "later") or told, seconds=5, what="a report")
    watched(0.6, "just after")
    assert told == [(0.5, "later")]


def test_a_transfer_of_several_files_is_told_in_megabytes_of_all() -> None:
    told: list[tuple[float, str]] = []
    watched = progress(tell=lambda fraction, text: told.append((fraction, text)), tell_seconds=0.0)
    watched.watch(0.0, "fetching the model", before=100_000_000, total=758_000_000)(20_000_000)
    assert told == [(0.0, "fetching the model: 120 of 758 MB")]


def test_a_report_is_read_until_it_is_taken_back(broker: Redis, server: ValkeyServer) -> None:
    told = reports(server.url, heartbeat_seconds=20)
    told.tell("task", 0.5, "epoch 2")
    found = read_progress(broker, [("alpha", "task"), ("alpha", "other"), ("beta", "task-2")])
    assert {task: (report.fraction, report.text) for task, report in found.items()} == {"task": (0.5, "epoch 2")}
    assert 55 < (broker.ttl(progress_key("alpha", "task"))) <= 60
    told.forget("other")
    told.forget("task")
    assert broker.keys() == []


@pytest.mark.parametrize(
    ("fraction", "text", "expected"),
    [
        (7.5, "x" * 300, (1.0, "x" * 200)),
        (-1.0, "\udc80", (0.0, "?")),
        (math.nan, "", (0.0, "")),
    ],
)
def test_whatever_a_trainer_says_is_made_a_report(
    broker: Redis, server: ValkeyServer, fraction: float, text: str, expected: tuple[float, str]
) -> None:
    reports(server.url).tell("task", fraction, text)
    found = read_progress(broker, [("alpha", "task")])["task"]
    assert (found.fraction, found.text) == expected
    assert 25 < broker.ttl(progress_key("alpha", "task")) <= 30


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"x" * 5000,
        msgpack.packb([1]),
        msgpack.packb(REPORT.model_dump() | {"fraction": math.nan}),
        msgpack.packb(REPORT.model_dump() | {"fraction": 2}),
        msgpack.packb(REPORT.model_dump() | {"at": math.inf}),
        msgpack.packb(REPORT.model_dump() | {"text": "x" * 201}),
        msgpack.packb(REPORT.model_dump() | {"task_id": "another"}),
    ],
)
def test_an_unreadable_report_counts_as_none_and_harms_nobody_else(broker: Redis, data: bytes) -> None:
    broker.set(progress_key("alpha", "task"), data)
    other = REPORT.model_copy(update={"task_id": "other"})
    write_progress(broker, other, "beta", 60)
    assert read_progress(broker, [("alpha", "task"), ("beta", "other")]) == {"other": other}
    remove_progress(broker, "beta", "other")
    assert read_progress(broker, [("beta", "other")]) == {}
    assert read_progress(broker, []) == {}


# --- the broker -------------------------------------------------------------------------------------------------------


def test_a_job_and_a_part_are_stopped_for_their_own_reasons(broker: Redis, server: ValkeyServer) -> None:
    asking = reports(server.url)
    assert asking.why_stop("job", "task") == ""
    broker.set(cancel_key("alpha", "task"), 1)
    assert asking.why_stop("job", "task") == "The part is not wanted any more."
    assert asking.why_stop("job", "next") == ""
    broker.set(cancel_key("alpha", "job"), 1)
    assert asking.why_stop("job", "task") == "The job was stopped."
    assert asking.why_stop("job", "next") == "The job was stopped."


def test_an_absent_broker_neither_disturbs_nor_is_asked_all_the_time() -> None:
    (port,) = free_ports(1)
    talking = reports(f"redis://127.0.0.1:{port}/0")
    begun = time.monotonic()
    for _ in range(1000):
        talking.tell("task", 0.5, "epoch 2")
        assert talking.why_stop("job", "task") == ""
    talking.forget("task")
    assert time.monotonic() - begun < 3
    with Redis(port=port) as client, pytest.raises(BrokerUnavailable):
        read_progress(client, [("alpha", "task")])


def test_a_broker_that_does_not_answer_holds_nobody_up_for_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        talking = reports(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        begun = time.monotonic()
        for _ in range(1000):
            talking.tell("task", 0.5, "epoch 2")
        assert time.monotonic() - begun < 5


def test_a_broker_url_that_is_none_is_borne() -> None:
    reports("amqp://127.0.0.1").tell("task", 0.5, "epoch 2")
