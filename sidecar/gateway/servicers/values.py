"""Between the contract's messages and the domain's values: the only place that knows both."""

from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import cast

from custody.v1 import (
    account_pb2,
    account_reference_pb2,
    consent_pb2,
    errors_pb2,
    payment_pb2,
    periodic_limit_pb2,
    psu_context_pb2,
    purpose_pb2,
)
from google.protobuf.timestamp_pb2 import Timestamp
from google.type import date_pb2, money_pb2

from sidecar.domain.account import Account, Balance, BookingStatus, PsuContext, Transaction
from sidecar.domain.consent import AccountReference, Consent, ConsentState, Purpose
from sidecar.domain.ids import resource_name
from sidecar.domain.limits import PeriodAlignment, PeriodicLimit, PeriodType
from sidecar.domain.money import EXPONENTS, Money, money_from_units
from sidecar.domain.payment import Finding, Payment, PaymentProduct, PaymentState, Resolution

__all__ = [
    "FINDINGS",
    "PRODUCTS",
    "PURPOSES",
    "account_message",
    "account_reference",
    "balance_message",
    "consent_message",
    "date_value",
    "datetime_value",
    "money_message",
    "money_value",
    "payment_message",
    "payment_states",
    "periodic_limits",
    "psu_value",
    "timestamp",
    "transaction_message",
]

PURPOSES: dict[int, Purpose] = {
    purpose_pb2.PURPOSE_ACCOUNTS: Purpose.ACCOUNTS,
    purpose_pb2.PURPOSE_BALANCES: Purpose.BALANCES,
    purpose_pb2.PURPOSE_TRANSACTIONS: Purpose.TRANSACTIONS,
    purpose_pb2.PURPOSE_PAYMENTS: Purpose.PAYMENTS,
    purpose_pb2.PURPOSE_SIGNING: Purpose.SIGNING,
}
PURPOSE_NUMBERS = {purpose: cast(purpose_pb2.Purpose.ValueType, number) for number, purpose in PURPOSES.items()}
PRODUCTS: dict[int, PaymentProduct] = {
    payment_pb2.PAYMENT_PRODUCT_SEPA_CREDIT_TRANSFER: PaymentProduct.SEPA_CREDIT_TRANSFER,
    payment_pb2.PAYMENT_PRODUCT_INSTANT_SEPA_CREDIT_TRANSFER: PaymentProduct.INSTANT_SEPA_CREDIT_TRANSFER,
}
PRODUCT_NUMBERS = {product: cast(payment_pb2.PaymentProduct.ValueType, number) for number, product in PRODUCTS.items()}

_C = consent_pb2.Consent
CONSENT_STATES = {
    # the authorisation has not begun; the caller repeats CreateConsent with the same request id
    ConsentState.CREATED: _C.STATE_AWAITING_AUTHORISATION,
    ConsentState.AWAITING_AUTHORISATION: _C.STATE_AWAITING_AUTHORISATION,
    ConsentState.COMPLETING: _C.STATE_COMPLETING,
    ConsentState.ACTIVE: _C.STATE_ACTIVE,
    ConsentState.NEEDS_REAUTHORISATION: _C.STATE_NEEDS_REAUTHORISATION,
    ConsentState.REVOKED: _C.STATE_REVOKED,
    ConsentState.EXPIRED: _C.STATE_EXPIRED,
    ConsentState.FAILED: _C.STATE_FAILED,
}
_P = payment_pb2.Payment
_PAYMENT_STATES = {
    PaymentState.INTENT: _P.STATE_IN_PROGRESS,
    PaymentState.DISPATCHED: _P.STATE_IN_PROGRESS,
    PaymentState.RECONCILING: _P.STATE_UNKNOWN,
    PaymentState.AWAITING_AUTHORISATION: _P.STATE_AWAITING_AUTHORISATION,
    PaymentState.ACCEPTED: _P.STATE_ACCEPTED,
    PaymentState.SETTLED: _P.STATE_SETTLED,
    PaymentState.REJECTED: _P.STATE_REJECTED,
    PaymentState.REJECTED_LATE: _P.STATE_REJECTED,
    PaymentState.CANCELLED: _P.STATE_CANCELLED,
    PaymentState.ABANDONED: _P.STATE_REJECTED,  # nothing was ever sent
    PaymentState.NEEDS_ATTENTION: _P.STATE_NEEDS_ATTENTION,
}
_R = payment_pb2.PaymentResolution
FINDINGS = {_R.FINDING_EXECUTED: Finding.EXECUTED, _R.FINDING_NOT_EXECUTED: Finding.NOT_EXECUTED}
_FINDING_NUMBERS = {finding: number for number, finding in FINDINGS.items()}
_L = periodic_limit_pb2
_PERIOD_TYPES = {
    _L.PERIOD_TYPE_DAY: PeriodType.DAY,
    _L.PERIOD_TYPE_WEEK: PeriodType.WEEK,
    _L.PERIOD_TYPE_FORTNIGHT: PeriodType.FORTNIGHT,
    _L.PERIOD_TYPE_MONTH: PeriodType.MONTH,
    _L.PERIOD_TYPE_HALF_YEAR: PeriodType.HALF_YEAR,
    _L.PERIOD_TYPE_YEAR: PeriodType.YEAR,
}
_PERIOD_TYPE_NUMBERS = {period_type: number for number, period_type in _PERIOD_TYPES.items()}
_ALIGNMENTS = {
    _L.PERIOD_ALIGNMENT_CALENDAR: PeriodAlignment.CALENDAR,
    _L.PERIOD_ALIGNMENT_CONSENT: PeriodAlignment.CONSENT,
}
_ALIGNMENT_NUMBERS = {alignment: number for number, alignment in _ALIGNMENTS.items()}
_B = account_pb2.Balance
_BALANCE_KINDS = {
    "closingBooked": _B.KIND_CLOSING_BOOKED,
    "expected": _B.KIND_EXPECTED,
    "openingBooked": _B.KIND_OPENING_BOOKED,
    "interimAvailable": _B.KIND_INTERIM_AVAILABLE,
    "interimBooked": _B.KIND_INTERIM_BOOKED,
    "forwardAvailable": _B.KIND_FORWARD_AVAILABLE,
    "nonInvoiced": _B.KIND_NON_INVOICED,
}
BOOKING_FILTERS = {
    account_pb2.ListTransactionsRequest.BOOKING_FILTER_UNSPECIFIED: BookingStatus.BOOKED,
    account_pb2.ListTransactionsRequest.BOOKING_FILTER_BOOKED: BookingStatus.BOOKED,
    account_pb2.ListTransactionsRequest.BOOKING_FILTER_PENDING: BookingStatus.PENDING,
    account_pb2.ListTransactionsRequest.BOOKING_FILTER_BOTH: BookingStatus.BOTH,
}
_NANOS = 1_000_000_000

# --- from the contract --------------------------------------------------------------------------------------------------


def money_value(message: money_pb2.Money, *, field: str) -> Money:
    return money_from_units(message.currency_code, message.units, message.nanos, field=field)


def account_reference(message: account_reference_pb2.AccountReference) -> AccountReference:
    return AccountReference(iban=message.iban, currency_code=message.currency_code)


def periodic_limits(messages: Sequence[periodic_limit_pb2.PeriodicLimit]) -> tuple[PeriodicLimit, ...]:
    return tuple(
        PeriodicLimit(
            amount=money_value(message.amount, field=f"periodic_limits[{index}].amount"),
            period_type=_PERIOD_TYPES[message.period_type],
            alignment=_ALIGNMENTS[message.alignment],
        )
        for index, message in enumerate(messages)
    )


def payment_states(numbers: Sequence[int]) -> frozenset[PaymentState] | None:
    """All states of ours that callers are told of as one of these; None, which is any, where none is given."""
    return frozenset(state for state, number in _PAYMENT_STATES.items() if number in numbers) if numbers else None


def psu_value(message: psu_context_pb2.PsuContext, *, present: bool) -> PsuContext | None:
    return PsuContext(ip_address=message.ip_address, user_agent=message.user_agent) if present else None


def datetime_value(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)


def date_value(message: date_pb2.Date) -> date | None:
    """None where no date was given; the rules on the field have refused what is no date."""
    return date(message.year, message.month, message.day) if message.year else None


# --- to the contract ----------------------------------------------------------------------------------------------------


def consent_message(consent: Consent) -> consent_pb2.Consent:
    message = consent_pb2.Consent(
        name=resource_name("consents", consent.id),
        owner=consent.owner,
        provider=resource_name("providers", consent.provider),
        purposes=sorted(PURPOSE_NUMBERS[purpose] for purpose in consent.purposes),
        accounts=[_reference_message(account) for account in consent.accounts],
        state=CONSENT_STATES[consent.state],
        failure_reason=_reason_number(consent.failure_reason),
        create_time=timestamp(consent.create_time),
        activate_time=timestamp(consent.activate_time),
        expire_time=timestamp(consent.expire_time),
        access_expire_time=timestamp(consent.access_expire_time),
        revoke_time=timestamp(consent.revoke_time),
        periodic_limits=[_periodic_limit_message(limit) for limit in consent.periodic_limits],
    )
    if consent.payment_limit:
        message.payment_limit.CopyFrom(money_message(consent.payment_limit))
    if consent.state is ConsentState.NEEDS_REAUTHORISATION and consent.access_expire_time is not None:
        message.usable_until_time.FromDatetime(consent.access_expire_time)
    return message


def payment_message(payment: Payment, *, to_administrator: bool = False) -> payment_pb2.Payment:
    """What a person found out, in whose words, is told to administrators only."""
    instruction = payment.instruction
    return payment_pb2.Payment(
        name=resource_name("payments", payment.id),
        consent=resource_name("consents", payment.consent),
        owner=payment.owner,
        request_id=payment.request_id,
        state=_PAYMENT_STATES[payment.state],
        amount=money_message(instruction.amount),
        debtor_account=_reference_message(instruction.debtor_account),
        creditor_account=_reference_message(instruction.creditor_account),
        creditor_name=instruction.creditor_name,
        remittance_information=instruction.remittance_information,
        end_to_end_id=instruction.end_to_end_id,
        product=PRODUCT_NUMBERS[instruction.product],
        authorisation_uri=payment.authorisation_uri,
        provider_status=payment.provider_status,
        status_reason=payment.status_reason,
        create_time=timestamp(payment.create_time),
        update_time=timestamp(payment.update_time),
        resolution=_resolution_message(payment.resolution) if payment.resolution and to_administrator else None,
    )


def account_message(account: Account) -> account_pb2.Account:
    return account_pb2.Account(
        name=resource_name("accounts", account.resource_id),
        iban=account.iban,
        currency_code=account.currency_code,
        owner_name=account.owner_name,
        display_name=account.display_name,
        product=account.product,
        account_type=account.cash_account_type,
    )


def balance_message(balance: Balance) -> account_pb2.Balance:
    return account_pb2.Balance(
        kind=_BALANCE_KINDS.get(balance.balance_type, _B.KIND_OTHER),
        amount=money_message(balance.amount),
        reference_date=_date_message(balance.reference_date),
        change_time=timestamp(balance.last_change_time),
        credit_limit_included=balance.credit_limit_included,
    )


def transaction_message(transaction: Transaction) -> account_pb2.Transaction:
    status = account_pb2.Transaction
    return account_pb2.Transaction(
        transaction_id=transaction.transaction_id,
        entry_reference=transaction.entry_reference,
        booking_status=status.BOOKING_STATUS_PENDING if transaction.pending else status.BOOKING_STATUS_BOOKED,
        amount=money_message(transaction.amount),
        booking_date=_date_message(transaction.booking_date),
        value_date=_date_message(transaction.value_date),
        creditor_name=transaction.creditor_name,
        creditor_account=_iban_message(transaction.creditor_iban),
        debtor_name=transaction.debtor_name,
        debtor_account=_iban_message(transaction.debtor_iban),
        remittance_information=transaction.remittance_information,
        end_to_end_id=transaction.end_to_end_id,
    )


def money_message(money: Money) -> money_pb2.Money:
    """google.type.Money: units and nanos have the same sign."""
    nanos_in_minor_unit = _NANOS // 10 ** EXPONENTS[money.currency_code]
    total = money.minor_units * nanos_in_minor_unit
    units = int(Decimal(total) / _NANOS)
    return money_pb2.Money(currency_code=money.currency_code, units=units, nanos=total - units * _NANOS)


def timestamp(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message


def _date_message(value: date | None) -> date_pb2.Date | None:
    return date_pb2.Date(year=value.year, month=value.month, day=value.day) if value else None


def _periodic_limit_message(limit: PeriodicLimit) -> periodic_limit_pb2.PeriodicLimit:
    return periodic_limit_pb2.PeriodicLimit(
        amount=money_message(limit.amount),
        period_type=_PERIOD_TYPE_NUMBERS[limit.period_type],
        alignment=_ALIGNMENT_NUMBERS[limit.alignment],
    )


def _resolution_message(resolution: Resolution) -> payment_pb2.PaymentResolution:
    return payment_pb2.PaymentResolution(
        finding=_FINDING_NUMBERS[resolution.finding],
        reason=resolution.reason,
        administrator=resolution.administrator,
        resolve_time=timestamp(resolution.resolve_time),
    )


def _reference_message(account: AccountReference) -> account_reference_pb2.AccountReference:
    return account_reference_pb2.AccountReference(iban=account.iban, currency_code=account.currency_code)


def _iban_message(iban: str) -> account_reference_pb2.AccountReference | None:
    return account_reference_pb2.AccountReference(iban=iban) if iban else None


def _reason_number(reason: str) -> errors_pb2.ErrorReason.ValueType:
    """Reasons of ours that the contract does not name stay in the log; the consent's state says the rest."""
    value = errors_pb2.ErrorReason.DESCRIPTOR.values_by_name.get(f"ERROR_REASON_{reason}")
    return cast(errors_pb2.ErrorReason.ValueType, value.number if value else 0)
