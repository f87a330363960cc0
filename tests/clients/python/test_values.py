"""What the clients' values promise: exact money, no personal data in repr, one shape for both clients, and sealing by vectors."""

import dataclasses
import inspect
import json
import subprocess
import sys
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import custody
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from custody import ErrorReason, Money, _calls, _reading, _sealing, aio, client, values
from custody.testing import FakeCustody
from custody.v1 import account_pb2, consent_pb2, errors_pb2, payment_pb2
from google.type import money_pb2
from hypothesis import given
from hypothesis import strategies as st

VECTORS = json.loads(Path(__file__).with_name("import_sealing_vectors.json").read_text())


@pytest.mark.parametrize(
    ("amount", "currency", "shown"),
    [
        ("12.34", "EUR", "12.34 EUR"),
        ("12.3", "EUR", "12.30 EUR"),
        (12, "EUR", "12.00 EUR"),
        (Decimal("1.500"), "EUR", "1.50 EUR"),
        ("1", "JPY", "1 JPY"),
        ("1.234", "KWD", "1.234 KWD"),
        ("-0.01", "EUR", "-0.01 EUR"),
        ("99999999999999", "JPY", "99999999999999 JPY"),
    ],
)
def test_money_has_the_decimals_of_its_currency(amount: Any, currency: str, shown: str) -> None:
    """ISO 4217 says how many decimals: 0, 2 or 3."""
    assert str(Money(amount, currency)) == shown


@pytest.mark.parametrize(
    ("amount", "currency", "error"),
    [
        (1.5, "EUR", TypeError),
        (True, "EUR", TypeError),
        (None, "EUR", TypeError),
        ("1.234", "EUR", ValueError),
        ("1.5", "JPY", ValueError),
        ("NaN", "EUR", ValueError),
        ("Infinity", "EUR", ValueError),
        ("1,00", "EUR", ValueError),
        ("", "EUR", ValueError),
        ("100000000000000", "EUR", ValueError),
        ("1", "eur", ValueError),
        ("1", "XXX", ValueError),
        ("1", "DEM", ValueError),
        ("1e400", "EUR", ValueError),
    ],
)
def test_money_that_is_not_exact_is_refused(amount: Any, currency: str, error: type[Exception]) -> None:
    """No float, no rounding, no unknown currency."""
    with pytest.raises(error):
        Money(amount, currency)


@given(st.integers(min_value=-(10**16) + 1, max_value=10**16 - 1))
def test_money_goes_there_and_back(cents: int) -> None:
    """Every amount of cents crosses the wire unchanged, with units and nanos of one sign."""
    money = Money(Decimal(cents).scaleb(-2), "EUR")

    message = _calls.money_message(money)

    assert message.units * message.nanos >= 0
    assert message.units * 10**9 + message.nanos == cents * 10**7
    assert Money.received(units=message.units, nanos=message.nanos, currency_code="EUR") == money


def test_money_is_received_as_it_is() -> None:
    """What a provider says is shown, also in a currency that one cannot pay in, and with decimals that it should not have."""
    assert str(Money.received(units=1, nanos=500_000_000, currency_code="XAU")) == "1.50 XAU"
    assert str(Money.received(units=0, nanos=-1_000_000, currency_code="EUR")) == "-0.001 EUR"


def test_calls_refuse_what_is_not_exact() -> None:
    """A payment takes Money only, and a time needs its zone: nothing is guessed."""
    client = FakeCustody().client(owner="user:42")

    with pytest.raises(TypeError, match="Money"):
        client.payments.initiate("consents/a", amount=12.34, creditor_account="x", creditor_name="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="time zone"):
        client.consents.create(
            provider="providers/x",
            purposes=[],
            expire_time=datetime(2026, 1, 1),  # noqa: DTZ001 — what is refused
            redirect_uri="x",
        )
    with pytest.raises(ValueError, match="UNKNOWN_PURPOSE"):
        client.consents.create(
            provider="providers/x",
            purposes=["UNKNOWN_PURPOSE"],  # type: ignore[list-item]
            expire_time=datetime.now(UTC),
            redirect_uri="x",
        )


def test_repr_keeps_people_and_accounts_to_itself() -> None:
    """A value that is logged whole gives away no name, account, reference or URI."""
    account = values.AccountReference("CANARY")
    now = datetime.now(UTC)
    found = values.PaymentResolution(
        finding=values.Finding.EXECUTED, reason="CANARY", administrator="workload:operator", resolve_time=now
    )
    payment = values.Payment(
        name="payments/1", consent="consents/1", owner="CANARY", request_id="r", state=values.PaymentState.SETTLED,
        amount=Money(1, "EUR"), debtor_account=account, creditor_account=account, creditor_name="CANARY",
        remittance_information="CANARY", end_to_end_id="e", product=values.PaymentProduct.SEPA_CREDIT_TRANSFER,
        authorisation_uri="CANARY", provider_status="ACSC", status_reason="", create_time=now, update_time=now,
        resolution=found,
    )  # fmt: skip
    consent = values.Consent(
        name="consents/1", owner="CANARY", provider="providers/1", purposes=(), accounts=(account,),
        state=values.ConsentState.ACTIVE, failure_reason=None, payment_limit=None, create_time=now, activate_time=None,
        expire_time=now, access_expire_time=None, revoke_time=None,
    )  # fmt: skip
    pending = values.PendingConsent(consent=consent, authorisation_uri="CANARY", request_id="r")
    transaction = values.Transaction(
        transaction_id="t", entry_reference="", booking_status=values.BookingStatus.BOOKED, amount=Money(1, "EUR"),
        booking_date=None, value_date=None, creditor_name="CANARY", creditor_account=account, debtor_name="CANARY",
        debtor_account=account, remittance_information="CANARY", end_to_end_id="",
    )  # fmt: skip
    read = values.Account(
        name="accounts/1", iban="CANARY", currency_code="EUR", owner_name="CANARY", display_name="CANARY", product="",
        account_type="",
    )  # fmt: skip
    psu = values.PsuContext(ip_address="CANARY", user_agent="CANARY")

    assert "CANARY" not in repr([payment, consent, pending, transaction, read, psu])
    assert "payments/1" in repr(payment)


def test_fields_that_are_redacted_in_the_contract_are_left_out_of_repr() -> None:
    """Whatever the contract marks debug_redact, a value of the same name keeps out of its repr."""
    pairs: list[tuple[Any, Any]] = [
        (consent_pb2.Consent, values.Consent),
        (payment_pb2.Payment, values.Payment),
        (account_pb2.Account, values.Account),
        (account_pb2.Transaction, values.Transaction),
        (consent_pb2.CreateConsentResponse, values.PendingConsent),
    ]
    for message, value in pairs:
        shown = {field.name for field in dataclasses.fields(value) if field.repr}
        redacted = {field.name for field in message.DESCRIPTOR.fields if field.GetOptions().debug_redact}

        assert redacted
        assert shown.isdisjoint(redacted), value


def test_values_are_frozen_and_have_the_fields_of_the_contract() -> None:
    """No field of an answer is lost on the way to its value."""
    pairs: list[tuple[Any, Any]] = [
        (consent_pb2.Consent, values.Consent),
        (payment_pb2.Payment, values.Payment),
        (account_pb2.Account, values.Account),
        (account_pb2.Balance, values.Balance),
        (account_pb2.Transaction, values.Transaction),
    ]
    for message, value in pairs:
        names = {field.name for field in message.DESCRIPTOR.fields}

        assert names <= {field.name for field in dataclasses.fields(value)}
        assert value.__dataclass_params__.frozen


@pytest.mark.parametrize(
    ("ours", "generated"),
    [
        (values.Purpose, "purpose_pb2.Purpose"),
        (values.ConsentState, "consent_pb2.Consent.State"),
        (values.PaymentState, "payment_pb2.Payment.State"),
        (values.PaymentProduct, "payment_pb2.PaymentProduct"),
        (values.BalanceKind, "account_pb2.Balance.Kind"),
        (values.BookingStatus, "account_pb2.Transaction.BookingStatus"),
    ],
)
def test_enums_are_those_of_the_contract(ours: Any, generated: str) -> None:
    """Every value of the contract has its name here, besides UNRECOGNISED for those to come."""
    module, *path = generated.split(".")
    enum: Any = sys.modules[f"custody.v1.{module}"]
    for part in path:
        enum = getattr(enum, part)
    prefix = enum.Name(0).removesuffix("UNSPECIFIED")

    assert {name.removeprefix(prefix) for name in enum.DESCRIPTOR.values_by_name} - {"UNSPECIFIED"} == set(
        ours.__members__
    ) - {"UNRECOGNISED"}


def test_reasons_are_those_of_the_contract() -> None:
    """Every reason of the contract is a constant, and no other."""
    names = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name} - {
        "UNSPECIFIED"
    }

    assert {reason.value for reason in ErrorReason} == names


def test_a_state_from_the_future_is_unrecognised() -> None:
    """A newer sidecar's states do not break this client, and are not taken for final."""
    message = payment_pb2.Payment(name="payments/1")
    message.ParseFromString(message.SerializeToString() + b"\x28\x63")  # field 5, varint 99

    payment = _reading.payment(message)

    assert payment.state is values.PaymentState.UNRECOGNISED
    assert not payment.state.is_final


def test_only_three_states_are_final() -> None:
    """Unknown is not failed, and accepted is not settled."""
    final = {state for state in values.PaymentState if state.is_final}

    assert final == {values.PaymentState.SETTLED, values.PaymentState.REJECTED, values.PaymentState.CANCELLED}


def test_both_clients_have_the_same_names_and_arguments() -> None:
    """Whoever knows one client knows the other: same resources, same methods, same signatures."""
    for name in ("Client", "Consents", "Payments", "Accounts", "Signing", "Providers", "Keys", "Audit"):
        blocking, asynchronous = getattr(client, name), getattr(aio, name)
        ours = {n: m for n, m in vars(blocking).items() if inspect.isfunction(m) and not n.startswith("_")}
        theirs = {n: m for n, m in vars(asynchronous).items() if inspect.isfunction(m) and not n.startswith("_")}

        assert ours.keys() == theirs.keys(), name
        for method in ours:
            expected, found = inspect.signature(ours[method]), inspect.signature(theirs[method])
            assert [str(p) for p in found.parameters.values() if p.name != "transport"] == [
                str(p) for p in expected.parameters.values() if p.name != "transport"
            ], f"{name}.{method}"
            assert inspect.getdoc(ours[method]) == inspect.getdoc(theirs[method]), f"{name}.{method}"


def test_every_method_of_the_contract_is_offered() -> None:
    """Each method is called by some function of the client, and by its name."""
    from custody._contract import _methods

    source = inspect.getsource(_calls)
    named = {name for name in _methods() if f'"{name}"' in source}
    named |= {f"ConsentService.{m}" for m in ("CompleteConsent", "ImportConsent", "GetConsent", "RevokeConsent")}
    named |= {f"PaymentService.{m}" for m in ("InitiatePayment", "GetPayment", "ResolvePayment")}

    assert named == set(_methods())


def test_names_are_public_as_they_say() -> None:
    """`custody.__all__` is what can be imported, and importing stubs loads nothing of the client."""
    assert all(hasattr(custody, name) for name in custody.__all__)
    assert sorted(custody.__all__) == list(custody.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        custody.nothing  # noqa: B018
    code = "import custody.v1.consent_pb2, sys; sys.exit(any(m in sys.modules for m in ('custody.client', 'grpc', 'cryptography')))"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )


@pytest.mark.parametrize("vector", VECTORS["sealed"], ids=lambda vector: vector["name"])
def test_sealing_vectors(vector: dict[str, Any]) -> None:
    """The written form opens with the private key, and only bound to the same request: clients of any language agree on it."""
    private = X25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["private_key"]))
    info = _sealing.import_info(owner=vector["owner"], provider=vector["provider"], request_id=vector["request_id"])
    sealed = bytes.fromhex(vector["sealed_tokens"])

    assert info.hex() == vector["info"]
    if vector["opens"]:
        plaintext = _sealing.suite().decrypt(sealed, private, info)
        assert plaintext == vector["plaintext"].encode()
        assert json.loads(plaintext) == vector["tokens"]
    else:
        with pytest.raises(InvalidTag):
            _sealing.suite().decrypt(sealed, private, info)


def test_sealing_makes_what_the_vectors_are() -> None:
    """What this client seals has the written form: 32 bytes of encapsulated key, then the JSON document and a tag."""
    private = X25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["private_key"]))
    info = _sealing.import_info(owner="user:42", provider="providers/x", request_id="r")
    plaintext = _sealing.import_plaintext(access_token="a", refresh_token=None)

    sealed = _sealing.seal(public_key=private.public_key().public_bytes_raw(), info=info, plaintext=plaintext)

    assert plaintext == b'{"access_token": "a"}'
    assert len(sealed) == 32 + len(plaintext) + 16
    assert _sealing.suite().decrypt(sealed, private, info) == plaintext
    assert sealed != _sealing.seal(public_key=private.public_key().public_bytes_raw(), info=info, plaintext=plaintext)


def test_a_suite_that_is_not_known_is_not_sealed_to() -> None:
    """A sidecar that names another suite gets no tokens: the client does not guess."""
    call = _calls.get_import_key()
    response = consent_pb2.GetImportKeyResponse(import_key=consent_pb2.ImportKey(suite="ROT13", public_key=bytes(32)))

    with pytest.raises(ValueError, match="suite"):
        call.read(response)


def test_dates_are_read_as_dates() -> None:
    """A day that is absent is None, not the first day of the year 1."""
    balance = account_pb2.Balance(amount=money_pb2.Money(units=1, currency_code="EUR"))
    assert _reading.balance(balance).reference_date is None
    balance.reference_date.CopyFrom(_calls.date_message(date(2026, 2, 28)))
    assert _reading.balance(balance).reference_date == date(2026, 2, 28)
