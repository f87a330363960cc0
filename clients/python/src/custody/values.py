"""What the client takes and answers with: frozen values, no protobuf.

Fields that name people, accounts or what lets somebody in are left out of `repr`, so that a logged value does not give
them away. An enum value that this version does not know reads as UNRECOGNISED.
"""

import base64
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from enum import StrEnum

from custody.money import Money

__all__ = [
    "Account",
    "AccountReference",
    "AuditEntry",
    "Balance",
    "BalanceKind",
    "BookingFilter",
    "BookingStatus",
    "Checkpoint",
    "Consent",
    "ConsentState",
    "Finding",
    "HsmToken",
    "Key",
    "LogStatus",
    "PayloadKind",
    "Payment",
    "PaymentProduct",
    "PaymentResolution",
    "PaymentState",
    "PendingConsent",
    "PeriodAlignment",
    "PeriodType",
    "PeriodicLimit",
    "Process",
    "Provider",
    "PsuContext",
    "Purpose",
    "Signature",
    "Status",
    "Transaction",
    "VerificationKey",
]


class Purpose(StrEnum):
    """What a consent is given for."""

    ACCOUNTS = "ACCOUNTS"
    BALANCES = "BALANCES"
    TRANSACTIONS = "TRANSACTIONS"
    PAYMENTS = "PAYMENTS"
    SIGNING = "SIGNING"
    UNRECOGNISED = "UNRECOGNISED"


class ConsentState(StrEnum):
    """Where a consent stands."""

    AWAITING_AUTHORISATION = "AWAITING_AUTHORISATION"
    COMPLETING = "COMPLETING"
    ACTIVE = "ACTIVE"
    NEEDS_REAUTHORISATION = "NEEDS_REAUTHORISATION"
    REVOKED = "REVOKED"
    EXPIRED = "EXPIRED"
    FAILED = "FAILED"
    UNRECOGNISED = "UNRECOGNISED"


class PaymentProduct(StrEnum):
    """The rails that a payment goes over."""

    SEPA_CREDIT_TRANSFER = "SEPA_CREDIT_TRANSFER"
    INSTANT_SEPA_CREDIT_TRANSFER = "INSTANT_SEPA_CREDIT_TRANSFER"
    UNRECOGNISED = "UNRECOGNISED"


class PaymentState(StrEnum):
    """Where a payment stands. UNKNOWN and NEEDS_ATTENTION: money may or may not have moved; never pay again."""

    IN_PROGRESS = "IN_PROGRESS"
    AWAITING_AUTHORISATION = "AWAITING_AUTHORISATION"
    ACCEPTED = "ACCEPTED"
    SETTLED = "SETTLED"
    REJECTED = "REJECTED"
    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"
    NEEDS_ATTENTION = "NEEDS_ATTENTION"
    UNRECOGNISED = "UNRECOGNISED"

    @property
    def is_final(self) -> bool:
        """Whether the state will not change any more."""
        return self in {PaymentState.SETTLED, PaymentState.REJECTED, PaymentState.CANCELLED}


class Finding(StrEnum):
    """What a person found out at the provider about a payment that needed attention."""

    EXECUTED = "EXECUTED"
    NOT_EXECUTED = "NOT_EXECUTED"
    UNRECOGNISED = "UNRECOGNISED"


class PeriodType(StrEnum):
    """How long the period of a limit is. Days are UTC days."""

    DAY = "DAY"
    WEEK = "WEEK"
    FORTNIGHT = "FORTNIGHT"
    MONTH = "MONTH"
    HALF_YEAR = "HALF_YEAR"
    YEAR = "YEAR"
    UNRECOGNISED = "UNRECOGNISED"


class PeriodAlignment(StrEnum):
    """What periods begin with: the calendar, or the day on which the consent was created."""

    CALENDAR = "CALENDAR"
    CONSENT = "CONSENT"
    UNRECOGNISED = "UNRECOGNISED"


class BalanceKind(StrEnum):
    """What a balance counts."""

    CLOSING_BOOKED = "CLOSING_BOOKED"
    EXPECTED = "EXPECTED"
    OPENING_BOOKED = "OPENING_BOOKED"
    INTERIM_AVAILABLE = "INTERIM_AVAILABLE"
    INTERIM_BOOKED = "INTERIM_BOOKED"
    FORWARD_AVAILABLE = "FORWARD_AVAILABLE"
    NON_INVOICED = "NON_INVOICED"
    OTHER = "OTHER"
    UNRECOGNISED = "UNRECOGNISED"


class BookingStatus(StrEnum):
    """Whether an entry is booked."""

    BOOKED = "BOOKED"
    PENDING = "PENDING"
    UNRECOGNISED = "UNRECOGNISED"


class BookingFilter(StrEnum):
    """Which entries to list."""

    BOOKED = "BOOKED"
    PENDING = "PENDING"
    BOTH = "BOTH"


class PayloadKind(StrEnum):
    """What a document is that is to be signed."""

    JSON_DOCUMENT = "JSON_DOCUMENT"
    XML_DOCUMENT = "XML_DOCUMENT"
    TEXT_DOCUMENT = "TEXT_DOCUMENT"


@dataclass(frozen=True, slots=True)
class AccountReference:
    """Names an account at a bank; the currency only where one IBAN stands for several accounts."""

    iban: str = field(repr=False)
    currency_code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PsuContext:
    """The person who is at the application right now. Give it if and only if they are."""

    ip_address: str = field(repr=False)
    user_agent: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodicLimit:
    """The most that all payments of one period may move together."""

    amount: Money
    period_type: PeriodType
    alignment: PeriodAlignment = PeriodAlignment.CALENDAR


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """What one person allowed this platform to do at one provider.

    `request_id` is that of the call that answered with this value, None for reads. `failure_reason` names an ErrorReason.
    `usable_until_time`: in NEEDS_REAUTHORISATION, until when it can be used all the same; ask the person before that.
    """

    name: str
    owner: str = field(repr=False)
    provider: str
    purposes: tuple[Purpose, ...]
    accounts: tuple[AccountReference, ...]
    state: ConsentState
    failure_reason: str | None
    payment_limit: Money | None
    create_time: datetime
    activate_time: datetime | None
    expire_time: datetime
    access_expire_time: datetime | None
    revoke_time: datetime | None
    usable_until_time: datetime | None = None
    periodic_limits: tuple[PeriodicLimit, ...] = ()
    request_id: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingConsent:
    """A consent that awaits the person: send them to `authorisation_uri`, unchanged."""

    consent: Consent
    authorisation_uri: str = field(repr=False)
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentResolution:
    """Who found out what became of a payment, when, and what they checked."""

    finding: Finding
    reason: str = field(repr=False)
    administrator: str
    resolve_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """One payment, which was asked for once, under `request_id`. Only administrators are told its `resolution`."""

    name: str
    consent: str
    owner: str = field(repr=False)
    request_id: str
    state: PaymentState
    amount: Money
    debtor_account: AccountReference | None = field(repr=False)
    creditor_account: AccountReference = field(repr=False)
    creditor_name: str = field(repr=False)
    remittance_information: str = field(repr=False)
    end_to_end_id: str
    product: PaymentProduct
    authorisation_uri: str | None = field(repr=False)
    provider_status: str
    status_reason: str
    create_time: datetime
    update_time: datetime
    resolution: PaymentResolution | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One account of the owner at the provider; empty where the provider says nothing."""

    name: str
    iban: str = field(repr=False)
    currency_code: str
    owner_name: str = field(repr=False)
    display_name: str = field(repr=False)
    product: str
    account_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """One balance of an account; negative when overdrawn."""

    kind: BalanceKind
    amount: Money
    reference_date: date | None
    change_time: datetime | None
    credit_limit_included: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """One entry of an account; the amount is negative when it left the account."""

    transaction_id: str
    entry_reference: str
    booking_status: BookingStatus
    amount: Money
    booking_date: date | None
    value_date: date | None
    creditor_name: str = field(repr=False)
    creditor_account: AccountReference | None = field(repr=False)
    debtor_name: str = field(repr=False)
    debtor_account: AccountReference | None = field(repr=False)
    remittance_information: str = field(repr=False)
    end_to_end_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A detached JWS over a document, `header..signature`."""

    detached_jws: str
    key: str
    algorithm: str
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationKey:
    """A public key that verifies signatures."""

    name: str
    key_id: str
    key_type: str
    algorithm: str
    curve: str
    x: bytes
    y: bytes

    def to_jwk(self) -> dict[str, str]:
        """Write the key as a JSON Web Key (RFC 7517)."""
        members = {"kty": self.key_type, "kid": self.key_id, "alg": self.algorithm, "use": "sig", "crv": self.curve}
        numbers = {"x": self.x, "y": self.y}
        encoded = {name: base64.urlsafe_b64encode(value).rstrip(b"=").decode() for name, value in numbers.items()}
        return {name: value for name, value in (members | encoded).items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A bank or an accounting system, and what can be done there."""

    name: str
    display_name: str
    standard: str
    region_code: str
    purposes: tuple[Purpose, ...]
    payment_products: tuple[PaymentProduct, ...]
    redirect_uris: tuple[str, ...]
    max_consent_duration: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of the sidecar; `state` is STARTING, READY, RESTARTING or STOPPED."""

    process: str
    state: str
    restart_count: int
    start_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HsmToken:
    """The token of the PKCS#11 module, as it was last read."""

    label: str
    serial: str
    model: str
    module: str
    logged_in: bool
    user_pin_count_low: bool
    user_pin_final_try: bool
    user_pin_locked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStatus:
    """The log of this sidecar."""

    origin: str
    entry_count: int
    checkpoint_size: int
    checkpoint_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How the sidecar is."""

    version: str
    instance: str
    cluster: str
    uptime: timedelta
    ready: bool
    processes: tuple[Process, ...]
    hsm_token: HsmToken | None
    root_key: str
    master_key: str
    master_key_version: int
    log: LogStatus
    consent_counts: dict[ConsentState, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key that the sidecar uses; `attributes` is what the HSM says of it, by PKCS#11 name."""

    name: str
    label: str
    purpose: str
    algorithm: str
    attributes: dict[str, bool]
    public_key_pem: str
    state: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One entry of the log, decoded."""

    index: int
    create_time: datetime
    event: str
    outcome: str
    caller: str
    provider: str
    consent: str
    payment: str
    epoch: int
    reason: str
    subject: bytes
    detail_digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A signed statement of the log's size and root hash."""

    signed_note: str
    size: int
    root_hash: bytes
    create_time: datetime
