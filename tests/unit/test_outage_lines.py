"""Outages are told of once when they begin and once when they are over; repeated lines are written once."""

import logging

import pytest

from common.errors import BrokerUnavailable, DatabaseUnavailable, DiskFull, StoreUnavailable
from common.logs import RepeatFilter
from coordinator.outages import Outages


def test_an_outage_is_told_of_when_the_first_waits_and_when_the_last_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    outages = Outages()
    outages.wait("a", DatabaseUnavailable("It is locked."))
    for _ in range(3):
        outages.wait("b", DatabaseUnavailable("It is locked."))
    outages.go_on("a")
    outages.go_on("other")
    assert [record.message for record in caplog.records] == [
        "The database cannot be used; what needs it waits, and is tried again every few seconds: It is locked."
    ]
    outages.go_on("b")
    assert caplog.messages[1:] == ["The database can be used again after 0 s; going on."]
    outages.wait("a", DatabaseUnavailable("It is locked."))
    assert len(caplog.messages) == 3


def test_each_service_has_its_own_outage(caplog: pytest.LogCaptureFixture) -> None:
    outages = Outages()
    for error in (BrokerUnavailable("b"), StoreUnavailable("s"), DiskFull("d")):
        outages.wait("a", error)
    assert [message.partition(" cannot")[0] for message in caplog.messages] == [
        "The broker",
        "The object store",
        "The disk",
    ]


def test_what_another_process_has_done_is_not_waited_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    outages = Outages()
    monkeypatch.setattr("coordinator.outages.time.monotonic", lambda: 0.0)
    outages.wait("a", DatabaseUnavailable("It is locked."))
    monkeypatch.setattr("coordinator.outages.time.monotonic", lambda: 61.0)
    outages.go_on("other")
    assert caplog.messages[-1] == "The database can be used again after 61 s; going on."


def line(level: int, message: str, **fields: object) -> logging.LogRecord:
    record = logging.LogRecord("x", level, "x.py", 1, message, (), None)
    vars(record).update(fields)
    return record


def test_a_warning_that_is_repeated_is_written_once_until_it_has_paused_for_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repeats = RepeatFilter()
    times = [0.0, 30.0, 60.0, 119.0, 180.0]
    written = []
    for now in times:
        monkeypatch.setattr("common.logs.time.monotonic", lambda now=now: now)
        written.append(repeats.filter(line(logging.WARNING, "It may not have been sent.")))
    assert written == [True, False, False, False, True]


def test_another_round_s_warning_and_every_other_line_is_written() -> None:
    repeats = RepeatFilter()
    lines = [line(logging.WARNING, "Asking.", round=1), line(logging.WARNING, "Asking.", round=2)]
    lines += [line(logging.INFO, "Closed."), line(logging.INFO, "Closed.")]
    assert all(repeats.filter(each) for each in lines)
