"""The coordinator's Celery tasks: each translates and calls one plain function."""

from typing import TYPE_CHECKING, Any

from celery import shared_task

from common.errors import Unavailable
from common.queues import CoordinatorTask
from coordinator import closing, gate
from coordinator.services import services_of

if TYPE_CHECKING:
    from celery.app.task import Task

# A service that is away comes back: try again until then. The handlers can all be repeated.
_OPTIONS: dict[str, Any] = {
    "bind": True,
    "autoretry_for": (Unavailable,),
    "max_retries": None,
    "retry_backoff": 1,
    "retry_backoff_max": 30,
}


@shared_task(name=CoordinatorTask.UPDATE_READY.value, **_OPTIONS)
def update_ready(self: "Task[Any, Any]", envelope: object) -> None:
    """Take a site's result."""
    gate.receive_answer(services_of(self.app), envelope)


@shared_task(name=CoordinatorTask.PART_DECLINED.value, **_OPTIONS)
def part_declined(self: "Task[Any, Any]", envelope: object) -> None:
    """Take a site's refusal."""
    gate.receive_answer(services_of(self.app), envelope)


@shared_task(name=CoordinatorTask.AGGREGATE.value, **_OPTIONS)
def aggregate(self: "Task[Any, Any]", results: object, round_id: str) -> None:
    """Settle a round whose parts are all answered; the chord's results are not used, the records are the truth."""
    closing.settle_round(services_of(self.app), round_id)


@shared_task(name=CoordinatorTask.ADVANCE.value, **_OPTIONS)
def advance(self: "Task[Any, Any]", job_id: str) -> None:
    """Take a new job's first step."""
    closing.start_job(services_of(self.app), job_id)
