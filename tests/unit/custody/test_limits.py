"""Periodic limits of a consent and of a caller, as a payment meets them (C13, C14)."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from sidecar.custody.payments import INTENT_SECONDS, InitiatePayment
from sidecar.domain.caller import Caller
from sidecar.domain.ids import WorkloadId
from sidecar.domain.limits import PeriodAlignment, PeriodicLimit, PeriodType
from sidecar.domain.money import Money
from sidecar.domain.payment import Payment, PaymentState
from sidecar.domain.provider import Unknown
from sidecar.errors import Conflict, CustodyError, InvalidField, Refused, Unavailable
from tests.fakes.bank import error
from tests.unit.custody.support import World, caller, create_request, payment_request

S = PaymentState


def euros(amount: float) -> Money:
    return Money(currency_code="EUR", minor_units=round(amount * 100))


def limit(
    amount: float,
    period_type: PeriodType = PeriodType.MONTH,
    alignment: PeriodAlignment = PeriodAlignment.CALENDAR,
) -> PeriodicLimit:
    return PeriodicLimit(amount=euros(amount), period_type=period_type, alignment=alignment)


async def pay(world: World, request: InitiatePayment, by: Caller | None = None) -> Payment:
    return await world.core.payments.initiate(by or caller(), request)


async def test_bi_c13_the_limit_of_a_period_is_reached_and_not_exceeded() -> None:
    """C13: payments of one month up to the limit, to the cent; the next cent is refused, and nothing of it is written."""
    world = World()
    consent = await world.consent(periodic_limits=(limit(20),))
    await pay(world, payment_request(consent, amount=euros(12.5)))
    entries = len(world.events())
    request = payment_request(consent, amount=euros(7.51))

    with pytest.raises(Refused) as refused:
        await pay(world, request)

    assert refused.value.reason == "LIMIT_EXCEEDED"
    assert refused.value.metadata["periodType"] == "MONTH"
    assert len(world.events()) == entries
    assert await world.store.claim(caller().workload, request.request_id) is None
    fits = await pay(world, replace(request, amount=euros(7.5)))  # the request id was not used up
    assert fits.state is S.SETTLED
    assert sum(world.bank.executed.values()) == 2


@pytest.mark.parametrize("scope", ["consent", "caller"])
async def test_bi_c14_of_calls_at_once_no_more_than_fit_are_made(scope: str) -> None:
    """C14, R5: thirty calls on one consent, or on two, from two sidecars: exactly those that fit into the sum are paid."""
    world = World()
    limits = (limit(50),)
    consents = [await world.consent(periodic_limits=limits if scope == "consent" else ()) for _ in range(2)]
    by = caller(periodic_limits=limits if scope == "caller" else ())
    first = world.core
    second = world.start("two")
    requests = [
        payment_request(consents[0 if scope == "consent" else number % 2], amount=euros(10)) for number in range(30)
    ]

    outcomes = await asyncio.gather(
        *((first, second)[number % 2].payments.initiate(by, request) for number, request in enumerate(requests)),
        return_exceptions=True,
    )

    refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
    assert len(refused) == 25
    assert {outcome.metadata["limitScope"] for outcome in refused} == {scope}
    assert all(isinstance(outcome, Payment) for outcome in outcomes if outcome not in refused)
    assert sum(world.bank.executed.values()) == 5


async def test_each_consent_has_its_own_sum() -> None:
    """Two consents of one person, with the same limits: what the one has used up the other still has."""
    world = World()
    one, other = [await world.consent(periodic_limits=(limit(10),)) for _ in range(2)]
    await pay(world, payment_request(one, amount=euros(10)))

    assert (await pay(world, payment_request(other, amount=euros(10)))).state is S.SETTLED


async def test_the_next_period_has_its_own_sum() -> None:
    """When the day is over, the whole of it is there again; the week goes on counting."""
    world = World()
    consent = await world.consent(
        periodic_limits=(limit(10, PeriodType.DAY, PeriodAlignment.CONSENT), limit(20, PeriodType.YEAR))
    )
    await pay(world, payment_request(consent, amount=euros(10)))
    with pytest.raises(Refused):
        await pay(world, payment_request(consent, amount=euros(0.01)))

    world.clock.advance(86_400)
    await pay(world, payment_request(consent, amount=euros(9.99)))
    with pytest.raises(Refused) as refused:
        await pay(world, payment_request(consent, amount=euros(0.02)))

    assert refused.value.metadata["periodType"] == "DAY"


async def test_a_repeat_counts_once() -> None:
    """The same request id, however often, takes its amount once."""
    world = World()
    consent = await world.consent(periodic_limits=(limit(20),))
    request = payment_request(consent, amount=euros(12))

    for _ in range(5):
        await pay(world, request)

    assert (await pay(world, payment_request(consent, amount=euros(8)))).state is S.SETTLED


async def test_what_the_bank_rejects_is_free_again() -> None:
    """A definite refusal gives the amount back."""
    world = World()
    consent = await world.consent(periodic_limits=(limit(10),))
    world.bank.script["initiate"] = [error(400, "FORMAT_ERROR")]
    rejected = await pay(world, payment_request(consent, amount=euros(10)))

    again = await pay(world, payment_request(consent, amount=euros(10)))

    assert (rejected.state, again.state) == (S.REJECTED, S.SETTLED)


async def test_what_was_never_sent_is_free_again_when_it_is_given_up() -> None:
    """While the intent can still be taken up it counts; abandoned, it does not."""
    world = World()
    consent = await world.consent(periodic_limits=(limit(10),))
    world.core.egress.trouble["prepare"] = [Unavailable("PROVIDER_UNAVAILABLE", "away")]
    with pytest.raises(Unavailable):
        await pay(world, payment_request(consent, amount=euros(10)))
    with pytest.raises(Refused):
        await pay(world, payment_request(consent, amount=euros(10)))

    world.clock.advance(INTENT_SECONDS + 1)
    await world.core.reconciler.run_due()

    assert (await pay(world, payment_request(consent, amount=euros(10)))).state is S.SETTLED


async def test_an_unknown_outcome_counts_for_as_long_as_it_is_unknown() -> None:
    """Unknown is not rejected: the money may have moved, so the limit is not given back, also not for a person to find out."""
    world = World()
    consent = await world.consent(periodic_limits=(limit(10),))
    world.bank.script["initiate"] = [Unknown(code="TIMED_OUT")]
    unknown = await pay(world, payment_request(consent, amount=euros(10)))
    with pytest.raises(Refused):
        await pay(world, payment_request(consent, amount=euros(0.01)))
    world.clock.advance(60)
    await world.core.reconciler.run_due()

    assert (await world.stored(unknown)).state is S.NEEDS_ATTENTION
    with pytest.raises(Refused):
        await pay(world, payment_request(consent, amount=euros(0.01)))


async def test_a_limit_of_the_policy_counts_over_all_consents_and_no_other_caller() -> None:
    """Two consents of one workload share its sum; another workload has its own."""
    world = World()
    mine = [await world.consent() for _ in range(2)]
    other = WorkloadId("workload:other")
    theirs = await world.consent(caller=other)
    limits = (limit(20), PeriodicLimit(amount=replace(euros(1), currency_code="GBP"), period_type=PeriodType.DAY))
    by = caller(periodic_limits=limits)
    await pay(world, payment_request(mine[0], amount=euros(15)), by)

    with pytest.raises(Refused) as refused:
        await pay(world, payment_request(mine[1], amount=euros(5.01)), by)

    assert refused.value.metadata["limitScope"] == "caller"
    await pay(world, payment_request(mine[1], amount=euros(5)), by)
    await pay(world, payment_request(theirs, amount=euros(20)), caller(other, periodic_limits=limits))


async def test_all_limits_or_none() -> None:
    """Where the second limit has no room, the first has lost none: a smaller payment still has all of it."""
    world = World()
    consent = await world.consent(periodic_limits=(limit(10, PeriodType.DAY), limit(100, PeriodType.YEAR)))
    by = caller(periodic_limits=(limit(8),))
    for _ in range(3):
        with pytest.raises(Refused):
            await pay(world, payment_request(consent, amount=euros(9)), by)

    assert (await pay(world, payment_request(consent, amount=euros(8)), by)).state is S.SETTLED
    assert (await pay(world, payment_request(consent, amount=euros(2)))).state is S.SETTLED


async def test_a_limit_in_another_currency_allows_nothing() -> None:
    """What cannot be compared is refused."""
    world = World()
    pounds = PeriodicLimit(amount=Money(currency_code="GBP", minor_units=10_000), period_type=PeriodType.MONTH)
    consent = await world.consent(periodic_limits=(pounds,))

    with pytest.raises(Refused) as refused:
        await pay(world, payment_request(consent))

    assert refused.value.reason == "LIMIT_EXCEEDED"


async def test_a_consent_is_created_with_its_periodic_limits() -> None:
    """They are stored with it, and are part of what a request id stands for."""
    world = World()
    limits = (limit(10, PeriodType.DAY), limit(100, PeriodType.DAY, PeriodAlignment.CONSENT))
    request = create_request(world, periodic_limits=limits)

    made = await world.core.consents.create(caller(), request)

    assert (await world.stored(made)).periodic_limits == limits
    assert (await world.core.consents.create(caller(), request)).id == made.id
    for others in ((), limits[:1], limits[::-1], (limit(10.01, PeriodType.DAY), limits[1])):
        with pytest.raises(Conflict):
            await world.core.consents.create(caller(), replace(request, periodic_limits=others))


@pytest.mark.parametrize(
    ("limits", "single", "field", "rule"),
    [
        ((limit(10), limit(20)), None, "periodic_limits[1]", "unique"),
        (
            (limit(10),),
            Money(currency_code="GBP", minor_units=1),
            "periodic_limits[0].amount.currency_code",
            "currency",
        ),
    ],
)
async def test_limits_that_contradict_each_other_make_no_consent(
    limits: tuple[PeriodicLimit, ...], single: Money | None, field: str, rule: str
) -> None:
    """Refused by field and rule before anything is written or asked."""
    world = World()
    request = create_request(world, periodic_limits=limits, payment_limit=single)

    with pytest.raises(InvalidField) as refused:
        await world.core.consents.create(caller(), request)

    assert [(each.field, each.rule) for each in refused.value.violations] == [(field, rule)]
    assert world.events() == []


async def test_a_month_of_a_consent_begins_on_its_own_day() -> None:
    """Aligned to the consent, the sum begins anew a month after the day of its creation, not on the first."""
    world = World()
    consent = await world.consent(periodic_limits=(limit(10, PeriodType.MONTH, PeriodAlignment.CONSENT),))
    await pay(world, payment_request(consent, amount=euros(10)))

    with pytest.raises(CustodyError) as refused:
        await pay(world, payment_request(consent, amount=euros(1)))

    ends = refused.value.metadata["periodEndTime"]
    assert ends.endswith("T00:00:00Z")
    assert int(ends[8:10]) == consent.create_time.day
    assert timedelta(0) < consent.reservations(euros(1), world.clock.now())[0].window.end - world.clock.now()
