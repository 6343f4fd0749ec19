# mypy: disable-error-code="attr-defined,misc,name-defined,no-untyped-call,arg-type"
# (kombu's stubs know little of its Redis transport)
"""Kombu's Redis transport, made to survive what others write where it reads, and to make fewer clients.

Whoever may write to a queue may write anything. An element that is not JSON, or a message whose headers are not what
Celery writes, raises inside the worker's event loop and ends it, again at each start; a small compressed one may unpack
to more than the memory holds; a key of another type makes each command on it fail. Here such an element is set aside in
a list beside the queue, `<queue>.dead`, such a key is removed, and the worker goes on.

Messages find their queue by its name alone. Kombu would look it up in a table in the broker, where others may write.
"""

import json
import logging
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import redis
from kombu.exceptions import BatchPublishError
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport import redis as kombu_redis
from redis.client import PubSub
from redis.exceptions import ResponseError

from common.dead_letters import note_dropped, set_aside
from common.elements import REPLIES, broadcast_trouble, element_trouble, unacknowledged_trouble

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_AT_ONCE = 500  # unacknowledged messages that are read in one go
_LONGEST_LOCK = 600_000  # milliseconds


def use_transport() -> None:
    """Let redis:// and rediss:// mean this transport, in this process."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:Transport"))


def is_wrong_type(error: BaseException | None) -> bool:
    """Return whether a command failed because somebody has put something else under its key."""
    return isinstance(error, ResponseError) and "WRONGTYPE" in str(error)


class QoS(kombu_redis.QoS):
    """What was taken from the queue and is not acknowledged: a hash and its index in the broker.

    Kombu changes the two in a transaction, which costs more than the change. The order does as well: whoever reads
    begins with the index, and an entry of the index without a message is forgotten.
    """

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note that the message was taken."""
        entry = json.dumps([message._raw, message.delivery_info["exchange"], message.delivery_info["routing_key"]])

        def note() -> None:
            with self.channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipeline:
                pipeline.hset(self.unacked_key, delivery_tag, entry)
                pipeline.zadd(self.unacked_index_key, {delivery_tag: time.time()})
                pipeline.execute()

        self._mending(note)
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Note that the message is done."""

        def forget() -> None:
            with self.channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipeline:
                pipeline.hdel(self.unacked_key, delivery_tag)
                pipeline.zrem(self.unacked_index_key, delivery_tag)
                pipeline.execute()

        self._while_connected(forget)
        virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Put the message back on its queue, or drop it."""
        self._while_connected(lambda: super(QoS, self).reject(delivery_tag, requeue))

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """Put back what has not been acknowledged for the visibility timeout."""
        with self.channel.conn_or_acquire() as client:
            left = client.pttl(self.unacked_mutex_key)
            if left == -1 or left > _LONGEST_LOCK:  # -1: it has no end
                client.delete(self.unacked_mutex_key)  # kombu's own lives for five minutes
        self._mending(lambda: super(QoS, self).restore_visible(start, num, interval))

    def restore_by_tag(self, tag: Any, client: redis.Redis | None = None, leftmost: bool = False) -> None:
        """Put the message back on its queue; set it aside if it is none."""
        if not self.channel.own_queue:
            super().restore_by_tag(tag, client, leftmost)
            return
        with self.channel.conn_or_acquire(client) as connected:
            if entry := connected.hget(self.unacked_key, tag):
                self._put_back(connected, tag, entry, leftmost=leftmost, mark=True)
            else:
                self._remove_from_indices(tag).execute()

    def take_up(self, *, but: Callable[[str], bool], mark: bool) -> int:
        """Put back all that is not acknowledged, but for messages whose task id is to be left; return how many.

        With `mark`, they are told to come again: their handling may have begun.
        """
        return self._mending(lambda: self._take_up(but, mark))

    def _take_up(self, but: Callable[[str], bool], mark: bool) -> int:
        taken = 0
        with self.channel.conn_or_acquire() as client:
            tags = client.zrange(self.unacked_index_key, 0, -1)
            for first in range(0, len(tags), _AT_ONCE):
                some = tags[first : first + _AT_ONCE]
                with client.pipeline(transaction=False) as pipeline:
                    for tag in some:
                        pipeline.hget(self.unacked_key, tag)
                    entries = pipeline.execute()
                if forgotten := [tag for tag, entry in zip(some, entries, strict=True) if entry is None]:
                    client.zrem(self.unacked_index_key, *forgotten)
                for tag, entry in zip(some, entries, strict=True):
                    if entry is not None and not but(_task_id(entry)):
                        taken += self._put_back(client, tag, entry, leftmost=False, mark=mark)
        return taken

    def _put_back(self, client: redis.Redis, tag: Any, entry: bytes, *, leftmost: bool, mark: bool) -> bool:
        """Move one message to its queue, unless somebody else has; return whether it is one."""
        queue = self.channel.own_queue
        trouble = unacknowledged_trouble(entry, queue)
        if trouble:
            self._remove_from_indices(tag).execute()
            set_aside(client, queue, entry, f"among the unacknowledged messages: {trouble}")
            return False
        message, _, _ = json.loads(entry)
        if mark:
            message["headers"]["redelivered"] = True
            message["properties"]["delivery_info"]["redelivered"] = True
        priority = self.channel._get_message_priority(message, reverse=False)
        key = self.channel._q_for_pri(queue, priority)

        def move(pipeline: Any) -> None:
            still_there = pipeline.hget(self.unacked_key, tag) is not None
            pipeline.multi()
            self._remove_from_indices(tag, pipeline)
            if still_there:
                (pipeline.lpush if leftmost else pipeline.rpush)(key, json.dumps(message))

        client.transaction(move, self.unacked_key)
        return True

    def _while_connected(self, do: Callable[[], None]) -> None:
        """Do it; without a broker the message stays unacknowledged, and comes again if the broker has kept it."""
        try:
            self._mending(do)
        except (redis.ConnectionError, redis.TimeoutError) as error:
            logger.info("A message is not acknowledged: %s.", error, extra={"action": "not_acknowledged"})

    def _mending(self, do: Callable[[], Answer]) -> Answer:
        """Do it; if a key has the wrong type, remove it and do it again."""
        try:
            return do()
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
            self.channel.mend(self.unacked_key, "hget", "")
            self.channel.mend(self.unacked_index_key, "zrange", 0, 0)
            self.channel.mend_queue(self.channel.own_queue)
            return do()


def _task_id(entry: bytes) -> str:
    """Return the id of the unacknowledged message's task; empty if it has none."""
    try:
        return str(json.loads(entry)[0]["headers"]["id"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return ""


class PublishBatch(kombu_redis.PublishBatch):
    """Messages that are written at once."""

    def __init__(self, channel: Any, max_size: int) -> None:
        super().__init__(channel, max_size)
        self._keys: set[str] = set()  # to which they are written

    def add(self, name: str, *arguments: Any) -> None:
        """Add one command for a message."""
        self._keys.add(arguments[0])
        super().add(name, *arguments)

    def flush(self) -> None:
        """Write them; a queue's key of another type is removed, so that they can be written the next time."""
        try:
            super().flush()
        except BatchPublishError as error:
            if is_wrong_type(error.__cause__):
                for key in self._keys:
                    self.channel.mend(key, "llen")
            raise


class Channel(kombu_redis.Channel):
    """A channel that looks at each element before kombu does."""

    QoS = QoS
    _shared_client: redis.Redis | None = None

    @property
    def own_queue(self) -> str:
        """Return the queue of this process's app, after which common/broker.py names the keys; empty without an app."""
        return str(self.unacked_key).partition("unacked.")[2]

    def mend(self, key: str, command: str, *arguments: Any) -> None:
        """Remove the key if the command, which reads, finds another type there; note it beside the queue."""
        client = self._create_client()
        with client.pipeline() as pipeline:
            try:
                pipeline.watch(key)
                try:
                    getattr(pipeline, command)(key, *arguments)
                    return
                except ResponseError as error:
                    if not is_wrong_type(error):
                        raise
                pipeline.multi()
                pipeline.delete(key)
                pipeline.execute()
            except redis.WatchError:  # somebody was quicker
                return
        queue = self.own_queue if key.startswith("unacked") else key.rsplit(self.sep, 1)[0]
        set_aside(client, queue, b"", f"the key {key!r} was of another type, and was removed with what it held")

    def mend_queue(self, queue: str) -> None:
        """Remove the queue's keys that are no lists."""
        for priority in self.priority_steps:
            self.mend(self._q_for_pri(queue, priority), "llen")

    def create_publish_batch(self, max_size: int) -> PublishBatch:
        """Collect messages to be written at once."""
        return PublishBatch(self, max_size)

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        self._mending_queue(queue, lambda: super(Channel, self)._put(queue, message, **options))

    def _size(self, queue: str) -> int:
        return self._mending_queue(queue, lambda: super(Channel, self)._size(queue))

    def _mending_queue(self, queue: str, do: Callable[[], Answer]) -> Answer:
        try:
            return do()
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
            self.mend_queue(queue)
            return do()

    # --- which queue a message is for -----------------------------------------------------------------------------

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> list[str]:
        return [f"{routing_key}.{exchange}" if exchange == REPLIES else routing_key]

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        if self.typeof(exchange).type == "fanout":
            self._fanout_queues[queue] = (exchange, routing_key.replace("#", "*"))

    def maybe_refresh_binding_expiry(self) -> None:
        """Do nothing: there are no tables of bindings."""

    def _delete(self, queue: str, exchange: str, *_: Any, **options: Any) -> None:
        self.auto_delete_queues.discard(queue)
        with self.conn_or_acquire(client=options.get("client")) as client:
            client.delete(*(self._q_for_pri(queue, priority) for priority in self.priority_steps))

    # --- clients --------------------------------------------------------------------------------------------------

    def _create_client(self, asynchronous: bool = False) -> redis.Redis:
        # kombu makes a client for each acknowledgement; one for each pool does, since a client holds no connection
        if asynchronous:
            client: redis.Redis = super()._create_client(asynchronous=True)
            return client
        if self._shared_client is None or self._shared_client.connection_pool is not self.pool:
            self._shared_client = super()._create_client()
        return self._shared_client

    def _get_pool(self, asynchronous: bool = False) -> redis.ConnectionPool:
        # kombu closes a lost connection's channel after the connection, and then asks it to put messages back: an
        # AttributeError, which ends the worker. A connection error is what it expects.
        if self.connection is None or self.connection.client is None:
            raise redis.ConnectionError("The connection to the broker is closed.")
        pool: redis.ConnectionPool = super()._get_pool(asynchronous=asynchronous)
        return pool

    @cached_property
    def subclient(self) -> PubSub:
        """Return the client that listens to broadcasts, and hears those alone that can be borne."""
        return _Listener(self._create_client(asynchronous=True).connection_pool)

    def _get_client(self) -> type[redis.Redis]:
        base: type[redis.Redis] = super()._get_client()
        channel = self

        class Client(base):  # type: ignore[valid-type]  # the base is chosen by kombu at run time
            def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
                if command_name != "BRPOP":
                    return super().parse_response(connection, command_name, **options)
                try:
                    response = super().parse_response(connection, command_name, **options)
                except ResponseError as error:
                    if not is_wrong_type(error):
                        raise
                    for queue in channel.active_queues:
                        channel.mend_queue(queue)
                    return None  # as if the queue had been empty
                if response:
                    queue = response[0].decode("utf-8", "replace").rsplit(channel.sep, 1)[0]
                    if trouble := element_trouble(response[1], queue):
                        set_aside(channel._create_client(), queue, response[1], trouble)
                        return None
                return response

        return Client


class _Listener(PubSub):
    """A client that hears only what kombu and Celery can bear."""

    def parse_response(self, *arguments: Any, **options: Any) -> Any:
        """Return the next broadcast or answer; None in place of what is not listened to."""
        response = super().parse_response(*arguments, **options)
        if isinstance(response, list | tuple) and response[0] in (b"message", b"pmessage"):
            channel = bytes(response[-2]).decode("utf-8", "replace")
            if trouble := broadcast_trouble(response[-1], channel):
                note_dropped(channel, trouble)
                return None
        return response


class Transport(kombu_redis.Transport):
    """The transport of every FedChord process."""

    Channel = Channel
