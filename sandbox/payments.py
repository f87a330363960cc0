"""Payment initiations: taken up, executed at once or after the person's approval, and their life by the clock.

Rules this module keeps:
- A payment is executed at most once, in the step that decides it; its later statuses follow from the clock alone.
- Up to `STANDING_LIMIT_CENTS` a consent with the scope PIS is a standing authorisation (SCA exempted, RTS article 13 and
  16 in spirit); above it the person approves each payment.
- With idempotency keys the same key and body within the window gives the first answer again, another body is refused.
  Without, every POST is a new payment.
"""

import hashlib
import secrets
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from sandbox.books import SETTLE_SECONDS, Account, Books
from sandbox.web import Answer, Clock

STANDING_LIMIT_CENTS = 500_00
APPROVAL_SECONDS = 600.0
_PROCESS_SECONDS = 0.3 * SETTLE_SECONDS  # RCVD before, ACSP or RJCT after
UNKNOWN_CREDITOR = "XX"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """What a POST asked for, checked."""

    product: str
    body: Mapping[str, object]
    amount_cents: int
    debtor_iban: str
    creditor_iban: str
    creditor_name: str
    end_to_end_id: str | None
    remittance: str | None
    client_id: str
    person_id: str
    x_request_id: str
    idempotency_key: str | None
    redirect_uri: str | None
    nok_redirect_uri: str | None


@dataclass(slots=True, kw_only=True)
class Payment:
    """One payment; `outcome` is None while it waits for the person."""

    payment_id: str
    instruction: Instruction
    created_at: float
    approval_id: str | None = None
    decided_at: float | None = None
    outcome: str | None = None  # ACSC, RJCT or CANC
    reason: str | None = None

    def status(self, now: float) -> str:
        """Return the ISO 20022 transaction status at this time."""
        if self.outcome is None or self.decided_at is None:
            return "RCVD"
        if self.outcome == "CANC":
            return "CANC"
        age = now - self.decided_at
        if age < _PROCESS_SECONDS:
            return "RCVD"
        if self.outcome == "ACSC" and age < SETTLE_SECONDS:
            return "ACSP"
        return self.outcome

    @property
    def waits(self) -> bool:
        """Say whether the person has still to decide."""
        return self.outcome is None


@dataclass(slots=True, kw_only=True)
class PaymentsMemory:
    """What the payments remember."""

    payments: dict[str, Payment] = field(default_factory=dict)
    approvals: dict[str, Payment] = field(default_factory=dict)  # by the id in the approval link
    answers: OrderedDict[tuple[str, str], tuple[float, bytes, Answer]] = field(default_factory=OrderedDict)


class Payments:
    """All payments of the bank."""

    def __init__(self, *, clock: Clock, books: Books, memory: PaymentsMemory) -> None:
        self._clock = clock
        self._books = books
        self._payments = memory.payments
        self._approvals = memory.approvals

    def initiate(self, instruction: Instruction) -> Payment:
        """Take up a payment; execute it at once if the standing authorisation covers it."""
        payment = Payment(payment_id=str(uuid.uuid4()), instruction=instruction, created_at=self._clock())
        self._payments[payment.payment_id] = payment
        if instruction.amount_cents <= STANDING_LIMIT_CENTS:
            self._execute(payment)
        else:
            payment.approval_id = secrets.token_urlsafe(24)
            self._approvals[payment.approval_id] = payment
        return payment

    def get(self, payment_id: str, *, client_id: str, person_id: str) -> Payment | None:
        """Return a payment of this client and person; any other looks like none."""
        payment = self._payments.get(payment_id)
        if payment is None:
            return None
        instruction = payment.instruction
        if (instruction.client_id, instruction.person_id) != (client_id, person_id):
            return None
        return self._up_to_date(payment)

    def by_reference(self, reference: str, *, product: str, client_id: str, person_id: str) -> list[Payment]:
        """Return the payments of this client and person that carried this instructionIdentification."""
        mine = (product, client_id, person_id)
        return [
            self._up_to_date(payment)
            for payment in self._payments.values()
            if payment.instruction.body.get("instructionIdentification") == reference
            and (payment.instruction.product, payment.instruction.client_id, payment.instruction.person_id) == mine
        ]

    def to_approve(self, approval_id: str) -> Payment | None:
        """Return the payment behind an approval link while it waits."""
        payment = self._approvals.get(approval_id)
        return payment if payment is not None and self._up_to_date(payment).waits else None

    def approve(self, payment: Payment) -> None:
        """Record the person's yes and execute."""
        if self._up_to_date(payment).waits:
            self._execute(payment)

    def reject(self, payment: Payment, reason: str) -> None:
        """Record the person's no."""
        if self._up_to_date(payment).waits:
            self._decide(payment, "RJCT", reason)

    def cancel(self, payment: Payment) -> bool:
        """Cancel a payment that waits for approval; say whether that was possible."""
        if not self._up_to_date(payment).waits:
            return False
        self._decide(payment, "CANC", "cancelled by the third-party provider")
        return True

    def _up_to_date(self, payment: Payment) -> Payment:
        if payment.waits and self._clock() > payment.created_at + APPROVAL_SECONDS:
            self._decide(payment, "RJCT", "nobody approved the payment in time")
        return payment

    def _execute(self, payment: Payment) -> None:
        """Decide the payment now; the clock reveals the outcome later, as in a bank that processes in the background."""
        order = payment.instruction
        debtor = self._books.accounts[order.debtor_iban]
        refusal = _refusal(order, debtor)
        if refusal is not None:
            self._decide(payment, "RJCT", refusal)
            return
        self._books.execute(
            payment_id=payment.payment_id,
            product=order.product,
            end_to_end_id=order.end_to_end_id,
            amount_cents=order.amount_cents,
            debtor=debtor,
            creditor_iban=order.creditor_iban,
            creditor_name=order.creditor_name,
            remittance=order.remittance,
            x_request_id=order.x_request_id,
            idempotency_key=order.idempotency_key,
            client_id=order.client_id,
        )
        self._decide(payment, "ACSC", None)

    def _decide(self, payment: Payment, outcome: str, reason: str | None) -> None:
        payment.outcome = outcome
        payment.reason = reason
        payment.decided_at = self._clock()


class KeyConflict(Exception):
    """The idempotency key was used with another body."""


class IdempotencyKeys:
    """First answers by client and key, for `window_seconds`."""

    def __init__(self, *, clock: Clock, window_seconds: float, memory: PaymentsMemory) -> None:
        self._clock = clock
        self._window_seconds = window_seconds
        self._answers = memory.answers

    def earlier(self, client_id: str, key: str, request: bytes) -> Answer | None:
        """Return the first answer to this key, None if it is new, KeyConflict if the request differs."""
        self._forget_old()
        known = self._answers.get((client_id, key))
        if known is None:
            return None
        if known[1] != hashlib.sha256(request).digest():
            raise KeyConflict
        return known[2]

    def remember(self, client_id: str, key: str, request: bytes, answer: Answer) -> None:
        """Keep the first answer."""
        self._answers[client_id, key] = (self._clock(), hashlib.sha256(request).digest(), answer)

    def _forget_old(self) -> None:
        limit = self._clock() - self._window_seconds
        while self._answers:
            oldest = next(iter(self._answers))
            if self._answers[oldest][0] > limit:
                return
            del self._answers[oldest]


def _refusal(order: Instruction, debtor: Account) -> str | None:
    if order.creditor_iban.startswith(UNKNOWN_CREDITOR) or order.creditor_name == UNKNOWN_CREDITOR:
        return "AC01: the creditor's account is not known"
    if debtor.available_cents < order.amount_cents:
        return "AM04: insufficient funds"
    return None
