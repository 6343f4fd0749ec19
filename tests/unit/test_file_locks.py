"""A file that one process at a time has, through forks, kills and renames."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from store.file_locks import open_alone

HOLDER = """
import os, sys, time
from pathlib import Path
from store.file_locks import open_alone

held = open_alone(Path(sys.argv[1]))
child = os.fork()
if child == 0:  # like a data loader's process, which may outlive a trainer's
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


def test_a_file_is_one_holder_s_until_it_is_closed(tmp_path: Path) -> None:
    first = open_alone(tmp_path / "file")
    assert first is not None
    assert open_alone(tmp_path / "file") is None
    first.write(b"kept")
    first.close()
    second = open_alone(tmp_path / "file")
    assert second is not None
    with second:
        assert second.read() == b"kept"


def test_a_file_that_was_renamed_is_not_what_the_next_one_gets(tmp_path: Path) -> None:
    first = open_alone(tmp_path / "file")
    assert first is not None
    (tmp_path / "file").rename(tmp_path / "done")
    second = open_alone(tmp_path / "file")
    assert second is not None
    with first, second:
        assert not os.path.sameopenfile(first.fileno(), second.fileno())


def test_a_killed_holder_gives_the_file_back_even_if_a_child_of_it_lives_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            assert open_alone(tmp_path / "file") is None
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # it lives
            file = open_alone(tmp_path / "file")
            assert file is not None
            file.close()
        finally:
            os.kill(child, signal.SIGKILL)
