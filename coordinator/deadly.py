"""Messages that end their worker: count them, and stop handling them.

Nobody lives to tell that a message has ended the process, for want of memory perhaps. But a message that was taken and
not finished comes again, marked as such. Only then is it counted, in the broker, when its handling begins, and
forgotten when its handling ends, however it ends. What is counted is the content, so that the same answer, sent again
by its site, is still the same.
"""

import hashlib
import logging
from typing import Any

import msgpack
from redis import Redis
from redis.exceptions import RedisError

from common.dead_letters import set_aside
from common.errors import InvalidInput, NotFound
from common.messages import ANSWERS, COORDINATOR, Envelope
from common.queues import COORDINATOR_QUEUE
from coordinator.asked import get_asked
from coordinator.dispatch import complete_part
from coordinator.parts import answer_part
from coordinator.services import Services
from coordinator.states import PartState
from store.database import reading, writing

logger = logging.getLogger(__name__)

MAX_BEGUN = 3  # beginnings without an end after which a message is set aside
GIVE_UP_AFTER = 6  # and so many, with those of the same answer sent again, after which its part has failed

_KEEP_SECONDS = 24 * 3600


def content_of(task_name: str, arguments: Any) -> bytes:
    """Return the bytes that a message is known by."""
    packed: bytes = msgpack.packb([task_name, arguments])
    return packed


def count_begun(broker: Redis, content: bytes) -> int:
    """Note that the handling of a message that came again begins; return how often it has begun and never ended."""
    try:
        with broker.pipeline() as pipeline:
            pipeline.incr(_key(content))
            pipeline.expire(_key(content), _KEEP_SECONDS)
            count: int = pipeline.execute()[0]
    except RedisError:
        return 0  # without a broker there is nothing to count with, and hardly a message
    return count


def note_ended(broker: Redis, content: bytes) -> None:
    """Note that the handling has ended, well or not."""
    try:
        broker.delete(_key(content))
    except RedisError as error:
        logger.debug("A count stays in the broker: %s.", error, extra={"action": "count_begun"})


def put_away(services: Services, task_name: str, content: bytes, arguments: Any, count: int) -> None:
    """Set the message aside; if it is an answer that was put away before, its part has failed."""
    reason = f"{task_name} ended its worker {count} times, perhaps for want of memory"
    set_aside(services.broker, COORDINATOR_QUEUE, content, reason)
    if count >= GIVE_UP_AFTER and isinstance(arguments, list | tuple) and arguments:
        _fail_part(services, arguments[0], f"Handling its answer {reason.partition(' ')[2]}.")


def _fail_part(services: Services, data: object, reason: str) -> None:
    """Record that the part whose answer cannot be handled has failed, if its own site has sent it."""
    try:
        envelope = Envelope.read(data)
        with reading(services.engine) as connection:
            asked = get_asked(connection, envelope.claimed_task_id())
        envelope.open(ANSWERS, recipient=COORDINATOR, public_key=asked.public_key)
    except (InvalidInput, NotFound):
        return
    if asked.part.site != envelope.sender:
        return
    with writing(services.engine) as connection:
        counted = answer_part(connection, asked.part, PartState.FAILED, reason=reason)
    if counted:
        extra = {"job": asked.part.job_id, "round": asked.part.round_id, "site": asked.part.site}
        logger.error("The part of site %s has failed: %s", asked.part.site, reason, extra={"action": "failed", **extra})
        complete_part(services, asked.part.round_id, asked.part)


def _key(content: bytes) -> str:
    return f"begun.{COORDINATOR_QUEUE}.{hashlib.sha256(content).hexdigest()[:32]}"
