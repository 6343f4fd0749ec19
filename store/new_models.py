"""Check what is said of a model that somebody puts, before anything of it is kept."""

import json
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Never

from common.errors import InvalidInput, TooLarge
from common.settings import Settings
from store.models import ModelState

MAX_NAME_CHARACTERS = 200
MAX_DESCRIPTION_CHARACTERS = 10_000
MAX_DEPTH = 32  # of model_meta and metrics
MAX_PARENTS = 10_000
MAX_HOPS = 1000

_MAX_LOCATION_CHARACTERS = 10_000  # of WKB in hexadecimal
_MAX_INTEGER = 2**31 - 1  # a column of 32 bits
_MAX_LARGE_INTEGER = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class NewModel:
    """What is said of a model that is put; see `store.models.ModelInfo`."""

    model_kind: str = ""
    model_description: str = ""
    model_meta: Mapping[str, Any] = field(default_factory=dict)  # JSON
    model_state: ModelState | int = ModelState.CREATED
    round: int = 0
    parents: Sequence[str] = ()  # ids of the models it was made from
    metrics: Mapping[str, Any] = field(default_factory=dict)  # by name, JSON
    num_examples: int | None = None  # it was trained on
    location: Sequence[float] | str | None = None  # [x, y], or WKB in hexadecimal
    start_datetime: datetime | None = None  # aware
    end_datetime: datetime | None = None  # aware
    tenant_id: str = ""  # of who made it
    hop_count: int = 0  # nodes that passed it on
    origin_node: str | None = None  # the node that it is a copy from
    origin_model_id: str | None = None  # its id there


def check_new_model(settings: Settings, new: NewModel) -> None:
    """Raise InvalidInput, or TooLarge, that names the field that cannot be kept."""
    for name in ("model_kind", "tenant_id", "origin_node", "origin_model_id"):
        check_text(name, getattr(new, name) or "", MAX_NAME_CHARACTERS)
    check_text("model_description", new.model_description, MAX_DESCRIPTION_CHARACTERS)
    check_state(new.model_state)
    _check_integer("round", new.round, _MAX_INTEGER)
    _check_integer("hop_count", new.hop_count, MAX_HOPS)
    if new.num_examples is not None:
        _check_integer("num_examples", new.num_examples, _MAX_LARGE_INTEGER)
    if isinstance(new.parents, str) or len(new.parents) > MAX_PARENTS:
        raise InvalidInput(f"parents is a list of at most {MAX_PARENTS} model ids; shorten it.")
    for parent in new.parents:
        check_text("parents", parent, MAX_NAME_CHARACTERS)
    for name in ("model_meta", "metrics"):
        plain_json(getattr(new, name), settings, name=name)
    for name in ("start_datetime", "end_datetime"):
        _check_datetime(name, getattr(new, name))
    if (new.origin_node is None) != (new.origin_model_id is None):
        raise InvalidInput("A copy's origin is a node and a model id; give both or none.")
    _check_location(new.location)


def check_description(description: object) -> str:
    """Return the description; raise InvalidInput unless it is text that can be kept."""
    check_text("description", description, MAX_DESCRIPTION_CHARACTERS)
    return str(description)


def check_text(name: str, value: object, max_characters: int) -> None:
    """Raise InvalidInput unless the named field's value is text of so many characters that every database takes."""
    if not isinstance(value, str) or len(value) > max_characters or not _is_clean(value):
        raise InvalidInput(
            f"{name} is text of at most {max_characters} characters without NUL; {_shown(value)} is not."
        )


def check_state(state: object) -> ModelState:
    """Return the model state; raise InvalidInput for a number that is none."""
    try:
        if not isinstance(state, int) or isinstance(state, bool):
            raise ValueError("it is no number")
        return ModelState(state)
    except ValueError as error:
        known = ", ".join(f"{each.value} ({each.name})" for each in ModelState)
        raise InvalidInput(f"model_state {str(state)[:20]!r} is none; use one of {known}.") from error


def parse_meta(text: str | bytes, settings: Settings, *, name: str = "model_meta") -> dict[str, Any]:
    """Return what the JSON text of the named field says.

    Raise TooLarge if it is longer than the settings allow, InvalidInput unless it is an object that nests at most 32
    levels, whose numbers are finite, and whose texts every database and reader takes.
    """
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    if len(data) > settings.max_meta_kilobytes << 10:
        raise TooLarge(
            f"{name} has {len(data)} bytes as JSON, but {settings.max_meta_kilobytes} KiB is the limit; keep less with "
            "the model, or have FEDCHORD_MAX_META_KILOBYTES raised."
        )
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = f"it nests deeper than {MAX_DEPTH} levels" if isinstance(error, RecursionError) else str(error)[:200]
        raise InvalidInput(f"{name} is not the JSON that is kept: {reason}.") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{name} is not a JSON object; write it like {{}}.")
    for depth, item in _walk(value):
        if depth > MAX_DEPTH:
            raise InvalidInput(f"{name} nests deeper than {MAX_DEPTH} levels; make it flatter.")
        if isinstance(item, float) and not math.isfinite(item):
            raise InvalidInput(f"{name} holds a number that is not finite; leave it out.")
        if isinstance(item, str) and not _is_clean(item):
            raise InvalidInput(f"{name} holds a NUL, or half of a character, in a text; leave it out.")
    return value


def plain_json(value: object, settings: Settings, *, name: str) -> dict[str, Any]:
    """Return the mapping as JSON gives it back; raise what `parse_meta` raises."""
    if not isinstance(value, Mapping):
        raise InvalidInput(f"{name} is not a JSON object; write it like {{}}.")
    try:
        text = json.dumps(dict(value), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        reason = f"it nests deeper than {MAX_DEPTH} levels" if isinstance(error, RecursionError) else str(error)[:200]
        raise InvalidInput(f"{name} is not the JSON that is kept: {reason}.") from error
    return parse_meta(text, settings, name=name)


def _walk(value: object) -> Iterator[tuple[int, object]]:
    """Yield the keys, texts and numbers of a value, and what holds them, each with its depth."""
    waiting: list[tuple[int, object]] = [(1, value)]
    while waiting:
        depth, item = waiting.pop()
        yield depth, item
        if depth > MAX_DEPTH:
            continue
        if isinstance(item, dict):
            for key, inner in item.items():
                yield depth, key
                waiting.append((depth + isinstance(inner, dict | list), inner))
        elif isinstance(item, list):
            waiting.extend((depth + isinstance(inner, dict | list), inner) for inner in item)


def _refuse_constant(constant: str) -> Never:
    raise ValueError(f"{constant} is not JSON")


def _is_clean(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _check_integer(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 0 <= value <= most:
        raise InvalidInput(f"{name} is a whole number from 0 to {most}; {_shown(value)} is not.")


def _check_datetime(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, datetime) or value.tzinfo is None):
        raise InvalidInput(f"{name} is a time with its zone; {_shown(value)} is not.")


def _check_location(location: object) -> None:
    if location is None:
        return
    if isinstance(location, str):
        is_right = len(location) <= _MAX_LOCATION_CHARACTERS and set(location) <= set(string.hexdigits)
    else:
        is_right = isinstance(location, Sequence) and len(location) == 2 and all(map(_is_coordinate, location))
    if not is_right:
        raise InvalidInput(f"location is [x, y], or WKB in hexadecimal; {_shown(location)} is not.")


def _is_coordinate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _shown(value: object) -> str:
    return ascii(value)[:80]
