"""What a site and its coordinator tell each other about a part at work, by keys in the broker.

A broker that is away must neither disturb the work nor hold it up, so nothing here raises, and after a failure nothing
is tried for a while.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import TypeVar

from redis import Redis
from redis.exceptions import RedisError

from common.broker import connect_briefly
from common.errors import BrokerUnavailable
from common.progress import MAX_TEXT_CHARACTERS, ProgressReport, remove_progress, write_progress
from common.queues import cancel_key
from common.settings import Settings

logger = logging.getLogger(__name__)

_LEAST_LIFETIME_SECONDS = 30.0  # of a report
_LIFETIMES = 3  # a report outlives so many heartbeats
_QUIET_SECONDS = 20.0  # after a failure: ten times what one may take

Result = TypeVar("Result")


class Reports:
    """One process's half of the talk."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._site = settings.site_name
        self._lifetime_seconds = max(_LEAST_LIFETIME_SECONDS, _LIFETIMES * settings.heartbeat_seconds)
        self._client: Redis | None = None
        self._quiet_until = 0.0  # of time.monotonic
        self._told: set[str] = set()  # the parts with a report in the broker, by task id

    def begin(self, job_id: str, task_id: str) -> tuple[float, str]:
        """Return the unix time in seconds, by the broker's clock if it answers, and why to stop, as `why_stop` does.

        By that clock deadlines are told. Both are asked in one go, for a part may take less than a few questions.
        """

        def ask(client: Redis) -> tuple[tuple[int, int], int]:
            with client.pipeline(transaction=False) as pipeline:
                pipeline.time()
                pipeline.exists(cancel_key(self._site, job_id), cancel_key(self._site, task_id))
                told, cancelled = pipeline.execute()
            return told, cancelled

        answer = self._try(ask)
        if answer is None:
            return time.time(), ""
        (seconds, microseconds), cancelled = answer
        return seconds + microseconds / 1e6, self.why_stop(job_id, task_id) if cancelled else ""

    def why_stop(self, job_id: str, task_id: str) -> str:
        """Return why the coordinator wants nothing more for the part; empty if it does, or cannot be asked."""
        job_key, part_key = cancel_key(self._site, job_id), cancel_key(self._site, task_id)
        if not self._try(lambda client: client.exists(job_key, part_key)):
            return ""
        stopped = self._try(lambda client: client.exists(job_key))
        return "The job was stopped." if stopped else "The part is not wanted any more."

    def tell(self, task_id: str, fraction: float, text: str) -> None:
        """Let the coordinator know how far the part is, whatever a trainer says that it is."""
        report = ProgressReport(
            task_id=task_id,
            fraction=min(max(fraction, 0.0), 1.0) if math.isfinite(fraction) else 0.0,
            text=str(text).encode("utf-8", "replace").decode()[:MAX_TEXT_CHARACTERS],
            at=time.time(),
        )
        self._told.add(task_id)
        self._try(lambda client: write_progress(client, report, self._site, self._lifetime_seconds))

    def forget(self, task_id: str) -> None:
        """Take back what was told of a part, which is answered."""
        if task_id in self._told:
            self._told.discard(task_id)
            self._try(lambda client: remove_progress(client, self._site, task_id))

    def _try(self, ask: Callable[[Redis], Result]) -> Result | None:
        """Return what the broker says; None if it is away."""
        if time.monotonic() < self._quiet_until:
            return None
        try:
            if self._client is None:
                self._client = connect_briefly(self._settings)
            return ask(self._client)
        except (RedisError, BrokerUnavailable, OSError) as error:
            self._quiet_until = time.monotonic() + _QUIET_SECONDS
            logger.debug("The broker is away: %s.", error, extra={"action": "report_progress"})
            return None
