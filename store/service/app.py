"""The service as an ASGI application: addresses, and what answers at each of them."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from types import MappingProxyType

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import FedChordError
from store.database import revision
from store.garbage import CLEAN_SECONDS, clean
from store.opening import OpenStore
from store.service.access import Access
from store.service.answers import JSON, json_answer, read_body, refusal
from store.service.codes import INVALID_REQUEST, Failure, failure_of
from store.service.downloads import Downloads
from store.service.methods import Methods
from store.service.rpc import MAX_BODY_BYTES, answer
from store.service.threads import Threads
from store.service.uploads import Uploads
from store.tenants import Caller

logger = logging.getLogger(__name__)

_CALLS = 32  # at once
_WAITING_CALLS = 64  # at once, which may wait for an upstream, or for a job
MAX_TRANSFERS = 40  # at once, for each has blocks in memory; the others wait in line
_PREPARED = 8  # downloads at once; a model of shards is hashed when it is asked for the first time
_SHORT_CALLS = 16  # blocks that are read, hashed or written at once
_LONG_CALLS = 8  # files that go to the object store at once


class Rpc:
    """`POST /jsonrpc`."""

    def __init__(
        self,
        store: OpenStore,
        access: Access,
        methods: Methods,
        *,
        calls: Threads,
        waiting: Threads,  # apart, so that an upstream that hangs does not keep others from their own models
    ) -> None:
        self._idle_seconds = store.settings.http_idle_seconds
        self._access = access
        self._methods = methods
        self._calls = calls
        self._waiting = waiting

    async def __call__(self, request: Request) -> Response:
        """Answer what was asked."""
        try:
            caller = await self._access.caller(request)
        except FedChordError as error:
            return self._access.refused(error)
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != JSON:
            status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
            what = f"Send the request as Content-Type: {JSON}."
            return refusal(Failure(code=INVALID_REQUEST, message="Invalid Request", data=what, status=status))
        try:
            body = await read_body(request, max_bytes=MAX_BODY_BYTES, idle_seconds=self._idle_seconds)
        except ClientDisconnect:
            return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it
        except FedChordError as error:
            return refusal(failure_of(error))
        threads = self._waiting if self._methods.may_wait(body) else self._calls
        return json_answer(await threads.run(self._answer, caller, body))

    def _answer(self, caller: Caller, body: bytes) -> bytes | None:
        return answer(body, lambda name, params: self._methods.call(caller, name, params))


class InLine:
    """Let so many requests of some routes be answered at once; the others wait."""

    def __init__(self, app: ASGIApp, turns: asyncio.Semaphore) -> None:
        self._app = app
        self._turns = turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer when it is the request's turn."""
        async with self._turns:
            await self._app(scope, receive, send)


def make_app(
    store: OpenStore,
    *,
    more_methods: Mapping[str, Callable[..., object]] = MappingProxyType({}),
    more_routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """Return the service of the store.

    `more_methods` are called at `/jsonrpc` by their whole names, with the Caller as first argument and the parameters,
    which are checked by their annotations, by name. `more_routes` come before ours and check access themselves.
    """
    short, long = Threads("block", _SHORT_CALLS), Threads("file", _LONG_CALLS)
    access = Access(store, short)
    methods = Methods(store, more_methods)
    rpc = Rpc(store, access, methods, calls=Threads("call", _CALLS), waiting=Threads("wait", _WAITING_CALLS))
    downloads = Downloads(store, access, short=short, long=Threads("prepare", _PREPARED))
    uploads = Uploads(store, access, short=short, long=long)

    @contextlib.asynccontextmanager
    async def cleaned(app: Starlette) -> AsyncIterator[None]:
        cleaning = asyncio.create_task(_clean(store, long))
        yield
        cleaning.cancel()

    async def health(request: Request) -> Response:
        """Tell whether the records answer."""
        try:
            found = await short.run(revision, store.engine)
        except FedChordError as error:
            return JSONResponse({"status": "failing", "reason": type(error).__name__}, HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse({"status": "ok", "revision": found})

    in_line = [Middleware(InLine, turns=asyncio.Semaphore(MAX_TRANSFERS))]
    app = Starlette(
        routes=[
            *more_routes,
            Route("/jsonrpc", rpc.__call__, methods=["POST"]),
            Route("/jsonrpc/upload/{method}", uploads.__call__, methods=["POST"], middleware=in_line),
            Route("/jsonrpc/download/{method}", downloads.__call__, methods=["GET", "POST"], middleware=in_line),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _http_error},
        lifespan=cleaned,
    )
    app.router.redirect_slashes = False  # an address is answered or not; keys do not travel on
    return app


async def _clean(store: OpenStore, threads: Threads) -> None:
    """Remove, from time to time, what ended uploads and deleted models have left."""
    while True:
        try:
            await threads.run(partial(clean, store.settings, store.engine, store.blobs))
        except FedChordError as error:
            logger.warning("Cleaning has to wait: %s", error.message, extra={"action": "clean_waits"})
        except Exception:
            logger.exception("Cleaning failed", extra={"action": "clean_failed"})
        await asyncio.sleep(CLEAN_SECONDS)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer as JSON-RPC does what is asked at an address, or in a way, that there is not."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    what = f"There is no {request.method} {request.url.path[:80]!r}: {status.phrase}."
    return refusal(
        Failure(code=INVALID_REQUEST, message="Invalid Request", data=what, status=status), headers=error.headers
    )
