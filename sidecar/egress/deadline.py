"""A point in CLOCK_BOOTTIME, which all processes of one machine share and which goes on through suspend."""

import asyncio
from dataclasses import dataclass

from sidecar.ipc.frames import boot_time_ns, deadline_after

__all__ = ["Deadline"]


@dataclass(frozen=True, slots=True)
class Deadline:
    boot_time_ns: int

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        return cls(deadline_after(seconds))

    @property
    def remaining_seconds(self) -> float:
        """0 when it has passed."""
        return max(0.0, (self.boot_time_ns - boot_time_ns()) / 1e9)

    @property
    def passed(self) -> bool:
        return boot_time_ns() >= self.boot_time_ns

    def earlier(self, seconds: float) -> "Deadline":
        """The earlier of this one and `seconds` from now."""
        return min(self, Deadline.after(seconds), key=lambda deadline: deadline.boot_time_ns)

    def timeout(self) -> asyncio.Timeout:
        """Cancels the block at the deadline with TimeoutError."""
        return asyncio.timeout(self.remaining_seconds)
