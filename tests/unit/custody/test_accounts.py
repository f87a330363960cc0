"""Account reads: on record before the call, repeated once with a renewed token, and nothing that the consent does not name."""

import base64
from dataclasses import replace
from datetime import date
from typing import Any

import pytest

from sidecar.custody.accounts import AccountRead, TransactionQuery
from sidecar.domain.account import BookingStatus, PsuContext
from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import Consent, ConsentState, Purpose
from sidecar.domain.money import Money
from sidecar.domain.provider import NotSent, Unknown
from sidecar.errors import CustodyError, Exhausted, InvalidField, NotFound, PreconditionFailed, Unavailable
from tests.fakes.bank import IBAN, answer, error
from tests.unit.custody.support import OWNER, World, caller

BOTH = TransactionQuery(booking_status=BookingStatus.BOTH)


def read(consent: Consent, account: str = "acc-1") -> AccountRead:
    return AccountRead(consent=consent.id, owner=OWNER, account=account)


async def test_accounts_are_those_that_the_consent_names() -> None:
    """The bank shows two, the consent names one; a consent that names none shows all."""
    world = World()
    named, open_ = await world.consent(), await world.consent(accounts=())

    assert [one.iban for one in await world.core.accounts.list_accounts(caller(), read(named))] == [IBAN]
    assert len(await world.core.accounts.list_accounts(caller(), read(open_))) == 2


async def test_balances_are_exact() -> None:
    """Signed, in minor units."""
    world = World()

    (balance,) = await world.core.accounts.list_balances(caller(), read(await world.consent()))

    assert balance.amount == Money(currency_code="EUR", minor_units=-1250)


async def test_the_use_of_the_token_is_on_record_before_the_bank_is_asked() -> None:
    """No entry, no act: while the log cannot be written, nothing is read."""
    world = World()
    consent = await world.consent()
    seen = []

    async def look() -> None:
        seen.append(world.events()[-1])

    world.core.egress.gates["call"] = look
    await world.core.accounts.list_balances(caller(), read(consent))
    world.store.failures.append(Unavailable("AUDIT_UNAVAILABLE", "away"))
    with pytest.raises(Unavailable):
        await world.core.accounts.list_balances(caller(), read(consent))

    assert seen == [AuditEvent.TOKEN_USE]
    assert world.bank.count("balances") == 1


async def test_an_expired_token_is_renewed_once_and_the_read_repeated() -> None:
    """G10: TOKEN_EXPIRED, a refresh, and the answer."""
    world = World()
    consent = await world.consent()
    world.bank.expire_tokens()

    assert len(await world.core.accounts.list_balances(caller(), read(consent))) == 1
    assert (world.bank.refreshes, world.bank.count("balances")) == (1, 2)


async def test_bi_g10_a_token_that_is_expired_for_ever_is_not_renewed_for_ever() -> None:
    """G10: two reads and one refresh; then the caller is told to try later."""
    world = World()
    consent = await world.consent()
    world.bank.script["balances"] = [error(401, "TOKEN_EXPIRED")] * 9

    with pytest.raises(Unavailable):
        await world.core.accounts.list_balances(caller(), read(consent))

    assert (world.bank.refreshes, world.bank.count("balances")) == (1, 2)


async def test_a_consent_that_the_bank_has_ended_needs_the_owner_again() -> None:
    """G11: said so to this caller, stored, and further calls do not ask the bank."""
    world = World()
    consent = await world.consent()
    world.bank.script["balances"] = [error(401, "CONSENT_EXPIRED")]

    for _ in range(2):
        with pytest.raises(PreconditionFailed) as ended:
            await world.core.accounts.list_balances(caller(), read(consent))
        assert ended.value.reason == "CONSENT_NEEDS_REAUTHORISATION"

    assert (await world.stored(consent)).state is ConsentState.NEEDS_REAUTHORISATION
    assert world.bank.count("balances") == 1


async def test_an_answer_to_another_request_ends_no_consent() -> None:
    """G19: an error that echoes another X-Request-ID is somebody else's."""
    world = World()
    consent = await world.consent()
    foreign = error(401, "CONSENT_EXPIRED")
    other = (*foreign.headers, ("x-request-id", "00000000-0000-4000-8000-000000000000"))
    world.bank.script["balances"] = [lambda _: replace(foreign, headers=other)]

    with pytest.raises(Unavailable):
        await world.core.accounts.list_balances(caller(), read(consent))

    assert (await world.stored(consent)).state is ConsentState.ACTIVE


@pytest.mark.parametrize(
    ("trouble", "kind", "reason"),
    [
        (NotSent(code="CONNECT_FAILED"), Unavailable, "PROVIDER_UNAVAILABLE"),
        (Unknown(code="ANSWER_TIMEOUT"), Unavailable, "PROVIDER_UNAVAILABLE"),
        (error(429, "ACCESS_EXCEEDED"), Exhausted, "RATE_LIMITED"),
        (error(404, "RESOURCE_UNKNOWN"), NotFound, "ACCOUNT_NOT_FOUND"),
        (error(403, "SERVICE_BLOCKED"), PreconditionFailed, "PROVIDER_REFUSED"),
        (error(500, "X_Y"), Unavailable, "PROVIDER_UNAVAILABLE"),
        (answer(200, {"balances": "none"}), Unavailable, "PROVIDER_ANSWER_INVALID"),
        (answer(302, {}), Unavailable, "PROVIDER_ANSWER_INVALID"),
    ],
)
async def test_each_trouble_of_the_bank_has_its_reason(trouble: object, kind: type[CustodyError], reason: str) -> None:
    """And none ends the consent."""
    world = World()
    consent = await world.consent()
    world.bank.script["balances"] = [trouble]  # type: ignore[list-item]

    with pytest.raises(kind) as told:
        await world.core.accounts.list_balances(caller(), read(consent))

    assert told.value.reason == reason
    assert (await world.stored(consent)).state is ConsentState.ACTIVE


async def test_pages_of_transactions_go_on_with_the_token_of_the_page_before() -> None:
    """The bank's own query, also with characters such as ':'; at the end there is no token."""
    world = World()
    consent = await world.consent()

    first, token = await world.core.accounts.list_transactions(caller(), read(consent), BOTH)
    query = TransactionQuery(booking_status=BookingStatus.BOTH, page_token=token)
    second, end = await world.core.accounts.list_transactions(caller(), read(consent), query)

    assert (len(first.transactions), len(second.transactions), end) == (1, 1, "")
    assert world.bank.requests[-1].target.endswith("/accounts/acc-1/transactions?bookingStatus=both&pageId=a:2")


async def test_without_dates_as_far_back_as_the_provider_goes() -> None:
    """history_days of the descriptor; named dates go as they are."""
    world = World()
    consent = await world.consent()
    await world.core.accounts.list_transactions(caller(), read(consent), BOTH)
    named = TransactionQuery(booking_status=BookingStatus.BOOKED, date_from=date(2026, 1, 2), date_to=date(2026, 2, 3))
    await world.core.accounts.list_transactions(caller(), read(consent), named)

    targets = [asked.target.partition("?")[2] for asked in world.bank.requests]
    assert targets == [
        "bookingStatus=both&dateFrom=2026-08-25",
        "bookingStatus=booked&dateFrom=2026-01-02&dateTo=2026-02-03",
    ]


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "%%%",
        "ä",
        base64.urlsafe_b64encode(b"a b").decode(),
        base64.urlsafe_b64encode(b"a\r\nb").decode(),
        base64.urlsafe_b64encode(b"a#b").decode(),
        base64.urlsafe_b64encode("ä".encode()).decode(),
        base64.urlsafe_b64encode(b"a" * 1025).decode(),
        base64.b64encode(b"\xff\xfe").decode(),
    ],
)
async def test_bi_d25_a_page_token_of_another_form_is_refused(token: str) -> None:
    """D25: nothing is asked of the bank."""
    world = World()
    consent = await world.consent()
    query = TransactionQuery(booking_status=BookingStatus.BOTH, page_token=token)

    with pytest.raises(InvalidField) as refused:
        await world.core.accounts.list_transactions(caller(), read(consent), query)

    assert refused.value.violations[0].field == "page_token"
    assert not world.bank.requests


async def test_a_made_up_page_token_names_nothing_but_a_query_of_the_same_account() -> None:
    """It cannot lead to another account, path or host."""
    world = World()
    consent = await world.consent()
    made_up = base64.urlsafe_b64encode(b"../../acc-2/transactions?x=https://evil.example/").decode()
    query = TransactionQuery(booking_status=BookingStatus.BOTH, page_token=made_up)

    await world.core.accounts.list_transactions(caller(), read(consent), query)

    (asked,) = world.bank.requests
    assert asked.origin == "https://api.bank.example:443"
    assert asked.target.partition("?")[0] == "/v1/accounts/acc-1/transactions"


@pytest.mark.parametrize(
    ("consent_changes", "policy", "reason"),
    [
        ({"purposes": frozenset({Purpose.PAYMENTS})}, {}, "PURPOSE_NOT_CONSENTED"),
        ({}, {"purposes": frozenset({Purpose.PAYMENTS})}, "POLICY_REFUSED"),
        ({}, {"providers": frozenset()}, "CONSENT_NOT_FOUND"),
        ({"owner": "owner-2"}, {}, "CONSENT_NOT_FOUND"),
        ({"caller": "workload:other"}, {}, "CONSENT_NOT_FOUND"),
    ],
)
async def test_each_read_needs_its_purpose_in_policy_and_consent(
    consent_changes: dict[str, Any], policy: dict[str, Any], reason: str
) -> None:
    """The three reads alike; the bank is not asked."""
    world = World()
    consent = await world.consent(**consent_changes)
    accounts = world.core.accounts
    for call in (
        accounts.list_accounts(caller(**policy), read(consent)),
        accounts.list_balances(caller(**policy), read(consent)),
        accounts.list_transactions(caller(**policy), read(consent), BOTH),
    ):
        with pytest.raises(CustodyError) as refused:
            await call
        assert refused.value.reason == reason
    assert not world.bank.requests


async def test_the_person_s_presence_reaches_the_bank() -> None:
    """With a person PSU-IP-Address is sent, without one it is not: banks count those reads."""
    world = World()
    consent = await world.consent()
    with_person = AccountRead(
        consent=consent.id, owner=OWNER, account="acc-1", psu=PsuContext(ip_address="198.51.100.7")
    )

    await world.core.accounts.list_balances(caller(), with_person)
    await world.core.accounts.list_balances(caller(), read(consent))

    assert [asked.headers.get("psu-ip-address") for asked in world.bank.requests] == ["198.51.100.7", None]
