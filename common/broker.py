"""Make the Celery apps of coordinator and site: msgpack only, one queue each, acknowledged when done."""

import logging
import socket
from typing import Any

from celery import Celery
from celery.apps.worker import Worker
from kombu import Queue
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from common.consumer import TakeUpUnacknowledged
from common.errors import BrokerUnavailable
from common.queues import COORDINATOR_QUEUE, site_queue
from common.settings import Settings
from common.transport import use_transport

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0  # a client that asks a broker which is not there gets its error after this long
_ANSWER_SECONDS = 15.0  # and so does one whose broker has stopped to answer, as behind a network that is cut
_BRIEF_SECONDS = 2.0  # for whom anything the broker says is not worth a longer wait


class QuietWorker(Worker):
    """A worker that does not talk to every other worker: no mingle, no gossip, and a node name of its own."""

    def __init__(self, app: Celery | None = None, hostname: str | None = None, **options: Any) -> None:
        options.update(without_mingle=True, without_gossip=True)
        if hostname is None or hostname.startswith("celery@"):  # the command line's default, the same for every site
            hostname = f"{(app or self.app).main}@{socket.gethostname()}"
        super().__init__(app, hostname, **options)


class QuietCelery(Celery):
    """Celery whose `worker` command starts a QuietWorker."""

    @property
    def Worker(self) -> type[QuietWorker]:  # noqa: N802 (Celery's name)
        """Return the worker class bound to this app."""
        worker: type[QuietWorker] = self.subclass_with_self(QuietWorker)
        return worker


def make_coordinator_app(settings: Settings) -> Celery:
    """Make the app of the coordinator's workers and of everybody who publishes for it."""
    app = _make_app("coordinator", settings, queue=COORDINATOR_QUEUE)
    app.conf.update(
        result_backend=f"common.chords:ChordBackend+{settings.broker_url.get_secret_value()}",
        result_expires=7 * 24 * 3600,
        worker_pool="threads",  # handlers wait for the store and the database, numpy and hashing release the lock
        worker_concurrency=settings.coordinator_threads,
        include=["coordinator.tasks"],
    )
    return app


def make_site_app(settings: Settings) -> Celery:
    """Make the app of a site's worker; it has no result backend, so it sees nothing of any other site."""
    app = _make_app(settings.site_name, settings, queue=site_queue(settings.site_name))
    app.conf.update(
        worker_pool="prefork",  # a part runs in a child, so the worker answers while it trains
        worker_concurrency=settings.site_slots,
        task_reject_on_worker_lost=True,  # a killed child's part is done again
        include=["worker.tasks"],
    )
    return app


def connect(settings: Settings) -> Redis:
    """Return a client of the broker; raise BrokerUnavailable when it does not answer."""
    url = settings.broker_url.get_secret_value()
    try:
        client: Redis = Redis.from_url(url, socket_connect_timeout=_CONNECT_SECONDS, socket_timeout=_ANSWER_SECONDS)
        client.ping()
    except (RedisError, ValueError) as error:
        raise BrokerUnavailable(
            f"The broker at {hide_password(url)} does not answer ({error}); start it or correct FEDCHORD_BROKER_URL."
        ) from error
    return client


def connect_briefly(settings: Settings) -> Redis:
    """Return a client of the broker that fails rather than waits; it connects at its first use.

    Raise BrokerUnavailable for a URL that is none.
    """
    url = settings.broker_url.get_secret_value()
    try:
        client: Redis = Redis.from_url(
            url, socket_connect_timeout=_BRIEF_SECONDS, socket_timeout=_BRIEF_SECONDS, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as error:
        raise BrokerUnavailable(f"{hide_password(url)} is no URL of a broker; correct FEDCHORD_BROKER_URL.") from error
    return client


def hide_password(url: str) -> str:
    """Return the URL as it may be shown."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else "(not a URL)"


def _make_app(name: str, settings: Settings, *, queue: str) -> Celery:
    use_transport()
    app = QuietCelery(name, broker=settings.broker_url.get_secret_value(), set_as_current=False)
    app.conf.update(
        accept_content=["msgpack"],
        task_serializer="msgpack",
        result_serializer="msgpack",
        event_serializer="msgpack",
        task_queues=[Queue(queue)],
        task_default_queue=queue,
        task_ignore_result=True,
        task_acks_late=True,
        task_track_started=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # a broker that refuses (its memory or disk is full) is waited for, too
        worker_consumer="common.consumer:PatientConsumer",
        worker_enable_prefetch_count_reduction=False,  # the channel has its own count, made anew with it
        broker_transport_options={
            "visibility_timeout": settings.visibility_timeout_seconds,
            "unacked_key": f"unacked.{queue}",  # keys of its own, so that a site's broker user needs no others
            "unacked_index_key": f"unacked_index.{queue}",
            "unacked_mutex_key": f"unacked_mutex.{queue}",
            "socket_keepalive": True,
            "socket_connect_timeout": _CONNECT_SECONDS,
            "socket_timeout": _ANSWER_SECONDS,
            "health_check_interval": 15,
        },
        redis_socket_keepalive=True,
        redis_socket_connect_timeout=_CONNECT_SECONDS,
        redis_socket_timeout=_ANSWER_SECONDS,
        enable_utc=True,
    )
    app.steps["consumer"].add(TakeUpUnacknowledged)
    return app
