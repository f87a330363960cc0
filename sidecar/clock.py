"""The real clock."""

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["SystemClock"]


class SystemClock:
    """Implements `ports.Clock`."""

    def __init__(self) -> None:
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def boot_time_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def boot_id(self) -> str:
        return self._boot_id

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
