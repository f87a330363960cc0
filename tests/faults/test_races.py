"""fi_R1 to fi_R12: two to fifty sidecars on one store, at the same moment. Each has its own core; store and bank are one.

The order in which the loop runs them is shuffled by a seed: between any two awaits another sidecar may have its turn.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from sidecar.custody.payments import InitiatePayment
from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import Consent, ConsentState
from sidecar.domain.money import Money
from sidecar.domain.payment import Payment, PaymentState
from sidecar.errors import Conflict, CustodyError, PreconditionFailed, Unavailable
from tests.fakes.bank import lost
from tests.faults.extent import everything, seed
from tests.faults.front import run
from tests.unit.custody.support import OWNER, Core, World, caller, payment_request, request_id

Record = Callable[[str, object], None]
S = PaymentState
A, C = "sandbox-bank-idempotent", "sandbox-bank"
ROUNDS = 20


def _rounds() -> range:
    return range(20 * ROUNDS if everything() else ROUNDS)


def _sidecars(world: World, count: int, chance: random.Random) -> list[Core]:
    """So many of them, each of which lets the others go first at a random number of its awaits."""
    cores = [world.start(f"instance-{number}") for number in range(count)]

    async def dawdle() -> None:
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(0)

    for core in cores:
        core.egress.gates.update(dict.fromkeys(("prepare", "send", "request_tokens", "call"), dawdle))
    return cores


async def _paid(core: Core, request: InitiatePayment) -> Payment | CustodyError:
    try:
        return await core.payments.initiate(caller(), request)
    except CustodyError as error:
        return error


def _executed(world: World) -> int:
    return sum(world.bank.executed.values())


@pytest.mark.parametrize("count", [2, 100], ids=["R1_two", "R3_a_hundred"])
def test_one_request_id_at_the_same_moment(count: int, record_property: Record) -> None:
    """fi_R1, fi_R3: all are answered with the one payment, which is sent once; nobody is told that it has failed."""

    async def one(round_: int) -> None:
        chance = random.Random(f"{seed()} {round_}")
        world = World(name=A)
        cores = _sidecars(world, min(count, 5), chance)
        request = payment_request(await world.consent())

        answers = await asyncio.gather(*(_paid(cores[n % len(cores)], request) for n in range(count)))

        payments = [got for got in answers if isinstance(got, Payment)]
        assert all(isinstance(got, Payment | Unavailable) for got in answers), (round_, answers)
        assert len({payment.id for payment in payments}) == 1, round_
        assert {payment.state for payment in payments} <= {S.INTENT, S.DISPATCHED, S.SETTLED}, round_
        for _ in range(3):
            await _paid(cores[0], request)
        assert _executed(world) == world.bank.count("initiate") == 1, round_

    for round_ in _rounds():
        run(lambda round_=round_: one(round_))  # type: ignore[misc]
    record_property("injected", len(_rounds()))


def test_one_request_id_with_two_bodies_at_the_same_moment(record_property: Record) -> None:
    """fi_R2: one of them is the payment; the other is told that the request id is taken; one is sent."""

    async def one(round_: int) -> None:
        chance = random.Random(f"{seed()} {round_}")
        world = World()
        first, second = _sidecars(world, 2, chance)
        request = payment_request(await world.consent())
        other = replace(request, amount=Money(currency_code="EUR", minor_units=1))

        answers = await asyncio.gather(_paid(first, request), _paid(second, other))

        assert sorted(type(got).__name__ for got in answers) == ["Conflict", "Payment"], round_
        assert any(isinstance(got, Conflict) for got in answers)
        assert _executed(world) == 1, round_

    for round_ in _rounds():
        run(lambda round_=round_: one(round_))  # type: ignore[misc]
    record_property("injected", len(_rounds()))


@pytest.mark.parametrize("count", [2, 10, 50])
def test_refresh_by_many_sidecars(count: int, record_property: Record) -> None:
    """fi_R6: a strict provider sees one refresh, the consent stays active, and everybody has a token that works."""

    async def one(round_: int) -> None:
        chance = random.Random(f"{seed()} {round_}")
        world = World(token_seconds=1200)
        cores = _sidecars(world, count, chance)
        consent = await world.consent()
        world.clock.advance(700)

        got = await asyncio.gather(*(core.tokens.access(consent) for core in cores))

        assert len(got) == count
        assert world.bank.refreshes == 1, round_
        assert (await world.stored(consent)).state is ConsentState.ACTIVE, round_

    for round_ in _rounds():
        run(lambda round_=round_: one(round_))  # type: ignore[misc]
    record_property("injected", len(_rounds()))


def test_refresh_while_paying(record_property: Record) -> None:
    """fi_R7: payments and reads at two sidecars, all with a token that is due: one refresh, every payment made once."""

    async def one(round_: int) -> None:
        chance = random.Random(f"{seed()} {round_}")
        world = World(token_seconds=1200)
        cores = _sidecars(world, 2, chance)
        consent = await world.consent()
        world.clock.advance(700)
        requests = [payment_request(consent) for _ in range(6)]

        answers = await asyncio.gather(
            *(_paid(chance.choice(cores), request) for request in requests),
            *(core.tokens.access(consent) for core in cores),
        )

        assert all(not isinstance(got, CustodyError) for got in answers), (round_, answers)
        assert world.bank.refreshes == 1, round_
        assert set(world.bank.executed.values()) == {1}, round_
        assert _executed(world) == 6, round_

    for round_ in _rounds():
        run(lambda round_=round_: one(round_))  # type: ignore[misc]
    record_property("injected", len(_rounds()))


def test_revocation_while_paying_and_refreshing(record_property: Record) -> None:
    """fi_R8: no dispatch is recorded after the revocation; what was has its outcome; the consent stays revoked."""

    async def one(round_: int) -> None:
        chance = random.Random(f"{seed()} {round_}")
        world = World(name=C, token_seconds=1200)
        first, second = _sidecars(world, 2, chance)
        consent = await world.consent()
        world.clock.advance(700)

        async def revoke() -> None:
            for _ in range(chance.randrange(40)):
                await asyncio.sleep(0)
            await second.consents.revoke(caller(), consent.id, OWNER, request_id())

        answers = await asyncio.gather(*(_paid(first, payment_request(consent)) for _ in range(4)), revoke())

        late = await _paid(first, payment_request(consent))
        refused = [got for got in answers if isinstance(got, CustodyError)]
        assert all(isinstance(got, PreconditionFailed | Unavailable) for got in refused), (round_, refused)
        assert isinstance(late, PreconditionFailed), round_
        events = world.events()
        assert AuditEvent.PAYMENT_DISPATCHED not in events[events.index(AuditEvent.CONSENT_REVOKED) :], round_
        assert (await world.stored(consent)).state is ConsentState.REVOKED, round_
        await _judge(world, consent, round_)

    for round_ in _rounds():
        run(lambda round_=round_: one(round_))  # type: ignore[misc]
    record_property("injected", len(_rounds()))


async def _judge(world: World, consent: Consent, round_: int) -> None:
    """What is told of each payment fits the bank's books, after the background work has gone round."""
    for _ in range(12):
        world.clock.advance(10)
        await world.core.reconciler.run_due()
    for payment in world.store._state.payments.values():
        count = world.bank.executed[payment.instruction.end_to_end_id]
        story = (round_, payment.state, count)
        assert payment.consent == consent.id
        assert count <= 1, story
        assert payment.state in {S.SETTLED, S.ABANDONED, S.REJECTED, S.NEEDS_ATTENTION}, story
        assert payment.state is not S.SETTLED or count == 1, story
        assert payment.state not in (S.ABANDONED, S.REJECTED) or count == 0, story


def test_many_reconcilers(record_property: Record) -> None:
    """fi_R11: five sidecars find out the same payments at the same time: each repeat is one request, each payment is made once."""

    async def one(round_: int) -> None:
        chance = random.Random(f"{seed()} {round_}")
        world = World(name=A, token_seconds=None)
        cores = _sidecars(world, 5, chance)
        consent = await world.consent(life_seconds=100_000)
        world.bank.script["initiate"] = [lost] * 4
        for _ in range(4):
            await _paid(cores[0], payment_request(consent))
        world.clock.advance(2)

        await asyncio.gather(*(core.reconciler.run_due() for core in cores))

        assert world.bank.count("initiate") == 8, round_
        await _judge(world, consent, round_)
        assert _executed(world) == 4, round_

    for round_ in _rounds():
        run(lambda round_=round_: one(round_))  # type: ignore[misc]
    record_property("injected", len(_rounds()))
