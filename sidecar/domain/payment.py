"""A payment is made once. The states, the one table of their changes, and the permit that lets it out of the house.

The protocol and the reasons for each rule: docs/reliability.md.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from sidecar.domain.consent import AccountReference
from sidecar.domain.ids import ConsentId, OwnerId, PaymentId, ProviderId, RequestId, WorkloadId
from sidecar.domain.money import Money
from sidecar.errors import Internal

__all__ = [
    "NEVER_EXECUTED",
    "PRODUCT_CURRENCIES",
    "TERMINAL",
    "TRANSITIONS",
    "DispatchPermit",
    "Finding",
    "IdempotencyClass",
    "Payment",
    "PaymentInstruction",
    "PaymentProduct",
    "PaymentState",
    "Resolution",
]


class PaymentProduct(StrEnum):
    SEPA_CREDIT_TRANSFER = "sepa-credit-transfer"
    INSTANT_SEPA_CREDIT_TRANSFER = "instant-sepa-credit-transfer"


# Both SEPA schemes carry euro only (EPC125-05 and EPC004-16, section 1.2).
PRODUCT_CURRENCIES = {
    PaymentProduct.SEPA_CREDIT_TRANSFER: "EUR",
    PaymentProduct.INSTANT_SEPA_CREDIT_TRANSFER: "EUR",
}


class IdempotencyClass(StrEnum):
    """What a provider promises about a repeated initiation; decides what reconciliation may do (reliability 3d)."""

    KEY_WITH_WINDOW = "A"  # same key and bytes within a window give the same payment
    LOOK_UP = "B"  # a payment can be looked up by our own key, for certain after a quiet period
    NONE = "C"  # neither: an unknown outcome goes to a human


class PaymentState(StrEnum):
    INTENT = "intent"  # claimed; nothing was sent
    DISPATCHED = "dispatched"  # on record; bytes may be out; no answer yet
    RECONCILING = "reconciling"  # the outcome is unknown and being found out
    AWAITING_AUTHORISATION = "awaiting-authorisation"  # the bank has it; the owner must approve it there
    ACCEPTED = "accepted"  # the bank has it
    SETTLED = "settled"
    REJECTED = "rejected"  # never executed
    REJECTED_LATE = "rejected-late"  # accepted first, then refused by the bank
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"  # given up before anything was sent
    NEEDS_ATTENTION = "needs-attention"  # only a human can find out


_S = PaymentState
TRANSITIONS: dict[PaymentState, frozenset[PaymentState]] = {
    # INTENT -> INTENT: another run takes over before anything was sent, with the next epoch
    _S.INTENT: frozenset({_S.INTENT, _S.DISPATCHED, _S.ABANDONED}),
    # DISPATCHED -> INTENT: egress proves that not one byte was written under this permit
    _S.DISPATCHED: frozenset(
        {_S.INTENT, _S.ACCEPTED, _S.AWAITING_AUTHORISATION, _S.SETTLED, _S.REJECTED, _S.RECONCILING}
    ),
    _S.RECONCILING: frozenset(
        {_S.RECONCILING, _S.ACCEPTED, _S.AWAITING_AUTHORISATION, _S.SETTLED, _S.REJECTED, _S.NEEDS_ATTENTION}
    ),
    _S.AWAITING_AUTHORISATION: frozenset(
        {_S.AWAITING_AUTHORISATION, _S.ACCEPTED, _S.SETTLED, _S.REJECTED_LATE, _S.CANCELLED}
    ),
    _S.ACCEPTED: frozenset({_S.ACCEPTED, _S.AWAITING_AUTHORISATION, _S.SETTLED, _S.REJECTED_LATE, _S.CANCELLED}),
    _S.NEEDS_ATTENTION: frozenset({_S.ACCEPTED, _S.SETTLED, _S.REJECTED}),  # a human's finding
    _S.SETTLED: frozenset(),
    _S.REJECTED: frozenset(),
    _S.REJECTED_LATE: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.ABANDONED: frozenset(),
}
TERMINAL = frozenset(state for state, following in TRANSITIONS.items() if not following)
# Definitely no money moved and none will: what the payment had reserved of the periodic limits is free again.
NEVER_EXECUTED = frozenset({_S.REJECTED, _S.REJECTED_LATE, _S.CANCELLED, _S.ABANDONED})


class Finding(StrEnum):
    """What a person found out at the bank about a payment that needs attention."""

    EXECUTED = "executed"
    NOT_EXECUTED = "not-executed"

    @property
    def state(self) -> PaymentState:
        """Both are final: where the answer was lost there is no id of the bank's by which more could be learned."""
        return _S.SETTLED if self is Finding.EXECUTED else _S.REJECTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """Who found out what became of a payment, when, and what they checked (`reason`, in their words)."""

    finding: Finding
    reason: str
    administrator: WorkloadId
    resolve_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentInstruction:
    """What the application asked for, checked. Never changed afterwards (RTS Art. 5, dynamic linking)."""

    amount: Money
    creditor_account: AccountReference
    creditor_name: str
    debtor_account: AccountReference
    product: PaymentProduct
    remittance_information: str = ""
    end_to_end_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """`epoch` fences: an outcome is written only by the run that holds the newest one. `bank_key` is our own key towards
    the bank, made once and stored before use. `rendered_request` are the exact bytes to send, with slots for secrets."""

    id: PaymentId
    caller: WorkloadId
    request_id: RequestId
    consent: ConsentId
    owner: OwnerId
    provider: ProviderId
    instruction: PaymentInstruction
    state: PaymentState
    idempotency_class: IdempotencyClass
    bank_key: str
    create_time: datetime
    update_time: datetime
    epoch: int = 1
    attempts: int = 0  # requests that may have reached the bank
    rendered_request: bytes = b""
    dispatch_boot_id: str = ""  # the machine's run (boot) in which the first dispatch was made, and
    dispatch_boot_time_ns: int = 0  # CLOCK_BOOTTIME when its send's time began: unlike the wall clock it cannot be set
    dispatch_time: datetime | None = None  # of the first dispatch; opens the bank's idempotency window
    send_deadline_time: datetime | None = None  # of the newest dispatch: after it, nothing of ours is on the way out
    next_attempt_time: datetime | None = None  # when reconciliation or the status poll is due
    provider_payment_id: str = ""
    provider_status: str = ""
    authorisation_uri: str = ""
    status_reason: str = ""
    resolution: Resolution | None = None  # of a payment that needed attention; never changes

    def to(self, state: PaymentState, *, now: datetime, **changes: object) -> "Payment":
        """This payment in `state`. Raises Internal when the table has no such transition."""
        if state not in TRANSITIONS[self.state]:
            raise Internal("a payment cannot make this change of state")
        return replace(self, state=state, update_time=now, **changes)  # type: ignore[arg-type]

    def resolved(self, resolution: Resolution) -> "Payment":
        """This payment with a person's finding. The next epoch: nothing that still runs for it may write any more."""
        return self.to(
            resolution.finding.state,
            now=resolution.resolve_time,
            epoch=self.epoch + 1,
            status_reason=resolution.finding.name,
            resolution=resolution,
            next_attempt_time=None,
        )

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL


@dataclass(slots=True, kw_only=True)
class DispatchPermit:
    """The right to send one payment's bytes once, and until when. Made only by the store when the dispatch record is durable
    under a signed checkpoint; taken by the send; a second taking is a defect."""

    payment: PaymentId
    epoch: int
    # A moment of CLOCK_BOOTTIME: "seconds from now" would grow where a process stands still.
    send_before_boot_time_ns: int | None = None
    _redeemed: bool = field(default=False, repr=False)

    def redeem(self) -> None:
        if self._redeemed:
            raise Internal("a dispatch permit was used twice")
        self._redeemed = True
