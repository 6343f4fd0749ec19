"""Hold what every step of the coordinator needs: settings, records, blobs, broker, key."""

import os
import secrets
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from celery import Celery
from redis import Redis
from sqlalchemy import Engine

from common.broker import connect, hide_password, make_coordinator_app
from common.errors import BrokerUnavailable, Conflict
from common.settings import Settings
from common.signing import SigningKey
from store.blobs import BlobStore, disk_errors
from store.database import open_database, upgrade
from store.opening import open_blob_store

_ANSWER_SECONDS = 1.0  # of a broker that can be done without


@dataclass(frozen=True, kw_only=True)
class Services:
    """The open services of one process; as a context they are closed at its end."""

    settings: Settings
    engine: Engine  # the records
    blobs: BlobStore  # the tensors
    app: Celery  # publishes; its result backend counts the chords' parts
    broker: Redis  # heartbeats and cancellations
    key: SigningKey  # the coordinator's

    def close(self) -> None:
        """Close every connection, those of the app included."""
        self.app.close()
        self.broker.close()
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_services(settings: Settings, *, app: Celery | None = None, needs_broker: bool = True) -> Services:
    """Open everything; raise the Unavailable that names what does not answer, before anything has changed.

    Who reads and writes records and blobs only needs no broker; whether it answers is then found out when it is asked.
    """
    key = SigningKey.load(settings.signing_key_file)
    with ExitStack() as opened:
        broker = opened.enter_context(closing(connect(settings) if needs_broker else _broker_unasked(settings)))
        engine = open_database(settings.database_url.get_secret_value())
        opened.callback(engine.dispose)
        upgrade(engine)
        blobs = open_blob_store(settings)
        blobs.prepare()
        opened.pop_all()  # from here on they are the caller's
    return Services(
        settings=settings,
        engine=engine,
        blobs=blobs,
        app=app or make_coordinator_app(settings),
        broker=broker,
        key=key,
    )


def _broker_unasked(settings: Settings) -> Redis:
    """Return a client of the broker that has not connected yet, and that gives up soon when it does."""
    url = settings.broker_url.get_secret_value()
    try:
        client: Redis = Redis.from_url(url, socket_timeout=_ANSWER_SECONDS, retry=None)
    except ValueError as error:
        raise BrokerUnavailable(
            f"The broker {hide_password(url)} cannot be used ({error}); correct FEDCHORD_BROKER_URL."
        ) from error
    return client


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
        with suppress(Conflict):  # another process was quicker
            save_key(SigningKey.generate(), path)
    return SigningKey.load(path)


def save_key(key: SigningKey, path: Path) -> None:
    """Write the key to a new file, which is there whole or not at all; raise Conflict if there is one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            key.save(temporary)
            os.link(temporary, path)  # unlike a rename, never over another
        except FileExistsError as error:
            raise Conflict(f"{path} is there already; choose another file or move it away.") from error
        finally:
            temporary.unlink(missing_ok=True)
