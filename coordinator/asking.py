"""Ask again the sites that owe an answer although they are alive and have nothing in hand.

Redis hands a message to one process and forgets it; if that process dies in the same moment, the message is lost.
"""

import logging
import time
from collections.abc import Mapping, Sequence

from redis.exceptions import RedisError

from common.errors import BrokerUnavailable
from common.heartbeats import Heartbeat
from common.queues import site_queue
from coordinator.dispatch import publish_again
from coordinator.parts import Part
from coordinator.services import Services

logger = logging.getLogger(__name__)

_FIRST_SECONDS = 1.0  # after its start a process asks sooner: its predecessor may have taken an answer along
LONGEST_PATIENCE_SECONDS = 600.0  # a site that is asked in vain is asked again ever more rarely, down to this


class Asking:
    """Whom one process has asked again, and when it does so next."""

    def __init__(self) -> None:
        self._next: dict[str, tuple[float, float]] = {}  # by task id: when (monotonic), and the pause after that
        self._is_first = True

    def ask_again(self, services: Services, owing: Sequence[Part], heartbeats: Mapping[str, Heartbeat]) -> None:
        """Send the message again of each part that seems to be lost, and not sooner than it may have arrived."""
        patience = services.settings.ask_again_seconds
        now = time.monotonic()
        first = now + (min(_FIRST_SECONDS, patience) if self._is_first else patience)
        self._is_first = False
        self._next = {part.task_id: self._next.get(part.task_id, (first, patience)) for part in owing}
        for part in owing:
            at, pause = self._next[part.task_id]
            heartbeat = heartbeats.get(part.site)
            if at > now or heartbeat is None or heartbeat.tasks or _has_messages(services, part.site):
                continue  # away, at work, or yet to take the message from its queue
            logger.warning(
                "Site %s is idle and owes an answer; asking again.",
                part.site,
                extra={"action": "ask_again", "job": part.job_id, "round": part.round_id, "site": part.site},
            )
            self._next[part.task_id] = (now + pause, min(2 * pause, max(patience, LONGEST_PATIENCE_SECONDS)))
            publish_again(services, part)


def _has_messages(services: Services, site: str) -> bool:
    try:
        return bool(services.broker.llen(site_queue(site)))
    except RedisError as error:
        raise BrokerUnavailable(f"The broker does not answer ({error}); start it.") from error
