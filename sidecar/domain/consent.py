"""A consent: given by one owner, at one provider, for named accounts and purposes. One table holds every change of state."""

import hashlib
import hmac
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from sidecar.domain.ids import ConsentId, OwnerId, ProviderId, WorkloadId
from sidecar.domain.limits import PeriodicLimit, Reservation
from sidecar.domain.money import Money
from sidecar.errors import NotFound, PreconditionFailed, Refused

__all__ = ["TRANSITIONS", "AccountReference", "Consent", "ConsentState", "Purpose"]


class Purpose(StrEnum):
    ACCOUNTS = "accounts"
    BALANCES = "balances"
    TRANSACTIONS = "transactions"
    PAYMENTS = "payments"
    SIGNING = "signing"


class ConsentState(StrEnum):
    CREATED = "created"  # claimed here, the provider does not know it yet
    AWAITING_AUTHORISATION = "awaiting-authorisation"
    COMPLETING = "completing"  # the code is being exchanged: once, never again
    ACTIVE = "active"
    NEEDS_REAUTHORISATION = "needs-reauthorisation"  # usable until its last access token ends, see `check_usable`
    REVOKED = "revoked"
    EXPIRED = "expired"
    FAILED = "failed"


_S = ConsentState
TRANSITIONS: dict[ConsentState, frozenset[ConsentState]] = {
    _S.CREATED: frozenset(
        {_S.AWAITING_AUTHORISATION, _S.ACTIVE, _S.FAILED, _S.REVOKED, _S.EXPIRED}
    ),  # ACTIVE by import
    _S.AWAITING_AUTHORISATION: frozenset({_S.COMPLETING, _S.FAILED, _S.REVOKED, _S.EXPIRED}),
    _S.COMPLETING: frozenset({_S.ACTIVE, _S.FAILED, _S.REVOKED, _S.EXPIRED}),
    _S.ACTIVE: frozenset({_S.NEEDS_REAUTHORISATION, _S.REVOKED, _S.EXPIRED}),
    # ACTIVE: the pair that was taken for lost arrived after all.
    _S.NEEDS_REAUTHORISATION: frozenset({_S.ACTIVE, _S.REVOKED, _S.EXPIRED}),
    _S.REVOKED: frozenset(),
    _S.EXPIRED: frozenset({_S.REVOKED}),
    _S.FAILED: frozenset({_S.REVOKED}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountReference:
    """An account by IBAN; `currency_code` is empty where the account has one currency only."""

    iban: str
    currency_code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """`version` counts the changes of this row, for compare-and-set; `subject_key` (16 random bytes) makes the owner's
    pseudonym in the log, and goes when the consent's data key goes. `refresh_time` is when the background renews the tokens;
    None where there is no refresh token."""

    id: ConsentId
    caller: WorkloadId
    owner: OwnerId
    provider: ProviderId
    purposes: frozenset[Purpose]
    accounts: tuple[AccountReference, ...]
    state: ConsentState
    subject_key: bytes
    redirect_uri: str
    create_time: datetime
    expire_time: datetime
    payment_limit: Money | None = None
    periodic_limits: tuple[PeriodicLimit, ...] = ()
    provider_consent_id: str = ""
    state_digest: bytes = b""  # SHA-256 of the `state` that the redirect must bring back
    authorisation_uri: str = ""
    wrapped_data_key: bytes = b""
    access_expire_time: datetime | None = None
    access_issue_time: datetime | None = None
    activate_time: datetime | None = None
    revoke_time: datetime | None = None
    failure_reason: str = ""
    refresh_time: datetime | None = None
    version: int = 1

    def to(self, state: ConsentState, **changes: object) -> "Consent":
        """This consent one version later, in `state`.

        Raises PreconditionFailed when the table has no such transition.
        """
        if state not in TRANSITIONS[self.state]:
            raise self.not_active()
        return self.with_changes(state=state, **changes)

    def with_changes(self, **changes: object) -> "Consent":
        return replace(self, version=self.version + 1, **changes)  # type: ignore[arg-type]

    def subject(self) -> bytes:
        """The owner's pseudonym in the log: HMAC-SHA-256 under the subject key (32 bytes), or empty once that is gone."""
        return hmac.digest(self.subject_key, self.owner.encode(), hashlib.sha256) if self.subject_key else b""

    def check_owner(self, owner: OwnerId) -> None:
        """A consent of somebody else looks like one that does not exist."""
        if not hmac.compare_digest(owner.encode(), self.owner.encode()):
            raise NotFound("CONSENT_NOT_FOUND", "there is no such consent for this owner")

    def check_usable(self, purpose: Purpose, now: datetime) -> None:
        """Raises PreconditionFailed unless this consent can be used at `now` and covers `purpose`."""
        usable = self.is_usable(now)
        if usable and now >= self.expire_time:
            raise PreconditionFailed("CONSENT_EXPIRED", "the consent has expired; ask the owner for a new one")
        if not usable:
            raise self.not_active()
        if purpose not in self.purposes:
            raise PreconditionFailed("PURPOSE_NOT_CONSENTED", "the consent does not cover this purpose")

    def is_usable(self, now: datetime) -> bool:
        """Active; or in need of its owner, while the access token that was issued last lives: a refresh token that was lost takes
        nothing away from it, and the owner has that long to come again."""
        if self.state is ConsentState.NEEDS_REAUTHORISATION:
            return self.access_expire_time is not None and now < self.access_expire_time
        return self.state is ConsentState.ACTIVE

    def check_amount(self, amount: Money) -> None:
        """Raises Refused for a payment that this consent does not allow whatever was paid before."""
        single = self.payment_limit
        limits = [limit.amount for limit in self.periodic_limits] + ([single] if single else [])
        if any(limit.currency_code != amount.currency_code for limit in limits) or (
            single and amount.minor_units > single.minor_units
        ):
            raise Refused("LIMIT_EXCEEDED", "the consent does not allow a payment of this amount")

    def reservations(self, amount: Money, moment: datetime) -> tuple[Reservation, ...]:
        """What a payment of `amount` at `moment` takes of this consent's periodic limits."""
        scope, since = f"consent:{self.id}", self.create_time.astimezone(UTC).date()
        return tuple(limit.reservation(amount, moment, scope=scope, since=since) for limit in self.periodic_limits)

    def not_active(self) -> PreconditionFailed:
        reason, advice = _NOT_ACTIVE.get(
            self.state, ("CONSENT_NOT_ACTIVE", "the consent is in a state that forbids this")
        )
        return PreconditionFailed(reason, advice, metadata={"state": self.state.value})

    def named_account(self, wanted: AccountReference) -> AccountReference | None:
        """The consent's own reference to this account, or None where it names no such account.

        A reference without a currency, on either side, means the account in every currency.
        """
        return next((account for account in self.accounts if _same_account(account, wanted)), None)


def _same_account(one: AccountReference, other: AccountReference) -> bool:
    same_currency = "" in (one.currency_code, other.currency_code) or one.currency_code == other.currency_code
    return one.iban == other.iban and same_currency


_NOT_ACTIVE = {
    ConsentState.REVOKED: ("CONSENT_REVOKED", "the consent was revoked; ask the owner for a new one"),
    ConsentState.EXPIRED: ("CONSENT_EXPIRED", "the consent has expired; ask the owner for a new one"),
    ConsentState.NEEDS_REAUTHORISATION: (
        "CONSENT_NEEDS_REAUTHORISATION",
        "the provider no longer accepts the token; ask the owner for a new consent",
    ),
}
