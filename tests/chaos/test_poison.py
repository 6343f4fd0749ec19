"""Hostile bytes wherever a worker reads: it goes on with the next message, and a person can read why one was set aside.

Real workers, each of which is asked afterwards whether it still takes messages from its queue.
"""

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from common.dead_letters import MAX_DEAD, read_dead_letters
from coordinator.cli.entry import cli
from coordinator.deadly import GIVE_UP_AFTER, MAX_BEGUN
from coordinator.submitting import submit
from tests.federation import ROOT, Federation, clean_environment, federation, wait_until
from tests.servers import die_with_parent

QUEUE = "coordinator"
CONTROL = "/0.celery.pidbox"
FIRST = {"w": np.zeros(3, np.float32)}


def element(*, body: object = ([], {}, {}), **changes: object) -> bytes:
    """Return a task's message as Celery writes it, but for the changes of its headers."""
    headers = {"task": "coordinator.update_ready", "id": "x", "retries": 0, "timelimit": [None, None]}
    return json.dumps(message(body, {**headers, **changes})).encode()


def message(body: object, headers: dict[str, object]) -> dict[str, Any]:
    return {
        "body": base64.b64encode(msgpack.packb(body)).decode(),
        "content-type": "application/x-msgpack",
        "content-encoding": "binary",
        "headers": headers,
        "properties": {
            "delivery_tag": f"tag {time.monotonic_ns()}",
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "body_encoding": "base64",
        },
    }


def command(method: str, **arguments: object) -> bytes:
    """Return a command of Celery's remote control."""
    return json.dumps(message({"method": method, "arguments": arguments}, {"clock": 1})).encode()


@dataclass
class Worker:
    """A coordinator worker, and its queue."""

    made: Federation
    process: "subprocess.Popen[bytes]"

    @property
    def broker(self) -> Any:
        return self.made.services.broker

    def takes_messages(self) -> bool:
        """Return whether the worker takes one more message within some seconds, and still runs."""
        self.broker.lpush(QUEUE, element(body=([b"no envelope"], {}, {})))
        wait_until(lambda: self.broker.llen(QUEUE) == 0 and not self.broker.hlen(f"unacked.{QUEUE}"), what="the queue")
        return self.process.poll() is None

    def reasons(self) -> list[str]:
        return [letter.reason for letter in read_dead_letters(self.broker, QUEUE)]


@pytest.fixture(scope="module")
def federated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("poison"), "alpha") as made:
        yield made


@pytest.fixture(scope="module")
def running(federated: Federation) -> Iterator[Worker]:
    with federated.coordinator() as process:
        wait_until(lambda: " ready." in federated.log())
        yield Worker(made=federated, process=process)


@pytest.fixture
def worker(running: Worker) -> Worker:
    running.broker.delete(f"{QUEUE}.dead")
    return running


@pytest.mark.parametrize(
    "key", [QUEUE, f"{QUEUE}\x06\x163", f"{QUEUE}.dead", f"unacked.{QUEUE}", f"unacked_index.{QUEUE}"]
)
def test_a_key_of_another_type_is_removed_and_the_worker_goes_on(worker: Worker, key: str) -> None:
    worker.broker.delete(key)
    worker.broker.set(key, "x")
    worker.broker.lpush(f"{QUEUE}\x06\x166", b"junk", element(body=([b""], {}, {})))  # it writes to each of its keys
    wait_until(lambda: worker.broker.type(key) != b"string", what="the key to be removed")
    assert worker.takes_messages()
    wait_until(worker.reasons, what="the dead letter")
    assert any("JSONDecodeError" in reason or "of another type" in reason for reason in worker.reasons())


@pytest.mark.parametrize(
    "data",
    [b"", b"junk", b"\xff\xfe", b"[]", b"5", b"null", b"{}", b"[" * 100_000, b'"' + b"7" * 10**6 + b'"', element(),
     json.dumps({**message({}, {}), "headers": []}).encode(), json.dumps(message([1], {})).encode(),
     json.dumps(message({"method": "ping", "reply_to": 5}, {})).encode(),
     json.dumps(message({"method": "ping"}, {"clock": "x"})).encode(),
     json.dumps(message({"method": "ping", "matcher": "pcre", "pattern": "(a+)+b"}, {})).encode(),
     json.dumps(message({"method": "ping"}, {"compression": "application/x-gzip"})).encode(),
     command("shutdown"), command("cancel_consumer", queue=QUEUE), command("pool_restart"),
     command("rate_limit", task_name="coordinator.update_ready", rate_limit="1/h"),
     command("revoke", task_id="x"), command("ping", wrong=1)],
    ids=range(22),
)  # fmt: skip
def test_what_is_said_on_the_control_channel_can_neither_end_nor_slow_a_worker(worker: Worker, data: bytes) -> None:
    worker.broker.publish(CONTROL, data)
    (answer,) = worker.made.services.app.control.ping(timeout=10, limit=1) or []
    assert list(answer.values()) == [{"ok": "pong"}]
    assert worker.takes_messages()


SENDS = {"task": "site.training_start", "options": {"queue": "site.alpha"}, "args": [], "kwargs": {}}


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (element(eta="2999-01-01T00:00:00+00:00"), "it asks to be handled at 2999-01-01"),
        (element(eta="junk"), "Invalid isoformat"),
        (element(expires="2000-01-01T00:00:00+00:00"), "it expires"),
        (element(retries=10**30), "its number of retries"),
        (element(task="nope"), "its task 'nope' is none of coordinator's"),
        (element(task="coordinator.nope"), "there is no task 'coordinator.nope'"),
        (element(task="celery.group", body=([[SENDS], {}, "g", []], {}, {})), "is none of coordinator's"),
        (element(group="g", body=([b""], {}, {"chord": SENDS})), "it asks for other tasks to be sent"),
        (element(body=([b""], {"x": 1}, {})), "got an unexpected keyword argument 'x'"),
        (element(body=([1, 2, 3], {}, {})), "too many positional arguments"),
        (element(task="coordinator.aggregate", body=([[], {"a": 1}], {}, {})), "The id of the round is no text"),
        (element(task="coordinator.advance", body=(["no such job"], {}, {})), "There is no job"),
        (element(body=([[1] * 300_000], {}, {})), "beside its envelope"),
        (element(shadow="s" * 20_000), "a header has more than"),
        (b'"' + b"7" * 100_000_000 + b'"', "it has more than 16777216 bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "element",
)
def test_a_well_formed_message_with_hostile_content_is_set_aside_with_its_reason(
    worker: Worker, poison: bytes, reason: str
) -> None:
    worker.broker.lpush(QUEUE, poison)
    assert worker.takes_messages()
    wait_until(worker.reasons, what="the dead letter")
    assert reason in worker.reasons()[0]
    assert worker.broker.llen("site.alpha") == 0


def test_ten_thousand_in_a_row_are_two_lines_in_the_log_and_the_newest_thousand_are_kept(worker: Worker) -> None:
    logged = len(worker.made.log())
    before = psutil.Process(worker.process.pid).memory_info().rss
    for _ in range(10):
        worker.broker.lpush(QUEUE, *[b"junk"] * 1000)
    wait_until(lambda: worker.broker.llen(QUEUE) == 0, seconds=60)
    assert worker.takes_messages()
    assert len(worker.reasons()) == MAX_DEAD
    lines = [line for line in worker.made.log()[logged:].splitlines() if "set aside" in line]
    assert len(lines) <= 6  # a burst is told of twice, and lasts ten seconds
    assert psutil.Process(worker.process.pid).memory_info().rss - before < 50 * 2**20


def test_a_site_whose_queue_is_no_list_gets_its_message_all_the_same(worker: Worker) -> None:
    alpha = worker.made.sites["alpha"]
    alpha.forget()
    worker.broker.set("site.alpha", "x")
    alpha.beat()
    submit(worker.made.services, worker.made.spec(sites=("alpha",)))
    alpha.start(FIRST)


def test_what_was_set_aside_is_listed_and_forgotten_by_the_command_line(worker: Worker) -> None:
    worker.broker.lpush(QUEUE, b"junk")
    wait_until(worker.reasons)
    config = ["--config", str(worker.made.config), "dead-letters"]
    listed = CliRunner().invoke(cli, [*config, QUEUE, "--json"])
    (letter,) = json.loads(listed.stdout)
    assert (letter["queue"], letter["bytes"], base64.b64decode(letter["base64"])) == (QUEUE, 4, b"junk")
    assert "JSONDecodeError" in CliRunner().invoke(cli, config).stdout
    assert CliRunner().invoke(cli, [*config, "--clear", QUEUE]).stdout == "Forgot 1 of coordinator.\n"
    assert CliRunner().invoke(cli, [*config, QUEUE]).stdout == "Nothing was set aside.\n"


def test_a_worker_starts_whatever_lies_where_it_keeps_what_is_not_acknowledged(tmp_path: Path) -> None:
    with federation(tmp_path, "alpha") as made:
        broker = made.services.broker
        good = json.loads(element())
        entries = [b"junk", b"\xff\xfe", b"{}", b"[1]", json.dumps([5, "", QUEUE]).encode(),
                   json.dumps([{}, "", QUEUE]).encode(), json.dumps([good, {}, []]).encode(),
                   json.dumps([good, "", "site.alpha"]).encode(), b"7" * 20_000_000]  # fmt: skip
        for number, entry in enumerate(entries):
            broker.hset(f"unacked.{QUEUE}", f"t{number}", entry)
        broker.zadd(f"unacked_index.{QUEUE}", {f"t{number}": 0 for number in range(20_000)})
        broker.lpush(f"unacked_mutex.{QUEUE}", "x")
        for exchange in (QUEUE, "celery.pidbox", "celeryev", "reply.celery.pidbox"):
            broker.set(f"_kombu.binding.{exchange}", "x")
        broker.set("_kombu.binding_deadlines", "x")
        with made.coordinator() as process:
            wait_until(lambda: " ready." in made.log())
            worker = Worker(made=made, process=process)
            assert worker.takes_messages()
            assert len(worker.reasons()) == len(entries)
            wait_until(lambda: broker.zcard(f"unacked_index.{QUEUE}") == 0, what="the last message to be acknowledged")
            assert broker.llen("site.alpha") == 0


DYING = """\
import os, sys
from coordinator import gate
gate.receive_answer = lambda services, envelope: os.kill(os.getpid(), 9)
from celery.__main__ import main
sys.argv = ["celery", "-A", "coordinator", "worker", "-n", "dying@test"]
main()
"""


@contextmanager
def dying(made: Federation, log: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a coordinator worker that dies of every answer, as for want of memory."""
    with (made.folder / log).open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", DYING],
            cwd=ROOT,
            env={**clean_environment(), "FEDCHORD_CONFIG": str(made.config)},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_an_answer_that_ends_its_worker_is_set_aside_and_in_the_end_its_part_has_failed(tmp_path: Path) -> None:
    with federation(tmp_path, "alpha") as made:
        alpha, broker = made.sites["alpha"], made.services.broker
        with made.coordinator(log="well.log"):
            job = submit(made.services, made.spec(sites=("alpha",), round_deadline_seconds=600))
            question = alpha.receive()
        answer = alpha.answer(question, FIRST)
        for death in range(MAX_BEGUN):
            with dying(made, f"dying-{death}.log") as process:
                assert process.wait(20) == -9
        with made.coordinator(log="aside.log"):
            wait_until(lambda: broker.llen(f"{QUEUE}.dead"), what="the dead letter")
        (letter,) = read_dead_letters(broker, QUEUE)
        assert letter.reason.startswith(f"coordinator.update_ready ended its worker {MAX_BEGUN} times")
        assert made.job(job.job_id).state == "running"
        (count,) = broker.scan_iter(match="begun.*")
        broker.set(count, GIVE_UP_AFTER - 1)  # as if it had been sent again, and ended its worker, some times more
        alpha.send(answer)
        with dying(made, "again.log") as process:
            assert process.wait(20) == -9
        with made.coordinator(log="failed.log"):
            made.wait(job.job_id, "failed")
        assert f"Handling its answer ended its worker {GIVE_UP_AFTER} times" in made.job(job.job_id).reason
