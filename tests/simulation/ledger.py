"""Who was told what, what the bank did, what is on record: and whether they agree. The first disagreement ends the run."""

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from sidecar.audit.entry import AuditEntry
from sidecar.domain.audit import AuditEvent
from sidecar.domain.ids import PaymentId
from sidecar.domain.payment import Payment, PaymentState
from tests.fakes.egress import BankRequest

__all__ = ["NO", "UNKNOWN", "YES", "Judge"]

S = PaymentState
YES = frozenset({S.ACCEPTED, S.SETTLED})
NO = frozenset({S.REJECTED, S.REJECTED_LATE, S.ABANDONED, S.CANCELLED})
UNKNOWN = frozenset({S.DISPATCHED, S.RECONCILING})


class Judge:
    """`path` is the sidecars' database, which the judge reads by itself, as an outsider. `object_to` is told what is wrong."""

    def __init__(self, path: Path, *, object_to: Callable[[str], None]) -> None:
        self.executed: Counter[str] = Counter()  # by end-to-end id: the bank's ledger
        self._driver = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
        self._object_to = object_to
        self._leaves_read = 0
        self._dispatches: Counter[str] = Counter()
        self._sends: Counter[str] = Counter()
        self._revoked: set[str] = set()
        self._told: dict[str, set[str]] = defaultdict(set)
        self._payment_of: dict[str, PaymentId] = {}

    def close(self) -> None:
        self._driver.close()

    # -- as it happens

    def on_receipt(self, request: BankRequest) -> None:
        """The n-th request of a payment that reaches the bank has its n-th dispatch on record, under a signed checkpoint."""
        self._read_log()
        bank_key = request.headers["x-request-id"]
        rows = self._driver.execute("SELECT id FROM payments WHERE bank_key = ?", (bank_key,)).fetchall()
        if len(rows) != 1:
            self._object_to("the bank got a request of no payment on record")
            return
        payment = rows[0][0]
        self._sends[payment] += 1
        if self._sends[payment] > self._dispatches[payment]:
            self._object_to(f"{payment} was sent without a dispatch on record under a signed checkpoint")

    def on_execution(self, end_to_end_id: str) -> None:
        self.executed[end_to_end_id] += 1
        if self.executed[end_to_end_id] > 1:
            self._object_to(f"{end_to_end_id} was executed twice")
        if "no" in self._told[end_to_end_id]:
            self._object_to(f"{end_to_end_id} was executed after its caller was told no")

    def on_answer(self, key: str, payment: Payment) -> None:
        """What the caller with this request id was told."""
        if self._payment_of.setdefault(key, payment.id) != payment.id:
            self._object_to(f"one request id gave two payments, {payment.id} and {self._payment_of[key]}")
        self._hear(payment)

    def on_refusal(self, end_to_end_id: str) -> None:
        """The caller was told that nothing was and will be sent."""
        self._tell(end_to_end_id, "no")

    def _hear(self, payment: Payment) -> None:
        if payment.state in YES | NO:
            self._tell(payment.instruction.end_to_end_id, "yes" if payment.state in YES else "no")

    def _tell(self, end_to_end_id: str, word: str) -> None:
        told, executed = self._told[end_to_end_id], self.executed[end_to_end_id]
        told.add(word)
        if len(told) > 1:
            self._object_to(f"{end_to_end_id}: its caller was told yes and no")
        if (word == "yes") != (executed > 0):
            self._object_to(f"{end_to_end_id}: its caller was told {word}, executed {executed} times")

    # -- in the end

    def judge_rows(self, payments: list[Payment]) -> None:
        """What is recorded is what the bank did; nothing was executed that nobody recorded."""
        self._read_log()
        for payment in payments:
            self._hear(payment)
        recorded = {payment.instruction.end_to_end_id for payment in payments}
        if not recorded.issuperset(self.executed):
            self._object_to("the bank executed what is not recorded")
        if len({(payment.caller, payment.request_id) for payment in payments}) != len(payments):
            self._object_to("a request id has two payments")

    def unknown(self) -> dict[str, str]:
        """The payments whose outcome is unknown now, with their state."""
        words = ", ".join(f"'{state.value}'" for state in sorted(UNKNOWN))
        return dict(self._driver.execute(f"SELECT id, state FROM payments WHERE state IN ({words})").fetchall())

    def _read_log(self) -> None:
        """The entries that a signed checkpoint covers, as far as they are new."""
        ((covered,),) = self._driver.execute("SELECT max(covered_size) FROM log_heads").fetchall()
        query = 'SELECT entry FROM log_leaves WHERE "index" >= ? AND "index" < ? ORDER BY "index"'
        for (leaf,) in self._driver.execute(query, (self._leaves_read, covered)):
            draft = AuditEntry.decode(leaf).draft
            if draft.event is AuditEvent.CONSENT_REVOKED:
                self._revoked.add(draft.consent)
            if draft.event is AuditEvent.PAYMENT_DISPATCHED:
                self._dispatches[draft.payment] += 1
                if draft.consent in self._revoked:
                    self._object_to(f"{draft.payment} was dispatched after its consent was revoked")
        self._leaves_read = covered
