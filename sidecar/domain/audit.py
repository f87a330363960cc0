"""What goes on record. The schema is an allow-list: enumerated codes, opaque identifiers and digests, never free text.

A draft says what happens; `sidecar.audit` turns it into a canonical leaf of the log (index, time, chain).
"""

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["AuditDraft", "AuditEvent", "AuditOutcome"]


class AuditEvent(IntEnum):
    """Codes are part of the log's format: never renumber, never reuse."""

    SIDECAR_STARTED = 1
    SIDECAR_STOPPED = 2
    CALL_REFUSED = 3  # identity, policy or validation said no
    CONSENT_CREATED = 10
    CONSENT_AUTHORISATION_STARTED = 11
    CONSENT_CODE_EXCHANGE = 12  # the intent to exchange the code, once
    CONSENT_ACTIVATED = 13
    CONSENT_FAILED = 14
    CONSENT_REVOKED = 15  # unusable here from this entry on
    CONSENT_KEY_DESTROYED = 16
    CONSENT_EXPIRED = 17
    CONSENT_IMPORTED = 18
    CONSENT_NEEDS_REAUTHORISATION = 19
    TOKEN_USE = 30  # a read with an access token
    TOKEN_REFRESH_INTENT = 31
    TOKEN_REFRESHED = 32
    TOKEN_REFRESH_FAILED = 33
    PAYMENT_INTENT = 40
    PAYMENT_DISPATCHED = 41
    PAYMENT_OUTCOME = 42
    PAYMENT_RECONCILING = 43
    PAYMENT_STATUS = 44
    PAYMENT_NEEDS_ATTENTION = 45
    PAYMENT_ABANDONED = 46
    PAYMENT_RESOLVED = 47  # a person's finding; the digest is that of what they wrote
    SIGNATURE_MADE = 60
    KEY_CREATED = 70
    LOG_EXPORTED = 80
    ADMINISTRATION = 81


class AuditOutcome(IntEnum):
    INTENDED = 1
    SUCCEEDED = 2
    REFUSED = 3
    UNKNOWN = 4
    FAILED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditDraft:
    """One thing that is about to happen or has happened.

    `subject` is HMAC-SHA-256 of the owner under the consent's own subject key (32 bytes) or empty; `detail_digest` is
    SHA-256 over the bytes acted upon (32 bytes) or empty. `reason` is the name of an ErrorReason or of a Finding, or empty.
    """

    event: AuditEvent
    outcome: AuditOutcome
    caller: str = ""
    provider: str = ""
    consent: str = ""
    payment: str = ""
    subject: bytes = b""
    epoch: int = 0
    reason: str = ""
    detail_digest: bytes = b""
