"""A running system as the tests see it: a bank, a sidecar, a client, and what may be done to them."""

import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self, TypeVar

import custody
import psutil

from sandbox.testing import SandboxProcess
from tools.development import Development, SidecarProcess

OWNER = "person-1"
CREDITOR = "DE75512108001245126199"
T = TypeVar("T")


@dataclass(kw_only=True)
class System:
    """`marker` begins every token that the bank gives out: where it is found, a token is. `changes` are those of this sidecar's
    configuration."""

    development: Development
    bank: SandboxProcess
    sidecar: SidecarProcess
    client: custody.Client
    admin: custody.Client
    marker: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    _consent: custody.Consent | None = None

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        descriptor: str = "sandbox-bank",
        bank_arguments: Sequence[str] = (),
        store: str = "sqlite",
    ) -> Self:
        marker = "canary" + secrets.token_hex(8)
        development = Development.prepare(
            folder, descriptor=descriptor, bank_arguments=["--token-prefix", marker, *bank_arguments], store=store
        )
        bank = development.start_bank(duration_seconds=900)
        sidecar = development.start_sidecar(bank)
        return cls(
            development=development,
            bank=bank,
            sidecar=sidecar,
            client=custody.Client(development.address, owner=OWNER),
            admin=custody.Client(development.admin_address),
            marker=marker,
        )

    def stop(self) -> None:
        self.client.close()
        self.admin.close()
        self.development.stop()

    def restart_sidecar(self) -> None:
        """A new sidecar on the same files, after the old one has ended."""
        self.sidecar.process.wait(30)
        self.sidecar = self.development.start_sidecar(self.bank, changes=self.changes)
        self.client.wait_ready(30)

    @property
    def address(self) -> str:
        """Where this sidecar's applications call it."""
        listeners = self.changes.get("listeners")
        return listeners[0]["address"] if listeners else self.development.address

    def another_pod(self, instance: str) -> "System":
        """A sidecar of its own, with its own sockets, on the same PostgreSQL and at the same bank. `stop_pod` ends it."""
        assert self.development.postgresql is not None
        address, admin_address = (f"unix:{self.development.sockets}/{instance}{name}.sock" for name in ("", "-admin"))
        changes = {
            "listeners": [
                {"address": address, "surface": "api", "workload": "shop"},
                {"address": admin_address, "surface": "admin", "workload": "operator"},
            ],
            "store": {"url": self.development.postgresql.url, "instance": instance},
        }
        return replace(
            self,
            sidecar=self.development.start_sidecar(self.bank, changes=changes),
            client=custody.Client(address, owner=OWNER),
            admin=custody.Client(admin_address),
            changes=changes,
        )

    def stop_pod(self) -> None:
        self.client.close()
        self.admin.close()
        self.sidecar.stop()

    def child(self, name: str) -> psutil.Process:
        """The child process `hsm` or `egress`, as it runs now."""
        for process in psutil.Process(self.sidecar.pid).children():
            if f"sidecar.{name}" in " ".join(process.cmdline()):
                return process
        raise AssertionError(f"there is no process {name}")

    def pending_consent(self, *purposes: custody.Purpose) -> custody.PendingConsent:
        return self.client.consents.create(
            provider="providers/sandbox-bank",
            purposes=purposes
            or (
                custody.Purpose.ACCOUNTS,
                custody.Purpose.BALANCES,
                custody.Purpose.TRANSACTIONS,
                custody.Purpose.PAYMENTS,
                custody.Purpose.SIGNING,
            ),
            expire_time=datetime.now(UTC) + timedelta(days=30),
            redirect_uri=self.development.redirect_uri,
        )

    def approve(self, pending: custody.PendingConsent, *, decision: str = "approve") -> str:
        """The person at the bank; answers with the address that their browser is sent to."""
        return self.bank.redirect_after(pending.authorisation_uri, decision=decision)

    def consent(self) -> custody.Consent:
        """A consent that is active."""
        pending = self.pending_consent()
        return self.client.consents.complete(pending.consent.name, self.approve(pending))

    def shared_consent(self) -> custody.Consent:
        """An active consent that the tests of a module share and none of them ends."""
        if self._consent is None:
            self._consent = self.consent()
        return self._consent

    def pay(
        self, consent: custody.Consent, *, amount: str = "10.00", request_id: str | None = None, end_to_end_id: str = ""
    ) -> custody.Payment:
        return self.client.payments.initiate(
            consent.name,
            amount=custody.Money(amount, "EUR"),
            debtor_account=consent.accounts[0],
            creditor_account=CREDITOR,
            creditor_name="Wholesale Ltd",
            end_to_end_id=end_to_end_id,
            request_id=request_id or str(uuid.uuid4()),
        )

    def everything_written(self) -> dict[str, bytes]:
        """All that the system keeps or says, by where it stands. The bank's own folder is the bank's."""
        places = {
            str(path.relative_to(self.development.directory)): path.read_bytes()
            for path in self.development.directory.rglob("*")
            if path.is_file() and "bank" not in path.relative_to(self.development.directory).parts[0]
        }
        return {**places, "metrics": self.sidecar.get("/metrics")[1].encode()}


def eventually(look: Callable[[], T], good: Callable[[T], bool], *, seconds: float = 20.0) -> T:
    """What `look` sees once it is good; the last look, where it does not become good in time."""
    end = time.monotonic() + seconds
    while True:
        seen = look()
        if good(seen) or time.monotonic() > end:
            return seen
        time.sleep(0.05)
