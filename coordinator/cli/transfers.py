"""Show how far a transfer is, for people who watch; write what comes to files that are whole or not there."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from common.errors import InvalidInput
from coordinator.cli.reach import StoreApi
from store.blobs import disk_errors
from store.export import new_file
from store.index import INDEX_FILE, shard_file
from store.local import LocalApi


@contextmanager
def reading_file(path: Path) -> Iterator[BinaryIO]:
    """Lend the open file, with a bar that follows what has been read of it."""
    try:
        file = path.open("rb")
        size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InvalidInput(f"Cannot read {path}: {error.strerror}; name a file that you may read.") from error
    with file, _progress() as progress:
        yield progress.wrap_file(file, size, description=path.name)


def fetch_file(api: StoreApi, model: dict[str, Any], target: Path) -> list[Path]:
    """Write the model to the file, which is there when it is whole; return it."""
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_file(target) as path, _bar(target.name, model["model_size"]) as advance:
            _write(path, api.load_model(model["model_store_ddc"], model["model_id"]), advance)
    return [target]


def fetch_shards(api: StoreApi, model: dict[str, Any], folder: Path) -> list[Path]:
    """Write the model's shards and their index to the folder, as Hugging Face names them; return the files.

    All are written beside their places, then put in their places: after an error none of them is there.
    """
    if model["index_hash"] is None:
        raise InvalidInput(f"Model {model['model_id']} is a file without tensors; get it without --shards.")
    digests = [shard["digest"] for shard in model["shards"]]
    names = {shard_file(position, len(digests)): digest for position, digest in enumerate(digests)}
    names[INDEX_FILE] = model["index_hash"]
    is_new = not folder.exists()
    try:
        with disk_errors(folder.parent), _bar(folder.name, model["model_size"]) as advance:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as temporary:
                for name, digest in names.items():
                    _fetch_blob(api, model, digest, Path(temporary) / name)
                    advance((Path(temporary) / name).stat().st_size)
                return [(Path(temporary) / name).replace(folder / name) for name in names]
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _fetch_blob(api: StoreApi, model: dict[str, Any], digest: str, path: Path) -> None:
    if isinstance(api, LocalApi):
        download = api.prepare_download(model["model_store_ddc"], model["model_id"], digest)
        _write(path, download.open(0), lambda size: None)
    else:
        api.load_blob(model["model_store_ddc"], model["model_id"], digest, path)


def _write(path: Path, blocks: Iterator[bytes], advance: Callable[[int], None]) -> None:
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            file.write(block)
            advance(len(block))


@contextmanager
def _bar(description: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of so many bytes; lend what moves it on."""
    with _progress() as progress:
        task: TaskID = progress.add_task(description, total=size)
        yield lambda count: progress.advance(task, count)


def _progress() -> Progress:
    """Return the bars; on standard error, and only on a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
