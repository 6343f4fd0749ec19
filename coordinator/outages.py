"""Say once that a service is away and what needs it waits, and once that it goes on."""

import logging
import threading
import time

from common.errors import BrokerUnavailable, DatabaseUnavailable, DiskFull, StoreUnavailable, Unavailable

logger = logging.getLogger(__name__)

_STALE_SECONDS = 60.0  # what waits is tried again every few seconds, if not by this process, then by another one
_NAMES = {
    BrokerUnavailable: "The broker",
    DatabaseUnavailable: "The database",
    StoreUnavailable: "The object store",
    DiskFull: "The disk",
}


class Outages:
    """What waits in this process, and for which service."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[str, float]] = {}  # by service: what, and when it was last tried
        self._since: dict[str, float] = {}  # by service, monotonic

    def wait(self, what: str, error: Unavailable) -> None:
        """Note that it waits for the service that the error names; log that if it is the first."""
        service = next((name for kind, name in _NAMES.items() if isinstance(error, kind)), "A service")
        now = time.monotonic()
        with self._lock:
            self._forget_stale(now)
            is_first = service not in self._since
            self._since.setdefault(service, now)
            self._waiting.setdefault(service, {})[what] = now
        if is_first:
            logger.warning(
                "%s cannot be used; what needs it waits, and is tried again every few seconds: %s",
                service,
                error.message,
                extra={"action": "wait_for_service"},
            )

    def go_on(self, what: str) -> None:
        """Note that it waits no more; log that if it was the last."""
        if not self._since:  # nearly always
            return
        now = time.monotonic()
        with self._lock:
            self._forget_stale(now)
            for waiting in self._waiting.values():
                waiting.pop(what, None)
            over = {service: now - since for service, since in self._since.items() if not self._waiting.get(service)}
            for service in over:
                del self._since[service]
                self._waiting.pop(service, None)
        for service, seconds in over.items():
            logger.warning("%s can be used again after %.0f s; going on.", service, seconds, extra={"action": "go_on"})

    def _forget_stale(self, now: float) -> None:
        for waiting in self._waiting.values():
            for what in [each for each, at in waiting.items() if now - at > _STALE_SECONDS]:
                del waiting[what]
