"""A small simulation on the fake store, whose every change of a row can be watched: for `test_conformance`. The one that looks for
defects is `tests/simulation`.

Lost, late and doubtful answers, a store that fails before and after its commit, processes that die or are paused and wake up.

Invariants: a payment is executed at most once; rejected or abandoned was never executed, now or later; accepted was executed;
nobody was told both; a dispatch is on record before each send; and once faults stop, every payment comes to an end.
"""

import asyncio
import random
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

from sidecar.audit.entry import AuditEntry
from sidecar.custody.payments import InitiatePayment
from sidecar.domain.audit import AuditEvent
from sidecar.domain.payment import DispatchPermit, Payment, PaymentState
from sidecar.domain.provider import NotSent, SendOutcome, Unknown
from sidecar.errors import CustodyError, Unavailable
from sidecar.ports import Prepared
from tests.fakes.bank import ScriptedBank, error
from tests.fakes.egress import BankRequest
from tests.unit.custody.support import Core, World, caller, payment_request

S = PaymentState
PAYMENTS_A_WORLD = 60
SAID_YES = {S.ACCEPTED, S.AWAITING_AUTHORISATION, S.SETTLED}
SAID_NO = {S.REJECTED, S.REJECTED_LATE, S.ABANDONED, S.CANCELLED}
COMMANDS = ("claim_payment", "change_payment", "record_dispatch", "change_consent", "record")


class Process:
    """What can happen to one sidecar: it runs, stands still, or is gone. Passed before and after each call to the outside."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.going = asyncio.Event()
        self.going.set()
        self.rate = 0.03

    async def step(self) -> None:
        for _ in range(self._chance.randrange(3)):
            await asyncio.sleep(0)
        await self.going.wait()

    def fails(self) -> bool:
        return self._chance.random() < self.rate


class Mortal:
    """A port as one process sees it: it may stop before a call, and after it without having seen the answer."""

    def __init__(self, real: Any, process: Process) -> None:
        self._real, self._process = real, process

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)
        if not asyncio.iscoroutinefunction(method):
            return method

        async def call(*args: object, **kwargs: object) -> object:
            await self._process.step()
            away = name in COMMANDS and self._process.fails()
            if away and self._process._chance.random() < 0.5:
                raise Unavailable("STORE_UNAVAILABLE", "away")
            result = await method(*args, **kwargs)
            await self._process.step()
            if away:
                raise Unavailable("STORE_UNAVAILABLE", "the answer of a commit was lost")
            return result

        return call


class MortalEgress(Mortal):
    """As the real one: the deadline of a send is a moment of the boot clock, so a pause uses it up."""

    def __init__(self, real: Any, process: Process, world: World) -> None:
        super().__init__(real, process)
        self._world = world

    async def send(self, prepared: Prepared, permit: DispatchPermit, *, deadline_seconds: float) -> SendOutcome:
        clock = self._world.clock
        send_by_ns = clock.boot_time_ns() + int(deadline_seconds * 1e9)
        await self._process.step()
        left = (send_by_ns - clock.boot_time_ns()) / 1e9
        outcome: SendOutcome = await self._real.send(prepared, permit, deadline_seconds=left)
        await self._process.step()
        return outcome


class Simulation:
    def __init__(self, seed: int, name: str) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.world = World(name=name, token_seconds=None)
        self.faulty = True
        self.late: list[tuple[float, BankRequest]] = []
        self.sends: Counter[str] = Counter()
        self.records: Counter[str] = Counter()
        self.leaves_read = 0
        self.told: dict[str, set[PaymentState]] = defaultdict(set)
        self.processes: list[tuple[Core, Process]] = []
        self.calls: list[asyncio.Task[None]] = []

    # -- the bank, behind a network that may keep a request for an hour

    def network(self, request: BankRequest) -> SendOutcome:
        if ScriptedBank.kind(request) != "initiate":
            return self.world.bank(request)
        self._check_on_record(request)
        twist = self.twist()
        if twist == "late":
            arrival_seconds = self.world.clock.boot_time_ns() / 1e9 + self.chance.choice((1, 30, 600, 3600))
            self.late.append((arrival_seconds, request))
            return Unknown(code="ANSWER_TIMEOUT")
        self.world.bank.script["initiate"] = [twist] if twist is not None else []
        return self.world.bank(request)

    def _check_on_record(self, request: BankRequest) -> None:
        """Before the bank sees the n-th send of a payment, its n-th dispatch is on record under a signed checkpoint."""
        state = self.world.store._state
        for leaf in state.leaves[self.leaves_read : state.covered_size]:
            entry = AuditEntry.decode(leaf.entry).draft
            self.records[entry.payment] += entry.event is AuditEvent.PAYMENT_DISPATCHED
        self.leaves_read = state.covered_size
        (payment,) = [row for row in state.payments.values() if row.bank_key == request.headers["x-request-id"]]
        self.sends[payment.id] += 1
        assert self.sends[payment.id] <= self.records[payment.id], f"seed {self.seed}: sent without a record"

    def twist(self) -> Any:
        """What happens to one send, and whether the bank acts, now or later."""
        dice = self.chance.random()
        if not self.faulty or dice < 0.5:
            return None
        if dice < 0.6:
            return lambda _: Unknown(code="ANSWER_TRUNCATED")
        if dice < 0.7:
            return lambda answer: replace(answer, status=500)
        if dice < 0.75:
            return error(503, "X_Y")
        if dice < 0.8:
            return error(400, "FORMAT_ERROR")
        if dice < 0.9:
            return NotSent(code="CONNECT_FAILED")
        return "late"

    # -- processes

    def start(self) -> None:
        process = Process(self.chance)
        core = self.world.start(f"instance-{len(self.processes)}")
        store = Mortal(self.world.store, process)
        core.egress.bank = self.network
        egress = MortalEgress(core.egress, process, self.world)
        self.processes.append((replace(core, store=store, egress=egress), process))  # type: ignore[arg-type]

    @property
    def serving(self) -> Core:
        return self.processes[-1][0]

    def stop_one(self) -> None:
        """The process in service stands still (it may go on later, or never), and another takes its place."""
        self.processes[-1][1].going.clear()
        self.start()

    def wake_some(self) -> None:
        for _, process in self.processes:
            if self.chance.random() < 0.3:
                process.going.set()

    # -- the application

    async def pay(self, request: InitiatePayment) -> None:
        """Asks again with the same request id, at one process or another, until it is told something."""
        for _ in range(4):
            try:
                payment = await self.serving.payments.initiate(caller(), request)
            except Unavailable:
                await asyncio.sleep(0)
                continue
            except CustodyError as unexpected:
                raise AssertionError(f"seed {self.seed}: {unexpected.reason}") from unexpected
            self.told[payment.id].add(payment.state)
            return

    # -- the run

    async def run(self) -> None:
        self.start()
        consents = [await self.world.consent(life_seconds=10_000_000) for _ in range(4)]
        requests: list[InitiatePayment] = []
        while len(requests) < PAYMENTS_A_WORLD:
            for _ in range(self.chance.randrange(1, 8)):
                request = payment_request(self.chance.choice(consents))
                requests.append(request)
                self.spawn(request)
            for request in self.chance.sample(requests, min(3, len(requests))):
                self.spawn(request)
            await self.turn()
        await self.come_to_an_end(requests)

    def spawn(self, request: InitiatePayment) -> None:
        self.calls.append(asyncio.ensure_future(self.pay(request)))

    async def turn(self) -> None:
        for _ in range(self.chance.randrange(10, 60)):
            await asyncio.sleep(0)
        if self.chance.random() < 0.3:
            self.stop_one()
        self.wake_some()
        past_the_window = self.chance.random() < 0.04
        self.advance(25 * 3600 if past_the_window else self.chance.choice((0.1, 1, 5, 20, 70)))
        self.calls.append(asyncio.ensure_future(self.reconcile(self.serving)))
        self.note_states()

    async def reconcile(self, core: Core) -> None:
        try:
            await core.reconciler.run_due()
        except Unavailable:
            return  # the next round tries again

    def advance(self, seconds: float) -> None:
        """Time goes by. Requests that were on their way for long reach the bank in it; nobody waits for the answers any more."""
        clock = self.world.clock
        end_seconds = clock.boot_time_ns() / 1e9 + seconds
        arriving = sorted((entry for entry in self.late if entry[0] <= end_seconds), key=lambda entry: entry[0])
        self.late = [entry for entry in self.late if entry[0] > end_seconds]
        self.world.bank.script["initiate"] = []
        for arrival_seconds, request in arriving:
            clock.advance(max(arrival_seconds - clock.boot_time_ns() / 1e9, 0))
            self.world.bank(request)
        clock.advance(max(end_seconds - clock.boot_time_ns() / 1e9, 0))

    def note_states(self) -> None:
        for payment in self.world.store._state.payments.values():
            self.told[payment.id].add(payment.state)

    async def come_to_an_end(self, requests: list[InitiatePayment]) -> None:
        """Faults stop, everybody wakes up, and the background work goes on."""
        self.faulty = False
        for _, process in self.processes:
            process.rate = 0.0
            process.going.set()
        self.start()
        self.processes[-1][1].rate = 0.0
        for _ in range(200):
            self.advance(10)
            await self.reconcile(self.serving)
            self.note_states()
            if all(self._is_over(payment) for payment in self.world.store._state.payments.values()):
                break
        self.advance(7200)
        for call in self.calls:
            await asyncio.wait_for(call, 10)
        await self.serving.tasks.drain(seconds=5)
        self.judge(requests)

    @staticmethod
    def _is_over(payment: Payment) -> bool:
        return payment.is_terminal or payment.state is S.NEEDS_ATTENTION

    def judge(self, requests: list[InitiatePayment]) -> None:
        executed = self.world.bank.executed
        payments = self.world.store._state.payments.values()
        assert len({payment.request_id for payment in payments}) == len(payments) <= len(requests)
        for payment in payments:
            count = executed[payment.instruction.end_to_end_id]
            story = f"seed {self.seed}: {payment.state} executed {count} times, told {self.told[payment.id]}"
            assert count <= 1, story
            assert self._is_over(payment), story
            assert payment.state not in SAID_NO or count == 0, story
            assert payment.state not in SAID_YES or count == 1, story
            assert not (self.told[payment.id] & SAID_YES and self.told[payment.id] & SAID_NO), story
        assert sum(executed.values()) <= len(payments)
