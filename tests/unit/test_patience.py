"""How long a transfer is tried: with a clock that the test sets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise

import pytest

from common.errors import StoreUnavailable
from store import patience as module
from store.patience import Outages, PassingError, Patience, read_retry_after, repeat

NOW = 1_700_000_000.0  # unix time, seconds


@dataclass
class Clock:
    """Time that passes only when somebody sleeps, or when it is told to."""

    now: float = NOW
    slept: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@dataclass
class Steps:
    """An attempt that does the next step each time."""

    steps: list[Callable[[], None]]

    def run(self) -> None:
        self.steps.pop(0)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(module.random, "uniform", lambda least, most: most)
    return made


def new_patience(seconds: float = 600.0, *, pause_seconds: float = 0.2) -> Patience:
    return Patience(seconds, pause_seconds=pause_seconds, host="store", outages=Outages(), watch=lambda position: None)


def fail(*, retry_after_seconds: float = 0.0) -> None:
    raise PassingError("away", retry_after_seconds=retry_after_seconds)


def test_pauses_double_up_to_ten_seconds(clock: Clock) -> None:
    pauses: list[float] = []

    def step() -> None:
        pauses.append(clock.now)
        fail()

    with pytest.raises(StoreUnavailable, match="for 60 s"):
        repeat(Steps([step] * 99), new_patience(60), "x")
    gaps = [round(after - before, 3) for before, after in pairwise(pauses)]
    assert gaps == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10, 10, 7.4]  # 60 in all
    assert max(clock.slept) == 0.5  # in between it is asked whether the transfer is wanted


def test_a_line_that_gets_on_is_never_given_up(clock: Clock) -> None:
    patience = new_patience(60)

    def move_to(position: int) -> Callable[[], None]:
        def step() -> None:
            clock.now += 55
            patience.moved(position)
            fail()

        return step

    repeat(Steps([*map(move_to, range(1, 100)), lambda: None]), patience, "x")
    assert clock.now - NOW > 99 * 55


def test_bytes_that_move_again_and_again_use_patience_up_by_the_time_in_which_none_does(clock: Clock) -> None:
    patience = new_patience(60)
    runs: list[float] = []

    def step() -> None:  # an upload that is cut in the same place each time
        for position in (1, 2, 3):
            clock.now += 100
            patience.moved(position)
        runs.append(clock.now)
        fail()

    with pytest.raises(StoreUnavailable, match="for 60 s"):
        repeat(Steps([step] * 99), patience, "x")
    assert len(runs) == 12  # the pauses are 60 s, as above; the 300 s of each attempt do not count


def test_a_first_silence_is_not_the_end_even_if_it_takes_longer_than_patience(clock: Clock) -> None:
    def silence() -> None:
        clock.now += 60
        fail()

    repeat(Steps([silence, lambda: None]), new_patience(10), "x")
    with pytest.raises(StoreUnavailable, match="for 120 s"):
        repeat(Steps([silence, silence]), new_patience(10), "x")


@pytest.mark.parametrize(("asked", "pause"), [(0.0, 0.2), (7.0, 7.2), (30.0, 30.2), (1e9, 30.2)])
def test_a_server_may_ask_for_a_longer_pause_within_bounds(clock: Clock, asked: float, pause: float) -> None:
    repeat(Steps([lambda: fail(retry_after_seconds=asked), lambda: None]), new_patience(), "x")
    assert clock.now - NOW == pytest.approx(pause)


def test_a_pause_does_not_outlast_patience(clock: Clock) -> None:
    with pytest.raises(StoreUnavailable):
        repeat(Steps([lambda: fail(retry_after_seconds=30)] * 9), new_patience(5), "x")
    assert clock.now - NOW == pytest.approx(5)


def test_a_store_that_is_away_for_half_a_minute_is_asked_soon_after_it_is_back(clock: Clock) -> None:
    def step() -> None:
        if clock.now < NOW + 30:
            fail()

    repeat(Steps([step] * 99), new_patience(), "x")
    assert 30 <= clock.now - NOW <= 40


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0.0),
        ("", 0.0),
        ("120", 120.0),
        (" 5 ", 5.0),
        ("-5", 0.0),
        ("soon", 0.0),
        ("9" * 400, float("inf")),
        (format_datetime(datetime.fromtimestamp(NOW, UTC) + timedelta(seconds=9), usegmt=True), 9.0),
        (format_datetime(datetime.fromtimestamp(NOW, UTC) - timedelta(seconds=9), usegmt=True), 0.0),
    ],
)
def test_retry_after_is_read_in_both_of_its_forms(clock: Clock, value: str | None, seconds: float) -> None:
    assert read_retry_after(value) == seconds
