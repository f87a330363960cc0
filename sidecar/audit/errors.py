"""What the log refuses. Both are errors of the one tree; no message repeats a value."""

from sidecar.errors import Corrupt, Internal

__all__ = ["EntryRefused", "LogCorrupt"]


class EntryRefused(Internal):
    """The entry that we were about to write breaks the format: a defect of the code that drafted it. Nothing was written."""


class LogCorrupt(Corrupt):
    """Bytes that claim to be part of the log fail their checks: do not act upon them, page somebody."""

    def __init__(self, message: str) -> None:
        super().__init__("AUDIT_LOG_CORRUPT", message)
