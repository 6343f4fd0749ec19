"""Hold what every step of the coordinator needs: settings, records, blobs, broker, key."""

from dataclasses import dataclass
from pathlib import Path

from celery import Celery
from redis import Redis
from sqlalchemy import Engine

from common.broker import connect, make_coordinator_app
from common.settings import Settings
from common.signing import SigningKey
from store.blobs import BlobStore
from store.database import open_database, upgrade
from store.opening import open_blob_store


@dataclass(frozen=True, kw_only=True)
class Services:
    """The open services of one process."""

    settings: Settings
    engine: Engine  # the records
    blobs: BlobStore  # the tensors
    app: Celery  # publishes; its result backend counts the chords' parts
    broker: Redis  # heartbeats and cancellations
    key: SigningKey  # the coordinator's


def open_services(settings: Settings, *, app: Celery | None = None) -> Services:
    """Open everything; raise the Unavailable that names what does not answer, before anything has changed."""
    key = SigningKey.load(settings.signing_key_file)
    broker = connect(settings)
    engine = open_database(settings.database_url.get_secret_value())
    upgrade(engine)
    blobs = open_blob_store(settings)
    blobs.prepare()
    return Services(
        settings=settings,
        engine=engine,
        blobs=blobs,
        app=app or make_coordinator_app(settings),
        broker=broker,
        key=key,
    )


def services_of(app: Celery) -> Services:
    """Return the services that the app's worker opened at its start."""
    services: Services = vars(app)["fedchord_services"]
    return services


def attach_services(app: Celery, services: Services) -> None:
    """Give the app's tasks and steps their services."""
    vars(app)["fedchord_services"] = services


def make_key(path: Path) -> SigningKey:
    """Return the key in the file; make one if there is no file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        SigningKey.generate().save(path)
    return SigningKey.load(path)
