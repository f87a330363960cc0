"""The client's values as plain ones: the JSON contract of custodyctl. Pure. Tests hold each document to a golden file.

Times are RFC 3339 in UTC with milliseconds, amounts are decimal text, names are those of the contract. What is not there is null.
What could let somebody in (authorisation addresses) is left out.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from custody.money import Money
    from custody.values import AccountReference, AuditEntry, Consent, Key, Payment, PaymentResolution, Status

__all__ = [
    "consent_document",
    "document",
    "entry_document",
    "key_document",
    "payment_document",
    "status_document",
    "timestamp",
]

Plain = dict[str, Any]  # values that JSON knows


def document(kind: str, **members: Any) -> Plain:  # noqa: ANN401 (plain values)
    """A document of the contract: what it is and in which version stands first."""
    return {"schema": f"custodyctl.{kind}/1", **members}


def timestamp(time: datetime | None) -> str | None:
    """RFC 3339, UTC, milliseconds."""
    if time is None:
        return None
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def status_document(status: "Status") -> Plain:
    """What GetStatus says."""
    return {
        "version": status.version,
        "cluster": status.cluster,
        "instance": status.instance,
        "uptime_seconds": int(status.uptime.total_seconds()),
        "ready": status.ready,
        "processes": [
            {
                "process": each.process,
                "state": each.state,
                "restart_count": each.restart_count,
                "start_time": timestamp(each.start_time),
            }
            for each in status.processes
        ],
        "hsm_token": _token(status),
        "root_key": status.root_key or None,
        "master_key": status.master_key or None,
        "master_key_version": status.master_key_version or None,
        "log": {
            "origin": status.log.origin,
            "entry_count": status.log.entry_count,
            "checkpoint_size": status.log.checkpoint_size,
            "checkpoint_time": timestamp(status.log.checkpoint_time),
        },
        "consent_counts": {state.value: count for state, count in status.consent_counts.items()},
    }


def key_document(key: "Key") -> Plain:
    """One key, without anything secret: there is nothing secret in the answer."""
    return {
        "name": key.name,
        "label": key.label,
        "purpose": key.purpose,
        "algorithm": key.algorithm,
        "state": key.state,
        "version": key.version or None,
        "attributes": dict(sorted(key.attributes.items())),
        "public_key_pem": key.public_key_pem or None,
    }


def consent_document(consent: "Consent") -> Plain:
    """One consent."""
    return {
        "name": consent.name,
        "owner": consent.owner,
        "provider": consent.provider,
        "state": consent.state.value,
        "failure_reason": consent.failure_reason,
        "usable_until_time": timestamp(consent.usable_until_time),
        "purposes": [purpose.value for purpose in consent.purposes],
        "accounts": [_account(each) for each in consent.accounts],
        "payment_limit": _money(consent.payment_limit),
        "periodic_limits": [
            {"amount": _money(each.amount), "period_type": each.period_type.value, "alignment": each.alignment.value}
            for each in consent.periodic_limits
        ],
        "create_time": timestamp(consent.create_time),
        "activate_time": timestamp(consent.activate_time),
        "expire_time": timestamp(consent.expire_time),
        "access_expire_time": timestamp(consent.access_expire_time),
        "revoke_time": timestamp(consent.revoke_time),
    }


def payment_document(payment: "Payment") -> Plain:
    """One payment."""
    return {
        "name": payment.name,
        "consent": payment.consent,
        "owner": payment.owner,
        "request_id": payment.request_id,
        "state": payment.state.value,
        "product": payment.product.value,
        "amount": _money(payment.amount),
        "debtor_account": None if payment.debtor_account is None else _account(payment.debtor_account),
        "creditor_account": _account(payment.creditor_account),
        "creditor_name": payment.creditor_name,
        "remittance_information": payment.remittance_information or None,
        "end_to_end_id": payment.end_to_end_id or None,
        "provider_status": payment.provider_status or None,
        "status_reason": payment.status_reason or None,
        "create_time": timestamp(payment.create_time),
        "update_time": timestamp(payment.update_time),
        "resolution": _resolution(payment.resolution),
    }


def entry_document(entry: "AuditEntry") -> Plain:
    """One entry of the log; digests are hexadecimal."""
    return {
        "index": entry.index,
        "create_time": timestamp(entry.create_time),
        "event": entry.event,
        "outcome": entry.outcome,
        "caller": entry.caller or None,
        "provider": entry.provider or None,
        "consent": entry.consent or None,
        "payment": entry.payment or None,
        "epoch": entry.epoch,
        "reason": entry.reason or None,
        "subject": entry.subject.hex() or None,
        "detail_digest": entry.detail_digest.hex() or None,
    }


def _token(status: "Status") -> Mapping[str, Any] | None:
    token = status.hsm_token
    if token is None:
        return None
    return {
        "label": token.label,
        "serial": token.serial,
        "model": token.model,
        "module": token.module,
        "logged_in": token.logged_in,
        "user_pin_count_low": token.user_pin_count_low,
        "user_pin_final_try": token.user_pin_final_try,
        "user_pin_locked": token.user_pin_locked,
    }


def _resolution(resolution: "PaymentResolution | None") -> Plain | None:
    if resolution is None:
        return None
    return {
        "finding": resolution.finding.value,
        "reason": resolution.reason,
        "administrator": resolution.administrator,
        "resolve_time": timestamp(resolution.resolve_time),
    }


def _money(money: "Money | None") -> Plain | None:
    return None if money is None else {"amount": str(money.amount), "currency_code": money.currency_code}


def _account(account: "AccountReference") -> Plain:
    return {"iban": account.iban, "currency_code": account.currency_code or None}
