"""Every blob store can say what was written at a slot, without changing anything."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import UpdateRejected
from store.blobs import Blob, BlobStore, hash_bytes
from store.folder import FolderStore
from store.s3 import S3Store
from store.transfer import Transfer


@pytest.fixture(params=["folder", "seaweedfs", "juicefs"])
def blob_store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    opened: BlobStore
    if request.param == "folder":
        opened = FolderStore(tmp_path / "store")
    else:
        server = request.getfixturevalue(f"{request.param}_server")
        opened = S3Store(server.client(), "written", cache_folder=tmp_path / "store" / "cache", cache_bytes=1 << 30)
    opened.prepare()
    return opened


@pytest.fixture
def transfer(tmp_path: Path) -> Iterator[Transfer]:
    with Transfer(shared_folder=tmp_path / "store", timeout_seconds=10, pause_seconds=0.01) as opened:
        yield opened


def write(blob_store: BlobStore, transfer: Transfer, folder: Path, slot: str, data: bytes) -> Blob:
    path = folder / os.urandom(8).hex()
    path.write_bytes(data)
    transfer.upload(path, blob_store.write_url(slot, seconds=60))
    return hash_bytes(data)


def test_what_was_written_is_told_and_can_be_accepted_after_that(
    blob_store: BlobStore, transfer: Transfer, tmp_path: Path
) -> None:
    slot = f"job.train.1.{os.urandom(4).hex()}/1/0"
    assert blob_store.written(slot, max_bytes=10**9) is None
    blob = write(blob_store, transfer, tmp_path, slot, os.urandom(3 * 10**6))
    assert blob_store.written(slot, max_bytes=blob.size) == blob
    assert blob_store.written(slot, max_bytes=blob.size) == blob
    assert blob_store.written(slot, max_bytes=blob.size - 1) is None
    lie = Blob(digest="0" * 64, size=blob.size)
    with pytest.raises(UpdateRejected):
        blob_store.accept(slot, lie)
    assert blob_store.written(slot, max_bytes=blob.size) == blob
    blob_store.accept(slot, blob)
    assert blob_store.written(slot, max_bytes=blob.size) is None
    with blob_store.open(blob) as file:
        assert hash_bytes(file.read()) == blob


def test_of_an_empty_file_the_empty_blob_is_told(blob_store: BlobStore, transfer: Transfer, tmp_path: Path) -> None:
    slot = f"job.train.1.{os.urandom(4).hex()}/1/0"
    assert write(blob_store, transfer, tmp_path, slot, b"") == blob_store.written(slot, max_bytes=0)


def test_what_is_no_plain_file_counts_as_nothing(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.prepare()
    for slot, make in (("a/1/0", Path.mkdir), ("b/1/0", os.mkfifo)):
        make(Path(store.write_url(slot, seconds=60).removeprefix("file://")))
        assert store.written(slot, max_bytes=10**9) is None
