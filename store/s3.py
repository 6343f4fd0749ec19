"""Keep blobs in a bucket of any S3 store, and what was verified of them in a local cache.

    blobs/<digest>   a blob
    slots/<slot>     what was written with a reference, until it is accepted

References are presigned URLs. A presigned PUT can be repeated until it expires, and not every store stops that, so
nothing is read that was not hashed on the way here: what `accept` verified is what `open` returns, and a blob that has
left the cache is verified again when it is fetched.
"""

import io
import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from minio import Minio
from minio.commonconfig import REPLACE, CopySource
from minio.error import MinioException, S3Error
from urllib3.exceptions import HTTPError

from common.errors import DiskFull, NotFound, StoreUnavailable, UpdateRejected
from store.blobs import (
    BLOCK_BYTES,
    Blob,
    check_digest,
    check_disk,
    check_size,
    check_slot,
    damaged,
    disk_errors,
    hash_file,
    new_hasher,
    read_blocks,
    write_all,
)
from store.cache import BlobCache
from store.transfer import Transfer

logger = logging.getLogger(__name__)

_UPLOAD_SECONDS = 24 * 3600  # how long our own uploads may take to begin, repetitions included
_LONGEST_REFERENCE_SECONDS = 7 * 24 * 3600  # S3's own limit
_TIMEOUT_SECONDS = 60  # without a single byte moving
_LARGEST_PUT_BYTES = 4 << 30  # S3 takes 5 GiB at most as one object; larger ones go up in parts
_CLOCK_SECONDS = 60.0  # by which the bucket's clock may be behind
_PART_BYTES = 8 << 20  # one part is in memory at a time
_MOST_PARTS = 10_000  # S3's own limit
_BLOBS = "blobs/"
_SLOTS = "slots/"
_MISSING = {"NoSuchKey", "NoSuchObject"}
_FULL = {"XMinioStorageFull", "InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded"}
_SKEWED = "RequestTimeTooSkewed"


class S3Store:
    """Keep blobs in a bucket."""

    def __init__(
        self,
        client: Minio,
        bucket: str,
        *,
        cache_folder: Path,
        cache_bytes: int,  # least recently used blobs leave the cache when it has more
        public_client: Minio | None = None,  # signs references with the address at which sites reach the store
    ) -> None:
        self._client = client
        self._public_client = public_client or client
        self._bucket = bucket
        self._cache = BlobCache(cache_folder.resolve() / "blobs", cache_bytes)
        self._scratch = cache_folder.resolve() / "scratch"
        self._transfer = Transfer(shared_folder=None, timeout_seconds=_TIMEOUT_SECONDS)

    def prepare(self) -> None:
        """Create the bucket and the cache's folders."""
        with disk_errors(self._scratch):
            self._cache.folder.mkdir(parents=True, exist_ok=True)
            self._scratch.mkdir(parents=True, exist_ok=True)
        with self._errors():
            if not self._client.bucket_exists(self._bucket):
                try:
                    self._client.make_bucket(self._bucket)
                except S3Error as error:
                    if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                        raise

    def check(self) -> None:
        """Raise StoreUnavailable or DiskFull unless one can write now, to the bucket and to the cache."""
        check_disk(self._scratch)
        with self._errors():
            self._client.put_object(self._bucket, "check", io.BytesIO(b"1"), 1)

    def scratch(self) -> Path:
        """Return a folder on the cache's disk."""
        return self._scratch

    def put(self, path: Path, *, blob: Blob | None = None) -> Blob:
        """Upload the file and move it to the cache."""
        with disk_errors(path.parent):
            blob = hash_file(path) if blob is None else check_size(path, blob)
            began = datetime.now(UTC)
            if blob.size > _LARGEST_PUT_BYTES:
                self._put_parts(path, blob)
            else:
                with self._errors():
                    url = self._client.presigned_put_object(
                        self._bucket, _key(blob.digest), timedelta(seconds=_UPLOAD_SECONDS)
                    )
                # A presigned upload streams the file once; the client's own would read, hash and buffer it in parts.
                self._transfer.upload(path, url)
            self._renew(blob.digest, began)
            self._cache.add(path, blob)
        return blob

    def find(self, digest: str) -> Blob:
        """Return the stored blob of the digest, by what the bucket says."""
        with self._errors(missing=digest):
            size = self._client.stat_object(self._bucket, _key(check_digest(digest))).size
        return Blob(digest=digest, size=size or 0)

    def open(self, blob: Blob) -> BinaryIO:
        """Open the blob in the cache; fetch and verify it first when it is not there."""
        if (file := self._cache.open(blob)) is not None:
            return file
        with self._new_file() as path:
            with self._errors(missing=blob.digest):
                wrong, _ = self._download(_key(blob.digest), path, blob)
            if wrong:
                raise damaged(blob, wrong)
            file = path.open("rb", buffering=0)
            self._cache.add(path, blob)
            return file

    def stream(self, blob: Blob, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of the blob in the cache, or else as they come from the bucket."""
        if (file := self._cache.open(blob)) is not None:
            with file, disk_errors(self._cache.folder):
                yield from read_blocks(file, start)
        elif start == 0 or start < blob.size:  # S3 refuses a range that begins at the end
            yield from self._stream_object(blob, start)

    def delete(self, digest: str, *, older_than_seconds: float = 0) -> bool:
        """Forget the blob, in the bucket and in this cache."""
        before = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        try:
            with self._errors(missing=digest):
                found = self._client.stat_object(self._bucket, _key(check_digest(digest)))
        except NotFound:
            self._cache.remove(digest)
            return False
        if older_than_seconds > 0 and found.last_modified and found.last_modified > before:
            return False
        self._cache.remove(digest)
        with self._errors():
            self._client.remove_object(self._bucket, _key(digest))
        logger.info("Blob %s was deleted", digest, extra={"action": "blob_deleted"})
        return True

    def blobs(self, *, older_than_seconds: float = 0) -> Iterator[Blob]:
        """Go through everything that was put into the bucket so long ago, by the bucket's own clock."""
        before = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        with self._errors():
            for found in self._client.list_objects(self._bucket, prefix=_BLOBS, recursive=True):
                if older_than_seconds and found.last_modified and found.last_modified > before:
                    continue
                yield Blob(digest=(found.object_name or "").removeprefix(_BLOBS), size=found.size or 0)

    def read_url(self, blob: Blob, *, seconds: int) -> str:
        """Return a presigned URL to GET the blob."""
        with self._errors():
            return self._public_client.presigned_get_object(self._bucket, _key(blob.digest), _period(seconds))

    def write_url(self, slot: str, *, seconds: int) -> str:
        """Return a presigned URL to PUT an object at the slot."""
        with self._errors():
            return self._public_client.presigned_put_object(self._bucket, _slot_key(slot), _period(seconds))

    def accept(self, slot: str, blob: Blob) -> None:
        """Download what was written at the slot, verify it, and have the store copy just that to the blob's key."""
        key = _slot_key(slot)
        with self._new_file() as path, self._errors():
            try:
                wrong, etag = self._download(key, path, blob)
                if wrong:
                    raise UpdateRejected(
                        f"What was written at {slot} is {wrong}, but {blob.size} bytes with the digest {blob.digest} "
                        "were announced."
                    )
                source = CopySource(self._bucket, key, match_etag=etag)
                self._client.copy_object(self._bucket, _key(blob.digest), source)
            except S3Error as error:
                if error.code == "PreconditionFailed":
                    raise UpdateRejected(f"What was written at {slot} changed while it was verified.") from error
                if error.code not in _MISSING:
                    raise
                if not self._has(blob):
                    raise UpdateRejected(
                        f"Nothing was written at {slot}; upload the update before announcing it."
                    ) from error
                return  # accepted before, perhaps by another coordinator
            self._cache.add(path, blob)
            self._client.remove_object(self._bucket, key)
        logger.debug("Slot %s became blob %s", slot, blob.digest, extra={"action": "slot_accepted"})

    def written(self, slot: str, *, max_bytes: int) -> Blob | None:
        """Hash the object at the slot as it comes."""
        hasher, size = new_hasher(), 0
        with self._errors():
            try:
                response = self._client.get_object(self._bucket, _slot_key(slot))
            except S3Error as error:
                if error.code not in _MISSING:
                    raise
                return None
            try:
                for block in response.stream(BLOCK_BYTES):
                    size += len(block)
                    if size > max_bytes:
                        return None
                    hasher.update(block)
            finally:
                response.close()  # what was not read is not waited for
                response.release_conn()
        return Blob(digest=hasher.hexdigest(), size=size)

    def discard(self, slot: str) -> None:
        """Remove the object at the slot."""
        with self._errors():
            self._client.remove_object(self._bucket, _slot_key(slot))

    def clean(self, *, older_than_seconds: float) -> int:
        """Remove abandoned slots and temporary files; presigned URLs expire by themselves."""
        removed = 0
        before = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        with self._errors():
            for found in self._client.list_objects(self._bucket, prefix=_SLOTS, recursive=True):
                if found.last_modified and found.last_modified <= before:
                    self._client.remove_object(self._bucket, found.object_name or "")
                    removed += 1
        with disk_errors(self._scratch):
            for path in self._scratch.iterdir():
                if path.lstat().st_mtime <= before.timestamp():
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _renew(self, digest: str, began: datetime) -> None:
        """Make the object as new as its last put; SeaweedFS does so only if something about it is new."""
        key = _key(digest)
        try:
            with self._errors(missing=digest):
                found = self._client.stat_object(self._bucket, key).last_modified
                if found is None or found >= began - timedelta(seconds=_CLOCK_SECONDS):
                    return
                put: dict[str, str | list[str] | tuple[str]] = {"put": began.isoformat()}
                source = CopySource(self._bucket, key)
                self._client.copy_object(self._bucket, key, source, metadata=put, metadata_directive=REPLACE)
        except NotFound as error:
            raise StoreUnavailable(
                "The bytes were removed meanwhile, for no model needed them; put them again."
            ) from error

    def _put_parts(self, path: Path, blob: Blob) -> None:
        """Upload the file in parts, one after the other."""
        part_bytes = max(_PART_BYTES, -(-blob.size // _MOST_PARTS))
        with self._errors():
            self._client.fput_object(
                self._bucket, _key(blob.digest), str(path), part_size=part_bytes, num_parallel_uploads=1
            )

    def _stream_object(self, blob: Blob, start: int) -> Iterator[bytes]:
        """Yield what the bucket has from an offset, one block late, so that the last one can be held back."""
        with self._errors(missing=blob.digest):
            response = self._client.get_object(self._bucket, _key(blob.digest), offset=start)
            try:
                found = int(response.headers.get("Content-Length", blob.size - start))
                if found != blob.size - start:
                    raise damaged(blob, f"{found + start} bytes")
                hasher = new_hasher()
                late = b""
                for block in response.stream(BLOCK_BYTES):
                    hasher.update(block)
                    if late:
                        yield late
                    late = block
                if start == 0 and (digest := hasher.hexdigest()) != blob.digest:
                    raise damaged(blob, f"bytes with the digest {digest}")
                if late:
                    yield late
            finally:
                response.close()  # what was not read is not waited for
                response.release_conn()

    def _has(self, blob: Blob) -> bool:
        try:
            return self.find(blob.digest) == blob
        except NotFound:
            return False

    def _download(self, key: str, path: Path, blob: Blob) -> tuple[str, str]:
        """Download an object that should be the blob; return what it is if it is not, and its ETag.

        Where it is cut it goes on, as long as each try brings something.
        """
        hasher, size, etag = new_hasher(), 0, ""
        with path.open("xb", buffering=0) as file:
            while True:
                before = size
                try:
                    response = self._client.get_object(self._bucket, key, offset=size)
                    try:
                        length = size + int(response.headers.get("Content-Length", blob.size - size))
                        if length != blob.size:
                            return f"{length} bytes", ""
                        found = response.headers.get("ETag", "").strip('"')
                        if size and found != etag:
                            return "bytes that changed while they came", ""
                        etag = found
                        for block in response.stream(BLOCK_BYTES):
                            hasher.update(block)
                            write_all(file, block)
                            size += len(block)
                    finally:
                        response.close()
                        response.release_conn()
                    break
                except HTTPError as error:
                    if size == before:
                        raise
                    logger.debug("Going on with %s after %s bytes: %s", key, size, error, extra={"action": "go_on"})
        if (digest := hasher.hexdigest()) != blob.digest:
            return f"bytes with the digest {digest}", ""
        return "", etag

    @contextmanager
    def _new_file(self) -> Iterator[Path]:
        """Lend the name of a temporary file on the cache's disk, which is gone at the end unless it was moved."""
        path = self._scratch / secrets.token_hex(16)
        with disk_errors(self._scratch):
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)

    @contextmanager
    def _errors(self, *, missing: str = "") -> Iterator[None]:
        """Turn what the client raises into our errors; `missing` is the digest of the object that is asked for."""
        try:
            yield
        except S3Error as error:
            if missing and error.code in _MISSING:
                raise NotFound(
                    f"There is no blob {missing} in the store; it was deleted, or never put there."
                ) from error
            if error.code in _FULL:
                raise DiskFull("The object store is full; free some space in it and try again.") from error
            if error.code == _SKEWED:
                raise StoreUnavailable(
                    "The object store says that this machine's clock is wrong, and takes no request signed by it; set "
                    "it by NTP. `fedchord doctor` tells by how much they differ."
                ) from error
            raise StoreUnavailable(
                f"The object store refused ({error.code}: {error.message}); correct the FEDCHORD_S3_… settings."
            ) from error
        except (MinioException, HTTPError) as error:
            raise StoreUnavailable(
                f"The object store does not answer ({error}); start it or correct the FEDCHORD_S3_… settings."
            ) from error


def _key(digest: str) -> str:
    return _BLOBS + digest


def _slot_key(slot: str) -> str:
    return _SLOTS + check_slot(slot)


def _period(seconds: int) -> timedelta:
    return timedelta(seconds=min(seconds, _LONGEST_REFERENCE_SECONDS))
