"""When a call is tried again: never one that could act twice, never past its deadline, never with another request id.

Pure: it decides, the transports wait.
"""

import random
from dataclasses import dataclass, field

from custody._contract import Method
from custody.errors import CustodyError, UnavailableError

__all__ = ["Retries"]

_FIRST_BACKOFF_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 1.0


@dataclass(slots=True, kw_only=True)
class Retries:
    """The retries of one call. `deadline_seconds` is on the same clock as `now_seconds`."""

    method: Method
    max_retries: int
    deadline_seconds: float
    _tried: int = field(default=0, init=False)

    def pause_after(self, error: CustodyError, *, now_seconds: float) -> float | None:
        """Answer with the seconds to wait before the same request is sent again, or None where it must not be.

        Only UNAVAILABLE may be repeated; the sidecar's own wish (RetryInfo) comes before the backoff. What does not fit
        before the deadline is not begun.
        """
        if not isinstance(error, UnavailableError) or not self.method.repeatable or self._tried >= self.max_retries:
            return None
        backoff = min(_FIRST_BACKOFF_SECONDS * 2**self._tried, _LONGEST_BACKOFF_SECONDS)
        pause = max(error.retry_after_seconds or 0.0, backoff * random.uniform(0.5, 1.0))  # noqa: S311 — spreads load, keeps no secret
        self._tried += 1
        return pause if now_seconds + pause < self.deadline_seconds else None
