"""The gate: whatever a site sends is believed only after it has passed here.

An answer counts once for each part, only from the part's own site, only while the round is open. An update must have
the names, shapes and dtypes of the global model, the digests it was announced with, and nothing but finite values. What
fails is quarantined: kept, with its reason, and counted as the site's answer.
"""

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import BinaryIO

import numpy as np
from sqlalchemy import Engine

from common.errors import InvalidInput, InvalidMessage, InvalidTensors, NotFound, Unavailable, UpdateRejected
from common.messages import ANSWERS, COORDINATOR, Envelope, PartDeclined, UpdateReady
from coordinator.dispatch import complete_part
from coordinator.jobs import Job
from coordinator.model_weights import index_digest
from coordinator.rounds import (
    Part,
    PartState,
    Round,
    RoundKind,
    RoundState,
    answer_part,
    builder,
    find_parts,
    get_asked,
)
from coordinator.services import Services
from store.blobs import Blob
from store.database import reading, writing
from store.index import Weights
from store.models import ModelInfo, ModelState, add_model, get_model, new_model_id
from store.tables import utc_now
from store.tensors import TensorLocation, TensorSpec, numpy_dtype, read_into
from store.weights import load_index, register_shards

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 10**12  # more is a mistake or a lie
_CHECK_ELEMENTS = 256 * 1024  # read and checked at a time


def receive_answer(services: Services, data: object) -> None:
    """Take a site's answer; what cannot be believed is logged and changes nothing."""
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
        return
    _take(services, asked.job, asked.round, asked.part, message)


def _take(services: Services, job: Job, round_: Round, part: Part, message: UpdateReady | PartDeclined) -> None:
    fields = {"job": job.job_id, "round": round_.round_id, "site": part.site}
    if part.state is not PartState.WAITING or round_.state is not RoundState.OPEN or message.attempt != part.attempt:
        logger.info("An answer came again or too late.", extra={"action": "late_answer", **fields})
        if round_.state is RoundState.OPEN and part.state is not PartState.WAITING:
            complete_part(services, round_.round_id, part)  # a crash may have kept the first one from doing so
        return
    if isinstance(message, PartDeclined):
        state = PartState.FAILED if message.failed else PartState.DECLINED
        with writing(services.engine) as connection:
            counted = answer_part(connection, part, state, reason=message.reason)
        logger.warning(
            "Site %s %s %s: %s", part.site, state, round_.title, message.reason, extra={"action": state, **fields}
        )
    else:
        counted = _take_result(services, job, round_, part, message)
    if counted:
        complete_part(services, round_.round_id, part)


def _take_result(services: Services, job: Job, round_: Round, part: Part, message: UpdateReady) -> bool:
    """Check what the site has sent and record the verdict; return whether this answer counts."""
    state, reason = PartState.ACCEPTED, ""
    update: ModelInfo | None = None
    try:
        _check_examples(message.num_examples)
        weights = _receive_update(services, round_, part, message)
        if weights is not None:
            update = _describe(job, round_, part, message, weights)
    except (UpdateRejected, InvalidTensors) as error:
        state, reason = PartState.QUARANTINED, error.message
    except Unavailable:
        raise  # it is tried again
    except Exception as error:  # other people's bytes: whatever they do here, the site has answered
        state, reason = PartState.QUARANTINED, f"The update could not be checked: {type(error).__name__}."
        logger.exception("The update of site %s could not be checked.", part.site, extra={"action": "check_failed"})
    if state is PartState.QUARANTINED:
        logger.warning(
            "The update of site %s in %s is quarantined: %s",
            part.site,
            round_.title,
            reason,
            extra={"action": "quarantine", "job": job.job_id, "round": round_.round_id, "site": part.site},
        )
    with writing(services.engine) as connection:
        counted = answer_part(
            connection,
            part,
            state,
            reason=reason,
            num_examples=min(max(message.num_examples, -1), MAX_EXAMPLES),
            metrics=message.metrics,
            shards=[shard.model_dump() for shard in message.shards],
            model_id=update.model_id if update else None,
        )
        if counted and update is not None:
            add_model(connection, update)
    return counted


def _receive_update(services: Services, round_: Round, part: Part, message: UpdateReady) -> Weights | None:
    """Return the update's weights, verified and stored by digest; None where the round asks for none."""
    if round_.kind is RoundKind.TEST or (round_.kind is RoundKind.START and not message.shards):
        return None
    if not message.shards:
        raise UpdateRejected("There is no update: the answer names no shard.")
    if round_.kind is RoundKind.START:
        with reading(services.engine) as connection:
            if part.site != builder(round_, find_parts(connection, round_.round_id)):
                raise UpdateRejected("The answer names an update, but the site was not asked for the first model.")
    shards = [Blob(digest=shard.digest, size=shard.size) for shard in message.shards]
    expected = _expected_schema(services, round_)
    most = services.settings.initial_shards if expected is None else len(expected)  # each holds a tensor at least
    if len(shards) > most:
        raise UpdateRejected(f"The update has {len(shards)} shards; there can be {most}.")
    if expected is not None:
        _check_size(shards, expected)
    for number, shard in enumerate(shards):
        services.blobs.accept(part.slot(number), shard)
    weights = register_shards(services.blobs, shards, look=check_values)
    if not weights.schema:
        raise UpdateRejected("The update holds no tensors.")
    if expected is not None:
        check_schema(weights.schema, expected)
    return weights


def _expected_schema(services: Services, round_: Round) -> Mapping[str, TensorSpec] | None:
    """Return what the update must look like; None for the first model, which nobody knows yet."""
    if round_.input_model_id is None:
        return None
    schema = load_index(services.blobs, _index_digest(services.engine, round_.input_model_id)).schema
    return moments_schema(schema) if round_.kind is RoundKind.SWAG else schema


@lru_cache(maxsize=64)  # a model never changes, and every update of a round is held against the same one
def _index_digest(engine: Engine, model_id: str) -> str:
    with reading(engine) as connection:
        return index_digest(get_model(connection, model_id))


def moments_schema(schema: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return what a SWAG answer holds for a model: both moments of every floating tensor, in float32."""
    floating = {
        name: TensorSpec(dtype="F32", shape=spec.shape)
        for name, spec in schema.items()
        if numpy_dtype(spec.dtype).kind not in "biuc"
    }
    return {f"{moment}/{name}": spec for moment in ("first", "second") for name, spec in floating.items()}


def _check_examples(num_examples: int) -> None:
    if not 0 < num_examples <= MAX_EXAMPLES:
        raise UpdateRejected(f"num_examples is {num_examples}; expected 1 to {MAX_EXAMPLES}.")


def _check_size(shards: list[Blob], expected: Mapping[str, TensorSpec]) -> None:
    """Refuse by its announced size what is too large to be the update, before a byte of it is read."""
    values = sum(spec.nbytes for spec in expected.values())
    headers = len(shards) * 4096 + sum(len(name.encode()) + 256 for name in expected)
    total = sum(shard.size for shard in shards)
    if total > values + headers:
        raise UpdateRejected(f"The update has {total} bytes; the global model has {values}.")


def check_schema(found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> None:
    """Raise UpdateRejected, naming the first difference, unless names, shapes and dtypes are as expected."""
    if missing := sorted(expected.keys() - found.keys()):
        raise UpdateRejected(f"Tensor {missing[0]!r} is missing ({len(missing)} are).")
    if extra := sorted(found.keys() - expected.keys()):
        raise UpdateRejected(f"Tensor {extra[0][:100]!r} is not in the global model ({len(extra)} are not).")
    for name, spec in expected.items():
        if found[name].shape != spec.shape:
            raise UpdateRejected(f"Tensor {name!r} has shape {found[name].shape}; expected {spec.shape}.")
        if found[name].dtype != spec.dtype:
            raise UpdateRejected(f"Tensor {name!r} has dtype {found[name].dtype}; expected {spec.dtype}.")


def check_values(file: BinaryIO, locations: Mapping[str, TensorLocation]) -> None:
    """Raise UpdateRejected, naming the first tensor, unless every floating value in the shard's file is finite."""
    for name, location in locations.items():
        dtype = numpy_dtype(location.spec.dtype)
        if dtype.kind in "biu":
            continue
        total = location.spec.num_elements
        buffer = np.empty(min(total, _CHECK_ELEMENTS), dtype)
        for start in range(0, total, _CHECK_ELEMENTS):
            block = buffer[: min(_CHECK_ELEMENTS, total - start)]
            read_into(file, location.begin + start * dtype.itemsize, block.view(np.uint8).data)
            if not np.isfinite(block).all():
                first = start + int(np.flatnonzero(~np.isfinite(block))[0])
                value = "NaN" if np.isnan(block[first - start]) else "infinite"
                raise UpdateRejected(f"Tensor {name!r} is not finite: element {first} is {value}.")


def _describe(job: Job, round_: Round, part: Part, message: UpdateReady, weights: Weights) -> ModelInfo:
    kind = {RoundKind.START: "initial", RoundKind.SWAG: "moments"}.get(round_.kind, "update")
    return ModelInfo(
        model_id=new_model_id(),
        store=job.model_store,
        model_kind=kind,
        model_description=f"{job.name}: {kind} of {round_.title} from {part.site}",
        model_meta={"trainer": job.spec.trainer, "task_id": part.task_id},
        model_state=ModelState.FEEDBACKED,
        model_hash=weights.index.digest,
        index_hash=weights.index.digest,
        model_size=weights.size,
        round=round_.number,
        hop_count=1,
        start_datetime=round_.created_at,
        end_datetime=utc_now(),
        parents=(round_.input_model_id,) if round_.input_model_id else (),
        job_id=job.job_id,
        site=part.site,
        num_examples=message.num_examples,
        metrics=dict(message.metrics),
        shards=weights.shards,
    )
