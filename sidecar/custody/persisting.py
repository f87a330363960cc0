"""Writing down what cannot be had a second time: a bank's answer, a rotated token.

The store says of a command that failed as unavailable that it may be repeated with the same values (`ports.Store`).
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from sidecar.errors import Unavailable
from sidecar.ports import Clock

__all__ = ["persist"]

T = TypeVar("T")

PERSIST_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0


async def persist(clock: Clock, command: Callable[[], Awaitable[T]]) -> T:
    """Runs `command`, again and again for PERSIST_SECONDS while the store is not available. Raises the last Unavailable then."""
    give_up_ns = clock.boot_time_ns() + int(PERSIST_SECONDS * 1e9)
    pause_seconds = _FIRST_PAUSE_SECONDS
    while True:
        try:
            return await command()
        except Unavailable:
            if clock.boot_time_ns() >= give_up_ns:
                raise
        await clock.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
