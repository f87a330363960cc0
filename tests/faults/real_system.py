"""A whole running system whose times are short, so that a process can be paused for longer than them within a test."""

import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import custody
import yaml
from custody import PaymentState

from tests.e2e.system import CREDITOR, OWNER, System, eventually

__all__ = ["FINAL", "PAYMENTS", "SEND_SECONDS", "USABLE_SECONDS", "Attempt", "Target", "started"]

PAYMENTS = "/v1/payments/"
SEND_SECONDS = 2.0
USABLE_SECONDS = 2.0  # of the bank's window; the descriptor's margin cannot be shorter than a minute
FINAL = {PaymentState.SETTLED, PaymentState.REJECTED, PaymentState.NEEDS_ATTENTION}
SAID_YES = {PaymentState.ACCEPTED, PaymentState.SETTLED, PaymentState.AWAITING_AUTHORISATION}
Target = str  # gateway, egress or hsm


@contextmanager
def started(idempotency_class: str, *, short_window: bool = False) -> Iterator[System]:
    """A system with a bank of class A or C."""
    with tempfile.TemporaryDirectory(prefix="custody-faults-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        arguments = ["--idempotency", "header"] if idempotency_class == "A" else []
        descriptor = _descriptor(folder, idempotency_class, short_window=short_window)
        system = System.start(folder, descriptor=str(descriptor), bank_arguments=arguments)
        try:
            yield system
        finally:
            system.stop()


def _descriptor(folder: Path, idempotency_class: str, *, short_window: bool) -> Path:
    """The catalog's, with short times."""
    name = "sandbox-bank-idempotent" if idempotency_class == "A" else "sandbox-bank"
    resource = resources.files("sidecar.connectors.catalog").joinpath(f"{name}.yaml")
    document: dict[str, Any] = yaml.safe_load(resource.read_text())
    document["call_seconds"] = 5.0
    document["payments"]["send_seconds"] = SEND_SECONDS
    document["payments"]["longest_poll_seconds"] = 2.0
    if short_window:
        document["payments"]["idempotency"] |= {"window_seconds": 60.0 + USABLE_SECONDS, "margin_seconds": 60.0}
    file = folder / "descriptor.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One payment under a fault: the application's call in a thread of its own, and what it is told, now and later."""

    system: System
    consent: custody.Consent
    amount: str = "10.00"
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    end_to_end_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    told: list[PaymentState] = field(default_factory=list)
    name: str = ""
    _thread: threading.Thread | None = None

    def begin(self) -> None:
        self._thread = threading.Thread(target=self._call_once, daemon=True)
        self._thread.start()

    def end(self) -> None:
        assert self._thread is not None
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _call_once(self) -> None:
        """A caller that asks once, and may lose its answer."""
        with custody.Client(self.system.development.address, owner=OWNER, max_retries=0) as client:
            try:
                payment = client.payments.initiate(
                    self.consent.name,
                    amount=custody.Money(self.amount, "EUR"),
                    debtor_account=self.consent.accounts[0],
                    creditor_account=CREDITOR,
                    creditor_name="Wholesale Ltd",
                    end_to_end_id=self.end_to_end_id,
                    request_id=self.request_id,
                    timeout_seconds=30,
                )
            except custody.CustodyError:
                return
        self._note(payment)

    def ask(self) -> custody.Payment:
        """The application asks again, with the same request id."""
        payment = self.system.pay(
            self.consent, amount=self.amount, request_id=self.request_id, end_to_end_id=self.end_to_end_id
        )
        self._note(payment)
        return payment

    def outcome(self, *, seconds: float = 45.0) -> custody.Payment:
        """What the application is told in the end."""

        def look() -> custody.Payment | None:
            try:
                return self.ask()
            except custody.UnavailableError:
                return None

        final = eventually(look, lambda seen: seen is not None and seen.state in FINAL, seconds=seconds)
        assert final is not None
        return final

    def _note(self, payment: custody.Payment) -> None:
        assert self.name in ("", payment.name)
        self.name = payment.name
        self.told.append(payment.state)

    def executed(self) -> int:
        return len(self.system.bank.ledger(self.end_to_end_id))

    def sent(self) -> int:
        """How many initiations have reached the bank since the last `forget`."""
        return sum(r["method"] == "POST" and str(r["path"]).startswith(PAYMENTS) for r in self.system.bank.requests())

    def judge(self, final: custody.Payment, *, idempotency_class: str, story: str) -> None:
        count = self.executed()
        story = f"{story}: {final.state.name}, executed {count} times, told {[state.name for state in self.told]}"
        assert count <= 1, story
        assert final.state in FINAL, story
        assert final.state is not PaymentState.SETTLED or count == 1, story
        assert final.state is not PaymentState.REJECTED or count == 0, story
        assert not (PaymentState.REJECTED in self.told and SAID_YES & set(self.told)), story
        if idempotency_class == "A":
            assert final.state is not PaymentState.NEEDS_ATTENTION, story


def send_signal(system: System, target: Target, number: signal.Signals) -> int:
    """To the gateway or to one of its children as it runs now; gives its process id."""
    pid = system.sidecar.pid if target == "gateway" else system.child(target).pid
    os.kill(pid, number)
    return pid


def pause(system: System, target: Target, seconds: float) -> None:
    """SIGSTOP, and SIGCONT after a while. Whoever was replaced meanwhile is not there any more."""
    pid = send_signal(system, target, signal.SIGSTOP)
    time.sleep(seconds)
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        assert target != "gateway"


def at_the_bank(attempt: Attempt, look: Callable[[], bool]) -> None:
    assert eventually(look, bool, seconds=15), "the payment did not come to the bank"
