"""Watch over a part while it is done: stop it as soon as nobody wants its result, and tell how far it is."""

import logging
import time
from collections.abc import Callable

from store.patience import Watch
from worker.trainer import Cancelled

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 1.0  # how often at most somebody is asked whether the part is still wanted
_LOG_SECONDS = 10.0  # how often at most progress is logged


class Progress:
    """What a trainer and a transfer report to; cheap enough to be called for every batch and block."""

    def __init__(
        self,
        *,
        why_stop: Callable[[], str],  # says why the part is not wanted any more; empty if it is
        tell: Callable[[float, str], None],  # tells the coordinator
        tell_seconds: float,  # how often at most
        seconds_left: float,  # until the deadline; from here on a clock that is set changes nothing
        label: str,  # names the part in the log
    ) -> None:
        now = time.monotonic()
        self._why_stop = why_stop
        self._tell = tell
        self._tell_seconds = tell_seconds
        self._ends_at = now + seconds_left
        self._label = label
        self._check_at = 0.0  # of time.monotonic, as those below
        self._tell_at = now + tell_seconds  # a short part has nothing to tell
        self._log_at = now + _LOG_SECONDS  # and leaves no line

    @property
    def seconds_left(self) -> float:
        """Return how long it is until the deadline, in seconds."""
        return self._ends_at - time.monotonic()

    def begin(self, reason: str) -> None:
        """Raise Cancelled if the deadline has passed, or for the reason that the coordinator has just given, if any."""
        if (left := self.seconds_left) < 0:
            raise Cancelled(f"The deadline passed {-left:.1f} s ago.")
        if reason:
            raise Cancelled(reason)
        self._check_at = time.monotonic() + _CHECK_SECONDS

    def check(self) -> None:
        """Raise Cancelled when the deadline has passed or the part is not wanted any more."""
        self.begin("" if self.seconds_left < 0 else self._why_stop())

    def look(self) -> None:
        """Check, unless that was done less than a second ago and the deadline is not over."""
        now = time.monotonic()
        if now >= self._check_at or now > self._ends_at:
            self.check()

    def __call__(self, fraction: float, text: str) -> None:
        """Take note of the progress; raise Cancelled when the part is not wanted any more."""
        self.look()
        now = time.monotonic()
        if now >= self._tell_at:
            self._tell_at = now + self._tell_seconds
            self._tell(fraction, text)
        if now >= self._log_at:
            self._log_at = now + _LOG_SECONDS
            logger.info("%s: %.0f %% done, %s.", self._label, 100 * fraction, text, extra={"action": "report_progress"})

    def watch(self, fraction: float, what: str, *, before: int, total: int) -> Watch:
        """Return what a transfer of one of several files reports to, with the bytes before it and those of all."""

        def report(position: int) -> None:
            self(fraction, f"{what}: {(before + position) / 1e6:.0f} of {total / 1e6:.0f} MB")

        return report
