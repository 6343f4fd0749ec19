"""Describe the model store's methods from their signatures, docstrings and example calls."""

import ast
import inspect
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, BinaryIO, Union, get_args, get_origin, get_type_hints

from common.errors import AccessDenied, InvalidInput
from common.settings import Settings
from docs import method_meanings as meanings
from docs.fields import describe_fields, table
from store.local import LocalApi
from store.models import ModelState
from store.service import codes
from store.service.methods import DOWNLOAD_METHOD, LOCAL_METHODS, PREFIX, UPLOAD_METHODS

_WORDS: Mapping[object, str] = {
    str: "text",
    int: "number",
    float: "number",
    bool: "true or false",
    bytes: "bytes",
    type(None): "none",
    BinaryIO: "open file",
    datetime: "datetime",
    Any: "anything",
}
JSON_METHODS = frozenset(PREFIX + name for name in LOCAL_METHODS)  # those that `/jsonrpc` has
_LIMITS = ("http_idle_seconds", "max_model_gigabytes", "max_meta_kilobytes", "upstream_timeout_seconds")


def methods() -> str:
    """Return every method: what it does, parameters, result, an example."""
    parts = []
    for title, names in meanings.METHODS.items():
        parts.append(f"### {title}")
        parts += [_method(name) for name in names]
    return "\n\n".join(parts)


def _method(name: str) -> str:
    function = getattr(LocalApi, name)
    parts = [f"#### `{PREFIX}{name}`", inspect.getdoc(function) or ""]
    if PREFIX + name in UPLOAD_METHODS:
        parts.append(f"It takes a file: POST to `/jsonrpc/upload/{PREFIX}{name}`, see [uploads](#uploads).")
    if PREFIX + name == DOWNLOAD_METHOD:
        parts.append(f"It gives a file: POST or GET `/jsonrpc/download/{PREFIX}{name}`, see [downloads](#downloads).")
    rows = list(_parameters(name, function))
    parts.append(table(("parameter", "type", "default", "meaning"), rows) if rows else "It has no parameters.")
    kind, meaning = meanings.RESULTS[name]
    parts.append(f"Result: {kind}{f', {meaning}' if meaning else ''}.")
    parts.append(f"```python\n{meanings.EXAMPLES[name]}\n```")
    if PREFIX + name in JSON_METHODS:
        parts.append(f"```json\n{json.dumps(example_request(name))}\n```")
    return "\n\n".join(parts)


def example_request(name: str) -> dict[str, Any]:
    """Return the JSON-RPC request of the first call in the method's example; a name in it stands as `<name>`."""
    for node in ast.walk(ast.parse(meanings.EXAMPLES[name])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
            parameters = list(inspect.signature(getattr(LocalApi, name)).parameters)[1:]
            params = {parameter: _value(each) for parameter, each in zip(parameters, node.args, strict=False)}
            params.update((each.arg or "", _value(each.value)) for each in node.keywords)
            request = {"jsonrpc": "2.0", "id": 1, "method": PREFIX + name, "params": params}
            return request if params else {key: value for key, value in request.items() if key != "params"}
    raise ValueError(f"the example of {name} does not call it")


def _value(node: ast.expr) -> Any:
    return f"<{node.id}>" if isinstance(node, ast.Name) else ast.literal_eval(node)


def _parameters(name: str, function: Callable[..., Any]) -> Iterator[tuple[str, str, str, str]]:
    hints = get_type_hints(function)
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else _default(parameter.default)
        meaning = meanings.parameter(name, parameter.name)
        yield f"`{parameter.name}`", type_words(hints[parameter.name]), default, meaning


def _default(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, ModelState):
        return f"`{int(value)}` ({value.name})"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "empty" if value in ("", (), {}) else f"`{value}`"


def type_words(hint: Any) -> str:
    """Return a type in words."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(each) for each in arguments if each is not type(None))
    if origin is not None and issubclass(origin, Mapping):
        return "object"
    if origin is not None and arguments:
        return f"list of {type_words(arguments[0])}"
    name = getattr(hint, "__name__", str(hint))
    return {"Path": "path", "ModelState": "number", "dict": "object"}.get(name, name)


def documents() -> str:
    """Return the fields of what the methods return."""
    parts = []
    for name, fields in meanings.DOCUMENTS.items():
        rows = [(f"`{field}`", kind, meaning) for field, (kind, meaning) in fields.items()]
        parts.append(f"### {name}\n\n{table(('field', 'type', 'meaning'), rows)}")
    return "\n\n".join(parts)


def states() -> str:
    """Return the states of a model with their numbers."""
    rows = [(f"`{state.name}`", str(int(state)), meanings.STATES[state.name]) for state in ModelState]
    return table(("state", "number", "the model is"), rows)


def error_codes() -> str:
    """Return every code of an error: JSON-RPC's own, and ours."""
    rows = [(str(code), "", str(status), meaning) for code, status, meaning in meanings.JSONRPC_ERRORS]
    for error, (code, status) in codes.CODES.items():
        meaning = re.sub(r"\s+", " ", inspect.getdoc(error) or "")
        shown = "401 without accepted keys, else 403" if error is AccessDenied else str(int(status))
        rows.append((str(code), f"`{error.__name__}`", shown, meaning))
        if error is InvalidInput:
            rows[-1] = (str(code), "`InvalidInput`", shown, "The parameters are not valid; the message says which.")
    return table(("code", "error in Python", "HTTP status", "meaning"), rows)


def limits() -> str:
    """Return the limits: those of the settings, and those that are fixed."""
    settings = {row.name: row for row in describe_fields(Settings)}
    rows = [(settings[name].meaning, settings[name].default, f"`{name}`") for name in _LIMITS]
    rows += [(meaning, value, "fixed") for meaning, value in meanings.LIMITS]
    return table(("what", "limit", "setting"), rows)
