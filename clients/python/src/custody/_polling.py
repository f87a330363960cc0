"""How often to look at something that takes its time: soon at first, then ever more seldom. Pure but for the clock."""

from collections.abc import Callable, Iterator

__all__ = ["poll_pauses"]

_FIRST_PAUSE_SECONDS = 0.25
_GROWTH = 1.5
_LONGEST_PAUSE_SECONDS = 5.0


def poll_pauses(timeout_seconds: float, *, clock: Callable[[], float]) -> Iterator[float]:
    """Give the pauses between looks, in seconds, until `timeout_seconds` have passed on `clock`; the last one is cut short."""
    deadline_seconds = clock() + timeout_seconds
    pause_seconds = _FIRST_PAUSE_SECONDS
    while (left := deadline_seconds - clock()) > 0:
        yield min(pause_seconds, left)
        pause_seconds = min(pause_seconds * _GROWTH, _LONGEST_PAUSE_SECONDS)
