"""What every command has in common: where it finds the coordinator, and how it prints."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from common.errors import NotFound
from common.settings import Settings
from coordinator.stack.folder import DEFAULT_FOLDER, StackFolder

if TYPE_CHECKING:
    from coordinator.services import Services

_WIDTH = 160  # columns of a table that is not shown on a terminal

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON value and nothing else.")


def open_coordinator(config: Path | None, *, needs_broker: bool = True) -> "Services":
    """Open the coordinator's services; without a settings file, those of the stack in this folder if there is one."""
    from coordinator.services import open_services  # Celery and Redis, which many commands do without, cost 0.4 s

    return open_services(coordinator_settings(config), needs_broker=needs_broker)


def coordinator_settings(config: Path | None) -> Settings:
    """Return the settings of the named file, or of the stack in this folder, or of the variables.

    Raise NotFound where none of them says anything: the defaults alone would make a new database here.
    """
    file = config or default_settings_file()
    settings = Settings.load(file)
    if file is None and not settings.model_fields_set:
        raise NotFound(
            "There is no stack in this folder; go to the folder that has one, name the settings file with --config, or "
            "make a stack with `fedchord up`."
        )
    return settings


def default_settings_file() -> Path | None:
    """Return the settings file of the stack in this folder, or None if there is no stack."""
    file = StackFolder(DEFAULT_FOLDER).settings_file
    return file if file.exists() else None


def console() -> Console:
    """Return the console for tables; a pipe gets wide lines instead of cut ones."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def print_json(value: object) -> None:
    """Print the value as JSON."""
    click.echo(json.dumps(document(value), indent=2, ensure_ascii=False))


def document(value: object) -> Any:
    """Return the value in JSON's types; data classes become objects, times ISO 8601 text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: document(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): document(each) for key, each in value.items()}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [document(each) for each in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def table(columns: Iterable[str], rows: Iterable[Sequence[object]], *, empty: str) -> Table | str:
    """Return a table of the rows, or the sentence if there are none."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(text(value) for value in row))
    return made if made.row_count else empty


def text(value: object) -> str:
    """Return a table cell's text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime):
        return ago(value)
    return str(value)


def size_text(size: int) -> str:
    """Return a number of bytes in the largest unit that fits, in steps of a thousand."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 1000)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 100 * factor else f"{size / factor:.0f} {unit}"
    return f"{size} B"


def ago(moment: datetime) -> str:
    """Return how long ago that was, in the largest unit that fits."""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Return the metrics in one line."""
    return ", ".join(f"{name} {text(value)}" for name, value in sorted(metrics.items()))
