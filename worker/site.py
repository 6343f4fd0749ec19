"""Answer the coordinator's messages: check, train, upload, tell. The round is never left guessing."""

import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from pydantic import ValidationError

from common.errors import Declined, FedChordError, InvalidInput, InvalidMessage, InvalidTensors
from common.messages import (
    COORDINATOR,
    MAX_METRIC_CHARACTERS,
    MAX_METRICS,
    SITE_MESSAGES,
    ClientRemoved,
    Envelope,
    Message,
    ModelReference,
    ModelTestRound,
    PartDeclined,
    Shard,
    SwagRoundStart,
    TrainingFinished,
    TrainingStart,
    UpdateReady,
    UpdateRoundStart,
)
from common.settings import Settings
from common.signing import SigningKey
from store.blobs import Blob
from store.tensors import read_tensors
from store.transfer import Transfer
from store.weights import write_weights
from worker.jobs import Jobs, Part, prepare_jobs
from worker.progress import Progress
from worker.receipts import Receipts, forget_old_receipts, prepare_receipts
from worker.scratch import prepare_scratch, scratch_folder
from worker.trainer import Fit, RoundContext, Tensors, check_tensors, derive_seed
from worker.trainers import Trainers

logger = logging.getLogger(__name__)

_SCRATCH, _RECEIPTS, _JOBS = "scratch", "receipts", "jobs"  # folders in the site's folder
_MAX_REPEATS = 2  # a part whose process ended before it could answer is tried again so often
_REASON_CHARACTERS = 2000  # what PartDeclined takes


def prepare_site(settings: Settings) -> None:
    """Make the site's folders and remove what is long out of use; before any process takes a message."""
    prepare_scratch(settings.site_folder / _SCRATCH)
    prepare_receipts(settings.site_folder / _RECEIPTS)
    prepare_jobs(settings.site_folder / _JOBS)


class Site:
    """One site, in one of its processes."""

    def __init__(
        self,
        *,
        settings: Settings,
        key: SigningKey,  # the site's own
        transfer: Transfer,
        trainers: Trainers,
        send: Callable[[bytes], None],  # publishes a sealed answer
        is_cancelled: Callable[[str], bool],  # whether the coordinator wants nothing more for the job
    ) -> None:
        self._name = settings.site_name
        self._coordinator_key = settings.coordinator_public_key
        self._key = key
        self._transfer = transfer
        self._send = send
        self._is_cancelled = is_cancelled
        self._scratch = settings.site_folder / _SCRATCH
        self._receipts = Receipts(settings.site_folder / _RECEIPTS)
        self._jobs = Jobs(
            site=settings.site_name,
            data=settings.site_data,
            folder=settings.site_folder / _JOBS,
            trainers=trainers,
        )

    def handle(self, envelope: object, task_id: str, *, redelivered: bool = False) -> None:
        """Take one message, as it came from the queue, and answer it if its kind asks for an answer.

        `redelivered` tells that the broker hands the message out again, because a process that had it has ended.
        """
        try:
            message = self._open(envelope)
        except InvalidMessage as error:
            self.decline_unread(task_id, error.message)
            return
        match message:
            case TrainingStart() | UpdateRoundStart() | ModelTestRound() | SwagRoundStart():
                self._take(message, redelivered)
            case TrainingFinished():
                self._end(message, message.model, message.state)
            case ClientRemoved():
                self._end(message, None, message.kind.value)

    def decline_unread(self, task_id: str, reason: str) -> None:
        """Tell the coordinator that a task could not be read, by the only name there is for it."""
        logger.warning("Declined an unreadable task: %s", reason, extra={"action": "decline_part", "task": task_id})
        try:
            answer = PartDeclined(task_id=task_id, reason=reason[:_REASON_CHARACTERS])
        except ValidationError:  # a name that no coordinator gives: there is nobody to tell
            return
        self._send(self._seal(answer))

    def _open(self, envelope: object) -> Message:
        return Envelope.read(envelope).open(SITE_MESSAGES, recipient=self._name, public_key=self._coordinator_key)

    def _seal(self, answer: Message) -> bytes:
        return Envelope.seal(answer, sender=self._name, recipient=COORDINATOR, key=self._key)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _take(self, part: Part, redelivered: bool) -> None:
        """Do the part and answer it, or give the answer that was given before."""
        extra = {"job": part.job_id, "round": part.round, "task": part.task_id, "attempt": part.attempt}
        if (given := self._receipts.find(part.task_id, part.attempt)) is not None:
            logger.info("The part came again: sent the same answer.", extra={"action": "repeat_answer", **extra})
            self._send(given)
            return
        answer: UpdateReady | PartDeclined
        try:
            answer = self._do(part, redelivered)
            logger.info("Did the part in %.3f s.", answer.seconds, extra={"action": "answer_part", **extra})
        except Declined as error:
            reason = _sendable(error.message)
            logger.info("Declined: %s", reason, extra={"action": "decline_part", **extra})
            answer = _decline(part, reason, failed=False)
        except FedChordError as error:
            reason = _sendable(error.message)
            logger.warning("The part failed: %s", reason, extra={"action": "fail_part", **extra})
            answer = _decline(part, reason, failed=True)
        except (Exception, SystemExit) as error:  # a trainer is other people's code, and the round must hear of it
            logger.exception("The part failed.", extra={"action": "fail_part", **extra})
            answer = _decline(part, _locate(error), failed=True)
        sealed = self._seal(answer)
        try:
            self._receipts.keep(part.task_id, part.attempt, sealed)
        except FedChordError as error:  # without a receipt the worst is that the part is done twice
            logger.warning("Kept no receipt: %s", error.message, extra={"action": "keep_receipt", **extra})
        self._send(sealed)

    def _do(self, part: Part, redelivered: bool) -> UpdateReady:
        """Train, build or test; raise Declined or any other error that says why it could not be."""
        begun = time.monotonic()
        progress = Progress(
            is_cancelled=lambda: self._is_cancelled(part.job_id),
            deadline_at=part.deadline_at,
            label=f"Round {part.round} of {part.job_name or part.job_id}",
        )
        progress.check()
        if redelivered and self._receipts.count_repeat(part.task_id, part.attempt) > _MAX_REPEATS:
            raise FedChordError(
                f"The site's process ended {_MAX_REPEATS + 1} times before the part was done, perhaps for want of "
                "memory; the site's own log may tell why."
            )
        trainer = self._jobs.trainer(part)

        def step() -> RoundContext:  # made when the model is here, since that takes of the time that is left
            return RoundContext(
                round=part.round,
                seed=derive_seed(part.seed, part.round, self._name),
                report=progress,
                seconds_left=part.deadline_at - time.time(),
            )

        with scratch_folder(self._scratch) as folder:
            match part:
                case TrainingStart():
                    tensors, num_examples = trainer.begin_job(step(), build=part.build_model)
                    metrics: dict[str, float] = {}
                case ModelTestRound():
                    evaluation = trainer.evaluate(self._fetch(part.model, folder), step())
                    tensors, num_examples, metrics = None, evaluation.num_examples, dict(evaluation.metrics)
                case UpdateRoundStart() | SwagRoundStart():
                    work = trainer.fit if isinstance(part, UpdateRoundStart) else trainer.moments
                    fit: Fit = work(self._fetch(part.model, folder), step())
                    tensors, num_examples, metrics = fit.tensors, fit.num_examples, dict(fit.metrics)
            progress.check()
            shards = () if isinstance(part, ModelTestRound) or tensors is None else self._upload(part, tensors, folder)
        return UpdateReady(
            job_id=part.job_id,
            job_name=part.job_name,
            round=part.round,
            task_id=part.task_id,
            attempt=part.attempt,
            num_examples=_count(num_examples),
            metrics=_clean(metrics),
            shards=shards,
            seconds=round(time.monotonic() - begun, 6),
        )

    def _fetch(self, model: ModelReference, folder: Path) -> dict[str, npt.NDArray[Any]]:
        """Return the model's tensors, each shard verified; they are private to this part."""
        tensors: dict[str, npt.NDArray[Any]] = {}
        for shard in model.shards:
            path = self._transfer.fetch(shard.url, Blob(digest=shard.digest, size=shard.size), folder)
            for name, tensor in read_tensors(path).items():
                if name in tensors:
                    raise InvalidTensors(f"Tensor {name!r} is in two shards of model {model.model_id}; store it again.")
                tensors[name] = tensor
        return tensors

    def _upload(
        self, part: TrainingStart | UpdateRoundStart | SwagRoundStart, tensors: Tensors, folder: Path
    ) -> tuple[Shard, ...]:
        """Write the tensors as shards and send each to its own reference."""
        written = write_weights(folder, check_tensors(tensors), part.shard_bytes)
        if len(written) > len(part.upload_urls):
            raise Declined(
                f"The update has {len(written)} shards but may have {len(part.upload_urls)}; send a model as large as "
                "the one received, or raise initial_shards at the coordinator for a first model."
            )
        for (path, _), url in zip(written, part.upload_urls, strict=False):
            self._transfer.upload(path, url)
        return tuple(Shard(digest=blob.digest, size=blob.size) for _, blob in written)

    # --- the end of a job ----------------------------------------------------------------------------------------

    def _end(self, message: Message, model: ModelReference | None, state: str) -> None:
        """Let the trainer finish and forget the job; nobody waits for an answer."""
        extra = {"job": message.job_id, "state": state}
        try:
            if (trainer := self._jobs.recall(message.job_id)) is not None:
                with scratch_folder(self._scratch) as folder:
                    trainer.finish(self._fetch(model, folder) if model else None, state)
        except (Exception, SystemExit):  # a trainer is other people's code; the job is over all the same
            logger.exception("The trainer did not finish.", extra={"action": "finish_job", **extra})
        self._jobs.forget(message.job_id)
        forget_old_receipts(self._receipts.folder)
        logger.info("The job has ended for this site.", extra={"action": "finish_job", **extra})


def _decline(part: Part, reason: str, *, failed: bool) -> PartDeclined:
    return PartDeclined(
        job_id=part.job_id,
        job_name=part.job_name,
        task_id=part.task_id,
        attempt=part.attempt,
        failed=failed,
        reason=reason[:_REASON_CHARACTERS],
    )


def _sendable(text: str) -> str:
    """Return the text without halves of characters, which a trainer's words may have and nothing can send."""
    return text.encode("utf-8", "replace").decode()


def _locate(error: BaseException) -> str:
    """Say what went wrong and where, but not with which values: an exception's own words may quote the site's data."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "-packages" not in frame.filename] or frames
    return (
        f"{type(error).__name__}: in {own[-1].name}, {Path(own[-1].filename).name} line {own[-1].lineno}; "
        "the site's own log has the details."
    )


def _count(num_examples: object) -> int:
    try:
        count = int(num_examples)  # type: ignore[call-overload]  # whatever the trainer gave: numpy integers are welcome
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput("The trainer's num_examples is not a number; correct the trainer.") from error
    if not 0 <= count < 2**63:  # what a message holds
        raise InvalidInput(f"The trainer's num_examples is {count}; correct the trainer.")
    return int(count)


def _clean(metrics: Mapping[str, object]) -> dict[str, float | None]:
    """Return the metrics as plain numbers; None stands for one that is not finite."""
    cleaned: dict[str, float | None] = {}
    if len(metrics) > MAX_METRICS:
        raise InvalidInput(f"The trainer gives {len(metrics)} metrics; correct it to give {MAX_METRICS} at most.")
    for name, value in metrics.items():
        if len(str(name)) > MAX_METRIC_CHARACTERS:
            raise InvalidInput(
                f"The trainer's metric {str(name)[:80]!r}… has a name of {len(str(name))} characters; correct the "
                f"trainer to use {MAX_METRIC_CHARACTERS} at most."
            )
        try:
            number = float(value)  # type: ignore[arg-type]  # whatever the trainer gave: numpy and torch scalars are welcome
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidInput(
                f"The trainer's metric {str(name)[:80]!r} is not a number; correct the trainer."
            ) from error
        cleaned[str(name)] = number if math.isfinite(number) else None
    return cleaned
