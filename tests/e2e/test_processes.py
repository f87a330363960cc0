"""Children are killed, stopped and lost; the sidecar recovers by itself and stays honest about payments."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable

import custody
import pytest
from custody import PaymentState

from tests.e2e.system import System, eventually

RECOVERY_SECONDS = 5.0
PAYMENTS = "/v1/payments/"


@pytest.mark.parametrize("name", ["hsm", "egress"])
def test_killed_child_is_replaced(new_system: Callable[..., System], name: str) -> None:
    """SIGKILL of a child: calls work again within the recovery time, with the same consent, and the restart is counted."""
    system = new_system()
    consent = system.consent()
    killed = system.child(name)
    killed.send_signal(signal.SIGKILL)

    began = time.monotonic()
    accounts = system.client.accounts.list(consent.name)
    recovered_seconds = time.monotonic() - began
    replaced = eventually(lambda: system.child(name).pid, lambda pid: pid != killed.pid)

    assert accounts
    assert (
        recovered_seconds < RECOVERY_SECONDS * 3
    )  # generous: the machine may be busy; the benchmark reports the figure
    assert replaced != killed.pid
    metric = f'custody_process_restarts_total{{process="{name}"}} 1.0'
    assert metric in eventually(lambda: system.sidecar.get("/metrics")[1], lambda text: metric in text)


def test_hanging_hsm_fails_its_callers_and_is_replaced(new_system: Callable[..., System]) -> None:
    """A call into an HSM process that hangs fails in time with an error that invites a repeat, and the process is replaced."""
    system = new_system()
    consent = system.consent()
    stopped = system.child("hsm")
    stopped.send_signal(signal.SIGSTOP)

    impatient = custody.Client(system.development.address, owner="person-1", max_retries=0)
    with impatient, pytest.raises(custody.CustodyError) as failure:
        impatient.signing.sign(
            consent.name, payload=b"text", payload_kind=custody.PayloadKind.TEXT_DOCUMENT, timeout_seconds=20
        )

    assert failure.value.reason == "HSM_UNAVAILABLE"
    assert system.client.accounts.list(consent.name)
    assert system.child("hsm").pid != stopped.pid


def test_egress_killed_while_the_bank_works(new_system: Callable[..., System]) -> None:
    """The bank executes, egress dies before the answer: unknown, never failed, and once in the ledger."""
    system = new_system()
    consent = system.consent()
    end_to_end_id, request_id = uuid.uuid4().hex, str(uuid.uuid4())
    system.bank.set_fault("delay_after_commit", PAYMENTS, method="POST", seconds=5)
    answers: list[custody.Payment] = []
    payer = threading.Thread(
        target=lambda: answers.append(system.pay(consent, request_id=request_id, end_to_end_id=end_to_end_id))
    )
    payer.start()
    eventually(lambda: system.bank.ledger(end_to_end_id), bool)
    system.child("egress").send_signal(signal.SIGKILL)
    payer.join(60)

    flagged = eventually(
        lambda: system.client.payments.get(answers[0].name), lambda seen: seen.state is PaymentState.NEEDS_ATTENTION
    )

    assert answers[0].state in (PaymentState.UNKNOWN, PaymentState.NEEDS_ATTENTION)
    assert flagged.state is PaymentState.NEEDS_ATTENTION
    assert len(system.bank.ledger(end_to_end_id)) == 1


@pytest.mark.parametrize("descriptor", ["sandbox-bank", "sandbox-bank-idempotent", "sandbox-bank-lookup"])
def test_sidecar_killed_between_dispatch_and_answer(new_system: Callable[..., System], descriptor: str) -> None:
    """SIGKILL of the gateway after the dispatch: the next run takes it up; classes A and B settle it, class C asks a human."""
    system = new_system(descriptor=descriptor)
    consent = system.consent()
    end_to_end_id, request_id = uuid.uuid4().hex, str(uuid.uuid4())
    system.bank.set_fault("delay_after_commit", PAYMENTS, method="POST", seconds=30)
    payer = threading.Thread(target=_pay_and_forget, args=(system, consent, request_id, end_to_end_id))
    payer.start()
    eventually(lambda: system.bank.ledger(end_to_end_id), bool)
    os.kill(system.sidecar.pid, signal.SIGKILL)
    payer.join(60)
    system.bank.clear_faults()

    system.restart_sidecar()
    expected = PaymentState.NEEDS_ATTENTION if descriptor == "sandbox-bank" else PaymentState.SETTLED
    found = eventually(
        lambda: system.pay(consent, request_id=request_id, end_to_end_id=end_to_end_id),
        lambda seen: seen.state is expected,
        seconds=60,
    )

    assert found.state is expected
    assert len(system.bank.ledger(end_to_end_id)) == 1


def test_graceful_stop_brings_the_payment_to_its_outcome(new_system: Callable[..., System]) -> None:
    """SIGTERM while the bank works: new calls are refused, the payment gets its outcome, the exit status is 0."""
    system = new_system()
    consent = system.consent()
    end_to_end_id, request_id = uuid.uuid4().hex, str(uuid.uuid4())
    system.bank.set_fault("delay_after_commit", PAYMENTS, method="POST", seconds=2)
    payer = threading.Thread(target=_pay_and_forget, args=(system, consent, request_id, end_to_end_id))
    payer.start()
    eventually(lambda: system.bank.ledger(end_to_end_id), bool)

    assert system.sidecar.stop() == 0
    payer.join(60)
    system.restart_sidecar()

    payment = system.pay(consent, request_id=request_id, end_to_end_id=end_to_end_id)
    assert payment.state in (PaymentState.ACCEPTED, PaymentState.SETTLED)
    assert len(system.bank.ledger(end_to_end_id)) == 1


def test_children_end_with_a_killed_gateway(new_system: Callable[..., System]) -> None:
    """SIGKILL of the gateway leaves no child behind that holds a key or a token."""
    system = new_system()
    children = [system.child("hsm"), system.child("egress")]
    os.kill(system.sidecar.pid, signal.SIGKILL)
    system.sidecar.process.wait(10)

    gone = eventually(
        lambda: [child.is_running() and child.status() != "zombie" for child in children], lambda alive: not any(alive)
    )

    assert not any(gone)


def _pay_and_forget(system: System, consent: custody.Consent, request_id: str, end_to_end_id: str) -> None:
    """A caller that loses its answer."""
    client = custody.Client(system.development.address, owner="person-1", max_retries=0)
    with client:
        try:
            client.payments.initiate(
                consent.name,
                amount=custody.Money("10.00", "EUR"),
                debtor_account=consent.accounts[0],
                creditor_account="DE75512108001245126199",
                creditor_name="Wholesale Ltd",
                end_to_end_id=end_to_end_id,
                request_id=request_id,
                timeout_seconds=30,
            )
        except custody.CustodyError:
            return
