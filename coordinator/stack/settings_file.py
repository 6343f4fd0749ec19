"""Write a settings file for `Settings.load`: TOML, secrets in it, so readable by its owner only."""

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import InvalidSettings
from coordinator.stack.folder import write_private


def write_settings(path: Path, values: Mapping[str, Any], *, heading: str) -> None:
    """Set the values in the file; what else somebody has set in it stays (its comments do not)."""
    merged = {**_read(path), **values}
    tables = {name: value for name, value in merged.items() if isinstance(value, Mapping)}
    lines = [f"# {heading}"]
    lines += [f"{name} = {_toml(value)}" for name, value in merged.items() if name not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{_toml(key)} = {_toml(value)}" for key, value in table.items())]
    write_private(path, "\n".join(lines) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"The settings file {path} is not valid TOML: {error}.") from error


def _toml(value: object) -> str:
    """Return the value in TOML's notation, which for these kinds of value is JSON's."""
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str | bool | int | float):
        raise TypeError(f"a setting cannot be {value!r}")
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
