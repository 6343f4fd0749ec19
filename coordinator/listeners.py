"""Find the coordinator's workers: those that take messages from its queue now."""

from typing import Any

from celery import Celery
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from common.errors import BrokerUnavailable
from common.queues import COORDINATOR_QUEUE

_USUAL_NAMES = "coordinator*"  # of the nodes, unless `celery worker -n` says otherwise
_ANSWER_SECONDS = 1.0


def coordinator_workers(app: Celery) -> tuple[str, ...]:
    """Return the names of coordinator workers that answer: one that has the usual name, else all there are.

    Remote control is best effort, so that nobody answers is a hint, not a proof. Raise BrokerUnavailable.
    """
    try:
        usual = app.control.broadcast(
            "active_queues",
            pattern=_USUAL_NAMES,
            matcher="glob",  # type: ignore[arg-type]  # the stubs want a function, kombu the name of one
            reply=True,
            limit=1,
            timeout=_ANSWER_SECONDS,
        )
        if workers := _listening(usual):
            return workers
        return _listening(app.control.broadcast("active_queues", reply=True, timeout=_ANSWER_SECONDS))
    except (KombuError, RedisError, OSError) as error:
        raise BrokerUnavailable(f"The broker does not answer ({error}); start it and try again.") from error


def _listening(replies: list[dict[str, Any]] | None) -> tuple[str, ...]:
    """Return the nodes whose reply names the coordinator's queue; a site may be called `coordinator` as well."""
    return tuple(
        sorted(
            node
            for reply in replies or []
            for node, queues in reply.items()
            if isinstance(queues, list) and any(queue.get("name") == COORDINATOR_QUEUE for queue in queues)
        )
    )
