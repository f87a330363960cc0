"""fi_C1 to fi_C5: clocks that jump, stand, or disagree. The core runs on a clock that a test sets; the bank's books judge."""

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import pytest

from sidecar.domain.payment import Payment, PaymentState
from sidecar.errors import CustodyError, Unavailable
from tests.fakes.bank import lost
from tests.fakes.clock import FakeClock
from tests.faults.extent import sample, seed
from tests.faults.stepping import at_every_await
from tests.unit.custody.support import Core, World, caller, payment_request

Record = Callable[[str, object], None]
S = PaymentState
A, C = "sandbox-bank-idempotent", "sandbox-bank"
HOUR, DAY, TEN_YEARS = 3600, 86_400, 315_576_000
JUMPS = tuple(sign * seconds for seconds in (1, HOUR, DAY, TEN_YEARS) for sign in (1, -1))
ENDED = {S.SETTLED, S.REJECTED, S.ABANDONED, S.NEEDS_ATTENTION}
POINTS = 30  # more than the act has; a jump at a point that it does not come to is a run without a fault
# What a caller may find in the end when the clock stays wrong: a window that cannot be told counts as closed.
FOUND_OUT_SECONDS = 60


async def _payment_under_a_jump(name: str, *, answer_is_lost: bool, point: int, jump: int, set_right: bool) -> None:
    """A payment and two rounds of reconciliation, with a jump at one of their awaits; then a minute of background work."""
    world = World(name=name, token_seconds=None)
    consent = await world.consent(life_seconds=100_000, expire_time=world.clock.now() + timedelta(days=20 * 366))
    request = payment_request(consent)
    world.bank.script["initiate"] = [lost] if answer_is_lost else []
    story = f"{name}, lost {answer_is_lost}, {jump:+} s at point {point}, set right {set_right}"

    def happens(passed: int) -> None:
        if passed == point:
            world.clock.step_wall_clock(jump)

    async def act() -> None:
        for _ in range(2):
            with suppress(CustodyError):
                await world.core.payments.initiate(caller(), request)
            world.clock.advance(2)
            with suppress(Unavailable):
                await world.core.reconciler.run_due()

    await at_every_await(act(), happens)
    if set_right:
        world.clock.step_wall_clock(-jump)
    for _ in range(FOUND_OUT_SECONDS // 5):
        world.clock.advance(5)
        await _background(world.core)
    _judge(world, story)


async def _background(core: Core) -> None:
    with suppress(Unavailable):  # the next round tries again
        await core.reconciler.run_due()


def _judge(world: World, story: str) -> None:
    for payment in world.store._state.payments.values():
        count = world.bank.executed[payment.instruction.end_to_end_id]
        said = f"{story}: {payment.state}, executed {count} times"
        assert count <= 1, said
        assert payment.state in ENDED, said
        assert payment.state is not S.SETTLED or count == 1, said
        assert payment.state not in (S.REJECTED, S.ABANDONED) or count == 0, said


@pytest.mark.parametrize("set_right", [True, False], ids=["set right again", "stays wrong"])
@pytest.mark.parametrize("name", [A, C], ids=["class A", "class C"])
def test_the_wall_clock_jumps_at_an_await(name: str, set_right: bool, record_property: Record) -> None:
    """fi_C1: a second to ten years, forward and back, at each await: made at most once, told truly, and found out in a minute."""
    points = list(itertools.product((True, False), range(1, POINTS), JUMPS))
    chosen = sample(points, 120, of=f"clock {name} {set_right}")
    print(f"seed {seed()}")
    for answer_is_lost, point, jump in chosen:
        asyncio.run(
            _payment_under_a_jump(name, answer_is_lost=answer_is_lost, point=point, jump=jump, set_right=set_right)
        )

    record_property("injected", len(chosen))


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/St_Johns", "right/UTC"])
def test_the_time_zone_of_the_machine_does_not_matter(zone: str) -> None:
    """fi_C2: times are UTC and their distances seconds, also over a change of daylight saving time; `right/` has leap seconds."""
    program = (
        "from datetime import timedelta, datetime, UTC; from sidecar.clock import SystemClock;"
        "now = SystemClock().now(); assert now.utcoffset() == timedelta(0), now;"
        "before = datetime(2026, 10, 25, 0, 59, 59, tzinfo=UTC);"
        "assert (before + timedelta(seconds=2)).timestamp() - before.timestamp() == 2;"
        "print(now.timestamp())"
    )
    environment = {**os.environ, "TZ": zone}

    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


def _other_boot_time(program: str) -> "subprocess.CompletedProcess[str]":
    """Runs `program` where CLOCK_BOOTTIME is a day ahead of CLOCK_MONOTONIC, as after a suspend of a day."""
    command = ["unshare", "--time", "--fork", "--boottime", str(DAY), sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_suspend_uses_up_time() -> None:
    """fi_C3: gateway and egress both read the clock that goes on through suspend, so a deadline passes while the machine sleeps."""
    probe = _other_boot_time("import time; print(time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic())")
    if probe.returncode != 0:
        pytest.skip(f"no time namespaces here: {probe.stderr.strip()[:200]}")
    program = (
        "import time; from sidecar.clock import SystemClock; from sidecar.egress.deadline import Deadline;"
        "from sidecar.ipc.frames import boot_time_ns; monotonic = time.monotonic_ns();"
        "print((SystemClock().boot_time_ns() - monotonic) // 10**9, (boot_time_ns() - monotonic) // 10**9,"
        "Deadline(monotonic + 10**12).passed)"
    )

    done = _other_boot_time(program)

    assert done.returncode == 0, done.stderr
    gateway, egress, passed = done.stdout.split()
    assert int(gateway) >= DAY - 1
    assert int(egress) >= DAY - 1
    assert passed == "True"  # 1,000 s ahead by CLOCK_MONOTONIC; by the clock that counts it was over long ago


class _Skewed(FakeClock):
    """The same moments as another clock, by a wall clock that is so many seconds off."""

    def __init__(self, real: FakeClock, seconds: float) -> None:
        super().__init__()
        self._real, self._seconds = real, seconds

    def now(self):  # type: ignore[no-untyped-def]
        return self._real.now() + timedelta(seconds=self._seconds)

    def boot_time_ns(self) -> int:
        return self._real.boot_time_ns()

    async def sleep(self, seconds: float) -> None:
        await self._real.sleep(seconds)


def _skewed_core(world: World, seconds: float) -> Core:
    """A second sidecar on the same store and bank, on a machine whose wall clock is off."""
    core = world.start("two")
    return Core(
        store=core.store,
        egress=core.egress,
        hsm=core.hsm,
        clock=_Skewed(world.clock, seconds),
        connectors=core.connectors,
        instance="two",
    )


@pytest.mark.parametrize("seconds", [300, -300])
@pytest.mark.parametrize("name", [A, C], ids=["class A", "class C"])
def test_two_sidecars_whose_clocks_disagree(name: str, seconds: float) -> None:
    """fi_C4: five minutes apart, both reconcile the same payments at the same time: each is made once, and found out."""

    async def run() -> None:
        world = World(name=name, token_seconds=None)
        first = world.core
        second = _skewed_core(world, seconds)
        consent = await world.consent(life_seconds=100_000)
        for number in range(6):
            world.bank.script["initiate"] = [lost] if number % 2 else []
            core = (first, second)[number % 2]
            with suppress(Unavailable):
                await core.payments.initiate(caller(), payment_request(consent))
        for _ in range(FOUND_OUT_SECONDS // 5):
            world.clock.advance(5)
            await asyncio.gather(_background(first), _background(second))
        _judge(world, f"{name}, {seconds} s apart")
        assert len(world.store._state.payments) == 6

    asyncio.run(run())


@pytest.mark.parametrize("minutes", [10, -10])
def test_a_bank_whose_clock_is_off(minutes: int) -> None:
    """fi_C5: its tokens live as long as it says from when they were asked for; its window is kept by the margin."""

    async def run() -> None:
        world = World(name=A, token_seconds=600)
        world.bank.clock = FakeClock(world.clock.now() + timedelta(minutes=minutes))
        world.bank.clock.advance(minutes * 60 + 3600)
        consent = await world.consent()
        world.bank.script["initiate"] = [lost, lost]
        payment = await world.core.payments.initiate(caller(), payment_request(consent))
        for _ in range(20):
            world.clock.advance(5)
            world.bank.clock.advance(5)
            await world.core.reconciler.run_due()
        world.clock.advance(400)
        access = await world.core.tokens.access(await world.stored(consent))

        final: Payment = await world.stored(payment)
        assert final.state is S.SETTLED
        assert world.bank.executed[final.instruction.end_to_end_id] == 1
        assert access.consent.access_expire_time == world.clock.now() + timedelta(seconds=600)

    asyncio.run(run())
