"""Run `fedchord` as people do: real processes, in a folder of their own."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TRAINER = """\
import time

import numpy as np

from worker.trainer import Evaluation, Fit, Trainer


class Counting(Trainer):
    def build(self):
        return {"count": np.zeros(3, np.float32)}

    def fit(self, tensors, step):
        time.sleep(0.05)  # training takes its time
        return Fit(tensors={"count": tensors["count"] + 1}, num_examples=1)

    def evaluate(self, tensors, step):
        return Evaluation(num_examples=1, metrics={"count": float(tensors["count"][0])})

    def num_examples(self):
        return 1
"""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed with --json."""
        return json.loads(self.out)


class Workplace:
    """A folder in which somebody works with `fedchord` and a stack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = folder / "fedchord-stack"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        (folder / "counting.py").write_text(TRAINER)

    def run(self, *arguments: str, code: int = 0, seconds: float = 100, largest_file: int | None = None) -> Ended:
        """Run the command to its end; fail unless it ends with the code in so many seconds."""
        with self.start(*arguments, largest_file=largest_file) as process:
            try:
                out, err = process.communicate(timeout=seconds)
            except BaseException:
                process.kill()
                raise
        ended = Ended(code=process.returncode, out=out, err=err)
        assert ended.code == code, ended
        return ended

    def start(self, *arguments: str, largest_file: int | None = None) -> subprocess.Popen[str]:
        """Start the command; with a limit in bytes, files cannot grow past it, as on a disk that is full."""

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would its heirs
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        return subprocess.Popen(
            [sys.executable, "-c", "from coordinator.cli import main; main()", *arguments],
            cwd=self.folder,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )

    def up(self, *more: str) -> Any:
        """Start a stack of two sites that can count."""
        return self.run("up", "--sites", "2", "--trainer", "counting=counting:Counting", "--json", *more).json

    def job_file(self, *, rounds: int) -> str:
        """Write a job file; return its name."""
        text = f'name = "count"\ntrainer = "counting"\nrounds = {rounds}\nmin_sites = 2\nround_deadline_seconds = 60\n'
        (self.folder / "job.toml").write_text(text)
        return "job.toml"

    def processes(self) -> list[psutil.Process]:
        """Return every process that has something to do with this folder."""
        return [process for process in psutil.process_iter() if _mentions(process, str(self.folder))]


def _mentions(process: psutil.Process, text: str) -> bool:
    """Return whether the process runs, and its command, folder or environment has the text in it."""
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        known = [*process.cmdline(), process.cwd(), *process.environ().values()]
    except (psutil.Error, OSError):
        return False
    return any(text in each for each in known)


def wait_for(fact: Callable[[], object], *, seconds: float, what: str) -> None:
    """Ask until the fact holds; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
