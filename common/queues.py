"""Name every queue and task in one place.

A site listens on its own queue, `site.<name>`; all coordinator workers share the queue `coordinator`.
Tasks are sent by name, so that neither side imports the other's code.
"""

import re
from enum import StrEnum

from common.errors import InvalidInput

COORDINATOR_QUEUE = "coordinator"

_SITE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # a DNS label, so that it fits hosts and keys


class Kind(StrEnum):
    """The kinds of message that a coordinator sends to a site."""

    TRAINING_START = "TRAINING_START"  # a job begins: check the trainer, perhaps build the first model
    UPDATE_ROUND_START = "UPDATE_ROUND_START"  # train the global model, answer with an update
    MODEL_TEST_ROUND = "MODEL_TEST_ROUND"  # evaluate the global model, answer with metrics
    SWAG_ROUND_START = "SWAG_ROUND_START"  # train on and answer with the weights' first and second moments
    TRAINING_FINISHED = "TRAINING_FINISHED"  # the job has ended; no answer is expected
    CLIENT_REMOVED = "CLIENT_REMOVED"  # the site is out of the job; no answer is expected


class AnswerKind(StrEnum):
    """The kinds of message that a site sends to the coordinator."""

    UPDATE_READY = "UPDATE_READY"  # the part is done: an update, or metrics
    PART_DECLINED = "PART_DECLINED"  # the part will not be done, with the reason


class CoordinatorTask(StrEnum):
    """The tasks of a coordinator worker."""

    UPDATE_READY = "coordinator.update_ready"
    PART_DECLINED = "coordinator.part_declined"
    AGGREGATE = "coordinator.aggregate"  # the body of every round's chord
    ADVANCE = "coordinator.advance"  # a job was submitted or aborted: take its next step


SITE_TASKS: dict[Kind, str] = {kind: f"site.{kind.lower()}" for kind in Kind}
ANSWER_TASKS: dict[AnswerKind, CoordinatorTask] = {
    AnswerKind.UPDATE_READY: CoordinatorTask.UPDATE_READY,
    AnswerKind.PART_DECLINED: CoordinatorTask.PART_DECLINED,
}


def check_site_name(name: str) -> str:
    """Return the name; raise InvalidInput unless it is a DNS label in lower case."""
    if not _SITE_NAME.fullmatch(name):
        raise InvalidInput(
            f"Site name {name!r} is not valid: use 1 to 63 lower-case letters, digits and inner hyphens."
        )
    return name


def site_queue(site: str) -> str:
    """Return the name of the site's queue."""
    return f"site.{check_site_name(site)}"


def heartbeat_key(site: str) -> str:
    """Return the broker key that holds the site's newest heartbeat."""
    return f"{site_queue(site)}.heartbeat"


def progress_key(site: str, task_id: str) -> str:
    """Return the broker key that holds how far the site is with a part."""
    return f"{site_queue(site)}.progress.{task_id}"


def cancel_key(site: str, wanted_id: str) -> str:
    """Return the broker key whose presence tells the site to stop working for the job, or for the part, of the id."""
    return f"{site_queue(site)}.cancelled.{wanted_id}"
