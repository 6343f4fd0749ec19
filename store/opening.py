"""Open what the settings name: the blob store, and a node's records with it."""

import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sqlalchemy import Connection, Engine, exc, insert, select

from common.errors import InvalidSettings
from common.settings import Settings
from store.blobs import BLOCK_BYTES, BlobStore
from store.database import open_database, upgrade, writing
from store.folder import FolderStore
from store.secret_box import SecretBox
from store.tables import node

_CONNECT_SECONDS = 5.0  # a store that is not there is told at once
_MAX_CONNECTIONS = 32  # kept open; as many transfers as a busy service has at once

_SELF = "self"  # the key of the one row of table `node`


@dataclass(frozen=True, kw_only=True)
class OpenStore:
    """A node's records and blobs, ready for use."""

    settings: Settings  # what it was opened with
    engine: Engine  # its database, up to date
    blobs: BlobStore  # prepared
    node_id: str  # uuid4; tells this node from all others
    box: SecretBox  # encrypts the upstreams' secrets

    def close(self) -> None:
        """Let go of the database's connections."""
        self.engine.dispose()

    def __enter__(self) -> Self:
        """Return the open store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def open_store(settings: Settings) -> OpenStore:
    """Open the node's records and blobs; make what is missing, and bring the records up to date.

    Raise what `open_database` and `open_blob_store` raise.
    """
    blobs = open_blob_store(settings)
    blobs.prepare()
    engine = open_database(settings.database_url.get_secret_value())
    try:
        upgrade(engine)
        with writing(engine) as connection:
            node_id = _own_node_id(connection)
    except BaseException:
        engine.dispose()
        raise
    return OpenStore(
        settings=settings, engine=engine, blobs=blobs, node_id=node_id, box=SecretBox(settings.store_key_file)
    )


def _own_node_id(connection: Connection) -> str:
    """Return the node's id, which whoever comes first makes."""
    own = select(node.c.node_id).where(node.c.id == _SELF)
    found = connection.scalar(own)
    if isinstance(found, str):
        return found
    try:
        with connection.begin_nested():
            connection.execute(insert(node), {"id": _SELF, "node_id": str(uuid.uuid4())})
    except exc.IntegrityError:  # on PostgreSQL another process was quicker
        pass
    return str(connection.scalars(own).one())


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
            maxsize=_MAX_CONNECTIONS,
            timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=settings.transfer_timeout_seconds),
            retries=urllib3.Retry(total=2, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]),
            blocksize=BLOCK_BYTES,
        ),
    )
    cache_bytes = int(settings.cache_gigabytes * 10**9)
    return S3Store(client, settings.s3_bucket, cache_folder=settings.cache_folder, cache_bytes=cache_bytes)
