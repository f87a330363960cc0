"""Log lines of egress: one JSON object each, on standard error. Constant messages; fields are numbers, codes and names of
classes, never a value of a request or an answer."""

import json
import sys
from datetime import UTC, datetime

__all__ = ["log"]


def log(level: str, message: str, **fields: str | int | bool) -> None:
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "process": "egress"}
    sys.stderr.write(json.dumps(line | {"message": message} | fields) + "\n")
    sys.stderr.flush()
