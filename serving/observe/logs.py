"""Log lines on stderr: text, or a JSON object a line (--log-format json).

A record may carry fields, given as `extra=fields(name=value)`. They are members of the JSON object,
and a line of text ends with name=value for each. A value never contains a line break.
"""

import json
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

FORMATS = ("text", "json")
_KEY = "mixtral_fields"  # attribute of a record, which no other library uses


def set_up(
    name: str, form: str = "text", is_news: Callable[[logging.LogRecord], bool] | None = None
) -> None:
    """Starts logging: warnings of every logger, and INFO of the loggers under `name`.

    Args:
        name: The logger of the process.
        form: One of FORMATS.
        is_news: Returns False for records that are not to be logged; by default all are logged.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    if is_news is not None:
        handler.addFilter(is_news)
    root = logging.getLogger()
    # Whatever logs by the root logger while it is imported, as libtpu does, leaves a handler there
    # with a format of its own, which knows no fields.
    for other in [item for item in root.handlers if type(item) is logging.StreamHandler]:
        root.removeHandler(other)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger(name).setLevel(logging.INFO)


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Returns the `extra` of a record with these fields; fields that are None are left out."""
    return {_KEY: {name: value for name, value in values.items() if value is not None}}


class TextFormatter(logging.Formatter):
    """2026-11-22 10:00:00,000 INFO serving.gateway: message name=value"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Appends the fields of the record to its message."""
        pairs = (f" {name}={_plain(value)}" for name, value in _fields_of(record).items())
        return super().formatMessage(record) + "".join(pairs)


class JsonFormatter(logging.Formatter):
    """{"time": ..., "level": ..., "logger": ..., "message": ..., and the record's fields}"""

    def format(self, record: logging.LogRecord) -> str:
        """Writes the record as a JSON object."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    return getattr(record, _KEY, {})


def _plain(value: object) -> str:
    """Returns a value as text; as JSON if it has spaces, quotes or equals signs."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    is_one_word = text.isascii() and text.isprintable() and not set(text) & set(' "=')
    return text if is_one_word or not isinstance(value, str) else json.dumps(value)
