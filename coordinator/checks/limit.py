"""Run checks side by side, each for so long at the most: one that hangs or fails stops no other."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from redis.exceptions import RedisError

from common.errors import FedChordError
from coordinator.checks.finding import Finding, fault

logger = logging.getLogger(__name__)

Check = Callable[[], Iterable[Finding]]


def run_checks(checks: Mapping[str, Check], *, limit_seconds: float) -> tuple[Finding, ...]:
    """Return what the checks find, in their order; what one has found before it hangs or fails counts."""
    found: dict[str, list[Finding]] = {name: [] for name in checks}
    threads = {
        # a daemon: one that hangs must not keep the process from ending
        name: threading.Thread(target=_run, args=(name, check, found[name]), name=f"check {name}", daemon=True)
        for name, check in checks.items()
    }
    deadline = time.monotonic() + limit_seconds
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            late = fault(
                name,
                f"The check has not ended in {limit_seconds:g} s: what it asks does not answer.",
                "Look at the network and the machine between here and there.",
            )
            found[name] = [*found[name], late]  # a copy: what the thread still finds comes too late
    return tuple(finding for findings in found.values() for finding in findings)


def within(seconds: float, action: Callable[[], None], *, what: str) -> str:
    """Return what is wrong when the action raises, or takes longer than so many seconds; empty if nothing."""

    def check() -> Iterable[Finding]:
        action()
        return ()

    found = run_checks({what: check}, limit_seconds=seconds)
    return found[0].sentence if found else ""


def _run(name: str, check: Check, found: list[Finding]) -> None:
    try:
        for finding in check():
            found.append(finding)  # one by one: the next one may not come
    except FedChordError as error:
        found.append(fault(name, error.message))
    except RedisError as error:
        found.append(fault(name, f"The broker refuses or does not answer: {error}."))
    except Exception as error:
        logger.debug("The check %s failed.", name, exc_info=True, extra={"action": "check_failed"})
        found.append(
            fault(name, f"The check failed: {type(error).__name__}: {error}.", "`fedchord --debug doctor` shows where.")
        )
