"""Two sidecars on one PostgreSQL, and the last of a limit: READ COMMITTED, no lock but that of the row that is changed."""

import asyncio

from sidecar.domain.limits import CALENDAR_ANCHOR, PeriodicLimit, PeriodType, Reservation
from sidecar.domain.money import Money
from sidecar.domain.payment import PaymentState
from sidecar.errors import CustodyError, Refused
from tests.unit.store.postgresql import execute, new_database, opened
from tests.unit.store.support import NOW, active_consent, claim_of, draft, intent_draft, new_claim, new_payment


def reservation(scope: str, most: int) -> Reservation:
    limit = PeriodicLimit(amount=Money(currency_code="EUR", minor_units=most), period_type=PeriodType.DAY)
    return limit.reservation(Money(currency_code="EUR", minor_units=100), NOW, scope=scope, since=CALENDAR_ANCHOR)


def test_the_last_of_a_limit_between_two_sidecars() -> None:
    """R5: 80 payments from two sidecars, room for 30 in one limit and for 50 in the other, each group taking them in another
    order: 30 are claimed, all others are refused, and what one sidecar gives back the other can take."""

    async def run() -> None:
        database = new_database()
        async with opened(database, instance="one") as one, opened(database, instance="two") as two:
            consent = active_consent()
            await one.claim_consent(consent, new_claim(consent.id), draft())
            payments = [new_payment(consent) for _ in range(80)]

            async def claim(number: int) -> str:
                store, payment = (one, two)[number % 2], payments[number]
                scopes = [reservation("caller:shop", 5000), reservation(f"consent:{number % 3}", 1000)]
                try:
                    await store.claim_payment(payment, claim_of(payment), intent_draft(payment), reservations=scopes)
                except Refused:
                    return "refused"
                except CustodyError as error:
                    return error.reason
                return "claimed"

            outcomes = await asyncio.gather(*(claim(number) for number in range(80)))
            assert (outcomes.count("claimed"), outcomes.count("refused")) == (30, 50), outcomes
            rows = dict(execute(database, "SELECT scope, reserved FROM custody.limit_windows"))
            assert rows == {"caller:shop": 3000, "consent:0": 1000, "consent:1": 1000, "consent:2": 1000}
            kept = [payment for payment, outcome in zip(payments, outcomes, strict=True) if outcome == "claimed"]
            given_back = kept[0]
            abandoned = given_back.to(PaymentState.ABANDONED, now=NOW)

            async def abandon(store: object) -> object:
                return await store.change_payment(  # type: ignore[attr-defined]
                    abandoned, expected_states=frozenset({PaymentState.INTENT}), expected_epoch=1, audit=[draft()]
                )

            ended = await asyncio.gather(abandon(one), abandon(two), return_exceptions=True)
            assert ended.count(None) == 1
            assert dict(execute(database, "SELECT scope, reserved FROM custody.limit_windows"))["caller:shop"] == 2900

    asyncio.run(run())
