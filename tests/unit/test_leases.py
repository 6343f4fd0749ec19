"""Leases of parts, and the folders in which parts leave what is to survive a process."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import StoreUnavailable
from common.messages import TrainingStart
from worker.leases import Leases, prepare_leases
from worker.part_folders import PartFolders, prepare_part_folders
from worker.receipts import KEEP_SECONDS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare_leases(tmp_path / "leases")
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


def test_a_lease_in_a_folder_that_is_gone_is_told(folder: Path) -> None:
    folder.rmdir()
    with pytest.raises(StoreUnavailable):
        Leases(folder).take("task")


def test_leases_that_no_message_can_be_about_are_forgotten_at_the_start(folder: Path) -> None:
    for name in ("old", "new"):
        (folder / name).write_bytes(b".")
    long_ago = time.time() - KEEP_SECONDS - 60
    os.utime(folder / "old", (long_ago, long_ago))
    prepare_leases(folder)
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_what_was_left_in_a_part_s_folder_is_removed_when_nothing_in_it_is_new(tmp_path: Path) -> None:
    folders = PartFolders(tmp_path)
    long_ago = time.time() - 3600
    for task_id, newest in (("old", long_ago), ("new", time.time())):
        path = folders.path(part(task_id=task_id))
        path.mkdir(parents=True)
        (path / "file").touch()
        os.utime(path / "file", (newest, newest))
        os.utime(path, (long_ago, long_ago))
    prepare_part_folders(tmp_path, keep_seconds=1800)
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["new"]


def test_a_part_s_folder_and_a_job_s_are_forgotten(tmp_path: Path) -> None:
    folders = PartFolders(tmp_path)
    for task_id in ("one", "two"):
        folders.path(part(task_id=task_id)).mkdir(parents=True)
    folders.forget(part(task_id="one"))
    folders.forget(part(task_id="one"))
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["two"]
    folders.forget_job("job")
    assert list(tmp_path.iterdir()) == []
