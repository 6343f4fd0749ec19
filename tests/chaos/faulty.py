"""Run a real program of ours that notes every point at which it could die, and dies at the one it is told to.

    python -m tests.chaos.faulty celery -A coordinator worker      a coordinator, or with `worker` a site
    python -m tests.chaos.faulty fedchord submit job.toml          a command

Nothing of ours is changed: what is wrapped is the machinery below it (the database's commit, the broker's commands, the
object store's writes). A point is named by what is about to happen, or has happened, and by the function of ours that
asked for it: `before commit in closing._settle`.

In the folder that CHAOS_FOLDER names:

    passed   one line for each point that was passed
    target   {"point": …, "pass": n, "whole": bool}: die there, at the n-th pass; with `whole` a site's parent dies too
    died     the target, once it has been hit, so that the process that is started next lives
    clock    seconds that this process's clock is ahead; read each time the clock is
"""

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = Path(os.environ["CHAOS_FOLDER"])
OURS = ("coordinator.", "store.", "worker.", "common.")
PLUMBING = {"store.database", "common.transport"}  # between the function that asks and the machinery
MAIN = os.getpid()

_real_time = time.time
_passes: dict[str, int] = {}  # by target, as its file says


def shift() -> float:
    """Return how many seconds the clock is ahead."""
    try:
        return float((FOLDER / "clock").read_text() or 0)
    except FileNotFoundError:
        return 0.0


def shift_clock() -> None:
    """Move this process's clock; before anything else is imported that may keep `time.time`."""
    time.time = lambda: _real_time() + shift()  # type: ignore[assignment]
    import datetime as module

    import store.tables

    class Shifted(module.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> module.datetime:
            return module.datetime.now(tz) + module.timedelta(seconds=shift())

    store.tables.datetime = Shifted  # type: ignore[attr-defined]  # what `utc_now` looks up


def caller(frame: FrameType | None) -> str:
    """Return the function of ours that is nearest on the stack."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(OURS) and module not in PLUMBING:
            name = frame.f_code.co_qualname.replace(".<locals>", "")
            return f"{module.rpartition('.')[2]}.{name}"
        frame = frame.f_back
    return "the worker"


def passed(point: str) -> None:
    """Note the point, and die if it is the target."""
    with (FOLDER / "passed").open("a") as file:
        file.write(f"{point}\n")
    try:
        text = (FOLDER / "target").read_text()
    except FileNotFoundError:
        return
    target = json.loads(text)
    if target["point"] != point:
        return
    _passes[text] = _passes.get(text, 0) + 1
    if _passes[text] < target["pass"]:
        return
    with suppress(FileNotFoundError):  # another process or thread was quicker
        (FOLDER / "target").rename(FOLDER / "died")
        if target["whole"] and os.getpid() != MAIN:
            os.kill(MAIN, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, what: Callable[..., str | None]) -> None:
    """Make a method two points, before and after; `what` says what it does, None if nothing that counts."""
    wrapped = getattr(owner, name)

    @functools.wraps(wrapped)
    def run(*args: Any, **values: Any) -> Any:
        said = what(*args, **values)
        if said is None:
            return wrapped(*args, **values)
        moment = f"{said} in {caller(sys._getframe(1))}"
        passed(f"before {moment}")
        result = wrapped(*args, **values)
        passed(f"after {moment}")
        return result

    setattr(owner, name, run)


def always(what: str) -> Callable[..., str]:
    """Return a description that does not depend on the arguments."""
    return lambda *_, **__: what


def wrap() -> None:
    """Put points around everything that others can see."""
    import minio
    import redis
    from celery.backends.redis import RedisBackend
    from kombu.transport import redis as kombu_redis
    from sqlalchemy.engine.default import DefaultDialect

    from common import transport
    from store.folder import FolderStore
    from store.s3 import S3Store
    from store.transfer import Transfer

    around(DefaultDialect, "do_commit", always("commit"))
    around(kombu_redis.Channel, "_put", _publishing)
    around(kombu_redis.PublishBatch, "flush", always("publishing"))
    around(transport.QoS, "ack", _acknowledging)
    around(RedisBackend, "set_chord_size", always("setting the chord's size"))
    around(RedisBackend, "on_chord_part_return", always("counting in the chord"))
    around(redis.Redis, "set", _setting)
    for store in (FolderStore, S3Store):
        for method in ("put", "accept", "discard", "delete"):
            around(store, method, always(f"blob {method}"))
    around(minio.Minio, "copy_object", always("object copy"))
    around(Transfer, "upload", always("upload"))
    if os.environ.get("CHAOS_SITE"):
        from worker.leases import Lease

        around(Lease, "keep_answer", always("keeping an answer"))
        around(Lease, "hand_over", always("keeping a receipt"))


def _publishing(channel: Any, queue: str, message: Any, **values: Any) -> str | None:
    if values.get("_publish_batch") is not None or "pidbox" in queue:
        return None  # the batch's flush is the point; remote control is none
    return "publishing"


def _acknowledging(qos: Any, tag: str) -> str | None:
    message = qos._delivered.get(tag)
    return f"acknowledging {message.headers['task']}" if message is not None and "task" in message.headers else None


def _setting(client: Any, key: Any, *_: Any, **__: Any) -> str | None:
    return "cancelling" if "cancel" in str(key) else None


def main() -> None:
    """Become the program that the arguments name."""
    shift_clock()
    program, *arguments = sys.argv[1:]
    sys.argv = [program, *arguments]
    if program == "celery":
        from celery.__main__ import main as celery

        wrap()
        celery()
    else:
        from coordinator.cli.entry import main as fedchord

        wrap()
        fedchord()


if __name__ == "__main__":
    main()
