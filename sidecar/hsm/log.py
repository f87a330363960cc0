"""Log lines of the hsm process: one JSON object a line on standard error, constant messages, harmless fields.

The supervisor reads them: the `message` of the last line is the reason it gives when this process ends.
"""

import os
import sys
from datetime import UTC, datetime

import msgspec

__all__ = ["log"]


def log(level: str, event: str, message: str, **fields: str | int | bool | list[str]) -> None:
    """`event` is a constant in kebab-case, `message` one of our sentences. A line that nobody takes is lost, never an error."""
    line = {"ts": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "process": "hsm"}
    record = msgspec.json.encode({**line, "event": event, "message": message, **fields}) + b"\n"
    try:
        os.write(sys.stderr.fileno(), record)
    except (OSError, ValueError):
        # The reader is gone or does not read. There is nobody to tell, and money does not wait for a log line.
        return
