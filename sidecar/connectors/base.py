"""What every connector offers, whatever its standard."""

import hashlib
from dataclasses import dataclass, replace
from datetime import date, datetime
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from sidecar.connectors.descriptor import Descriptor
from sidecar.domain.account import Account, Balance, BookingStatus, PsuContext, TransactionPage
from sidecar.domain.consent import AccountReference, Consent
from sidecar.domain.payment import Payment, PaymentInstruction, PaymentState
from sidecar.domain.provider import Answer, Header, KeyPurpose, ProviderRequest

__all__ = [
    "Connector",
    "ConsentDetails",
    "InitiationAccepted",
    "InitiationReading",
    "InitiationRefused",
    "InitiationUnknown",
    "PaymentReading",
    "Problem",
    "ProblemKind",
    "Reading",
    "SignaturePlace",
    "UnsignedRequest",
]

T = TypeVar("T")


class SignaturePlace(StrEnum):
    HEADER = "header"  # the last header's value ends where the signature goes
    BODY = "body"  # the body ends where the signature goes


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsignedRequest:
    """A rendered request that lacks one signature, or none where `signing_input` is empty.

    The signature is written at `place` as prefix, `encoding` of r || s, suffix.
    """

    request: ProviderRequest
    key: KeyPurpose
    signing_input: bytes
    place: SignaturePlace
    prefix: str
    suffix: str
    encoding: "SignatureEncoding"

    @property
    def digest(self) -> bytes:
        """SHA-256 of the signing input (32 bytes)."""
        return hashlib.sha256(self.signing_input).digest()

    def signed(self, signature: bytes) -> ProviderRequest:
        """The request with `signature` (r || s as the HSM gives it) in its place."""
        text = self.prefix + self.encoding.encode(signature) + self.suffix
        if self.place is SignaturePlace.BODY:
            return replace(self.request, body=(*self.request.body, text.encode("ascii")))
        return replace(self.request, headers=(*self.request.headers, Header(name="Signature", value=text)))


class SignatureEncoding(Protocol):
    def encode(self, signature: bytes) -> str: ...


class ProblemKind(StrEnum):
    """Why an answer is not the one that was hoped for; what the core does about each is the core's business."""

    TOKEN_EXPIRED = "token-expired"  # noqa: S105 - a kind of problem, no secret
    CONSENT_ENDED = "consent-ended"  # the provider no longer honours the consent or its token
    ACCESS_EXCEEDED = "access-exceeded"
    NOT_FOUND = "not-found"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    INVALID_ANSWER = "invalid-answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """`code` is the provider's own error code where it is one of the standard's, else empty; never free text."""

    kind: ProblemKind
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Generic[T]):
    value: T


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsentDetails:
    """`valid` says that the provider honours the consent now; `accounts` are those that the owner chose there."""

    valid: bool
    accounts: tuple[AccountReference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentReading:
    """`authorisation_uri` is set where the owner must approve the payment at the provider. `undecided` says that the provider has
    the payment and has not begun to work on it: a payment that awaited the owner's approval still does."""

    state: PaymentState
    provider_status: str
    authorisation_uri: str = ""
    undecided: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InitiationAccepted:
    provider_payment_id: str
    reading: PaymentReading


@dataclass(frozen=True, slots=True, kw_only=True)
class InitiationRefused:
    """An answer that the descriptor lists as a definite refusal."""

    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InitiationUnknown:
    """Anything else: the provider may have made the payment."""

    code: str


InitiationReading = InitiationAccepted | InitiationRefused | InitiationUnknown


class Connector(Protocol):
    """`call_id` is a fresh UUID for X-Request-ID or its like; `assertion_id` a fresh random `jti`."""

    @property
    def descriptor(self) -> Descriptor: ...

    # -- consent

    def register_consent(self, consent: Consent, *, psu: PsuContext | None, call_id: str) -> UnsignedRequest | None:
        """Tells the provider what will be asked for; None where no account access is asked for."""

    def read_registration(self, answer: Answer, *, call_id: str) -> Reading[str] | Problem:
        """The provider's id of the consent."""

    def push_authorisation(
        self, consent: Consent, *, state: str, code_challenge: str, now: datetime, assertion_id: str
    ) -> UnsignedRequest:
        """RFC 9126."""

    def read_pushed_authorisation(self, answer: Answer) -> Reading[str] | Problem:
        """Where the owner goes: the authorisation URI with its request_uri."""

    def exchange_code(self, consent: Consent, *, code: str, now: datetime, assertion_id: str) -> UnsignedRequest:
        """RFC 6749 section 4.1.3, with slots for the PKCE verifier."""

    def refresh(self, *, now: datetime, assertion_id: str) -> UnsignedRequest:
        """RFC 6749 section 6, with a slot for the refresh token."""

    def revoke_token(self, *, now: datetime, assertion_id: str) -> UnsignedRequest | None:
        """RFC 7009, with a slot for the refresh token; None where the provider has no such endpoint."""

    def consent_details(self, consent: Consent, *, call_id: str) -> UnsignedRequest | None:
        """None where the provider holds no consent resource for this consent."""

    def read_consent_details(self, answer: Answer, *, call_id: str) -> Reading[ConsentDetails] | Problem: ...

    def end_consent(self, consent: Consent, *, call_id: str) -> UnsignedRequest | None:
        """None where the provider holds no consent resource for this consent."""

    def read_end(self, answer: Answer) -> Problem | None:
        """None when the provider has ended the consent or no longer knows it."""

    # -- payments

    def initiate_payment(
        self, consent: Consent, instruction: PaymentInstruction, *, bank_key: str, psu: PsuContext | None, call_id: str
    ) -> UnsignedRequest: ...

    def read_initiation(self, answer: Answer, *, call_id: str) -> InitiationReading: ...

    def payment_status(self, payment: Payment, *, call_id: str) -> UnsignedRequest: ...

    def read_payment_status(self, answer: Answer, *, call_id: str) -> Reading[PaymentReading] | Problem: ...

    def look_up_payment(self, payment: Payment, *, call_id: str) -> UnsignedRequest | None:
        """Asks for the payment by our own key; None where the provider promises no look-up (classes A and C)."""

    def read_look_up(
        self, answer: Answer, *, payment: Payment, call_id: str
    ) -> Reading[InitiationAccepted | None] | Problem:
        """What the provider made of our key; None only where it says, wholly and clearly, that it has nothing."""

    # -- account reads

    def accounts(self, consent: Consent, *, psu: PsuContext | None, call_id: str) -> UnsignedRequest: ...

    def read_accounts(self, answer: Answer, *, call_id: str) -> Reading[tuple[Account, ...]] | Problem: ...

    def balances(self, consent: Consent, account: str, *, psu: PsuContext | None, call_id: str) -> UnsignedRequest: ...

    def read_balances(self, answer: Answer, *, call_id: str) -> Reading[tuple[Balance, ...]] | Problem: ...

    def transactions(
        self,
        consent: Consent,
        account: str,
        *,
        booking_status: BookingStatus,
        date_from: date,
        date_to: date | None,
        page_query: str,
        psu: PsuContext | None,
        call_id: str,
    ) -> UnsignedRequest: ...

    def read_transactions(
        self, answer: Answer, *, account: str, call_id: str
    ) -> Reading[TransactionPage] | Problem: ...
