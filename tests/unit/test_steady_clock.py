"""How long something has lasted, while the wall clock jumps."""

from datetime import UTC, datetime, timedelta

import pytest

from coordinator import steady_clock
from coordinator.steady_clock import SteadyClock

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)


class Clock:
    """The wall clock and the steady one, as a test sets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.steady = NOON, 100.0
        monkeypatch.setattr(steady_clock, "utc_now", lambda: self.wall)
        monkeypatch.setattr(steady_clock.time, "monotonic", lambda: self.steady)

    def pass_(self, seconds: float, *, jump: float = 0) -> None:
        self.steady += seconds
        self.wall += timedelta(seconds=seconds + jump)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("jump", [0, 3600, -3600])
def test_a_deadline_passes_when_its_time_has_gone_by_however_the_clock_is_set(clock: Clock, jump: float) -> None:
    seen, deadline = SteadyClock(), NOON + timedelta(seconds=60)
    assert not seen.has_passed("round", deadline, begun=NOON)
    clock.pass_(30, jump=jump)
    assert not seen.has_passed("round", deadline, begun=NOON)
    clock.pass_(29)
    assert not seen.has_passed("round", deadline, begun=NOON)
    clock.pass_(1)
    assert seen.has_passed("round", deadline, begun=NOON)


def test_a_deadline_that_was_moved_counts_anew(clock: Clock) -> None:
    seen = SteadyClock()
    assert seen.has_passed("round", NOON, begun=NOON)
    assert not seen.has_passed("round", NOON + timedelta(seconds=10), begun=NOON)
    clock.pass_(10)
    assert seen.has_passed("round", NOON + timedelta(seconds=10), begun=NOON)


def test_seconds_count_from_the_first_time_until_it_is_forgotten(clock: Clock) -> None:
    seen = SteadyClock()
    assert seen.seconds("site") == 0
    clock.pass_(5, jump=-100)
    assert seen.seconds("site") == 5
    seen.forget("site")
    assert seen.seconds("site") == 0


def test_what_nobody_asks_for_any_more_is_forgotten(clock: Clock) -> None:
    seen = SteadyClock()
    seen.seconds("stays"), seen.seconds("goes")
    seen.turn()
    clock.pass_(5)
    assert seen.seconds("stays") == 5
    seen.turn()
    assert (seen.seconds("stays"), seen.seconds("goes")) == (5, 0)


@pytest.mark.parametrize("jump", [0, 3600, -3600])
def test_what_is_new_since_the_last_turn_has_begun_since_then(clock: Clock, jump: float) -> None:
    seen = SteadyClock()
    seen.turn()
    clock.pass_(1, jump=jump)  # the clock is set between the plan of the round and the first look at it
    deadline = NOON + timedelta(seconds=60)
    assert not seen.has_passed("round", deadline, begun=NOON)
    clock.pass_(59)
    assert not seen.has_passed("round", deadline, begun=NOON)
    clock.pass_(1)
    assert seen.has_passed("round", deadline, begun=NOON)


def test_what_was_there_before_the_process_is_told_by_the_wall_clock(clock: Clock) -> None:
    deadline = NOON + timedelta(seconds=60)
    clock.pass_(30)
    seen = SteadyClock()
    assert not seen.has_passed("round", deadline, begun=NOON)
    clock.pass_(30)
    assert seen.has_passed("round", deadline, begun=NOON)
    clock.pass_(0, jump=-7200)  # but never longer than it was to last
    later = SteadyClock()
    assert not later.has_passed("round", deadline, begun=NOON)
    clock.pass_(60)
    assert later.has_passed("round", deadline, begun=NOON)
