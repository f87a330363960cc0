"""A payment whose answer is lost is said to be unknown, is never made twice, and is found out by the bank's class."""

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from custody import Payment, PaymentState

from tests.e2e.system import System, eventually

PAYMENTS = "/v1/payments/"
CLASS_C_STATES = {PaymentState.UNKNOWN, PaymentState.NEEDS_ATTENTION}

LOST_ANSWERS: dict[str, dict[str, object]] = {
    "fi_N6_cut_after_commit": {"kind": "cut_after_commit"},
    "fi_N7_cut_mid_header": {"kind": "cut_mid_header"},
    "fi_N7_cut_mid_body": {"kind": "cut_mid_body"},
    "fi_N9_500_executed": {"kind": "answer", "status": 500, "body": "{}", "commit": True},
    "fi_N9_500_not_executed": {"kind": "answer", "status": 500, "body": "{}"},
    "bi_G3_truncated_json": {"kind": "body", "variant": "truncated_json"},
    "bi_G2_html": {"kind": "body", "variant": "html"},
    "bi_G3_duplicate_keys": {"kind": "body", "variant": "duplicate_keys"},
    "bi_G3_huge": {"kind": "body", "variant": "huge"},
    "bi_G2_wrong_content_type": {"kind": "body", "variant": "wrong_content_type"},
    "bi_G_echo_token": {"kind": "body", "variant": "echo_token"},
    "bi_G1_empty": {"kind": "body", "variant": "empty"},
    "bi_G3_wrong_content_length": {"kind": "wrong_content_length"},
    "bi_G6_200_instead_of_201": {"kind": "answer", "status": 200, "body": "{}", "commit": True},
    "bi_G8_redirect": {"kind": "redirect", "commit": True},
    "bi_G14_408": {"kind": "answer", "status": 408, "body": "{}", "commit": True},
    "bi_G15_409": {"kind": "answer", "status": 409, "body": "{}", "commit": True},
    "bi_G16_429": {"kind": "answer", "status": 429, "body": "{}", "commit": True},
    "bi_G18_599": {"kind": "answer", "status": 599, "body": "{}", "commit": True},
    "bi_G9_400_without_code": {"kind": "answer", "status": 400, "body": "{}", "commit": True},
}


# The bank does nothing, and nobody is told so.
LOST_REQUESTS: dict[str, dict[str, object]] = {
    "fi_N5_cut_before_read": {"kind": "cut_before_read"},
    "fi_N5_cut_before_commit": {"kind": "cut_before_commit"},
}


@pytest.fixture(scope="module")
def class_a() -> Iterator[System]:
    """A system whose bank promises idempotency (class A)."""
    folder = Path(tempfile.mkdtemp(prefix="custody-e2e-"))
    system = System.start(folder, descriptor="sandbox-bank-idempotent")
    yield system
    system.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("fault", LOST_ANSWERS.values(), ids=LOST_ANSWERS.keys())
def test_class_c_unknown_goes_to_a_human(system: System, fault: dict[str, object]) -> None:
    """Whatever spoils the answer: the caller is told "unknown", the bank sees one request, and a human is asked."""
    consent = system.shared_consent()
    request_id, end_to_end_id = str(uuid.uuid4()), uuid.uuid4().hex
    fields = {name: value for name, value in fault.items() if name != "kind"}
    system.bank.set_fault(str(fault["kind"]), PAYMENTS, method="POST", **fields)

    payment = system.pay(consent, request_id=request_id, end_to_end_id=end_to_end_id)
    again = system.pay(consent, request_id=request_id, end_to_end_id=end_to_end_id)
    flagged = eventually(
        lambda: system.client.payments.get(payment.name), lambda seen: seen.state is PaymentState.NEEDS_ATTENTION
    )
    system.bank.clear_faults()

    assert payment.state in CLASS_C_STATES
    assert again.name == payment.name
    assert again.state in CLASS_C_STATES
    assert flagged.state is PaymentState.NEEDS_ATTENTION
    assert len(system.bank.ledger(end_to_end_id)) <= 1


@pytest.mark.parametrize("fault", LOST_ANSWERS.values(), ids=LOST_ANSWERS.keys())
def test_class_a_unknown_is_found_out(class_a: System, fault: dict[str, object]) -> None:
    """The identical request under the same key tells what became of it: settled, once."""
    consent = class_a.shared_consent()
    end_to_end_id = uuid.uuid4().hex
    fields = {name: value for name, value in fault.items() if name != "kind"}
    class_a.bank.set_fault(str(fault["kind"]), PAYMENTS, method="POST", **fields)

    payment = class_a.pay(consent, end_to_end_id=end_to_end_id)
    final = class_a.client.payments.wait(payment.name, timeout_seconds=60)
    class_a.bank.clear_faults()

    assert payment.state in (PaymentState.UNKNOWN, PaymentState.ACCEPTED)
    assert final.state is PaymentState.SETTLED
    assert len(class_a.bank.ledger(end_to_end_id)) == 1


@dataclass(frozen=True, kw_only=True)
class LookedUp:
    """Payments of class B by what spoiled their answer. They are made one after the other and wait for their quiet period
    together, because each waits some twenty seconds for it."""

    system: System
    payments: dict[str, Payment]

    @staticmethod
    def end_to_end_id(name: str) -> str:
        return name.replace("_", "-")[:35]


@pytest.fixture(scope="module")
def class_b() -> Iterator[LookedUp]:
    """A system whose bank lists payments by our own key (class B), and a payment under each fault."""
    folder = Path(tempfile.mkdtemp(prefix="custody-e2e-"))
    system = System.start(folder, descriptor="sandbox-bank-lookup")
    consent = system.consent()
    payments = {}
    for name, fault in (LOST_ANSWERS | LOST_REQUESTS).items():
        fields = {field: value for field, value in fault.items() if field != "kind"}
        system.bank.set_fault(str(fault["kind"]), PAYMENTS, method="POST", **fields)
        payments[name] = system.pay(consent, end_to_end_id=LookedUp.end_to_end_id(name))
        system.bank.clear_faults()
    yield LookedUp(system=system, payments=payments)
    system.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", LOST_ANSWERS | LOST_REQUESTS)
def test_class_b_unknown_is_looked_up(class_b: LookedUp, name: str) -> None:
    """After the quiet period the bank's own list tells: settled if it was executed, rejected if it never was; one POST."""
    system, payment = class_b.system, class_b.payments[name]

    final = system.client.payments.wait(payment.name, timeout_seconds=60)

    executed = system.bank.ledger(LookedUp.end_to_end_id(name))
    assert payment.state in (PaymentState.UNKNOWN, PaymentState.ACCEPTED)
    assert final.state is (PaymentState.SETTLED if executed else PaymentState.REJECTED)
    assert len(executed) == (0 if name in LOST_REQUESTS or name == "fi_N9_500_not_executed" else 1)


def test_listed_refusal_is_a_rejection(system: System) -> None:
    """An answer that the descriptor lists is a definite refusal: rejected, nothing executed, no human needed."""
    consent = system.consent()
    end_to_end_id = uuid.uuid4().hex
    body = '{"tppMessages":[{"category":"ERROR","code":"FORMAT_ERROR"}]}'
    system.bank.set_fault("answer", PAYMENTS, method="POST", status=400, body=body)

    payment = system.pay(consent, end_to_end_id=end_to_end_id)

    assert payment.state is PaymentState.REJECTED
    assert payment.status_reason == "FORMAT_ERROR"
    assert system.bank.ledger(end_to_end_id) == []


def test_token_that_expires_is_renewed(new_system: Callable[..., System]) -> None:
    """Reads go on over many lives of the access token; every renewal rotates, and the bank never sees a reuse."""
    system = new_system(bank_arguments=["--access-token-seconds", "4", "--frequency-per-day", "1000"])
    consent = system.consent()

    def reads() -> int:
        return len(system.client.accounts.list(consent.name))

    counts = [eventually(reads, lambda count: count > 0) for _ in range(3)]
    eventually(
        lambda: [entry.event for entry in system.admin.audit.entries(consent=consent.name)].count("TOKEN_REFRESHED"),
        lambda refreshed: bool(reads()) and refreshed >= 3,
        seconds=40,
    )

    events = [entry.event for entry in system.admin.audit.entries(consent=consent.name)]
    assert all(counts)
    assert events.count("TOKEN_REFRESHED") >= 3
    assert "CONSENT_NEEDS_REAUTHORISATION" not in events
