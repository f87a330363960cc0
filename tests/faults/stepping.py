"""Every await of a piece of work as a numbered point at which something can happen.

A task factory wraps each task's coroutine. The point is passed twice for each await: when the task stands still (what it waits for
may be half done) and when it goes on (what it waited for is done, and nobody has acted on it yet).
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["at_every_await"]

T = TypeVar("T")


class _Stepped(Coroutine[Any, Any, T]):
    def __init__(self, inner: Coroutine[Any, Any, T], pass_point: Callable[[], None]) -> None:
        self._inner = inner
        self._pass_point = pass_point

    def send(self, value: Any) -> Any:
        self._pass_point()
        waited_for = self._inner.send(value)
        self._pass_point()
        return waited_for

    def throw(
        self,
        kind: type[BaseException] | BaseException,
        value: BaseException | object = None,
        trace: TracebackType | None = None,
    ) -> Any:
        self._pass_point()
        return self._inner.throw(kind if isinstance(kind, BaseException) else kind())

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._inner.__await__()


async def at_every_await(work: Coroutine[Any, Any, T], happens: Callable[[int], None]) -> T:
    """The result of `work`; `happens` is called with 1, 2, ... at each point of it and of all tasks that it starts."""
    loop = asyncio.get_running_loop()
    passed = 0

    def pass_point() -> None:
        nonlocal passed
        passed += 1
        happens(passed)

    def factory(
        of: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any] | Generator[Any, None, Any], **rest: Any
    ) -> "asyncio.Task[Any]":
        assert isinstance(coroutine, Coroutine)
        return asyncio.Task(_Stepped(coroutine, pass_point), loop=of, **rest)

    before = loop.get_task_factory()
    loop.set_task_factory(factory)
    try:
        return await loop.create_task(work)
    finally:
        loop.set_task_factory(before)
