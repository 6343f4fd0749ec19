"""Send models: `/jsonrpc/download/fl.load_model`, asked by a JSON-RPC request (POST) or by a query (GET, HEAD).

The answer is the file itself, with a strong ETag that is the BLAKE3 of the whole, so that a cut download can go on:
`Range`, `If-Range` and `If-None-Match` mean what they do in RFC 9110, for POST as for GET.
"""

import asyncio
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.errors import FedChordError
from store.downloading import Download
from store.local import LocalApi
from store.opening import OpenStore
from store.service.access import Access
from store.service.answers import read_body, refusal
from store.service.codes import INVALID_PARAMS, INVALID_REQUEST, METHOD_NOT_FOUND, Failure, failure_of
from store.service.methods import DOWNLOAD_METHOD, Method
from store.service.rpc import parse
from store.service.threads import Threads
from store.tenants import Caller

logger = logging.getLogger(__name__)

_PIECE_BYTES = 256 * 1024  # handed over at a time: what a slow reader has not taken is copied, once for each

_MAX_REQUEST_BYTES = 64 << 10
_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.IGNORECASE)


class Downloads:
    """The service's downloads."""

    def __init__(self, store: OpenStore, access: Access, *, short: Threads, long: Threads) -> None:
        self._store = store
        self._access = access
        self._short = short  # read blocks
        self._long = long  # the first time that a model of shards is asked for as one file, it is hashed
        self._method = Method(LocalApi.prepare_download)

    async def __call__(self, request: Request) -> Response:
        """Answer with the file, or with a JSON-RPC error."""
        request_id: object = None
        try:
            caller = await self._access.caller(request)
        except FedChordError as error:
            return self._access.refused(error)
        try:
            method = request.path_params["method"]
            if method != DOWNLOAD_METHOD:
                return refusal(_unknown(method))
            params: Any = dict(request.query_params)
            if request.method == "POST":
                asked = await self._read(request)
                if isinstance(asked, Failure):
                    return refusal(asked)
                request_id, params = asked
            download = await self._long.run(self._prepare, caller, params)
            return await self._answer(request, download)
        except ClientDisconnect:
            return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it
        except Exception as error:  # whatever it is, the caller is told
            return refusal(failure_of(error), request_id=request_id)

    async def _read(self, request: Request) -> tuple[object, Any] | Failure:
        """Return the id and the parameters of a JSON-RPC request."""
        idle_seconds = self._store.settings.http_idle_seconds
        asked = parse(await read_body(request, max_bytes=_MAX_REQUEST_BYTES, idle_seconds=idle_seconds))
        is_right = isinstance(asked, dict) and asked.get("jsonrpc") == "2.0" and asked.get("method") == DOWNLOAD_METHOD
        if not is_right or not isinstance(asked.get("params", {}), dict | list):
            what = f'Send one JSON-RPC 2.0 request with the method "{DOWNLOAD_METHOD}" and its params.'
            return Failure(code=INVALID_REQUEST, message="Invalid Request", data=what)
        return asked.get("id"), asked.get("params", {})

    def _prepare(self, caller: Caller, params: Any) -> Download:
        download = self._method.call(LocalApi(self._store, caller), params)
        assert isinstance(download, Download)
        return download

    async def _answer(self, request: Request, download: Download) -> Response:
        etag = f'"{download.digest}"'
        headers = {
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, no-transform",
            "X-Content-Type-Options": "nosniff",
        }
        if _matches(request.headers.get("If-None-Match"), etag):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        part = find_part(request.headers.get("Range"), request.headers.get("If-Range"), etag, download.size)
        if part is None:
            headers["Content-Range"] = f"bytes */{download.size}"
            what = f"The file has {download.size} bytes; ask for a range of them."
            status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            return refusal(Failure(code=INVALID_PARAMS, message=what, status=status), headers=headers)
        if part.is_partial:
            headers["Content-Range"] = f"bytes {part.start}-{part.end - 1}/{download.size}"
        headers["Content-Length"] = str(part.end - part.start)
        headers["Content-Disposition"] = _disposition(download.file_name)
        blocks = Blocks(download, part, self._short)
        await blocks.prefetch()  # what is missing or damaged from its beginning is told with its own status
        return BlocksResponse(blocks, headers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What of a file is sent."""

    start: int  # offset of the first byte
    end: int  # offset after the last byte
    is_partial: bool  # it was asked for as a range


class Blocks:
    """The blocks of a part, each read in a thread while the one before it is sent."""

    def __init__(self, download: Download, part: Part, threads: Threads) -> None:
        self.part = part
        self._download = download
        self._threads = threads
        self._left = part.end - part.start  # bytes
        self._iterator: Iterator[bytes] | None = None
        self._next: asyncio.Future[bytes] | None = None

    async def prefetch(self) -> None:
        """Read the first block; raise what goes wrong."""
        self._iterator = await self._threads.run(self._download.open, self.part.start)
        self._next = asyncio.ensure_future(self._threads.run(self._read))
        try:
            await asyncio.shield(self._next)
        except BaseException:
            await self.close()
            raise

    async def next(self) -> bytes:
        """Return the next block, empty after the last one; raise what goes wrong."""
        if self._left == 0 or self._next is None:
            return b""
        block = (await self._next)[: self._left]
        self._left -= len(block)
        if not block:
            raise EOFError(f"{self._left} bytes are missing")
        if self._left:
            self._next = asyncio.ensure_future(self._threads.run(self._read))
        return block

    async def close(self) -> None:
        """Let go of the file or connection."""
        if self._next is not None:
            await asyncio.wait([self._next])
            self._next.exception()  # nobody else may have asked for it
        if self._iterator is not None and hasattr(self._iterator, "close"):
            await self._threads.run(self._iterator.close)

    def _read(self) -> bytes:
        assert self._iterator is not None
        return next(self._iterator, b"")


class BlocksResponse(Response):
    """Send blocks; cut the connection when they fail, so that nobody takes a part for the whole."""

    media_type = "application/octet-stream"

    def __init__(self, blocks: Blocks, headers: dict[str, str]) -> None:
        status = HTTPStatus.PARTIAL_CONTENT if blocks.part.is_partial else HTTPStatus.OK
        super().__init__(None, status_code=status, headers=headers)
        self._blocks = blocks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all that was asked for."""
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                while not gone.done() and (block := await self._blocks.next()):
                    for begin in range(0, len(block), _PIECE_BYTES):
                        piece = block[begin : begin + _PIECE_BYTES]
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
            if not gone.done():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (
            Exception
        ) as error:  # the status is sent, so nothing is left but to cut the connection: not to end the answer
            logger.error("A download broke off: %s", error, exc_info=error, extra={"action": "download_failed"})
        finally:
            gone.cancel()
            await self._blocks.close()


def find_part(wanted: str | None, condition: str | None, etag: str, size: int) -> Part | None:
    """Return what to send for the headers Range and If-Range; None when the range has no byte of the file.

    What cannot be read as one range, or is of another version of the file, is as if it were not there.
    """
    whole = Part(start=0, end=size, is_partial=False)
    found = _RANGE.fullmatch(wanted or "")
    if found is None or (condition is not None and condition.strip() != etag):
        return whole
    first, last = found.groups()
    if not first:
        if not last:
            return whole
        start, end = max(0, size - int(last)), size
    else:
        if last and int(last) < int(first):
            return whole
        start, end = int(first), min(size, int(last) + 1) if last else size
    return Part(start=start, end=end, is_partial=True) if start < end else None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _matches(condition: str | None, etag: str) -> bool:
    """Return whether the ETag is in a list of them, weak or strong."""
    if condition is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in condition.split(",")]
    return etag in tags or tags == ["*"]


def _disposition(file_name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", file_name)[:100] or "model"
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(file_name[:100], safe='')}"


def _unknown(method: str) -> Failure:
    return Failure(
        code=METHOD_NOT_FOUND,
        message="Method not found",
        data=f"There is no download {method[:80]!r}; there is {DOWNLOAD_METHOD}.",
        status=HTTPStatus.NOT_FOUND,
    )
