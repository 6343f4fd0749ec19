"""Measure how long something has lasted by a clock that does not jump.

A deadline is a time of day, since it is told to other machines and outlives a process. While a process lives it follows
its own steady clock from the first time it saw the deadline: a wall clock that is set forward ends no round early, and
one that is set back makes none wait.
"""

import time
from collections.abc import Hashable
from datetime import datetime

from store.tables import utc_now


class SteadyClock:
    """What one process has seen, and since when."""

    def __init__(self) -> None:
        self._ends: dict[Hashable, tuple[datetime, float]] = {}  # the time of day, and of time.monotonic
        self._since: dict[Hashable, float] = {}  # time.monotonic
        self._asked: set[Hashable] = set()  # since the last turn

    def has_passed(self, name: Hashable, at: datetime) -> bool:
        """Return whether the time has come, as it was when the name was first seen with it."""
        self._asked.add(name)
        known = self._ends.get(name)
        if known is None or known[0] != at:
            known = self._ends[name] = (at, time.monotonic() + (at - utc_now()).total_seconds())
        return time.monotonic() >= known[1]

    def seconds(self, name: Hashable) -> float:
        """Return for how long the name has been asked for, 0 the first time."""
        self._asked.add(name)
        now = time.monotonic()
        return now - self._since.setdefault(name, now)

    def forget(self, name: Hashable) -> None:
        """Begin anew when the name is asked for next."""
        self._ends.pop(name, None)
        self._since.pop(name, None)

    def turn(self) -> None:
        """Forget what nobody has asked for since the last turn."""
        self._ends = {name: end for name, end in self._ends.items() if name in self._asked}
        self._since = {name: since for name, since in self._since.items() if name in self._asked}
        self._asked.clear()
