"""Put messages on the sites' queues: a round's as one chord, a notice by itself.

Everything that is sent is rebuilt from the records, so sending can be repeated by any process at any time.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import group
from celery.app.task import Context
from celery.canvas import Signature
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from common.errors import BrokerUnavailable, NotFound
from common.messages import (
    COORDINATOR,
    ClientRemoved,
    Envelope,
    Message,
    ModelReference,
    ModelTestRound,
    SourceShard,
    SwagRoundStart,
    TrainingFinished,
    TrainingStart,
    UpdateRoundStart,
)
from common.queues import COORDINATOR_QUEUE, SITE_TASKS, CoordinatorTask, Kind, site_queue
from coordinator.asked import builder
from coordinator.jobs import Job, get_job
from coordinator.model_weights import index_digest, model_weights
from coordinator.outbox import find_notices, mark_sent
from coordinator.parts import Part, find_parts, raise_attempt
from coordinator.planning import gives_up_at
from coordinator.rounds import Round, body_task_id, get_round, mark_published
from coordinator.services import Services
from coordinator.states import MESSAGE_KINDS, RoundKind, RoundState
from store.database import reading, writing
from store.index import plan_shards
from store.models import ModelInfo, get_model
from store.tables import utc_now

logger = logging.getLogger(__name__)

_SLACK_SECONDS = 600  # references, and a hung trainer's process, outlive the deadline by this, for clocks that differ


@contextmanager
def _sending(what: str) -> Iterator[None]:
    """Turn what Celery and the broker's client raise into BrokerUnavailable."""
    try:
        yield
    except (KombuError, RedisError) as error:
        raise BrokerUnavailable(f"{what} cannot be sent: {error}; start the broker.") from error


def publish_round(services: Services, round_id: str) -> None:
    """Send the round's chord: one task for each site, and the callback.

    Raise BrokerUnavailable when it cannot be sent; the sweeper does it again.
    """
    round_, signatures = _signatures(services, round_id)
    if round_.state is not RoundState.OPEN:
        return
    header = group(list(signatures.values()), app=services.app)
    # a group with the option `chord` is what `chord()` sends; only so it takes a producer, and one write for all
    with (
        _sending(f"Round {round_id}"),
        services.app.producer_or_acquire(None) as producer,
        producer.batch(),
    ):
        header.apply_async(task_id=round_id, chord=_callback(services, round_id), producer=producer)
    with writing(services.engine) as connection:
        mark_published(connection, round_id)
    logger.info(
        "Sent %s of job %s to %s sites.",
        round_.title,
        round_.job_id,
        len(signatures),
        extra={"action": "publish_round", "job": round_.job_id, "round": round_id},
    )


def publish_again(services: Services, part: Part) -> None:
    """Send one part's message again, to a site whose answer, or whose question, seems to be lost.

    A site that has answered keeps a receipt and sends the same answer, so nothing is done twice. Each time has a higher
    attempt: should somebody after all be at work on an earlier one, the two do not write to the same places.
    """
    with writing(services.engine) as connection:
        if not raise_attempt(connection, part):
            return
    _, signatures = _signatures(services, part.round_id, only=part.site)
    with _sending(f"Part {part.task_id}"):
        signatures[part.site].apply_async()


def complete_part(services: Services, round_id: str, part: Part) -> None:
    """Complete the part in the chord on the site's behalf; the last one fires the callback. Can be repeated."""
    request = Context(
        id=part.task_id,
        group=round_id,
        group_index=part.position,
        chord=_callback(services, round_id),
        task="site.part",
        args=[],
        kwargs={},
        delivery_info={},
    )
    with _sending(f"The callback of round {round_id}"):
        services.app.backend.mark_as_done(part.task_id, part.position, request=request, store_result=False)


def call_back(services: Services, round_id: str) -> None:
    """Send the callback without the chord, for when its counters are lost."""
    with _sending(f"The callback of round {round_id}"):
        _callback(services, round_id).apply_async(args=([],))


def send_notices(services: Services, *, grace_seconds: float = 0) -> None:
    """Send what has been in the outbox for so many seconds; a message may go out twice, never not at all."""
    with reading(services.engine) as connection:
        notices = find_notices(connection, grace_seconds=grace_seconds)
    for notice in notices:
        with reading(services.engine) as connection:
            job = get_job(connection, notice.job_id)
        message: Message
        if notice.kind is Kind.CLIENT_REMOVED:
            message = ClientRemoved(job_id=job.job_id, job_name=job.name, reason=notice.reason)
        else:
            message = TrainingFinished(
                job_id=job.job_id,
                job_name=job.name,
                state=job.state.value,
                reason=notice.reason,
                model=_final_model(services, job),
            )
        title = f"{job.name}: {notice.kind.value.lower().replace('_', ' ')}"
        task_id = f"{job.job_id}.{message.kind.lower()}.{notice.site}"
        with _sending(f"Notice {task_id}"):
            _signature(services, notice.site, message, task_id, title).apply_async()
        with writing(services.engine) as connection:
            mark_sent(connection, notice)


def _signatures(
    services: Services, round_id: str, *, only: str | None = None
) -> tuple[Round, dict[str, Signature[Any]]]:
    """Return the round, and its messages by site."""
    with reading(services.engine) as connection:
        round_ = get_round(connection, round_id)
        job = get_job(connection, round_.job_id)
        parts = find_parts(connection, round_id)
        model = get_model(connection, round_.input_model_id) if round_.input_model_id is not None else None
    seconds_left = _seconds_left(job, round_)
    seconds = int(seconds_left) + _SLACK_SECONDS
    deadline_at = _broker_time(services) + seconds_left
    reference = _reference(services, model, seconds) if model is not None else None
    num_shards = _count_shards(services, model) if model is not None and round_.kind is RoundKind.TRAIN else 0
    builds = builder(round_, parts)
    return round_, {
        part.site: _part_signature(
            services,
            job,
            round_,
            part,
            reference,
            seconds,
            deadline_at=deadline_at,
            builds=part.site == builds,
            num_shards=num_shards,
        )
        for part in parts
        if only is None or part.site == only
    }


def _count_shards(services: Services, model: ModelInfo) -> int:
    """Return how many shards a site's update has; a model that was put is one file, however large."""
    return len(plan_shards(model_weights(services.blobs, model).schema, services.settings.shard_bytes))


def _part_signature(
    services: Services,
    job: Job,
    round_: Round,
    part: Part,
    model: ModelReference | None,
    seconds: int,
    *,
    deadline_at: float,
    builds: bool,
    num_shards: int,
) -> Signature[Any]:
    common: dict[str, Any] = {
        "job_id": job.job_id,
        "job_name": job.name,
        "round": round_.number,
        "task_id": part.task_id,
        "attempt": part.attempt,
        "deadline_at": deadline_at,
        "trainer": job.spec.trainer,
        "config": {**job.spec.config, **job.spec.strategy.make().trainer_config()},
        "seed": job.spec.seed,
    }

    def uploads(count: int) -> dict[str, Any]:
        urls = (services.blobs.write_url(part.slot(shard), seconds=seconds) for shard in range(count))
        return {"shard_bytes": services.settings.shard_bytes, "upload_urls": tuple(urls)}

    message: Message
    if round_.kind is RoundKind.START:
        wanted = services.settings.initial_shards if builds else 0
        message = TrainingStart(**common, **uploads(wanted), build_model=builds)
    elif model is None:
        raise NotFound(f"Round {round_.round_id} has no model to send.")
    elif round_.kind is RoundKind.TRAIN:
        message = UpdateRoundStart(**common, **uploads(num_shards), model=model)
    elif round_.kind is RoundKind.TEST:
        message = ModelTestRound(**common, model=model)
    else:
        # two moments in float32 for each tensor: at most eight times the bytes (from 8 bits), and a shard's slack
        total = 8 * sum(shard.size for shard in model.shards)
        message = SwagRoundStart(**common, **uploads(2 + 2 * total // services.settings.shard_bytes), model=model)
    assert message.kind is MESSAGE_KINDS[round_.kind]
    title = f"{job.name}: {round_.title} at {part.site}"
    return _signature(services, part.site, message, part.task_id, title, time_limit=seconds)


def _signature(
    services: Services, site: str, message: Message, task_id: str, title: str, **options: Any
) -> Signature[Any]:
    envelope = Envelope.seal(message, sender=COORDINATOR, recipient=site, key=services.key)
    return services.app.signature(
        SITE_TASKS[Kind(message.kind)],
        args=[envelope],
        options={
            "task_id": task_id,
            "queue": site_queue(site),
            "argsrepr": title,
            "ignore_result": True,
            "declare": [],
            **options,
        },
    )


def _callback(services: Services, round_id: str) -> Signature[Any]:
    return services.app.signature(
        CoordinatorTask.AGGREGATE.value,  # a StrEnum has a `name`, which Celery takes for a task
        kwargs={"round_id": round_id},
        options={
            "task_id": body_task_id(round_id),
            "queue": COORDINATOR_QUEUE,
            "argsrepr": round_id,
            "ignore_result": True,
            "declare": [],  # a queue needs no declaration: its consumer makes it, and Redis keeps it meanwhile
        },
    )


def _reference(services: Services, model: ModelInfo, seconds: int) -> ModelReference:
    return ModelReference(
        model_id=model.model_id,
        digest=index_digest(model),
        shards=tuple(
            SourceShard(digest=shard.digest, size=shard.size, url=services.blobs.read_url(shard, seconds=seconds))
            for shard in model.shards
        ),
    )


def _final_model(services: Services, job: Job) -> ModelReference | None:
    """Return the model that the job leaves; None if there is none, or somebody has deleted it since."""
    if job.model_id is None:
        return None
    try:
        with reading(services.engine) as connection:
            model = get_model(connection, job.model_id)
        return _reference(services, model, services.settings.reference_seconds)
    except NotFound as error:
        logger.warning("The sites get no final model: %s", error, extra={"action": "send_notices", "job": job.job_id})
        return None


def _seconds_left(job: Job, round_: Round) -> float:
    """Return how long an answer to the round may still count, in seconds; `submit` bounds it by `reference_seconds`.

    Who is asked is waited for, so if there should be nothing left, or more than ever, the clock was set meanwhile.
    """
    left = (gives_up_at(job, round_) - utc_now()).total_seconds()
    longest = (gives_up_at(job, round_) - round_.created_at).total_seconds()
    return left if 0 < left <= longest else longest


def _broker_time(services: Services) -> float:
    """Return the broker's unix time, in seconds: the one clock that the coordinator and every site can read."""
    with _sending("A deadline by the broker's clock"):
        seconds, microseconds = services.broker.time()
    return float(seconds) + float(microseconds) / 1e6
