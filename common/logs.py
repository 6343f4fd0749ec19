"""Set up logging once, at a process's edge: lines for people, or one JSON object a line."""

import json
import logging
import time
from typing import Any, Literal

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_UNWANTED = frozenset({"data", "color_message"})  # Celery's copy of the sentence, and uvicorn's with escape sequences
_NOISY = {  # loggers of others, and from which level on they are heard
    "celery.worker.strategy": logging.WARNING,
    "celery.app.trace": logging.ERROR,  # a message that is put back comes with a traceback of some hundred lines
    "alembic": logging.WARNING,
    "celery.worker.consumer.consumer": logging.ERROR,  # common/consumer.py says once what it says every time
    "celery.backends.redis": logging.CRITICAL,  # each attempt; whoever asked says that the broker is away
}
_REPEAT_SECONDS = 60.0
_MAX_REPEATED = 1000  # lines that are remembered


class RepeatFilter(logging.Filter):
    """Let a warning or error through once while it goes on being repeated, word for word, within a minute each."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str, str], float] = {}  # when a line was last wanted (monotonic), the oldest first

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is to be written; a handler asks under its lock."""
        if record.levelno < logging.WARNING or record.exc_info:
            return True
        now = time.monotonic()
        line = (record.name, record.getMessage(), str(_fields(record)))
        last = self._seen.pop(line, None)
        self._seen[line] = now
        while len(self._seen) > _MAX_REPEATED:
            del self._seen[next(iter(self._seen))]
        return last is None or now - last > _REPEAT_SECONDS


class TextFormatter(logging.Formatter):
    """Write time, level and sentence, then the record's own fields as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """Return the sentence on one line: a site's words must neither look like other lines nor move the cursor."""
        return _on_one_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        return super().format(record) + (f"  [{_on_one_line(fields)}]" if fields else "")


class JsonFormatter(logging.Formatter):
    """Write one JSON object a line, for machines."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logs(level: str, style: Literal["text", "json"]) -> None:
    """Send every log line to standard error in the given style."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    handler.addFilter(RepeatFilter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy, least in _NOISY.items():
        logging.getLogger(noisy).setLevel(max(least, logging.getLevelName(level)))


def _on_one_line(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(record).items()
        if name not in _STANDARD and not name.startswith("_") and name not in _UNWANTED
    }
