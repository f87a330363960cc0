"""A run: one or two sidecars on one store, an application, a bank, and all that can go wrong, by the seed.

Until all orders are placed faults strike; then they stop, everybody wakes up, and what is left must come to its end in time.
"""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sidecar.connectors.base import Connector
from sidecar.custody.checkpoints import HsmCheckpointSigner
from sidecar.custody.payments import INTENT_SECONDS, InitiatePayment
from sidecar.domain.audit import AuditEvent
from sidecar.domain.caller import Caller
from sidecar.domain.consent import AccountReference, Consent, ConsentState, Purpose
from sidecar.domain.ids import OwnerId, RequestId, WorkloadId, new_consent_id
from sidecar.domain.payment import Payment, PaymentState
from sidecar.domain.provider import KeyPurpose
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.errors import Conflict, CustodyError, PreconditionFailed, Unavailable
from sidecar.ports import Claim, PaymentFilter, SecretsChange
from sidecar.store import SqliteStore
from sidecar.store.errors import StoreRefused
from tests.fakes.bank import API, IBAN, TOKENS
from tests.fakes.egress import SoftwareKeys
from tests.simulation.bank import Bank, ClassName, Network
from tests.simulation.ledger import Judge
from tests.simulation.sidecar import Died, Port, Process, SimulatedEgress, SimulatedHsm
from tests.simulation.store import STALL_SECONDS, StoreFaults, abandon, open_store, simulated_committer
from tests.simulation.virtual import SimulatedClock, SimulationLoop, seeded_randomness
from tests.unit.custody.support import (
    CLUSTER,
    OWNER,
    PROVIDER,
    REDIRECT_URI,
    Core,
    caller,
    connector,
    draft,
    payment_request,
    request_id,
)

__all__ = ["CLASSES", "Outcome", "Violation", "simulate"]

T = TypeVar("T")
S = PaymentState

CLASSES: tuple[ClassName, ...] = ("A", "B", "C")
_DESCRIPTORS = {"A": "sandbox-bank-idempotent", "B": "sandbox-bank-lookup", "C": "sandbox-bank"}
_CALLERS = tuple(WorkloadId(f"workload:shop-{number}") for number in range(3))
_DAY_AND_AN_HOUR = 25 * 3600
# Once faults have stopped: so long a payment of class A or B may stay unknown, and so long it may take until a human is asked about
# one of class C whose send is over.
KNOWN_WITHIN_SECONDS = 60.0
FLAGGED_WITHIN_SECONDS = 5.0
_LINES_KEPT = 400


class Violation(AssertionError):
    """An invariant does not hold. The text names the seed that plays it again."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`digest` is of the whole trace: two runs of one seed have the same."""

    seed: int
    class_name: ClassName
    states: Counter[PaymentState]
    faults: Counter[str]
    digest: str
    virtual_seconds: float
    lines: tuple[str, ...] = field(repr=False)


@dataclass(kw_only=True)
class Sidecar:
    process: Process
    core: Core
    ready: bool = False


@dataclass(frozen=True, kw_only=True)
class Order:
    """What an application wants paid. Orders of several callers may have the same request id."""

    caller: Caller
    request: InitiatePayment

    @property
    def key(self) -> str:
        return f"{self.caller.workload} {self.request.request_id}"


def simulate(seed: int, *, directory: Path, orders: int = 100, class_name: ClassName | None = None) -> Outcome:
    """Plays the run of this seed, on the empty database of `directory`. Raises Violation."""
    chance = random.Random(seed)
    faults = StoreFaults(chance=random.Random(f"faults {seed}"))
    with seeded_randomness(seed), simulated_committer(faults):
        loop = SimulationLoop(random.Random(f"order {seed}"))
        loop.set_exception_handler(lambda _loop, _context: None)
        run = Simulation(
            seed=seed,
            class_name=class_name or CLASSES[seed % len(CLASSES)],
            chance=chance,
            loop=loop,
            faults=faults,
            path=directory / "store.db",
        )
        try:
            loop.run_until_complete(run.run(orders))
        finally:
            run.close()
            _end_all(loop)
            loop.close()
    return run.outcome()


class Simulation:
    def __init__(
        self,
        *,
        seed: int,
        class_name: ClassName,
        chance: random.Random,
        loop: SimulationLoop,
        faults: StoreFaults,
        path: Path,
    ) -> None:
        self.seed = seed
        self.class_name = class_name
        self._chance = chance
        self._loop = loop
        self._faults = faults
        self._path = path
        self._digest = hashlib.sha256()
        self._lines: list[str] = []
        self._violation: str | None = None
        self._counts: Counter[str] = Counter()
        self._states: Counter[PaymentState] = Counter()
        self.clock = SimulatedClock(loop)
        self.judge = Judge(path, object_to=self._object)
        self.bank = Bank(
            class_name=class_name,
            loop=loop,
            chance=chance,
            on_receipt=self.judge.on_receipt,
            on_execution=self.judge.on_execution,
        )
        self.network = Network(bank=self.bank, class_name=class_name, loop=loop, chance=chance, notice=self.note)
        self._keys = SoftwareKeys()
        self._hsm = _hsm(faults)
        self._signer = HsmCheckpointSigner(hsm=self._hsm)
        self._connectors = {PROVIDER: _connector(_DESCRIPTORS[class_name])}
        self._store: SqliteStore | None = None
        self._slots: list[Sidecar | None] = [None] * chance.choice((1, 2, 2))
        self._started = 0
        self._strike_rate = chance.choice((0.0, 0.002, 0.006))
        self._may_crash = True
        self._suspended_until = 0.0
        self._consents: list[Consent] = []
        self._orders: list[Order] = []
        self._applications: list[asyncio.Task[None]] = []
        self._closing = False

    # -- what the run leaves

    def note(self, line: str) -> None:
        line = f"{self._loop.time():.6f} {line}"
        self._digest.update(line.encode() + b"\n")
        self._lines.append(line)

    def _object(self, what: str) -> None:
        self.note(f"VIOLATION {what}")
        self._violation = self._violation or what

    def outcome(self) -> Outcome:
        return Outcome(
            seed=self.seed,
            class_name=self.class_name,
            states=self._states,
            faults=self._counts + Counter(self._faults.counts),
            digest=self._digest.hexdigest(),
            virtual_seconds=self._loop.time(),
            lines=tuple(self._lines),
        )

    def close(self) -> None:
        self.judge.close()
        for sidecar in self._slots:
            if sidecar:
                sidecar.process.die(sidecar.core.tasks._tasks)
        self._abandon_store()

    def _check(self) -> None:
        if self._violation is not None:
            story = "\n  ".join(self._lines[-_LINES_KEPT:])
            again = f"make simulate SEED={self.seed} CLASS={self.class_name}"
            raise Violation(f"{self._violation}\nplay it again with: {again}\n  {story}")

    # -- the run

    async def run(self, orders: int) -> None:
        for slot in range(len(self._slots)):
            self._boot(slot)
        await self._until_ready()
        for number in range(6):
            self._consents.append(await self._consent(_CALLERS[number % len(_CALLERS)]))
        self._faults.rate = self._chance.choice((0.0, 0.005, 0.02))
        self.note(f"begins: class {self.class_name}, {len(self._slots)} sidecars, faults {self._faults.rate}")
        while len(self._orders) < orders:
            self._place_orders()
            await asyncio.sleep(2.0 * self._chance.random())
            if self._loop.time() >= self._suspended_until:
                self._something_happens()
            elif self._chance.random() < 0.3:  # nothing happens until it goes on, but for what others do
                await asyncio.sleep(self._suspended_until - self._loop.time())
            self._check()
        await self._come_to_an_end()

    def _place_orders(self) -> None:
        for _ in range(self._chance.randrange(1, 6)):
            consent = self._chance.choice(self._consents)
            identifier = None
            if self._orders and self._chance.random() < 0.1:  # another caller happens to choose the same request id
                identifier = self._chance.choice(self._orders).request.request_id
            order = self._order(consent, identifier)
            if all(order.key != placed.key for placed in self._orders):
                self._orders.append(order)
                self._apply(order)
        for order in self._chance.sample(self._orders, min(2, len(self._orders))):
            self._apply(order)

    def _order(self, consent: Consent, identifier: RequestId | None) -> Order:
        end_to_end_id = f"ORDER-{len(self._orders)}"
        request = payment_request(consent, request_id=identifier or request_id(), end_to_end_id=end_to_end_id)
        return Order(caller=_caller(consent.caller), request=request)

    def _apply(self, order: Order) -> None:
        self._applications.append(asyncio.ensure_future(self._pay(order)))

    def _something_happens(self) -> None:
        dice = self._chance.random()
        if dice < 0.12:
            self._pause_one()
        elif dice < 0.17 and self._may_crash:
            self._kill_one()
        elif dice < 0.19 and self._may_crash:
            self._restart_machine()
        elif dice < 0.24:
            self._set_wall_clock()
        elif dice < 0.26 and len(self._consents) > 3:
            self._applications.append(asyncio.ensure_future(self._revoke_one()))
        elif dice < 0.29:
            self._suspend()
        if self._chance.random() < 0.4:
            self._wake()

    # -- what happens to sidecars

    def _boot(self, slot: int) -> None:
        try:
            self._store = self._store or open_store(
                self._path, signer=self._signer, clock=self.clock, faults=self._faults
            )
        except StoreRefused:  # a commit failed: the process ends, and the next one tries again
            self._loop.call_later(1.0, self._boot_if_empty, slot)
            return
        self._started += 1
        process = Process(f"sidecar-{self._started}", strike=self._strikes, chance=self._chance)
        egress = SimulatedEgress(
            network=self.network,
            clock=self.clock,
            faults=self._faults,
            cluster=CLUSTER,
            origins={API: PROVIDER, TOKENS: PROVIDER},
            keys=self._keys,
        )
        core = Core(
            store=Port(self._store, process),  # type: ignore[arg-type]
            egress=Port(egress, process),  # type: ignore[arg-type]
            hsm=Port(self._hsm, process),  # type: ignore[arg-type]
            clock=Port(self.clock, process),  # type: ignore[arg-type]
            connectors=dict(self._connectors),
            instance=process.name,
        )
        sidecar = Sidecar(process=process, core=core)
        self._slots[slot] = sidecar
        self.note(f"{process.name} starts")
        process.start(self._serve(sidecar))

    async def _serve(self, sidecar: Sidecar) -> None:
        """As wiring starts it: first the entry that begins its part of the log, then the background work."""
        while not sidecar.ready:
            try:
                await sidecar.core.store.record([draft(AuditEvent.SIDECAR_STARTED)])
                sidecar.ready = True
            except Unavailable:
                await sidecar.core.clock.sleep(0.1)
        for begin_after_seconds in (0.0, 0.5):
            sidecar.process.start(self._every(sidecar, sidecar.core.reconciler.run_due, begin_after_seconds))
        sidecar.process.start(self._every(sidecar, sidecar.core.store.sign_pending, 0.25))

    async def _every(self, sidecar: Sidecar, work: Any, begin_after_seconds: float) -> None:
        await sidecar.core.clock.sleep(begin_after_seconds)
        while True:
            try:
                await work()
            except CustodyError as error:
                self._hear_error(error, "background")
            except Exception as error:  # noqa: BLE001 - a defect in the background must not look like silence
                self._object(f"background work failed with {error!r}")
            await sidecar.core.clock.sleep(1.0)

    def _strikes(self, process: Process) -> bool:
        """Whether this process dies at this very call. It may also stand still here, alone or with all others."""
        if not self._may_crash or self._chance.random() >= self._strike_rate:
            return False
        sidecar = next((sidecar for sidecar in self._slots if sidecar and sidecar.process is process), None)
        if sidecar is None or not sidecar.ready or process.stands_still:
            return False
        if self._chance.random() < 0.4:
            self._counts["died at a call"] += 1
            self._die(sidecar)
            return True
        if self._chance.random() < 0.2:
            self._suspend()
        else:
            self._counts["stood still at a call"] += 1
            self.note(f"{process.name} stands still")
            process.pause()
            self._loop.call_later(self._chance.choice((5.0, 20.0, 90.0)), process.go_on)
        return False

    def _kill_one(self) -> None:
        running = self._running()
        if running:
            self._counts["killed"] += 1
            self._die(self._chance.choice(running))

    def _die(self, sidecar: Sidecar) -> None:
        slot = self._slots.index(sidecar)
        self.note(f"{sidecar.process.name} dies")
        sidecar.process.die(sidecar.core.tasks._tasks)
        self._slots[slot] = None
        if len(self._slots) == 1:
            self._abandon_store()
        self._loop.call_later(self._chance.choice((0.1, 2.0, 20.0)), self._boot_if_empty, slot)

    def _boot_if_empty(self, slot: int) -> None:
        left_seconds = self._suspended_until - self._loop.time()
        if left_seconds > 0:
            self._loop.call_later(left_seconds, self._boot_if_empty, slot)
        elif self._slots[slot] is None:
            self._boot(slot)

    def _abandon_store(self) -> None:
        if self._store is not None:
            abandon(self._store)
            self._store = None

    def _restart_machine(self) -> None:
        self._counts["machine restarted"] += 1
        self.note("the machine restarts")
        for sidecar in [sidecar for sidecar in self._slots if sidecar]:
            self._die(sidecar)
        self._abandon_store()
        self.clock.restart_machine()

    def _pause_one(self) -> None:
        running = self._running()
        if running:
            self._counts["stood still"] += 1
            chosen = self._chance.choice(running)
            self.note(f"{chosen.process.name} stands still")
            chosen.process.pause()

    def _suspend(self) -> None:
        """The machine is suspended for a while: all stand still."""
        if self._loop.time() < self._suspended_until:
            return
        seconds = _DAY_AND_AN_HOUR if self._chance.random() < 0.25 else self._chance.choice((5, 20, 90))
        self._counts[f"suspended for {seconds} s"] += 1
        self.note(f"the machine is suspended for {seconds} s")
        self._suspended_until = self._loop.time() + seconds
        for sidecar in self._slots:
            if sidecar:
                sidecar.process.suspend(True)
        self._loop.call_later(seconds, self._resume)

    def _wake(self) -> None:
        for sidecar in [sidecar for sidecar in self._slots if sidecar and sidecar.process.stands_still]:
            if self._chance.random() < 0.4:
                self.note(f"{sidecar.process.name} goes on")
                sidecar.process.go_on()

    def _resume(self) -> None:
        if self._loop.time() >= self._suspended_until - 0.001:
            self.note("the machine goes on")
            for sidecar in self._slots:
                if sidecar:
                    sidecar.process.suspend(False)

    def _set_wall_clock(self) -> None:
        """Never wrong by more than the margin of class A: that much is assumed (docs/reliability.md)."""
        before = self.clock.wall_offset_seconds
        self.clock.wall_offset_seconds = self._chance.choice((-10_800.0, -60.0, 0.0, 60.0, 10_800.0))
        self._counts["wall clock set"] += 1
        self.note(f"the wall clock is set from {before} to {self.clock.wall_offset_seconds}")

    def _running(self) -> list[Sidecar]:
        return [sidecar for sidecar in self._slots if sidecar and sidecar.ready and not sidecar.process.stands_still]

    async def _until_ready(self) -> None:
        while not all(sidecar and sidecar.ready for sidecar in self._slots):
            await asyncio.sleep(0.05)

    # -- the application

    async def _pay(self, order: Order) -> None:
        """Asks again with the same request id, at one sidecar or another, until it is told something; then looks again."""
        for _ in range(self._chance.randrange(1, 6)):
            if self._closing:
                return
            sidecar = await self._choose()
            if sidecar is None:
                continue
            request = order.request
            if self._chance.random() < 0.03:
                request = replace(request, creditor_name="Somebody Else")
            answer = await self._ask(sidecar, sidecar.core.payments.initiate(order.caller, request))
            if request is not order.request and not isinstance(answer, Payment):
                continue  # the same request id with another body: refused, or unavailable
            if isinstance(answer, Payment):
                self.judge.on_answer(order.key, answer)
                await asyncio.sleep(3 * self._chance.random())
                await self._look(order, answer)
            elif isinstance(answer, PreconditionFailed):
                self.judge.on_refusal(order.request.end_to_end_id)
                return

    async def _look(self, order: Order, payment: Payment) -> None:
        sidecar = await self._choose()
        if sidecar is None:
            return
        core = sidecar.core

        async def get() -> Payment:
            return await core.reconciler.latest(await core.payments.get(order.caller, payment.id, OWNER))

        answer = await self._ask(sidecar, get())
        if isinstance(answer, Payment):
            self.judge.on_answer(order.key, answer)

    async def _revoke_one(self) -> None:
        consent = self._consents.pop(self._chance.randrange(len(self._consents)))
        self._counts["revoked"] += 1
        self.note(f"revokes {consent.id}")
        identifier = request_id()
        for _ in range(5):
            sidecar = await self._choose()
            if sidecar is not None:
                revoke = sidecar.core.consents.revoke(_caller(consent.caller), consent.id, OWNER, identifier)
                if isinstance(await self._ask(sidecar, revoke), Consent):
                    return

    async def _choose(self) -> Sidecar | None:
        ready = [sidecar for sidecar in self._slots if sidecar and sidecar.ready]
        if not ready:
            await asyncio.sleep(1.0)
            return None
        return self._chance.choice(ready)

    async def _ask(self, sidecar: Sidecar, call: Coroutine[Any, Any, T]) -> T | CustodyError | None:
        """The answer of a call, or the error that it is told; None where it got none or may ask again. A caller that has waited
        long enough goes away, and its call is cancelled, as gRPC does."""
        task = sidecar.process.start(call)
        patience_seconds = self._chance.choice((0.03, 1.0, 15.0, 40.0))
        done, _ = await asyncio.wait({task}, timeout=patience_seconds)
        if not done:
            task.cancel()
            return None
        if task.cancelled():
            return None
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, Died):
            return None
        if not isinstance(error, CustodyError):
            self._object(f"a call failed with {error!r}")
            return None
        return self._hear_error(error, "call")

    def _hear_error(self, error: CustodyError, where: str) -> CustodyError | None:
        """None for what a caller repeats."""
        if isinstance(error, Unavailable):
            return None
        if not isinstance(error, PreconditionFailed | Conflict):
            self._object(f"a {where} failed with {type(error).__name__} {error!r} because of {error.__cause__!r}")
        return error

    # -- consents

    async def _consent(self, maker: WorkloadId) -> Consent:
        """An active consent with tokens that the bank knows."""
        assert self._store is not None
        now = self.clock.now()
        created = Consent(
            id=new_consent_id(now),
            caller=maker,
            owner=OwnerId(OWNER),
            provider=PROVIDER,
            purposes=frozenset({Purpose.PAYMENTS}),
            accounts=(AccountReference(iban=IBAN, currency_code="EUR"),),
            state=ConsentState.CREATED,
            subject_key=b"s" * 16,
            redirect_uri=REDIRECT_URI,
            create_time=now,
            expire_time=now.replace(year=now.year + 1),
        )
        claim = Claim(
            caller=maker, request_id=request_id(), method="CreateConsent", digest=b"d" * 32, resource=created.id
        )
        await self._store.claim_consent(created, claim, draft(AuditEvent.CONSENT_CREATED))
        at_bank = SecretContext(
            cluster=CLUSTER, owner=created.owner, consent=created.id, provider_origin=API, row_version=1
        )
        wrapped, _ = self._keys.create_data_key(replace(at_bank, provider_origin=""))
        access, _ = self.bank.mint()
        sealed = self._keys.seal(SecretKind.ACCESS_TOKEN, access.encode(), at_bank, wrapped_data_key=wrapped)
        active = created.to(
            ConsentState.ACTIVE,
            wrapped_data_key=wrapped,
            activate_time=now,
            access_issue_time=now,
            access_expire_time=created.expire_time,
        )
        change = SecretsChange(put=(sealed.secret,))
        await self._store.change_consent(active, secrets=change, audit=[draft(AuditEvent.CONSENT_ACTIVATED)])
        return active

    # -- the end

    async def _come_to_an_end(self) -> None:
        """Faults stop, everybody wakes up, and the background work goes on."""
        self._faults.rate = 0.0
        self.network.faulty = False
        self._may_crash = False
        self._closing = True
        await asyncio.sleep(max(0.0, self._suspended_until - self._loop.time()))
        self.bank.decide_all()
        for slot in range(len(self._slots)):
            self._boot_if_empty(slot)
        for sidecar in self._slots:
            if sidecar:
                sidecar.process.go_on()
        await self._until_ready()
        await asyncio.sleep(STALL_SECONDS)  # what had stalled by then goes on
        self.note("faults have stopped")
        await self._watch()
        await self._drain()
        await self._judge()

    async def _watch(self) -> None:
        """Limits of time: whoever could find out has found out, or has asked a human."""
        began = self._loop.time()
        unknown_since: dict[str, float] = {}
        while self._loop.time() < began + KNOWN_WITHIN_SECONDS:
            await asyncio.sleep(0.5)
            now, unknown = self._loop.time(), self.judge.unknown()
            reconciling = {payment for payment, state in unknown.items() if state == S.RECONCILING.value}
            unknown_since = {payment: unknown_since.get(payment, now) for payment in reconciling}
            if self.class_name == "C":
                for payment, since in unknown_since.items():
                    if now > since + FLAGGED_WITHIN_SECONDS:
                        self._object(f"{payment} of class C has asked no human for {now - since} s")
            self._check()
        for payment, state in self.judge.unknown().items():
            self._object(f"{payment} is still {state} {KNOWN_WITHIN_SECONDS} s after faults have stopped")
        self._check()

    async def _drain(self) -> None:
        """Calls and owned work end; then the network delivers what it still has, and what was recorded must hold all the same."""
        for application in self._applications:
            await application
        await asyncio.sleep(INTENT_SECONDS)  # an intent that nobody went on with is abandoned by then
        for sidecar in self._slots:
            assert sidecar is not None
            sidecar.process.die(sidecar.core.tasks._tasks)
        while self.network.under_way:
            await asyncio.sleep(60.0)

    async def _judge(self) -> None:
        assert self._store is not None
        payments: list[Payment] = []
        while page := await self._store.payments(PaymentFilter(), after=payments[-1].id if payments else "", limit=500):
            payments += page
        self.judge.judge_rows(payments)
        self._states = Counter(payment.state for payment in payments)
        for payment in payments:
            self.note(f"{payment.id} {payment.state.value} {payment.status_reason} epoch {payment.epoch}")
            if not payment.is_terminal and payment.state not in (S.ACCEPTED, S.NEEDS_ATTENTION):
                self._object(f"{payment.id} ends as {payment.state.value}")
        self._check()


def _end_all(loop: SimulationLoop) -> None:
    """Tasks of processes that are gone end without having done anything more."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))


@cache
def _connector(name: str) -> Connector:
    return connector(name)


@cache
def _caller(name: WorkloadId) -> Caller:
    return caller(name)


def _hsm(faults: StoreFaults) -> SimulatedHsm:
    return SimulatedHsm(faults=faults, purposes=frozenset({KeyPurpose.AUDIT, KeyPurpose.CLIENT_AUTHENTICATION}))
