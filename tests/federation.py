"""A federation for tests: real Valkey, records, blobs and coordinator processes, and sites that follow a script."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
from celery import Celery
from kombu import Connection

from common.broker import make_coordinator_app
from common.heartbeats import Heartbeat, read_heartbeats, write_heartbeat
from common.messages import (
    COORDINATOR,
    SITE_MESSAGES,
    ClientRemoved,
    Envelope,
    Message,
    ModelTestRound,
    PartDeclined,
    Shard,
    TrainingFinished,
    TrainingStart,
    UpdateReady,
    UpdateRoundStart,
)
from common.queues import ANSWER_TASKS, COORDINATOR_QUEUE, AnswerKind, site_queue
from common.settings import Settings
from common.signing import SigningKey
from coordinator.jobfile import JobSpec
from coordinator.jobs import Job, get_job
from coordinator.services import Services, make_key, open_services
from store.database import reading, writing
from store.models import ModelInfo, get_model
from store.parties import enroll_site
from store.transfer import Transfer
from store.weights import load_index, load_weights, write_weights
from tests.servers import die_with_parent, valkey

Tensors = Mapping[str, np.ndarray]
ROOT = Path(__file__).resolve().parent.parent


def wait_until(fact: Callable[[], Any], *, seconds: float = 20, what: str = "the fact") -> Any:
    """Return what the fact returns once it is true; fail after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := fact():
            return found
        time.sleep(0.01)
    raise AssertionError(f"Waited {seconds} s for {what}.")


@dataclass
class ScriptedSite:
    """A site that does what the test says, through the real queue, store references and signatures."""

    name: str
    services: Services
    key: SigningKey
    app: Celery
    told: set[tuple[str, str]] = field(default_factory=set)  # notices that have come, by kind and job

    def beat(self, *, trainers: tuple[str, ...] = ("constant",), **changes: Any) -> None:
        """Say once that the site is alive."""
        made = heartbeat(trainers).model_copy(update=changes)
        write_heartbeat(self.services.broker, self.name, made, lifetime_seconds=60)

    def forget(self) -> None:
        """Empty the site's queue."""
        self.services.broker.delete(site_queue(self.name))

    def receive(self, *, seconds: float = 20) -> Message:
        """Return the next message on the site's queue; pass over a notice that has come before."""
        message = self._receive(seconds)
        while isinstance(message, TrainingFinished | ClientRemoved) and (message.kind, message.job_id) in self.told:
            message = self._receive(seconds)
        if isinstance(message, TrainingFinished | ClientRemoved):
            self.told.add((message.kind, message.job_id))
        return message

    def _receive(self, seconds: float) -> Message:
        own = site_queue(self.name)
        keys = {f"{key}_key": f"{key}.{own}" for key in ("unacked", "unacked_index", "unacked_mutex")}
        url = self.services.settings.broker_url.get_secret_value()
        with Connection(url, transport_options=keys) as connection:  # keys of its own, as a real site has
            queue = connection.SimpleQueue(own, serializer="msgpack")
            queue.consumer.accept = {"application/x-msgpack"}
            delivered = queue.get(timeout=seconds)
            delivered.ack()
            queue.close()
        envelope = Envelope.read(delivered.payload[0][0])
        return envelope.open(SITE_MESSAGES, recipient=self.name, public_key=self.services.key.public_key)

    def tensors(self, message: Any) -> dict[str, np.ndarray]:
        """Return the global model that the message refers to, fetched as a site does."""
        with reading(self.services.engine) as connection:
            model = get_model(connection, message.model.model_id)
        return {name: array.copy() for name, array in read_model(self.services, model).items()}

    def upload(self, message: Any, tensors: Tensors) -> tuple[Shard, ...]:
        """Write the tensors to the places that the message names."""
        transfer = Transfer(shared_folder=self.services.settings.blob_folder, timeout_seconds=10)
        with tempfile.TemporaryDirectory() as folder:
            shards = []
            written = write_weights(Path(folder), tensors, message.shard_bytes)
            for (path, blob), url in zip(written, message.upload_urls, strict=False):
                transfer.upload(path, url)
                shards.append(Shard(digest=blob.digest, size=blob.size))
        return tuple(shards)

    def answer(
        self,
        message: Any,
        tensors: Tensors | None = None,
        *,
        num_examples: int = 1,
        metrics: dict[str, float | None] | None = None,
        **changes: Any,
    ) -> UpdateReady:
        """Send a result for the message."""
        result = UpdateReady(
            job_id=message.job_id,
            round=message.round,
            task_id=message.task_id,
            attempt=message.attempt,
            num_examples=num_examples,
            metrics=metrics or {},
            shards=self.upload(message, tensors) if tensors is not None else (),
        ).model_copy(update=changes)
        self.send(result)
        return result

    def decline(self, message: Any, reason: str, *, failed: bool = False) -> None:
        """Send a refusal for the message."""
        self.send(
            PartDeclined(
                job_id=message.job_id, task_id=message.task_id, attempt=message.attempt, reason=reason, failed=failed
            )
        )

    def send(self, message: Message, *, key: SigningKey | None = None) -> None:
        """Put a message on the coordinator's queue."""
        envelope = Envelope.seal(message, sender=self.name, recipient=COORDINATOR, key=key or self.key)
        self.app.send_task(ANSWER_TASKS[AnswerKind(message.kind)].value, args=[envelope], queue=COORDINATOR_QUEUE)

    def start(self, tensors: Tensors | None = None, *, num_examples: int = 1) -> TrainingStart:
        """Answer the start of a job; build the first model if asked."""
        message = self.receive()
        assert isinstance(message, TrainingStart), message
        self.answer(message, tensors if message.build_model else None, num_examples=num_examples)
        return message

    @contextmanager
    def serving(self, train: Callable[[int, Tensors], tuple[Tensors, int]], *, seed: int = 0) -> Iterator[None]:
        """Answer every message in a thread after a short pause; `train` gives tensors and the number of examples."""
        done = threading.Event()
        receipts: dict[str, UpdateReady] = {}
        pause = random.Random(f"{seed} {self.name}")

        def serve() -> None:
            while not done.is_set():
                try:
                    message = self._receive(0.2)
                except Empty:
                    continue
                time.sleep(pause.uniform(0, 0.02))  # so that the answers come in any order
                if (receipt := receipts.get(getattr(message, "task_id", ""))) is not None:
                    self.send(receipt)
                elif isinstance(message, TrainingStart):
                    tensors = train(0, {})[0] if message.build_model else None
                    receipts[message.task_id] = self.answer(message, tensors)
                elif isinstance(message, UpdateRoundStart):
                    tensors, examples = train(message.round, self.tensors(message))
                    receipts[message.task_id] = self.answer(message, tensors, num_examples=examples)
                elif isinstance(message, ModelTestRound):
                    receipts[message.task_id] = self.answer(message, metrics={"round": message.round})

        thread = threading.Thread(target=serve, name=self.name)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def heartbeat(trainers: tuple[str, ...]) -> Heartbeat:
    """Return a heartbeat of a machine that has everything."""
    return Heartbeat(
        version="test",
        boot_id="test",
        at=time.time(),
        cpu_percent=0.0,
        memory_total=1,
        memory_available=1,
        disk_free=1,
        gpus=(),
        slots=1,
        free_slots=1,
        working_on=(),
        trainers=trainers,
    )


@dataclass
class Federation:
    """The services, and the sites by name."""

    folder: Path
    services: Services
    sites: dict[str, ScriptedSite]
    config: Path

    def job(self, job_id: str) -> Job:
        """Return the job as it is now."""
        with reading(self.services.engine) as connection:
            return get_job(connection, job_id)

    def wait(self, job_id: str, *states: str, seconds: float = 20) -> Job:
        """Return the job once it is in one of the states."""
        wait_until(lambda: self.job(job_id).state in states, seconds=seconds, what=f"job to be {states}")
        return self.job(job_id)

    def alive(self) -> set[str]:
        """Return the sites whose heartbeat has not run out."""
        return set(read_heartbeats(self.services.broker, sorted(self.sites)))

    def model(self, job_id: str) -> dict[str, np.ndarray]:
        """Return the tensors of the job's global model."""
        model_id = self.job(job_id).model_id
        assert model_id is not None
        with reading(self.services.engine) as connection:
            return read_model(self.services, get_model(connection, model_id))

    def spec(self, **changes: Any) -> JobSpec:
        """Return a job of one round over all sites."""
        values = {"name": "test", "trainer": "constant", "rounds": 1, "test_every": 0, "round_deadline_seconds": 30}
        return JobSpec.model_validate({**values, **changes})

    @contextmanager
    def coordinator(self, *, log: str = "coordinator.log") -> Iterator[subprocess.Popen[bytes]]:
        """Run a coordinator worker as a process of its own."""
        with _worker("coordinator", self.config, self.folder / log, "-n", f"{log}@test") as process:
            yield process

    @contextmanager
    def site(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run an enrolled site as a process of its own, with the benchmarks' trainer."""
        folder = self.folder / name
        folder.mkdir()
        self.sites[name].key.save(folder / "signing.key")
        settings = self.services.settings
        values = {
            "broker_url": settings.broker_url.get_secret_value(),
            "blob_folder": str(settings.blob_folder),
            "site_name": name,
            "coordinator_public_key": self.services.key.public_key,
        }
        lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines.append('site_trainers = { constant = "benchmarks.constant:ConstantTrainer" }')
        (folder / "site.toml").write_text("\n".join(lines))
        with _worker("worker", folder / "site.toml", self.folder / f"{name}.log") as process:
            yield process

    def log(self, name: str = "coordinator.log") -> str:
        """Return what a coordinator has logged."""
        return (self.folder / name).read_text()


@contextmanager
def _worker(app: str, config: Path, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", app, "worker", *options],
            cwd=ROOT,
            env={**clean_environment(), "FEDCHORD_CONFIG": str(config)},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def read_model(services: Services, model: ModelInfo) -> dict[str, np.ndarray]:
    """Return the tensors of a stored model."""
    return load_weights(services.blobs, load_index(services.blobs, model.index_hash or model.model_hash))


def clean_environment() -> dict[str, str]:
    """Return the environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FEDCHORD_")}


@contextmanager
def federation(folder: Path, *names: str, broker_url: str | None = None, **settings: Any) -> Iterator[Federation]:
    """Open a federation with so many enrolled sites that are alive."""
    with ExitStack() as stack:
        if broker_url is None:
            broker_url = stack.enter_context(valkey()).url
        config = folder / "fedchord.toml"
        values = {
            "broker_url": broker_url,
            "database_url": f"sqlite:///{folder / 'fedchord.db'}",
            "blob_folder": str(folder / "blobs"),
            "signing_key_file": str(folder / "signing.key"),
            "sweep_seconds": 0.2,
            "lease_seconds": 1.0,
            "ask_again_seconds": 1.0,
            **settings,
        }
        config.write_text("".join(f"{name} = {_toml(value)}\n" for name, value in values.items()))
        loaded = Settings.load(config)
        make_key(loaded.signing_key_file)
        services = open_services(loaded)
        sites = {}
        for name in names:
            key = SigningKey.generate()
            with writing(services.engine) as connection:
                enroll_site(connection, name, key.public_key)
            sites[name] = ScriptedSite(name=name, services=services, key=key, app=make_coordinator_app(loaded))
            sites[name].beat()
        try:
            yield Federation(folder=folder, services=services, sites=sites, config=config)
        finally:
            for site in sites.values():
                site.app.close()
            services.close()


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml(each)}" for name, each in value.items()) + "}"
    return json.dumps(value)  # for text, numbers and booleans that is TOML, too
