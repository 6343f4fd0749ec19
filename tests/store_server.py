"""Run a model store's service as a process of its own, with its records and blobs in a folder."""

import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.settings import Settings
from tests.servers import die_with_parent

_READY_SECONDS = 30
_PROGRAM = """
from common.logs import set_up_logs
from common.settings import Settings
from store.opening import open_store
from store.service.app import make_app
from store.service.serving import serve

settings = Settings.load()
set_up_logs(settings.log_level, settings.log_format)
with open_store(settings) as store:
    serve(make_app(store), settings, ready=lambda url: print(url, flush=True))
"""


@dataclass(frozen=True, kw_only=True)
class StoreServer:
    """A running service."""

    url: str  # without a slash at its end
    port: int
    folder: Path  # everything that it keeps
    settings: Settings  # what it runs with
    process: subprocess.Popen[bytes]


def store_settings(folder: Path, **more: str) -> dict[str, str]:
    """Return the variables of a node whose records and blobs are in the folder."""
    values = {
        "database_url": f"sqlite:///{folder / 'records.db'}",
        "blob_folder": str(folder / "blobs"),
        "cache_folder": str(folder / "cache"),
        "store_key_file": str(folder / "store.key"),
        "http_port": "0",
        **more,
    }
    return {f"FEDCHORD_{name.upper()}": value for name, value in values.items()}


@contextmanager
def store_server(folder: Path, **more: str) -> Iterator[StoreServer]:
    """Run the service; `more` are settings by name."""
    variables = store_settings(folder, **more)
    log = (folder / "service.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        env=_environment(variables),
        preexec_fn=die_with_parent,
        start_new_session=True,
    )
    try:
        url = _first_line(process)
        if not url:
            raise RuntimeError((folder / "service.log").read_text(errors="replace")[-4000:])
        yield StoreServer(
            url=url,
            port=int(url.rpartition(":")[2]),
            folder=folder,
            settings=Settings.model_validate(
                {name.removeprefix("FEDCHORD_").lower(): value for name, value in variables.items()}
            ),
            process=process,
        )
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        log.close()


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("FEDCHORD_")}
    return {**others, **variables}


def _first_line(process: subprocess.Popen[bytes]) -> str:
    """Return the first line that the process prints, empty when it ends or takes too long."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline().decode().strip() if selector.select(_READY_SECONDS) else ""
