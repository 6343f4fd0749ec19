"""A site's answer to everything that may come, with a real folder store and a list for what it sends."""

import logging
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import msgpack
import numpy as np
import pytest

from common.errors import Declined, InvalidInput
from common.messages import (
    ANSWERS,
    COORDINATOR,
    ClientRemoved,
    Envelope,
    Message,
    ModelReference,
    ModelTestRound,
    PartDeclined,
    SourceShard,
    SwagRoundStart,
    TrainingFinished,
    TrainingStart,
    UpdateReady,
    UpdateRoundStart,
)
from common.settings import Settings
from common.signing import SigningKey
from store.blobs import Blob
from store.folder import FolderStore
from store.tensors import read_tensors
from store.transfer import Transfer
from store.weights import store_weights
from worker.reports import Reports
from worker.site import Site, prepare_site
from worker.trainer import Evaluation, Fit, RoundContext, Tensors, Trainer, derive_seed
from worker.trainers import Trainers


class Recorder(Trainer):
    """Adds the round's number; `config` tells it how to misbehave. What was called is in `calls`."""

    calls: ClassVar[list[str]] = []
    made: ClassVar[int] = 0

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        if context.config.get("key") == "wrong":
            raise Declined("The job's config is not valid: key: use another.")
        type(self).made += 1

    def build(self) -> Tensors:
        return {"w": np.full(3, self.context.seed, np.float32), "n": np.array(2, np.int64)}

    def num_examples(self) -> int:
        return 11

    def fit(self, tensors: Tensors, step: RoundContext) -> Any:
        self.calls.append(f"fit {step.round}")
        self.last_step = step
        step.report(0.5, "half")
        behaviour = self.context.config.get("behaviour")
        if isinstance(behaviour, str):
            return BEHAVIOURS[behaviour](tensors)
        (self.context.folder / "state").write_text("kept")
        count: Any = np.int64(5)  # numpy's numbers are as good as Python's
        loss: Any = np.float32(0.25)
        return Fit(
            tensors={name: tensor + step.round for name, tensor in tensors.items()},
            num_examples=count,
            metrics={"train_loss": loss, "odd": float("nan")},
        )

    def evaluate(self, tensors: Tensors, step: RoundContext) -> Evaluation:
        self.calls.append(f"evaluate {step.round}")
        return Evaluation(num_examples=4, metrics={"accuracy": float(tensors["w"][0])})

    def moments(self, tensors: Tensors, step: RoundContext) -> Fit:
        return Fit(tensors={"first/w": tensors["w"], "second/w": tensors["w"] ** 2}, num_examples=5)

    def finish(self, tensors: Tensors | None, state: str) -> None:
        value = None if tensors is None else float(tensors["w"][0])
        self.calls.append(f"finish {state} {value} {(self.context.folder / 'state').exists()}")
        if self.context.config.get("behaviour") == "finish":
            raise RuntimeError("no")


def boom(tensors: Tensors) -> Fit:
    raise TypeError("patient Jane Doe is 43")


BEHAVIOURS: dict[str, Callable[[Tensors], Any]] = {
    "raise": boom,
    "exit": lambda tensors: sys.exit(3),
    "decline": lambda tensors: (_ for _ in ()).throw(Declined("Not enough patients.")),
    "nothing": lambda tensors: None,
    "no tensors": lambda tensors: Fit(tensors={}, num_examples=1),
    "objects": lambda tensors: Fit(tensors={"w": np.array([object()])}, num_examples=1),
    "count": lambda tensors: Fit(tensors=tensors, num_examples=-1),
    "absurd count": lambda tensors: Fit(tensors=tensors, num_examples=10**30),
    "metrics": lambda tensors: Fit(tensors=tensors, num_examples=1, metrics=dict.fromkeys(map(str, range(1001)), 1.0)),
    "metric name": lambda tensors: Fit(tensors=tensors, num_examples=1, metrics={"m" * 201: 1.0}),
    "surrogate": lambda tensors: (_ for _ in ()).throw(InvalidInput("Not \udc80 text.")),
    "metric": lambda tensors: Fit(tensors=tensors, num_examples=1, metrics={"m": "high"}),  # type: ignore[dict-item]  # the mistake under test
    "finish": lambda tensors: Fit(tensors=tensors, num_examples=1),
}


@dataclass
class ScriptedReports:
    """What the coordinator wants, and what it was told."""

    reasons: dict[str, str] = field(default_factory=dict)  # why to stop, by job or task id
    told: list[tuple[str, float, str]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def begin(self, job_id: str, task_id: str) -> tuple[float, str]:
        return time.time(), self.why_stop(job_id, task_id)

    def why_stop(self, job_id: str, task_id: str) -> str:
        return self.reasons.get(job_id) or self.reasons.get(task_id, "")

    def tell(self, task_id: str, fraction: float, text: str) -> None:
        self.told.append((task_id, fraction, text))

    def forget(self, task_id: str) -> None:
        self.forgotten.append(task_id)


@dataclass
class Bench:
    """A site, and the coordinator's half of it."""

    folder: Path
    settings: Settings
    store: FolderStore
    key: SigningKey  # the coordinator's
    site_key: SigningKey
    sent: list[bytes] = field(default_factory=list)
    reports: "ScriptedReports" = field(default_factory=lambda: ScriptedReports())

    def site(self) -> Site:
        """Return the site as one of its processes has it."""
        return Site(
            settings=self.settings,
            key=self.site_key,
            transfer=Transfer(shared_folder=self.store.folder, timeout_seconds=5),
            trainers=Trainers(self.settings.site_trainers),
            send=self.sent.append,
            reports=cast(Reports, self.reports),
        )

    def seal(self, message: Message, **changes: Any) -> bytes:
        """Return the message as the coordinator sends it."""
        values: dict[str, Any] = {"sender": COORDINATOR, "recipient": "alpha", "key": self.key, **changes}
        return Envelope.seal(message, **values)

    def answer(self) -> Any:
        """Return the last answer, checked as the coordinator does."""
        return Envelope.read(self.sent[-1]).open(ANSWERS, recipient=COORDINATOR, public_key=self.site_key.public_key)

    def ask(self, message: Message, *, site: Site | None = None) -> Any:
        """Hand the message to the site and return its answer."""
        before = len(self.sent)
        (site or self.site()).handle(self.seal(message), "celery-id")
        assert len(self.sent) == before + 1
        return self.answer()

    def model(self, value: float = 1.0, *, shard_bytes: int = 2**20) -> ModelReference:
        """Store a model and return a reference to it."""
        tensors: dict[str, Any] = {"w": np.full(3, value, np.float32), "n": np.array(2, np.int64)}
        weights = store_weights(self.store, tensors, shard_bytes)
        shards = tuple(
            SourceShard(digest=shard.digest, size=shard.size, url=self.store.read_url(shard, seconds=60))
            for shard in weights.shards
        )
        return ModelReference(model_id="model", digest=weights.index.digest, shards=shards)

    def part(self, kind: type[Any], **changes: Any) -> Any:
        """Return a message that asks for a part."""
        values: dict[str, Any] = {
            "job_id": "job",
            "job_name": "test",
            "round": 1,
            "task_id": "task",
            "deadline_at": time.time() + 60,
            "trainer": "recorder",
            "seed": 3,
        }
        if kind is not ModelTestRound:
            values |= {"shard_bytes": 2**20, "upload_urls": (self.store.write_url("slot/0", seconds=60),)}
        if kind is not TrainingStart:
            values["model"] = self.model()
        return kind(**values | changes)

    def uploaded(self, answer: UpdateReady) -> dict[str, Any]:
        """Return the tensors that the answer tells of."""
        tensors = {}
        for position, shard in enumerate(answer.shards):
            blob = Blob(digest=shard.digest, size=shard.size)
            self.store.accept(f"slot/{position}", blob)
            with self.store.open(blob) as file:
                tensors.update({name: array.tolist() for name, array in read_tensors(Path(file.name)).items()})
        return tensors


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    module = types.ModuleType("recorder_trainer")
    module.Recorder = Recorder  # type: ignore[attr-defined]  # a module made for the test
    monkeypatch.setitem(sys.modules, "recorder_trainer", module)
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(Recorder, "made", 0)
    key = SigningKey.generate()
    settings = Settings(
        site_name="alpha",
        site_data=tmp_path / "data",
        site_folder=tmp_path / "state",
        coordinator_public_key=key.public_key,
        site_trainers={"recorder": "recorder_trainer:Recorder"},
    )
    store = FolderStore(tmp_path / "blobs")
    store.prepare()
    prepare_site(settings)
    tested = Bench(folder=tmp_path, settings=settings, store=store, key=key, site_key=SigningKey.generate())
    yield tested
    for folder in (tmp_path / "state" / "scratch").iterdir():
        assert list(folder.iterdir()) == []  # whatever happened, nothing of a part stays
    for name in ("fetched", "outgoing"):
        assert list((tmp_path / "state" / name).iterdir()) == []


# --- parts that are done ----------------------------------------------------------------------------------------------


def test_a_training_part_uploads_the_update_and_tells_of_it(bench: Bench) -> None:
    site = bench.site()
    answer = bench.ask(bench.part(UpdateRoundStart, round=4), site=site)
    assert isinstance(answer, UpdateReady)
    assert (answer.job_id, answer.job_name, answer.round, answer.task_id, answer.attempt) == (
        "job",
        "test",
        4,
        "task",
        1,
    )
    assert answer.num_examples == 5
    assert answer.metrics == {"train_loss": 0.25, "odd": None}
    assert 0 < answer.seconds < 60
    assert bench.uploaded(answer) == {"w": [5, 5, 5], "n": 6}


def test_a_part_has_its_own_seed(bench: Bench) -> None:
    site = bench.site()
    bench.ask(bench.part(UpdateRoundStart, round=4, seed=3), site=site)
    trainer = site._jobs._made["job"]
    assert isinstance(trainer, Recorder)
    assert trainer.last_step.seed == derive_seed(3, 4, "alpha")


def test_an_update_may_have_several_shards(bench: Bench) -> None:
    urls = tuple(bench.store.write_url(f"slot/{number}", seconds=60) for number in range(3))
    part = bench.part(UpdateRoundStart, shard_bytes=16, upload_urls=urls, model=bench.model(shard_bytes=16))
    assert len(part.model.shards) == 2
    answer = bench.ask(part)
    assert len(answer.shards) == 2
    assert bench.uploaded(answer) == {"w": [2, 2, 2], "n": 3}


def test_a_test_part_sends_metrics_and_no_tensors(bench: Bench) -> None:
    answer = bench.ask(bench.part(ModelTestRound))
    assert (answer.num_examples, answer.metrics, answer.shards) == (4, {"accuracy": 1.0}, ())


def test_a_swag_part_sends_moments(bench: Bench) -> None:
    answer = bench.ask(bench.part(SwagRoundStart, model=bench.model(3.0)))
    assert bench.uploaded(answer) == {"first/w": [3, 3, 3], "second/w": [9, 9, 9]}


def test_the_start_of_a_job_tells_the_number_of_examples(bench: Bench) -> None:
    answer = bench.ask(bench.part(TrainingStart, round=0))
    assert (answer.num_examples, answer.shards) == (11, ())


def test_one_site_builds_the_first_model(bench: Bench) -> None:
    answer = bench.ask(bench.part(TrainingStart, round=0, build_model=True))
    assert bench.uploaded(answer) == {"w": [3, 3, 3], "n": 2}


def test_a_job_s_trainer_is_made_once_and_anew_for_another_config(bench: Bench) -> None:
    site = bench.site()
    bench.ask(bench.part(TrainingStart, task_id="a"), site=site)
    bench.ask(bench.part(ModelTestRound, task_id="b"), site=site)
    assert Recorder.made == 1
    bench.ask(bench.part(ModelTestRound, task_id="c", config={"key": 1}), site=site)
    bench.ask(bench.part(ModelTestRound, task_id="d", job_id="other"), site=site)
    assert Recorder.made == 3


# --- messages that come twice -----------------------------------------------------------------------------------------


def test_a_message_that_comes_twice_is_answered_twice_and_trained_once(bench: Bench) -> None:
    part = bench.part(UpdateRoundStart)
    bench.ask(part)
    bench.ask(part)
    assert bench.sent[0] == bench.sent[1]
    assert Recorder.calls == ["fit 1"]


def test_a_part_that_is_asked_for_again_gets_the_answer_that_was_given(bench: Bench) -> None:
    bench.ask(bench.part(UpdateRoundStart))
    answer = bench.ask(bench.part(UpdateRoundStart, attempt=2))
    assert answer.attempt == 1
    assert bench.sent[0] == bench.sent[1]
    assert Recorder.calls == ["fit 1"]


def test_an_answer_that_could_not_be_sent_is_sent_when_the_message_comes_again(bench: Bench) -> None:
    part = bench.part(UpdateRoundStart)

    def fail(answer: bytes) -> None:
        raise ConnectionError

    site = bench.site()
    site._send = fail
    with pytest.raises(ConnectionError):
        site.handle(bench.seal(part), "celery-id")
    answer = bench.ask(part)
    assert isinstance(answer, UpdateReady)
    assert Recorder.calls == ["fit 1"]


class Killed(BaseException):
    """The process ends here: as with SIGKILL, nothing catches it."""


class DyingTransfer(Transfer):
    """Ends the process after some shards were sent."""

    def __init__(self, *, sends: int, **options: Any) -> None:
        super().__init__(**options)
        self.sends = sends

    def upload(self, path: Path, url: str, **options: Any) -> None:
        if self.sends == 0:
            raise Killed
        self.sends -= 1
        super().upload(path, url, **options)


def killed_while_it_sends(bench: Bench, part: Any, *, sent: int) -> None:
    """Let the site do the part, and end its process after so many shards were sent."""
    site = bench.site()
    site._transfer = DyingTransfer(sends=sent, shared_folder=bench.store.folder, timeout_seconds=5)
    with pytest.raises(Killed):
        site.handle(bench.seal(part), "celery-id")
    assert bench.sent == []


def part_of_two_shards(bench: Bench, slot: str, **changes: Any) -> Any:
    urls = tuple(bench.store.write_url(f"{slot}/{number}", seconds=60) for number in range(2))
    return bench.part(UpdateRoundStart, shard_bytes=16, upload_urls=urls, **changes)


@pytest.mark.parametrize("sent", [0, 1])
def test_a_site_killed_in_mid_upload_sends_on_and_does_not_train_again(bench: Bench, sent: int) -> None:
    part = part_of_two_shards(bench, "slot")
    killed_while_it_sends(bench, part, sent=sent)
    site = bench.site()
    site._transfer = counted = DyingTransfer(sends=9, shared_folder=bench.store.folder, timeout_seconds=5)
    answer = bench.ask(part, site=site)
    assert bench.uploaded(answer) == {"w": [2, 2, 2], "n": 3}
    assert (answer.num_examples, answer.metrics) == (5, {"train_loss": 0.25, "odd": None})
    assert 9 - counted.sends == 2 - sent  # what had arrived is not sent again
    assert Recorder.calls == ["fit 1"]


def test_an_update_that_was_trained_for_an_earlier_attempt_is_sent_whole_to_where_the_later_one_says(
    bench: Bench,
) -> None:
    killed_while_it_sends(bench, part_of_two_shards(bench, "early"), sent=1)
    answer = bench.ask(part_of_two_shards(bench, "slot", attempt=3))
    assert answer.attempt == 3
    assert bench.uploaded(answer) == {"w": [2, 2, 2], "n": 3}
    assert Recorder.calls == ["fit 1"]


@pytest.mark.parametrize("damage", ["shard", "answer", "missing"])
def test_an_update_that_was_damaged_before_it_was_sent_is_trained_again(bench: Bench, damage: str) -> None:
    part = part_of_two_shards(bench, "slot")
    killed_while_it_sends(bench, part, sent=0)
    state = bench.folder / "state"
    if damage == "missing":
        (state / "outgoing" / "task@1").unlink()
    else:
        file = state / ("outgoing/task@1" if damage == "shard" else "leases/task")
        file.chmod(0o644)
        *whole, last = file.read_bytes()
        file.write_bytes(bytes([*whole, last ^ 1]))
    answer = bench.ask(part)
    assert bench.uploaded(answer) == {"w": [2, 2, 2], "n": 3}
    assert Recorder.calls == ["fit 1", "fit 1"]


def test_an_update_that_comes_too_late_to_be_sent_is_dropped(bench: Bench) -> None:
    part = part_of_two_shards(bench, "slot")
    killed_while_it_sends(bench, part, sent=1)
    answer = bench.ask(part.model_copy(update={"deadline_at": time.time() - 1}))
    assert answer.reason.startswith("The deadline passed 1.")


def test_the_end_of_a_job_drops_updates_that_nobody_will_ask_for(bench: Bench) -> None:
    killed_while_it_sends(bench, part_of_two_shards(bench, "slot", task_id="job.train.1.alpha"), sent=1)
    outgoing, leases = bench.folder / "state" / "outgoing", bench.folder / "state" / "leases"
    assert len(list(outgoing.iterdir())) == 3  # two shards, and the note that one has arrived
    bench.site().handle(bench.seal(TrainingFinished(job_id="jo", state="aborted")), "celery-id")
    assert len([*outgoing.iterdir(), *leases.iterdir()]) == 4
    bench.site().handle(bench.seal(TrainingFinished(job_id="job", state="aborted")), "celery-id")
    assert [*outgoing.iterdir(), *leases.iterdir()] == []


def test_a_copy_of_a_part_that_is_in_hand_is_dropped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    part = bench.part(UpdateRoundStart)
    other = bench.site()
    train = Recorder.fit

    def fit(self: Recorder, tensors: Tensors, step: RoundContext) -> Any:
        for attempt in (1, 2):
            other.handle(bench.seal(part.model_copy(update={"attempt": attempt})), "celery-id")
        assert bench.sent == []
        return train(self, tensors, step)

    monkeypatch.setattr(Recorder, "fit", fit)
    assert bench.ask(part).attempt == 1
    assert Recorder.calls == ["fit 1"]
    assert [getattr(record, "action", "") for record in caplog.records].count("part_in_hand") == 2
    assert bench.ask(part, site=other).attempt == 1  # now it is answered
    assert Recorder.calls == ["fit 1"]


def test_a_message_that_waited_for_a_day_is_declined_without_a_trainer_or_a_byte(bench: Bench) -> None:
    late = bench.part(UpdateRoundStart, task_id="late", deadline_at=time.time() - 24 * 3600)
    gone = late.model.model_copy(
        update={"shards": (late.model.shards[0].model_copy(update={"url": "http://127.0.0.1:1/gone"}),)}
    )
    begun = time.monotonic()
    assert bench.ask(late.model_copy(update={"model": gone})).reason.startswith("The deadline passed 86400.")
    assert time.monotonic() - begun < 1
    assert Recorder.made == 0
    assert isinstance(bench.ask(bench.part(UpdateRoundStart, task_id="next")), UpdateReady)


def test_a_part_that_ends_its_process_each_time_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    part = bench.part(UpdateRoundStart)

    def die(*_: object) -> None:
        raise KeyboardInterrupt  # like SIGKILL, nothing catches it

    monkeypatch.setattr(Recorder, "fit", die)
    for attempt in (1, 1, 2):  # however often it is asked again
        with pytest.raises(KeyboardInterrupt):
            bench.site().handle(bench.seal(part.model_copy(update={"attempt": attempt})), "celery-id")
    assert bench.sent == []
    answer = bench.ask(part)
    assert isinstance(answer, PartDeclined)
    assert answer.failed
    assert "process ended 3 times" in answer.reason


def test_a_full_disk_for_receipts_does_not_keep_the_answer_back(bench: Bench) -> None:
    receipts = bench.folder / "state" / "receipts"
    site = bench.site()
    receipts.rmdir()
    part = bench.part(UpdateRoundStart)
    answer = bench.ask(part, site=site)
    assert isinstance(answer, UpdateReady)
    receipts.mkdir()
    assert bench.ask(part, site=site).shards == answer.shards  # the update itself was kept in the receipt's place
    assert Recorder.calls == ["fit 1"]


def test_what_was_told_of_a_part_is_taken_back_when_it_is_answered(bench: Bench) -> None:
    site = bench.site()
    site._tell_seconds = 0.0
    bench.ask(bench.part(UpdateRoundStart), site=site)
    assert bench.reports.told == [("task", 0.5, "half")]
    assert bench.reports.forgotten == ["task"]


def test_a_clock_that_jumps_does_not_end_a_part(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Recorder.fit

    def fit(self: Recorder, tensors: Tensors, step: RoundContext) -> Any:
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 24 * 3600)
        return train(self, tensors, step)

    monkeypatch.setattr(Recorder, "fit", fit)
    assert isinstance(bench.ask(bench.part(UpdateRoundStart)), UpdateReady)


def test_a_process_that_is_told_to_end_leaves_the_part_to_the_next_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Recorder.fit
    monkeypatch.setattr(Recorder, "fit", lambda *_: sys.exit(-(256 - signal.SIGTERM)))  # as its handler does
    part = bench.part(UpdateRoundStart)
    with pytest.raises(SystemExit):
        bench.site().handle(bench.seal(part), "celery-id")
    assert bench.sent == []
    monkeypatch.setattr(Recorder, "fit", train)
    assert isinstance(bench.ask(part), UpdateReady)


@pytest.mark.parametrize("folder", ["outgoing", "leases"])
def test_a_disk_that_takes_nothing_fails_the_part_and_the_next_one_is_done(bench: Bench, folder: str) -> None:
    site = bench.site()
    (bench.folder / "state" / folder).rmdir()
    answer = bench.ask(bench.part(UpdateRoundStart), site=site)
    assert (answer.failed, "No such file or directory" in answer.reason) == (True, True)
    (bench.folder / "state" / folder).mkdir()
    assert isinstance(bench.ask(bench.part(UpdateRoundStart, task_id="next"), site=site), UpdateReady)


# --- parts that are declined ------------------------------------------------------------------------------------------


def test_a_trainer_that_is_not_on_the_list_is_declined(bench: Bench) -> None:
    answer = bench.ask(bench.part(UpdateRoundStart, trainer="os:system"))
    assert isinstance(answer, PartDeclined)
    assert (answer.job_id, answer.task_id, answer.failed) == ("job", "task", False)
    assert answer.reason == (
        "Trainer 'os:system' is not on this site's list (recorder); ask the site's admin to add it to site_trainers."
    )


def test_a_cancelled_job_is_declined(bench: Bench) -> None:
    bench.reports.reasons["job"] = "The job was stopped."
    answer = bench.ask(bench.part(UpdateRoundStart))
    assert (answer.reason, answer.failed) == ("The job was stopped.", False)
    assert Recorder.calls == []


def test_a_part_that_is_not_wanted_any_more_is_declined_and_the_next_one_done(bench: Bench) -> None:
    bench.reports.reasons["task"] = "The part is not wanted any more."
    answer = bench.ask(bench.part(UpdateRoundStart))
    assert (answer.reason, answer.failed) == ("The part is not wanted any more.", False)
    assert isinstance(bench.ask(bench.part(UpdateRoundStart, task_id="next")), UpdateReady)
    assert Recorder.calls == ["fit 1"]


def test_a_deadline_that_has_passed_is_declined(bench: Bench) -> None:
    answer = bench.ask(bench.part(UpdateRoundStart, deadline_at=time.time() - 3))
    assert answer.reason.startswith("The deadline passed 3.")
    assert Recorder.calls == []


def test_a_wrong_config_is_declined_at_the_start_of_the_job(bench: Bench) -> None:
    answer = bench.ask(bench.part(TrainingStart, config={"key": "wrong"}))
    assert (answer.reason, answer.failed) == ("The job's config is not valid: key: use another.", False)


def test_a_trainer_may_decline_in_its_own_words(bench: Bench) -> None:
    answer = bench.ask(bench.part(UpdateRoundStart, config={"behaviour": "decline"}))
    assert (answer.reason, answer.failed) == ("Not enough patients.", False)


def test_more_shards_than_references_are_declined(bench: Bench) -> None:
    answer = bench.ask(bench.part(UpdateRoundStart, shard_bytes=16))
    assert answer.reason.startswith("The update has 2 shards but may have 1;")


# --- parts that fail --------------------------------------------------------------------------------------------------


def test_an_exception_is_told_without_the_data_that_it_quotes(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    answer = bench.ask(bench.part(UpdateRoundStart, config={"behaviour": "raise"}))
    assert answer.failed
    assert answer.reason.startswith("TypeError: in boom, test_site.py line ")
    assert "Jane" not in answer.reason
    assert "patient Jane Doe is 43" in caplog.text  # the site's own log has it all


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("exit", "SystemExit: in "),
        ("nothing", "AttributeError: in "),
        ("no tensors", "The trainer gave dict instead of arrays by name"),
        ("objects", "Arrays of object cannot be stored"),
        ("count", "The trainer's num_examples is -1"),
        ("absurd count", "The trainer's num_examples is 1000000000000000000000000000000"),
        ("metric", "The trainer's metric 'm' is not a number"),
        ("metrics", "The trainer gives 1001 metrics; correct it to give 1000 at most."),
        ("metric name", "The trainer's metric 'mmm"),
        ("surrogate", "Not ? text."),
    ],
)
def test_a_trainer_that_misbehaves_fails_its_part_and_nothing_else(bench: Bench, behaviour: str, reason: str) -> None:
    site = bench.site()
    answer = bench.ask(bench.part(UpdateRoundStart, config={"behaviour": behaviour}), site=site)
    assert answer.failed
    assert answer.reason.startswith(reason)
    assert isinstance(bench.ask(bench.part(UpdateRoundStart, task_id="next"), site=site), UpdateReady)


def test_a_model_with_other_bytes_than_promised_fails_the_part(bench: Bench) -> None:
    model = bench.model()
    wrong = model.model_copy(update={"shards": (model.shards[0].model_copy(update={"digest": "0" * 64}),)})
    answer = bench.ask(bench.part(UpdateRoundStart, model=wrong))
    assert answer.failed
    assert Recorder.calls == []


def test_a_tensor_in_two_shards_fails_the_part(bench: Bench) -> None:
    model, other = bench.model(1.0), bench.model(2.0)
    both = model.model_copy(update={"shards": model.shards + other.shards})
    answer = bench.ask(bench.part(UpdateRoundStart, model=both))
    assert answer.failed
    assert "is in two shards" in answer.reason


def test_a_reference_outside_the_shared_folder_is_not_followed(bench: Bench) -> None:
    secret = bench.folder / "secret"
    secret.write_text("site data")
    model = bench.model()
    outside = model.model_copy(update={"shards": (model.shards[0].model_copy(update={"url": secret.as_uri()}),)})
    assert bench.ask(bench.part(UpdateRoundStart, model=outside)).failed
    target = bench.folder / "target"
    answer = bench.ask(bench.part(UpdateRoundStart, task_id="up", upload_urls=(target.as_uri(),)))
    assert answer.failed
    assert not target.exists()


# --- messages that cannot be read -------------------------------------------------------------------------------------


def garble(envelope: bytes, position: int, value: object) -> bytes:
    """Return the envelope with one of [version, kind, sender, recipient, body, signature] changed."""
    fields = msgpack.unpackb(envelope)
    fields[position] = value
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda sealed: garble(sealed, 0, 99), "has version 99"),
        (lambda sealed: garble(sealed, 5, b"\0" * 64), "is not signed by its sender"),
        (lambda sealed: garble(sealed, 4, b"\x80"), "is not signed by its sender"),
        (lambda sealed: b"\xc1", "not valid msgpack"),
        (lambda sealed: None, "not an envelope"),
    ],
)
def test_what_cannot_be_read_is_answered_by_the_task_s_id_and_not_run(
    bench: Bench, change: Callable[[bytes], object], reason: str
) -> None:
    bench.site().handle(change(bench.seal(bench.part(UpdateRoundStart))), "celery-id")
    answer = bench.answer()
    assert isinstance(answer, PartDeclined)
    assert (answer.job_id, answer.task_id) == ("", "celery-id")
    assert reason in answer.reason
    assert Recorder.calls == []


def test_a_message_for_another_site_or_by_another_key_is_not_run(bench: Bench) -> None:
    part = bench.part(UpdateRoundStart)
    bench.site().handle(bench.seal(part, recipient="beta"), "celery-id")
    assert "meant for 'beta'" in bench.answer().reason
    bench.site().handle(bench.seal(part, key=SigningKey.generate()), "celery-id")
    assert "is not signed" in bench.answer().reason
    assert Recorder.calls == []


def test_a_signed_kind_of_a_newer_version_is_answered(bench: Bench) -> None:
    class Teleport(Message):
        kind = "TELEPORT"  # type: ignore[assignment]  # not one of ours, which is the point

    class Kind(str):
        value = "TELEPORT"

    Teleport.kind = Kind("TELEPORT")
    bench.site().handle(bench.seal(Teleport(job_id="job")), "celery-id")
    assert "kind 'TELEPORT' is not known" in bench.answer().reason


def test_a_task_whose_id_no_coordinator_gives_is_only_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        bench.site().handle(b"", "../../etc/passwd")
    assert bench.sent == []
    assert "Declined an unreadable task" in caplog.text


# --- the end of a job -------------------------------------------------------------------------------------------------


def test_the_end_of_a_job_lets_the_trainer_finish_and_forgets_the_job(bench: Bench) -> None:
    site = bench.site()
    bench.ask(bench.part(UpdateRoundStart), site=site)
    folder = bench.folder / "state" / "jobs" / "job"
    assert (folder / "trainer" / "state").read_text() == "kept"
    finished = TrainingFinished(job_id="job", state="completed", model=bench.model(7.0))
    site.handle(bench.seal(finished), "celery-id")
    assert Recorder.calls == ["fit 1", "finish completed 7.0 True"]
    assert not folder.exists()
    assert len(bench.sent) == 1  # it is not answered
    site.handle(bench.seal(finished), "celery-id")  # it may come twice
    assert len(Recorder.calls) == 2


def test_the_end_of_a_job_forgets_receipts_that_no_message_can_ask_for(bench: Bench) -> None:
    site = bench.site()
    bench.ask(bench.part(UpdateRoundStart), site=site)
    (receipt,) = (bench.settings.site_folder / "receipts").iterdir()
    site.handle(bench.seal(TrainingFinished(job_id="job", state="completed")), "end")
    assert receipt.exists()
    os.utime(receipt, (0, 0))
    site.handle(bench.seal(TrainingFinished(job_id="job", state="completed")), "end")
    assert not receipt.exists()


def test_a_process_that_never_saw_the_job_can_finish_it(bench: Bench) -> None:
    keeps = bench.site()
    bench.ask(bench.part(UpdateRoundStart), site=keeps)
    bench.site().handle(bench.seal(ClientRemoved(job_id="job", reason="left")), "celery-id")
    assert Recorder.calls[-1] == "finish CLIENT_REMOVED None True"
    bench.ask(bench.part(ModelTestRound, job_id="other", task_id="b"), site=keeps)
    assert list(keeps._jobs._made) == ["other"]  # the first process has let go of it too


def test_a_trainer_that_fails_to_finish_does_not_keep_the_job(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    site = bench.site()
    bench.ask(bench.part(UpdateRoundStart, config={"behaviour": "finish"}), site=site)
    site.handle(bench.seal(TrainingFinished(job_id="job", state="failed")), "celery-id")
    assert "The trainer did not finish." in caplog.text
    assert not (bench.folder / "state" / "jobs" / "job").exists()


# --- the site's folders -----------------------------------------------------------------------------------------------


def test_a_start_removes_what_dead_processes_and_old_jobs_left(bench: Bench) -> None:
    state = bench.folder / "state"
    (state / "scratch" / "999999999").mkdir()
    (state / "scratch" / str(os.getpid())).mkdir()
    bench.ask(bench.part(TrainingStart, job_id="old"))
    bench.ask(bench.part(TrainingStart, job_id="new", task_id="b"))
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(state / "jobs" / "old" / "job.json", (long_ago, long_ago))
    prepare_site(bench.settings)
    assert [folder.name for folder in (state / "scratch").iterdir()] == [str(os.getpid())]
    assert [folder.name for folder in (state / "jobs").iterdir()] == ["new"]


@pytest.mark.parametrize(("days", "kept"), [(0.9, ["fetched", "outgoing"]), (1.1, ["outgoing"]), (7.1, [])])
def test_what_was_fetched_is_kept_for_a_day_and_what_was_trained_for_as_long_as_a_message_may_ask(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, days: float, kept: list[str]
) -> None:
    state = bench.folder / "state"
    for folder in ("fetched", "outgoing"):
        (state / folder / "left@0").touch()
    now = time.time() + days * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: now)
    prepare_site(bench.settings)
    left = [path for folder in ("fetched", "outgoing") for path in (state / folder).iterdir()]
    assert [path.parent.name for path in left] == kept
    for path in left:
        path.unlink()
