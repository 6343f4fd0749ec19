"""Watch over a part while it trains: stop it as soon as nobody wants its result."""

import logging
import time
from collections.abc import Callable

from worker.trainer import Cancelled

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 1.0  # how often at most somebody is asked whether the part is still wanted
_LOG_SECONDS = 10.0  # how often at most progress is logged


class Progress:
    """What a trainer reports to; cheap enough to be called for every batch."""

    def __init__(self, *, is_cancelled: Callable[[], bool], deadline_at: float, label: str) -> None:
        self._is_cancelled = is_cancelled
        self._deadline_at = deadline_at  # unix time, seconds
        self._label = label  # names the part in the log
        self._check_at = self._log_at = 0.0  # of time.monotonic

    def check(self) -> None:
        """Raise Cancelled when the job was stopped or the deadline has passed."""
        if self._is_cancelled():
            raise Cancelled("The job was stopped.")
        if (late := time.time() - self._deadline_at) > 0:
            raise Cancelled(f"The deadline passed {late:.1f} s ago.")
        self._check_at = time.monotonic() + _CHECK_SECONDS

    def __call__(self, fraction: float, text: str) -> None:
        """Take note of the progress; raise Cancelled when the part is not wanted any more."""
        now = time.monotonic()
        if now >= self._check_at:
            self.check()
        if self._log_at == 0.0:
            self._log_at = now + _LOG_SECONDS  # a short part leaves no line
        elif now >= self._log_at:
            self._log_at = now + _LOG_SECONDS
            logger.info("%s: %.0f %% done, %s.", self._label, 100 * fraction, text, extra={"action": "report_progress"})
