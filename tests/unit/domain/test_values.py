"""Money, text, names and policies: exact, in the form that a bank takes, and closed where nothing is said (3b, C11-C20)."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.domain.caller import Caller, Policy, Role, WorkloadPolicy
from sidecar.domain.consent import Purpose
from sidecar.domain.ids import (
    OwnerId,
    ProviderId,
    WorkloadId,
    new_consent_id,
    new_payment_id,
    parse_name,
    resource_name,
)
from sidecar.domain.money import EXPONENTS, Money, money_from_units, parse_amount
from sidecar.domain.text import check_iban, check_sepa_text
from sidecar.errors import InvalidField, Refused

# ISO 4217, list one; written out once more so that a slip in one of the two shows.
ISO_4217 = {"ISK": 0, "JPY": 0, "KWD": 3, "TND": 3}
NOW = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)


@pytest.mark.parametrize("code", sorted(EXPONENTS))
def test_each_currency_has_the_decimals_of_iso_4217(code: str) -> None:
    """Two but for those listed; text and value agree."""
    exponent = ISO_4217.get(code, 2)
    whole = 10**exponent

    assert EXPONENTS[code] == exponent
    assert Money(currency_code=code, minor_units=12 * whole).amount == "12" + ("." + "0" * exponent if exponent else "")
    assert money_from_units(code, 12, 0, field="amount").minor_units == 12 * whole
    assert parse_amount(code, Money(currency_code=code, minor_units=-whole - 1).amount) == Money(
        currency_code=code, minor_units=-whole - 1
    )


@given(st.sampled_from(sorted(EXPONENTS)), st.integers(min_value=-(10**16), max_value=10**16))
def test_an_amount_survives_its_text(code: str, minor: int) -> None:
    """From minor units to decimal text and back, exactly."""
    money = Money(currency_code=code, minor_units=minor)

    assert parse_amount(code, money.amount) == money
    assert Decimal(money.amount) == Decimal(minor).scaleb(-EXPONENTS[code])


@pytest.mark.parametrize(
    ("code", "units", "nanos", "minor"),
    [
        ("EUR", 12, 500_000_000, 1250),
        ("EUR", -12, -500_000_000, -1250),
        ("EUR", 0, 10_000_000, 1),
        ("EUR", 0, -10_000_000, -1),
        ("EUR", 0, 0, 0),
        ("JPY", 7, 0, 7),
        ("KWD", 1, 1_000_000, 1001),
        ("EUR", 2**63 - 1, 990_000_000, (2**63 - 1) * 100 + 99),
        ("EUR", -(2**63), 0, -(2**63) * 100),
    ],
)
def test_units_and_nanos_are_exact(code: str, units: int, nanos: int, minor: int) -> None:
    """google.type.Money, to the ends of its range (B16)."""
    assert money_from_units(code, units, nanos, field="amount").minor_units == minor


@pytest.mark.parametrize(
    ("code", "units", "nanos", "field"),
    [
        ("eur", 1, 0, "amount.currency_code"),
        ("XXX", 1, 0, "amount.currency_code"),
        ("DEM", 1, 0, "amount.currency_code"),
        ("", 1, 0, "amount.currency_code"),
        ("EUR", 1, -1, "amount.nanos"),
        ("EUR", -1, 1, "amount.nanos"),
        ("EUR", 0, 1_000_000_000, "amount.nanos"),
        ("EUR", 0, -1_000_000_000, "amount.nanos"),
        ("EUR", 0, 1_000_000, "amount.nanos"),
        ("EUR", 0, 1, "amount.nanos"),
        ("JPY", 1, 500_000_000, "amount.nanos"),
        ("KWD", 0, 100_000, "amount.nanos"),
    ],
)
def test_bi_c11_c12_money_of_another_form_is_refused(code: str, units: int, nanos: int, field: str) -> None:
    """C11, C12: unknown and old currencies, mixed signs, more decimals than the currency has."""
    with pytest.raises(InvalidField) as refused:
        money_from_units(code, units, nanos, field="amount")

    assert refused.value.violations[0].field == field


@pytest.mark.parametrize(
    ("code", "text", "minor"),
    [
        ("EUR", "0", 0),
        ("EUR", "-0", 0),
        ("EUR", "1", 100),
        ("EUR", "1.5", 150),
        ("EUR", "1.50", 150),
        ("EUR", "1.500", 150),
        ("EUR", "01", 100),
        ("EUR", "-12.34", -1234),
        ("JPY", "5", 5),
        ("JPY", "5.0", 5),
        ("EUR", "99999999999999.99", 9_999_999_999_999_999),
    ],
)
def test_a_banks_decimal_text_is_read_exactly(code: str, text: str, minor: int) -> None:
    """More zeros than the currency has decimals are still exact."""
    assert parse_amount(code, text) == Money(currency_code=code, minor_units=minor)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "+1",
        " 1",
        "1 ",
        "1,00",
        "1e2",
        "1.",
        ".5",
        "--1",
        "-+1",
        "0x1",
        "1_000",
        "1.001",
        "1.0.0",
        "١",
        "１",
        "NaN",
        "inf",
        "1" * 21,
    ],
)
def test_bi_c11_what_is_no_exact_amount_is_none(text: str) -> None:
    """C11: signs, blanks, commas, exponents, other digits, too many decimals, too long."""
    assert parse_amount("EUR", text) is None


def test_a_currency_that_is_not_known_is_no_amount() -> None:
    """An unknown exponent would be a guess about money; JPY has no half."""
    assert parse_amount("XXX", "1") is None
    assert parse_amount("eur", "1") is None
    assert parse_amount("JPY", "1.5") is None


# --- IBAN and SEPA text

GOOD_IBANS = [
    "DE40100100103307118608",
    "GB82WEST12345698765432",
    "NO9386011117947",
    "MT84MALT011000012345MTLCAST001S",
    "FR1420041010050500013M02606",
]


@pytest.mark.parametrize("iban", GOOD_IBANS)
def test_ibans_of_every_length_are_taken(iban: str) -> None:
    """15 to 31 characters, digits and letters."""
    assert check_iban(iban, field="iban") == iban


@pytest.mark.parametrize(
    "iban",
    [
        "",
        "DE",
        "DE41100100103307118608",
        "DE4010010010330711860",
        "DE401001001033071186080",
        "de40100100103307118608",
        "DE40 1001 0010 3307 1186 08",
        " DE40100100103307118608",
        "DE40100100103307118608\n",
        "DE40-1001-0010-3307-1186-08",
        "XX40100100103307118608",
        "DE40100100103307118608" + "0" * 12,
        "DE40100100103307118608" + "0" * 13,
        "ＤＥ40100100103307118608",
        "DE4010010010330711860٨",
        "DE40100100103307118608\x00",
        "' OR 1=1 --",
    ],
)
def test_bi_c15_an_iban_of_another_form_is_refused(iban: str) -> None:
    """C15: check digits, country, length, blanks, lower case, other alphabets; the text is not repeated."""
    with pytest.raises(InvalidField) as refused:
        check_iban(iban, field="creditor_account.iban")

    assert refused.value.violations[0].field == "creditor_account.iban"
    assert not iban or iban not in str(refused.value)


@given(st.text(max_size=40))
def test_no_text_makes_the_iban_check_raise_anything_else(text: str) -> None:
    """Whatever comes, it is an IBAN or a refusal."""
    with suppress(InvalidField):
        assert check_iban(text, field="iban") == text


@pytest.mark.parametrize("text", ["a", "A B-c?d:(e).f,'g+h/i9", "x" * 70])
def test_text_of_the_sepa_set_is_taken(text: str) -> None:
    """EPC 217-08."""
    assert check_sepa_text(text, field="creditor_name", max_length=70, min_length=1) == text


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "length"),
        ("x" * 71, "length"),
        ("Zoë", "sepa_characters"),
        ("a&b", "sepa_characters"),
        ("a\nb", "sepa_characters"),
        ("a\n", "sepa_characters"),
        ("a\tb", "sepa_characters"),
        ("a\x00b", "sepa_characters"),
        ("a\u202eb", "sepa_characters"),
        ("a\u200bb", "sepa_characters"),
        ("а", "sepa_characters"),
        ("é", "sepa_characters"),
        ("<script>", "sepa_characters"),
        ("a;b", "sepa_characters"),
        (" a", "sepa_form"),
        ("a ", "sepa_form"),
        ("/a", "sepa_form"),
        ("a/", "sepa_form"),
        ("a//b", "sepa_form"),
    ],
)
def test_bi_c18_c19_text_outside_the_sepa_set_is_refused(text: str, rule: str) -> None:
    """C18, C19, B8-B10, B21: lengths, other letters, control characters, slashes and blanks at the ends."""
    with pytest.raises(InvalidField) as refused:
        check_sepa_text(text, field="creditor_name", max_length=70, min_length=1)

    assert refused.value.violations[0].rule == rule


# --- names


def test_names_go_there_and_back() -> None:
    """collection/id."""
    assert parse_name(resource_name("consents", "c-1"), collection="consents", field="consent") == "c-1"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "consents",
        "consents/",
        "consents/C-1",
        "payments/c-1",
        "consents/-a",
        "consents/a-",
        "consents/a/b",
        "consents/" + "a" * 64,
        "consents/a\n",
        "Consents/a",
        "consents/ä",
        "/consents/a",
        "consents/..",
    ],
)
def test_names_of_another_form_are_refused(name: str) -> None:
    """B22, B23: capitals, dots, slashes, lengths, line ends."""
    with pytest.raises(InvalidField):
        parse_name(name, collection="consents", field="consent")


def test_new_ids_are_names_and_newer_ones_sort_first() -> None:
    """The contract lists newest first and the store by ascending id; two of one moment differ."""
    earlier, later = new_payment_id(NOW), new_payment_id(NOW + timedelta(milliseconds=1))

    assert later < earlier
    assert new_consent_id(NOW) != new_consent_id(NOW)
    assert parse_name(f"payments/{earlier}", collection="payments", field="payment") == earlier
    assert new_consent_id(datetime(9999, 1, 1, tzinfo=UTC)) < new_consent_id(NOW)


# --- policy

SHOP = WorkloadId("workload:shop")


def caller(**changes: Any) -> Caller:
    return Caller(workload=SHOP, policy=WorkloadPolicy(workload=SHOP, roles=frozenset(), **changes))


def test_an_empty_policy_permits_nothing() -> None:
    """No provider, no purpose, no owner, no amount, no import, no administration; an unknown workload is no caller."""
    nobody = caller()

    for check in (
        lambda: nobody.check_provider(ProviderId("bank")),
        lambda: nobody.check_purposes(frozenset({Purpose.ACCOUNTS})),
        lambda: nobody.check_owner(OwnerId("owner-1")),
        lambda: nobody.check_amount(Money(currency_code="EUR", minor_units=1)),
        nobody.check_import,
    ):
        with pytest.raises(Refused):
            check()  # type: ignore[no-untyped-call]
    assert not nobody.is_administrator
    assert not nobody.may_use(ProviderId("bank"))
    assert Policy(workloads={}).caller(SHOP) is None


def test_what_the_policy_names_is_permitted_and_nothing_else() -> None:
    """Sets, not patterns; the limit itself is allowed; `any` owner is said by None."""
    one = caller(
        providers=frozenset({ProviderId("bank")}),
        purposes=frozenset({Purpose.ACCOUNTS, Purpose.BALANCES}),
        owners=frozenset({OwnerId("owner-1")}),
        payment_limits={"EUR": Money(currency_code="EUR", minor_units=100)},
        imports=True,
    )
    one.check_provider(ProviderId("bank"))
    one.check_purposes(frozenset({Purpose.ACCOUNTS}))
    one.check_owner(OwnerId("owner-1"))
    one.check_amount(Money(currency_code="EUR", minor_units=100))
    one.check_import()
    caller(owners=None).check_owner(OwnerId("anybody"))

    with pytest.raises(Refused) as provider:
        one.check_provider(ProviderId("ban"))
    with pytest.raises(Refused):
        one.check_purposes(frozenset({Purpose.ACCOUNTS, Purpose.PAYMENTS}))
    with pytest.raises(Refused) as owner:
        one.check_owner(OwnerId("owner-12"))
    with pytest.raises(Refused) as amount:
        one.check_amount(Money(currency_code="EUR", minor_units=101))
    with pytest.raises(Refused):
        one.check_amount(Money(currency_code="GBP", minor_units=1))
    assert [error.value.reason for error in (provider, owner, amount)] == [
        "POLICY_REFUSED",
        "OWNER_MISMATCH",
        "LIMIT_EXCEEDED",
    ]


def test_roles_count_only_where_the_surface_has_them() -> None:
    """An administrator on the application socket is an application."""
    both = Caller(
        workload=SHOP,
        policy=WorkloadPolicy(workload=SHOP, roles=frozenset({Role.APPLICATION, Role.ADMINISTRATOR})),
    )

    assert both.is_administrator
    assert not both.acting_as(frozenset({Role.APPLICATION})).is_administrator
    assert both.acting_as(frozenset({Role.AUDITOR})).roles == frozenset()
