"""Log lines of the hsm process: constant messages, harmless fields, on standard error.

The supervisor reads them: the `message` of the last line is the reason it gives when this process ends.
"""

import os
import sys

from sidecar.loglines import Value, log_line

__all__ = ["log"]


def log(level: str, event: str, message: str, **fields: Value) -> None:
    """A line that nobody takes is lost, never an error."""
    try:
        os.write(sys.stderr.fileno(), log_line("hsm", level, event, {"message": message, **fields}))
    except (OSError, ValueError):
        # The reader is gone or does not read. There is nobody to tell, and money does not wait for a log line.
        return
