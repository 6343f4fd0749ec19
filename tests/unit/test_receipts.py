"""Receipts: the answers that a site has given."""

import os
import time
from pathlib import Path

import pytest

from common.errors import InvalidMessage, StoreUnavailable
from worker.receipts import KEEP_SECONDS, Receipts, prepare_receipts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare_receipts(tmp_path / "receipts")
    return tmp_path / "receipts"


def test_an_answer_is_found_again_by_part_and_attempt(folder: Path) -> None:
    Receipts(folder).keep("task", 1, b"answer")
    assert Receipts(folder).find("task", 1) == b"answer"
    assert Receipts(folder).find("task", 2) is None
    assert Receipts(folder).find("other", 1) is None
    assert [file.name for file in folder.iterdir()] == ["task.1"]


def test_the_last_of_two_answers_stays_whole(folder: Path) -> None:
    receipts = Receipts(folder)
    receipts.keep("task", 1, b"first answer, a long one")
    receipts.keep("task", 1, b"second")
    assert receipts.find("task", 1) == b"second"


def test_a_receipt_that_cannot_be_read_counts_as_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "empty.1").touch()
    (folder / "folder.1").mkdir()
    assert Receipts(folder).find("empty", 1) is None
    assert Receipts(folder).find("folder", 1) is None
    assert caplog.text.count("Cannot read the receipt") == 1


def test_repeats_are_counted_across_processes(folder: Path) -> None:
    assert [Receipts(folder).count_repeat("task", 1) for _ in range(3)] == [1, 2, 3]
    assert Receipts(folder).count_repeat("task", 2) == 1
    assert Receipts(folder).find("task", 1) is None


def test_receipts_older_than_seven_days_are_forgotten_at_the_start(folder: Path) -> None:
    receipts = Receipts(folder)
    receipts.keep("old", 1, b"answer")
    receipts.keep("new", 1, b"answer")
    long_ago = time.time() - KEEP_SECONDS - 60
    os.utime(folder / "old.1", (long_ago, long_ago))
    prepare_receipts(folder)
    assert KEEP_SECONDS == 7 * 24 * 3600  # no round's deadline is later
    assert [file.name for file in folder.iterdir()] == ["new.1"]


def test_a_folder_that_is_gone_is_told_and_nothing_is_left(folder: Path) -> None:
    folder.rmdir()
    with pytest.raises(StoreUnavailable):
        Receipts(folder).keep("task", 1, b"answer")


@pytest.mark.parametrize("task_id", ["", "..", ".a", "a/b", "a b", "x" * 161, "a\n"])
def test_an_id_that_is_not_safe_as_a_file_name_is_refused(folder: Path, task_id: str) -> None:
    with pytest.raises(InvalidMessage):
        Receipts(folder).find(task_id, 1)
