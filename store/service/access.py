"""Find out who calls.

With `http_access = "keys"`, a tenant says so in the headers `APIKey` and `Secret`. With `"open"`, whoever is on this
machine is the operator, and three things are checked so that a web page in the user's browser is not: the address of
the peer, the name under which it reached us (a foreign name that leads to 127.0.0.1 is called DNS rebinding) and the
page that asks. Source: https://owasp.org/www-community/attacks/csrf.
"""

import hashlib
import ipaddress
import time
from dataclasses import replace
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from common.errors import AccessDenied, FedChordError
from store.database import reading
from store.opening import OpenStore
from store.service.answers import refusal
from store.service.codes import failure_of
from store.service.threads import Threads
from store.tenants import Caller, authenticate, operator

_REMEMBERED_SECONDS = 5.0  # so long a tenant that was disabled may go on
_REMEMBERED_TENANTS = 1024
_PROXY_HEADERS = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


class Access:
    """Tell who calls."""

    def __init__(self, store: OpenStore, threads: Threads) -> None:
        self._store = store
        self._threads = threads
        self._remembered: dict[bytes, tuple[Caller, float]] = {}  # by a hash of key and secret; until when

    async def caller(self, request: Request) -> Caller:
        """Return who calls; raise AccessDenied, or Unavailable when the records do not answer."""
        if self._store.settings.http_access == "open":
            check_local(request)
            return operator(self._store.settings)
        api_key, secret = request.headers.get("APIKey", ""), request.headers.get("Secret", "")
        if not api_key or not secret:
            raise AccessDenied("Send the headers APIKey and Secret; the operator of the model store gives them to you.")
        keys = hashlib.sha256(f"{len(api_key)}:{api_key}{secret}".encode()).digest()
        now = time.monotonic()
        caller, until = self._remembered.get(keys, (None, 0.0))
        if caller is not None and now < until:
            return caller
        caller = await self._threads.run(self._authenticate, api_key, secret)
        if len(self._remembered) >= _REMEMBERED_TENANTS:
            self._remembered.clear()
        self._remembered[keys] = (caller, now + _REMEMBERED_SECONDS)
        return caller

    def refused(self, error: FedChordError) -> Response:
        """Return the answer to a request of which it is not known that it may be made."""
        failure = failure_of(error)
        if not isinstance(error, AccessDenied) or self._store.settings.http_access == "open":
            return refusal(failure)
        return refusal(replace(failure, status=HTTPStatus.UNAUTHORIZED), headers={"WWW-Authenticate": "APIKey"})

    def _authenticate(self, api_key: str, secret: str) -> Caller:
        with reading(self._store.engine) as connection:
            return authenticate(connection, api_key, secret)


def check_local(request: Request) -> None:
    """Raise AccessDenied unless a program on this machine asks, on its own account."""
    headers = request.headers
    peer = request.client.host if request.client else ""
    if not is_loopback(peer) or any(name in headers for name in _PROXY_HEADERS):
        raise AccessDenied(
            "This model store is open to its own machine only; set FEDCHORD_HTTP_ACCESS=keys to let others in."
        )
    host = headers.get("Host", "")
    if not is_loopback(_host_name(host)):
        raise AccessDenied(f"This model store is not called {host[:80]!r}; address it as 127.0.0.1 or localhost.")
    origin = headers.get("Origin", f"http://{host}")
    if origin != f"http://{host}" or headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise AccessDenied("Another site's web page asked for this; ask from a program on this machine.")


def is_loopback(host: str) -> bool:
    """Return whether the name or address is this machine's own, without asking any name server."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return (mapped or address).is_loopback


def _host_name(host: str) -> str:
    """Return the name of a Host header, without its port; empty when it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
