"""JSON-RPC 2.0 is answered as the specification's own examples say, https://www.jsonrpc.org/specification#examples."""

import json
from typing import Any

import pytest

from common.errors import NotFound
from store.service.rpc import MAX_BATCH, MAX_NESTING, UnknownMethod, answer

NOTIFIED: list[tuple[str, object]] = []


def call(method: str, params: list[Any] | dict[str, Any]) -> object:
    """Call one of the specification's methods, or one of ours."""
    positional = params if isinstance(params, list) else []
    match method:
        case "subtract" if isinstance(params, dict):
            return params["minuend"] - params["subtrahend"]
        case "subtract":
            return positional[0] - positional[1]
        case "sum":
            return sum(positional)
        case "get_data":
            return ["hello", 5]
        case "echo":
            return params
        case "update" | "notify_hello" | "notify_sum":
            NOTIFIED.append((method, params))
            return None
        case "fail":
            raise NotFound("There is no such thing.")
        case "break":
            raise ZeroDivisionError("secret details")
        case "infinite":
            return float("inf")
    raise UnknownMethod(f"no {method}")


def answered(text: str) -> Any:
    """Return the answer to the text, without the explanations that the specification's examples do not have."""
    found = answer(text.encode(), call)
    return None if found is None else _brief(json.loads(found))


def _brief(value: Any) -> Any:
    if isinstance(value, list):
        return [_brief(each) for each in value]
    if "error" in value:
        value["error"].pop("data", None)
    return value


def error(code: int, message: str, request_id: object = None) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "error": {"code": code, "message": message}, "id": request_id}


INVALID = error(-32600, "Invalid Request")

EXAMPLES: list[tuple[str, Any]] = [
    # rpc call with positional parameters
    (
        '{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}',
        {"jsonrpc": "2.0", "result": 19, "id": 1},
    ),
    (
        '{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}',
        {"jsonrpc": "2.0", "result": -19, "id": 2},
    ),
    # rpc call with named parameters
    (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}',
        {"jsonrpc": "2.0", "result": 19, "id": 3},
    ),
    (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}',
        {"jsonrpc": "2.0", "result": 19, "id": 4},
    ),
    # a notification
    ('{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', None),
    ('{"jsonrpc": "2.0", "method": "foobar"}', None),
    # rpc call of non-existent method
    ('{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', error(-32601, "Method not found", "1")),
    # rpc call with invalid JSON
    ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', error(-32700, "Parse error")),
    # rpc call with invalid request object
    ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', INVALID),
    # rpc call batch, invalid JSON
    (
        '[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},{"jsonrpc": "2.0", "method"]',
        error(-32700, "Parse error"),
    ),
    # rpc call with an empty array
    ("[]", INVALID),
    # rpc call with an invalid batch (but not empty)
    ("[1]", [INVALID]),
    # rpc call with invalid batch
    ("[1,2,3]", [INVALID, INVALID, INVALID]),
    # rpc call batch
    (
        """[
        {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
        {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
        {"foo": "boo"},
        {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
        {"jsonrpc": "2.0", "method": "get_data", "id": "9"}
        ]""",
        [
            {"jsonrpc": "2.0", "result": 7, "id": "1"},
            {"jsonrpc": "2.0", "result": 19, "id": "2"},
            INVALID,
            error(-32601, "Method not found", "5"),
            {"jsonrpc": "2.0", "result": ["hello", 5], "id": "9"},
        ],
    ),
    # rpc call batch (all notifications)
    (
        """[
        {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
        ]""",
        None,
    ),
]


@pytest.mark.parametrize(("request_text", "response"), EXAMPLES)
def test_the_specifications_examples_are_answered_as_it_says(request_text: str, response: Any) -> None:
    assert answered(request_text) == response


def test_a_notification_is_carried_out() -> None:
    NOTIFIED.clear()
    assert answered('{"jsonrpc": "2.0", "method": "update", "params": [1, 2]}') is None
    assert NOTIFIED == [("update", [1, 2])]


@pytest.mark.parametrize(
    "request_id", ["null", "1", '"1"', "1.5", "1.0", "-7", "123456789012345678901234567890", '"é"']
)
def test_an_id_comes_back_as_it_was(request_id: str) -> None:
    found = answer(f'{{"jsonrpc": "2.0", "method": "get_data", "id": {request_id}}}'.encode(), call)
    assert found is not None
    assert found.decode().endswith(f'"id":{request_id}}}')


@pytest.mark.parametrize("request_id", ["true", "[1]", '{"a": 1}'])
def test_what_cannot_be_an_id_is_no_request(request_id: str) -> None:
    assert answered(f'{{"jsonrpc": "2.0", "method": "get_data", "id": {request_id}}}') == INVALID


@pytest.mark.parametrize(
    "text",
    [
        '{"method": "get_data", "id": 1}',
        '{"jsonrpc": 2.0, "method": "get_data", "id": 1}',
        '{"jsonrpc": "1.0", "method": "get_data", "id": 1}',
        '{"jsonrpc": "2.0", "id": 1}',
        '{"jsonrpc": "2.0", "method": "get_data", "params": null, "id": 1}',
        '{"jsonrpc": "2.0", "method": "get_data", "params": 7, "id": 1}',
    ],
)
def test_what_is_no_request_is_told_under_its_id(text: str) -> None:
    assert answered(text) == error(-32600, "Invalid Request", 1)


@pytest.mark.parametrize("text", ["", " ", "nonsense", '"\\ud800"', "\udcff", "[" * 100_000, '{"a":NaN}', "[1e400]"])
def test_what_is_no_json_is_a_parse_error(text: str) -> None:
    found = answer(text.encode("utf-8", "surrogateescape"), call)
    assert found is not None
    assert json.loads(found)["error"]["code"] == -32700


def test_json_may_be_nested_so_deep_and_no_deeper() -> None:
    request = '{"jsonrpc": "2.0", "method": "echo", "params": %s, "id": 1}'
    deepest = json.loads("[" * (MAX_NESTING - 1) + "]" * (MAX_NESTING - 1))
    assert answered(request % json.dumps(deepest)) == {"jsonrpc": "2.0", "result": deepest, "id": 1}
    assert answered(request % json.dumps([deepest])) == error(-32700, "Parse error")


def test_a_batch_may_have_so_many_requests_and_no_more() -> None:
    one = '{"jsonrpc": "2.0", "method": "get_data", "id": 1}'
    assert len(answered("[" + ",".join([one] * MAX_BATCH) + "]")) == MAX_BATCH
    assert answered("[" + ",".join([one] * (MAX_BATCH + 1)) + "]") == INVALID


def test_an_error_of_ours_has_its_own_code_and_words() -> None:
    assert answered('{"jsonrpc": "2.0", "method": "fail", "id": 1}') == error(-32001, "There is no such thing.", 1)


@pytest.mark.parametrize("method", ["break", "infinite"])
def test_an_error_that_nobody_meant_is_told_without_details(method: str) -> None:
    expected = error(-32603, "The service failed; its log has the reason.", 1)
    assert answered(f'{{"jsonrpc": "2.0", "method": "{method}", "id": 1}}') == expected


def test_one_failure_leaves_the_others_of_a_batch_alone() -> None:
    found = answered(
        '[{"jsonrpc": "2.0", "method": "break", "id": 1}, {"jsonrpc": "2.0", "method": "get_data", "id": 2}]'
    )
    assert [each.get("result") for each in found] == [None, ["hello", 5]]
