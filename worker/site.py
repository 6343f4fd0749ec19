"""Answer the coordinator's messages: check, train, upload, tell. The round is never left guessing."""

import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from pydantic import ValidationError

from common.errors import Declined, FedChordError, InvalidMessage, InvalidTensors
from common.messages import (
    ANSWERS,
    COORDINATOR,
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
from worker.answers import REASON_CHARACTERS, clean_metrics, count_examples, decline, locate, sendable
from worker.jobs import Jobs, Part, prepare_jobs
from worker.leases import Lease, Leases
from worker.outgoing import Outgoing
from worker.part_files import PartFiles
from worker.progress import Progress
from worker.receipts import KEEP_SECONDS, Receipts, forget_old_receipts, prepare_receipts
from worker.reports import Reports
from worker.scratch import prepare_scratch, scratch_folder
from worker.trainer import Fit, RoundContext, check_tensors, derive_seed
from worker.trainers import Trainers

logger = logging.getLogger(__name__)

# Folders in the site's folder, all on one disk.
_SCRATCH, _RECEIPTS, _JOBS, _LEASES, _FETCHED, _OUTGOING = (
    "scratch",
    "receipts",
    "jobs",
    "leases",
    "fetched",
    "outgoing",
)
_KEEP_FETCHED_SECONDS = 24 * 3600.0  # for a process that was killed to go on from
_TOLD_TO_END = -(256 - signal.SIGTERM)  # the code with which the pool's processes end when they are told to
_MAX_BEGINS = 3  # a part whose process ended before it could answer is begun so often

_Upload = TrainingStart | UpdateRoundStart | SwagRoundStart  # parts of which tensors may come


def prepare_site(settings: Settings) -> None:
    """Make the site's folders and remove what is long out of use; before any process takes a message."""
    prepare_scratch(settings.site_folder / _SCRATCH)
    prepare_receipts(settings.site_folder / _RECEIPTS)
    prepare_jobs(settings.site_folder / _JOBS)
    Leases(settings.site_folder / _LEASES).prepare()
    _fetched(settings).prepare()
    _outgoing(settings).prepare()


def _fetched(settings: Settings) -> PartFiles:
    """Return what has come of the models of the parts at work."""
    return PartFiles(settings.site_folder / _FETCHED, keep_seconds=_KEEP_FETCHED_SECONDS)


def _outgoing(settings: Settings) -> Outgoing:
    return Outgoing(settings.site_folder / _OUTGOING, keep_seconds=KEEP_SECONDS)


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
        reports: Reports,
    ) -> None:
        self._name = settings.site_name
        self._coordinator_key = settings.coordinator_public_key
        self._key = key
        self._transfer = transfer
        self._send = send
        self._reports = reports
        self._tell_seconds = settings.heartbeat_seconds
        self._scratch = settings.site_folder / _SCRATCH
        self._receipts = Receipts(settings.site_folder / _RECEIPTS)
        self._leases = Leases(settings.site_folder / _LEASES)
        self._fetched = _fetched(settings)
        self._outgoing = _outgoing(settings)
        self._jobs = Jobs(
            site=settings.site_name,
            data=settings.site_data,
            folder=settings.site_folder / _JOBS,
            trainers=trainers,
        )

    def handle(self, envelope: object, task_id: str) -> None:
        """Take one message, as it came from the queue, and answer it if its kind asks for an answer."""
        try:
            message = self._open(envelope)
        except InvalidMessage as error:
            self.decline_unread(task_id, error.message)
            return
        match message:
            case TrainingStart() | UpdateRoundStart() | ModelTestRound() | SwagRoundStart():
                self._take(message)
            case TrainingFinished():
                self._end(message, message.model, message.state)
            case ClientRemoved():
                self._end(message, None, message.kind.value)

    def decline_unread(self, task_id: str, reason: str) -> None:
        """Tell the coordinator that a task could not be read, by the only name there is for it."""
        logger.warning("Declined an unreadable task: %s", reason, extra={"action": "decline_part", "task": task_id})
        try:
            answer = PartDeclined(task_id=task_id, reason=reason[:REASON_CHARACTERS])
        except ValidationError:  # a name that no coordinator gives: there is nobody to tell
            return
        self._send(self._seal(answer))

    def _open(self, envelope: object) -> Message:
        return Envelope.read(envelope).open(SITE_MESSAGES, recipient=self._name, public_key=self._coordinator_key)

    def _seal(self, answer: Message) -> bytes:
        return Envelope.seal(answer, sender=self._name, recipient=COORDINATOR, key=self._key)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _take(self, part: Part) -> None:
        """Do the part and answer it, or give the answer that was given before."""
        extra = {"job": part.job_id, "round": part.round, "task": part.task_id, "attempt": part.attempt}
        try:
            lease = self._leases.take(part.task_id)
        except FedChordError as error:
            logger.warning("The part failed: %s", error.message, extra={"action": "fail_part", **extra})
            self._send(self._seal(decline(part, sendable(error.message), failed=True)))
            return
        if lease is None:  # if that process ends without an answer, the coordinator asks again
            logger.info(
                "Another process has the part in hand; dropped a copy.", extra={"action": "part_in_hand", **extra}
            )
            return
        with lease:
            if (sealed := self._receipts.find(part.task_id)) is not None:
                logger.info("The part came again: sent the same answer.", extra={"action": "repeat_answer", **extra})
            else:
                sealed = self._answer(part, lease, extra)
            self._fetched.forget(part)
            self._send(sealed)
            self._reports.forget(part.task_id)

    def _answer(self, part: Part, lease: Lease, extra: Mapping[str, object]) -> bytes:
        """Return the sealed answer to the part, of which there is a receipt from here on."""
        answer: UpdateReady | PartDeclined
        begun = time.monotonic()
        sealed = None
        try:
            answer, sealed = self._do(part, lease)
            logger.info("Did the part in %.3f s.", time.monotonic() - begun, extra={"action": "answer_part", **extra})
        except Declined as error:
            reason = sendable(error.message)
            logger.info("Declined: %s", reason, extra={"action": "decline_part", **extra})
            answer = decline(part, reason, failed=False)
        except FedChordError as error:
            reason = sendable(error.message)
            logger.warning("The part failed: %s", reason, extra={"action": "fail_part", **extra})
            answer = decline(part, reason, failed=True)
        except (Exception, SystemExit) as error:  # a trainer is other people's code, and the round must hear of it
            if isinstance(error, SystemExit) and error.code == _TOLD_TO_END:  # the next process goes on
                raise
            logger.exception("The part failed.", extra={"action": "fail_part", **extra})
            answer = decline(part, locate(error), failed=True)
        if sealed is None:
            sealed = self._seal(answer)
        try:
            if sealed != lease.answer():
                lease.keep_answer(sealed)
            lease.hand_over(self._receipts.path(part.task_id))
        except FedChordError as error:  # the update stays instead, and a copy of the message finds it
            logger.warning("Kept no receipt: %s", error.message, extra={"action": "keep_receipt", **extra})
            if isinstance(answer, UpdateReady):
                return sealed
        self._outgoing.forget(part)
        return sealed

    def _do(self, part: Part, lease: Lease) -> tuple[UpdateReady, bytes]:
        """Train, build or test, and send what came of it; return the answer, also sealed.

        Raise Declined or another error that says why not.
        """
        now, reason = self._reports.begin(part.job_id, part.task_id)
        progress = Progress(
            why_stop=lambda: self._reports.why_stop(part.job_id, part.task_id),
            tell=lambda fraction, text: self._reports.tell(part.task_id, fraction, text),
            tell_seconds=self._tell_seconds,
            seconds_left=part.deadline_at - now,
            label=f"Round {part.round} of {part.job_name or part.job_id}",
        )
        progress.begin(reason)
        found = self._find_outgoing(part, lease)
        if found is None:
            if lease.count_begin() > _MAX_BEGINS:
                raise FedChordError(
                    f"The site's process ended {_MAX_BEGINS} times before the part was done, perhaps for want of "
                    "memory; the site's own log may tell why."
                )
            found = self._work(part, lease, progress)
        answer, sealed = found
        if answer.shards and not isinstance(part, ModelTestRound):
            self._upload(part, answer.shards, progress)
        if answer.attempt != part.attempt:  # trained when the part was asked before
            answer = answer.model_copy(update={"attempt": part.attempt})
            sealed = self._seal(answer)
        return answer, sealed

    def _work(self, part: Part, lease: Lease, progress: Progress) -> tuple[UpdateReady, bytes]:
        """Do what is asked; if tensors come of it, they are kept to be sent, together with the sealed answer."""
        begun = time.monotonic()
        trainer = self._jobs.trainer(part)

        def step() -> RoundContext:  # made when the model is here, since that takes of the time that is left
            return RoundContext(
                round=part.round,
                seed=derive_seed(part.seed, part.round, self._name),
                report=progress,
                seconds_left=progress.seconds_left,
            )

        match part:
            case TrainingStart():
                tensors, num_examples = trainer.begin_job(step(), build=part.build_model)
                metrics: dict[str, float] = {}
            case ModelTestRound():
                evaluation = trainer.evaluate(self._fetch(part, part.model, progress), step())
                tensors, num_examples, metrics = None, evaluation.num_examples, dict(evaluation.metrics)
            case UpdateRoundStart() | SwagRoundStart():
                work = trainer.fit if isinstance(part, UpdateRoundStart) else trainer.moments
                fit: Fit = work(self._fetch(part, part.model, progress), step())
                tensors, num_examples, metrics = fit.tensors, fit.num_examples, dict(fit.metrics)
        progress.look()
        examples, cleaned = count_examples(num_examples), clean_metrics(metrics)

        def answer(shards: tuple[Shard, ...]) -> tuple[UpdateReady, bytes]:
            made = UpdateReady(
                job_id=part.job_id,
                job_name=part.job_name,
                round=part.round,
                task_id=part.task_id,
                attempt=part.attempt,
                num_examples=examples,
                metrics=cleaned,
                shards=shards,
                seconds=round(time.monotonic() - begun, 6),
            )
            return made, self._seal(made)

        if tensors is None or isinstance(part, ModelTestRound):
            return answer(())
        with scratch_folder(self._scratch) as folder:
            written = write_weights(folder, check_tensors(tensors), part.shard_bytes)
            _check_references(part, len(written))
            made, sealed = answer(tuple(Shard(digest=blob.digest, size=blob.size) for _, blob in written))
            self._outgoing.keep(part, [path for path, _ in written])
            lease.keep_answer(sealed)
        return made, sealed

    def _fetch(self, part: Part, model: ModelReference, progress: Progress) -> dict[str, npt.NDArray[Any]]:
        """Return the model's tensors for a part; what has come stays until the part is answered."""
        total, before = sum(shard.size for shard in model.shards), 0
        paths = []
        for shard in model.shards:
            watch = progress.watch(0.0, "fetching the model", before=before, total=total)
            blob = Blob(digest=shard.digest, size=shard.size)
            name = self._fetched.name(part, shard.digest)
            paths.append(self._transfer.fetch(shard.url, blob, self._fetched.folder, name=name, watch=watch))
            before += shard.size
        return _read_model(model, paths)

    def _find_outgoing(self, part: Part, lease: Lease) -> tuple[UpdateReady, bytes] | None:
        """Return the answer, also sealed, to the part whose update was trained before and is still to be sent."""
        if not (sealed := lease.answer()):
            return None
        extra = {"job": part.job_id, "task": part.task_id}
        try:
            envelope = Envelope.read(sealed)
            answer = envelope.open(ANSWERS, recipient=COORDINATOR, public_key=self._key.public_key)
        except InvalidMessage as error:
            logger.warning("An update cannot be sent on: %s", error.message, extra={"action": "find_outgoing", **extra})
            return None
        if not isinstance(answer, UpdateReady):
            return None  # it was declined, and nobody was told
        if not self._outgoing.is_whole(part, answer.shards):
            logger.warning("An update that was to be sent is damaged.", extra={"action": "find_outgoing", **extra})
            return None
        logger.info("The update is trained already; sending goes on.", extra={"action": "resume_upload", **extra})
        return answer, sealed

    def _upload(self, part: _Upload, shards: tuple[Shard, ...], progress: Progress) -> None:
        """Send each shard that this attempt has not sent yet to its own reference."""
        _check_references(part, len(shards))
        total, before = sum(shard.size for shard in shards), 0
        for position, (shard, url) in enumerate(zip(shards, part.upload_urls, strict=False)):
            if not self._outgoing.is_sent(part, position):
                watch = progress.watch(1.0, "sending the update", before=before, total=total)
                self._transfer.upload(self._outgoing.shard(part, position), url, watch=watch)
                if position < len(shards) - 1:  # after the last one comes the receipt
                    self._outgoing.note_sent(part, position)
            before += shard.size

    # --- the end of a job ----------------------------------------------------------------------------------------

    def _end(self, message: Message, model: ModelReference | None, state: str) -> None:
        """Let the trainer finish and forget the job; nobody waits for an answer."""
        extra = {"job": message.job_id, "state": state}
        try:
            if (trainer := self._jobs.recall(message.job_id)) is not None:
                with scratch_folder(self._scratch) as folder:
                    trainer.finish(self._fetch_final(model, folder) if model else None, state)
        except (Exception, SystemExit):  # a trainer is other people's code; the job is over all the same
            logger.exception("The trainer did not finish.", extra={"action": "finish_job", **extra})
        self._jobs.forget(message.job_id)
        for files in (self._fetched, self._outgoing, self._leases):
            files.forget_job(message.job_id)
            files.forget_old()
        forget_old_receipts(self._receipts.folder)
        logger.info("The job has ended for this site.", extra={"action": "finish_job", **extra})

    def _fetch_final(self, model: ModelReference, folder: Path) -> dict[str, npt.NDArray[Any]]:
        blobs = ((shard.url, Blob(digest=shard.digest, size=shard.size)) for shard in model.shards)
        return _read_model(model, [self._transfer.fetch(url, blob, folder) for url, blob in blobs])


def _read_model(model: ModelReference, paths: Sequence[Path]) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors in verified shards; they are private to whoever asks."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for path in paths:
        for name, tensor in read_tensors(path).items():
            if name in tensors:
                raise InvalidTensors(f"Tensor {name!r} is in two shards of model {model.model_id}; store it again.")
            tensors[name] = tensor
    return tensors


def _check_references(part: _Upload, num_shards: int) -> None:
    if num_shards > len(part.upload_urls):
        raise Declined(
            f"The update has {num_shards} shards but may have {len(part.upload_urls)}; send a model as large as "
            "the one received, or raise initial_shards at the coordinator for a first model."
        )
