"""The coordinator's Celery tasks: each translates and calls one plain function.

A service that is away comes back: what needs it is tried again until then. A message that cannot be handled at all is
set aside. The handlers can all be repeated.
"""

import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import shared_task
from celery.exceptions import Reject

from common.dead_letters import set_aside
from common.errors import FedChordError, InvalidMessage, Unavailable
from common.queues import COORDINATOR_QUEUE, CoordinatorTask
from coordinator import closing, gate
from coordinator.deadly import MAX_BEGUN, content_of, count_begun, note_ended, put_away
from coordinator.outages import Outages
from coordinator.services import Services, services_of

if TYPE_CHECKING:
    from celery.app.task import Task

logger = logging.getLogger(__name__)

_LONGEST_WAIT_SECONDS = 5.0
_outages = Outages()  # one for the process, like its log


def receive_answer(services: Services, envelope: object) -> None:
    """Take a site's result or refusal."""
    gate.receive_answer(services, envelope)


def settle_round(services: Services, results: object, round_id: object) -> None:
    """Settle a round whose parts are all answered; the chord's results are not used, the records are the truth."""
    if not isinstance(round_id, str):
        raise InvalidMessage("The id of the round is no text.")
    closing.settle_round(services, round_id)


def start_job(services: Services, job_id: object) -> None:
    """Take a new job's first step."""
    if not isinstance(job_id, str):
        raise InvalidMessage("The id of the job is no text.")
    closing.start_job(services, job_id)


def _register(task_name: CoordinatorTask, step: Callable[..., None]) -> None:
    signature = inspect.signature(step)

    @shared_task(name=task_name.value, bind=True, max_retries=None)
    def take(task: "Task[Any, Any]", /, *arguments: object, **named: object) -> None:
        services = services_of(task.app)
        content = content_of(task_name.value, [arguments, named])
        try:
            bound = signature.bind(services, *arguments, **named)
        except TypeError as error:
            set_aside(services.broker, COORDINATOR_QUEUE, content, f"{task_name.value}: {error}")
            return
        comes_again = bool((task.request.delivery_info or {}).get("redelivered"))
        if comes_again and (count := count_begun(services.broker, content)) >= MAX_BEGUN:
            put_away(services, task_name.value, content, arguments, count)
            return
        try:
            step(*bound.args, **bound.kwargs)
        except Unavailable as error:
            _wait(task, error)
        except Exception as error:
            _give_up(services, task_name, content, error)
        finally:
            if comes_again:
                note_ended(services.broker, content)
        _outages.go_on(str(task.request.id))


def _wait(task: "Task[Any, Any]", error: Unavailable) -> None:
    """Have the message come again in some seconds."""
    _outages.wait(str(task.request.id), error)
    seconds = min(_LONGEST_WAIT_SECONDS, 2.0 ** min(task.request.retries, 10))
    try:
        task.retry(exc=error, countdown=seconds)
    except Reject as refused:  # the broker is away as well: it keeps the message, and hands it out again
        raise Reject(str(error), requeue=True) from refused


def _give_up(services: Services, task_name: CoordinatorTask, content: bytes, error: Exception) -> None:
    """Set aside what no repetition can help."""
    said = error.message if isinstance(error, FedChordError) else f"{type(error).__name__}: {error}"
    if not isinstance(error, FedChordError):
        logger.exception("%s failed.", task_name.value, extra={"action": "task_failed"})
    set_aside(services.broker, COORDINATOR_QUEUE, content, f"{task_name.value} failed: {said}"[:500])


_register(CoordinatorTask.UPDATE_READY, receive_answer)
_register(CoordinatorTask.PART_DECLINED, receive_answer)
_register(CoordinatorTask.AGGREGATE, settle_round)
_register(CoordinatorTask.ADVANCE, start_job)
