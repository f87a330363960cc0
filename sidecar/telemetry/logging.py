"""JSON lines on stderr: a constant event name and declared fields. What is not declared here is not written.

There is no way to log a message's text, an exception's text or a request: a line says which event, with which harmless values.
"""

import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from enum import IntEnum
from typing import Final, TextIO

from sidecar.loglines import log_line

__all__ = ["FIELDS", "Level", "Log"]

FIELDS: Final = frozenset(
    {
        "address", "attempt", "caller", "code", "consent", "count", "error_class", "error_place", "exit_code", "level_name",
        "method", "outcome", "path", "payment", "pid", "process", "provider", "reason", "request_id", "seconds", "signal",
        "size", "state", "surface", "version", "work",
    }
)  # fmt: skip


class Level(IntEnum):
    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


class Log:
    """`process` is on every line. A field that is not in FIELDS is a defect and raises ValueError."""

    def __init__(
        self,
        *,
        process: str,
        level: Level = Level.INFO,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._process = process
        self._level = level
        self._stream = stream or sys.stderr
        self._now = now

    def debug(self, event: str, **fields: str | float | bool) -> None:
        self._write(Level.DEBUG, event, fields)

    def info(self, event: str, **fields: str | float | bool) -> None:
        self._write(Level.INFO, event, fields)

    def warning(self, event: str, **fields: str | float | bool) -> None:
        self._write(Level.WARNING, event, fields)

    def error(self, event: str, **fields: str | float | bool) -> None:
        self._write(Level.ERROR, event, fields)

    def exception(self, event: str, error: BaseException, **fields: str | float | bool) -> None:
        """Where an unexpected error came from: its class and the place of the innermost frame, never its text."""
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].name}:{frames[-1].lineno}" if frames else ""
        self._write(Level.ERROR, event, {**fields, "error_class": type(error).__name__, "error_place": place})

    def _write(self, level: Level, event: str, fields: dict[str, str | float | bool]) -> None:
        undeclared = fields.keys() - FIELDS
        if undeclared:
            raise ValueError(f"undeclared log fields: {', '.join(sorted(undeclared))}")
        if level < self._level:
            return
        now = datetime.fromtimestamp(self._now(), UTC)
        self._stream.write(log_line(self._process, level.name.lower(), event, fields, now=now).decode("ascii"))
        self._stream.flush()
