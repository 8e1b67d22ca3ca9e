"""How every process logs: to stderr, a record a line, as text for people or as JSON for machines."""

import json
import logging
import textwrap
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Literal

Format = Literal["text", "json"]
FORMATS: tuple[Format, ...] = ("text", "json")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the HTTP request that is being worked on, which every line then has."""

_FIELDS = "fields"
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {ord("\n"): "\\n", ord("\t"): "\t"}


def setup(level: str, format: Format = "text") -> None:
    """Log what is at least of `level` ("debug", "info", "warning", "error") to stderr; replaces what was set up before."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def fields(values: Mapping[str, object]) -> dict[str, object]:
    """The `extra` of a record with fields of its own, which both formats show: `log.info("request", extra=fields({...}))`."""
    return {_FIELDS: values}


class JsonLines(logging.Formatter):
    """An object a line.

    `time` (UTC), `level`, `logger`, `process` (its id) and `message` always; in a request `request_id`; with an error
    `exception`, the traceback; and the record's own fields, null where nothing is known.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        if (id_ := request_id.get()) is not None:
            line["request_id"] = id_
        line |= getattr(record, _FIELDS, {})
        if trace := _trace(self, record):
            line["exception"] = trace
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """A line of text, with the record's fields as `name=value` where one is known, and its traceback indented below."""

    def format(self, record: logging.LogRecord) -> str:
        """The line or lines; nothing that a client sent can look like another line."""
        shown = {**getattr(record, _FIELDS, {}), "request_id": request_id.get()}
        parts = [
            f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage().translate(_CONTROLS)}",
            *(f"{name}={_value(value)}" for name, value in shown.items() if value is not None),
        ]
        line = " ".join(parts)
        trace = "\n".join(part.translate(_CONTROLS) for part in _trace(self, record).splitlines())
        return f"{line}\n{textwrap.indent(trace, '    ')}" if trace else line


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info) if record.exc_info else "", record.stack_info or ""]
    return "\n".join(filter(None, parts))


def _value(value: object) -> str:
    text = str(value)
    return text if text.isascii() and text.isprintable() and text and not set(text) & set(' "=') else json.dumps(text)
