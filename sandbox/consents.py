"""Account consents (Berlin Group 1.3.11, section "Account Information Consents").

Rules this module keeps:
- `received` becomes `valid` or `rejected` by the person's decision and only once; every other state is final.
- What the person ticked is the most that a consent gives; what the request listed is the most that can be ticked.
- Reads without a person present are counted per consent and address and day (Regulation (EU) 2018/389, article 36(5)).
"""

import datetime
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sandbox.books import iso_date
from sandbox.web import Clock

RIGHTS = ("accounts", "balances", "transactions")
_GLOBAL = {
    "availableAccounts": ("accounts",),
    "availableAccountsWithBalance": ("accounts", "balances"),
    "allPsd2": RIGHTS,
}
_ONE_OFF_SECONDS = 20 * 60


class FrequencyExceeded(Exception):
    """The day's reads without a person present are used up."""


@dataclass(slots=True, kw_only=True)
class Consent:
    """One consent."""

    consent_id: str
    client_id: str
    requested: Mapping[str, object]  # the `access` member as asked
    recurring: bool
    valid_until: datetime.date
    frequency_per_day: int
    state: str = "received"
    person_id: str | None = None
    granted: dict[str, tuple[str, ...]] = field(default_factory=dict)  # right to IBANs
    last_action: float
    authorised_at: float | None = None
    reads: Counter[str] = field(default_factory=Counter)
    reads_day: str = ""

    def status(self, now: float) -> str:
        """Return the consent's state at this time."""
        if self.state == "valid" and self._over(now):
            self.state = "expired"
        return self.state

    def account_ibans(self) -> tuple[str, ...]:
        """Return the accounts that the person ticked."""
        return self.granted.get("accounts", ())

    def may(self, right: str, iban: str) -> bool:
        """Say whether the consent gives this right on this account."""
        return iban in self.granted.get(right, ())

    def rights_asked(self) -> dict[str, tuple[str, ...]]:
        """Return each right asked with the IBANs listed; no IBANs means the person chooses (bank-offered)."""
        for name, rights in _GLOBAL.items():
            if name in self.requested:
                return dict.fromkeys(rights, ())
        asked = {right: _ibans(self.requested[right]) for right in RIGHTS if right in self.requested}
        listed = tuple(dict.fromkeys(iban for ibans in asked.values() for iban in ibans))
        return {"accounts": listed, **{right: asked[right] for right in RIGHTS[1:] if right in asked}}

    def _over(self, now: float) -> bool:
        if iso_date(now) > self.valid_until.isoformat():
            return True
        return not self.recurring and self.authorised_at is not None and now > self.authorised_at + _ONE_OFF_SECONDS


class Consents:
    """All consents of the bank."""

    def __init__(self, *, clock: Clock, frequency_per_day: int | None, memory: dict[str, Consent]) -> None:
        """`frequency_per_day` is what bank and platform have agreed; None lets each consent's own number count."""
        self._clock = clock
        self._agreed = frequency_per_day
        self._consents = memory

    def create(
        self, *, client_id: str, access: Mapping[str, object], recurring: bool, valid_until: datetime.date, per_day: int
    ) -> Consent:
        """Take up a new consent, not yet authorised."""
        consent = Consent(
            consent_id=str(uuid.uuid4()),
            client_id=client_id,
            requested=access,
            recurring=recurring,
            valid_until=valid_until,
            frequency_per_day=per_day,
            last_action=self._clock(),
        )
        self._consents[consent.consent_id] = consent
        return consent

    def get(self, consent_id: str, client_id: str) -> Consent | None:
        """Return a client's consent; another client's looks like none."""
        consent = self._consents.get(consent_id)
        return consent if consent is not None and consent.client_id == client_id else None

    def approve(self, consent: Consent, person_id: str, ibans: Iterable[str]) -> None:
        """Record the person's yes for the accounts ticked."""
        ticked = tuple(ibans)
        asked = consent.rights_asked()
        consent.granted = {
            right: tuple(i for i in ticked if not listed or i in listed) for right, listed in asked.items()
        }
        consent.person_id = person_id
        consent.authorised_at = self._clock()
        self._decide(consent, "valid")

    def reject(self, consent: Consent) -> None:
        """Record the person's no."""
        self._decide(consent, "rejected")

    def terminate(self, consent: Consent) -> None:
        """End a consent at the third-party provider's wish; a consent that has ended stays as it ended."""
        if consent.status(self._clock()) in ("received", "valid"):
            consent.state = "terminatedByTpp"
            consent.last_action = self._clock()

    def count_read(self, consent: Consent, address: str) -> None:
        """Count a read without a person present; FrequencyExceeded if the day's number is used up."""
        today = iso_date(self._clock())
        if consent.reads_day != today:
            consent.reads_day = today
            consent.reads.clear()
        allowed = self._agreed if self._agreed is not None else consent.frequency_per_day
        if consent.reads[address] >= allowed:
            raise FrequencyExceeded
        consent.reads[address] += 1

    def _decide(self, consent: Consent, state: str) -> None:
        if consent.status(self._clock()) != "received":
            raise ValueError("this consent was decided before")
        consent.state = state
        consent.last_action = self._clock()


def granted_access(consent: Consent) -> dict[str, object]:
    """Write what the consent gives (before the decision: what it asks for) as the `access` member."""
    if consent.person_id is None:
        return dict(consent.requested)
    return {right: [{"iban": iban, "currency": "EUR"} for iban in ibans] for right, ibans in consent.granted.items()}


def _ibans(references: object) -> tuple[str, ...]:
    assert isinstance(references, list), "checked when the consent was created"
    return tuple(str(reference["iban"]) for reference in references)
