"""Writes every call of the contract: the request, and how its answer reads. Pure, and so the same for both clients.

A request_id is minted here, once per call, and lives in the request from then on: whatever repeats the call repeats the id.
"""

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qsl, urlsplit

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.type import date_pb2, money_pb2

from custody import _reading, _sealing, values
from custody.money import Money
from custody.v1 import (
    account_pb2,
    account_reference_pb2,
    audit_pb2,
    consent_pb2,
    key_pb2,
    payment_pb2,
    periodic_limit_pb2,
    provider_pb2,
    psu_context_pb2,
    purpose_pb2,
    signing_pb2,
)
from custody.values import (
    AccountReference,
    BookingFilter,
    Finding,
    PayloadKind,
    PaymentProduct,
    PaymentState,
    PeriodAlignment,
    PeriodicLimit,
    PeriodType,
    PsuContext,
    Purpose,
)

__all__ = ["Call", "Page", "PagedCall", "date_message", "money_message"]

T = TypeVar("T")
ItemT = TypeVar("ItemT")

_REDIRECT_PARAMETERS = ("code", "state", "iss", "error", "error_description")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One call: the method `Service.Method`, its request, and what makes a value of the answer."""

    method: str
    request: Message
    read: Callable[[Any], T]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[ItemT]):
    """One page of a list; `next_page_token` is empty on the last."""

    items: tuple[ItemT, ...]
    next_page_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCall(Generic[ItemT]):
    """A list: `page(token)` is the call for one page of it."""

    page: Callable[[str], Call[Page[ItemT]]]


def create_consent(
    *,
    owner: str,
    provider: str,
    purposes: Iterable[Purpose],
    accounts: Iterable[AccountReference | str],
    expire_time: datetime,
    redirect_uri: str,
    psu_context: PsuContext | None,
    payment_limit: Money | None,
    periodic_limits: Iterable[PeriodicLimit],
    request_id: str | None,
) -> Call[values.PendingConsent]:
    """CreateConsent."""
    request = consent_pb2.CreateConsentRequest(
        owner=owner,
        provider=provider,
        purposes=[_purpose(purpose) for purpose in purposes],
        accounts=[_reference(account) for account in accounts],
        expire_time=_timestamp(expire_time),
        redirect_uri=redirect_uri,
        psu_context=_psu(psu_context),
        payment_limit=_optional_money(payment_limit),
        periodic_limits=[_periodic_limit(limit) for limit in periodic_limits],
        request_id=request_id or _new_request_id(),
    )

    def read(response: consent_pb2.CreateConsentResponse) -> values.PendingConsent:
        consent = _reading.consent(response.consent, request_id=request.request_id)
        uri = response.authorisation_uri
        return values.PendingConsent(consent=consent, authorisation_uri=uri, request_id=request.request_id)

    return Call(method="ConsentService.CreateConsent", request=request, read=read)


def complete_consent(
    *, consent: str, owner: str, parameters: dict[str, str], request_id: str | None
) -> Call[values.Consent]:
    """CompleteConsent."""
    request = consent_pb2.CompleteConsentRequest(
        consent=consent,
        owner=owner,
        request_id=request_id or _new_request_id(),
        code=parameters.get("code", ""),
        state=parameters.get("state", ""),
        iss=parameters.get("iss", ""),
        error=parameters.get("error", ""),
        error_description=parameters.get("error_description", ""),
    )
    return _consent_call("CompleteConsent", request, request.request_id)


def redirect_parameters(redirected_to: str) -> dict[str, str]:
    """Read the parameters of a redirect from the URI that the person came back to.

    Raises ValueError when a parameter comes twice, since then it is not clear who wrote which.
    """
    pairs = parse_qsl(urlsplit(redirected_to).query, keep_blank_values=True, max_num_fields=100)
    known = [(name, value) for name, value in pairs if name in _REDIRECT_PARAMETERS]
    if len(known) != len(dict(known)):
        raise ValueError("a parameter of the redirect comes twice")
    return dict(known)


def get_import_key() -> Call[consent_pb2.ImportKey]:
    """GetImportKey. Refuses a key of a suite that this client does not know."""

    def read(response: consent_pb2.GetImportKeyResponse) -> consent_pb2.ImportKey:
        if response.import_key.suite != _sealing.SUITE_NAME:
            raise ValueError("the import key is for an HPKE suite that this client does not know")
        return response.import_key

    return Call(method="ConsentService.GetImportKey", request=consent_pb2.GetImportKeyRequest(), read=read)


def import_consent(
    import_key: consent_pb2.ImportKey,
    *,
    owner: str,
    provider: str,
    purposes: Iterable[Purpose],
    accounts: Iterable[AccountReference | str],
    expire_time: datetime,
    access_token: str,
    refresh_token: str | None,
    access_expire_time: datetime,
    provider_consent_id: str,
    payment_limit: Money | None,
    periodic_limits: Iterable[PeriodicLimit],
    request_id: str | None,
) -> Call[values.Consent]:
    """ImportConsent. The tokens are sealed here and are nowhere else in the call."""
    request_id = request_id or _new_request_id()
    sealed_tokens = _sealing.seal(
        public_key=import_key.public_key,
        info=_sealing.import_info(owner=owner, provider=provider, request_id=request_id),
        plaintext=_sealing.import_plaintext(access_token=access_token, refresh_token=refresh_token),
    )
    request = consent_pb2.ImportConsentRequest(
        owner=owner,
        provider=provider,
        purposes=[_purpose(purpose) for purpose in purposes],
        accounts=[_reference(account) for account in accounts],
        expire_time=_timestamp(expire_time),
        access_expire_time=_timestamp(access_expire_time),
        payment_limit=_optional_money(payment_limit),
        periodic_limits=[_periodic_limit(limit) for limit in periodic_limits],
        provider_consent_id=provider_consent_id,
        import_key_id=import_key.key_id,
        sealed_tokens=sealed_tokens,
        request_id=request_id,
    )
    return _consent_call("ImportConsent", request, request_id)


def get_consent(*, consent: str, owner: str) -> Call[values.Consent]:
    """GetConsent."""
    return _consent_call("GetConsent", consent_pb2.GetConsentRequest(consent=consent, owner=owner), None)


def revoke_consent(*, consent: str, owner: str, request_id: str | None) -> Call[values.Consent]:
    """RevokeConsent."""
    request = consent_pb2.RevokeConsentRequest(consent=consent, owner=owner, request_id=request_id or _new_request_id())
    return _consent_call("RevokeConsent", request, request.request_id)


def list_consents(*, owner: str, page_size: int) -> PagedCall[values.Consent]:
    """ListConsents."""

    def page(token: str) -> Call[Page[values.Consent]]:
        request = consent_pb2.ListConsentsRequest(owner=owner, page_size=page_size, page_token=token)
        return _page_call("ConsentService.ListConsents", request, "consents", _reading.consent)

    return PagedCall(page=page)


def initiate_payment(
    *,
    consent: str,
    owner: str,
    amount: Money,
    creditor_account: AccountReference | str,
    creditor_name: str,
    product: PaymentProduct,
    remittance_information: str,
    end_to_end_id: str,
    debtor_account: AccountReference | str | None,
    psu_context: PsuContext | None,
    request_id: str | None,
) -> Call[values.Payment]:
    """InitiatePayment."""
    request = payment_pb2.InitiatePaymentRequest(
        consent=consent,
        owner=owner,
        request_id=request_id or _new_request_id(),
        amount=money_message(amount),
        debtor_account=None if debtor_account is None else _reference(debtor_account),
        creditor_account=_reference(creditor_account),
        creditor_name=creditor_name,
        remittance_information=remittance_information,
        end_to_end_id=end_to_end_id,
        product=payment_pb2.PaymentProduct.Value(f"PAYMENT_PRODUCT_{PaymentProduct(product)}"),
        psu_context=_psu(psu_context),
    )
    return _payment_call("InitiatePayment", request)


def get_payment(*, payment: str, owner: str) -> Call[values.Payment]:
    """GetPayment."""
    return _payment_call("GetPayment", payment_pb2.GetPaymentRequest(payment=payment, owner=owner))


def list_payments(
    *, owner: str, consent: str, states: Iterable[PaymentState], page_size: int
) -> PagedCall[values.Payment]:
    """ListPayments."""
    wanted = [payment_pb2.Payment.State.Value(f"STATE_{PaymentState(state)}") for state in states]

    def page(token: str) -> Call[Page[values.Payment]]:
        request = payment_pb2.ListPaymentsRequest(
            owner=owner, consent=consent, states=wanted, page_size=page_size, page_token=token
        )
        return _page_call("PaymentService.ListPayments", request, "payments", _reading.payment)

    return PagedCall(page=page)


def resolve_payment(*, payment: str, finding: Finding, reason: str, request_id: str | None) -> Call[values.Payment]:
    """ResolvePayment."""
    request = payment_pb2.ResolvePaymentRequest(
        payment=payment,
        finding=payment_pb2.PaymentResolution.Finding.Value(f"FINDING_{Finding(finding)}"),
        reason=reason,
        request_id=request_id or _new_request_id(),
    )
    return _payment_call("ResolvePayment", request)


def list_accounts(*, consent: str, owner: str, psu_context: PsuContext | None) -> Call[tuple[values.Account, ...]]:
    """ListAccounts."""
    request = account_pb2.ListAccountsRequest(consent=consent, owner=owner, psu_context=_psu(psu_context))

    def read(response: account_pb2.ListAccountsResponse) -> tuple[values.Account, ...]:
        return tuple(_reading.account(account) for account in response.accounts)

    return Call(method="AccountService.ListAccounts", request=request, read=read)


def list_balances(
    *, consent: str, owner: str, account: str, psu_context: PsuContext | None
) -> Call[tuple[values.Balance, ...]]:
    """ListBalances."""
    request = account_pb2.ListBalancesRequest(
        consent=consent, owner=owner, account=account, psu_context=_psu(psu_context)
    )

    def read(response: account_pb2.ListBalancesResponse) -> tuple[values.Balance, ...]:
        return tuple(_reading.balance(balance) for balance in response.balances)

    return Call(method="AccountService.ListBalances", request=request, read=read)


def list_transactions(
    *,
    consent: str,
    owner: str,
    account: str,
    date_from: date,
    date_to: date | None,
    booking: BookingFilter,
    psu_context: PsuContext | None,
) -> PagedCall[values.Transaction]:
    """ListTransactions."""
    filters = account_pb2.ListTransactionsRequest.BookingFilter

    def page(token: str) -> Call[Page[values.Transaction]]:
        request = account_pb2.ListTransactionsRequest(
            consent=consent,
            owner=owner,
            account=account,
            date_from=date_message(date_from),
            date_to=None if date_to is None else date_message(date_to),
            booking_filter=filters.Value(f"BOOKING_FILTER_{BookingFilter(booking)}"),
            psu_context=_psu(psu_context),
            page_token=token,
        )
        return _page_call("AccountService.ListTransactions", request, "transactions", _reading.transaction)

    return PagedCall(page=page)


def sign(
    *, consent: str, owner: str, payload: bytes, payload_kind: PayloadKind, request_id: str | None
) -> Call[values.Signature]:
    """Sign."""
    request = signing_pb2.SignRequest(
        consent=consent,
        owner=owner,
        request_id=request_id or _new_request_id(),
        payload_kind=signing_pb2.PayloadKind.Value(f"PAYLOAD_KIND_{PayloadKind(payload_kind)}"),
        payload=payload,
    )

    def read(response: signing_pb2.SignResponse) -> values.Signature:
        return values.Signature(
            detached_jws=response.detached_jws,
            key=response.key,
            algorithm=response.algorithm,
            request_id=request.request_id,
        )

    return Call(method="SigningService.Sign", request=request, read=read)


def list_verification_keys() -> Call[tuple[values.VerificationKey, ...]]:
    """ListVerificationKeys."""

    def read(response: signing_pb2.ListVerificationKeysResponse) -> tuple[values.VerificationKey, ...]:
        return tuple(_reading.verification_key(key) for key in response.verification_keys)

    request = signing_pb2.ListVerificationKeysRequest()
    return Call(method="SigningService.ListVerificationKeys", request=request, read=read)


def get_provider(*, provider: str) -> Call[values.Provider]:
    """GetProvider."""
    request = provider_pb2.GetProviderRequest(provider=provider)

    def read(response: provider_pb2.GetProviderResponse) -> values.Provider:
        return _reading.provider(response.provider)

    return Call(method="ProviderService.GetProvider", request=request, read=read)


def list_providers(*, page_size: int) -> PagedCall[values.Provider]:
    """ListProviders."""

    def page(token: str) -> Call[Page[values.Provider]]:
        request = provider_pb2.ListProvidersRequest(page_size=page_size, page_token=token)
        return _page_call("ProviderService.ListProviders", request, "providers", _reading.provider)

    return PagedCall(page=page)


def get_status() -> Call[values.Status]:
    """GetStatus."""

    def read(response: key_pb2.GetStatusResponse) -> values.Status:
        return _reading.status(response.status)

    return Call(method="KeyService.GetStatus", request=key_pb2.GetStatusRequest(), read=read)


def list_keys() -> Call[tuple[values.Key, ...]]:
    """ListKeys."""

    def read(response: key_pb2.ListKeysResponse) -> tuple[values.Key, ...]:
        return tuple(_reading.key(key) for key in response.keys)

    return Call(method="KeyService.ListKeys", request=key_pb2.ListKeysRequest(), read=read)


def list_entries(*, consent: str, payment: str, newest_first: bool, page_size: int) -> PagedCall[values.AuditEntry]:
    """ListEntries."""

    def page(token: str) -> Call[Page[values.AuditEntry]]:
        request = audit_pb2.ListEntriesRequest(
            consent=consent, payment=payment, newest_first=newest_first, page_size=page_size, page_token=token
        )
        return _page_call("AuditService.ListEntries", request, "entries", _reading.audit_entry)

    return PagedCall(page=page)


def get_checkpoint() -> Call[values.Checkpoint | None]:
    """GetCheckpoint; None while the log has none."""

    def read(response: audit_pb2.GetCheckpointResponse) -> values.Checkpoint | None:
        return _reading.checkpoint(response.checkpoint) if response.HasField("checkpoint") else None

    return Call(method="AuditService.GetCheckpoint", request=audit_pb2.GetCheckpointRequest(), read=read)


def export_log() -> Call[bytes]:
    """ExportLog: a stream, each message of which reads as the next bytes of the file."""

    def read(response: audit_pb2.ExportLogResponse) -> bytes:
        return response.chunk

    return Call(method="AuditService.ExportLog", request=audit_pb2.ExportLogRequest(), read=read)


def _consent_call(method: str, request: Message, request_id: str | None) -> Call[values.Consent]:
    def read(response: Any) -> values.Consent:  # noqa: ANN401 — the answers share the field, and no type
        return _reading.consent(response.consent, request_id=request_id)

    return Call(method=f"ConsentService.{method}", request=request, read=read)


def _payment_call(method: str, request: Message) -> Call[values.Payment]:
    def read(response: Any) -> values.Payment:  # noqa: ANN401 — the answers share the field, and no type
        return _reading.payment(response.payment)

    return Call(method=f"PaymentService.{method}", request=request, read=read)


def _page_call(method: str, request: Message, field: str, read_item: Callable[[Any], ItemT]) -> Call[Page[ItemT]]:
    def read(response: Any) -> Page[ItemT]:  # noqa: ANN401 — the answers share the field, and no type
        items = tuple(read_item(item) for item in getattr(response, field))
        return Page(items=items, next_page_token=response.next_page_token)

    return Call(method=method, request=request, read=read)


def _new_request_id() -> str:
    return str(uuid.uuid4())


def _purpose(purpose: Purpose) -> purpose_pb2.Purpose.ValueType:
    return purpose_pb2.Purpose.Value(f"PURPOSE_{Purpose(purpose)}")


def _reference(account: AccountReference | str) -> account_reference_pb2.AccountReference:
    if isinstance(account, str):
        account = AccountReference(account)
    return account_reference_pb2.AccountReference(iban=account.iban, currency_code=account.currency_code)


def _psu(psu: PsuContext | None) -> psu_context_pb2.PsuContext | None:
    if psu is None:
        return None
    return psu_context_pb2.PsuContext(ip_address=psu.ip_address, user_agent=psu.user_agent)


def _periodic_limit(limit: PeriodicLimit) -> periodic_limit_pb2.PeriodicLimit:
    return periodic_limit_pb2.PeriodicLimit(
        amount=money_message(limit.amount),
        period_type=periodic_limit_pb2.PeriodType.Value(f"PERIOD_TYPE_{PeriodType(limit.period_type)}"),
        alignment=periodic_limit_pb2.PeriodAlignment.Value(f"PERIOD_ALIGNMENT_{PeriodAlignment(limit.alignment)}"),
    )


def _optional_money(money: Money | None) -> money_pb2.Money | None:
    return None if money is None else money_message(money)


def money_message(money: Money) -> money_pb2.Money:
    """Write an amount as google.type.Money."""
    if not isinstance(money, Money):
        raise TypeError('money is a custody.Money, such as Money("12.34", "EUR")')
    units, nanos = money.units_and_nanos()
    return money_pb2.Money(units=units, nanos=nanos, currency_code=money.currency_code)


def _timestamp(time: datetime) -> Timestamp:
    if time.tzinfo is None:
        raise ValueError("a time needs its time zone: datetime.now(UTC), not datetime.now()")
    timestamp = Timestamp()
    timestamp.FromDatetime(time.astimezone(UTC))
    return timestamp


def date_message(day: date) -> date_pb2.Date:
    """Write a day as google.type.Date."""
    return date_pb2.Date(year=day.year, month=day.month, day=day.day)
