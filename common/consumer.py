"""How a worker consumes: it waits for a broker that is away, and sets aside what it has no task for.

Whatever goes wrong between a worker and its broker, the worker says so once, tries again every second, and says when it
goes on.
"""

import json
import logging
import time
import warnings
from typing import Any

from celery import bootsteps, signals
from celery.worker import state
from celery.worker.consumer import Consumer
from redis.exceptions import ResponseError

from common.dead_letters import set_aside

logger = logging.getLogger(__name__)

_AGAIN_SECONDS = 1.0


class PatientConsumer(Consumer):
    """Celery's consumer, which does not end for want of a broker or because of a message."""

    _lost_at: float | None = None  # monotonic; None while the broker answers

    def ensure_connected(self, conn: Any) -> Any:
        """Return the connection once it is there; try every second."""
        connected = conn.ensure_connection(
            lambda error, _interval: self._lost(error),
            interval_start=_AGAIN_SECONDS,
            interval_step=0,
            interval_max=_AGAIN_SECONDS,
            callback=state.maybe_shutdown,
        )
        self.first_connection_attempt = False
        return connected

    def on_ready(self) -> None:
        """Say that the broker is back."""
        super().on_ready()
        if self._lost_at is not None:
            seconds = time.monotonic() - self._lost_at
            logger.warning("The broker is back after %.0f s; going on.", seconds, extra={"action": "broker_back"})
        self._lost_at = None

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Wait for a broker that has never answered."""
        self._lost(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Wait for a broker that does not answer any more; what is in hand goes on."""
        self._lost(exc)
        connection: Any = self.connection
        for channel in connection.transport.channels:
            channel.do_restore = False  # what is at work here is not to be given to somebody else
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Celery's advice to end what is at work
            super().on_connection_error_after_connected(exc)

    def _lost(self, error: Exception) -> None:
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            logger.warning(
                "The broker is away (%s); waiting for it, and trying again every second.",
                error,
                extra={"action": "broker_away"},
            )
        if isinstance(error, ResponseError):  # it is there, and refuses
            time.sleep(_AGAIN_SECONDS)

    def on_unknown_message(self, body: object, message: Any) -> None:
        """Set aside what names no task."""
        self._set_aside(message, "it names no task", None)

    def on_unknown_task(self, body: object, message: Any, exc: Exception) -> None:
        """Set aside a message for a task that there is not, and tell those who answer for it."""
        name, task_id = message.headers["task"], message.headers["id"]
        self._set_aside(message, f"there is no task {name[:80]!r}", None)
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=name, id=task_id)

    def on_invalid_task(self, body: object, message: Any, exc: Exception) -> None:
        """Set aside what Celery cannot make a task of."""
        self._set_aside(message, "it cannot be made a task", exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Set aside what cannot be decoded."""
        self._set_aside(message, "it cannot be decoded", exc)

    def _set_aside(self, message: Any, reason: str, error: Exception | None) -> None:
        channel = message.channel
        said = f"{reason} ({type(error).__name__}: {error})"[:500] if error else reason
        set_aside(channel.client, channel.own_queue, json.dumps(message._raw).encode(), said)
        message.reject_log_error(logger, vars(self)["connection_errors"])


class TakeUpUnacknowledged(bootsteps.StartStopStep):
    """When a worker has connected, put back what was taken from its queue and is at work nowhere.

    Redis knows of no consumers: what a killed worker held, or what this one had taken and not begun when the broker
    went away, would otherwise wait for the visibility timeout. Every handler can bear a message twice, so it is safe
    also when another worker is still at work on it.
    """

    requires = ("celery.worker.consumer.connection:Connection",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._is_first = True

    def start(self, consumer: Any) -> None:
        """Put back every unacknowledged message of this app's queue that is not at work in this process."""
        at_work = frozenset(request.id for request in tuple(state.active_requests))
        with consumer.app.connection_for_write() as connection:
            taken = connection.default_channel.qos.take_up(but=at_work.__contains__, mark=self._is_first)
        self._is_first = False
        if taken:
            logger.info("Took up %s unfinished messages.", taken, extra={"action": "restore_messages"})
