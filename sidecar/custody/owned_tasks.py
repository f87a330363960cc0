"""Work that must not be cut in two: it runs in tasks that the sidecar owns, so a caller's deadline or a shutdown only stops the
waiting, never the work."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["OwnedTasks"]

T = TypeVar("T")


class OwnedTasks:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for `work`; when the waiter is cancelled the work goes on."""
        return await asyncio.shield(self.begin(work))

    def begin(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Starts `work` without waiting for it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the waiter has it, or has gone; either way it is not "never retrieved"

    async def drain(self, *, seconds: float) -> int:
        """Waits up to `seconds` for all work to end; returns how much has not."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        return len(self._tasks)
