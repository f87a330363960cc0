"""fi_P3 to fi_P9: the real processes are killed, paused and stopped while a payment is on its way, at each step of it.

After each fault the application asks again with the same request id until it is told an end, and that is compared with the bank's
ledger. The times of the provider are short (`real_system`), so a pause of seconds is longer than a send may take.
"""

import itertools
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import custody
import pytest
from custody import PaymentState

from tests.e2e.system import System, eventually
from tests.faults.extent import everything, sample, seed
from tests.faults.real_system import (
    PAYMENTS,
    SEND_SECONDS,
    USABLE_SECONDS,
    Attempt,
    at_the_bank,
    pause,
    send_signal,
    started,
)

Record = Callable[[str, object], None]
CLASSES = ("A", "C")
TARGETS = ("gateway", "egress", "hsm")
WAYS = ("killed", "paused")
STEPS = ("before the send", "at the bank, not executed", "at the bank, executed", "while it is found out")
PAUSE_SECONDS = 2 * SEND_SECONDS
IN_A_SAMPLE = 2


@pytest.fixture(scope="module", params=CLASSES)
def running(request: pytest.FixtureRequest) -> Iterator[tuple[str, System]]:
    with started(request.param) as system:
        yield request.param, system


def test_signals_at_each_step(running: tuple[str, System], record_property: Record) -> None:
    """fi_P3, fi_P7, fi_P8: each process, killed and paused, at each step of a payment."""
    idempotency_class, system = running
    consent = system.consent()
    points = list(itertools.product(WAYS, STEPS, TARGETS))
    chosen = sample(points, IN_A_SAMPLE, of=f"signals {idempotency_class}")
    for way, step, target in chosen:
        story = f"class {idempotency_class}, {target} {way} {step} (seed {seed()})"
        attempt = Attempt(system=system, consent=consent)
        _come_to(attempt, step)
        _strike(system, way, target)
        attempt.end()
        system.bank.clear_faults()
        attempt.judge(attempt.outcome(), idempotency_class=idempotency_class, story=story)
        eventually(lambda: system.sidecar.get("/readyz")[0], lambda status: status == 200)

    record_property("injected", len(chosen))


def _come_to(attempt: Attempt, step: str) -> None:
    """The payment is on its way, and stands at this step of it."""
    bank = attempt.system.bank
    match step:
        case "before the send":
            attempt.begin()
            time.sleep(0.01)
        case "at the bank, not executed":
            before = attempt.sent()
            bank.set_fault("delay_before_commit", PAYMENTS, method="POST", seconds=0.5)
            attempt.begin()
            at_the_bank(attempt, lambda: attempt.sent() > before)
        case "at the bank, executed":
            bank.set_fault("delay_after_commit", PAYMENTS, method="POST", seconds=0.5)
            attempt.begin()
            at_the_bank(attempt, lambda: attempt.executed() == 1)
        case _:
            before = attempt.sent()
            bank.set_fault("cut_after_commit", PAYMENTS, method="POST", count=2)
            attempt.begin()
            at_the_bank(attempt, lambda: attempt.sent() > before)
            time.sleep(1.0)  # a bank of class A has just got a repeat, or is about to


def _strike(system: System, way: str, target: str) -> None:
    if way == "paused":
        pause(system, target, PAUSE_SECONDS)
        return
    send_signal(system, target, signal.SIGKILL)
    if target == "gateway":
        system.restart_sidecar()


# --- SIGTERM


TERM_STATES = ("intent", "dispatched", "unknown", "awaiting", "settled")


def test_sigterm_in_every_state(running: tuple[str, System], record_property: Record) -> None:
    """fi_P4: the exit status is 0 whatever the payment stands at; the next sidecar goes on with it."""
    idempotency_class, system = running
    consent = system.consent()
    chosen = TERM_STATES if everything() else sample(TERM_STATES, 2, of=f"term {idempotency_class}")
    for state in chosen:
        story = f"class {idempotency_class}, SIGTERM while {state} (seed {seed()})"
        attempt = Attempt(system=system, consent=consent, amount="750.00" if state == "awaiting" else "10.00")
        bank = _bring_to(attempt, state)
        status = system.sidecar.stop(within_seconds=40)
        bank()
        attempt.end()
        system.bank.clear_faults()
        system.restart_sidecar()

        assert status == 0, story
        if state == "awaiting":
            waiting = attempt.ask()
            assert waiting.state is PaymentState.AWAITING_AUTHORISATION, story
            assert attempt.executed() == 0, story
        else:
            attempt.judge(attempt.outcome(), idempotency_class=idempotency_class, story=story)

    record_property("injected", len(chosen))


def _bring_to(attempt: Attempt, state: str) -> Callable[[], None]:
    """The payment comes to this state; gives what has to be done at the bank once the sidecar has ended."""
    bank = attempt.system.bank
    match state:
        case "intent":  # the bank takes no connection, so nothing can be prepared
            os.kill(bank.pid, signal.SIGSTOP)
            attempt.begin()
            time.sleep(0.3)
            return lambda: os.kill(bank.pid, signal.SIGCONT)
        case "dispatched":
            bank.set_fault("delay_after_commit", PAYMENTS, method="POST", seconds=1.0)
            attempt.begin()
            at_the_bank(attempt, lambda: attempt.executed() == 1)
        case "unknown":
            bank.set_fault("cut_after_commit", PAYMENTS, method="POST", count=3)
            attempt.begin()
            attempt.end()
        case _:
            attempt.begin()
            attempt.end()
    return lambda: None


@pytest.mark.parametrize("running", ["A"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_other_signals_while_a_payment_is_at_the_bank(running: tuple[str, System], number: signal.Signals) -> None:
    """fi_P5, fi_P6: SIGINT and SIGHUP stop as SIGTERM does, and a second one cuts nothing short: the payment has its outcome."""
    _, system = running
    attempt = Attempt(system=system, consent=system.consent())
    system.bank.set_fault("delay_after_commit", PAYMENTS, method="POST", seconds=1.0)
    attempt.begin()
    at_the_bank(attempt, lambda: attempt.executed() == 1)

    send_signal(system, "gateway", number)
    time.sleep(0.2)
    send_signal(system, "gateway", number)
    status = system.sidecar.process.wait(40)
    attempt.end()
    system.restart_sidecar()

    assert status == 0
    assert attempt.ask().state in (PaymentState.ACCEPTED, PaymentState.SETTLED)
    assert attempt.executed() == 1


# --- longer than the bank's window


def test_paused_past_the_banks_window(record_property: Record) -> None:
    """fi_P3: the gateway stands still until the key may be forgotten: it repeats nothing, and a human is asked."""
    with started("A", short_window=True) as system:
        attempt = Attempt(system=system, consent=system.consent())
        system.bank.set_fault("cut_after_commit", PAYMENTS, method="POST", count=100)
        attempt.begin()
        at_the_bank(attempt, lambda: attempt.executed() == 1)
        pause(system, "gateway", USABLE_SECONDS + 1.0)
        sent = attempt.sent()
        attempt.end()
        final = attempt.outcome()

        assert final.state is PaymentState.NEEDS_ATTENTION
        assert attempt.executed() == 1
        assert attempt.sent() == sent == 1
    record_property("injected", 1)


# --- descriptors


@pytest.mark.parametrize("running", ["C"], indirect=True)
@pytest.mark.parametrize("target", ["gateway", "egress"])
def test_no_file_descriptor_left(running: tuple[str, System], target: str) -> None:
    """fi_P9: what needs one fails and says so; with descriptors again the same request id goes on, by itself."""
    idempotency_class, system = running
    consent = system.consent()
    attempt = Attempt(system=system, consent=consent)
    pid = system.sidecar.pid if target == "gateway" else system.child(target).pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, before[1]))
    try:
        attempt.begin()
        time.sleep(1.0)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    attempt.end()

    attempt.judge(attempt.outcome(), idempotency_class=idempotency_class, story=f"no descriptors in {target}")
    assert eventually(lambda: system.sidecar.get("/readyz")[0], lambda status: status == 200) == 200
    with custody.Client(system.development.address, owner="person-1") as client:
        assert client.accounts.list(consent.name)
