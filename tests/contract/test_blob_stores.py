"""Every blob store keeps the same contract: a local folder, SeaweedFS and the JuiceFS gateway."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import minio
import numpy as np
import pytest
import urllib3
from blake3 import blake3

from common.errors import InvalidInput, NotFound, StoreUnavailable, UpdateRejected
from store import s3
from store.blobs import Blob, BlobStore
from store.folder import FolderStore
from store.s3 import S3Store
from store.tensors import Array
from store.transfer import Transfer
from store.weights import load_index, load_weights, store_weights
from tests.odd_services import odd_service, say
from tests.servers import S3Server, free_ports, wait_for

BUCKET = "fedchord"
KINDS = ["folder", "seaweedfs", "juicefs"]


def s3_store(server: S3Server, folder: Path, *, cache_bytes: int = 1 << 30) -> S3Store:
    opened = S3Store(server.client(), BUCKET, cache_folder=folder / "cache", cache_bytes=cache_bytes)
    opened.prepare()
    return opened


@pytest.fixture(params=["seaweedfs", "juicefs"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture(params=KINDS)
def blob_store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "folder":
        opened = FolderStore(tmp_path / "store")
        opened.prepare()
        return opened
    return s3_store(request.getfixturevalue(f"{request.param}_server"), tmp_path / "store")


@pytest.fixture
def transfer(tmp_path: Path) -> Iterator[Transfer]:
    with Transfer(shared_folder=tmp_path / "store", timeout_seconds=10, pause_seconds=0.01) as opened:
        yield opened


def blob_of(data: bytes) -> Blob:
    return Blob(digest=blake3(data).hexdigest(), size=len(data))


def new_file(folder: Path, data: bytes) -> Path:
    path = folder / os.urandom(8).hex()
    path.write_bytes(data)
    return path


def put(blob_store: BlobStore, data: bytes) -> Blob:
    return blob_store.put(new_file(blob_store.scratch(), data))


def content(blob_store: BlobStore, blob: Blob) -> bytes:
    with blob_store.open(blob) as file:
        return file.read()


def upload(transfer: Transfer, folder: Path, data: bytes, url: str) -> None:
    transfer.upload(new_file(folder, data), url)


# --- blobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100_000, 3 << 20])
def test_what_is_put_is_what_is_opened(blob_store: BlobStore, size: int) -> None:
    data = os.urandom(size)
    path = new_file(blob_store.scratch(), data)
    assert blob_store.put(path) == blob_of(data)
    assert not path.exists()
    assert content(blob_store, blob_of(data)) == data


def test_a_file_of_another_folder_is_taken_over(blob_store: BlobStore, tmp_path: Path) -> None:
    path = new_file(tmp_path, b"from elsewhere")
    assert blob_store.put(path, blob=blob_of(b"from elsewhere")) == blob_of(b"from elsewhere")
    assert not path.exists()


def test_an_open_blob_can_be_searched_and_read_by_descriptor(blob_store: BlobStore) -> None:
    blob = put(blob_store, b"0123456789")
    with blob_store.open(blob) as file:
        file.seek(4)
        assert (file.read(3), os.pread(file.fileno(), 2, 1)) == (b"456", b"12")


def test_the_same_bytes_twice_are_one_blob(blob_store: BlobStore) -> None:
    data = os.urandom(100)
    assert put(blob_store, data) == put(blob_store, data)
    assert list(blob_store.blobs()).count(blob_of(data)) == 1
    assert list(blob_store.scratch().iterdir()) == []


def test_a_file_that_is_shorter_than_announced_is_refused(blob_store: BlobStore) -> None:
    path = new_file(blob_store.scratch(), b"short")
    with pytest.raises(InvalidInput, match="finish writing"):
        blob_store.put(path, blob=blob_of(b"longer"))


def test_a_missing_blob_is_not_found(blob_store: BlobStore) -> None:
    missing = blob_of(os.urandom(10))
    with pytest.raises(NotFound, match=missing.digest):
        blob_store.open(missing)
    with pytest.raises(NotFound, match=missing.digest):
        blob_store.find(missing.digest)


def test_a_blob_is_found_by_its_digest(blob_store: BlobStore) -> None:
    blob = put(blob_store, os.urandom(123))
    assert blob_store.find(blob.digest) == blob


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 5])
def test_a_stream_gives_the_bytes_from_any_offset(blob_store: BlobStore, size: int) -> None:
    data = os.urandom(size)
    blob = put(blob_store, data)
    for start in {0, 1, size // 2, max(size - 1, 0), size}:
        blocks = list(blob_store.stream(blob, start))
        assert b"".join(blocks) == data[start:]
        assert all(0 < len(block) <= 1 << 20 for block in blocks)


def test_a_stream_of_a_missing_blob_is_not_found(blob_store: BlobStore) -> None:
    missing = blob_of(os.urandom(10))
    for start in (0, 5):
        with pytest.raises(NotFound, match=missing.digest):
            next(blob_store.stream(missing, start))


@pytest.mark.parametrize("digest", ["", "abc", "../" * 20 + "etcd", "A" * 64, "0" * 63 + "\n"])
def test_a_digest_that_is_none_is_refused(blob_store: BlobStore, digest: str) -> None:
    for use in (blob_store.find, blob_store.delete):
        with pytest.raises(InvalidInput, match="BLAKE3"):
            use(digest)


def test_a_deleted_blob_is_gone(blob_store: BlobStore) -> None:
    blob = put(blob_store, os.urandom(50))
    assert blob_store.delete(blob.digest)
    assert not blob_store.delete(blob.digest)
    assert blob not in list(blob_store.blobs())
    with pytest.raises(NotFound):
        blob_store.open(blob)


def test_a_blob_that_was_put_again_lately_is_not_deleted_as_an_old_one(
    blob_store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_CLOCK_SECONDS", 0.0)  # seconds are old here
    data = os.urandom(50)
    blob = put(blob_store, data)
    assert not blob_store.delete(blob.digest, older_than_seconds=3600)
    wait_for(lambda: blob in list(blob_store.blobs(older_than_seconds=2)), seconds=20, what="the blob is old")
    put(blob_store, data)
    assert blob not in list(blob_store.blobs(older_than_seconds=2))
    assert not blob_store.delete(blob.digest, older_than_seconds=2)
    assert content(blob_store, blob) == data
    wait_for(lambda: blob_store.delete(blob.digest, older_than_seconds=2), seconds=20, what="the blob is old again")
    assert not blob_store.delete(blob.digest, older_than_seconds=2)
    with pytest.raises(NotFound):
        blob_store.open(blob)


def test_all_blobs_are_listed(blob_store: BlobStore) -> None:
    stored = {put(blob_store, os.urandom(10 + number)) for number in range(5)}
    assert stored <= set(blob_store.blobs())


def test_a_store_can_be_prepared_twice_and_checked(blob_store: BlobStore) -> None:
    before = set(blob_store.blobs())
    blob_store.prepare()
    blob_store.check()
    assert set(blob_store.blobs()) == before


def test_a_model_is_stored_and_loaded(blob_store: BlobStore) -> None:
    tensors: dict[str, Array] = {"a": np.arange(1000, dtype=np.float32), "b": np.full((3, 4), 7, np.int64)}
    stored = store_weights(blob_store, tensors, shard_bytes=4000)
    loaded = load_weights(blob_store, load_index(blob_store, stored.index.digest))
    assert len(stored.shards) == 2
    assert list(loaded) == ["a", "b"]
    assert all(np.array_equal(loaded[name], tensors[name]) for name in tensors)


# --- references ----------------------------------------------------------------------------------------------------


def test_a_reference_to_read_needs_no_credential(blob_store: BlobStore, transfer: Transfer, tmp_path: Path) -> None:
    data = os.urandom(2_000_000)
    blob = put(blob_store, data)
    path = transfer.fetch(blob_store.read_url(blob, seconds=60), blob, tmp_path / "site")
    assert path == tmp_path / "site" / blob.digest
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o444


def test_a_reference_to_read_expires(blob_store: BlobStore, transfer: Transfer, tmp_path: Path) -> None:
    blob = put(blob_store, os.urandom(100))
    url = blob_store.read_url(blob, seconds=1)
    site = tmp_path / "site"

    def expired() -> bool:
        blob_store.clean(older_than_seconds=3600)
        try:
            transfer.fetch(url, blob, site).unlink()
        except StoreUnavailable as error:
            return "has expired" in error.message
        return False

    wait_for(expired, seconds=10, what="reference expired")


def test_a_fetched_file_outlives_its_reference_and_its_blob(
    blob_store: BlobStore, transfer: Transfer, tmp_path: Path
) -> None:
    blob = put(blob_store, b"still here")
    path = transfer.fetch(blob_store.read_url(blob, seconds=60), blob, tmp_path / "site")
    blob_store.delete(blob.digest)
    assert path.read_bytes() == b"still here"


@pytest.mark.parametrize("size", [0, 100_000, 3_000_001])
def test_what_a_site_uploads_becomes_a_blob(
    blob_store: BlobStore, transfer: Transfer, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    slot = f"{os.urandom(8).hex()}/0"
    upload(transfer, tmp_path, data, blob_store.write_url(slot, seconds=60))
    blob_store.accept(slot, blob_of(data))
    assert content(blob_store, blob_of(data)) == data
    assert blob_store.find(blob_of(data).digest) == blob_of(data)


def test_all_references_to_one_slot_write_the_same_object(
    blob_store: BlobStore, transfer: Transfer, tmp_path: Path
) -> None:
    data = os.urandom(10)
    first = blob_store.write_url("repeated/0", seconds=60)
    blob_store.write_url("repeated/0", seconds=120)
    upload(transfer, tmp_path, data, first)
    blob_store.accept("repeated/0", blob_of(data))
    assert content(blob_store, blob_of(data)) == data


def test_accepting_twice_is_accepting_once(blob_store: BlobStore, transfer: Transfer, tmp_path: Path) -> None:
    data = os.urandom(1000)
    upload(transfer, tmp_path, data, blob_store.write_url("twice/0", seconds=60))
    blob_store.accept("twice/0", blob_of(data))
    blob_store.accept("twice/0", blob_of(data))
    assert content(blob_store, blob_of(data)) == data


def test_two_coordinators_may_accept_at_once(blob_store: BlobStore, transfer: Transfer, tmp_path: Path) -> None:
    for attempt in range(5):
        data = os.urandom(200_000)
        slot = f"race/{attempt}"
        upload(transfer, tmp_path, data, blob_store.write_url(slot, seconds=60))
        together = threading.Barrier(2)

        def accept(slot: str = slot, data: bytes = data, together: threading.Barrier = together) -> None:
            together.wait()
            blob_store.accept(slot, blob_of(data))

        with ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(accept) for _ in range(2)]:
                done.result()
        assert content(blob_store, blob_of(data)) == data


def test_nothing_written_is_rejected(blob_store: BlobStore) -> None:
    blob_store.write_url("nothing/0", seconds=60)
    for slot in ("nothing/0", "never/granted"):
        with pytest.raises(UpdateRejected, match="Nothing was written"):
            blob_store.accept(slot, blob_of(b"promised"))


@pytest.mark.parametrize(("written", "fault"), [(b"12345", "5 bytes"), (b"promiseD", blake3(b"promiseD").hexdigest())])
def test_other_bytes_than_announced_are_rejected(
    blob_store: BlobStore, transfer: Transfer, tmp_path: Path, written: bytes, fault: str
) -> None:
    slot = f"other/{len(written)}"
    upload(transfer, tmp_path, written, blob_store.write_url(slot, seconds=60))
    with pytest.raises(UpdateRejected, match=fault):
        blob_store.accept(slot, blob_of(b"promised"))
    with pytest.raises(NotFound):
        blob_store.open(blob_of(b"promised"))
    blob_store.accept(slot, blob_of(written))  # what was rejected stays until it is discarded
    assert list(blob_store.scratch().iterdir()) == []


def test_a_discarded_slot_is_empty(blob_store: BlobStore, transfer: Transfer, tmp_path: Path) -> None:
    data = os.urandom(10)
    upload(transfer, tmp_path, data, blob_store.write_url("discarded/0", seconds=60))
    blob_store.discard("discarded/0")
    blob_store.discard("discarded/0")
    with pytest.raises(UpdateRejected, match="Nothing was written"):
        blob_store.accept("discarded/0", blob_of(data))


def test_writing_a_slot_again_never_changes_what_is_accepted(
    blob_store: BlobStore, transfer: Transfer, tmp_path: Path
) -> None:
    first, second, third = os.urandom(100), os.urandom(100), os.urandom(100)
    url = blob_store.write_url("again/0", seconds=60)
    upload(transfer, tmp_path, first, url)
    upload(transfer, tmp_path, second, url)  # left out by some stores, in place of the first in others
    accepted = []
    for data in (first, second):
        try:
            blob_store.accept("again/0", blob_of(data))
        except UpdateRejected:
            continue
        accepted.append(data)
    assert len(accepted) == 1
    upload(transfer, tmp_path, third, url)
    assert content(blob_store, blob_of(accepted[0])) == accepted[0]


def test_abandoned_slots_and_scratch_files_are_cleaned_when_old(
    blob_store: BlobStore, transfer: Transfer, tmp_path: Path
) -> None:
    data = os.urandom(10)
    kept = put(blob_store, os.urandom(11))
    upload(transfer, tmp_path, data, blob_store.write_url("abandoned/0", seconds=60))
    left = new_file(blob_store.scratch(), b"half-writ")
    blob_store.clean(older_than_seconds=3600)
    assert left.exists()
    removed = 0

    def cleaned() -> bool:  # S3 counts in seconds
        nonlocal removed
        removed += blob_store.clean(older_than_seconds=0)
        return removed >= 2

    wait_for(cleaned, seconds=10, what="slot and file removed")
    assert not left.exists()
    with pytest.raises(UpdateRejected, match="Nothing was written"):
        blob_store.accept("abandoned/0", blob_of(data))
    assert blob_store.find(kept.digest) == kept


@pytest.mark.parametrize("slot", ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a/.b", "a b", "a\n", "a" * 200, "ä"])
def test_a_slot_that_is_no_name_is_refused(blob_store: BlobStore, slot: str) -> None:
    with pytest.raises(InvalidInput, match="Slot"):
        blob_store.write_url(slot, seconds=60)


# --- a folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_store(tmp_path: Path) -> FolderStore:
    opened = FolderStore(tmp_path / "store")
    opened.prepare()
    return opened


def local(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def test_a_blob_that_was_cut_short_is_damaged_until_it_is_put_again(folder_store: FolderStore) -> None:
    blob = put(folder_store, b"whole")
    path = folder_store.folder / "blobs" / blob.digest
    path.unlink()
    path.write_bytes(b"who")
    with pytest.raises(NotFound, match="damaged"):
        folder_store.open(blob)
    put(folder_store, b"whole")
    assert content(folder_store, blob) == b"whole"


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_rejected_and_cleaned(folder_store: FolderStore, tmp_path: Path, kind: str) -> None:
    body = local(folder_store.write_url("odd/0", seconds=60))
    if kind == "link":
        body.symlink_to(new_file(tmp_path, b"secret"))
    elif kind == "pipe":
        os.mkfifo(body)
    else:
        (body / "inside").mkdir(parents=True)
    with pytest.raises(UpdateRejected, match="not a plain file"):
        folder_store.accept("odd/0", blob_of(b"secret"))
    assert folder_store.clean(older_than_seconds=-1) == 1
    assert not os.path.lexists(body)


@pytest.mark.parametrize("wrong", [False, True])
def test_what_another_user_wrote_is_copied(
    folder_store: FolderStore, transfer: Transfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    path = new_file(tmp_path, b"theirs")
    transfer.upload(path, folder_store.write_url("user/0", seconds=60))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    if wrong:
        with pytest.raises(UpdateRejected):
            folder_store.accept("user/0", blob_of(b"others"))
    else:
        folder_store.accept("user/0", blob_of(b"theirs"))
        path.chmod(0o644)
        path.write_bytes(b"change")
        assert content(folder_store, blob_of(b"theirs")) == b"theirs"
    assert list(folder_store.scratch().iterdir()) == []


def test_uploading_on_the_stores_disk_copies_nothing(
    folder_store: FolderStore, transfer: Transfer, tmp_path: Path
) -> None:
    path = new_file(tmp_path, b"shared")
    transfer.upload(path, folder_store.write_url("shared/0", seconds=60))
    folder_store.accept("shared/0", blob_of(b"shared"))
    with folder_store.open(blob_of(b"shared")) as file:
        assert os.fstat(file.fileno()).st_ino == path.stat().st_ino
    assert path.stat().st_mode & 0o777 == 0o444


def test_other_users_cannot_list_references(folder_store: FolderStore) -> None:
    modes = {path.name: oct(path.stat().st_mode & 0o7777) for path in folder_store.folder.iterdir()}
    assert modes == {
        "blobs": "0o700",
        "bodies": "0o1733",
        "grants": "0o711",
        "key": "0o600",
        "scratch": "0o700",
    }


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable, match="Cannot use"):
        FolderStore(tmp_path / "file" / "store").prepare()


# --- S3 ------------------------------------------------------------------------------------------------------------


def overwrite(server: S3Server, key: str, data: bytes, folder: Path) -> None:
    server.client().fput_object(BUCKET, key, str(new_file(folder, data)))


def cached(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cache" / "blobs").iterdir()}


def test_the_least_recently_used_blobs_leave_the_cache(server: S3Server, tmp_path: Path) -> None:
    opened = s3_store(server, tmp_path, cache_bytes=250)
    first, second = put(opened, os.urandom(100)), put(opened, os.urandom(100))
    content(opened, first)
    third = put(opened, os.urandom(100))
    assert cached(tmp_path) == {first.digest, third.digest}
    assert len(content(opened, second)) == 100  # fetched again
    assert cached(tmp_path) == {third.digest, second.digest}
    large = put(opened, os.urandom(1000))
    assert cached(tmp_path) == {large.digest}


def test_the_cache_survives_a_restart_and_is_shared(server: S3Server, tmp_path: Path) -> None:
    first, second = s3_store(server, tmp_path), s3_store(server, tmp_path)
    blob = put(first, b"once fetched")
    server.client().remove_object(BUCKET, f"blobs/{blob.digest}")
    assert content(second, blob) == b"once fetched"


def test_what_was_verified_is_what_is_opened(server: S3Server, tmp_path: Path) -> None:
    data = os.urandom(100)
    opened = s3_store(server, tmp_path)
    blob = put(opened, data)
    overwrite(server, f"blobs/{blob.digest}", os.urandom(100), tmp_path)
    assert content(opened, blob) == data


@pytest.mark.parametrize("size", [99, 100])
def test_a_blob_that_was_changed_behind_us_is_damaged(server: S3Server, tmp_path: Path, size: int) -> None:
    blob = put(s3_store(server, tmp_path / "one"), os.urandom(100))
    overwrite(server, f"blobs/{blob.digest}", os.urandom(size), tmp_path)
    other = s3_store(server, tmp_path / "two")
    with pytest.raises(NotFound, match="damaged"):
        other.open(blob)
    assert cached(tmp_path / "two") == set()
    assert list(other.scratch().iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (2 << 20) + 5])
def test_a_stream_from_the_bucket_keeps_nothing(server: S3Server, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    blob = put(s3_store(server, tmp_path / "one"), data)
    other = s3_store(server, tmp_path / "two")
    for start in {0, size // 3, max(size - 1, 0), size}:
        assert b"".join(other.stream(blob, start)) == data[start:]
    assert cached(tmp_path / "two") == set()
    assert list(other.scratch().iterdir()) == []


def test_a_stream_that_is_left_early_gives_its_connection_back(server: S3Server, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    blob = put(s3_store(server, tmp_path / "one"), data)
    other = s3_store(server, tmp_path / "two")
    for _ in range(30):  # three times as many as the pool has
        blocks = other.stream(blob)
        assert next(blocks) == data[: 1 << 20]
        blocks.close()  # type: ignore[attr-defined]  # a generator
    assert b"".join(other.stream(blob)) == data


@pytest.mark.parametrize("change", [-1, 0, 1])
def test_a_stream_of_other_bytes_is_damaged_before_its_last_block(
    server: S3Server, tmp_path: Path, change: int
) -> None:
    size = (2 << 20) + 5
    blob = put(s3_store(server, tmp_path / "one"), os.urandom(size))
    overwrite(server, f"blobs/{blob.digest}", os.urandom(size + change), tmp_path)
    blocks = s3_store(server, tmp_path / "two").stream(blob)
    received = [next(blocks), next(blocks)] if change == 0 else []
    with pytest.raises(NotFound, match="damaged"):
        next(blocks)
    assert [len(block) for block in received] == [1 << 20] * len(received)


def test_what_is_too_large_for_one_request_goes_up_in_parts(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.s3._LARGEST_PUT_BYTES", 8 << 20)
    data = os.urandom((17 << 20) + 3)
    blob = put(s3_store(server, tmp_path / "one"), data)
    assert content(s3_store(server, tmp_path / "two"), blob) == data
    parts = server.client().stat_object(BUCKET, f"blobs/{blob.digest}").etag or ""
    assert parts.endswith("-3")


def test_a_cached_file_that_was_cut_short_is_fetched_again(server: S3Server, tmp_path: Path) -> None:
    opened = s3_store(server, tmp_path)
    blob = put(opened, b"whole")
    path = tmp_path / "cache" / "blobs" / blob.digest
    path.unlink()
    path.write_bytes(b"who")
    assert content(opened, blob) == b"whole"


def test_a_slot_that_changes_while_it_is_verified_is_rejected(
    server: S3Server, transfer: Transfer, tmp_path: Path
) -> None:
    class Overtaken(minio.Minio):  # somebody repeats the upload between our download and our copy
        def copy_object(self, *args: Any, **kwargs: Any) -> Any:
            overwrite(server, "slots/overtaken/0", b"poison", tmp_path)
            return super().copy_object(*args, **kwargs)

    client = Overtaken(
        server.endpoint,
        access_key=server.access_key,
        secret_key=server.secret_key,
        secure=False,
        region="us-east-1",
    )
    opened = S3Store(client, BUCKET, cache_folder=tmp_path / "cache", cache_bytes=1 << 20)
    opened.prepare()
    upload(transfer, tmp_path, b"honest", opened.write_url("overtaken/0", seconds=60))
    with pytest.raises(UpdateRejected, match="changed while"):
        opened.accept("overtaken/0", blob_of(b"honest"))
    for data in (b"honest", b"poison"):
        with pytest.raises(NotFound):
            opened.find(blob_of(data).digest)


def test_references_carry_the_public_address(server: S3Server, tmp_path: Path) -> None:
    public = minio.Minio("store.example", access_key="a", secret_key="b" * 8, region="us-east-1")
    opened = S3Store(server.client(), BUCKET, cache_folder=tmp_path, cache_bytes=1 << 20, public_client=public)
    blob = blob_of(b"x")
    assert opened.read_url(blob, seconds=60).startswith(f"https://store.example/{BUCKET}/blobs/{blob.digest}?")
    assert opened.write_url("a/0", seconds=10**9).startswith(f"https://store.example/{BUCKET}/slots/a/0?")


def test_a_wrong_secret_is_refused_in_one_sentence(server: S3Server, tmp_path: Path) -> None:
    client = replace(server, secret_key="not-the-secret").client()
    with pytest.raises(StoreUnavailable, match=r"refused .*correct the FEDCHORD_S3_"):
        S3Store(client, BUCKET, cache_folder=tmp_path, cache_bytes=1 << 20).prepare()


def test_a_store_that_is_not_there_is_said_in_one_sentence(tmp_path: Path) -> None:
    client = minio.Minio(
        f"127.0.0.1:{free_ports(1)[0]}",
        access_key="a",
        secret_key="b" * 8,
        secure=False,
        http_client=urllib3.PoolManager(retries=False),
    )
    with pytest.raises(StoreUnavailable, match=r"does not answer .*start it"):
        S3Store(client, BUCKET, cache_folder=tmp_path, cache_bytes=1 << 20).prepare()


def test_a_blob_that_is_put_again_while_it_is_deleted_as_old_stays(
    folder_store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder_store.folder / "blobs" / put(folder_store, b"again").digest
    os.utime(path, (0, 0))
    rename = Path.rename

    def put_first(self: Path, target: Path) -> Path:
        put(folder_store, b"again")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", put_first)  # by which it is set aside, after it was found to be old
    assert not folder_store.delete(path.name, older_than_seconds=3600)
    assert path.read_bytes() == b"again"
    assert list(folder_store.scratch().iterdir()) == []


def test_a_clock_that_the_store_does_not_believe_is_told(tmp_path: Path) -> None:
    refusal = b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>"
    answer = say(refusal, kind="application/xml", status=403)
    with odd_service({f"/{BUCKET}/slots/update": answer}) as url:
        client = minio.Minio(
            url.partition("//")[2], access_key="a", secret_key="b" * 8, secure=False, region="us-east-1"
        )
        opened = S3Store(client, BUCKET, cache_folder=tmp_path, cache_bytes=1 << 20)
        with pytest.raises(StoreUnavailable, match=r"clock is wrong.* set it by NTP\. `fedchord doctor`"):
            opened.written("update", max_bytes=1)
