"""Writing down what cannot be had a second time: a bank's answer, a rotated token.

The store says of a command that failed as unavailable that it may be repeated with the same values (`ports.Store`). So it is
repeated until it is written or this process ends: whoever waits may give up waiting, the task that holds the answer does not.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from sidecar.errors import Unavailable
from sidecar.ports import Clock

__all__ = ["persist"]

T = TypeVar("T")

_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0


async def persist(clock: Clock, command: Callable[[], Awaitable[T]]) -> T:
    """Runs `command`, again and again while the store is not available. Other errors are raised. Only for owned tasks."""
    pause_seconds = _FIRST_PAUSE_SECONDS
    while True:
        try:
            return await command()
        except Unavailable:
            await clock.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
