"""A real site: `celery -A worker worker` as a process, a real Valkey, and what a coordinator sends and receives."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
from blake3 import blake3
from celery import Celery
from kombu import Connection
from redis import Redis

from common.broker import connect, make_coordinator_app, make_site_app
from common.heartbeats import Heartbeat, read_heartbeats
from common.messages import (
    ANSWERS,
    COORDINATOR,
    Envelope,
    Message,
    ModelReference,
    PartDeclined,
    SourceShard,
    TrainingFinished,
    UpdateReady,
    UpdateRoundStart,
)
from common.progress import ProgressReport, read_progress
from common.queues import ANSWER_TASKS, COORDINATOR_QUEUE, SITE_TASKS, AnswerKind, Kind, cancel_key, site_queue
from common.settings import Settings
from common.signing import SigningKey
from store.folder import FolderStore
from store.tensors import read_tensors, write_shard
from store.weights import store_weights
from tests.http_store import HttpStore, http_store
from tests.servers import die_with_parent, free_ports, valkey, wait_for

SITE = "alpha"
TRAINER = '''
import os
import time
from pathlib import Path
import numpy as np
from worker.trainer import Evaluation, Fit, Trainer


class Adder(Trainer):
    """Adds one; tells its process in the site's data folder, and trains for as long as a file `hold` is there.

    With `hang` in the config it hears of nothing any more, and a file `hang` tells that it does.
    """

    def build(self):
        return {"w": np.zeros(3, np.float32)}

    def fit(self, tensors, step):
        with (self.context.data / "fits").open("a") as file:
            print(os.getpid(), step.round, file=file)
        if self.context.config.get("hang"):
            (self.context.data / "hang").touch()
            time.sleep(600)
        while (self.context.data / "hold").exists():
            step.report(0.5, "waiting")
        return Fit(tensors={"w": tensors["w"] + 1}, num_examples=3)

    def evaluate(self, tensors, step):
        return Evaluation(num_examples=1)

    def num_examples(self):
        return 3
'''


@dataclass
class Coordinator:
    """What a coordinator does with one site."""

    folder: Path
    settings: Settings  # of the site; the coordinator's broker is the same
    key: SigningKey
    site_key: SigningKey
    app: Celery
    broker: Redis
    store: FolderStore
    numbers: Iterator[int] = field(default_factory=count)

    @property
    def hold(self) -> Path:
        """The file that keeps the trainer at work."""
        return self.settings.site_data / "hold"

    def fits(self) -> list[list[int]]:
        """Return process and round of every training that has begun."""
        file = self.settings.site_data / "fits"
        return [[int(word) for word in line.split()] for line in file.read_text().splitlines()] if file.exists() else []

    def part_over_http(self, remote: HttpStore, **changes: Any) -> UpdateRoundStart:
        """Return a message that asks for training on a model of 8 MB, with references to the other store."""
        path = self.folder / "model.safetensors"
        blob = write_shard(path, {"w": np.arange(2_000_000, dtype=np.float32)}, metadata={})
        remote.objects["model"] = path.read_bytes()
        source = SourceShard(digest=blob.digest, size=blob.size, url=remote.reference("model"))
        model = ModelReference(model_id="m", digest="0" * 64, shards=(source,))
        urls = (remote.reference("update"),)
        return self.part(**{"model": model, "shard_bytes": 2**24, "upload_urls": urls} | changes)

    def trained_over_http(self, remote: HttpStore, answer: Any) -> None:
        """Check that the update has arrived and is the one that was answered."""
        (shard,) = answer.shards
        assert blake3(remote.objects["update"]).hexdigest() == shard.digest
        path = self.folder / "update.safetensors"
        path.write_bytes(remote.objects["update"])
        assert (read_tensors(path)["w"] == np.arange(2_000_000, dtype=np.float32) + 1).all()

    def log(self) -> str:
        """Return what the site has logged."""
        return (self.folder / "site.log").read_text()

    def part(self, **changes: Any) -> UpdateRoundStart:
        """Return a message that asks for training."""
        number = next(self.numbers)
        weights = store_weights(self.store, {"w": np.arange(3, dtype=np.float32)}, 2**20)
        shards = tuple(
            SourceShard(digest=blob.digest, size=blob.size, url=self.store.read_url(blob, seconds=60))
            for blob in weights.shards
        )
        values: dict[str, Any] = {
            "job_id": "job",
            "round": number,
            "task_id": f"task-{number}",
            "deadline_at": time.time() + 60,
            "trainer": "adder",
            "shard_bytes": 2**20,
            "upload_urls": (self.store.write_url(f"slot/{number}", seconds=60),),
            "model": ModelReference(model_id="m", digest=weights.index.digest, shards=shards),
        }
        return UpdateRoundStart(**values | changes)

    def seal(self, message: Message) -> bytes:
        """Return the message as it is sent."""
        return Envelope.seal(message, sender=COORDINATOR, recipient=SITE, key=self.key)

    def send(self, message: Message, *, envelope: bytes | None = None, **options: Any) -> None:
        """Put the message, or other bytes in its place, on the site's queue."""
        self.app.send_task(
            SITE_TASKS[Kind(message.kind)],
            args=[envelope or self.seal(message)],
            queue=site_queue(SITE),
            task_id=getattr(message, "task_id", None),
            argsrepr="(test, round 1)",
            **options,
        )

    def receive(self) -> Any:
        """Return the next answer, checked as a coordinator does."""
        with Connection(self.settings.broker_url.get_secret_value()) as connection:
            queue = connection.SimpleQueue(COORDINATOR_QUEUE, serializer="msgpack")
            queue.consumer.accept = {"application/x-msgpack"}
            delivered = queue.get(timeout=20)
            delivered.ack()
            queue.close()
        envelope = Envelope.read(delivered.payload[0][0])
        assert delivered.headers["task"] == ANSWER_TASKS[AnswerKind(envelope.kind)]
        return envelope.open(ANSWERS, recipient=COORDINATOR, public_key=self.site_key.public_key)

    def heartbeat(self) -> Heartbeat | None:
        """Return the site's heartbeat if it is alive."""
        return read_heartbeats(self.broker, [SITE]).get(SITE)


@contextmanager
def run_site(folder: Path, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run the site's worker, with more settings if given; it is stopped at the end, kindly at first."""
    more = {f"FEDCHORD_{name.upper()}": str(value) for name, value in settings.items()}
    with (folder / "site.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "worker", "worker"],
            cwd=folder,  # where its trainer lies
            env=environment({"FEDCHORD_CONFIG": str(folder / "site.toml"), **more}),
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with no settings but these."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("FEDCHORD_")}
    return {**own, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    with valkey() as server:
        key, site_key = SigningKey.generate(), SigningKey.generate()
        site_key.save(tmp_path / "site.key")
        (tmp_path / "data").mkdir()
        (tmp_path / "adder.py").write_text(TRAINER)
        (tmp_path / "site.toml").write_text(
            f'broker_url = "{server.url}"\n'
            f'site_name = "{SITE}"\n'
            'blob_folder = "blobs"\n'
            'site_folder = "state"\n'
            'site_data = "data"\n'
            'signing_key_file = "site.key"\n'
            f'coordinator_public_key = "{key.public_key}"\n'
            "heartbeat_seconds = 0.2\n"
            "[site_trainers]\n"
            'adder = "adder:Adder"\n'
        )
        settings = Settings.load(tmp_path / "site.toml")
        store = FolderStore(settings.blob_folder)
        store.prepare()
        app = make_coordinator_app(settings)
        broker = connect(settings)
        made = Coordinator(
            folder=tmp_path,
            settings=settings,
            key=key,
            site_key=site_key,
            app=app,
            broker=broker,
            store=store,
        )
        try:
            yield made
        finally:
            made.hold.unlink(missing_ok=True)
            broker.close()
            app.close()


def test_a_site_trains_answers_and_stops_cleanly(coordinator: Coordinator) -> None:
    with run_site(coordinator.folder) as process:
        part = coordinator.part()
        coordinator.send(part)
        answer = coordinator.receive()
        assert isinstance(answer, UpdateReady)
        assert (answer.task_id, answer.num_examples, len(answer.shards)) == (part.task_id, 3, 1)

        coordinator.send(part)  # the same message again
        assert coordinator.receive() == answer
        assert len(coordinator.fits()) == 1

        heartbeat = coordinator.heartbeat()
        assert heartbeat is not None
        assert (heartbeat.slots, heartbeat.trainers) == (1, ("adder",))

        coordinator.send(TrainingFinished(job_id="job", state="completed"))
        job = coordinator.settings.site_folder / "jobs" / "job"
        wait_for(lambda: not job.exists(), seconds=10, what="the job to be forgotten")

        process.terminate()
        assert process.wait(20) == 0
        assert coordinator.heartbeat() is None


def test_a_trainer_that_hangs_for_ever_gives_its_slot_back_at_the_time_limit(coordinator: Coordinator) -> None:
    with run_site(coordinator.folder):
        hung = coordinator.part(config={"hang": True}, deadline_at=time.time() + 6)
        coordinator.send(hung, time_limit=7)
        wait_for((coordinator.settings.site_data / "hang").exists, seconds=20, what="the trainer to hang")
        part = coordinator.part(config={"hang": False})
        coordinator.send(hung)  # asked again, for the process that is told to end may be killed before it has answered
        coordinator.send(part)
        answers: dict[str, Any] = {}
        while len(answers) < 2:
            answer = coordinator.receive()
            answers[answer.task_id] = answer
        assert isinstance(answers[hung.task_id], PartDeclined)
        assert isinstance(answers[part.task_id], UpdateReady)
        assert len(coordinator.fits()) == 2


def test_what_a_site_cannot_or_will_not_do_is_answered(coordinator: Coordinator) -> None:
    with run_site(coordinator.folder):
        coordinator.send(coordinator.part(trainer="remover"))
        assert "Trainer 'remover' is not on this site's list (adder)" in coordinator.receive().reason

        coordinator.app.send_task("site.teleport_start", args=[b"x"], queue=site_queue(SITE), task_id="new-kind")
        unknown = coordinator.receive()
        assert isinstance(unknown, PartDeclined)
        assert unknown.task_id == "new-kind"
        assert unknown.reason == "This site does not know messages of the kind TELEPORT_START; upgrade this site."

        part = coordinator.part()
        fields = msgpack.unpackb(coordinator.seal(part))
        for position, value, reason in ((0, 99, "has version 99"), (5, b"\0" * 64, "is not signed by its sender")):
            changed = [*fields[:position], value, *fields[position + 1 :]]
            coordinator.send(part, envelope=msgpack.packb(changed))
            declined = coordinator.receive()
            assert declined.task_id == part.task_id
            assert reason in declined.reason

        coordinator.app.send_task(SITE_TASKS[Kind.MODEL_TEST_ROUND], queue=site_queue(SITE), task_id="no-arguments")
        assert coordinator.receive().task_id == "no-arguments"
        assert coordinator.fits() == []


def test_a_site_answers_a_ping_while_it_trains_and_stops_when_the_job_is_cancelled(coordinator: Coordinator) -> None:
    coordinator.hold.touch()
    with run_site(coordinator.folder, site_nice=7) as process:
        coordinator.send(coordinator.part())
        wait_for(lambda: len(coordinator.fits()) == 1, seconds=20, what="the training to begin")
        child = psutil.Process(coordinator.fits()[0][0])
        assert child.nice() == psutil.Process(process.pid).nice() + 7  # training leaves the worker time to answer
        (reply,) = coordinator.app.control.ping(timeout=10, limit=1) or []
        assert list(reply.values()) == [{"ok": "pong"}]

        def is_at_work() -> bool:
            heartbeat = coordinator.heartbeat()
            return heartbeat is not None and (heartbeat.working_on, heartbeat.free_slots) == (("(test, round 1)",), 0)

        wait_for(is_at_work, seconds=10, what="a heartbeat that tells of the part")
        coordinator.broker.set(cancel_key(SITE, "job"), 1, ex=60)
        assert coordinator.receive().reason == "The job was stopped."


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_part_whose_process_was_killed_is_done_again(coordinator: Coordinator, how: signal.Signals) -> None:
    coordinator.hold.touch()
    with run_site(coordinator.folder):
        part = coordinator.part()
        coordinator.send(part)
        wait_for(lambda: len(coordinator.fits()) == 1, seconds=20, what="the training to begin")
        os.kill(coordinator.fits()[0][0], how)
        wait_for(lambda: len(coordinator.fits()) == 2, seconds=30, what="the training to begin again")
        coordinator.hold.unlink()
        answer = coordinator.receive()
        assert isinstance(answer, UpdateReady)
        assert answer.task_id == part.task_id
    first, second = coordinator.fits()
    assert first[0] != second[0]


def test_a_site_that_was_killed_leaves_nothing_running_and_takes_up_its_part_again(coordinator: Coordinator) -> None:
    coordinator.hold.touch()
    with run_site(coordinator.folder) as process:
        coordinator.send(coordinator.part())
        wait_for(lambda: len(coordinator.fits()) == 1, seconds=20, what="the training to begin")
        process.kill()
        process.wait()
        child = coordinator.fits()[0][0]
        wait_for(lambda: not is_running(child), seconds=10, what="the child to end with its parent")
        wait_for(lambda: coordinator.heartbeat() is None, seconds=10, what="the heartbeat to expire")
    coordinator.hold.unlink()
    with run_site(coordinator.folder):
        assert isinstance(coordinator.receive(), UpdateReady)


def kill(coordinator: Coordinator, process: subprocess.Popen[bytes]) -> None:
    """Kill the site's worker and wait until nothing of it is left."""
    process.kill()
    process.wait()
    wait_for(lambda: coordinator.heartbeat() is None, seconds=10, what="the heartbeat to expire")


def restore_overdue(coordinator: Coordinator) -> None:
    """Do what every worker of the site does now and then: hand out again what the visibility timeout is over for.

    A worker does it every hundred seconds, which a test need not wait for.
    """
    app = make_site_app(coordinator.settings.model_copy(update={"visibility_timeout_seconds": 1}))
    with app.connection_for_write() as connection:
        connection.default_channel.qos.restore_visible(interval=1)
    app.close()


@pytest.fixture
def remote() -> Iterator[HttpStore]:
    with http_store() as store:
        yield store


def test_a_part_that_takes_longer_than_the_visibility_timeout_is_trained_once(coordinator: Coordinator) -> None:
    coordinator.hold.touch()
    with run_site(coordinator.folder, site_slots=2, visibility_timeout_seconds=1) as process:
        part = coordinator.part()
        coordinator.send(part)
        wait_for(lambda: len(coordinator.fits()) == 1, seconds=20, what="the training to begin")

        def dropped() -> int:
            return coordinator.log().count("dropped a copy")

        def comes_again() -> bool:
            restore_overdue(coordinator)
            return dropped() > 0

        wait_for(comes_again, seconds=20, what="the message to be overdue, and its copy to be dropped")
        before = dropped()
        coordinator.send(part.model_copy(update={"attempt": 2}))  # and the coordinator may ask again
        wait_for(lambda: dropped() > before, seconds=10, what="the question to be dropped")
        coordinator.hold.unlink()
        answer = coordinator.receive()
        assert (answer.task_id, answer.attempt) == (part.task_id, 1)
        process.terminate()
        process.wait(20)
    assert len(coordinator.fits()) == 1
    assert coordinator.broker.llen(COORDINATOR_QUEUE) == 0


def test_a_site_that_was_killed_in_mid_upload_does_not_train_again(coordinator: Coordinator, remote: HttpStore) -> None:
    part = coordinator.part_over_http(remote)
    with run_site(coordinator.folder) as process:
        coordinator.hold.touch()
        coordinator.send(part)
        wait_for(lambda: len(coordinator.fits()) == 1, seconds=20, what="the training to begin")
        remote.stall_after = 100_000
        coordinator.hold.unlink()
        assert remote.stalled.wait(20)
        kill(coordinator, process)
    remote.stall_after = None
    with run_site(coordinator.folder):
        answer = coordinator.receive()
    assert isinstance(answer, UpdateReady)
    coordinator.trained_over_http(remote, answer)
    assert len(coordinator.fits()) == 1
    assert remote.asked == ["GET model all", "PUT update all", "PUT update all"]
    assert list(coordinator.settings.site_folder.glob("outgoing/*")) == []


def test_a_site_that_was_killed_in_mid_download_fetches_what_is_missing(
    coordinator: Coordinator, remote: HttpStore
) -> None:
    remote.stall_after = 3_000_000
    part = coordinator.part_over_http(remote)
    fetched = coordinator.settings.site_folder / "fetched"
    with run_site(coordinator.folder) as process:
        coordinator.send(part)
        wait_for(
            lambda: any(file.stat().st_size == 3_000_000 for file in fetched.glob(".*.part")),
            seconds=20,
            what="what was sent to be written",
        )
        kill(coordinator, process)
    remote.stall_after = None
    with run_site(coordinator.folder):
        answer = coordinator.receive()
    coordinator.trained_over_http(remote, answer)
    assert remote.asked == ["GET model all", "GET model bytes=3000000-", "PUT update all"]
    wait_for(lambda: list(fetched.iterdir()) == [], seconds=10, what="what was fetched to be removed")


def test_an_object_store_that_is_away_for_a_while_costs_a_while(coordinator: Coordinator, remote: HttpStore) -> None:
    remote.away = True
    with run_site(coordinator.folder):
        for path, count in (("GET model", 3), ("PUT update", 3)):
            if path == "GET model":
                coordinator.send(coordinator.part_over_http(remote))
            wait_for(
                lambda path=path, count=count: sum(asked.startswith(path) for asked in remote.asked) >= count,
                seconds=20,
                what=f"{path} to be tried in vain",
            )
            if path == "GET model":
                coordinator.hold.touch()
            remote.away = False
            if path == "GET model":
                wait_for(lambda: len(coordinator.fits()) == 1, seconds=20, what="the training to begin")
                remote.away = True
                coordinator.hold.unlink()
        coordinator.trained_over_http(remote, coordinator.receive())
    assert len(coordinator.fits()) == 1
    assert coordinator.log().count("is away") == coordinator.log().count("is back")
    assert coordinator.log().count("is away") in (1, 2)  # an upload that gets a little further each time is no outage


def test_a_site_that_was_away_for_a_day_declines_what_is_too_late_and_does_the_rest(coordinator: Coordinator) -> None:
    late, next_part = coordinator.part(deadline_at=time.time() - 24 * 3600), coordinator.part()
    coordinator.send(late)
    coordinator.send(next_part)
    with run_site(coordinator.folder):
        declined, answer = coordinator.receive(), coordinator.receive()
    assert declined.task_id == late.task_id
    assert declined.reason.startswith("The deadline passed 86")
    assert isinstance(answer, UpdateReady)
    assert [round_ for _, round_ in coordinator.fits()] == [next_part.round]


def test_a_site_tells_how_far_a_part_is_and_stops_the_one_that_is_not_wanted(coordinator: Coordinator) -> None:
    coordinator.hold.touch()
    with run_site(coordinator.folder):
        part = coordinator.part()
        coordinator.send(part)

        def told() -> ProgressReport | None:
            return read_progress(coordinator.broker, [(SITE, part.task_id)]).get(part.task_id)

        wait_for(told, seconds=20, what="a report of the part")
        report = told()
        assert report is not None
        assert (report.fraction, report.text) == (0.5, "waiting")
        coordinator.broker.set(cancel_key(SITE, part.task_id), 1, ex=60)
        assert coordinator.receive().reason == "The part is not wanted any more."
        wait_for(lambda: told() is None, seconds=10, what="the report to be taken back")


def is_running(pid: int) -> bool:
    """Return whether the process is at work; one that ended may still be listed until somebody asks for its end."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FEDCHORD_SITE_NAME": "Not Valid"}, "Site name 'Not Valid' is not valid"),
        ({"FEDCHORD_SITE_SLOTS": "none"}, "site_slots"),
        ({"FEDCHORD_COORDINATOR_PUBLIC_KEY": "abc="}, "The public key"),
        ({"FEDCHORD_SIGNING_KEY_FILE": "nowhere.key"}, "Cannot read the signing key"),
        ({"FEDCHORD_SITE_TRAINERS": '{"a": "not_there:A"}'}, "names a module that is not there"),
        ({"FEDCHORD_BROKER_URL": "redis://127.0.0.1:{port}/0"}, "does not answer"),
        ({"FEDCHORD_CONFIG": "nowhere.toml"}, "Cannot read the settings file"),
        ({"FEDCHORD_CONFIG": ""}, "No site_name"),
    ],
)
def test_a_wrong_setting_is_one_clear_sentence(coordinator: Coordinator, change: dict[str, str], message: str) -> None:
    (port,) = free_ports(1)
    changed = {name: value.replace("{port}", str(port)) for name, value in change.items()}
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker", "worker"],
        cwd=coordinator.folder,
        env=environment({"FEDCHORD_CONFIG": str(coordinator.folder / "site.toml"), **changed}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert coordinator.heartbeat() is None
