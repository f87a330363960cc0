"""One sidecar of the simulation: the real core over ports that stand still and die with its process.

A process that is gone does nothing any more: each of its ports raises `Died` before and after every call, so that neither a
`finally` nor a retry of its tasks reaches anything. Where it died is where its tasks were waiting: at any await of theirs.
"""

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from sidecar.domain.payment import DispatchPermit
from sidecar.domain.provider import NotSent, ProviderRequest, SendOutcome
from sidecar.errors import Unavailable
from sidecar.ports import Prepared
from tests.fakes.egress import BankRequest, FakeEgress
from tests.fakes.hsm import FakeHsm
from tests.simulation.bank import Network
from tests.simulation.store import StoreFaults
from tests.simulation.virtual import SimulatedClock

__all__ = ["Died", "Port", "Process", "SimulatedEgress", "SimulatedHsm"]

T = TypeVar("T")
_TURN_RATE, _TURN_SECONDS = 0.1, 0.1


class Died(BaseException):
    """The process that this code runs in is gone. Not an Exception: nothing handles it."""


class Process:
    """Runs, stands still, or is gone. `strike` is asked at each step whether it dies here, `chance` whether others have a turn."""

    def __init__(self, name: str, *, strike: Callable[["Process"], bool], chance: random.Random) -> None:
        self.name = name
        self.alive = True
        self._stopped = self._suspended = False
        self._going = asyncio.Event()
        self._going.set()
        self._strike = strike
        self._chance = chance
        self._tasks: set[asyncio.Task[Any]] = set()

    async def step(self) -> None:
        """Before and after each call to the outside."""
        self.check()
        if self._strike(self):
            raise Died
        if self._chance.random() < _TURN_RATE:
            await asyncio.sleep(_TURN_SECONDS * self._chance.random())
            self.check()
        if not self._going.is_set():
            await self._going.wait()
            self.check()

    def check(self) -> None:
        if not self.alive:
            raise Died

    @property
    def stands_still(self) -> bool:
        return not self._going.is_set()

    def pause(self) -> None:
        """Stopped, as by SIGSTOP."""
        self._stopped = True
        self._going.clear()

    def go_on(self) -> None:
        self._stopped = False
        if not self._suspended:
            self._going.set()

    def suspend(self, suspended: bool) -> None:
        """With its machine: whoever wakes the process alone wakes nothing."""
        self._suspended = suspended
        if suspended:
            self._going.clear()
        elif not self._stopped:
            self._going.set()

    def start(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def die(self, owned: set["asyncio.Task[Any]"]) -> None:
        """`owned` are the tasks that the core itself owns."""
        self.alive = False
        for task in sorted(self._tasks | owned, key=_age):  # a set of tasks is in the order of their addresses
            task.cancel()

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits has it


def _age(task: "asyncio.Task[Any]") -> int:
    """asyncio numbers tasks in the order in which they are made: Task-1, Task-2, …"""
    return int(task.get_name().rpartition("-")[2])


class Port:
    """`real` as one process sees it."""

    def __init__(self, real: object, process: Process) -> None:
        self._real = real
        self._process = process

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._real, name)
        if inspect.iscoroutinefunction(attribute):
            made: Any = self._asynchronous(attribute)
        elif callable(attribute):
            made = self._immediate(attribute)
        else:
            return attribute
        setattr(self, name, made)
        return made

    def _asynchronous(self, method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        process = self._process

        async def call(*args: Any, **kwargs: Any) -> T:
            await process.step()
            try:
                return await method(*args, **kwargs)
            finally:
                await process.step()

        return call

    def _immediate(self, method: Callable[..., T]) -> Callable[..., T]:
        def call(*args: Any, **kwargs: Any) -> T:
            self._process.check()
            return method(*args, **kwargs)

        return call


class SimulatedEgress(FakeEgress):
    """The fake egress with a network in front of its bank. The deadline of a send is a moment of the boot clock."""

    def __init__(self, *, network: Network, clock: SimulatedClock, faults: StoreFaults, **arguments: Any) -> None:
        super().__init__(bank=network.bank, **arguments)
        self._network = network
        self._clock = clock
        self._faults = faults

    async def prepare(self, request: ProviderRequest, **arguments: Any) -> Prepared:
        await asyncio.sleep(0.01)
        if self._faults.strikes("no connection"):
            raise Unavailable("PROVIDER_UNAVAILABLE", "the provider cannot be reached")
        return await super().prepare(request, **arguments)

    async def send(self, prepared: Prepared, permit: DispatchPermit, *, deadline_seconds: float) -> SendOutcome:
        send_before_ns = self._clock.boot_time_ns() + int(deadline_seconds * 1e9)
        if permit.send_before_boot_time_ns is not None:
            send_before_ns = min(send_before_ns, permit.send_before_boot_time_ns)
        permit.redeem()
        request: BankRequest | None = self._prepared.pop(prepared.handle, None)
        if request is None:
            return NotSent(code="PREPARED_GONE")
        await asyncio.sleep(0.001)
        left_seconds = (send_before_ns - self._clock.boot_time_ns()) / 1e9
        if left_seconds <= 0:
            return NotSent(code="DEADLINE_BEFORE_SEND")
        return await self._network.exchange(request, deadline_seconds=left_seconds)

    async def call(self, request: ProviderRequest, **arguments: Any) -> SendOutcome:
        deadline_seconds = arguments.pop("deadline_seconds")
        filled, _ = self._filled(request, arguments.get("wrapped_data_key", b""), arguments.get("secrets", ()))
        return await self._network.exchange(filled, deadline_seconds=deadline_seconds)

    async def call_once(self, request: ProviderRequest, **arguments: Any) -> SendOutcome:
        return await self.call(request, **arguments)


class SimulatedHsm(FakeHsm):
    """Signs, or is away."""

    def __init__(self, *, faults: StoreFaults, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._faults = faults

    async def sign(self, purpose: Any, digest: bytes) -> bytes:
        if self._faults.strikes("no signature"):
            raise Unavailable("HSM_UNAVAILABLE", "the HSM did not answer")
        self.signed.clear()
        return await super().sign(purpose, digest)
