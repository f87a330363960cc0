"""The real clock."""

import asyncio
import time
from datetime import UTC, datetime

__all__ = ["SystemClock"]


class SystemClock:
    """Implements `ports.Clock`."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def boot_time_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
