"""Coordinators, sites and commands as real processes that can be killed, stopped, filled up and started again."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.federation import ROOT, Federation, clean_environment, wait_until
from tests.servers import die_with_parent

TRAINERS = {"constant": "benchmarks.constant:ConstantTrainer", "slow": "tests.chaos.trainers:SlowTrainer"}


@dataclass(kw_only=True)
class Program:
    """A program of ours, its log, and the process that runs it now."""

    arguments: Sequence[str]  # of tests.chaos.faulty
    log: Path
    folder: Path  # CHAOS_FOLDER
    environment: Mapping[str, str]
    process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    def start(self) -> "subprocess.Popen[bytes]":
        """Run it in a process group of its own."""
        self.folder.mkdir(exist_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.faulty", *self.arguments],
                cwd=ROOT,
                env={**clean_environment(), **self.environment, "CHAOS_FOLDER": str(self.folder)},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        return self.process

    @property
    def is_running(self) -> bool:
        """Return whether the process has not ended."""
        return self.process is not None and self.process.poll() is None

    def children(self) -> list[psutil.Process]:
        """Return the process's children."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def signal_all(self, number: signal.Signals) -> None:
        """Send the signal to the whole process group."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End the whole group at once."""
        if self.process is not None:
            self.signal_all(signal.SIGCONT)
            self.signal_all(signal.SIGKILL)
            self.process.wait()

    def kill_parent(self) -> None:
        """End the parent alone; its children notice that by themselves."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def kill_child(self) -> None:
        """End the children alone."""
        for child in self.children():
            with suppress(psutil.NoSuchProcess):
                child.kill()

    def end(self) -> None:
        """Ask it to end in peace; end it at once if it does not."""
        if self.is_running:
            assert self.process is not None
            self.signal_all(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.kill()

    def fill_disk(self, most_bytes: int | None) -> None:
        """Let no file of the process grow beyond so many bytes, as on a disk that is full; None: the disk is free."""
        assert self.process is not None
        limit = resource.RLIM_INFINITY if most_bytes is None else most_bytes
        for pid in [self.process.pid, *(child.pid for child in self.children())]:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def set_clock(self, seconds: float) -> None:
        """Let its clock be so many seconds ahead from now on."""
        write_whole(self.folder / "clock", str(seconds))

    def aim(self, point: str, *, number: int = 1, whole: bool = True) -> None:
        """Let it die the next time that it passes the point, or the so manieth."""
        write_whole(self.folder / "target", json.dumps({"point": point, "pass": number, "whole": whole}))

    def is_hit(self) -> bool:
        """Return whether the target has been hit; forget it."""
        if (self.folder / "died").exists():
            (self.folder / "died").unlink()
            return True
        return False

    def wait_hit(self) -> None:
        """Wait until it has died at the target."""
        wait_until(self.is_hit, what="the target to be hit")
        assert self.process is not None
        self.process.wait()

    def spare(self) -> None:
        """Take the target away; it was not hit."""
        (self.folder / "target").unlink(missing_ok=True)

    def passed(self) -> list[str]:
        """Return the points that were passed so far, each once, in the order of their first pass."""
        path = self.folder / "passed"
        return list(dict.fromkeys(path.read_text().splitlines())) if path.exists() else []

    def said(self) -> str:
        """Return the log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    path.parent.mkdir(exist_ok=True)
    temporary.write_text(text)
    temporary.rename(path)


def coordinator(made: Federation, name: str = "coordinator") -> Program:
    """Return a coordinator worker of the federation; it is not started."""
    return Program(
        arguments=["celery", "-A", "coordinator", "worker", "-n", f"{name}@chaos"],
        log=made.folder / f"{name}.log",
        folder=made.folder / f"chaos-{name}",
        environment={"FEDCHORD_CONFIG": str(made.config)},
    )


def command(made: Federation, *arguments: str) -> Program:
    """Return a `fedchord` command of the federation; it is not started."""
    return Program(
        arguments=["fedchord", *arguments],
        log=made.folder / "command.log",
        folder=made.folder / "chaos-command",
        environment={"FEDCHORD_CONFIG": str(made.config)},
    )


def site(made: Federation, name: str, **settings: Any) -> Program:
    """Return an enrolled site's worker, with the trainers of TRAINERS; it is not started."""
    folder = made.folder / name
    folder.mkdir(exist_ok=True)
    made.sites[name].key.save(folder / "signing.key")
    ours = made.services.settings
    values = {
        "broker_url": ours.broker_url.get_secret_value(),
        "blob_folder": str(ours.blob_folder),
        "site_name": name,
        "coordinator_public_key": made.services.key.public_key,
        "heartbeat_seconds": 0.5,
        **settings,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    lines.append(
        f"site_trainers = {{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in TRAINERS.items())} }}"
    )
    (folder / "site.toml").write_text("\n".join(lines))
    return Program(
        arguments=["celery", "-A", "worker", "worker"],
        log=made.folder / f"{name}.log",
        folder=made.folder / f"chaos-{name}",
        environment={"FEDCHORD_CONFIG": str(folder / "site.toml"), "CHAOS_SITE": "yes"},
    )


@contextmanager
def running(*programs: Program) -> Iterator[None]:
    """Start the programs; end them at the end, whichever processes run them then."""
    try:
        for program in programs:
            program.start()
        yield
    finally:
        for program in programs:
            if program.is_running:
                assert program.process is not None
                program.signal_all(signal.SIGCONT)
                program.process.send_signal(signal.SIGTERM)  # all of them first: they end side by side
        for program in programs:
            program.end()


def is_ready(program: Program) -> bool:
    """Return whether a worker has said that it is ready."""
    return " ready." in program.said()


def wait_ready(*programs: Program) -> None:
    """Wait until the workers have said that they are ready."""
    wait_until(lambda: all(is_ready(program) for program in programs), seconds=60, what="the workers to be ready")
