"""Every reason of the contract that the outside can bring about, brought about: its code and details are those of its row.

How every reason is told, those of inner failures too, is in tests/unit/gateway/test_boundary.py.
"""

import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import custody
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tests.e2e.system import CREDITOR, OWNER
from tests.rpc.calls import Outcome, call, contract_methods, reasons, valid
from tests.rpc.conftest import Rpc

METHODS = {str(method): method for method in contract_methods()}
RULES = dict(reasons())
ACCOUNTS = "/v1/accounts"

# What only an inner failure, a stop or a tampered database brings about, and which test shows it.
ELSEWHERE = {
    "CERTIFICATE_EXPIRED": "test_identity.py",
    "SHUTTING_DOWN": "test_operations.py",
    "HSM_UNAVAILABLE": "test_operations.py",
    "STORE_UNAVAILABLE": "tests/unit/gateway/test_boundary.py",
    "AUDIT_UNAVAILABLE": "tests/unit/gateway/test_boundary.py",
    "ENVELOPE_CORRUPT": "tests/unit/gateway/test_boundary.py",
    "INTERNAL": "tests/unit/gateway/test_boundary.py",
}


def _read(rpc: Rpc, consent: custody.Consent, name: str = "ListAccounts", **fields: Any) -> Outcome:
    return call(rpc.application, METHODS[name], valid(METHODS[name], consent=consent.name, **fields))


def _pay(rpc: Rpc, consent: custody.Consent, **fields: Any) -> Outcome:
    request = {
        "consent": consent.name,
        "debtor_account": {"iban": consent.accounts[0].iban},
        "creditor_account": {"iban": CREDITOR},
        **fields,
    }
    return call(rpc.application, METHODS["InitiatePayment"], valid(METHODS["InitiatePayment"], **request))


def _reused(rpc: Rpc) -> Outcome:
    consent, request_id = rpc.system.shared_consent(), str(uuid.uuid4())
    assert _pay(rpc, consent, request_id=request_id).code is grpc.StatusCode.OK
    return _pay(rpc, consent, request_id=request_id, creditor_name="Another Ltd")


def _revoked(rpc: Rpc) -> Outcome:
    consent = rpc.system.consent()
    rpc.system.client.consents.revoke(consent.name)
    return _read(rpc, consent)


def _expired(rpc: Rpc) -> Outcome:
    client, system = rpc.system.client, rpc.system
    pending = client.consents.create(
        provider="providers/sandbox-bank",
        purposes=(custody.Purpose.ACCOUNTS,),
        expire_time=datetime.now(UTC) + timedelta(seconds=6),
        redirect_uri=system.development.redirect_uri,
    )
    consent = client.consents.complete(pending.consent.name, system.approve(pending))
    end = time.monotonic() + 20
    while (outcome := _read(rpc, consent)).code is grpc.StatusCode.OK and time.monotonic() < end:
        time.sleep(0.3)
    return outcome


def _narrow(rpc: Rpc) -> custody.Consent:
    """A consent for accounts only."""
    pending = rpc.system.pending_consent(custody.Purpose.ACCOUNTS)
    return rpc.system.client.consents.complete(pending.consent.name, rpc.system.approve(pending))


def _completed_with(rpc: Rpc, *, decision: str = "approve", **changes: str) -> Outcome:
    pending = rpc.system.pending_consent()
    query = parse_qs(urlsplit(rpc.system.approve(pending, decision=decision)).query)
    parameters = {name: values[0] for name, values in query.items() if name in ("code", "state", "iss", "error")}
    request = {"code": "", "error": "", **parameters, **changes}
    return call(
        rpc.application,
        METHODS["CompleteConsent"],
        valid(METHODS["CompleteConsent"], consent=pending.consent.name, **request),
    )


def _bank_answers(status: int, body: str) -> Callable[[Rpc], Outcome]:
    def scenario(rpc: Rpc) -> Outcome:
        consent = rpc.system.consent()
        rpc.system.bank.set_fault("answer", ACCOUNTS, method="GET", status=status, body=body)
        try:
            return _read(rpc, consent)
        finally:
            rpc.system.bank.clear_faults()

    return scenario


def _tpp(code: str) -> str:
    return f'{{"tppMessages":[{{"category":"ERROR","code":"{code}"}}]}}'


def _unavailable(rpc: Rpc) -> Outcome:
    consent = rpc.system.consent()
    rpc.system.bank.set_fault("cut_before_read", ACCOUNTS, method="GET")
    try:
        return _read(rpc, consent)
    finally:
        rpc.system.bank.clear_faults()


def _rate_limited(rpc: Rpc) -> Outcome:
    return _bank_answers(429, _tpp("ACCESS_EXCEEDED"))(rpc)


def _too_short(rpc: Rpc) -> Outcome:
    outcome = Outcome(code=grpc.StatusCode.OK)
    for _ in range(30):  # the client's own deadline may be the faster one
        outcome = call(rpc.application, METHODS["ListProviders"], timeout=0.08)
        if outcome.status:
            break
    return outcome


SCENARIOS: dict[str, Callable[[Rpc], Outcome]] = {
    "FIELD_INVALID": lambda rpc: call(rpc.application, METHODS["GetConsent"]),
    "CALLER_UNKNOWN": lambda rpc: call(rpc.as_workload("unknown"), METHODS["GetConsent"]),
    "METHOD_NOT_ALLOWED": lambda rpc: call(rpc.as_workload("auditor", "tcp-admin"), METHODS["GetStatus"]),
    "POLICY_REFUSED": lambda rpc: call(rpc.as_workload("nothing"), METHODS["GetImportKey"]),
    "OWNER_MISMATCH": lambda rpc: call(rpc.as_workload("nothing"), METHODS["GetConsent"], valid(METHODS["GetConsent"])),
    "CONSENT_NOT_FOUND": lambda rpc: call(rpc.application, METHODS["GetConsent"], valid(METHODS["GetConsent"])),
    "PAYMENT_NOT_FOUND": lambda rpc: call(rpc.application, METHODS["GetPayment"], valid(METHODS["GetPayment"])),
    "PAYMENT_NOT_RESOLVABLE": lambda rpc: call(
        rpc.operator,
        METHODS["ResolvePayment"],
        valid(METHODS["ResolvePayment"], payment=rpc.system.pay(rpc.system.shared_consent()).name),
    ),
    "PROVIDER_NOT_FOUND": lambda rpc: call(
        rpc.application, METHODS["GetProvider"], valid(METHODS["GetProvider"], provider="providers/none")
    ),
    "ACCOUNT_NOT_FOUND": lambda rpc: _read(rpc, rpc.system.shared_consent(), "ListBalances", account="accounts/none"),
    "REQUEST_ID_REUSED": _reused,
    "CONSENT_NOT_ACTIVE": lambda rpc: _read(rpc, rpc.system.pending_consent().consent),
    "CONSENT_REVOKED": _revoked,
    "CONSENT_EXPIRED": _expired,
    "CONSENT_NEEDS_REAUTHORISATION": _bank_answers(401, _tpp("CONSENT_INVALID")),
    "PURPOSE_NOT_CONSENTED": lambda rpc: _read(rpc, _narrow(rpc), "Sign"),
    "ACCOUNT_NOT_CONSENTED": lambda rpc: _pay(
        rpc, rpc.system.shared_consent(), debtor_account={"iban": "NL91ABNA0417164300"}
    ),
    "LIMIT_EXCEEDED": lambda rpc: _pay(
        rpc, rpc.system.shared_consent(), amount={"currency_code": "EUR", "units": 10_001}
    ),
    "STATE_MISMATCH": lambda rpc: _completed_with(rpc, state="not-the-state-of-this-consent"),
    "ISSUER_MISMATCH": lambda rpc: _completed_with(rpc, iss="https://another.example"),
    "AUTHORISATION_DENIED": lambda rpc: _completed_with(rpc, decision="deny"),
    "AUTHORISATION_FAILED": lambda rpc: _completed_with(rpc, code="not-the-code"),
    "IMPORT_KEY_UNKNOWN": lambda rpc: call(rpc.application, METHODS["ImportConsent"], valid(METHODS["ImportConsent"])),
    "PROVIDER_REFUSED": _bank_answers(400, _tpp("FORMAT_ERROR")),
    "PROVIDER_UNAVAILABLE": _unavailable,
    "PROVIDER_ANSWER_INVALID": _bank_answers(200, '{"accounts": 7}'),
    "RATE_LIMITED": _rate_limited,
    "MESSAGE_TOO_LARGE": lambda rpc: call(rpc.application, METHODS["Sign"], bytes(262_145)),
    "DEADLINE_TOO_SHORT": _too_short,
}


@pytest.mark.parametrize("reason", SCENARIOS)
def test_reason(rpc: Rpc, reason: str) -> None:
    """The reason is answered with the code and exactly the details that the contract gives it, and no more is told."""
    outcome = SCENARIOS[reason](rpc)
    rule = RULES[reason]

    assert outcome.status is not None, outcome
    assert outcome.reason == reason
    assert outcome.info.domain == "custody.v1"
    assert outcome.code.value[0] == rule.code
    names = [packed.TypeName() for packed in outcome.status.details]
    assert names == ["google.rpc.ErrorInfo", *(f"google.rpc.{name}" for name in rule.details)]
    assert b"canary" not in outcome.shown()
    assert OWNER.encode() not in outcome.shown()


def test_every_reason_has_a_test() -> None:
    """A reason that is added to the contract fails here until something brings it about."""
    assert set(SCENARIOS) | set(ELSEWHERE) | {"IMPORT_REFUSED"} == set(RULES)
    assert not set(SCENARIOS) & set(ELSEWHERE)


def test_time_in_the_past_is_a_field(rpc: Rpc) -> None:
    """What only the clock can tell is said of the field too, and nothing is written."""
    before = rpc.rows()
    past = Timestamp()
    past.FromDatetime(datetime.now(UTC) - timedelta(days=1))

    outcome = call(rpc.application, METHODS["CreateConsent"], valid(METHODS["CreateConsent"], expire_time=past))

    assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(outcome.violations) & {"expire_time"}
    assert rpc.rows() == before
