"""The gate: whatever a site sends is believed only after it has passed here.

An answer counts once for each part, only from the part's own site, only while the round is open, or later if the job
lets late answers count. An update must have
the names, shapes and dtypes of the global model, the digests it was announced with, nothing but finite values, and a
distance from the global model and a number of examples that the job allows. What fails is quarantined: kept, with its
reason, and counted as the site's answer. Updates that stand out from the others are found when the round is settled.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from sqlalchemy import Connection

from common.errors import InvalidInput, InvalidMessage, InvalidTensors, NotFound, Unavailable, UpdateRejected
from common.messages import ANSWERS, COORDINATOR, Envelope, PartDeclined, UpdateReady
from coordinator.asked import builder, get_asked
from coordinator.dispatch import complete_part
from coordinator.expected import Expected, check_schema, expected_update
from coordinator.jobs import LIVE, Job
from coordinator.letting_go import follow_up, let_surplus_go
from coordinator.norms import Distance, Measure
from coordinator.parts import Part, answer_part, find_parts
from coordinator.quarantine import add_entry, find_bytes, keep_bytes
from coordinator.rounds import Round, find_open, lock_round
from coordinator.services import Services
from coordinator.states import PartState, RoundKind, RoundState
from store.blobs import Blob
from store.database import reading, writing
from store.index import Weights
from store.models import ModelInfo, ModelState, add_model, new_model_id
from store.tables import utc_now
from store.tensors import TensorLocation
from store.weights import register_shards

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 10**12  # more is a mistake or a lie, whatever a job allows


@dataclass(frozen=True, kw_only=True)
class Checked:
    """An update that is what it must be: verified, and stored by digest."""

    weights: Weights
    distance: Distance | None  # None for the first model


def receive_answer(services: Services, data: object) -> None:
    """Take a site's answer; what cannot be believed is logged and changes nothing."""
    while not _receive(services, data):
        logger.debug("A part changed while its answer was taken; looking again.", extra={"action": "look_again"})


def _receive(services: Services, data: object) -> bool:
    """Take the answer by what is recorded now; return False if that has changed meanwhile, which it does seldom."""
    try:
        envelope = Envelope.read(data)
        with reading(services.engine) as connection:
            asked = get_asked(connection, envelope.claimed_task_id())
        if asked.part.site != envelope.sender:
            raise InvalidMessage(f"Site {envelope.sender[:100]!r} answers for {asked.part.site}.")
        message = envelope.open(ANSWERS, recipient=COORDINATOR, public_key=asked.public_key)
        if not isinstance(message, UpdateReady | PartDeclined):
            raise InvalidMessage(f"{message.kind} is not an answer.")
    except (InvalidInput, NotFound) as error:  # InvalidInput: also a task id that the database cannot hold
        logger.warning("An answer is set aside: %s", error, extra={"action": "refuse_answer"})
        return True
    return _take(services, asked.job, asked.round, asked.part, message)


def _take(services: Services, job: Job, round_: Round, part: Part, message: UpdateReady | PartDeclined) -> bool:
    """Take the answer to the part; return False if the part is not any more what the caller knows."""
    fields = {"job": job.job_id, "round": round_.round_id, "site": part.site}
    if not _is_welcome(job, round_, part, message.attempt):
        logger.info("An answer came again or too late.", extra={"action": "late_answer", **fields})
        if round_.state is RoundState.OPEN and part.state is not PartState.WAITING:
            complete_part(services, round_.round_id, part)  # a crash may have kept the first one from doing so
        return True
    part = replace(part, attempt=message.attempt)  # whose slots hold the update
    if isinstance(message, PartDeclined):
        state = PartState.FAILED if message.failed else PartState.DECLINED
        if part.state is PartState.DROPPED:  # nobody waits for it
            return True
        counted = _record(services, job, round_, part, state, {"reason": message.reason})
        if counted:
            logger.warning(
                "Site %s %s %s: %s", part.site, state, round_.title, message.reason, extra={"action": state, **fields}
            )
    else:
        counted = _take_result(services, job, round_, part, message)
    if counted and part.state is PartState.WAITING:
        complete_part(services, round_.round_id, part)
    return counted


def _is_welcome(job: Job, round_: Round, part: Part, attempt: int) -> bool:
    """Return whether the part may still be answered, by the job's policy for late answers.

    Every attempt that was given out may answer, each with what it wrote to its own slots; the first that counts ends
    all others.
    """
    if not 1 <= attempt <= part.attempt or job.state not in LIVE:
        return False
    if part.state is PartState.LATE:
        return True
    if round_.state is not RoundState.OPEN:
        return False
    if part.state is PartState.DROPPED:
        return job.spec.late.policy != "drop" and part.site in job.sites
    return part.state is PartState.WAITING


def _record(
    services: Services,
    job: Job,
    round_: Round,
    part: Part,
    state: PartState,
    values: Mapping[str, Any],
    *,
    update: ModelInfo | None = None,
    found: Sequence[Blob | None] | None = None,
) -> bool:
    """Record the verdict on an answer with all that belongs to it; return whether it counts.

    `found` are the bytes of an update that is quarantined.
    """
    filled: Round | None = None
    left: tuple[Part, ...] = ()
    with writing(services.engine) as connection:
        if part.state is PartState.DROPPED and lock_round(connection, round_.round_id) is not RoundState.OPEN:
            return False
        if part.state is PartState.LATE and state is PartState.ACCEPTED:
            state = PartState.KEPT
        if job.target is not None and state in (PartState.ACCEPTED, PartState.KEPT):
            filled = _lock_training_round(connection, job, round_)
        if not answer_part(connection, part, state, expected=part.state, **values):
            return False
        if update is not None:
            add_model(connection, update)
        if found is not None:
            add_entry(connection, part, found)
        if filled is not None:
            left = let_surplus_go(connection, job, filled)
    if filled is not None and left:
        follow_up(services, job, filled, left)
    return True


def _lock_training_round(connection: Connection, job: Job, round_: Round) -> Round | None:
    """Keep others from answering the training round that an answer counts in now; None if there is none."""
    if round_.kind is not RoundKind.TRAIN:
        return None
    for found in find_open(connection, job_id=job.job_id, kind=RoundKind.TRAIN):
        if lock_round(connection, found.round_id) is RoundState.OPEN:
            return found
    return None


def _take_result(services: Services, job: Job, round_: Round, part: Part, message: UpdateReady) -> bool:
    """Check what the site has sent and record the verdict; return whether this answer counts."""
    shards = [Blob(digest=shard.digest, size=shard.size) for shard in message.shards]
    expected = Expected()
    checked: Checked | None = None
    reason = ""
    try:
        expected = expected_update(services, round_)
        _check_names(round_, message)
        check_examples(message.num_examples, job.spec.gate.max_examples)
        checked = _receive_update(services, round_, part, shards, expected)
        if checked is not None:
            _judge(job, round_, checked)
    except (UpdateRejected, InvalidTensors) as error:
        reason = error.message
    except Unavailable:
        raise  # it is tried again
    except Exception as error:  # other people's bytes: whatever they do here, the site has answered
        reason = f"The update could not be checked: {type(error).__name__}."
        logger.exception("The update of site %s could not be checked.", part.site, extra={"action": "check_failed"})
    distance = checked.distance if checked is not None else None
    values: dict[str, Any] = {
        "reason": reason,
        "num_examples": min(max(message.num_examples, -1), MAX_EXAMPLES + 1),  # as a number that the records hold
        "metrics": message.metrics,
        "shards": [shard.model_dump() for shard in message.shards],
        "update_norm": distance.update_norm if distance else None,
        "global_norm": distance.global_norm if distance else None,
    }
    if reason:
        return _quarantine(services, job, round_, part, find_bytes(services, part, shards, expected), values)
    update = None
    if checked is not None:
        update = describe_update(job, round_, part, checked, message.num_examples, message.metrics)
        values["model_id"] = update.model_id
    return _record(services, job, round_, part, PartState.ACCEPTED, values, update=update)


def _quarantine(
    services: Services,
    job: Job,
    round_: Round,
    part: Part,
    found: Sequence[Blob | None],
    values: Mapping[str, Any],
) -> bool:
    """Record that the answer is refused, then keep its bytes; the sweeper does so if this process ends in between."""
    counted = _record(services, job, round_, part, PartState.QUARANTINED, values, found=found)
    if counted:
        logger.warning(
            "The update of site %s in %s is quarantined: %s",
            part.site,
            round_.title,
            values["reason"],
            extra={"action": "quarantine", "job": part.job_id, "round": part.round_id, "site": part.site},
        )
        keep_bytes(services, part, found)
    return counted


def asks_for_update(services: Services, round_: Round, part: Part, shards: Sequence[Blob]) -> bool:
    """Return whether the answer must hold an update; raise UpdateRejected if it has none, or one too many."""
    if round_.kind is RoundKind.TEST or (round_.kind is RoundKind.START and not shards):
        return False
    if not shards:
        raise UpdateRejected("There is no update: the answer names no shard.")
    if round_.kind is RoundKind.START:
        with reading(services.engine) as connection:
            if part.site != builder(round_, find_parts(connection, round_.round_id)):
                raise UpdateRejected("The answer names an update, but the site was not asked for the first model.")
    return True


def _receive_update(
    services: Services, round_: Round, part: Part, shards: Sequence[Blob], expected: Expected
) -> Checked | None:
    if not asks_for_update(services, round_, part, shards):
        return None
    expected.check_size(shards)
    for number, shard in enumerate(shards):
        services.blobs.accept(part.slot(number), shard)
    return check_stored(services, shards, expected)


def check_stored(services: Services, shards: Sequence[Blob], expected: Expected) -> Checked:
    """Return the update in the stored shards; raise UpdateRejected or InvalidTensors if it can never be aggregated."""
    with ExitStack() as stack:
        reference = expected.reference(services)
        measure = Measure(stack.enter_context(reference) if reference is not None else None)
        weights = register_shards(services.blobs, shards, look=measure.look)
    if not weights.schema:
        raise UpdateRejected("The update holds no tensors.")
    if expected.schema is None:
        return Checked(weights=weights, distance=None)
    check_schema(weights.schema, expected.schema)
    return Checked(weights=weights, distance=measure.distance())


def _check_names(round_: Round, message: UpdateReady) -> None:
    """Refuse an answer that says of itself that it is for another job or round than its task is part of."""
    if message.job_id != round_.job_id or message.round != round_.number:
        raise UpdateRejected(
            f"The answer is for round {message.round} of job {message.job_id}, its task for round {round_.number} of "
            f"job {round_.job_id}."
        )


def check_examples(num_examples: int, most: int = MAX_EXAMPLES) -> None:
    """Raise UpdateRejected unless the number can be an update's weight."""
    if not 0 < num_examples <= most:
        raise UpdateRejected(f"num_examples is {num_examples}; expected 1 to {most}.")


def _judge(job: Job, round_: Round, checked: Checked) -> None:
    """Refuse what could be aggregated and probably should not be; a person can overrule it."""
    distance, most = checked.distance, job.spec.gate.max_norm
    if distance is None or round_.kind is not RoundKind.TRAIN:
        return
    if distance.is_zero and distance.global_norm > 0:
        raise UpdateRejected("Every value of the update is zero, and the global model's are not.")
    if most is not None and distance.update_norm > most:
        raise UpdateRejected(
            f"The update is {distance.update_norm:.6g} away from the global model; [gate] max_norm is {most:g}."
        )


def check_values(file: BinaryIO, locations: Mapping[str, TensorLocation]) -> None:
    """Raise UpdateRejected, naming the first tensor, unless every floating value in the shard's file is finite."""
    Measure().look(file, locations)


def describe_update(
    job: Job,
    round_: Round,
    part: Part,
    checked: Checked,
    num_examples: int,
    metrics: Mapping[str, float | None],
) -> ModelInfo:
    """Return the record of an update; its distance is among its metrics, 0 for one that changes nothing."""
    kind = {RoundKind.START: "initial", RoundKind.SWAG: "moments"}.get(round_.kind, "update")
    distance = {"update_norm": checked.distance.update_norm} if checked.distance is not None else {}
    return ModelInfo(
        model_id=new_model_id(),
        store=job.model_store,
        model_kind=kind,
        model_description=f"{job.name}: {kind} of {round_.title} from {part.site}",
        model_meta={"trainer": job.spec.trainer, "task_id": part.task_id},
        model_state=ModelState.FEEDBACKED,
        model_hash=checked.weights.index.digest,
        index_hash=checked.weights.index.digest,
        model_size=checked.weights.size,
        round=round_.number,
        hop_count=1,
        start_datetime=round_.created_at,
        end_datetime=utc_now(),
        parents=(round_.input_model_id,) if round_.input_model_id else (),
        job_id=job.job_id,
        site=part.site,
        num_examples=num_examples,
        metrics={**metrics, **distance},
        shards=checked.weights.shards,
    )
