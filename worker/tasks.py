"""The site's Celery tasks, one for each kind of message: they hand over to `Site` and do nothing else."""

import ctypes
import logging
import os
import signal
import sys
import threading
from functools import cache
from typing import Any

from celery import Task
from celery.exceptions import Reject
from celery.signals import task_unknown, worker_process_init
from kombu.exceptions import OperationalError

from common.errors import BrokerUnavailable
from common.messages import Envelope
from common.queues import ANSWER_TASKS, COORDINATOR_QUEUE, SITE_TASKS, AnswerKind
from common.signing import SigningKey
from store.transfer import Transfer
from worker.celery import app, settings
from worker.reports import Reports
from worker.site import Site
from worker.trainers import Trainers

logger = logging.getLogger(__name__)

_PUBLISHING = {"max_retries": 10, "interval_start": 0.1, "interval_step": 0.5, "interval_max": 5.0}  # about 30 s
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _register(task_name: str) -> None:
    @app.task(name=task_name, bind=True)
    def take(task: Task[Any, Any], /, *args: object, **_: object) -> None:
        try:
            _site().handle(args[0] if args else None, str(task.request.id))
        except (OperationalError, BrokerUnavailable) as error:
            # The answer is kept as a receipt; the message comes again, and with it the chance to send the answer.
            raise Reject(str(error), requeue=True) from error


for name in SITE_TASKS.values():
    _register(name)


@task_unknown.connect
def _decline_unknown(name: str, id: str, **_: Any) -> None:
    """Answer a message of a newer coordinator; Celery alone would drop it."""
    kind = name.removeprefix("site.").upper()
    _site().decline_unread(id, f"This site does not know messages of the kind {kind[:80]}; upgrade this site.")


@worker_process_init.connect
def _begin_process(**_: Any) -> None:
    """Prepare a child process, which is where parts are done."""
    os.nice(settings.site_nice)
    if sys.platform == "linux":  # a worker that is killed leaves no child behind that trains on
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Frameworks take seconds to import; a child that waits for its first part has them.
    threading.Thread(target=_trainers().warm_up, name="import-trainers", daemon=True).start()


@cache
def _site() -> Site:
    """Return this process's site."""
    return Site(
        settings=settings,
        key=SigningKey.load(settings.signing_key_file),
        transfer=Transfer(
            shared_folder=settings.blob_folder,
            timeout_seconds=settings.transfer_timeout_seconds,
            patience_seconds=settings.transfer_patience_seconds,
        ),
        trainers=_trainers(),
        send=_send,
        reports=Reports(settings),
    )


@cache
def _trainers() -> Trainers:
    return Trainers(settings.site_trainers)


def _send(answer: bytes) -> None:
    """Publish a sealed answer to the coordinator; raise OperationalError when the broker stays away."""
    kind = AnswerKind(Envelope.read(answer).kind)
    app.send_task(
        ANSWER_TASKS[kind],
        args=(answer,),
        queue=COORDINATOR_QUEUE,
        declare=[],  # the coordinator makes its own queue, and Redis keeps it meanwhile
        argsrepr=f"({settings.site_name})",
        retry=True,
        retry_policy=_PUBLISHING,
    )
