"""Receipts: the answers that a site has given."""

import os
import time
from pathlib import Path

import pytest

from common.errors import InvalidMessage
from worker.receipts import KEEP_SECONDS, Receipts, prepare_receipts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare_receipts(tmp_path / "receipts")
    return tmp_path / "receipts"


def test_an_answer_is_found_again_by_its_part(folder: Path) -> None:
    Receipts(folder).path("task").write_bytes(b"..answer")
    assert Receipts(folder).find("task") == b"answer"
    assert Receipts(folder).find("other") is None
    assert [file.name for file in folder.iterdir()] == ["task.answer"]


def test_a_receipt_that_cannot_be_read_counts_as_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "empty.answer").touch()
    (folder / "begun.answer").write_bytes(b"..")
    (folder / "folder.answer").mkdir()
    assert Receipts(folder).find("empty") is None
    assert Receipts(folder).find("begun") is None
    assert Receipts(folder).find("folder") is None
    assert caplog.text.count("Cannot read the receipt") == 1


def test_receipts_older_than_seven_days_are_forgotten_at_the_start(folder: Path) -> None:
    for name in ("old", "new"):
        Receipts(folder).path(name).write_bytes(b"answer")
    long_ago = time.time() - KEEP_SECONDS - 60
    os.utime(folder / "old.answer", (long_ago, long_ago))
    prepare_receipts(folder)
    assert KEEP_SECONDS == 7 * 24 * 3600  # no round's deadline is later
    assert [file.name for file in folder.iterdir()] == ["new.answer"]


@pytest.mark.parametrize("task_id", ["", "..", ".a", "a/b", "a b", "x" * 161, "a\n"])
def test_an_id_that_is_not_safe_as_a_file_name_is_refused(folder: Path, task_id: str) -> None:
    with pytest.raises(InvalidMessage):
        Receipts(folder).find(task_id)
