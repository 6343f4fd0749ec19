"""Call a method by its JSON-RPC name, with parameters by name or by position that are checked first."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from common.errors import InvalidInput
from store.local import LocalApi
from store.opening import OpenStore
from store.service.rpc import UnknownMethod
from store.tenants import Caller
from store.wire import from_wire, to_wire

PREFIX = "fl."

# What LocalApi does for everybody who may call it. Uploads and downloads have addresses of their own.
LOCAL_METHODS = (
    "get_server_version",
    "initialize_model_store",
    "exists_store",
    "delete_store",
    "get_stores",
    "get_model_info",
    "exists_model",
    "delete_model",
    "delete_all_model",
    "get_models",
    "get_model_info_latest",
    "get_latest_feedbacked_models",
    "get_latest_aggregated_model",
    "get_latest_transferred_model",
    "get_lineage",
    "create_upstream_info",
    "update_upstream_info",
    "delete_upstream_info",
    "get_upstream_info",
    "list_upstream_info",
    "feedback",
    "request_transfer",
    "proxy_request_transfer_info",
    "get_parties",
    "create_party",
    "delete_party",
    "get_path",  # from here on: server to server
    "offer_model",
    "register_party",
    "unregister_party",
)
# What may wait for a node elsewhere, as may all that the service is given besides.
WAITING_METHODS = (
    "feedback",
    "request_transfer",
    "proxy_request_transfer_info",
    "get_parties",
    "create_party",
    "delete_party",
    "get_path",
    "register_party",
    "unregister_party",
)
UPLOAD_METHODS = ("fl.put_model", "fl.put_aggregated_model", "fl.put_blob")
DOWNLOAD_METHOD = "fl.load_model"

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)  # a text is no number, and 1 is not true
_BY_POSITION = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of a method."""

    name: str
    adapter: TypeAdapter[Any]  # checks its values
    required: bool
    by_position: bool  # it can be given without its name


class Method:
    """A function whose first parameter the service gives, and the others the caller."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function
        hints = get_type_hints(function, include_extras=True)
        _, *rest = inspect.signature(function).parameters.values()
        self._parameters = {
            each.name: Parameter(
                name=each.name,
                adapter=_adapter(hints.get(each.name, Any)),
                required=each.default is inspect.Parameter.empty,
                by_position=each.kind in _BY_POSITION,
            )
            for each in rest
        }

    def call(self, first: object, params: list[Any] | dict[str, Any]) -> object:
        """Return what the function returns; raise InvalidInput that names the parameter that is wrong."""
        named = self._named(params)
        if unknown := [name for name in named if name not in self._parameters]:
            raise InvalidInput(f"There is no parameter {unknown[0][:80]!r}; there are: {self._names()}.")
        if missing := [each.name for each in self._parameters.values() if each.required and each.name not in named]:
            raise InvalidInput(f"Parameter {missing[0]} is missing; give it.")
        values = {name: _checked(self._parameters[name], value) for name, value in named.items()}
        return self._function(first, **values)

    def _named(self, params: list[Any] | dict[str, Any]) -> dict[str, Any]:
        if isinstance(params, dict):
            return params
        names = [each.name for each in self._parameters.values() if each.by_position]
        if len(params) > len(names):
            raise InvalidInput(f"There are {len(params)} parameters; give at most {len(names)}: {self._names()}.")
        return dict(zip(names, params, strict=False))

    def _names(self) -> str:
        return ", ".join(self._parameters) or "none"


class Methods:
    """All methods of a service."""

    def __init__(self, store: OpenStore, more: Mapping[str, Callable[..., object]]) -> None:
        """Take LocalApi's methods, and more by their whole names, which are called with the Caller first."""
        self._store = store
        self._local = {PREFIX + name: Method(getattr(LocalApi, name)) for name in LOCAL_METHODS}
        self._more = {name: Method(function) for name, function in more.items()}
        self._waiting = [f'{name}"'.encode() for name in (*(PREFIX + each for each in WAITING_METHODS), *more)]

    def may_wait(self, body: bytes) -> bool:
        """Return whether a request's body may name a method that waits for others; it is not read for that."""
        return b"\\" in body or any(name in body for name in self._waiting)  # a name can be written in escapes

    def call(self, caller: Caller, name: str, params: list[Any] | dict[str, Any]) -> object:
        """Return the result in the wire's form; raise UnknownMethod, or what the method raises."""
        if (method := self._local.get(name)) is not None:
            return to_wire(method.call(LocalApi(self._store, caller), params))
        if (method := self._more.get(name)) is not None:
            return to_wire(method.call(caller, params))
        raise UnknownMethod(_advice(name))


def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint, config=_STRICT)
    except TypeError:  # a type that has its own configuration
        return TypeAdapter(hint)


def _checked(parameter: Parameter, value: object) -> object:
    try:
        return parameter.adapter.validate_python(from_wire(value))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        inside = "".join(f"[{part!r}]" for part in problem["loc"])[:200]
        raise InvalidInput(f"Parameter {parameter.name}{inside} is wrong: {problem['msg']}.") from error


def _advice(name: str) -> str:
    if name in UPLOAD_METHODS:
        return f"{name} takes a file: POST it as multipart/form-data to /jsonrpc/upload/{name}."
    if name == DOWNLOAD_METHOD:
        return f"{name} gives a file: POST the request to /jsonrpc/download/{name}."
    return f"There is no method {name[:80]!r}; docs/reference/model-store.md lists them."
