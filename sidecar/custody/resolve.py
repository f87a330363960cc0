"""What a person found out about a payment that no machine can find out: written down once, with who said it and what they checked.

Rules: only a payment that needs attention is resolved; the finding is final and on record; of two administrators one is first and
the other is told what stands; "executed" is said when the bank's books show the payment, "not executed" when the bank says that it
never will be, which it cannot know while a request of ours may be under way. Only that gives back what the payment had reserved
of limits.
"""

import hashlib
from dataclasses import dataclass, replace
from datetime import timedelta

from sidecar.custody.access import check_same_request, request_digest
from sidecar.custody.payments import NETWORK_LIFE_SECONDS, Payments, payment_draft
from sidecar.domain.audit import AuditEvent, AuditOutcome
from sidecar.domain.caller import Caller
from sidecar.domain.ids import PaymentId, RequestId
from sidecar.domain.payment import Finding, Payment, PaymentState, Resolution
from sidecar.errors import PreconditionFailed, StaleVersion
from sidecar.ports import Claim, Clock, Store

__all__ = ["ResolvePayment", "Resolver"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvePayment:
    """`reason` says what was checked, in the administrator's words."""

    payment: PaymentId
    finding: Finding
    reason: str
    request_id: RequestId


class Resolver:
    def __init__(self, *, store: Store, clock: Clock, payments: Payments) -> None:
        self._store = store
        self._clock = clock
        self._payments = payments

    async def resolve(self, caller: Caller, request: ResolvePayment) -> Payment:
        """The payment with the finding; a repeat with the same request id gets it again.

        Raises NotFound, Conflict (the request id was used for something else) and PreconditionFailed with the payment's state.
        """
        payment = await self._payments.get(caller, request.payment, None)
        claim = _claim(caller, request)
        earlier = await self._store.claim(caller.workload, request.request_id)
        if earlier is not None:
            check_same_request(earlier, claim)
            return payment
        if payment.state is not PaymentState.NEEDS_ATTENTION:
            raise _not_resolvable(payment)
        if request.finding is Finding.NOT_EXECUTED:
            self._check_nothing_is_under_way(payment)
        return await self._record(caller, request, payment, claim)

    def _check_nothing_is_under_way(self, payment: Payment) -> None:
        """Before that the bank may say in good faith that it has nothing, and have it a moment later."""
        deadline = payment.send_deadline_time
        if deadline and self._clock.now() < deadline + timedelta(seconds=NETWORK_LIFE_SECONDS):
            raise PreconditionFailed(
                "PAYMENT_NOT_RESOLVABLE",
                "a request to the bank may still be under way; ask the bank and try again in a quarter of a minute",
                metadata={"payment": f"payments/{payment.id}", "state": payment.state.value},
            )

    async def _record(self, caller: Caller, request: ResolvePayment, payment: Payment, claim: Claim) -> Payment:
        resolution = Resolution(
            finding=request.finding,
            reason=request.reason,
            administrator=caller.workload,
            resolve_time=self._clock.now(),
        )
        resolved = payment.resolved(resolution)
        draft = payment_draft(
            resolved,
            await self._store.consent(payment.consent),
            AuditEvent.PAYMENT_RESOLVED,
            AuditOutcome.SUCCEEDED,
            reason=request.finding.name,
            detail=hashlib.sha256(request.reason.encode()).digest(),
        )
        try:
            earlier = await self._store.change_payment(
                resolved,
                expected_states=frozenset({PaymentState.NEEDS_ATTENTION}),
                expected_epoch=payment.epoch,
                claim=claim,
                audit=[replace(draft, caller=caller.workload)],
            )
        except StaleVersion as stale:
            raise _not_resolvable(await self._payments.get(caller, payment.id, None)) from stale
        if earlier is not None:
            check_same_request(earlier, claim)
            return await self._payments.get(caller, payment.id, None)
        return resolved


def _claim(caller: Caller, request: ResolvePayment) -> Claim:
    return Claim(
        caller=caller.workload,
        request_id=request.request_id,
        method="ResolvePayment",
        digest=request_digest(request.payment, request.finding, request.reason),
        resource=request.payment,
    )


def _not_resolvable(payment: Payment) -> PreconditionFailed:
    return PreconditionFailed(
        "PAYMENT_NOT_RESOLVABLE",
        "only a payment that needs attention can be resolved; look at it as it stands",
        metadata={"payment": f"payments/{payment.id}", "state": payment.state.value},
    )
