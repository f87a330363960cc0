"""Rows become values here and nowhere else, one mapper a table.

Rule: a row that holds a state, kind or format that is not known is Corrupt(ENVELOPE_CORRUPT); nothing is guessed or left out.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache, wraps
from typing import Any, TypeVar

from sidecar.domain.consent import AccountReference, Consent, ConsentState, Purpose
from sidecar.domain.ids import ConsentId, OwnerId, PaymentId, ProviderId, RequestId, WorkloadId
from sidecar.domain.limits import PeriodAlignment, PeriodicLimit, PeriodType
from sidecar.domain.money import EXPONENTS, Money
from sidecar.domain.payment import (
    Finding,
    IdempotencyClass,
    Payment,
    PaymentInstruction,
    PaymentProduct,
    PaymentState,
    Resolution,
)
from sidecar.domain.secrets import SealedSecret, SecretKind
from sidecar.errors import Corrupt, Internal
from sidecar.ports import Claim, MasterKeyRecord, RefreshLease
from sidecar.store.statements import Row, Value

__all__ = [
    "claim_of",
    "consent_of",
    "consent_row",
    "corrupt",
    "from_microseconds",
    "lease_of",
    "master_key_of",
    "payment_of",
    "payment_row",
    "secret_of",
    "to_microseconds",
]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

T = TypeVar("T")


def corrupt() -> Corrupt:
    return Corrupt("ENVELOPE_CORRUPT", "a stored row holds what this version does not know; it is not acted upon")


def _checked(mapper: Callable[[Row], T]) -> Callable[[Row], T]:
    @wraps(mapper)
    def checked(row: Row) -> T:
        try:
            return mapper(row)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise corrupt() from error

    return checked


def to_microseconds(moment: datetime) -> int:
    """UTC microseconds since 1970. Raises Internal for a time without zone: it would be a guess."""
    if moment.tzinfo is None:
        raise Internal("a time without time zone cannot be stored")
    return (moment - _EPOCH) // _MICROSECOND


def from_microseconds(value: int) -> datetime:
    return _EPOCH + timedelta(microseconds=value)


def consent_row(consent: Consent) -> dict[str, Value]:
    limit = consent.payment_limit
    return {
        "id": consent.id,
        "caller": consent.caller,
        "owner": consent.owner,
        "provider": consent.provider,
        "purposes": json.dumps(sorted(consent.purposes)),
        "accounts": json.dumps([[account.iban, account.currency_code] for account in consent.accounts]),
        "state": consent.state.value,
        "subject_key": consent.subject_key,
        "redirect_uri": consent.redirect_uri,
        "create_time": to_microseconds(consent.create_time),
        "expire_time": to_microseconds(consent.expire_time),
        "payment_limit_currency": limit.currency_code if limit else None,
        "payment_limit_minor_units": limit.minor_units if limit else None,
        "provider_consent_id": consent.provider_consent_id,
        "state_digest": consent.state_digest,
        "authorisation_uri": consent.authorisation_uri,
        "wrapped_data_key": consent.wrapped_data_key,
        "access_expire_time": _optional_time(consent.access_expire_time),
        "access_issue_time": _optional_time(consent.access_issue_time),
        "activate_time": _optional_time(consent.activate_time),
        "revoke_time": _optional_time(consent.revoke_time),
        "failure_reason": consent.failure_reason,
        "version": consent.version,
        "refresh_time": _optional_time(consent.refresh_time),
        "periodic_limits": json.dumps([_limit_row(each) for each in consent.periodic_limits]),
    }


@_checked
def consent_of(row: Row) -> Consent:
    (
        identifier,
        caller,
        owner,
        provider,
        purposes,
        accounts,
        state,
        subject_key,
        redirect_uri,
        create_time,
        expire_time,
        limit_currency,
        limit_minor_units,
        provider_consent_id,
        state_digest,
        authorisation_uri,
        wrapped_data_key,
        access_expire_time,
        access_issue_time,
        activate_time,
        revoke_time,
        failure_reason,
        version,
        refresh_time,
        periodic_limits,
    ) = row
    return Consent(
        id=ConsentId(identifier),
        caller=WorkloadId(caller),
        owner=OwnerId(owner),
        provider=ProviderId(provider),
        purposes=_purposes(purposes),
        accounts=tuple(_account(account) for account in _list(accounts)),
        state=ConsentState(state),
        subject_key=subject_key,
        redirect_uri=redirect_uri,
        create_time=from_microseconds(create_time),
        expire_time=from_microseconds(expire_time),
        payment_limit=None if limit_currency is None else _money(limit_currency, limit_minor_units),
        provider_consent_id=provider_consent_id,
        state_digest=state_digest,
        authorisation_uri=authorisation_uri,
        wrapped_data_key=wrapped_data_key,
        access_expire_time=_time_or_none(access_expire_time),
        access_issue_time=_time_or_none(access_issue_time),
        activate_time=_time_or_none(activate_time),
        revoke_time=_time_or_none(revoke_time),
        failure_reason=failure_reason,
        version=version,
        refresh_time=_time_or_none(refresh_time),
        periodic_limits=tuple(_periodic_limit(each) for each in _list(periodic_limits)),
    )


def payment_row(payment: Payment) -> dict[str, Value]:
    instruction, resolution = payment.instruction, payment.resolution
    return {
        "id": payment.id,
        "caller": payment.caller,
        "request_id": payment.request_id,
        "consent": payment.consent,
        "owner": payment.owner,
        "provider": payment.provider,
        "amount_currency": instruction.amount.currency_code,
        "amount_minor_units": instruction.amount.minor_units,
        "creditor_iban": instruction.creditor_account.iban,
        "creditor_currency": instruction.creditor_account.currency_code,
        "creditor_name": instruction.creditor_name,
        "debtor_iban": instruction.debtor_account.iban,
        "debtor_currency": instruction.debtor_account.currency_code,
        "product": instruction.product.value,
        "remittance_information": instruction.remittance_information,
        "end_to_end_id": instruction.end_to_end_id,
        "state": payment.state.value,
        "idempotency_class": payment.idempotency_class.value,
        "bank_key": payment.bank_key,
        "create_time": to_microseconds(payment.create_time),
        "update_time": to_microseconds(payment.update_time),
        "epoch": payment.epoch,
        "attempts": payment.attempts,
        "rendered_request": payment.rendered_request,
        "dispatch_boot_id": payment.dispatch_boot_id,
        "dispatch_boot_time_ns": payment.dispatch_boot_time_ns,
        "dispatch_time": _optional_time(payment.dispatch_time),
        "send_deadline_time": _optional_time(payment.send_deadline_time),
        "next_attempt_time": _optional_time(payment.next_attempt_time),
        "provider_payment_id": payment.provider_payment_id,
        "provider_status": payment.provider_status,
        "authorisation_uri": payment.authorisation_uri,
        "status_reason": payment.status_reason,
        "resolution_finding": resolution.finding.value if resolution else None,
        "resolution_reason": resolution.reason if resolution else None,
        "resolution_administrator": resolution.administrator if resolution else None,
        "resolve_time": to_microseconds(resolution.resolve_time) if resolution else None,
    }


@_checked
def payment_of(row: Row) -> Payment:
    (
        identifier,
        caller,
        request_id,
        consent,
        owner,
        provider,
        amount_currency,
        amount_minor_units,
        creditor_iban,
        creditor_currency,
        creditor_name,
        debtor_iban,
        debtor_currency,
        product,
        remittance_information,
        end_to_end_id,
        state,
        idempotency_class,
        bank_key,
        create_time,
        update_time,
        epoch,
        attempts,
        rendered_request,
        dispatch_boot_id,
        dispatch_boot_time_ns,
        dispatch_time,
        send_deadline_time,
        next_attempt_time,
        provider_payment_id,
        provider_status,
        authorisation_uri,
        status_reason,
        *resolution,
    ) = row
    return Payment(
        id=PaymentId(identifier),
        caller=WorkloadId(caller),
        request_id=RequestId(request_id),
        consent=ConsentId(consent),
        owner=OwnerId(owner),
        provider=ProviderId(provider),
        instruction=PaymentInstruction(
            amount=_money(amount_currency, amount_minor_units),
            creditor_account=AccountReference(iban=creditor_iban, currency_code=creditor_currency),
            creditor_name=creditor_name,
            debtor_account=AccountReference(iban=debtor_iban, currency_code=debtor_currency),
            product=PaymentProduct(product),
            remittance_information=remittance_information,
            end_to_end_id=end_to_end_id,
        ),
        state=PaymentState(state),
        idempotency_class=IdempotencyClass(idempotency_class),
        bank_key=bank_key,
        create_time=from_microseconds(create_time),
        update_time=from_microseconds(update_time),
        epoch=epoch,
        attempts=attempts,
        rendered_request=rendered_request,
        dispatch_boot_id=dispatch_boot_id,
        dispatch_boot_time_ns=dispatch_boot_time_ns,
        dispatch_time=_time_or_none(dispatch_time),
        send_deadline_time=_time_or_none(send_deadline_time),
        next_attempt_time=_time_or_none(next_attempt_time),
        provider_payment_id=provider_payment_id,
        provider_status=provider_status,
        authorisation_uri=authorisation_uri,
        status_reason=status_reason,
        resolution=_resolution(*resolution),
    )


@_checked
def lease_of(row: Row) -> RefreshLease:
    epoch, expire_time, unresolved_since = row
    return RefreshLease(
        epoch=epoch, expire_time=from_microseconds(expire_time), unresolved_since=_time_or_none(unresolved_since)
    )


@_checked
def secret_of(row: Row) -> SealedSecret:
    kind, row_version, sealed = row
    return SealedSecret(kind=SecretKind(kind), row_version=row_version, sealed=sealed)


@_checked
def claim_of(row: Row) -> Claim:
    caller, request_id, method, digest, resource = row
    return Claim(
        caller=WorkloadId(caller), request_id=RequestId(request_id), method=method, digest=digest, resource=resource
    )


@_checked
def master_key_of(row: Row) -> MasterKeyRecord:
    version, key_id, wrapped, root_key_id, current, create_time = row
    return MasterKeyRecord(
        key_id=key_id,
        version=version,
        wrapped=wrapped,
        root_key_id=root_key_id,
        current={0: False, 1: True}[current],
        create_time=from_microseconds(create_time),
    )


def _optional_time(moment: datetime | None) -> int | None:
    return None if moment is None else to_microseconds(moment)


def _time_or_none(value: int | None) -> datetime | None:
    return None if value is None else from_microseconds(value)


def _money(currency_code: str, minor_units: int) -> Money:
    if currency_code not in EXPONENTS or not isinstance(minor_units, int):
        raise ValueError("not an amount in a known currency")
    return Money(currency_code=currency_code, minor_units=minor_units)


def _list(text: str) -> list[Any]:
    values = json.loads(text)
    if not isinstance(values, list):
        raise TypeError("not a list")
    return values


def _resolution(finding: str | None, reason: str, administrator: str, resolve_time: int) -> Resolution | None:
    if finding is None:
        return None
    return Resolution(
        finding=Finding(finding),
        reason=reason,
        administrator=WorkloadId(administrator),
        resolve_time=from_microseconds(resolve_time),
    )


def _limit_row(limit: PeriodicLimit) -> list[str | int]:
    return [limit.period_type.value, limit.alignment.value, limit.amount.currency_code, limit.amount.minor_units]


def _periodic_limit(value: object) -> PeriodicLimit:
    if not isinstance(value, list):
        raise TypeError("not a limit")
    period_type, alignment, currency_code, minor_units = value
    return PeriodicLimit(
        amount=_money(currency_code, minor_units),
        period_type=PeriodType(period_type),
        alignment=PeriodAlignment(alignment),
    )


@lru_cache(maxsize=64)  # a handful of texts, read with every consent
def _purposes(text: str) -> frozenset[Purpose]:
    return frozenset(Purpose(purpose) for purpose in _list(text))


def _account(value: object) -> AccountReference:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str) for part in value):
        raise ValueError("not an account")
    return AccountReference(iban=value[0], currency_code=value[1])
