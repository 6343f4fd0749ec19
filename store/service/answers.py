"""Send answers over HTTP, also while the caller is still sending what nobody wants."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.errors import BrokenUpload, TooLarge
from store.service.codes import Failure
from store.service.rpc import encode_failure

JSON = "application/json"

_WAS_READ = "fedchord.was_read"  # in a request's scope when its body was read to its end
_SLOWEST_BYTES_PER_SECOND = 1000  # at which a body has to come, but for one time of being idle
_LINGER_SECONDS = 3.0  # so long what still comes is thrown away, so that the caller gets to read the answer


class Refusal(Response):
    """The answer to a request whose body may not have been read to its end.

    To close a connection on which bytes wait makes the other side lose what it has not read yet: the answer.
    """

    media_type = JSON

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; if more comes, throw it away for a while, and close the connection."""
        if not _has_more(scope):
            await super().__call__(scope, receive, send)
            return
        self.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_answer(body: bytes | None) -> Response:
    """Return the answer to a request that was read; there is nothing to say to notifications."""
    return Response(status_code=HTTPStatus.NO_CONTENT) if body is None else Response(body, media_type=JSON)


def refusal(failure: Failure, *, request_id: object = None, headers: Mapping[str, str] | None = None) -> Refusal:
    """Return the answer that says why."""
    return Refusal(encode_failure(request_id, failure), status_code=failure.status, headers=headers)


async def read_body(request: Request, *, max_bytes: int, idle_seconds: float) -> bytes:
    """Return the request's body; raise TooLarge, BrokenUpload when it stops coming, or ClientDisconnect."""
    too_large = TooLarge(f"The request has more than {max_bytes} bytes; send less at a time.")
    if content_length(request) > max_bytes:
        raise too_large
    body = bytearray()
    async for piece in pieces(request, idle_seconds):
        body += piece
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


async def pieces(request: Request, idle_seconds: float) -> AsyncIterator[bytes]:
    """Yield the request's body as it comes; raise BrokenUpload when it stops, ClientDisconnect when it is cut."""
    more = True
    left_seconds = idle_seconds  # to wait; what comes gives some back, so that a byte now and then is not enough
    while more:
        began = time.monotonic()
        try:
            async with asyncio.timeout(left_seconds):
                message = await request.receive()
        except TimeoutError:
            raise BrokenUpload(f"Next to nothing came for {idle_seconds:g} s; send the request again.") from None
        left_seconds -= time.monotonic() - began
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        if piece := message.get("body", b""):
            left_seconds = min(idle_seconds, left_seconds + len(piece) / _SLOWEST_BYTES_PER_SECOND)
            yield piece
    request.scope[_WAS_READ] = True


def content_length(request: Request) -> int:
    """Return how many bytes the body has, as its sender says; 0 when that is not said."""
    value = request.headers.get("Content-Length", "")
    return int(value) if value.isascii() and value.isdigit() else 0


def _has_more(scope: Scope) -> bool:
    names = {name for name, value in scope["headers"] if value != b"0"}
    return not scope.get(_WAS_READ, False) and not names.isdisjoint({b"content-length", b"transfer-encoding"})
