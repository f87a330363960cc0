"""A clock that goes on only when it is told to, or when somebody sleeps by it. Implements `sidecar.ports.Clock`."""

import asyncio
from datetime import UTC, datetime, timedelta

__all__ = ["FakeClock"]


class FakeClock:
    def __init__(self, start: datetime = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)) -> None:
        self._time = start
        self._boot_ns = 1_000_000_000

    def now(self) -> datetime:
        return self._time

    def boot_time_ns(self) -> int:
        return self._boot_ns

    def boot_id(self) -> str:
        return "boot"

    async def sleep(self, seconds: float) -> None:
        """Lets the others run, and the time go by."""
        self.advance(seconds)
        await asyncio.sleep(0)

    def advance(self, seconds: float) -> None:
        self._time += timedelta(seconds=seconds)
        self._boot_ns += int(seconds * 1_000_000_000)

    def step_wall_clock(self, seconds: float) -> None:
        """What an administrator or NTP does to the wall clock; boot time never steps."""
        self._time += timedelta(seconds=seconds)
