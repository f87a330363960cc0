"""The two tables of states: every change that is allowed, and every other one refused."""

from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from itertools import product

import pytest

from sidecar.domain import consent as consents
from sidecar.domain import payment as payments
from sidecar.domain.consent import AccountReference, ConsentState, Purpose
from sidecar.domain.ids import OwnerId, PaymentId
from sidecar.domain.payment import DispatchPermit, PaymentState
from sidecar.errors import Internal, NotFound, PreconditionFailed
from tests.unit.connectors.support import NOW, consent, payment

P, C = PaymentState, ConsentState

# Written out once more, from docs/reliability.md and the contract's comments: the code's table must say the same.
PAYMENT_CHANGES = {
    P.INTENT: {P.INTENT, P.DISPATCHED, P.ABANDONED},
    P.DISPATCHED: {P.INTENT, P.ACCEPTED, P.AWAITING_AUTHORISATION, P.SETTLED, P.REJECTED, P.RECONCILING},
    P.RECONCILING: {P.RECONCILING, P.ACCEPTED, P.AWAITING_AUTHORISATION, P.SETTLED, P.REJECTED, P.NEEDS_ATTENTION},
    P.AWAITING_AUTHORISATION: {P.AWAITING_AUTHORISATION, P.ACCEPTED, P.SETTLED, P.REJECTED_LATE, P.CANCELLED},
    P.ACCEPTED: {P.ACCEPTED, P.AWAITING_AUTHORISATION, P.SETTLED, P.REJECTED_LATE, P.CANCELLED},
    P.NEEDS_ATTENTION: {P.ACCEPTED, P.SETTLED, P.REJECTED},
}
CONSENT_CHANGES = {
    C.CREATED: {C.AWAITING_AUTHORISATION, C.ACTIVE, C.FAILED, C.REVOKED, C.EXPIRED},
    C.AWAITING_AUTHORISATION: {C.COMPLETING, C.FAILED, C.REVOKED, C.EXPIRED},
    C.COMPLETING: {C.ACTIVE, C.FAILED, C.REVOKED, C.EXPIRED},
    C.ACTIVE: {C.NEEDS_REAUTHORISATION, C.REVOKED, C.EXPIRED},
    C.NEEDS_REAUTHORISATION: {C.ACTIVE, C.REVOKED, C.EXPIRED},
    C.EXPIRED: {C.REVOKED},
    C.FAILED: {C.REVOKED},
}


@pytest.mark.parametrize(("before", "after"), list(product(P, P)), ids=lambda state: state.value)
def test_each_change_of_a_payment_is_allowed_or_refused(before: PaymentState, after: PaymentState) -> None:
    """121 pairs."""
    row = replace(payment(), state=before)
    later = NOW + timedelta(seconds=1)

    if after in PAYMENT_CHANGES.get(before, ()):
        changed = row.to(after, now=later, epoch=9)
        assert (changed.state, changed.update_time, changed.epoch) == (after, later, 9)
    else:
        with pytest.raises(Internal):
            row.to(after, now=later)


@pytest.mark.parametrize(("before", "after"), list(product(C, C)), ids=lambda state: state.value)
def test_each_change_of_a_consent_is_allowed_or_refused(before: ConsentState, after: ConsentState) -> None:
    """64 pairs; each change is the next version."""
    row = consent(state=before)

    if after in CONSENT_CHANGES.get(before, ()):
        changed = row.to(after, failure_reason="X")
        assert (changed.state, changed.version, changed.failure_reason) == (after, row.version + 1, "X")
    else:
        with pytest.raises(PreconditionFailed):
            row.to(after)


def test_final_states_are_those_that_nothing_follows() -> None:
    """A payment in one of them never changes again; a person's finding is not one of them."""
    final = {P.SETTLED, P.REJECTED, P.REJECTED_LATE, P.CANCELLED, P.ABANDONED}

    assert final == payments.TERMINAL
    assert {state for state in P if replace(payment(), state=state).is_terminal} == final
    assert set(payments.TRANSITIONS) == set(P)
    assert set(consents.TRANSITIONS) == set(C)


def test_nothing_leads_back_from_what_was_sent_but_the_proof_that_it_was_not() -> None:
    """From RECONCILING on there is no way to an intent, so no second first send."""
    reachable, frontier = set(), {P.RECONCILING}
    while frontier:
        reachable |= frontier
        frontier = {after for state in frontier for after in payments.TRANSITIONS[state]} - reachable

    assert not reachable & {P.INTENT, P.DISPATCHED, P.ABANDONED}


def test_a_permit_is_redeemed_once() -> None:
    """A second taking is a defect, and says nothing of the payment."""
    permit = DispatchPermit(payment=PaymentId("p-1"), epoch=1)
    permit.redeem()

    with pytest.raises(Internal):
        permit.redeem()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (C.CREATED, "CONSENT_NOT_ACTIVE"),
        (C.AWAITING_AUTHORISATION, "CONSENT_NOT_ACTIVE"),
        (C.COMPLETING, "CONSENT_NOT_ACTIVE"),
        (C.NEEDS_REAUTHORISATION, "CONSENT_NEEDS_REAUTHORISATION"),
        (C.REVOKED, "CONSENT_REVOKED"),
        (C.EXPIRED, "CONSENT_EXPIRED"),
        (C.FAILED, "CONSENT_NOT_ACTIVE"),
    ],
)
def test_only_an_active_consent_is_usable(state: ConsentState, reason: str) -> None:
    """C23, C28, C29: each other state has its reason."""
    with pytest.raises(PreconditionFailed) as refused:
        consent(state=state).check_usable(Purpose.PAYMENTS, NOW)

    assert refused.value.reason == reason


@pytest.mark.parametrize(("microseconds", "usable"), [(-1, True), (0, False), (1, False)])
def test_a_consent_that_needs_its_owner_is_usable_while_its_access_token_lives(microseconds: int, usable: bool) -> None:
    """C29: to the microsecond, for its purposes only, and never past its own end."""
    flagged = consent(state=C.NEEDS_REAUTHORISATION, access_expire_time=NOW)
    moment = NOW + timedelta(microseconds=microseconds)

    assert flagged.is_usable(moment) is usable
    with pytest.raises(PreconditionFailed) if not usable else nullcontext():
        flagged.check_usable(Purpose.PAYMENTS, moment)
    with pytest.raises(PreconditionFailed):
        replace(flagged, purposes=frozenset({Purpose.ACCOUNTS})).check_usable(Purpose.PAYMENTS, moment)
    with pytest.raises(PreconditionFailed) as expired:
        replace(flagged, expire_time=moment).check_usable(Purpose.PAYMENTS, moment)
    assert expired.value.reason == ("CONSENT_EXPIRED" if usable else "CONSENT_NEEDS_REAUTHORISATION")


def test_an_active_consent_is_usable_for_its_purposes_until_it_expires() -> None:
    """C24, C27: not for others, and not at expire_time."""
    only_accounts = consent(purposes=frozenset({Purpose.ACCOUNTS}))
    only_accounts.check_usable(Purpose.ACCOUNTS, only_accounts.expire_time - timedelta(microseconds=1))

    with pytest.raises(PreconditionFailed) as other:
        only_accounts.check_usable(Purpose.PAYMENTS, NOW)
    with pytest.raises(PreconditionFailed) as late:
        only_accounts.check_usable(Purpose.ACCOUNTS, only_accounts.expire_time)

    assert (other.value.reason, late.value.reason) == ("PURPOSE_NOT_CONSENTED", "CONSENT_EXPIRED")


def test_another_owner_finds_no_consent() -> None:
    """The same words as for one that does not exist; the owner is not repeated."""
    consent().check_owner(OwnerId("owner-1"))
    for owner in ("owner-2", "OWNER-1", "owner-1 ", ""):
        with pytest.raises(NotFound) as refused:
            consent().check_owner(OwnerId(owner))
        assert "owner-" not in str(refused.value)


def test_the_pseudonym_is_of_owner_and_consent_and_goes_with_its_key() -> None:
    """HMAC-SHA-256; another subject key gives another pseudonym; without a key there is none."""
    one = consent().subject()

    assert len(one) == 32
    assert one == consent().subject()
    assert one != consent(owner=OwnerId("owner-2")).subject()
    assert one != consent(subject_key=b"t" * 16).subject()
    assert consent(subject_key=b"").subject() == b""


@pytest.mark.parametrize(
    ("named", "wanted", "covered"),
    [
        ("EUR", "EUR", True),
        ("EUR", "", True),
        ("", "EUR", True),
        ("", "", True),
        ("EUR", "USD", False),
    ],
)
def test_an_account_is_named_by_iban_and_currency(named: str, wanted: str, *, covered: bool) -> None:
    """A reference without a currency means every currency; another IBAN is another account."""
    reference = AccountReference(iban="DE1", currency_code=named)
    row = consent(accounts=(reference,))

    assert (row.named_account(AccountReference(iban="DE1", currency_code=wanted)) == reference) is covered
    assert row.named_account(AccountReference(iban="DE2", currency_code=wanted)) is None
