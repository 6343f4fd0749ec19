"""What was set aside: elements of a queue that no worker could bear, each with its time and reason, in `<queue>.dead`.

Somebody who writes ten thousand of them gets as many letters, but two lines in the log.
"""

import base64
import json
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError

logger = logging.getLogger(__name__)

MAX_DEAD = 1000  # elements kept for each queue, the newest
MAX_DEAD_BYTES = 64 * 1024  # kept of each

_BURST_SECONDS = 10.0  # what comes within it of the first is counted, and told of once


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """Something that was set aside."""

    queue: str
    at: datetime | None  # None: somebody else wrote it
    reason: str
    size: int  # bytes that it had
    begins: bytes  # its first 64 KiB


def dead_letter_key(queue: str) -> str:
    """Return the broker key of the list of what was set aside from the queue."""
    return f"{queue}.dead"


def set_aside(client: Redis, queue: str, element: bytes, reason: str) -> None:
    """Put an element that cannot be handled on the queue's dead-letter list, with the time and the reason."""
    letter = {
        "at": time.time(),
        "reason": reason,
        "bytes": len(element),
        "base64": base64.b64encode(element[:MAX_DEAD_BYTES]).decode("ascii"),
    }
    try:
        try:
            _push(client, queue, letter)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            client.delete(dead_letter_key(queue))
            _push(client, queue, letter)
    except RedisError as error:  # the worker must go on, and the element is no message
        reason = f"{reason} (it could not be kept: {error})"
    _log.note(queue, "An element of queue %s was set aside: %s", "set_aside", reason)


def note_dropped(channel: str, reason: str) -> None:
    """Tell that something published on the channel was not listened to; nobody keeps it."""
    _log.note(channel, "A message on channel %s was dropped: %s", "drop_broadcast", reason)


def read_dead_letters(client: Redis, queue: str, *, limit: int = MAX_DEAD) -> list[DeadLetter]:
    """Return what was set aside from the queue, the newest first."""
    found: Any = client.lrange(dead_letter_key(queue), 0, limit - 1)
    return [_read(queue, data) for data in found]


def queues_with_dead_letters(client: Redis) -> list[str]:
    """Return the queues from which something was set aside."""
    keys = client.scan_iter(match=dead_letter_key("*"), _type="list", count=1000)
    return sorted(key.decode(errors="replace").removesuffix(dead_letter_key("")) for key in keys)


def forget_dead_letters(client: Redis, queue: str) -> int:
    """Forget what was set aside from the queue; return how many elements that were."""
    with client.pipeline() as pipeline:
        pipeline.llen(dead_letter_key(queue))
        pipeline.delete(dead_letter_key(queue))
        count: int = pipeline.execute()[0]
    return count


def _push(client: Redis, queue: str, letter: dict[str, Any]) -> None:
    with client.pipeline() as pipeline:
        pipeline.lpush(dead_letter_key(queue), json.dumps(letter))
        pipeline.ltrim(dead_letter_key(queue), 0, MAX_DEAD - 1)
        pipeline.execute()


def _read(queue: str, data: bytes) -> DeadLetter:
    try:
        letter = json.loads(data)
        return DeadLetter(
            queue=queue,
            at=datetime.fromtimestamp(letter["at"], UTC),
            reason=str(letter["reason"]),
            size=int(letter["bytes"]),
            begins=base64.b64decode(letter["base64"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, OSError, RecursionError):  # somebody else wrote it
        return DeadLetter(
            queue=queue, at=None, reason="it does not say why", size=len(data), begins=data[:MAX_DEAD_BYTES]
        )


class _BurstLog:
    """Logs the first of a burst at once, and the number of the others when it is over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._more: Counter[tuple[str, str]] = Counter()  # by (where, action), in the burst that goes on

    def note(self, where: str, sentence: str, action: str, reason: str) -> None:
        """Log it, or count it if it belongs to a burst."""
        key = (where, action)
        with self._lock:
            if key in self._more:
                self._more[key] += 1
                return
            self._more[key] = 0
        logger.error(sentence, where, reason, extra={"action": action, "queue": where})
        timer = threading.Timer(_BURST_SECONDS, self._end, args=(key,))
        timer.daemon = True
        timer.start()

    def _end(self, key: tuple[str, str]) -> None:
        with self._lock:
            more = self._more.pop(key)
        if more:
            where, action = key
            logger.error(
                "%s more like that on %s within %.0f s; `fedchord dead-letters` lists what was set aside.",
                more,
                where,
                _BURST_SECONDS,
                extra={"action": action, "queue": where},
            )


_log = _BurstLog()  # one for the process, like its log
