"""Answer JSON-RPC 2.0 requests: single ones, batches and notifications. Source: https://www.jsonrpc.org/specification.

This is our own because no kept library passes the specification's own examples (tests/unit/test_jsonrpc.py). pjrpc 2.2
refuses a batch as a whole for one bad entry, answers a batch of notifications with `[]`, takes `"id": null` for a
notification, and lets deep JSON raise RecursionError. Changing that would replace its whole dispatcher.
"""

import json
import math
from collections.abc import Callable
from typing import Any, Never

from pydantic_core import from_json

from common.errors import InvalidInput, TooLarge
from store.service.codes import INVALID_REQUEST, METHOD_NOT_FOUND, PARSE_ERROR, Failure, failure_of

MAX_BODY_BYTES = 8 << 20
MAX_BATCH = 100  # requests
MAX_ANSWER_BYTES = 64 << 20  # of a batch, when another request of it is begun
MAX_NESTING = 64  # arrays and objects inside each other
MAX_VALUES = 400_000  # 8 MiB of nothing but brackets would take seconds and hundreds of MB

Call = Callable[[str, list[Any] | dict[str, Any]], object]  # calls a method by name with its parameters


class UnknownMethod(Exception):
    """There is no method of that name; the argument says what there is."""


def answer(body: bytes, call: Call) -> bytes | None:
    """Return the answer to a request's body, or None when there is none: everything in it was a notification."""
    try:
        request = parse(body)
    except InvalidInput as error:
        return encode_failure(None, Failure(code=PARSE_ERROR, message="Parse error", data=error.message))
    if not isinstance(request, list):
        return _answer_one(request, call)
    if not request or len(request) > MAX_BATCH:
        return encode_failure(None, _invalid(f"A batch has 1 to {MAX_BATCH} requests, not {len(request)}."))
    answers: list[bytes] = []
    for each in request:
        is_full = sum(map(len, answers)) > MAX_ANSWER_BYTES
        if (found := _answer_one(each, _refuse if is_full else call)) is not None:
            answers.append(found)
    return b"[" + b",".join(answers) + b"]" if answers else None


def parse(body: bytes) -> Any:
    """Return the JSON value; raise InvalidInput for what is none, is nested too deeply, or has a number without end."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise InvalidInput(f"The JSON has more than {MAX_VALUES} values; send fewer at a time.")
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidInput(f"The text is not JSON: {error}.") from error
    level = [value]
    for _ in range(MAX_NESTING + 1):  # the last time, the level is what is inside the innermost
        if any(isinstance(each, float) and not math.isfinite(each) for each in level):
            raise InvalidInput("A number is larger than any number of 64 bits; send it as a text.")
        containers = [each for each in level if isinstance(each, list | dict)]
        if not containers:
            return value
        level = [inner for each in containers for inner in _inside(each)]
    raise InvalidInput(f"The JSON is nested more than {MAX_NESTING} deep; make it flatter.")


def encode_result(request_id: object, result: object) -> bytes:
    """Return a successful answer; `result` is in the wire's form already."""
    return _encode({"jsonrpc": "2.0", "result": result, "id": request_id})


def encode_failure(request_id: object, failure: Failure) -> bytes:
    """Return a failed answer."""
    return _encode({"jsonrpc": "2.0", "error": failure.document(), "id": request_id})


def _answer_one(request: object, call: Call) -> bytes | None:
    if not isinstance(request, dict):
        return encode_failure(None, _invalid("A request is a JSON object."))
    request_id = request.get("id")
    is_id = request_id is None or (isinstance(request_id, str | int | float) and not isinstance(request_id, bool))
    known_id = request_id if is_id else None
    method, params = request.get("method"), request.get("params", {})
    if request.get("jsonrpc") != "2.0" or not is_id:
        return encode_failure(known_id, _invalid('A request has "jsonrpc": "2.0", and an id that is a text or number.'))
    if not isinstance(method, str) or not isinstance(params, list | dict):
        return encode_failure(
            known_id, _invalid('The "method" is a text, and "params", if there are any, an object or an array.')
        )
    answered = _call(request_id, method, params, call)
    return answered if "id" in request else None


def _call(request_id: object, method: str, params: list[Any] | dict[str, Any], call: Call) -> bytes:
    try:
        return encode_result(request_id, call(method, params))
    except UnknownMethod as error:
        return encode_failure(request_id, Failure(code=METHOD_NOT_FOUND, message="Method not found", data=str(error)))
    except Exception as error:  # whatever a method raises, the others of the batch are answered
        return encode_failure(request_id, failure_of(error))


def _refuse(method: str, params: list[Any] | dict[str, Any]) -> Never:
    raise TooLarge(f"The batch's answers have more than {MAX_ANSWER_BYTES} bytes already; ask for {method} by itself.")


def _invalid(what: str) -> Failure:
    return Failure(code=INVALID_REQUEST, message="Invalid Request", data=what)


def _inside(value: list[Any] | dict[str, Any]) -> Any:
    return value.values() if isinstance(value, dict) else value


def _encode(document: dict[str, object]) -> bytes:
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
