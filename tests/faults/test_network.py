"""fi_N8 to fi_N19: what network and bank do between two attempts. The bank's books are the judge of what was told."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sidecar.domain.payment import Payment, PaymentState
from sidecar.domain.provider import Answer, NotSent, ProviderRequest, SendOutcome, Unknown
from sidecar.errors import Unavailable
from tests.fakes.bank import ScriptedBank, error, lost
from tests.fakes.egress import BankRequest, SoftwareKeys
from tests.unit.custody.support import World, caller, payment_request
from tests.unit.egress.bank_server import BankServer, Exchange, http_answer
from tests.unit.egress.certificates import TestAuthority
from tests.unit.egress.process import running_egress, transport

S = PaymentState
A, C = "sandbox-bank-idempotent", "sandbox-bank"
HOUR = 3600.0
WINDOW_HOURS = 21  # window less margin, and one more


async def _pay(world: World, *, rounds: int = 12, seconds: float = 10) -> Payment:
    """A payment, and what is on record of it after so many rounds."""
    consent = await world.consent(life_seconds=1_000_000)
    with suppress(Unavailable):
        await world.core.payments.initiate(caller(), payment_request(consent))
    await _rounds(world, rounds, seconds)
    (payment,) = world.store._state.payments.values()
    return payment


async def _rounds(world: World, rounds: int, seconds: float) -> None:
    for _ in range(rounds):
        world.clock.advance(seconds)
        with suppress(Unavailable):
            await world.core.reconciler.run_due()


def _executed(world: World, payment: Payment) -> int:
    return world.bank.executed[payment.instruction.end_to_end_id]


@dataclass(slots=True, kw_only=True)
class Network:
    """Between egress and bank. `delayed_seconds`: the first initiation arrives so much later, and its answer never does."""

    world: World
    twice: bool = False
    delayed_seconds: float | None = None
    _late: list[tuple[float, BankRequest]] = field(default_factory=list)

    def __call__(self, request: BankRequest) -> SendOutcome:
        self._deliver()
        if ScriptedBank.kind(request) == "initiate" and self.delayed_seconds is not None:
            arrival = self._now() + self.delayed_seconds
            self._late.append((arrival, request))
            self.delayed_seconds = None
            return Unknown(code="DEADLINE_AFTER_SEND")
        if self.twice and ScriptedBank.kind(request) == "initiate":
            self.world.bank(request)
        return self.world.bank(request)

    def _now(self) -> float:
        return self.world.clock.boot_time_ns() / 1e9

    def _deliver(self) -> None:
        arrived = [entry for entry in self._late if entry[0] <= self._now()]
        self._late = [entry for entry in self._late if entry[0] > self._now()]
        for _, request in arrived:
            self.world.bank(request)

    def deliver_all(self) -> None:
        for _, request in self._late:
            self.world.bank(request)
        self._late = []


@pytest.mark.parametrize("late_seconds", [1, 60, 23 * HOUR])
@pytest.mark.parametrize("name", [A, C], ids=["class A", "class C"])
def test_a_request_that_arrives_later(name: str, late_seconds: float) -> None:
    """fi_N8, fi_N12: nobody was told "rejected" meanwhile. With a key the repeat is the same payment, whichever arrives first,
    as long as the bank keeps the key; a bank without keys never gets a second request."""

    async def run() -> None:
        world = World(name=name, token_seconds=None)
        network = Network(world=world, delayed_seconds=late_seconds)
        world.core.egress.bank = network
        payment = await _pay(world)
        before_it_arrives = payment.state
        world.clock.advance(late_seconds)
        network.deliver_all()
        await _rounds(world, 5, 10)
        payment = await world.stored(payment)

        assert before_it_arrives in ({S.SETTLED} if name == A else {S.NEEDS_ATTENTION})
        assert payment.state is before_it_arrives
        assert world.bank.count("initiate") == (2 if name == A else 1)
        assert _executed(world, payment) == 1

    asyncio.run(run())


def test_a_request_that_is_delivered_twice() -> None:
    """fi_N11: a proxy repeats it. A bank that keeps keys pays once, and the answer to either is the answer."""

    async def run() -> None:
        world = World(name=A, token_seconds=None)
        world.core.egress.bank = Network(world=world, twice=True)
        payment = await _pay(world)

        assert payment.state is S.SETTLED
        assert _executed(world, payment) == 1
        assert world.bank.count("initiate") == 2

    asyncio.run(run())


@pytest.mark.parametrize("repeat", [error(409, "RESOURCE_BLOCKED"), error(409, ""), error(400, "FORMAT_ERROR")])
def test_an_answer_that_is_lost_and_a_repeat_that_is_answered_otherwise(repeat: Answer) -> None:
    """fi_N10: the bank has executed and refuses the repeat, with 409 or with a code that would be a refusal of a first send: that
    settles nothing."""

    async def run() -> None:
        world = World(name=A, token_seconds=None)
        world.bank.script["initiate"] = [lost, *[repeat] * 10_000]
        payment = await _pay(world)
        while_open = payment.state
        await _rounds(world, WINDOW_HOURS, HOUR)
        payment = await world.stored(payment)

        assert while_open is S.RECONCILING
        assert payment.state is S.NEEDS_ATTENTION
        assert _executed(world, payment) == 1

    asyncio.run(run())


def test_a_refusal_that_the_bank_keeps_under_the_key() -> None:
    """fi_N14: the first request was refused and the answer lost; every repeat gets that refusal. A human is asked in the end; it
    is never told as rejected, because nobody can know that it was the first answer."""

    async def run() -> None:
        world = World(name=A, token_seconds=None)
        refusal = error(400, "PAYMENT_FAILED")
        world.bank.script["initiate"] = [Unknown(code="ANSWER_TRUNCATED"), *[refusal] * 10_000]
        payment = await _pay(world)
        await _rounds(world, WINDOW_HOURS, HOUR)
        payment = await world.stored(payment)

        assert payment.state is S.NEEDS_ATTENTION
        assert _executed(world, payment) == 0

    asyncio.run(run())


def test_two_nodes_of_the_bank_disagree_about_a_status() -> None:
    """fi_N15: one node does not know the payment yet and another has older news: it stays accepted until one says it is settled."""

    async def run() -> None:
        world = World(name=C, token_seconds=None, initial_status="ACTC")
        world.bank.script["status"] = [error(404, "RESOURCE_UNKNOWN"), _status("RCVD"), error(404, "RESOURCE_UNKNOWN")]
        payment = await _pay(world, rounds=1)
        seen = [payment.state]
        for _ in range(30):
            await _rounds(world, 1, 70)
            seen.append((await world.stored(payment)).state)
        for bank_payment in world.bank.payments.values():
            bank_payment.status = "ACSC"
        await _rounds(world, 3, 70)

        assert set(seen) == {S.ACCEPTED}
        assert (await world.stored(payment)).state is S.SETTLED
        assert world.bank.count("initiate") == 1

    asyncio.run(run())


def _status(code: str) -> Callable[[Answer], Answer]:
    def twist(answer: Answer) -> Answer:
        body = f'{{"transactionStatus":"{code}"}}'.encode()
        return Answer(status=200, headers=answer.headers, body=body)

    return twist


def test_too_many_requests_for_a_day() -> None:
    """fi_N18: each repeat is answered 429: it is never a refusal, the pauses grow, and when the window closes a human is asked."""

    async def run() -> None:
        world = World(name=A, token_seconds=None)
        world.bank.script["initiate"] = [error(429, "ACCESS_EXCEEDED")] * 100_000
        payment = await _pay(world, rounds=600, seconds=1)
        first_minutes = world.bank.count("initiate")
        await _rounds(world, WINDOW_HOURS * 60, 60)
        payment = await world.stored(payment)

        assert first_minutes <= 2 + 6 + 600 / 30  # an unknown outcome is asked for every half minute
        assert payment.state is S.NEEDS_ATTENTION
        assert _executed(world, payment) == 0

    asyncio.run(run())


# --- with the real egress: what changes between two attempts


def _keeps(exchange: Exchange) -> None:
    exchange.send(http_answer())
    exchange.keep = True


@pytest.mark.parametrize(
    ("change", "expected"),
    [("new key of the same CA", Answer), ("other CA", NotSent), ("expired", NotSent), ("other host", NotSent)],
    ids=["same_ca", "other_ca", "expired", "other_host"],
)
def test_the_banks_certificate_changes(tmp_path: Path, change: str, expected: type[SendOutcome]) -> None:
    """fi_N17, bi_G28: a renewed certificate of the pinned CA is taken; any other ends before a byte of the request is sent."""
    authority, other = TestAuthority(tmp_path), TestAuthority(tmp_path, name="other CA")
    hosts = ("127.0.0.1",)
    after = {
        "new key of the same CA": authority.issue("second", hosts=hosts),
        "other CA": other.issue("third", hosts=hosts),
        "expired": authority.issue("fourth", hosts=hosts, days=-1),
        "other host": authority.issue("fifth", hosts=("bank.example",)),
    }[change]

    async def run() -> None:
        with BankServer(certificate=authority.issue("first", hosts=hosts), script=_keeps) as bank:
            origin = bank.origin
            async with running_egress(
                transports=[transport(origin, authority.ca_file)], keys=SoftwareKeys(), folder=tmp_path
            ) as egress:
                read = ProviderRequest(method="GET", origin=origin, target="/", headers=())
                assert isinstance(await egress.link.call(read, deadline_seconds=5), Answer)
                bank.context.load_cert_chain(after.certificate_file, after.key_file)
                bank.requests.clear()

                outcome = await egress.link.call_once(read, deadline_seconds=5)

                assert isinstance(outcome, expected), outcome
                assert len(bank.requests) == (1 if expected is Answer else 0)
                assert egress.alive

    asyncio.run(run())


def test_the_banks_name_does_not_resolve(tmp_path: Path) -> None:
    """fi_N19, bi_G37: nothing was sent, and it is said so; `.invalid` has no addresses by its definition (RFC 2606)."""
    authority = TestAuthority(tmp_path)
    origin = "https://bank.invalid:443"

    async def run() -> None:
        async with running_egress(
            transports=[transport(origin, authority.ca_file)], keys=SoftwareKeys(), folder=tmp_path
        ) as egress:
            request = ProviderRequest(method="GET", origin=origin, target="/", headers=())

            outcome = await egress.link.call_once(request, deadline_seconds=10)

            assert isinstance(outcome, NotSent)
            assert outcome.code in ("NAME_NOT_RESOLVED", "CONNECT_TIMED_OUT")

    asyncio.run(run())


def test_a_peer_that_vanishes_after_the_handshake(tmp_path: Path) -> None:
    """fi_N8: half-open: it takes the request and says nothing more, not even that it is gone: unknown at the deadline."""
    authority = TestAuthority(tmp_path)

    async def run() -> None:
        def vanishes(exchange: Exchange) -> None:
            exchange.stopping.wait(8)

        certificate = authority.issue("bank", hosts=("127.0.0.1",))
        with BankServer(certificate=certificate, script=vanishes) as bank:
            async with running_egress(
                transports=[transport(bank.origin, authority.ca_file)], keys=SoftwareKeys(), folder=tmp_path
            ) as egress:
                request = ProviderRequest(method="GET", origin=bank.origin, target="/", headers=())
                loop = asyncio.get_running_loop()
                began = loop.time()

                outcome = await egress.link.call_once(request, deadline_seconds=1.0)

                assert outcome == Unknown(code="DEADLINE_AFTER_SEND")
                assert loop.time() - began < 5
                assert egress.alive

    asyncio.run(run())
