"""The stack's processes, and the supervisord configuration that runs them."""

import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.settings import CONFIG_VARIABLE, ENV_PREFIX
from coordinator.stack.folder import Stack, StackFolder, write_private
from coordinator.stack.kit import SETTINGS_FILE
from coordinator.stack.ports import LOOPBACK
from coordinator.stack.valkey import valkey_command

BROKER = "valkey"
COORDINATOR = "coordinator"  # and coordinator-2, coordinator-3, …
HTTP = "http"
FLOWER = "flower"
SITES = "sites"  # the group of all sites

MARK = "STACK_OF_FEDCHORD"  # the variable whose value, the stack's id, every process of the stack has

_CELERY = (sys.executable, "-m", "celery")
_LOG_BACKUPS = 2  # older files of a process's log, besides the one that is written
_STOP_SECONDS = 10  # a part that takes longer is done again after the next `up`


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process that supervisord keeps running."""

    name: str
    command: tuple[str, ...]
    folder: Path  # it runs in
    environment: Mapping[str, str] = field(default_factory=dict)
    priority: int  # started from the lowest, stopped from the highest


def stack_programs(folder: StackFolder, stack: Stack) -> tuple[list[Program], list[Program]]:
    """Return the programs that serve, and those of the sites."""
    coordinator = {CONFIG_VARIABLE: str(folder.settings_file)}
    serving = [
        Program(name=BROKER, command=tuple(valkey_command(folder)), folder=folder.path, priority=10),
        *(
            Program(
                name=name,
                # %% is supervisord's way to say %
                command=(*_CELERY, "-A", "coordinator", "worker", *_events(stack), "-n", f"{name}@%%h"),
                folder=folder.path,
                environment=coordinator,
                priority=20,
            )
            for name in coordinator_names(stack)
        ),
        Program(
            name=HTTP,
            command=(sys.executable, "-m", "coordinator.cli", "serve"),
            folder=folder.path,
            environment=coordinator,
            priority=20,
        ),
    ]
    if stack.flower_port is not None:
        serving.append(
            Program(
                name=FLOWER,
                command=(
                    *_CELERY, "-A", "coordinator", "flower", f"--address={LOOPBACK}", f"--port={stack.flower_port}"
                ),
                folder=folder.path,
                # not on the command line, which everybody on the machine can read
                environment={**coordinator, "FLOWER_BASIC_AUTH": f"fedchord:{stack.flower_password}"},
                priority=30,
            )
        )  # fmt: skip
    return serving, [_site(folder, stack, name) for name in stack.sites]


def coordinator_names(stack: Stack) -> list[str]:
    """Return the names of the coordinator's workers; before the @ they are also those of their Celery nodes."""
    return [COORDINATOR, *(f"{COORDINATOR}-{number}" for number in range(2, stack.num_coordinators + 1))]


def is_taken(name: str) -> bool:
    """Return whether a process of a stack that is no site has the name, or may get it."""
    return name in (BROKER, HTTP, FLOWER, "supervisord") or re.fullmatch(rf"{COORDINATOR}(-\d+)?", name) is not None


def _site(folder: StackFolder, stack: Stack, name: str) -> Program:
    return Program(
        name=name,
        command=(*_CELERY, "-A", "worker", "worker", *_events(stack), "-n", f"{name}@%%h"),
        folder=stack.working_folder,
        environment={
            CONFIG_VARIABLE: str(folder.site(name) / SETTINGS_FILE),
            "OMP_NUM_THREADS": "1",  # the sites share this machine's processors
        },
        priority=40,
    )


def _events(stack: Stack) -> tuple[str, ...]:
    """Return the option that lets Flower see tasks from the first one on; it asks for them only after 5 seconds."""
    return ("-E",) if stack.flower_port is not None else ()


def write_supervisor_file(folder: StackFolder, stack: Stack, *, log_megabytes: float) -> None:
    """Write supervisord's configuration, which holds Flower's password; `log_megabytes` is for each process."""
    log_bytes = _log_bytes(log_megabytes)
    serving, sites = stack_programs(folder, stack)
    sections = [
        _section(
            "unix_http_server",
            file=stack.supervisor_socket,
            chmod="0700",
        ),
        _section(
            "supervisord",
            logfile=folder.log("supervisord"),
            logfile_maxbytes=log_bytes,
            logfile_backups=_LOG_BACKUPS,
            pidfile=folder.supervisor_pid_file,
            childlogdir=folder.logs,
            directory=folder.path,
            identifier="fedchord",
        ),
        "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
        *(_program(folder, program, log_bytes) for program in (*serving, *sites)),
    ]
    if sites:  # one group, so that supervisord stops them all at once
        sections.append(
            _section(f"group:{SITES}", programs=",".join(site.name for site in sites), priority=sites[0].priority)
        )
    write_private(folder.supervisor_file, "\n\n".join(sections) + "\n")


def supervisor_environment(stack: Stack) -> dict[str, str]:
    """Return the environment of all the stack's processes: ours, without settings that would win over their files."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return {
        **inherited,
        MARK: stack.stack_id,
        "SPT_NOENV": "1",  # setproctitle, where Celery finds it, must not write over the mark
        "PYTHONUNBUFFERED": "1",
    }


def _log_bytes(megabytes: float) -> int:
    """Return how large one of a process's log files may become; 0, supervisord's word for it, without a bound."""
    return 0 if math.isinf(megabytes) else int(megabytes * 10**6) // (1 + _LOG_BACKUPS)


def _program(folder: StackFolder, program: Program, log_bytes: int) -> str:
    return _section(
        f"program:{program.name}",
        command=shlex.join(program.command),
        directory=program.folder,
        environment=",".join(f'{name}="{value}"' for name, value in program.environment.items()),
        priority=program.priority,
        autostart="true" if program.name == BROKER else "false",  # the others fail where there is no broker yet
        autorestart="true",
        startretries=2,
        stopwaitsecs=_STOP_SECONDS,
        killasgroup="true",  # a worker's children train; none outlives it
        redirect_stderr="true",
        stdout_logfile=folder.log(program.name),
        stdout_logfile_maxbytes=log_bytes,
        stdout_logfile_backups=_LOG_BACKUPS,
    )


def _section(title: str, **values: object) -> str:
    return "\n".join([f"[{title}]", *(f"{name} = {value}" for name, value in values.items())])
