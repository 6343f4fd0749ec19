"""Say in JSON what JSON has no word for: a datetime is `{"_type": "datetime", "val": "2026-01-31T12:00:00+00:00"}`.

What users keep with a model (`model_meta`, `metrics`) is theirs: it is passed on as it is, even where it looks like
one of ours.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from common.errors import InvalidInput

USER_FIELDS = frozenset({"model_meta", "metrics"})

_MAX_DEPTH = 64  # what is nested deeper is none of our documents
_KEYS = {"_type", "val"}


def to_wire(value: Any) -> Any:
    """Return the value with what JSON can hold in place of datetimes, tuples and mappings."""
    if isinstance(value, datetime):
        return {"_type": "datetime", "val": value.isoformat()}
    if isinstance(value, Mapping):
        return {name: item if name in USER_FIELDS else to_wire(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_wire(item) for item in value]
    return value


def from_wire(value: Any) -> Any:
    """Return the value with datetimes, aware and in the local zone, in place of what stands for them.

    Raise InvalidInput for what only looks like one, or is nested too deep.
    """
    return _from_wire(value, _MAX_DEPTH)


def parse_datetime(text: object) -> datetime:
    """Return the aware datetime that ISO 8601 text says; raise InvalidInput for other text and for one without zone."""
    try:
        if not isinstance(text, str):
            raise TypeError(f"it is of type {type(text).__name__}")
        at = datetime.fromisoformat(text)
        if at.tzinfo is None:
            raise ValueError("it has no zone")
        at.astimezone()  # at the ends of the calendar there is no room for another zone
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidInput(
            f"{str(text)[:80]!r} is not a datetime ({error}); write it like 2026-01-31T12:00:00+00:00."
        ) from error
    return at


def _from_wire(value: Any, depth: int) -> Any:
    if depth == 0:
        raise InvalidInput(f"The value is nested deeper than {_MAX_DEPTH} levels; send one that is not.")
    if isinstance(value, list):
        return [_from_wire(item, depth - 1) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == _KEYS and value["_type"] == "datetime":
        return parse_datetime(value["val"]).astimezone()
    return {name: item if name in USER_FIELDS else _from_wire(item, depth - 1) for name, item in value.items()}
