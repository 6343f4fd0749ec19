"""Say in JSON-RPC and in HTTP what went wrong.

| error | code | HTTP status of uploads and downloads |
|---|---|---|
| the body is not JSON | -32700 | 400 |
| it is not a JSON-RPC 2.0 request | -32600 | 400 |
| no such method | -32601 | 404 |
| `InvalidInput` | -32602 | 400 |
| anything that is not listed | -32603 | 500 |
| `NotFound` | -32001 | 404 |
| `Conflict` | -32002 | 409 |
| `AccessDenied` | -32003 | 401 without accepted keys, else 403 |
| `TooLarge` | -32004 | 413 |
| `BrokenUpload` | -32005 | 400 |
| `Unavailable` | -32006 | 503 |
| `DiskFull` | -32007 | 507 |
| `NoUpstream` | -32010 | 409 |
| `UpstreamUnavailable` | -32011 | 502 |
| `UpstreamCycle` | -32012 | 409 |

`/jsonrpc` itself answers with status 200 whatever a call came to, as its answer may be a batch; only a request that is
refused before it is read as JSON-RPC has the status of its error.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType

from common.errors import (
    AccessDenied,
    BrokenUpload,
    Conflict,
    DiskFull,
    FedChordError,
    InvalidInput,
    NotFound,
    NoUpstream,
    TooLarge,
    Unavailable,
    UpstreamCycle,
    UpstreamUnavailable,
)

logger = logging.getLogger(__name__)

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603

# The most exact class of an error that is listed counts.
CODES: Mapping[type[FedChordError], tuple[int, HTTPStatus]] = MappingProxyType(
    {
        NotFound: (-32001, HTTPStatus.NOT_FOUND),
        Conflict: (-32002, HTTPStatus.CONFLICT),
        AccessDenied: (-32003, HTTPStatus.FORBIDDEN),
        TooLarge: (-32004, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
        BrokenUpload: (-32005, HTTPStatus.BAD_REQUEST),
        Unavailable: (-32006, HTTPStatus.SERVICE_UNAVAILABLE),
        DiskFull: (-32007, HTTPStatus.INSUFFICIENT_STORAGE),
        NoUpstream: (-32010, HTTPStatus.CONFLICT),
        UpstreamUnavailable: (-32011, HTTPStatus.BAD_GATEWAY),
        UpstreamCycle: (-32012, HTTPStatus.CONFLICT),
        InvalidInput: (INVALID_PARAMS, HTTPStatus.BAD_REQUEST),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What a caller is told of an error."""

    code: int  # of JSON-RPC
    message: str  # a sentence for people
    data: str | None = None  # what was wrong, where JSON-RPC prescribes the message
    status: HTTPStatus = HTTPStatus.BAD_REQUEST  # of HTTP

    def document(self) -> dict[str, object]:
        """Return the `error` member of an answer."""
        document: dict[str, object] = {"code": self.code, "message": self.message}
        return document if self.data is None else {**document, "data": self.data}


def failure_of(error: Exception) -> Failure:
    """Return what the caller is told; an error that nobody meant to raise is logged, and told without its details."""
    for kind in type(error).__mro__:
        if kind in CODES and isinstance(error, FedChordError):
            code, status = CODES[kind]
            return Failure(code=code, message=error.message, status=status)
    logger.error("A call failed: %s", type(error).__name__, exc_info=error, extra={"action": "call_failed"})
    message = error.message if isinstance(error, FedChordError) else "The service failed; its log has the reason."
    return Failure(code=INTERNAL_ERROR, message=message, status=HTTPStatus.INTERNAL_SERVER_ERROR)
