# ruff: noqa: E501 (the table of cases: one line each)
"""bi_C1 to bi_C34: what is wrong with InitiatePayment, by the ids of the list. Refused before anything is written or sent, with the
field or the reason; what is no mistake is answered as the first call was."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from custody.v1 import payment_pb2
from custody.v1.account_reference_pb2 import AccountReference
from google.type.money_pb2 import Money

from sidecar.domain.consent import AccountReference as Reference
from sidecar.domain.consent import Consent, ConsentState, Purpose
from sidecar.domain.ids import ProviderId, WorkloadId
from sidecar.domain.money import Money as Amount
from sidecar.domain.provider import NotSent
from sidecar.errors import Unavailable
from tests.fakes.bank import IBAN, lost
from tests.faults.front import Front, Refusal, payment_message_for, run
from tests.unit.custody.support import CREDITOR, World, caller

P = payment_pb2.Payment
INSTANT = payment_pb2.PAYMENT_PRODUCT_INSTANT_SEPA_CREDIT_TRANSFER
OTHER_CREDITOR = "DE75512108001245126199"
Changes = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """One wrong request. `field` is what the answer must name, or `reason` what it must say; `consent` and `policy` are what the
    consent and the caller's policy have otherwise."""

    id: str
    changes: Changes = field(default_factory=dict)
    named: str = ""
    reason: str = "FIELD_INVALID"
    consent: Changes = field(default_factory=dict)
    policy: Changes = field(default_factory=dict)
    before: Callable[[World], None] | None = None
    appended: bytes = b""


def _money(currency: str = "EUR", units: int = 1, nanos: int = 0) -> Changes:
    return {"amount": Money(currency_code=currency, units=units, nanos=nanos)}


def _to(iban: str, currency: str = "") -> Changes:
    return {"creditor_account": AccountReference(iban=iban, currency_code=currency)}


def _rows(prefix: str, named: str, **cases: Changes) -> list[Wrong]:
    return [Wrong(id=f"{prefix}_{name}", changes=changes, named=named) for name, changes in cases.items()]


UUID = str(uuid4())
EUR = {"currency_code": "EUR"}

TABLE = [
    *_rows("bi_C1", "request_id", missing={"request_id": None}, empty={"request_id": ""}),
    *[Wrong(id=f"bi_C2_{n}_characters", changes={"request_id": "a" * n}, named="request_id") for n in (1, 40, 41, 255, 256, 10_000)],
    *_rows(
        "bi_C3", "request_id",
        upper_case={"request_id": UUID.upper()}, braces={"request_id": f"{{{UUID}}}"}, urn={"request_id": f"urn:uuid:{UUID}"},
        no_dashes={"request_id": UUID.replace("-", "")}, line={"request_id": UUID + "\n"}, nul={"request_id": UUID + "\0"},
        blank={"request_id": " " + UUID}, not_hexadecimal={"request_id": "g" + UUID[1:]}, version_1={"request_id": UUID[:14] + "1" + UUID[15:]},
        full_width={"request_id": "\uff11" + UUID[1:]}, path={"request_id": "../../../../../../../../../../../.."},
    ),
    *_rows(
        "bi_C11", "amount",
        missing={"amount": None}, zero=_money(units=0), negative=_money(units=-1), minus_a_cent=_money(units=0, nanos=-10_000_000),
        mixed_signs=_money(units=1, nanos=-10_000_000), too_many_nanos=_money(nanos=1_000_000_000), least=_money(units=-(2**63)),
        most=_money(units=2**63 - 1), thirty_digits=_money(units=10**14), a_nano=_money(nanos=1), half_a_thousandth=_money(nanos=500_000),
    ),
    Wrong(id="bi_C11_a_tenth_of_a_cent", changes=_money(nanos=1_000_000), named="amount.nanos"),
    Wrong(id="bi_C11_half_a_yen", changes=_money("JPY", nanos=500_000_000), named="amount.nanos"),
    *_rows(
        "bi_C12", "amount",
        lower_case=_money("eur"), empty=_money(""), long=_money("EURO"), short=_money("EU"), digits=_money("978"), line=_money("EUR\n"),
        full_width=_money("\uff25\uff35\uff32"), blank=_money("EU "),
    ),
    *[Wrong(id=f"bi_C12_{code}", changes=_money(code), named="amount.currency_code") for code in ("XXX", "DEM", "ZZZ", "GBP", "USD")],
    Wrong(id="bi_C13_a_cent_above_the_policy", changes=_money(units=10_000, nanos=10_000_000), reason="LIMIT_EXCEEDED"),
    Wrong(id="bi_C13_a_cent_above_the_consent", changes=_money(units=5, nanos=10_000_000), consent={"payment_limit": Amount(currency_code="EUR", minor_units=500)}, reason="LIMIT_EXCEEDED"),
    Wrong(id="bi_C13_limit_in_another_currency", changes=_money(), consent={"payment_limit": Amount(currency_code="GBP", minor_units=10**9)}, reason="LIMIT_EXCEEDED"),
    Wrong(id="bi_C13_no_limit_is_no_leave", changes=_money(), policy={"payment_limits": {}}, reason="LIMIT_EXCEEDED"),
    *_rows("bi_C15", "creditor_account", missing={"creditor_account": None}),
    *_rows(
        "bi_C15", "creditor_account.iban",
        check_digits=_to("DE03120300000000202051"), lower_case=_to(CREDITOR.lower()), blanks=_to("DE02 1203 0000 0000 2020 51"), blank_first=_to(" " + CREDITOR),
        line=_to(CREDITOR + "\n"), short=_to(CREDITOR[:-1]), long=_to(CREDITOR + "0"), characters_34=_to("DE" + "0" * 32), characters_35=_to("DE" + "0" * 33),
        no_such_country=_to("XX02120300000000202051"), full_width=_to("\uff24" + CREDITOR[1:]), empty=_to(""), sql=_to("' OR 1=1 --"), nul=_to(CREDITOR + "\0"),
    ),
    *_rows("bi_C16", "creditor_account.iban", sort_code=_to("20-00-00"), sort_code_and_number=_to("20000055779911"), leading_zeros=_to("00000012345678")),
    Wrong(id="bi_C17_to_the_account_that_pays", changes=_to(IBAN), named="creditor_account.iban"),
    Wrong(id="bi_C17_to_the_account_that_pays_by_name", changes={**_to(IBAN), "debtor_account": AccountReference(iban=IBAN, currency_code="EUR")}, named="creditor_account.iban"),
    *_rows(
        "bi_C18", "creditor_name",
        missing={"creditor_name": None}, empty={"creditor_name": ""}, characters_71={"creditor_name": "x" * 71}, characters_140={"creditor_name": "x" * 140},
        characters_141={"creditor_name": "x" * 141}, umlaut={"creditor_name": "Zoë"}, ampersand={"creditor_name": "a&b"}, line={"creditor_name": "a\nb"},
        escape={"creditor_name": "a\x1b[2J"}, right_to_left={"creditor_name": "a\u202eb"}, zero_width={"creditor_name": "a\u200bb"}, homoglyph={"creditor_name": "\u0430"},
        markup={"creditor_name": "<script>"}, blank_first={"creditor_name": " a"}, blank_last={"creditor_name": "a "}, only_blanks={"creditor_name": "   "},
    ),
    Wrong(id="bi_C18_slash_first", changes={"creditor_name": "/a"}, named="creditor_name"),
    *_rows(
        "bi_C19", "remittance_information",
        line={"remittance_information": "a\nb"}, carriage_return={"remittance_information": "a\rb"}, characters_141={"remittance_information": "x" * 141},
        tab={"remittance_information": "a\tb"}, nul={"remittance_information": "a\0"}, not_sepa={"remittance_information": "50 €"},
    ),
    *_rows(
        "bi_C20", "end_to_end_id",
        characters_36={"end_to_end_id": "x" * 36}, blank={"end_to_end_id": "a b"}, slash_first={"end_to_end_id": "/a"}, slashes={"end_to_end_id": "a//b"},
        line={"end_to_end_id": "a\n"}, not_sepa={"end_to_end_id": "a_b"},
    ),
    Wrong(id="bi_C21_execution_date_is_no_field", named="(request)", appended=b"\x62\x0a2026-02-29"),
    Wrong(id="bi_C22_unknown", changes={"consent": "consents/c-unknown"}, reason="CONSENT_NOT_FOUND"),
    *_rows("bi_C22", "consent", missing={"consent": None}, another_collection={"consent": "payments/c-1"}, path={"consent": "consents/../c-1"}, upper_case={"consent": "consents/C-1"}),
    Wrong(id="bi_C26_another_owner", changes={"owner": "owner-2"}, reason="CONSENT_NOT_FOUND"),
    Wrong(id="bi_C26_another_caller", consent={"caller": WorkloadId("workload:other")}, reason="CONSENT_NOT_FOUND"),
    Wrong(id="bi_C26_another_provider", policy={"providers": frozenset({ProviderId("other-bank")})}, reason="CONSENT_NOT_FOUND"),
    Wrong(id="bi_C26_owner_not_allowed", policy={"owners": frozenset()}, reason="OWNER_MISMATCH"),
    *_rows("bi_C26", "owner", owner_missing={"owner": None}, owner_with_a_blank={"owner": "owner 1"}),
    Wrong(id="bi_C27_account_information_only", consent={"purposes": frozenset({Purpose.ACCOUNTS, Purpose.BALANCES})}, reason="PURPOSE_NOT_CONSENTED"),
    Wrong(id="bi_C27_policy_without_payments", policy={"purposes": frozenset({Purpose.ACCOUNTS})}, reason="POLICY_REFUSED"),
    Wrong(id="bi_C30_provider_not_configured", before=lambda world: world.core.connectors.clear(), reason="PROVIDER_NOT_FOUND"),
    *_rows("bi_C31", "product", missing={"product": None}, unspecified={"product": 0}, unknown={"product": 99}, negative={"product": -1}),
    Wrong(id="bi_C31_not_offered", before=lambda world: _offer_only_instant(world, offered=True), named="product"),
    Wrong(id="bi_C32_instant_not_offered", changes={"product": INSTANT}, before=lambda world: _offer_only_instant(world, offered=False), named="product"),
    Wrong(id="bi_C33_another_account", changes={**_to(OTHER_CREDITOR), "debtor_account": AccountReference(iban=CREDITOR)}, reason="ACCOUNT_NOT_CONSENTED"),
    Wrong(id="bi_C33_another_currency", changes={"debtor_account": AccountReference(iban=IBAN, currency_code="USD")}, reason="ACCOUNT_NOT_CONSENTED"),
    Wrong(id="bi_C33_not_named_among_two", consent={"accounts": (Reference(iban=IBAN), Reference(iban=OTHER_CREDITOR))}, named="debtor_account"),
    Wrong(id="bi_C33_no_account_consented", consent={"accounts": ()}, changes={"debtor_account": AccountReference(iban=IBAN)}, reason="ACCOUNT_NOT_CONSENTED"),
]  # fmt: skip


def _offer_only_instant(world: World, *, offered: bool) -> None:
    terms = world.connector.descriptor.payments
    products = {product: segment for product, segment in terms.products.items() if ("instant" in product) is offered}
    world.replace_connector(payments=msgspec.structs.replace(terms, products=products))


@pytest.mark.parametrize("wrong", TABLE, ids=lambda wrong: wrong.id)
def test_a_wrong_payment_is_refused(wrong: Wrong) -> None:
    """INVALID_ARGUMENT with the field, or the reason; no claim, no payment, no entry, nothing sent."""

    async def test() -> None:
        world = World()
        consent = await world.consent(**wrong.consent)
        if wrong.before:
            wrong.before(world)
        front = Front(world=world, caller=caller(**wrong.policy))
        before = front.written()

        answer = await front.pay(payment_message_for(consent, **wrong.changes).SerializeToString() + wrong.appended)

        assert isinstance(answer, Refusal), answer
        assert answer.reason == wrong.reason, answer
        assert not wrong.named or wrong.named in answer.fields, answer
        assert front.written() is before
        assert front.sent() == 0

    run(test)


def test_the_request_that_they_are_made_from_is_right() -> None:
    """What was refused was refused for the one thing wrong: without it the payment is made."""

    async def test() -> None:
        world = World()
        front = Front(world=world)

        answer = await front.pay(payment_message_for(await world.consent()))

        assert answer.payment.state == P.STATE_SETTLED

    run(test)


# --- consents that are not, or no longer, active

ENDED = {
    "bi_C23_revoked": (ConsentState.REVOKED, "CONSENT_REVOKED"),
    "bi_C25_used_up_or_failed": (ConsentState.FAILED, "CONSENT_NOT_ACTIVE"),
    "bi_C28_awaiting": (ConsentState.AWAITING_AUTHORISATION, "CONSENT_NOT_ACTIVE"),
    "bi_C28_being_completed": (ConsentState.COMPLETING, "CONSENT_NOT_ACTIVE"),
    "bi_C29_needs_the_owner_again": (ConsentState.NEEDS_REAUTHORISATION, "CONSENT_NEEDS_REAUTHORISATION"),
    "bi_C24_expired": (ConsentState.EXPIRED, "CONSENT_EXPIRED"),
}


@pytest.mark.parametrize(("state", "reason"), ENDED.values(), ids=ENDED.keys())
def test_a_consent_that_is_not_active_pays_nothing(state: ConsentState, reason: str) -> None:
    """Refused with the consent's own reason, and nothing is written."""

    async def test() -> None:
        world = World()
        consent = await world.consent()
        # The access token is over as well: until it is, a consent that needs its owner again stays usable.
        _force(world, replace(consent, state=state, access_expire_time=world.clock.now()))
        front = Front(world=world)
        before = front.written()

        answer = await front.pay(payment_message_for(consent))

        assert answer == Refusal(reason=reason)
        assert front.written() is before
        assert front.sent() == 0

    run(test)


def _force(world: World, consent: Consent) -> None:
    """The row as it would stand after a history that does not matter here."""
    world.store._state.consents[consent.id] = consent


@pytest.mark.parametrize(
    ("early_seconds", "pays"), [(1, True), (0, False), (-1, False)], ids=["a_second_before", "now", "a_second_after"]
)
def test_bi_c24_expires(early_seconds: int, pays: bool) -> None:
    """To the second; no sweep needs to have come by."""

    async def test() -> None:
        world = World()
        consent = await world.consent(expire_time=world.clock.now() + timedelta(seconds=100))
        world.clock.advance(100 - early_seconds)

        answer = await Front(world=world).pay(payment_message_for(consent))

        assert (answer == Refusal(reason="CONSENT_EXPIRED")) is not pays

    run(test)


def test_bi_c24_expires_while_it_is_prepared() -> None:
    """The dispatch record is refused, so nothing is sent; the payment is an intent that nobody can go on with."""

    async def test() -> None:
        world = World()
        consent = await world.consent(expire_time=world.clock.now() + timedelta(seconds=100))

        async def slow() -> None:
            world.clock.advance(101)

        world.core.egress.gates["prepare"] = slow

        answer = await Front(world=world).pay(payment_message_for(consent))

        assert answer == Refusal(reason="CONSENT_EXPIRED")
        assert world.bank.count("initiate") == 0

    run(test)


# --- the request id


def test_bi_c4_the_same_request_again() -> None:
    """Byte for byte the same answer, and one payment at the bank."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        message = payment_message_for(await world.consent())

        answers = [await front.pay(message) for _ in range(3)]

        assert answers[0].payment.state == P.STATE_SETTLED
        assert answers == [answers[0]] * 3
        assert world.bank.count("initiate") == 1

    run(test)


OTHER_BODIES: dict[str, Changes] = {
    "amount": _money(units=13),
    "a_cent_more": _money(units=12, nanos=510_000_000),
    "creditor": _to(OTHER_CREDITOR),
    "creditor_currency": _to(CREDITOR, "EUR"),
    "creditor_name": {"creditor_name": "Example Shoq"},
    "reference": {"remittance_information": "x"},
    "end_to_end_id": {"end_to_end_id": "E2E-2"},
    "no_end_to_end_id": {"end_to_end_id": None},
    "product": {"product": INSTANT},
    "debtor": {"debtor_account": AccountReference(iban=IBAN)},
}


@pytest.mark.parametrize("changes", OTHER_BODIES.values(), ids=OTHER_BODIES.keys())
def test_bi_c5_the_same_request_id_with_another_body(changes: Changes) -> None:
    """REQUEST_ID_REUSED; nothing is sent, and the first payment stands as it was."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        consent = await world.consent()
        message = payment_message_for(consent)
        await front.pay(message)
        before = front.written()

        answer = await front.pay(payment_message_for(consent, request_id=message.request_id, **changes))

        assert answer == Refusal(reason="REQUEST_ID_REUSED")
        assert front.written() is before
        assert world.bank.count("initiate") == 1

    run(test)


def test_bi_c5_the_same_request_id_with_another_consent() -> None:
    """Another consent of the same owner is another payment: refused."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        first, second = await world.consent(), await world.consent()
        message = payment_message_for(first)
        await front.pay(message)

        answer = await front.pay(payment_message_for(second, request_id=message.request_id))

        assert answer == Refusal(reason="REQUEST_ID_REUSED")
        assert world.bank.count("initiate") == 1

    run(test)


@pytest.mark.parametrize("id_", ["bi_C6_another_caller", "bi_C7_another_tenant"])
def test_request_ids_of_others_do_not_meet(id_: str) -> None:
    """Another workload's, for its own owner or for the same one: independent payments."""

    async def test() -> None:
        world = World()
        other = WorkloadId("workload:other")
        owner = "owner-1" if id_.startswith("bi_C6") else "owner-2"
        mine, theirs = await world.consent(), await world.consent(caller=other, owner=owner)
        message = payment_message_for(mine)

        first = await Front(world=world).pay(message)
        second = await Front(world=world, caller=caller(other)).pay(
            payment_message_for(theirs, request_id=message.request_id, owner=owner)
        )

        assert first.payment.name != second.payment.name
        assert second.payment.state == P.STATE_SETTLED
        assert world.bank.count("initiate") == 2

    run(test)


def test_bi_c8_while_the_first_is_in_flight() -> None:
    """IN_PROGRESS, at once, a hundred times; one send."""

    async def test() -> None:
        world = World()
        gate = asyncio.Event()
        world.core.egress.gates["send"] = gate.wait  # type: ignore[assignment]
        front = Front(world=world)
        message = payment_message_for(await world.consent())
        first = asyncio.ensure_future(front.pay(message))
        for _ in range(10):
            await asyncio.sleep(0)

        others = [await front.pay(message) for _ in range(100)]
        gate.set()

        assert {answer.payment.state for answer in others} == {P.STATE_IN_PROGRESS}
        assert (await first).payment.state == P.STATE_SETTLED
        assert world.bank.count("initiate") == 1

    run(test)


@pytest.mark.parametrize(
    "seconds", [1, 86_399, 86_401, 365 * 86_400], ids=["a_second", "almost_a_day", "more_than_a_day", "a_year"]
)
def test_bi_c9_the_same_request_later(seconds: float) -> None:
    """Keys are kept for ever: the same payment, also when consent and token have long ended."""

    async def test() -> None:
        world = World(name="sandbox-bank-idempotent")
        front = Front(world=world)
        message = payment_message_for(await world.consent())
        first = await front.pay(message)
        world.clock.advance(seconds)

        again = await front.pay(message)

        assert again == first
        assert world.bank.count("initiate") == 1

    run(test)


def test_bi_c10_the_same_body_under_a_new_request_id() -> None:
    """Another payment: the application has said so. It is not flagged as a likely duplicate."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        consent = await world.consent()

        first, second = [await front.pay(payment_message_for(consent)) for _ in range(2)]

        assert first.payment.name != second.payment.name
        assert world.bank.count("initiate") == 2

    run(test)


def test_bi_c13_at_the_limit() -> None:
    """The limit is the largest payment, not the first that is too large."""

    async def test() -> None:
        world = World()
        consent = await world.consent(payment_limit=Amount(currency_code="EUR", minor_units=1_000_000))

        answer = await Front(world=world).pay(payment_message_for(consent, **_money(units=10_000)))

        assert answer.payment.state == P.STATE_SETTLED

    run(test)


def test_bi_c20_one_end_to_end_id_for_two_payments() -> None:
    """It is the application's reference, and no key of ours: both are made."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        consent = await world.consent()

        for _ in range(2):
            assert (
                await front.pay(payment_message_for(consent, end_to_end_id="SAME"))
            ).payment.state == P.STATE_SETTLED

        assert world.bank.executed["SAME"] == 2

    run(test)


# --- C34: while something else is the matter


@pytest.mark.parametrize("what", ["hsm", "egress", "bank"])
def test_bi_c34_during_an_outage(what: str) -> None:
    """Unavailable, nothing sent; the same request id goes on with the same payment when it is over."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        message = payment_message_for(await world.consent())
        _switch(world, what, on=False)
        refused = await front.pay(message)
        _switch(world, what, on=True)
        before = world.bank.count("initiate")
        answer = await front.pay(message)

        assert refused.reason in ("HSM_UNAVAILABLE", "PROVIDER_UNAVAILABLE", "AUDIT_UNAVAILABLE")
        assert before == 0
        assert answer.payment.state == P.STATE_SETTLED
        assert world.bank.count("initiate") == 1

    run(test)


def _switch(world: World, what: str, *, on: bool) -> None:
    match what:
        case "hsm":
            world.core.egress.available = on
        case "egress":
            away: list[Exception] = [] if on else [Unavailable("PROVIDER_UNAVAILABLE", "away")]
            world.core.egress.trouble["prepare"] = away
        case _:
            world.core.egress.bank = world.bank if on else lambda _: NotSent(code="CONNECT_FAILED")


def test_bi_c34_an_unknown_outcome_is_an_answer() -> None:
    """The bank's answer is lost: UNKNOWN, with the payment's name, and no error that would invite another request id."""

    async def test() -> None:
        world = World()
        world.bank.script["initiate"] = [lost]
        consent = await world.consent()

        answer = await Front(world=world).pay(payment_message_for(consent))

        assert answer.payment.state == P.STATE_UNKNOWN
        assert answer.payment.name.startswith("payments/p-")

    run(test)


ADDRESSES = ("", "1.2.3", "999.1.1.1", "localhost", "::1%eth0", "::1%\r\nX: y", "1.2.3.4\r\nX: y", "1.2.3.4 ")


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_of_a_person_that_is_none(address: str) -> None:
    """It goes into a header of the bank: a zone (RFC 4007) is a matter of this machine, and may hold anything."""

    async def test() -> None:
        world = World()
        front = Front(world=world)
        consent = await world.consent()
        before = front.written()

        answer = await front.pay(payment_message_for(consent, psu_context={"ip_address": address}))

        assert answer == Refusal(reason="FIELD_INVALID", fields=("psu_context.ip_address",))
        assert front.written() is before

    run(test)
