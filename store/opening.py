"""Open the blob store that the settings name."""

from common.errors import InvalidSettings
from common.settings import Settings
from store.blobs import BlobStore
from store.folder import FolderStore


def open_blob_store(settings: Settings) -> BlobStore:
    """Return the blob store; raise InvalidSettings when its settings do not suffice."""
    if settings.blob_store == "folder":
        return FolderStore(settings.blob_folder)
    if not settings.s3_access_key or not settings.s3_secret_key.get_secret_value():
        raise InvalidSettings("blob_store is 's3': set FEDCHORD_S3_ACCESS_KEY and FEDCHORD_S3_SECRET_KEY.")
    from minio import Minio  # only who uses S3 pays for its import

    from store.s3 import S3Store

    client = Minio(
        settings.s3_endpoint,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        secure=settings.s3_secure,
        region=settings.s3_region,
    )
    cache_bytes = int(settings.cache_gigabytes * 10**9)
    return S3Store(client, settings.s3_bucket, cache_folder=settings.cache_folder, cache_bytes=cache_bytes)
