"""Log lines of egress, on standard error. Constant messages; fields are numbers, codes and names of classes, never a value of a
request or an answer."""

import sys

from sidecar.loglines import Value, log_line

__all__ = ["log"]


def log(level: str, event: str, message: str, **fields: Value) -> None:
    """The supervisor reads `message` as the reason, should this be the last line."""
    sys.stderr.write(log_line("egress", level, event, {"message": message, **fields}).decode("ascii"))
    sys.stderr.flush()
