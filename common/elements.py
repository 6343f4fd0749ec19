"""Tell what is wrong with bytes that others have put where kombu and Celery read, before either of them does.

Each function returns a reason, for people, or nothing: an element of a queue, a broadcast of remote control or of
events, an entry of the unacknowledged messages. Whatever passes can be read by kombu and by Celery without an error,
makes them send nothing that others wrote, and takes no more memory than it says.
"""

import base64
import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import msgpack

from common.queues import COORDINATOR_QUEUE

MAX_ELEMENT_BYTES = 16 * 2**20  # a message of 4 MiB is 5.6 MB as base64; what is larger is not parsed
MAX_BROADCAST_BYTES = 256 * 1024  # remote control and events are some hundred
MAX_WAIT_SECONDS = 600  # no message of FedChord asks to be handled later than in some seconds; clocks differ
REPLIES = "reply.celery.pidbox"  # the exchange of remote control's answers; a queue's name is `<id>.<exchange>`

# What a worker does when it is asked on the control channel, where everybody may write: it tells how it is. Celery's
# other commands stop it, slow it down, take its queue away or make it drop tasks.
CONTROL_COMMANDS = frozenset(
    (
        *("active", "active_queues", "clock", "conf", "disable_events", "dump_active", "dump_reserved", "dump_revoked"),
        *("dump_schedule", "dump_tasks", "enable_events", "heartbeat", "ping", "query_task", "registered", "report"),
        *("reserved", "revoked", "scheduled", "stats"),
    )
)

_TEXT_OR_NONE = ("root_id", "parent_id", "group", "argsrepr", "kwargsrepr", "origin", "shadow")
_MAX_ID_CHARACTERS = 500
_MAX_TEXT_CHARACTERS = 10_000  # of a header
_MAX_SMALL_BYTES = 256 * 1024  # a chord's results are some bytes for each site
_BIN = {b"\xc4": 1, b"\xc5": 2, b"\xc6": 4}  # msgpack's bytes, and the width of their length
_MAX_RETRIES = 10**9
_ERRORS = (ValueError, KeyError, TypeError, OverflowError, RecursionError, msgpack.UnpackException)


def element_trouble(element: bytes, queue: str) -> str:
    """Return why the element of the queue is no message that a worker can bear; empty if it is one."""
    if len(element) > MAX_ELEMENT_BYTES:
        return f"it has more than {MAX_ELEMENT_BYTES} bytes"
    try:
        return _message_trouble(json.loads(element), queue)
    except _ERRORS as error:
        return _said(error)


def unacknowledged_trouble(entry: bytes, queue: str) -> str:
    """Return why the entry of the queue's unacknowledged messages cannot be put back; empty if it can."""
    if len(entry) > MAX_ELEMENT_BYTES + 1024:
        return f"it has more than {MAX_ELEMENT_BYTES} bytes"
    try:
        message, exchange, routing_key = json.loads(entry)
        if exchange not in ("", queue) or routing_key != queue:
            return f"it is for {str(routing_key)[:80]!r} by {str(exchange)[:80]!r}"
        return _message_trouble(message, queue)
    except _ERRORS as error:
        return _said(error)


def broadcast_trouble(data: bytes, channel: str) -> str:
    """Return why what was published on the channel is not listened to; empty if it is."""
    if len(data) > MAX_BROADCAST_BYTES:
        return f"it has more than {MAX_BROADCAST_BYTES} bytes"
    try:
        message = json.loads(data)
        packed = _body(message)
        if message["content-type"] != "application/x-msgpack":
            return f"its body is {message['content-type'][:80]}, not msgpack"
        body = msgpack.unpackb(packed)
        clock = message["headers"].get("clock") or 0
        if type(clock) is not int or abs(clock) >= 2**53:
            return "its clock is no number"
        return _control_trouble(body) if channel.endswith(".pidbox") else ""
    except _ERRORS as error:
        return _said(error)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _message_trouble(message: Any, queue: str) -> str:
    body = _body(message)
    headers, properties = message["headers"], message["properties"]
    if type(properties.get("priority")) not in (int, type(None)):
        return "its priority is no number"
    if queue.endswith(f".{REPLIES}"):
        return ""
    if "task" not in headers:
        return "it names no task"
    return _header_trouble(headers, queue) or _body_trouble(message["content-type"], body, queue)


def _body(message: Any) -> bytes:
    """Return the message's body; raise ValueError, KeyError or TypeError if kombu could not make a message of it."""
    properties, headers = message["properties"], message["headers"]
    if not isinstance(properties["delivery_tag"], str) or not isinstance(headers, dict):
        raise TypeError("its delivery tag or its headers are missing")
    if not all(isinstance(properties["delivery_info"][name], str) for name in ("exchange", "routing_key")):
        raise TypeError("it does not say where it was sent to")
    if properties.get("body_encoding") != "base64":
        raise TypeError("its body is not base64")
    if not isinstance(message["content-type"], str) or not isinstance(message["content-encoding"], str):
        raise TypeError("it does not say what its body is")
    if headers.get("compression") is not None:
        raise TypeError("it is compressed, which no message of FedChord is")
    return base64.b64decode(message["body"], validate=True)


def _header_trouble(headers: dict[str, Any], queue: str) -> str:
    """Return which header Celery could not bear, or must not heed; empty if there is none."""
    if not all(isinstance(headers.get(name), str) for name in ("task", "id")):
        return "its task or its id is no text"
    if len(headers["id"]) > _MAX_ID_CHARACTERS:
        return f"its id has more than {_MAX_ID_CHARACTERS} characters"
    family = queue.partition(".")[0]  # Celery's own tasks, which every worker has, send what others wrote
    if not headers["task"].startswith(f"{family}."):
        return f"its task {headers['task'][:80]!r} is none of {family}'s"
    if wrong := [name for name in _TEXT_OR_NONE if not isinstance(headers.get(name), str | None)]:
        return f"its header {wrong[0]} is no text"
    if any(len(headers.get(name) or "") > _MAX_TEXT_CHARACTERS for name in ("task", *_TEXT_OR_NONE)):
        return f"a header has more than {_MAX_TEXT_CHARACTERS} characters"
    if type(retries := headers.get("retries", 0)) not in (int, type(None)) or not 0 <= (retries or 0) <= _MAX_RETRIES:
        return "its number of retries is no number"
    if headers.get("stamped_headers"):
        return "it is stamped, which no message of FedChord is"
    if headers.get("expires") is not None:
        return "it expires, which no message of FedChord does"
    return _eta_trouble(headers.get("eta")) or _limit_trouble(headers.get("timelimit"))


def _eta_trouble(eta: Any) -> str:
    if eta is None:
        return ""
    if not isinstance(eta, str):
        return "its time (eta) is no text"
    at = datetime.fromisoformat(eta)
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    if at - datetime.now(UTC) > timedelta(seconds=MAX_WAIT_SECONDS):
        return f"it asks to be handled at {eta[:40]}, and a worker keeps nothing for more than {MAX_WAIT_SECONDS} s"
    if at.year < 1980:  # before some systems' clocks begin
        return f"it asks to be handled at {eta[:40]}"
    return ""


def _limit_trouble(limits: Any) -> str:
    if limits is None:
        return ""
    if not isinstance(limits, list) or len(limits) != 2:
        return "its time limits are not two numbers"
    for limit in limits:
        if limit is not None and (type(limit) not in (int, float) or not math.isfinite(limit) or limit < 0):
            return "its time limits are not two numbers"
    return ""


def _body_trouble(content_type: str, body: bytes, queue: str) -> str:
    """Return why a task's body is none, or asks the worker to send on what others wrote; empty if it is one."""
    if content_type != "application/x-msgpack":
        return f"its body is {content_type[:80]}, not msgpack"
    if _small_bytes(body) > _MAX_SMALL_BYTES:
        return f"it has more than {_MAX_SMALL_BYTES} bytes beside its envelope"
    fields = msgpack.unpackb(body)
    if not isinstance(fields, list) or [type(field) for field in fields] != [list, dict, dict]:
        return "its body is not the three parts of a task"
    # a site's part names its round's chord, and the site, which has no result backend, does not heed it
    sends = ("callbacks", "errbacks", "chain") + (("chord",) if queue == COORDINATOR_QUEUE else ())
    if any(fields[2].get(name) for name in sends):
        return "it asks for other tasks to be sent, which no message of FedChord does"
    return ""


def _small_bytes(body: bytes) -> int:
    """Return how many bytes are not the content of one envelope: each of them may become an object."""
    if body[:2] != b"\x93\x91" or body[2:3] not in _BIN:  # three fields, the first of which is a list of one
        return len(body)
    width = _BIN[body[2:3]]
    return len(body) - int.from_bytes(body[3 : 3 + width], "big")


def _control_trouble(body: Any) -> str:
    """Return why a worker does not do what it is asked by remote control; empty if it does."""
    if not isinstance(body, dict):
        return "it is no command"
    if (method := body.get("method")) not in CONTROL_COMMANDS:
        return f"workers do not take the command {str(method)[:80]!r} from the broker; send them a signal"
    destination = body.get("destination")
    if destination is not None and not (
        isinstance(destination, list) and all(isinstance(each, str) for each in destination)
    ):
        return "its destination is no list of names"
    pattern = body.get("pattern")
    if not isinstance(pattern, str | None) or len(pattern or "") > 200 or body.get("matcher") not in (None, "glob"):
        return "its pattern is none"  # a regular expression might keep the worker busy for ever
    arguments = body.get("arguments")
    if not isinstance(arguments, dict | None) or not all(isinstance(name, str) for name in arguments or {}):
        return "its arguments have no names"
    reply_to = body.get("reply_to")
    if reply_to is not None and not (
        isinstance(reply_to, dict)
        and reply_to.get("exchange") == REPLIES  # not on anybody's queue
        and isinstance(reply_to.get("routing_key"), str)
    ):
        return "its answer is for nobody who asks by remote control"
    if not isinstance(body.get("ticket"), str | None):
        return "its ticket is no text"
    return ""
