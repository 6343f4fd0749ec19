"""Leases of parts, and the files with which parts survive a process."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import StoreUnavailable
from common.messages import TrainingStart
from worker.leases import Leases
from worker.part_files import PartFiles
from worker.receipts import KEEP_SECONDS, Receipts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Leases(tmp_path / "leases").prepare()
    return tmp_path / "leases"


def part(**changes: Any) -> TrainingStart:
    values: dict[str, Any] = {"job_id": "job", "task_id": "task", "round": 0, "deadline_at": 0.0, "trainer": "t"}
    return TrainingStart(**values | {"shard_bytes": 1} | changes)


def test_a_part_is_in_one_hand_and_another_part_in_another(folder: Path) -> None:
    held = Leases(folder).take("task")
    assert held is not None
    with held:
        assert Leases(folder).take("task") is None
        other = Leases(folder).take("other")
        assert other is not None
        with other:
            pass
    again = Leases(folder).take("task")
    assert again is not None
    with again:
        pass
    assert list(folder.iterdir()) == []


def test_the_end_of_a_job_forgets_its_parts_but_for_those_in_hand(folder: Path) -> None:
    leases = Leases(folder)
    for task_id in ("job.1", "job.2", "job2.1"):
        (folder / task_id).write_bytes(b".")
    held = leases.take("job.2")
    assert held is not None
    with held:
        leases.forget_job("job")
        assert sorted(path.name for path in folder.iterdir()) == ["job.2", "job2.1"]
        assert Leases(folder).take("job.2") is None
    leases.forget_job("job")
    assert [path.name for path in folder.iterdir()] == ["job2.1"]


def test_how_often_a_part_was_begun_is_known_until_it_is_answered(folder: Path) -> None:
    for begun in (1, 2):
        lease = Leases(folder).take("task")
        assert lease is not None
        assert lease.count_begin() == begun
        lease.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    for begun in (3, 1):
        lease = Leases(folder).take("task")
        assert lease is not None
        with lease:
            assert lease.count_begin() == begun


def test_an_answer_outlives_the_process_and_becomes_the_receipt(folder: Path) -> None:
    receipts = Receipts(folder)
    first = Leases(folder).take("task")
    assert first is not None
    assert (first.count_begin(), first.answer()) == (1, b"")
    first.keep_answer(b"a long answer")
    first.keep_answer(b"answer")
    first.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    second = Leases(folder).take("task")
    assert second is not None
    with second:
        assert second.answer() == b"answer"
        assert receipts.find("task") is None
        second.hand_over(receipts.path("task"))
        assert receipts.find("task") == b"answer"
        third = Leases(folder).take("task")  # a copy of the message may be looked at while the answer is sent
        assert third is not None
        with third:
            assert third.answer() == b""
    assert [path.name for path in folder.iterdir()] == ["task.answer"]


def test_an_answer_that_cannot_be_used_is_dropped_when_the_part_is_begun_again(folder: Path) -> None:
    lease = Leases(folder).take("task")
    assert lease is not None
    with lease:
        lease.count_begin()
        lease.keep_answer(b"answer")
        assert (lease.count_begin(), lease.answer()) == (2, b"")
    assert list(folder.iterdir()) == []


def test_an_answer_of_which_there_is_no_receipt_stays(folder: Path) -> None:
    lease = Leases(folder).take("task")
    assert lease is not None
    with lease:
        lease.keep_answer(b"answer")
        with pytest.raises(StoreUnavailable):
            lease.hand_over(folder / "gone" / "task.answer")
    again = Leases(folder).take("task")
    assert again is not None
    with again:
        assert again.answer() == b"answer"


def test_a_lease_in_a_folder_that_is_gone_is_told(folder: Path) -> None:
    folder.rmdir()
    with pytest.raises(StoreUnavailable):
        Leases(folder).take("task")


def test_leases_that_no_message_can_be_about_are_forgotten_at_the_start(folder: Path) -> None:
    for name in ("old", "new"):
        (folder / name).write_bytes(b".")
    long_ago = time.time() - KEEP_SECONDS - 60
    os.utime(folder / "old", (long_ago, long_ago))
    Leases(folder).prepare()
    assert [path.name for path in folder.iterdir()] == ["new"]


@pytest.mark.parametrize(("later_seconds", "left"), [(1700, ["task@file"]), (1900, [])])
def test_what_a_part_has_left_is_removed_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later_seconds: float, left: list[str]
) -> None:
    files = PartFiles(tmp_path / "files", keep_seconds=1800)
    files.prepare()
    path = files.path(part(), "file")
    path.touch()
    os.utime(path, (0, 0))  # as a file that was linked from the store, which has it for long
    now = time.time() + later_seconds
    monkeypatch.setattr(time, "time", lambda: now)
    files.prepare()
    assert [path.name for path in files.folder.iterdir()] == left


def test_a_part_s_files_and_a_job_s_are_forgotten(tmp_path: Path) -> None:
    files = PartFiles(tmp_path, keep_seconds=1800)
    for task_id in ("job.1", "job.10", "job.2", "job2.1"):
        files.path(part(task_id=task_id), "file").touch()
        (tmp_path / f".{files.name(part(task_id=task_id), 'begun')}").touch()
    files.forget(part(task_id="job.1"))
    files.forget(part(task_id="job.1"))
    assert {path.name.removeprefix(".").partition("@")[0] for path in tmp_path.iterdir()} == {
        "job.10",
        "job.2",
        "job2.1",
    }
    files.forget_job("job")
    assert {path.name for path in tmp_path.iterdir()} == {"job2.1@file", ".job2.1@begun"}


def test_files_in_a_folder_that_is_gone_are_forgotten(tmp_path: Path) -> None:
    PartFiles(tmp_path / "gone", keep_seconds=1800).forget(part())
