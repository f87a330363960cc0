"""What every client of custody does, on every path: blocking and asyncio, over a socket and on the fake in memory.

One suite for all four, so that a test against the fake says something about the sidecar.
"""

import asyncio
import inspect
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

import custody
import pytest
from custody import ErrorReason, Money, PaymentState, Purpose
from custody.testing import FakeCustody
from joserfc import jws
from joserfc.jwk import ECKey

from tests.clients.python.served import served

IBAN = "DE89370400440532013000"
OTHER_IBAN = "AT611904300234573201"
ALL = [Purpose.ACCOUNTS, Purpose.BALANCES, Purpose.TRANSACTIONS, Purpose.PAYMENTS, Purpose.SIGNING]


class Blocking:
    """Shows an asyncio client as a blocking one: awaits what is awaitable, collects what is iterated asynchronously."""

    def __init__(self, target: Any, runner: asyncio.Runner) -> None:
        self._target = target
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return self._wrap(getattr(self._target, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrap(self._target(*args, **kwargs))

    def __iter__(self) -> Iterator[Any]:
        async def collect() -> list[Any]:
            return [item async for item in self._target]

        return iter(self._runner.run(collect()))

    def _wrap(self, value: Any) -> Any:
        if inspect.iscoroutine(value):
            return self._runner.run(value)
        is_ours = type(value).__module__ == "custody.aio" or hasattr(value, "__aiter__")
        return Blocking(value, self._runner) if is_ours or inspect.ismethod(value) else value


@contextmanager
def blocking_on_fake(fake: FakeCustody) -> Iterator[Any]:
    with fake.client(owner="user:42") as client:
        yield client


@contextmanager
def blocking_on_socket(fake: FakeCustody) -> Iterator[Any]:
    with served(fake) as server, custody.Client(server.address, owner="user:42") as client:
        yield client


@contextmanager
def asyncio_on_fake(fake: FakeCustody) -> Iterator[Any]:
    with asyncio.Runner() as runner:
        client = fake.aio_client(owner="user:42")
        yield Blocking(client, runner)
        runner.run(client.close())


@contextmanager
def asyncio_on_socket(fake: FakeCustody) -> Iterator[Any]:
    async def connect(address: str) -> Any:
        return custody.aio.Client(address, owner="user:42")  # made inside the loop that it belongs to

    with served(fake) as server, asyncio.Runner() as runner:
        client = runner.run(connect(server.address))
        yield Blocking(client, runner)
        runner.run(client.close())


PATHS = [blocking_on_fake, blocking_on_socket, asyncio_on_fake, asyncio_on_socket]


@pytest.fixture
def fake() -> FakeCustody:
    return FakeCustody()


@pytest.fixture(params=PATHS, ids=lambda path: path.__name__)
def client(request: pytest.FixtureRequest, fake: FakeCustody) -> Iterator[Any]:
    with request.param(fake) as client:
        yield client


def create(client: Any, fake: FakeCustody, **changes: Any) -> custody.PendingConsent:
    arguments: dict[str, Any] = {
        "provider": fake.provider,
        "purposes": ALL,
        "expire_time": datetime.now(UTC) + timedelta(days=90),
        "redirect_uri": fake.redirect_uri,
    }
    pending: custody.PendingConsent = client.consents.create(**(arguments | changes))
    return pending


def activate(client: Any, fake: FakeCustody, **changes: Any) -> custody.Consent:
    pending = create(client, fake, **changes)
    active: custody.Consent = client.consents.complete(pending.consent.name, fake.approve(pending.authorisation_uri))
    return active


def pay(client: Any, consent: str, **changes: Any) -> custody.Payment:
    arguments: dict[str, Any] = {
        "amount": Money("12.34", "EUR"),
        "creditor_account": IBAN,
        "creditor_name": "Muster AG",
        "remittance_information": "Invoice 7",
        "end_to_end_id": "INV-7",
    }
    payment: custody.Payment = client.payments.initiate(consent, **(arguments | changes))
    return payment


def refusal(act: Callable[[], object], kind: type[custody.CustodyError]) -> custody.CustodyError:
    with pytest.raises(kind) as caught:
        act()
    return caught.value


def test_a_consent_goes_from_request_to_active(client: Any, fake: FakeCustody) -> None:
    """The person approves at the provider; the redirect completes the consent; the request ids come back."""
    psu = custody.PsuContext(ip_address="192.0.2.7", user_agent="Firefox")
    limits = [
        custody.PeriodicLimit(amount=Money("500", "EUR"), period_type=custody.PeriodType.MONTH),
        custody.PeriodicLimit(
            amount=Money("900", "EUR"),
            period_type=custody.PeriodType.HALF_YEAR,
            alignment=custody.PeriodAlignment.CONSENT,
        ),
    ]
    pending = create(
        client, fake, accounts=[IBAN], psu_context=psu, payment_limit=Money("100", "EUR"), periodic_limits=limits
    )

    active = client.consents.complete(pending.consent.name, fake.approve(pending.authorisation_uri))

    assert pending.consent.state is custody.ConsentState.AWAITING_AUTHORISATION
    assert pending.consent.request_id == pending.request_id
    assert active.state is custody.ConsentState.ACTIVE
    assert active.owner == "user:42"
    assert active.purposes == tuple(ALL)
    assert active.accounts == (custody.AccountReference(IBAN),)
    assert active.payment_limit == Money("100.00", "EUR")
    assert active.periodic_limits == tuple(limits)
    assert active.activate_time is not None
    assert active.failure_reason is None
    assert uuid.UUID(active.request_id).version == 4
    assert active.request_id != pending.request_id
    assert client.consents.get(active.name) == active
    assert client.consents.get(active.name).request_id is None


def test_a_denied_consent_has_failed(client: Any, fake: FakeCustody) -> None:
    """When the person says no, the caller learns it, and the consent says why."""
    pending = create(client, fake)

    error = refusal(
        lambda: client.consents.complete(pending.consent.name, fake.deny(pending.authorisation_uri)),
        custody.AuthorisationError,
    )

    assert error.reason == ErrorReason.AUTHORISATION_DENIED
    failed = client.consents.get(pending.consent.name)
    assert failed.state is custody.ConsentState.FAILED
    assert failed.failure_reason == ErrorReason.AUTHORISATION_DENIED


def test_a_foreign_redirect_is_refused_and_the_consent_unharmed(client: Any, fake: FakeCustody) -> None:
    """A state of another consent is refused; the right redirect still completes the consent afterwards."""
    mine, other = create(client, fake), create(client, fake)

    error = refusal(
        lambda: client.consents.complete(mine.consent.name, fake.approve(other.authorisation_uri)),
        custody.RedirectRefusedError,
    )

    assert error.reason == ErrorReason.STATE_MISMATCH
    completed = client.consents.complete(mine.consent.name, fake.approve(mine.authorisation_uri))
    assert completed.state is custody.ConsentState.ACTIVE


def test_a_redirect_with_a_parameter_twice_is_not_sent(client: Any, fake: FakeCustody) -> None:
    """Nobody knows who wrote which: the client refuses before anything is sent."""
    pending = create(client, fake)

    with pytest.raises(ValueError, match="twice"):
        client.consents.complete(pending.consent.name, fake.approve(pending.authorisation_uri) + "&state=x")

    assert client.consents.get(pending.consent.name).state is custody.ConsentState.AWAITING_AUTHORISATION


def test_a_payment_is_made_once_for_one_request_id(client: Any, fake: FakeCustody) -> None:
    """The same request id gets the same payment, as it stands by then; there is one in the list."""
    consent = activate(client, fake).name
    request_id = str(uuid.uuid4())

    first = pay(client, consent, request_id=request_id, debtor_account=OTHER_IBAN)
    again = pay(client, consent, request_id=request_id, debtor_account=OTHER_IBAN)

    assert again.name == first.name
    assert first.request_id == again.request_id == request_id
    assert (first.state, again.state) == (PaymentState.ACCEPTED, PaymentState.SETTLED)
    assert first.amount == Money("12.34", "EUR")
    assert first.creditor_account == custody.AccountReference(IBAN)
    assert first.debtor_account == custody.AccountReference(OTHER_IBAN)
    assert first.product is custody.PaymentProduct.SEPA_CREDIT_TRANSFER
    assert first.authorisation_uri is None
    assert [payment.name for payment in client.payments.list(consent=consent)] == [first.name]


def test_a_request_id_of_another_payment_is_refused(client: Any, fake: FakeCustody) -> None:
    """The same request id with another amount pays nothing; the first one stands."""
    consent = activate(client, fake).name
    first = pay(client, consent)

    error = refusal(
        lambda: pay(client, consent, amount=Money("12.35", "EUR"), request_id=first.request_id),
        custody.RequestIdReusedError,
    )

    assert error.reason == ErrorReason.REQUEST_ID_REUSED
    assert error.request_id == first.request_id
    assert len(list(client.payments.list())) == 1


def test_payments_without_a_request_id_are_two(client: Any, fake: FakeCustody) -> None:
    """The client mints a request id for each call, and never the same."""
    consent = activate(client, fake).name

    first, second = pay(client, consent), pay(client, consent)

    assert first.request_id != second.request_id
    assert first.name != second.name


def test_a_payment_is_followed_to_its_end(client: Any, fake: FakeCustody) -> None:
    """`wait` looks until the state is final, through states in which nothing is known."""
    fake.script_payments(PaymentState.UNKNOWN, PaymentState.IN_PROGRESS, PaymentState.SETTLED)
    payment = pay(client, activate(client, fake).name)

    settled = client.payments.wait(payment.name, timeout_seconds=30)

    assert payment.state is PaymentState.UNKNOWN
    assert settled.state is PaymentState.SETTLED


def test_waiting_ends_with_the_payment_as_it_was_last_seen(client: Any, fake: FakeCustody) -> None:
    """A payment that is not final in time is not failed: the error holds it, and it goes on."""
    fake.script_payments(PaymentState.AWAITING_AUTHORISATION)
    payment = pay(client, activate(client, fake).name)

    with pytest.raises(custody.WaitTimeoutError) as caught:
        client.payments.wait(payment.name, timeout_seconds=0.05)

    assert caught.value.payment.state is PaymentState.AWAITING_AUTHORISATION
    assert caught.value.payment.authorisation_uri is not None
    assert caught.value.request_id == payment.request_id


def test_waiting_until_something_else(client: Any, fake: FakeCustody) -> None:
    """A caller can wait for less than the end, such as for the URI to send the person to."""
    fake.script_payments(PaymentState.IN_PROGRESS, PaymentState.AWAITING_AUTHORISATION)
    payment = pay(client, activate(client, fake).name)

    waiting = client.payments.wait(payment.name, timeout_seconds=30, until=lambda seen: bool(seen.authorisation_uri))

    assert waiting.state is PaymentState.AWAITING_AUTHORISATION


def test_what_a_person_found_out_is_written_down(client: Any, fake: FakeCustody) -> None:
    """Only for a payment that needs attention, once; a repeat gets it again; whoever asked for it sees the state alone."""
    consent = activate(client, fake).name
    fake.script_payments(PaymentState.NEEDS_ATTENTION)
    executed, other = pay(client, consent), pay(client, consent)
    administrator = client.for_owner("")
    found = {"finding": custody.Finding.EXECUTED, "reason": "in the statement", "request_id": str(uuid.uuid4())}

    resolved = administrator.payments.resolve(executed.name, **found)
    again = administrator.payments.resolve(executed.name, **found)
    refused = refusal(
        lambda: administrator.payments.resolve(executed.name, finding=custody.Finding.NOT_EXECUTED, reason="x"),
        custody.PreconditionError,
    )
    rejected = administrator.payments.resolve(other.name, finding=custody.Finding.NOT_EXECUTED, reason="not there")

    assert resolved == again == administrator.payments.get(executed.name)
    assert (resolved.state, rejected.state) == (PaymentState.SETTLED, PaymentState.REJECTED)
    assert (resolved.resolution.finding, resolved.resolution.reason) == (custody.Finding.EXECUTED, "in the statement")
    assert refused.reason == ErrorReason.PAYMENT_NOT_RESOLVABLE
    assert client.payments.get(executed.name).resolution is None
    assert [each.name for each in client.payments.list(states=[PaymentState.SETTLED])] == [executed.name]
    assert list(client.payments.list(states=[PaymentState.UNKNOWN, PaymentState.NEEDS_ATTENTION])) == []


def test_accounts_balances_and_transactions_are_read(client: Any, fake: FakeCustody) -> None:
    """Reads come as values: exact money, dates, kinds."""
    account = fake.add_account(IBAN, owner_name="Eva Muster")
    fake.add_balance(account, Money("-3.10", "EUR"), reference_date=date(2026, 11, 1))
    fake.add_transaction(account, Money("-12.34", "EUR"), booking_date=date(2026, 10, 5), counterparty="Shop")
    fake.add_transaction(account, Money("5", "EUR"), booking_date=None)
    consent = activate(client, fake).name

    (read,) = client.accounts.list(consent)
    (balance,) = client.accounts.balances(consent, read.name)
    entries = client.accounts.transactions(consent, read.name, date_from=date(2026, 10, 1))
    both = client.accounts.transactions(
        consent, read.name, date_from=date(2026, 10, 1), date_to=date(2026, 10, 31), booking=custody.BookingFilter.BOTH
    )

    assert (read.name, read.iban, read.owner_name) == (account, IBAN, "Eva Muster")
    assert balance.amount == Money("-3.10", "EUR")
    assert balance.kind is custody.BalanceKind.INTERIM_AVAILABLE
    assert balance.reference_date == date(2026, 11, 1)
    assert balance.change_time is None
    assert balance.credit_limit_included is None
    (entry,) = entries
    assert (entry.amount, entry.booking_date, entry.creditor_name) == (
        Money("-12.34", "EUR"),
        date(2026, 10, 5),
        "Shop",
    )
    assert [each.booking_status for each in both] == [custody.BookingStatus.BOOKED, custody.BookingStatus.PENDING]


def test_lists_are_gone_through_page_by_page(client: Any, fake: FakeCustody) -> None:
    """Iterating fetches as many pages as it needs; `pages` shows them; a second iteration begins anew."""
    fake.entries_per_page = 3
    account = fake.add_account(IBAN)
    for number in range(7):
        fake.add_transaction(account, Money(number + 1, "EUR"), booking_date=date(2026, 10, 5))
    consent = activate(client, fake).name
    entries = client.accounts.transactions(consent, account, date_from=date(2026, 1, 1))

    amounts = [int(entry.amount.amount) for entry in entries]
    sizes = [len(page.items) for page in entries.pages()]

    assert amounts == [1, 2, 3, 4, 5, 6, 7]
    assert sizes == [3, 3, 1]
    assert len(list(entries)) == 7


def test_a_revoked_consent_is_of_no_use(client: Any, fake: FakeCustody) -> None:
    """After revocation every use is refused, and the consent is still listed as what it was."""
    consent = activate(client, fake).name

    revoked = client.consents.revoke(consent)
    error = refusal(lambda: pay(client, consent), custody.ConsentUnusableError)

    assert revoked.state is custody.ConsentState.REVOKED
    assert revoked.revoke_time is not None
    assert error.reason == ErrorReason.CONSENT_REVOKED
    assert [each.state for each in client.consents.list()] == [custody.ConsentState.REVOKED]
    assert client.consents.revoke(consent).state is custody.ConsentState.REVOKED


def test_another_owners_consent_is_not_found(client: Any, fake: FakeCustody) -> None:
    """Whoever acts for another person sees nothing: not the consent, not its payments."""
    consent = activate(client, fake).name
    payment = pay(client, consent)
    other = client.for_owner("user:43")

    assert refusal(lambda: other.consents.get(consent), custody.NotFoundError).reason == ErrorReason.CONSENT_NOT_FOUND
    assert refusal(lambda: pay(other, consent), custody.NotFoundError).reason == ErrorReason.CONSENT_NOT_FOUND
    assert (
        refusal(lambda: other.payments.get(payment.name), custody.NotFoundError).reason == ErrorReason.PAYMENT_NOT_FOUND
    )
    assert list(other.consents.list()) == []
    assert client.consents.get(consent, owner="user:42").name == consent


def test_an_owner_is_needed_to_act(client: Any, fake: FakeCustody) -> None:
    """Without an owner, given or by default, nothing is sent that acts for one."""
    nobody = client.for_owner("")

    with pytest.raises(ValueError, match="owner is missing"):
        create(nobody, fake)


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        (["pending"], ErrorReason.CONSENT_NOT_ACTIVE),
        (["needs"], ErrorReason.CONSENT_NEEDS_REAUTHORISATION),
    ],
)
def test_unusable_consents_say_why(client: Any, fake: FakeCustody, states: list[str], reason: str) -> None:
    """The reason tells what to ask of the person."""
    if states == ["pending"]:
        consent = create(client, fake).consent.name
    else:
        consent = activate(client, fake).name
        fake.need_reauthorisation(consent)

    assert refusal(lambda: pay(client, consent), custody.ConsentUnusableError).reason == reason


def test_a_consent_that_needs_its_owner_tells_how_long_it_goes_on(client: Any, fake: FakeCustody) -> None:
    """It pays on until then, and says so; one whose time is over says that too."""
    going_on, over = activate(client, fake).name, activate(client, fake).name
    fake.need_reauthorisation(going_on, usable_seconds=60)
    fake.need_reauthorisation(over)
    now = datetime.now(UTC)

    assert client.consents.get(going_on).state is custody.ConsentState.NEEDS_REAUTHORISATION
    assert client.consents.get(going_on).usable_until_time > now
    assert client.consents.get(over).usable_until_time <= now
    assert client.payments.get(pay(client, going_on).name).consent == going_on
    refusal(lambda: pay(client, over), custody.ConsentUnusableError)


def test_purposes_limits_and_accounts_hold(client: Any, fake: FakeCustody) -> None:
    """A consent is good for what it was given for, and not beyond."""
    account = fake.add_account(OTHER_IBAN)
    reading = activate(client, fake, purposes=[Purpose.ACCOUNTS]).name
    small = activate(client, fake, payment_limit=Money("12.33", "EUR")).name
    narrow = activate(client, fake, accounts=[IBAN]).name

    assert (
        refusal(lambda: pay(client, reading), custody.ConsentUnusableError).reason == ErrorReason.PURPOSE_NOT_CONSENTED
    )
    assert refusal(lambda: pay(client, small), custody.LimitExceededError).reason == ErrorReason.LIMIT_EXCEEDED
    refused = refusal(lambda: client.accounts.balances(narrow, account), custody.ConsentUnusableError)
    assert refused.reason == ErrorReason.ACCOUNT_NOT_CONSENTED
    unknown = refusal(lambda: client.accounts.balances(narrow, "accounts/none"), custody.NotFoundError)
    assert unknown.reason == ErrorReason.ACCOUNT_NOT_FOUND
    assert pay(client, small, amount=Money("12.33", "EUR")).state is PaymentState.ACCEPTED


@pytest.mark.parametrize(
    ("changes", "field", "rule"),
    [
        ({"creditor_name": "Müller"}, "creditor_name", "STRING_PATTERN"),
        ({"creditor_name": "x" * 71}, "creditor_name", "STRING_MAX_LEN"),
        ({"creditor_account": "DE00"}, "creditor_account.iban", "STRING_PATTERN"),
        ({"creditor_account": "DE88370400440532013000"}, "creditor_account.iban", "IBAN_CHECK_DIGITS"),
        ({"remittance_information": "a\nb"}, "remittance_information", "STRING_PATTERN"),
        ({"debtor_account": "DE00"}, "debtor_account.iban", "STRING_PATTERN"),
        ({"request_id": "1"}, "request_id", "STRING_PATTERN"),
        ({"amount": Money("-1", "EUR")}, "amount", "MONEY_AMOUNT"),
        ({"amount": Money("0", "EUR")}, "amount", "MONEY_AMOUNT"),
    ],
)
def test_a_bad_field_is_named_and_nothing_paid(
    client: Any, fake: FakeCustody, changes: dict[str, Any], field: str, rule: str
) -> None:
    """The error names the field and the rule, does not echo the value, and no payment exists."""
    consent = activate(client, fake).name

    error = refusal(lambda: pay(client, consent, **changes), custody.InvalidRequestError)

    assert error.reason == ErrorReason.FIELD_INVALID
    assert [(each.field, each.rule) for each in error.field_violations] == [(field, rule)]
    assert field in str(error)
    assert not [
        value for value in changes.values() if isinstance(value, str) and len(value) > 3 and value in str(error)
    ]
    assert list(client.payments.list()) == []


def test_tokens_are_imported_sealed(client: Any, fake: FakeCustody) -> None:
    """A consent held elsewhere comes into custody and works; the tokens are in no answer and no error."""
    arguments: dict[str, Any] = {
        "provider": fake.provider,
        "purposes": [Purpose.PAYMENTS],
        "expire_time": datetime.now(UTC) + timedelta(days=90),
        "access_expire_time": datetime.now(UTC) + timedelta(minutes=5),
    }

    imported = client.consents.import_consent(**arguments, access_token="CANARY-A", refresh_token="CANARY-R")
    refused = refusal(
        lambda: client.consents.import_consent(**arguments, access_token="", refresh_token="CANARY-R"),
        custody.InvalidRequestError,
    )

    assert imported.state is custody.ConsentState.ACTIVE
    assert pay(client, imported.name).state is PaymentState.ACCEPTED
    assert "CANARY" not in repr(imported) + repr(client.consents.get(imported.name))
    assert refused.reason == ErrorReason.IMPORT_REFUSED
    assert "CANARY" not in repr(refused) + str(refused)


def test_a_signature_verifies_elsewhere(client: Any, fake: FakeCustody) -> None:
    """An independent library verifies the detached signature under the listed key, and no other document under it."""
    consent = activate(client, fake).name
    document = json.dumps({"invoice": 7}).encode()

    signature = client.signing.sign(consent, document, payload_kind=custody.PayloadKind.JSON_DOCUMENT)

    (key,) = client.signing.verification_keys()
    public = ECKey.import_key(key.to_jwk())
    assert key.name == signature.key
    assert jws.detach_content(signature.detached_jws) == signature.detached_jws
    assert verifies(signature.detached_jws, document, public)
    assert not verifies(signature.detached_jws, document + b" ", public)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (custody.PayloadKind.JSON_DOCUMENT, b'{"a": [1]}', [b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff"]),
        (custody.PayloadKind.XML_DOCUMENT, b"<a>b</a>", [b"<a>", b"<!DOCTYPE a><a/>", b"text"]),
        (custody.PayloadKind.TEXT_DOCUMENT, "schön\n".encode(), [b"\x00", b"\xff", b"\x1b[0m"]),
    ],
)
def test_a_document_is_what_it_is_said_to_be(
    client: Any, fake: FakeCustody, kind: custody.PayloadKind, good: bytes, bad: list[bytes]
) -> None:
    """Nothing is signed under a wrong name: the payload is held to its kind."""
    consent = activate(client, fake).name

    assert client.signing.sign(consent, good, payload_kind=kind).detached_jws
    for payload in bad:
        sign = lambda payload=payload: client.signing.sign(consent, payload, payload_kind=kind)  # noqa: E731
        error = refusal(sign, custody.InvalidRequestError)
        assert [each.field for each in error.field_violations] == ["payload"]


def verifies(detached: str, document: bytes, key: ECKey) -> bool:
    try:
        header, _, signature = detached.split(".")
        payload = jws.serialize_compact({"alg": "ES256"}, document, ECKey.generate_key("P-256")).split(".")[1]
        jws.deserialize_compact(f"{header}.{payload}.{signature}", key)
    except Exception:  # noqa: BLE001 — any refusal is a refusal
        return False
    return True


def test_providers_are_listed(client: Any, fake: FakeCustody) -> None:
    """A provider tells what it can do and where it may send people back to."""
    (provider,) = client.providers.list()

    assert provider == client.providers.get(fake.provider)
    assert fake.redirect_uri in provider.redirect_uris
    assert provider.max_consent_duration == timedelta(days=180)
    assert custody.PaymentProduct.INSTANT_SEPA_CREDIT_TRANSFER in provider.payment_products
    assert refusal(lambda: client.providers.get("providers/none"), custody.NotFoundError).reason == "PROVIDER_NOT_FOUND"


def test_administration_reads(client: Any, fake: FakeCustody) -> None:
    """Status, keys, log and export come as values too."""
    consent = activate(client, fake).name

    status = client.keys.status()
    (key,) = client.keys.list()
    newest = next(iter(client.audit.entries(consent=consent, newest_first=True)))
    exported = b"".join(client.audit.export())

    assert status.ready
    assert status.consent_counts == {custody.ConsentState.ACTIVE: 1}
    assert status.processes[0].state == "READY"
    assert (key.purpose, key.state, key.attributes) == ("ROOT", "ACTIVE", {"CKA_EXTRACTABLE": False})
    assert (newest.event, newest.outcome, newest.consent) == ("CONSENT_ACTIVATED", "SUCCEEDED", consent)
    assert client.audit.checkpoint() is None
    assert consent.encode() in exported


def test_passing_failures_are_tried_again(client: Any, fake: FakeCustody) -> None:
    """Two times unavailable, then answered: the caller notices nothing, and there is one payment."""
    consent = activate(client, fake).name
    fake.fail_next(ErrorReason.HSM_UNAVAILABLE, times=2, method="PaymentService.InitiatePayment")

    assert pay(client, consent).state is PaymentState.ACCEPTED

    assert len(list(client.payments.list())) == 1


def test_lasting_failures_come_out_with_the_request_id(client: Any, fake: FakeCustody) -> None:
    """When it does not pass, the error says with which request id to ask again, and asking again pays once."""
    consent = activate(client, fake).name
    request_id = str(uuid.uuid4())
    fake.fail_next(ErrorReason.STORE_UNAVAILABLE, times=4, method="PaymentService.InitiatePayment")

    error = refusal(lambda: pay(client, consent, request_id=request_id), custody.UnavailableError)
    payment = pay(client, consent, request_id=error.request_id)

    assert error.reason == ErrorReason.STORE_UNAVAILABLE
    assert error.request_id == payment.request_id == request_id
    assert error.retry_after_seconds == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (ErrorReason.INTERNAL, custody.InternalError),
        (ErrorReason.RATE_LIMITED, custody.RateLimitedError),
        (ErrorReason.DEADLINE_TOO_SHORT, custody.DeadlineExceededError),
        (ErrorReason.ENVELOPE_CORRUPT, custody.DataLossError),
        (ErrorReason.POLICY_REFUSED, custody.PermissionDeniedError),
        (ErrorReason.CALLER_UNKNOWN, custody.UnauthenticatedError),
        (ErrorReason.PROVIDER_REFUSED, custody.ProviderRefusedError),
        (ErrorReason.MESSAGE_TOO_LARGE, custody.InvalidRequestError),
    ],
)
def test_other_failures_are_not_tried_again(client: Any, fake: FakeCustody, reason: ErrorReason, kind: type) -> None:
    """Only unavailability is repeated: one failure of another kind is enough to reach the caller."""
    consent = activate(client, fake).name
    fake.fail_next(reason, method="PaymentService.InitiatePayment")

    error = refusal(lambda: pay(client, consent), kind)

    assert error.reason == reason
    assert type(error) is kind


def test_ready(client: Any) -> None:
    """A sidecar that serves is ready at once."""
    client.wait_ready(timeout_seconds=20)
