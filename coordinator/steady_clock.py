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
        self._turns = 0
        self._asked: set[Hashable] = set()  # since the last turn

    def has_passed(self, name: Hashable, at: datetime, *, begun: datetime) -> bool:
        """Return whether the time has come of what has begun then.

        What is new since the last turn has begun since then, whatever the wall clock says; only what was there before
        this process was is told by it.
        """
        self._asked.add(name)
        known = self._ends.get(name)
        if known is None:
            length = (at - begun).total_seconds()
            left = length if self._turns else min((at - utc_now()).total_seconds(), length)
            known = self._ends[name] = (at, time.monotonic() + left)
        elif known[0] != at:
            known = self._ends[name] = (at, known[1] + (at - known[0]).total_seconds())
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
        self._turns += 1
        self._ends = {name: end for name, end in self._ends.items() if name in self._asked}
        self._since = {name: since for name, since in self._since.items() if name in self._asked}
        self._asked.clear()
