"""Reads the answers of the contract into values. Pure."""

from collections.abc import Iterable
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Protocol, TypeVar

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.type import date_pb2, money_pb2

from custody import values
from custody.money import Money
from custody.v1 import (
    account_pb2,
    account_reference_pb2,
    audit_pb2,
    consent_pb2,
    errors_pb2,
    key_pb2,
    payment_pb2,
    periodic_limit_pb2,
    provider_pb2,
    purpose_pb2,
    signing_pb2,
)

_E = TypeVar("_E", bound=StrEnum)


class _GeneratedEnum(Protocol):
    """An enum of the contract, of which we need the names."""

    @property
    def DESCRIPTOR(self) -> EnumDescriptor:  # noqa: N802 — the generated name
        """The values by number."""


def consent(message: consent_pb2.Consent, *, request_id: str | None = None) -> values.Consent:
    """Read a consent; `request_id` is that of the call, None for reads."""
    reason = errors_pb2.ErrorReason.Name(message.failure_reason) if message.failure_reason else ""
    return values.Consent(
        name=message.name,
        owner=message.owner,
        provider=message.provider,
        purposes=_purposes(message.purposes),
        accounts=tuple(_reference(account) for account in message.accounts),
        state=_enum(values.ConsentState, consent_pb2.Consent.State, message.state),
        failure_reason=reason.removeprefix("ERROR_REASON_") or None,
        payment_limit=_money(message.payment_limit) if message.HasField("payment_limit") else None,
        periodic_limits=tuple(_periodic_limit(limit) for limit in message.periodic_limits),
        create_time=_time(message.create_time),
        activate_time=_optional_time(message, "activate_time"),
        expire_time=_time(message.expire_time),
        access_expire_time=_optional_time(message, "access_expire_time"),
        revoke_time=_optional_time(message, "revoke_time"),
        usable_until_time=_optional_time(message, "usable_until_time"),
        request_id=request_id,
    )


def payment(message: payment_pb2.Payment) -> values.Payment:
    """Read a payment."""
    has_debtor = message.HasField("debtor_account")
    return values.Payment(
        name=message.name,
        consent=message.consent,
        owner=message.owner,
        request_id=message.request_id,
        state=_enum(values.PaymentState, payment_pb2.Payment.State, message.state),
        amount=_money(message.amount),
        debtor_account=_reference(message.debtor_account) if has_debtor else None,
        creditor_account=_reference(message.creditor_account),
        creditor_name=message.creditor_name,
        remittance_information=message.remittance_information,
        end_to_end_id=message.end_to_end_id,
        product=_enum(values.PaymentProduct, payment_pb2.PaymentProduct, message.product),
        authorisation_uri=message.authorisation_uri or None,
        provider_status=message.provider_status,
        status_reason=message.status_reason,
        create_time=_time(message.create_time),
        update_time=_time(message.update_time),
        resolution=_resolution(message.resolution) if message.HasField("resolution") else None,
    )


def account(message: account_pb2.Account) -> values.Account:
    """Read an account."""
    return values.Account(
        name=message.name,
        iban=message.iban,
        currency_code=message.currency_code,
        owner_name=message.owner_name,
        display_name=message.display_name,
        product=message.product,
        account_type=message.account_type,
    )


def balance(message: account_pb2.Balance) -> values.Balance:
    """Read a balance."""
    return values.Balance(
        kind=_enum(values.BalanceKind, account_pb2.Balance.Kind, message.kind),
        amount=_money(message.amount),
        reference_date=_optional_date(message.reference_date),
        change_time=_optional_time(message, "change_time"),
        credit_limit_included=message.credit_limit_included if message.HasField("credit_limit_included") else None,
    )


def transaction(message: account_pb2.Transaction) -> values.Transaction:
    """Read an entry."""
    return values.Transaction(
        transaction_id=message.transaction_id,
        entry_reference=message.entry_reference,
        booking_status=_enum(values.BookingStatus, account_pb2.Transaction.BookingStatus, message.booking_status),
        amount=_money(message.amount),
        booking_date=_optional_date(message.booking_date),
        value_date=_optional_date(message.value_date),
        creditor_name=message.creditor_name,
        creditor_account=_reference(message.creditor_account) if message.HasField("creditor_account") else None,
        debtor_name=message.debtor_name,
        debtor_account=_reference(message.debtor_account) if message.HasField("debtor_account") else None,
        remittance_information=message.remittance_information,
        end_to_end_id=message.end_to_end_id,
    )


def verification_key(message: signing_pb2.VerificationKey) -> values.VerificationKey:
    """Read a public key."""
    return values.VerificationKey(
        name=message.name,
        key_id=message.key_id,
        key_type=message.key_type,
        algorithm=message.algorithm,
        curve=message.curve,
        x=message.x,
        y=message.y,
    )


def provider(message: provider_pb2.Provider) -> values.Provider:
    """Read a provider."""
    products = payment_pb2.PaymentProduct
    return values.Provider(
        name=message.name,
        display_name=message.display_name,
        standard=message.standard,
        region_code=message.region_code,
        purposes=_purposes(message.purposes),
        payment_products=tuple(_enum(values.PaymentProduct, products, each) for each in message.payment_products),
        redirect_uris=tuple(message.redirect_uris),
        max_consent_duration=message.max_consent_duration.ToTimedelta(),
    )


def status(message: key_pb2.Status) -> values.Status:
    """Read how the sidecar is."""
    states = consent_pb2.Consent.State
    return values.Status(
        version=message.version,
        instance=message.instance,
        cluster=message.cluster,
        uptime=message.uptime.ToTimedelta(),
        ready=message.ready,
        processes=tuple(_process(each) for each in message.processes),
        hsm_token=_hsm_token(message.hsm_token) if message.HasField("hsm_token") else None,
        root_key=message.root_key,
        master_key=message.master_key,
        master_key_version=message.master_key_version,
        log=_log_status(message.log),
        consent_counts={_enum(values.ConsentState, states, c.state): c.consent_count for c in message.consent_counts},
    )


def key(message: key_pb2.Key) -> values.Key:
    """Read a key."""
    return values.Key(
        name=message.name,
        label=message.label,
        purpose=_name(key_pb2.Key.Purpose, message.purpose),
        algorithm=message.algorithm,
        attributes={attribute.name: attribute.value for attribute in message.attributes},
        public_key_pem=message.public_key_pem,
        state=_name(key_pb2.Key.State, message.state),
        version=message.version,
    )


def audit_entry(message: audit_pb2.AuditEntry) -> values.AuditEntry:
    """Read an entry of the log."""
    return values.AuditEntry(
        index=message.index,
        create_time=_time(message.create_time),
        event=message.event,
        outcome=_name(audit_pb2.AuditEntry.Outcome, message.outcome),
        caller=message.caller,
        provider=message.provider,
        consent=message.consent,
        payment=message.payment,
        epoch=message.epoch,
        reason=message.reason,
        subject=message.subject,
        detail_digest=message.detail_digest,
    )


def checkpoint(message: audit_pb2.Checkpoint) -> values.Checkpoint:
    """Read a checkpoint."""
    return values.Checkpoint(
        signed_note=message.signed_note,
        size=message.size,
        root_hash=message.root_hash,
        create_time=_time(message.create_time),
    )


def _periodic_limit(message: periodic_limit_pb2.PeriodicLimit) -> values.PeriodicLimit:
    return values.PeriodicLimit(
        amount=_money(message.amount),
        period_type=_enum(values.PeriodType, periodic_limit_pb2.PeriodType, message.period_type),
        alignment=_enum(values.PeriodAlignment, periodic_limit_pb2.PeriodAlignment, message.alignment),
    )


def _resolution(message: payment_pb2.PaymentResolution) -> values.PaymentResolution:
    return values.PaymentResolution(
        finding=_enum(values.Finding, payment_pb2.PaymentResolution.Finding, message.finding),
        reason=message.reason,
        administrator=message.administrator,
        resolve_time=_time(message.resolve_time),
    )


def _process(message: key_pb2.Process) -> values.Process:
    return values.Process(
        process=message.process,
        state=_name(key_pb2.Process.State, message.state),
        restart_count=message.restart_count,
        start_time=_optional_time(message, "start_time"),
    )


def _hsm_token(message: key_pb2.HsmToken) -> values.HsmToken:
    return values.HsmToken(
        label=message.label,
        serial=message.serial,
        model=message.model,
        module=message.module,
        logged_in=message.logged_in,
        user_pin_count_low=message.user_pin_count_low,
        user_pin_final_try=message.user_pin_final_try,
        user_pin_locked=message.user_pin_locked,
    )


def _log_status(message: key_pb2.LogStatus) -> values.LogStatus:
    return values.LogStatus(
        origin=message.origin,
        entry_count=message.entry_count,
        checkpoint_size=message.checkpoint_size,
        checkpoint_time=_optional_time(message, "checkpoint_time"),
    )


def _purposes(numbers: Iterable[int]) -> tuple[values.Purpose, ...]:
    return tuple(_enum(values.Purpose, purpose_pb2.Purpose, number) for number in numbers)


def _enum(enum: type[_E], generated: _GeneratedEnum, number: int) -> _E:
    """Read an enum value; one that either side does not know is UNRECOGNISED."""
    name = _name(generated, number)
    return enum(name) if name in enum.__members__ else enum("UNRECOGNISED")


def _name(generated: _GeneratedEnum, number: int) -> str:
    """The value's name without the enum's prefix, which is that of its value 0: PREFIX_UNSPECIFIED."""
    by_number = generated.DESCRIPTOR.values_by_number
    prefix: str = by_number[0].name.removesuffix("UNSPECIFIED")
    return by_number[number].name.removeprefix(prefix) if number in by_number else "UNRECOGNISED"


def _reference(message: account_reference_pb2.AccountReference) -> values.AccountReference:
    return values.AccountReference(iban=message.iban, currency_code=message.currency_code)


def _money(message: money_pb2.Money) -> Money:
    return Money.received(units=message.units, nanos=message.nanos, currency_code=message.currency_code)


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)


def _optional_time(message: Message, field: str) -> datetime | None:
    return _time(getattr(message, field)) if message.HasField(field) else None


def _optional_date(message: date_pb2.Date) -> date | None:
    return date(message.year, message.month, message.day) if message.year else None
