"""Try a transfer again for as long as it gets on, and say once, not for each attempt, that the other side is away."""

import logging
import random
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Protocol

from urllib3.exceptions import HTTPError, LocationValueError

from common.errors import InvalidInput, StoreUnavailable

logger = logging.getLogger(__name__)

Watch = Callable[[int], None]  # told how many bytes are there; raises what the transfer shall end with

_LONGEST_PAUSE_SECONDS = 10.0
_LONGEST_ASKED_SECONDS = 30.0  # what a server may ask for with Retry-After
_LOOK_SECONDS = 0.5  # how often it is asked, during a pause, whether the transfer is still wanted


class PassingError(Exception):
    """The attempt failed, and another one may not."""

    def __init__(self, reason: str, *, retry_after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds  # as the server asks


class Outages:
    """The hosts that are away; any number of threads may share them."""

    def __init__(self) -> None:
        self._away: set[str] = set()
        self._number = 0  # of the outage, so that the log has a line for each
        self._lock = threading.Lock()

    def begin(self, host: str, reason: object) -> None:
        """Say that the host is away, if that was not said before."""
        with self._lock:
            known = host in self._away
            self._away.add(host)
            self._number += not known
        if not known:
            extra = {"action": "store_away", "outage": self._number}
            logger.warning("The object store at %s is away (%s); trying on.", host, reason, extra=extra)

    def end(self, host: str) -> None:
        """Say that the host is back, if it was away."""
        if host not in self._away:
            return
        with self._lock:
            known = host in self._away
            self._away.discard(host)
        if known:
            logger.info("The object store at %s is back.", host, extra={"action": "store_back"})


class Patience:
    """How long one transfer is tried.

    Time in which no byte moves uses patience up; to get further than ever before renews it. So a slow line that is cut
    again and again has as long as it needs, and one on which the same bytes move again and again has not.
    """

    def __init__(
        self,
        seconds: float,
        *,
        pause_seconds: float,  # before the second attempt, at most; doubled for each further one
        host: str,
        outages: Outages,
        watch: Watch,
    ) -> None:
        self._seconds = seconds
        self._pause_seconds = pause_seconds
        self._host = host
        self._outages = outages
        self._watch = watch
        self._spent = 0.0  # seconds without progress
        self._at = time.monotonic()  # when a byte moved, or the last attempt began or ended
        self._position = self._furthest = 0  # bytes
        self._failures = 0  # in a row without progress
        self._advanced = False  # whether the attempt that runs has got further than ever before

    def begin_at(self, position: int) -> None:
        """Take note of bytes that need not be moved, since they are there from an earlier time."""
        self._position = self._furthest = position
        self._watch(position)

    def moved(self, position: int) -> None:
        """Take note of how far the attempt is; raise what the watch raises."""
        self._at = time.monotonic()
        self._position = position
        if position > self._furthest:
            self._furthest = position
            self._spent = 0.0
            self._failures = 0
            self._advanced = True
        self._watch(position)

    def received(self, position: int) -> None:
        """Take note of how far a download is; bytes that come are a sign that the other side is back."""
        if position > self._furthest:
            self.answered()
        self.moved(position)

    def answered(self) -> None:
        """Take note that the other side does what it is asked for."""
        self._outages.end(self._host)

    def begin_attempt(self) -> None:
        """Take note that an attempt begins."""
        self._spend()
        self._advanced = False

    def fail_attempt(self, error: Exception, what: str) -> None:
        """Wait until another attempt may be made; raise StoreUnavailable when patience is at its end.

        The first failure never is: a line that falls silent may take longer to be noticed than patience lasts.
        """
        self._spend()
        self._failures += 1
        if self._spent >= self._seconds and self._failures > 1:
            raise StoreUnavailable(
                f"The transfer with {what} has not got on for {self._spent:.0f} s ({error}); check the network, and "
                "that the object store runs."
            ) from error
        if self._advanced:
            logger.debug("The transfer with %s was cut: %s.", what, error, extra={"action": "transfer_repeated"})
        else:
            self._outages.begin(self._host, error)
        self._pause(error)

    def _pause(self, error: Exception) -> None:
        longest = min(_LONGEST_PAUSE_SECONDS, self._pause_seconds * 2.0 ** min(self._failures - 1, 30))
        pause = longest * random.uniform(0.5, 1)  # noqa: S311  # spreads the load, hides nothing
        if isinstance(error, PassingError):
            pause += min(error.retry_after_seconds, _LONGEST_ASKED_SECONDS)
        ends_at = time.monotonic() + min(pause, self._seconds - self._spent)
        while (left := ends_at - time.monotonic()) > 0:
            self._watch(self._position)
            time.sleep(min(left, _LOOK_SECONDS))
        self._watch(self._position)

    def _spend(self) -> None:
        now = time.monotonic()
        self._spent += now - self._at
        self._at = now


class Attempt(Protocol):
    """What is tried again."""

    def run(self) -> None:
        """Make one attempt; raise HTTPError or PassingError when another one may succeed."""


def repeat(attempt: Attempt, patience: Patience, what: str) -> None:
    """Make the attempt until it succeeds or patience is at its end; `what` names it to people."""
    while True:
        patience.begin_attempt()
        try:
            return attempt.run()
        except LocationValueError as error:  # it would be no URL the next time either
            raise InvalidInput(f"The reference is no URL ({error}); ask the coordinator for another one.") from error
        except (HTTPError, PassingError) as error:
            patience.fail_attempt(error, what)


def read_retry_after(value: str | None) -> float:
    """Return for how many seconds a server asks in its Retry-After header; 0 if it does not say so sensibly."""
    if value is None:
        return 0.0
    try:
        seconds = float(value) if value.strip().isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return max(0.0, seconds)
