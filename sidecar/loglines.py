"""The one form of a log line, whatever process writes it: a JSON object with `ts`, `level`, `process`, `event`, and fields.

`event` is a constant in snake_case, `message` (where there is one) a sentence of ours; fields are harmless values in snake_case.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime

__all__ = ["Value", "log_line"]

Value = str | float | bool


def log_line(
    process: str, level: str, event: str, fields: Mapping[str, Value], *, now: datetime | None = None
) -> bytes:
    """The line, with its end. `now` is UTC; the present where it is left out."""
    ts = (now or datetime.now(UTC)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    record = {"ts": ts, "level": level, "process": process, "event": event, **fields}
    return json.dumps(record, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"
