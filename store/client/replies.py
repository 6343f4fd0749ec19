"""Read what a model store's service answered, and raise the errors that it tells of as our own.

Nothing in an answer is trusted: one that is no JSON-RPC 2.0 is Unavailable, which says what came instead.
"""

import json
from http import HTTPStatus
from typing import Any

from common.errors import AccessDenied, FedChordError, InvalidInput, Unavailable
from store.service.codes import CODES, INVALID_REQUEST, METHOD_NOT_FOUND, PARSE_ERROR
from store.wire import from_wire

_CLASSES = {code: kind for kind, (code, _) in CODES.items()}
_CLASSES |= {PARSE_ERROR: InvalidInput, INVALID_REQUEST: InvalidInput, METHOD_NOT_FOUND: Unavailable}
_SHOWN_CHARACTERS = 100  # of an answer that makes no sense
_MESSAGE_CHARACTERS = 2000  # of an error


def read_reply(data: bytes, *, request_id: int | None, status: int, url: str) -> Any:
    """Return the result in an answer to the request of that id; raise the error that it holds.

    Raise Unavailable for what is no answer, and for a method that the service does not have; AccessDenied if the status
    says just that.
    """
    try:
        answer = json.loads(data)
        if (
            not isinstance(answer, dict)
            or answer.get("jsonrpc") != "2.0"
            or ("error" in answer) == ("result" in answer)
        ):
            raise ValueError("it is no JSON-RPC 2.0")
        if "error" in answer:
            told = _error(answer["error"])
        elif answer.get("id") == request_id and not isinstance(answer.get("id"), bool):
            return from_wire(answer["result"])
        else:
            raise ValueError("it answers another request")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise AccessDenied(f"{url} refused the API key and secret ({status}); check both.") from error
        shown = data[:_SHOWN_CHARACTERS].decode("utf-8", "replace")
        raise Unavailable(
            f"{url} does not answer as a model store does: HTTP status {status} with {shown!r} ({_brief(error)}); "
            "check the URL."
        ) from error
    raise told


def _error(told: Any) -> FedChordError:
    """Return the error of an answer's `error`; raise ValueError and others for what is none."""
    code, message = told["code"], told["message"]
    if type(code) is not int or not isinstance(message, str):
        raise ValueError("its error has no code and message")
    if isinstance(data := told.get("data"), str):
        message = f"{message}: {data}"
    message = "".join(character if character.isprintable() else " " for character in message[:_MESSAGE_CHARACTERS])
    return _CLASSES.get(code, FedChordError)(message)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN_CHARACTERS] or type(error).__name__
