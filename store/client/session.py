"""Call a service and log the calls: what every method of `store.client.Api` stands on."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

from common.errors import Unavailable
from common.settings import Settings
from store.client.multipart import MultipartBody, opened
from store.client.remote import Remote

Result = TypeVar("Result")

_TIMEOUT_SECONDS = 60.0
_MOVE_SECONDS = 24 * 3600.0
_MAX_REPLY_BYTES = 64 << 20  # some 40,000 models
_REPEATABLE = (
    "fl.get_",
    "fl.exists_",
    "fl.list_",
    "fl.proxy_",
    "fl.initialize_",
    "fl.offer_",
    "fl.register_",
    "job.get",
)

_logger = logging.getLogger("store.client")


def set_logger(logger: logging.Logger) -> None:
    """Log every call to this logger from now on: at INFO those that move a model, at DEBUG all others."""
    global _logger
    _logger = logger


class Session:
    """One service, called by one tenant; any number of threads may share it."""

    def __init__(
        self,
        url: str | None = None,  # of the service; without it, URL and keys are those of the settings
        *,
        api_key: str | None = None,
        secret: str | None = None,
        timeout_seconds: float = _TIMEOUT_SECONDS,  # without a byte, before the service counts as gone
        max_reply_bytes: int = _MAX_REPLY_BYTES,  # of what is no model
    ) -> None:
        """Raise InvalidInput for a URL or key that cannot be one; nothing is sent yet."""
        if url is None:  # keys of the settings never go to another URL than that of the settings
            settings = Settings.load()
            url = settings.store_url
            api_key = settings.store_api_key if api_key is None else api_key
            secret = settings.store_secret.get_secret_value() if secret is None else secret
        self._remote = Remote(
            url,
            api_key=api_key or "",
            secret=secret or "",
            timeout_seconds=timeout_seconds,
            max_reply_bytes=max_reply_bytes,
        )

    def call(self, method: str, **params: Any) -> Any:
        """Call any method of the service by its whole name, as "fl.get_stores" or "job.get"; return its result."""
        repeatable = method.startswith(_REPEATABLE)
        return _logged(method, logging.DEBUG, lambda: self._remote.call(method, params, repeatable=repeatable))

    def close(self) -> None:
        """Close all connections; a later call opens new ones."""
        self._remote.close()

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self.close()

    def _put(self, name: str, file: str | Path | BinaryIO, **fields: Any) -> dict[str, Any]:
        with opened(file) as source:
            body = MultipartBody(fields, source)
            put = self._transfer(name, lambda: self._remote.upload(f"fl.{name}", body, repeatable=False), stacklevel=2)
        return self._checked(name, dict, put)

    def _transfer(self, name: str, transfer: Callable[[], Result], *, stacklevel: int = 1) -> Result:
        return _logged(f"fl.{name}", logging.INFO, transfer, stacklevel=stacklevel + 2)

    def _ask(self, name: str, kind: type[Result], **params: Any) -> Result:
        """Return the answer to a call that soon ends."""
        method = f"fl.{name}"
        repeatable = method.startswith(_REPEATABLE)
        answer = _logged(
            method, logging.DEBUG, lambda: self._remote.call(method, params, repeatable=repeatable), stacklevel=3
        )
        return self._checked(name, kind, answer)

    def _ask_to_move(self, name: str, **params: Any) -> dict[str, Any]:
        """Return the answer to a call in which the service moves a model itself, which takes as long as it takes."""
        method = f"fl.{name}"
        answer = _logged(
            method,
            logging.INFO,
            lambda: self._remote.call(method, params, repeatable=True, read_seconds=_MOVE_SECONDS),
            stacklevel=3,
        )
        return self._checked(name, dict, answer)

    def _checked(self, name: str, kind: type[Result], answer: Any) -> Result:
        if not isinstance(answer, kind):
            raise Unavailable(
                f"{self._remote.url} answers fl.{name} with {type(answer).__name__}, not {kind.__name__}; check it."
            )
        return answer


def _logged(method: str, level: int, call: Callable[[], Result], *, stacklevel: int = 2) -> Result:
    """Return what the call returns, and log how long it took; `stacklevel` tells whose line the log shows."""
    extra = {"action": "store_called", "method": method}
    started = time.monotonic()
    try:
        result = call()
    except Exception as error:
        seconds = time.monotonic() - started
        _logger.log(level, "%s failed after %.3f s: %s", method, seconds, error, extra=extra, stacklevel=stacklevel)
        raise
    _logger.log(level, "%s took %.3f s", method, time.monotonic() - started, extra=extra, stacklevel=stacklevel)
    return result
