"""Turn conditions on models, as callers write them in JSON, into SQL: `{"=": ["model_state", 20]}`.

    {"=": [field, value]}, and != < <= > >=          a value of the field's type, or null with = and !=
    {"in": [field, [value, …]]}
    {"like": [field, "pattern%"]}                    % is any text, _ any character, \\ before one of them is itself;
                                                     the letters a to z match in both cases
    {"and": [condition, …]}, {"or": [condition, …]}, {"not": condition}

Several keys in one object are a conjunction. A comparison with a field that is null is false, never unknown, so that
`not` always holds where its condition does not. Values are bound, never pasted into the statement.
"""

import operator
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Column, ColumnElement, String, and_, false, not_, or_, true

from common.errors import InvalidInput
from store.tables import UtcDateTime, model_info
from store.wire import parse_datetime

MAX_DEPTH = 16
MAX_TERMS = 200
MAX_PATTERN_CHARACTERS = 200

FIELDS = {  # by the name that callers know
    "model_store_ddc" if name == "store" else name: model_info.c[name]
    for name in (
        "model_id",
        "tenant_id",
        "store",
        "model_kind",
        "model_description",
        "model_state",
        "model_hash",
        "index_hash",
        "model_size",
        "round",
        "hop_count",
        "start_datetime",
        "end_datetime",
        "job_id",
        "site",
        "num_examples",
        "created_at",
        "expired_at",
    )
}

_COMPARISONS: dict[str, Callable[[Any, Any], ColumnElement[bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_OPERATORS = (*_COMPARISONS, "in", "like", "and", "or", "not")
_MAX_ORDERS = 16


def parse_condition(value: object) -> ColumnElement[bool]:
    """Return the condition; raise InvalidInput that names an unknown operator or field, a wrong value, or a limit."""
    return _Parser().condition(value, 1)


def parse_order(value: str | Sequence[str] | None) -> list[ColumnElement[Any]]:
    """Return the order for one or more fields, each descending with a - before it; nothing is "the newest first".

    Among equals the newer comes first where the last field descends, else last; null is smaller than every value.
    Raise InvalidInput that names an unknown field.
    """
    if value is None:
        return [model_info.c.sequence.desc()]
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not 1 <= len(names) <= _MAX_ORDERS:
        raise InvalidInput(f"order is a field's name, or a list of 1 to {_MAX_ORDERS}; a - before one descends.")
    order: list[ColumnElement[Any]] = []
    descends = False
    for name in names:
        if not isinstance(name, str):
            raise InvalidInput(f"order holds {ascii(name)[:80]}, which is no field's name; write it like -created_at.")
        descends = name.startswith("-")
        column = _field(name.removeprefix("-"))
        order.append(column.desc().nulls_last() if descends else column.asc().nulls_first())
    return [*order, model_info.c.sequence.desc() if descends else model_info.c.sequence.asc()]


class _Parser:
    """Parse one condition and count its terms."""

    def __init__(self) -> None:
        self._num_terms = 0

    def condition(self, value: object, depth: int) -> ColumnElement[bool]:
        if depth > MAX_DEPTH:
            raise InvalidInput(f"The conditions nest deeper than {MAX_DEPTH} levels; make them flatter.")
        if not isinstance(value, dict):
            raise InvalidInput(f'{_shown(value)} is no condition; write it like {{"=": ["model_state", 20]}}.')
        return _all([self._one(name, operand, depth) for name, operand in value.items()])

    def _one(self, name: str, operand: object, depth: int) -> ColumnElement[bool]:
        if name not in _OPERATORS:
            raise InvalidInput(f"There is no operator {_shown(name)} in conditions; use one of {' '.join(_OPERATORS)}.")
        self._count(1)
        if name == "not":
            return not_(self.condition(operand, depth + 1))
        if not isinstance(operand, list | tuple):
            raise InvalidInput(f'What follows "{name}" in a condition is a list; {_shown(operand)} is not.')
        if name in ("and", "or"):
            parts = [self.condition(part, depth + 1) for part in operand]
            return _all(parts) if name == "and" else _any(parts)
        if len(operand) != 2 or not isinstance(operand[0], str):
            raise InvalidInput(f'What follows "{name}" in a condition is a field and a value, not {_shown(operand)}.')
        column = _field(operand[0])
        if name == "in":
            return self._is_one_of(operand[0], column, operand[1])
        if name == "like":
            return _is_like(operand[0], column, operand[1])
        return _compares(name, operand[0], column, operand[1])

    def _is_one_of(self, name: str, column: Column[Any], values: object) -> ColumnElement[bool]:
        if not isinstance(values, list | tuple):
            raise InvalidInput(f'"in" compares {name} with a list of values; {_shown(values)} is none.')
        self._count(len(values))
        bound = [_value(name, column, value) for value in values if value is not None]
        parts: list[ColumnElement[bool]] = [column.in_(bound)] if bound else []
        if column.nullable and bound:
            parts = [and_(column.is_not(None), *parts)]
        return _any([*parts, column.is_(None)] if None in values else parts)

    def _count(self, num_terms: int) -> None:
        self._num_terms += num_terms
        if self._num_terms > MAX_TERMS:
            raise InvalidInput(f"The conditions have more than {MAX_TERMS} terms; ask for less at once.")


def _compares(sign: str, name: str, column: Column[Any], value: object) -> ColumnElement[bool]:
    is_nullable = column.nullable
    if value is None:
        if sign not in ("=", "!="):
            raise InvalidInput(f'"{sign}" cannot compare {name} with null; use "=" or "!=".')
        return column.is_(None) if sign == "=" else column.is_not(None)
    bound = _value(name, column, value)
    if sign == "!=" and is_nullable:
        return or_(column.is_(None), column != bound)
    compared = _COMPARISONS[sign](column, bound)
    return and_(column.is_not(None), compared) if is_nullable else compared


def _is_like(name: str, column: Column[Any], pattern: object) -> ColumnElement[bool]:
    if not isinstance(column.type, String):
        raise InvalidInput(f'"like" compares text, and {name} is none; use = < <= > >= or in.')
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_CHARACTERS or "\0" in pattern:
        raise InvalidInput(f'"like" takes a pattern of at most {MAX_PATTERN_CHARACTERS} characters.')
    unescaped = pattern.replace(r"\\", "").replace(r"\%", "").replace(r"\_", "")
    if "\\" in unescaped:
        raise InvalidInput(r'In the pattern of "like", \ comes before %, _ or \; write \\ for itself.')
    compared = column.ilike(_value(name, column, pattern), escape="\\")
    return and_(column.is_not(None), compared)


def _value(name: str, column: Column[Any], value: object) -> object:
    """Return the value as the field is compared with it; raise InvalidInput if it cannot be one of the field's."""
    if isinstance(column.type, UtcDateTime):
        if isinstance(value, dict) and value.keys() == {"_type", "val"} and value["_type"] == "datetime":
            value = value["val"]
        if isinstance(value, datetime) and value.tzinfo is not None:
            return value
        return parse_datetime(value)
    if isinstance(column.type, String):
        if isinstance(value, str) and "\0" not in value and _is_unicode(value):
            return value
        raise InvalidInput(f"{name} is text, and {_shown(value)} is not; compare it with text.")
    most = 2**63 - 1 if isinstance(column.type, BigInteger) else 2**31 - 1
    if type(value) is int and abs(value) <= most:
        return value
    raise InvalidInput(f"{name} is a whole number of at most {most}, and {_shown(value)} is not; compare it with one.")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _field(name: str) -> Column[Any]:
    if name not in FIELDS:
        raise InvalidInput(f"There is no field {_shown(name)} to ask for; there are {', '.join(FIELDS)}.")
    return FIELDS[name]


def _all(parts: Sequence[ColumnElement[bool]]) -> ColumnElement[bool]:
    return and_(true(), *parts)


def _any(parts: Sequence[ColumnElement[bool]]) -> ColumnElement[bool]:
    return or_(false(), *parts)


def _shown(value: object) -> str:
    return ascii(value)[:80]
