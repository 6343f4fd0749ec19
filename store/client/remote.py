"""Speak to a model store's service over HTTP: JSON-RPC calls, uploads, and downloads that go on after a cut.

Redirects are not followed, for the API key and secret go with every request. A reply has a largest size, and a time
within which it has to be whole.
"""

import json
import logging
import random
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from itertools import count
from typing import Any, TypeVar
from urllib.parse import urlencode

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProtocolError, ReadTimeoutError

from common.errors import InvalidInput, InvalidSettings, Unavailable
from store.blobs import BLOCK_BYTES
from store.client.connections import prompt_pool
from store.client.multipart import MultipartBody, SourceFailedError
from store.client.replies import read_reply
from store.upstreams import check_upstream_url
from store.wire import to_wire

logger = logging.getLogger(__name__)

FIRST_ATTEMPTS = 3  # where nothing listens: somebody waits for the answer

_CONNECT_SECONDS = 10.0  # at most; a service that is there accepts at once
_SLOWEST_BYTES_PER_SECOND = 20e6  # at which a service stores a file that it has received, before it replies
_PROBES = 3  # unanswered ones, before a machine counts as gone
_LONGEST_PAUSE_SECONDS = 10.0
_LENGTHS = {"content-length", "transfer-encoding"}
_KEY = re.compile(r"[\x21-\x7e]{0,1000}")


Reply = TypeVar("Reply")


class Remote:
    """One service, with one caller's key; any number of threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        secret: str = "",
        timeout_seconds: float,  # without a byte; also for a whole reply that is no model
        attempts: int = 8,  # in a row without progress, of what can be repeated; of a first connection three
        pause_seconds: float = 0.2,  # before the second attempt, at most; doubled for each further one
        max_reply_bytes: int,
    ) -> None:
        if not _KEY.fullmatch(api_key) or not _KEY.fullmatch(secret):
            raise InvalidSettings(
                "The API key or secret has other characters than ASCII's visible ones; copy it again."
            )
        self.url = check_upstream_url(url)
        self.attempts = attempts
        self._headers = {"APIKey": api_key, "Secret": secret} if api_key or secret else {}
        self._timeout_seconds = timeout_seconds
        self._pause_seconds = pause_seconds
        self._max_reply_bytes = max_reply_bytes
        self._ids = count(1)
        self._pool = prompt_pool(
            maxsize=16, retries=False, blocksize=BLOCK_BYTES, socket_options=_socket_options(timeout_seconds)
        )

    def __repr__(self) -> str:
        """Return the URL, without the keys."""
        return f"Remote({self.url!r})"

    def call(
        self, method: str, params: Mapping[str, Any], *, repeatable: bool, read_seconds: float | None = None
    ) -> Any:
        """Return the method's result; raise what the service tells, or Unavailable.

        What is `repeatable` is sent again when the connection broke; otherwise only when there was none. A reply may
        take `read_seconds` to begin, by default the timeout.
        """
        request_id = next(self._ids)
        try:
            body = json.dumps(
                {"jsonrpc": "2.0", "id": request_id, "method": method, "params": to_wire(dict(params))}, allow_nan=False
            ).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"A parameter of {method} is not JSON ({error}); give another value.") from error
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}

        def attempt() -> Any:
            with self._request("POST", "/jsonrpc", body=body, headers=headers, read_seconds=read_seconds) as response:
                return self._reply(response, request_id)

        return self._repeated(attempt, repeatable=repeatable)

    def upload(self, method: str, body: MultipartBody, *, repeatable: bool) -> Any:
        """Return the result of the method that takes a file, as `call` does."""

        def attempt() -> Any:
            # A socket's timeout for sending is the one for connecting; a full buffer at the other end may take longer.
            with self._request(
                "POST",
                f"/jsonrpc/upload/{method}",
                body=iter(body),
                headers=body.headers,
                connect_seconds=self._timeout_seconds,
                read_seconds=self._timeout_seconds + body.size / _SLOWEST_BYTES_PER_SECOND,
            ) as response:
                return self._reply(response, None)

        return self._repeated(attempt, repeatable=repeatable)

    @contextmanager
    def download(
        self, params: Mapping[str, str | None], headers: Mapping[str, str]
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """Lend a reply of `fl.load_model` whose status is 200 or 206; raise what the service tells.

        Raise HTTPError when the connection breaks, also while it is lent.
        """
        query = urlencode({name: value for name, value in params.items() if value is not None})
        with self._request("GET", f"/jsonrpc/download/fl.load_model?{query}", headers=headers) as response:
            if response.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                self._reply(response, None)
                raise Unavailable(f"{self.url} answers a download with HTTP status {response.status}; check the URL.")
            yield response

    def pause(self, failures: int, error: Exception) -> None:
        """Wait before the next attempt after so many failures in a row."""
        logger.warning(
            "The connection with %s broke (%s); what was under way is repeated",
            self.url,
            error,
            extra={"action": "call_repeated"},
        )
        longest = min(_LONGEST_PAUSE_SECONDS, self._pause_seconds * 2 ** (failures - 1))
        time.sleep(longest * random.uniform(0.5, 1))  # noqa: S311  # spreads the load, hides nothing

    def unavailable(self, error: Exception) -> Unavailable:
        """Return the error that says that the service cannot be reached."""
        return Unavailable(f"The model store at {self.url} does not answer ({error}); start it, or correct its URL.")

    def close(self) -> None:
        """Close all connections."""
        self._pool.clear()

    def _repeated(self, attempt: Callable[[], Reply], *, repeatable: bool) -> Reply:
        failures, has_begun = 0, False
        while True:
            try:
                return attempt()
            except SourceFailedError as error:
                raise error.reason from None
            except HTTPError as error:
                failures += 1
                refused = isinstance(error, NewConnectionError)
                has_begun = has_begun or not refused
                limit = self.attempts if has_begun else min(self.attempts, FIRST_ATTEMPTS)
                may_repeat = repeatable if has_begun else refused
                if not may_repeat or is_timeout(error) or failures >= limit:
                    raise self.unavailable(error) from error
                self.pause(failures, error)

    @contextmanager
    def _request(
        self,
        verb: str,
        path: str,
        *,
        headers: Mapping[str, str],
        body: bytes | Iterable[bytes] | None = None,
        connect_seconds: float = _CONNECT_SECONDS,
        read_seconds: float | None = None,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        response = self._pool.request(
            verb,
            self.url + path,
            body=body,
            headers={**self._headers, **headers},
            redirect=False,
            preload_content=False,
            decode_content=False,
            timeout=urllib3.Timeout(
                connect=min(connect_seconds, self._timeout_seconds), read=read_seconds or self._timeout_seconds
            ),
        )
        try:
            # http.client takes headers that were cut for whole ones.
            if _LENGTHS.isdisjoint(name.lower() for name in response.headers):
                raise ProtocolError("the answer does not say where it ends")
            yield response
        finally:
            response.close()  # one that was read to its end has gone back to the pool before

    def _reply(self, response: urllib3.BaseHTTPResponse, request_id: int | None) -> Any:
        deadline = time.monotonic() + self._timeout_seconds
        data = bytearray()
        while block := response.read1(BLOCK_BYTES):
            data += block
            if len(data) > self._max_reply_bytes:
                raise Unavailable(f"The reply of {self.url} has more than {self._max_reply_bytes} bytes; ask for less.")
            if time.monotonic() > deadline:
                raise Unavailable(f"The reply of {self.url} took more than {self._timeout_seconds:g} s; try again.")
        return read_reply(bytes(data), request_id=request_id, status=response.status, url=self.url)


def _socket_options(timeout_seconds: float) -> list[tuple[int, int, int]]:
    """Return options with which a machine that is gone is noticed within the timeout, however long a reply may take."""
    options = [*HTTPConnection.default_socket_options, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    if hasattr(socket, "TCP_KEEPIDLE"):  # not on every system
        probe_seconds = max(1, int(timeout_seconds / (1 + _PROBES)))
        for option, value in (("IDLE", probe_seconds), ("INTVL", probe_seconds), ("CNT", _PROBES)):
            options.append((socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{option}"), value))
    return options


def is_timeout(error: HTTPError) -> bool:
    """Return whether nothing came, or could be sent, for too long."""
    cause = error.args[-1] if error.args else None  # a timeout while sending is wrapped
    return isinstance(error, ReadTimeoutError | ConnectTimeoutError) or isinstance(cause, TimeoutError)
