"""Look at the object store: write, read and delete one small blob, as the coordinator and a site do it."""

import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import NotFound
from common.settings import Settings
from coordinator.checks.finding import Finding, fault, ok
from store.blobs import Blob, BlobStore, hash_bytes
from store.opening import open_blob_store
from store.transfer import Transfer

_NAME = "object store"
_TRANSFER_SECONDS = 5.0  # without a byte
_REFERENCE_SECONDS = 300


def check_object_store(settings: Settings) -> Iterator[Finding]:
    """Upload a blob by a reference, accept it, fetch it by a reference, delete it; tell how long each took."""
    is_folder = settings.blob_store == "folder"
    folder = settings.blob_folder if is_folder else settings.cache_folder
    variable = "FEDCHORD_BLOB_FOLDER" if is_folder else "FEDCHORD_CACHE_FOLDER"
    if not all((folder / name).is_dir() for name in ("blobs", "scratch")):
        yield fault(
            _NAME,
            f"{folder.absolute()} is not there, or no store was ever opened in it.",
            f"Correct {variable}, or start a coordinator worker, which makes it.",
        )
        return
    blobs = open_blob_store(settings)
    blobs.check()
    place = (
        str(settings.blob_folder.absolute()) if is_folder else f"{settings.s3_endpoint}, bucket {settings.s3_bucket}"
    )
    seconds = _use(blobs, folder if is_folder else None)
    times = ", ".join(f"{step} {1000 * each:.0f} ms" for step, each in seconds.items())
    yield ok(_NAME, f"{place} keeps a small blob and gives it back: {times}.")


def _use(blobs: BlobStore, shared_folder: Path | None) -> dict[str, float]:
    """Return how long each step of a blob's life took, in seconds; nothing stays, whatever goes wrong."""
    data = secrets.token_bytes(1024)
    blob = hash_bytes(data)
    slot = f"doctor-{secrets.token_hex(8)}/1/0"
    transfer = Transfer(shared_folder=shared_folder, timeout_seconds=_TRANSFER_SECONDS, patience_seconds=1)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fedchord-doctor-") as temporary:
        path = Path(temporary) / "blob"
        path.write_bytes(data)
        try:
            steps: dict[str, Callable[[], None]] = {
                "write": lambda: transfer.upload(path, blobs.write_url(slot, seconds=_REFERENCE_SECONDS)),
                "verify": lambda: blobs.accept(slot, blob),
                "read": lambda: _fetch(blobs, transfer, blob, Path(temporary) / "fetched"),
                "delete": lambda: _delete(blobs, blob),
            }
            for step, action in steps.items():
                begun = time.perf_counter()
                action()
                seconds[step] = time.perf_counter() - begun
        finally:
            if "delete" not in seconds:
                blobs.discard(slot)
                blobs.delete(blob.digest)
    return seconds


def _fetch(blobs: BlobStore, transfer: Transfer, blob: Blob, folder: Path) -> None:
    transfer.fetch(blobs.read_url(blob, seconds=_REFERENCE_SECONDS), blob, folder)


def _delete(blobs: BlobStore, blob: Blob) -> None:
    if not blobs.delete(blob.digest):
        raise NotFound("What was written is not there a moment later; let nobody else delete in the object store.")
