"""An embedded stack's logs: bounded by size in supervisord's configuration, by age in the clean-up."""

import os
import time
from math import inf
from pathlib import Path

import pytest

from common.settings import Settings
from coordinator.stack.folder import Stack, StackFolder
from coordinator.stack.old_logs import OldLog, clean_logs, find_old_logs
from coordinator.stack.programs import write_supervisor_file
from coordinator.stack.settings_file import write_settings

DAY = 24 * 3600.0


def write(path: Path, *, days_ago: float) -> Path:
    path.write_bytes(b"a line\n")
    written = time.time() - days_ago * DAY
    os.utime(path, (written, written))
    return path


def test_old_logs_are_removed_and_one_that_may_be_open_is_emptied(tmp_path: Path) -> None:
    settings = Settings(log_folder=tmp_path, keep_logs_days=30)
    silent = write(tmp_path / "site-1.log", days_ago=31)
    rotated = write(tmp_path / "coordinator.log.2", days_ago=31)
    young = [write(tmp_path / name, days_ago=29) for name in ("coordinator.log", "coordinator.log.1")]
    other = write(tmp_path / "notes.txt", days_ago=1000)
    expected = [OldLog(path=rotated, bytes=7), OldLog(path=silent, bytes=7)]
    assert find_old_logs(settings) == expected
    with silent.open("ab") as file:  # as supervisord has it
        assert clean_logs(settings) == expected
        file.write(b"and on\n")
    assert silent.read_bytes() == b"and on\n"
    assert sorted(tmp_path.iterdir()) == sorted([silent, other, *young])
    assert clean_logs(settings) == []


def test_logs_stay_for_ever_if_asked_for_and_where_there_is_no_stack(tmp_path: Path) -> None:
    write(tmp_path / "site-1.log.1", days_ago=10_000)
    assert find_old_logs(Settings(log_folder=tmp_path, keep_logs_days=inf)) == []
    assert find_old_logs(Settings(log_folder=tmp_path / "none")) == []
    assert find_old_logs(Settings()) == []


@pytest.mark.parametrize(("megabytes", "bytes_of_one_file"), [(30, 10_000_000), (1, 333_333), (inf, 0)])
def test_a_processs_logs_are_bounded_together(tmp_path: Path, megabytes: float, bytes_of_one_file: int) -> None:
    folder = StackFolder(tmp_path)
    stack = Stack(
        sites=("site-1",), working_folder=tmp_path, broker_port=1, http_port=2, supervisor_socket=tmp_path / "socket"
    )
    write_supervisor_file(folder, stack, log_megabytes=megabytes)
    written = folder.supervisor_file.read_text().splitlines()
    assert written.count(f"stdout_logfile_maxbytes = {bytes_of_one_file}") == 4
    assert written.count("stdout_logfile_backups = 2") == 4
    assert f"logfile_maxbytes = {bytes_of_one_file}" in written


def test_a_bound_that_is_none_survives_the_rewriting_of_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "fedchord.toml"
    file.write_text('keep_updates_days = inf\nlog_folder = "logs"\n')
    for _ in range(2):
        write_settings(file, {"http_port": 0}, heading="A stack.")
        settings = Settings.load(file)
        assert (settings.keep_updates_days, settings.log_folder) == (inf, tmp_path / "logs")
