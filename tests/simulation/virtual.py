"""An event loop without real time: what is ready runs in an order that the seed decides; the clock goes on when nothing is ready.

Rules: no descriptor, no thread, no real clock reaches a task, and every random byte comes from the seed; so one seed is one run.
"""

import asyncio
import contextlib
import os
import random
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

__all__ = ["Permuted", "SimulatedClock", "SimulationLoop", "seeded_randomness"]

_START = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)


class Permuted(deque[Any]):
    """A queue whose next item is any of those that wait. asyncio promises an order for callbacks; no code of ours may rest on it
    across tasks, because real sockets and threads know no such order."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance

    def popleft(self) -> Any:
        count = len(self)
        if count > 1:
            chosen = int(self._chance.random() * count)
            self[0], self[chosen] = self[chosen], self[0]
        return super().popleft()


class SimulationLoop(asyncio.BaseEventLoop):
    """`time()` is virtual: it jumps to the next timer when nothing is ready."""

    _ready: Any
    _scheduled: Any

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._now_seconds = 0.0
        self._ready = Permuted(chance)
        self._selector = self

    def time(self) -> float:
        return self._now_seconds

    def select(self, timeout: float | None) -> list[object]:
        """What BaseEventLoop asks of a selector: waits until something happens. Here that is the next timer."""
        if timeout is None:
            raise RuntimeError("nothing is ready and no timer runs: the simulation waits for itself")
        if timeout > 0:
            self._now_seconds = max(self._now_seconds, self._scheduled[0].when())
        return []

    def _process_events(self, event_list: object) -> None:
        """There are no events but timers."""

    def _write_to_self(self) -> None:
        """Nothing sleeps that would have to be woken."""


class SimulatedClock:
    """`sidecar.ports.Clock` of one machine, over the loop's time. The wall clock can be set; a restart begins a new boot time."""

    def __init__(self, loop: SimulationLoop) -> None:
        self._loop = loop
        self._booted_at = -1.0
        self._boots = 1
        self.wall_offset_seconds = 0.0

    def now(self) -> datetime:
        return _START + timedelta(seconds=self._loop.time() + self.wall_offset_seconds)

    def boot_time_ns(self) -> int:
        return int((self._loop.time() - self._booted_at) * 1e9)

    def boot_id(self) -> str:
        return f"boot-{self._boots}"

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def restart_machine(self) -> None:
        self._boots += 1
        self._booted_at = self._loop.time() - 1.0


@contextlib.contextmanager
def seeded_randomness(seed: int) -> Iterator[None]:
    """Identifiers, keys and salts from the seed: `uuid4` takes its bytes from os.urandom, `secrets` from random's name for it."""
    source = random.Random(f"bytes {seed}")
    real, real_for_secrets = os.urandom, random._urandom  # type: ignore[attr-defined]
    os.urandom = random._urandom = source.randbytes  # type: ignore[attr-defined]
    try:
        yield
    finally:
        os.urandom, random._urandom = real, real_for_secrets  # type: ignore[attr-defined]
