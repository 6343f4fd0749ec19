"""Open the blob store that the settings name."""

from common.errors import InvalidSettings
from common.settings import Settings
from store.blobs import BLOCK_BYTES, BlobStore
from store.folder import FolderStore

_CONNECT_SECONDS = 5.0  # a store that is not there is told at once


def open_blob_store(settings: Settings) -> BlobStore:
    """Return the blob store; raise InvalidSettings when its settings do not suffice."""
    if settings.blob_store == "folder":
        return FolderStore(settings.blob_folder)
    if not settings.s3_access_key or not settings.s3_secret_key.get_secret_value():
        raise InvalidSettings("blob_store is 's3': set FEDCHORD_S3_ACCESS_KEY and FEDCHORD_S3_SECRET_KEY.")
    import urllib3  # only who uses S3 pays for these imports
    from minio import Minio

    from store.s3 import S3Store

    client = Minio(
        settings.s3_endpoint,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        secure=settings.s3_secure,
        region=settings.s3_region,
        http_client=urllib3.PoolManager(
            maxsize=settings.coordinator_threads + 1,
            timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=settings.transfer_timeout_seconds),
            retries=urllib3.Retry(total=2, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]),
            blocksize=BLOCK_BYTES,
        ),
    )
    cache_bytes = int(settings.cache_gigabytes * 10**9)
    return S3Store(client, settings.s3_bucket, cache_folder=settings.cache_folder, cache_bytes=cache_bytes)
