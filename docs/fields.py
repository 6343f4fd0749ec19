"""Describe the fields of a pydantic model for people: type, default, meaning."""

import inspect
import io
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

_TYPES = {"string": "text", "boolean": "true or false", "object": "table", "null": "nothing"}


@dataclass(frozen=True, kw_only=True)
class FieldRow:
    """One field, as a table's row shows it."""

    name: str
    type: str  # in words, with its limits
    default: str  # "required" if there is none
    meaning: str  # empty if nobody has written it down


def describe_fields(model: type[BaseModel], meanings: Mapping[str, str] | None = None) -> list[FieldRow]:
    """Return the model's fields; a meaning is what is given here, or the field's description, or its comment."""
    schema = model.model_json_schema()
    rows = []
    for name, field in model.model_fields.items():
        meaning = (meanings or {}).get(name) or field.description or _comments(model).get(name, "")
        rows.append(
            FieldRow(
                name=name,
                type=_type(schema["properties"][name], schema.get("$defs", {})),
                default="required" if field.is_required() else _default(field.get_default(call_default_factory=True)),
                meaning=_sentence(meaning),
            )
        )
    return rows


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def field_table(rows: list[FieldRow]) -> str:
    """Return the fields as a Markdown table."""
    cells = [(f"`{row.name}`", row.type, row.default, row.meaning) for row in rows]
    return table(("field", "type", "default", "meaning"), cells)


def _sentence(words: str) -> str:
    begun = words if words.startswith("BLAKE3") else words[:1].upper() + words[1:]
    return begun if not begun or begun.endswith((".", "…")) else f"{begun}."


@cache
def _comments(model: type[BaseModel]) -> dict[str, str]:
    """Return the comment that stands on each field's line, in the model and in those it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if not issubclass(owner, BaseModel) or owner is BaseModel or owner.__module__.startswith("pydantic"):
            continue
        name = ""
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(owner)).readline):
            if token.type == tokenize.NAME and not name and token.string in owner.__annotations__:
                name = token.string if token.line.strip().startswith(f"{token.string}:") else ""
            elif token.type == tokenize.COMMENT and name:
                found[name] = token.string.lstrip("# ")
            elif token.type == tokenize.NEWLINE:
                name = ""
    return found


def _default(value: object) -> str:
    if value is None or value is PydanticUndefined:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, BaseModel):
        return f"`{value.model_dump(mode='json', exclude_none=True)}`".replace("'", '"')
    if isinstance(value, dict | tuple) and not value:
        return "empty"
    if hasattr(value, "get_secret_value"):
        value = value.get_secret_value()
    return f"`{value}`" if str(value) else "empty"


def _type(schema: dict[str, Any], definitions: Mapping[str, Any]) -> str:
    """Return a JSON schema's type in words, with its limits."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        target = definitions[name]
        return _type(target, definitions) if "enum" in target else f"table ({name})"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_type(each, definitions) for each in schema["anyOf"] if each.get("type") != "null")
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}), definitions)}"
    if schema.get("format") == "path":
        return "path"
    return ", ".join([_TYPES.get(kind, kind), *_limits(schema)])


def _limits(schema: dict[str, Any]) -> list[str]:
    limits = []
    for key, words in (("minimum", "≥ {}"), ("exclusiveMinimum", "> {}"), ("maximum", "≤ {}"),
                       ("exclusiveMaximum", "< {}"), ("minLength", "{} or more characters"),
                       ("maxLength", "at most {} characters"), ("pattern", "matching `{}`")):  # fmt: skip
        if key in schema:
            value = schema[key]
            limits.append(words.format(f"{value:g}" if isinstance(value, float) else value))
    return limits
