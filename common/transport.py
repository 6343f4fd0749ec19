"""Kombu's Redis transport, made to survive what is no message, and to make fewer clients.

Whoever may write to a queue may write anything. An element that is not JSON, or a message whose headers are not what
Celery writes, raises inside the worker's event loop and ends it, again at each start; a small compressed one may unpack
to more than the memory holds. Here such an element is set aside in a list beside the queue, `<queue>.dead`, and the
worker goes on.
"""

import base64
import json
import logging
import time
from typing import Any

import msgpack
import redis
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis

logger = logging.getLogger(__name__)

MAX_DEAD = 1000  # elements kept for each queue, the newest
MAX_DEAD_BYTES = 64 * 1024  # kept of each
MAX_ELEMENT_BYTES = 16 * 2**20  # a message of 4 MiB is 5.6 MB as base64; what is larger is not parsed

_TEXT_OR_NONE = ("root_id", "parent_id", "group", "eta", "expires", "argsrepr", "kwargsrepr", "origin", "shadow")


def use_transport() -> None:
    """Let redis:// and rediss:// mean this transport, in this process."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:Transport"))


def dead_letter_key(queue: str) -> str:
    """Return the broker key of the list of what was set aside from the queue."""
    return f"{queue}.dead"


def set_aside(client: redis.Redis, queue: str, element: bytes, reason: str) -> None:
    """Put an element that cannot be handled on the queue's dead-letter list, with the time and the reason."""
    letter = {
        "at": time.time(),
        "reason": reason,
        "bytes": len(element),
        "base64": base64.b64encode(element[:MAX_DEAD_BYTES]).decode("ascii"),
    }
    with client.pipeline() as pipeline:
        pipeline.lpush(dead_letter_key(queue), json.dumps(letter))
        pipeline.ltrim(dead_letter_key(queue), 0, MAX_DEAD - 1)
        pipeline.execute()
    logger.error(
        "An element of queue %s is no message and was set aside: %s",
        queue,
        reason,
        extra={"action": "set_aside", "queue": queue},
    )


class Channel(kombu_redis.Channel):
    """A channel that looks at each element before kombu does."""

    _shared_client: redis.Redis | None = None

    def _create_client(self, asynchronous: bool = False) -> redis.Redis:
        # kombu makes a client for each acknowledgement; one for each pool does, since a client holds no connection
        if asynchronous:
            client: redis.Redis = super()._create_client(asynchronous=True)  # type: ignore[misc]  # the stubs lack it
            return client
        if self._shared_client is None or self._shared_client.connection_pool is not self.pool:
            self._shared_client = super()._create_client()  # type: ignore[misc]  # the stubs lack it
        return self._shared_client

    def _get_pool(self, asynchronous: bool = False) -> redis.ConnectionPool:
        # kombu closes a lost connection's channel after the connection, and then asks it to put messages back: an
        # AttributeError, which ends the worker. A connection error is what it expects.
        if self.connection is None or self.connection.client is None:
            raise redis.ConnectionError("The connection to the broker is closed.")
        pool: redis.ConnectionPool = super()._get_pool(asynchronous=asynchronous)  # type: ignore[misc]  # see above
        return pool

    def _get_client(self) -> type[redis.Redis]:
        base: type[redis.Redis] = super()._get_client()  # type: ignore[misc]  # the stubs lack it
        channel = self

        class Client(base):  # type: ignore[misc,valid-type]  # the base is chosen by kombu at run time
            def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
                response = super().parse_response(connection, command_name, **options)
                if command_name == "BRPOP" and response and (reason := _trouble(response[1])):
                    queue = response[0].decode("utf-8", "replace").rsplit(channel.sep, 1)[0]
                    set_aside(channel._create_client(), queue, response[1], reason)
                    return None  # as if the queue had been empty
                return response

        return Client


class Transport(kombu_redis.Transport):
    """The transport of every FedChord process."""

    Channel = Channel


def _trouble(element: bytes) -> str:
    """Return why kombu could not make a message of the element; empty if it can."""
    if len(element) > MAX_ELEMENT_BYTES:
        return f"it has more than {MAX_ELEMENT_BYTES} bytes"
    try:
        message = json.loads(element)
        properties = message["properties"]
        if not isinstance(properties["delivery_tag"], str) or not isinstance(message["headers"], dict):
            return "its delivery tag or its headers are missing"
        if not all(isinstance(properties["delivery_info"][name], str) for name in ("exchange", "routing_key")):
            return "it does not say where it was sent to"
        if properties.get("body_encoding") != "base64":
            return "its body is not base64"
        body = base64.b64decode(message["body"], validate=True)
        if not isinstance(message["content-type"], str) or not isinstance(message["content-encoding"], str):
            return "it does not say what its body is"
        headers = message["headers"]
        if headers.get("compression") is not None:
            return "it is compressed, which no message of FedChord is"
        if "task" not in headers:  # an answer to remote control
            return ""
        return _header_trouble(headers) or _body_trouble(message["content-type"], body)
    except (ValueError, KeyError, TypeError, RecursionError, msgpack.UnpackException) as error:
        return f"{type(error).__name__}: {error}"[:500]


def _header_trouble(headers: dict[str, Any]) -> str:
    """Return which header Celery could not bear; empty if there is none."""
    if not all(isinstance(headers.get(name), str) for name in ("task", "id")):
        return "its task or its id is no text"
    if wrong := [name for name in _TEXT_OR_NONE if not isinstance(headers.get(name), str | None)]:
        return f"its header {wrong[0]} is no text"
    if type(headers.get("retries", 0)) not in (int, type(None)):
        return "its number of retries is no number"
    if headers.get("stamped_headers"):
        return "it is stamped, which no message of FedChord is"
    limits = headers.get("timelimit")
    if limits is not None and not (
        isinstance(limits, list) and len(limits) == 2 and all(isinstance(limit, int | float | None) for limit in limits)
    ):
        return "its time limits are not two numbers"
    return ""


def _body_trouble(content_type: str, body: bytes) -> str:
    """Return why a task's body is none, or asks the worker to send on what others wrote; empty if it is one."""
    if content_type != "application/x-msgpack":
        return f"its body is {content_type[:80]}, not msgpack"
    fields = msgpack.unpackb(body)
    if not isinstance(fields, list) or [type(field) for field in fields] != [list, dict, dict]:
        return "its body is not the three parts of a task"
    if any(fields[2].get(name) for name in ("callbacks", "errbacks", "chain")):
        return "it asks for other tasks to be sent, which no message of FedChord does"
    return ""
