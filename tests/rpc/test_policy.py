"""The policy file decides what a workload may do, and what it does not say is refused, before anything is written."""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import custody
import grpc
import pytest

from tests.e2e.system import CREDITOR, OWNER
from tests.rpc.calls import Method, Outcome, call, contract_methods, valid
from tests.rpc.conftest import Rpc
from tests.rpc.pki import SERVER_NAME

PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED
NO_LIMITS = {"payment_limit": None, "periodic_limits": None}

# Workload, method, what differs from a valid request, reason.
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "nothing allowed: consent": ("nothing", "CreateConsent", {}, "POLICY_REFUSED"),
    "nothing allowed: import": ("nothing", "ImportConsent", {}, "POLICY_REFUSED"),
    "nothing allowed: import key": ("nothing", "GetImportKey", {}, "POLICY_REFUSED"),
    "nothing allowed: reading a consent": ("nothing", "GetConsent", {}, "OWNER_MISMATCH"),
    "nothing allowed: listing payments": ("nothing", "ListPayments", {}, "OWNER_MISMATCH"),
    "another purpose": ("accounts-only", "CreateConsent", {}, "POLICY_REFUSED"),
    "no imports": (
        "accounts-only",
        "ImportConsent",
        {"purposes": [1], **NO_LIMITS},
        "POLICY_REFUSED",
    ),
    "another provider": ("other-provider", "CreateConsent", {}, "POLICY_REFUSED"),
    "another provider, imported": ("other-provider", "ImportConsent", {}, "POLICY_REFUSED"),
    "another owner": ("two-owners", "CreateConsent", {"owner": "person-3"}, "OWNER_MISMATCH"),
    "another owner, imported": ("two-owners", "ImportConsent", {"owner": "person-3"}, "OWNER_MISMATCH"),
    "another owner, listed": ("two-owners", "ListConsents", {"owner": "person-3"}, "OWNER_MISMATCH"),
    "an owner in other letters": ("two-owners", "ListConsents", {"owner": OWNER.upper()}, "OWNER_MISMATCH"),
    "another owner's account": ("two-owners", "ListAccounts", {"owner": "person-3"}, "OWNER_MISMATCH"),
    "another owner's payment": ("two-owners", "InitiatePayment", {"owner": "person-3"}, "OWNER_MISMATCH"),
    "another owner's signature": ("two-owners", "Sign", {"owner": "person-3"}, "OWNER_MISMATCH"),
}
METHODS = {str(method): method for method in contract_methods()}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(rpc: Rpc, what: str) -> None:
    """Outside of what the policy says the answer is PERMISSION_DENIED, whatever exists; no row is written."""
    workload, name, changes, reason = REFUSED[what]
    before = rpc.rows()

    outcome = call(rpc.as_workload(workload), METHODS[name], valid(METHODS[name], **changes))

    assert (outcome.code, outcome.reason) == (PERMISSION_DENIED, reason)
    assert rpc.rows() == before


def test_provider_that_is_not_allowed_looks_like_none(rpc: Rpc) -> None:
    """Whether a provider is configured cannot be told by a workload that may not use it."""
    channel = rpc.as_workload("nothing")
    for name in ("CreateConsent", "GetProvider"):
        there, missing = (
            call(channel, METHODS[name], valid(METHODS[name], provider=f"providers/{provider}"))
            for provider in ("sandbox-bank", "no-such-bank")
        )
        assert (there.code, there.message, there.status) == (missing.code, missing.message, missing.status)
        assert there.code is not grpc.StatusCode.OK


def test_providers_are_listed_by_policy(rpc: Rpc) -> None:
    """A workload sees the providers that it may use."""
    seen = {
        workload: [provider.name for provider in _answer(rpc, workload).providers]
        for workload in ("application", "nothing", "other-provider")
    }

    assert seen == {"application": ["providers/sandbox-bank"], "nothing": [], "other-provider": []}


@pytest.fixture(scope="module")
def consent_of(rpc: Rpc, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], custody.Consent]:
    """Active consents, made over mTLS by workloads that may make them."""
    made: dict[str, custody.Consent] = {}

    def consent(workload: str) -> custody.Consent:
        if workload in made:
            return made[workload]
        folder = tmp_path_factory.mktemp(workload)
        certificate, key = rpc.authority.workload(workload).written(folder, workload)
        (folder / "ca.pem").write_bytes(rpc.authority.certificate)
        tls = custody.Tls(ca=folder / "ca.pem", certificate=certificate, key=key, server_name=SERVER_NAME)
        with custody.Client(rpc.addresses["unix-api"], owner=OWNER, tls=tls) as client:
            pending = client.consents.create(
                provider="providers/sandbox-bank",
                purposes=(custody.Purpose.ACCOUNTS, custody.Purpose.PAYMENTS),
                expire_time=datetime.now(UTC) + timedelta(days=30),
                redirect_uri=rpc.system.development.redirect_uri,
            )
            made[workload] = client.consents.complete(pending.consent.name, rpc.system.approve(pending))
        return made[workload]

    return consent


AMOUNTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "at the limit": ("small-payments", {"currency_code": "EUR", "units": 5}, ""),
    "a cent above": ("small-payments", {"currency_code": "EUR", "units": 5, "nanos": 10_000_000}, "LIMIT_EXCEEDED"),
    "a currency that SEPA does not have": ("small-payments", {"currency_code": "GBP", "units": 1}, "FIELD_INVALID"),
    "no limits at all": ("no-limits", {"currency_code": "EUR", "nanos": 10_000_000}, "LIMIT_EXCEEDED"),
}


@pytest.mark.parametrize("what", AMOUNTS)
def test_amount_limits(rpc: Rpc, consent_of: Callable[[str], custody.Consent], what: str) -> None:
    """The largest payment that the policy allows is allowed; a cent more is not, and nothing where it names no limit."""
    workload, amount, reason = AMOUNTS[what]
    consent = consent_of(workload)
    before = rpc.rows()

    outcome = _pay(rpc, workload, consent, amount)

    assert outcome.reason == reason
    assert (rpc.rows() == before) is bool(reason)


def test_periodic_limits(rpc: Rpc, consent_of: Callable[[str], custody.Consent]) -> None:
    """The policy's sum of a year is reached to the cent; then the answer says whose limit and until when, and who else has one
    of their own is not kept from paying."""
    consent = consent_of("small-sums")
    first, over, last = (
        _pay(rpc, "small-sums", consent, {"currency_code": "EUR", "units": units, "nanos": nanos})
        for units, nanos in ((4, 0), (2, 10_000_000), (2, 0))
    )
    other = _pay(rpc, "small-payments", consent_of("small-payments"), {"currency_code": "EUR", "units": 2})

    assert (first.reason, last.reason, other.reason) == ("", "", "")
    assert (over.code, over.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LIMIT_EXCEEDED")
    assert {name: over.info.metadata[name] for name in ("limitScope", "periodType", "periodAlignment")} == {
        "limitScope": "caller",
        "periodType": "YEAR",
        "periodAlignment": "CALENDAR",
    }
    assert over.info.metadata["periodEndTime"].endswith("-01-01T00:00:00Z")
    refusals = [entry.reason for entry in rpc.system.admin.audit.entries() if entry.event == "CALL_REFUSED"]
    assert "LIMIT_EXCEEDED" in refusals


def test_purpose_that_the_policy_allows_and_the_consent_does_not(
    rpc: Rpc, consent_of: Callable[[str], custody.Consent]
) -> None:
    """Policy and consent must both allow: a consent without the purpose refuses, whatever the policy says."""
    request = valid(METHODS["Sign"], consent=consent_of("small-payments").name)

    outcome = call(rpc.as_workload("small-payments"), METHODS["Sign"], request)

    assert (outcome.code, outcome.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PURPOSE_NOT_CONSENTED")


def _answer(rpc: Rpc, workload: str) -> Any:
    answer = call(rpc.as_workload(workload), METHODS["ListProviders"]).answer
    assert answer is not None
    return answer


def _pay(rpc: Rpc, workload: str, consent: custody.Consent, amount: dict[str, Any]) -> Outcome:
    method: Method = METHODS["InitiatePayment"]
    request = valid(
        method,
        consent=consent.name,
        request_id=str(uuid.uuid4()),
        amount=amount,
        debtor_account={"iban": consent.accounts[0].iban},
        creditor_account={"iban": CREDITOR},
    )
    return call(rpc.as_workload(workload), method, request)
