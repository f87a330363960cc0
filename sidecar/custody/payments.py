"""Payments: made at most once each, and an unknown outcome is said to be unknown.

`initiate` is the story: claim and intent, prepare all that can fail here, dispatch record under a signed checkpoint, one bounded
send, outcome. The rules and the reasons for each: docs/reliability.md. What finds out unknown outcomes is `reconcile`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from uuid import uuid4

from sidecar.connectors.base import (
    Connector,
    InitiationAccepted,
    InitiationReading,
    InitiationRefused,
    InitiationUnknown,
)
from sidecar.custody.access import (
    check_same_request,
    connector_for,
    consent_for,
    may_see,
    permitted_page,
    request_digest,
)
from sidecar.custody.owned_tasks import OwnedTasks
from sidecar.custody.persisting import persist
from sidecar.custody.provider_calls import sign_request
from sidecar.custody.rendered import encode_request
from sidecar.custody.tokens import Access, Tokens
from sidecar.domain.account import PsuContext
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.caller import Caller
from sidecar.domain.consent import AccountReference, Consent, Purpose
from sidecar.domain.ids import ConsentId, OwnerId, PaymentId, ProviderId, RequestId, new_payment_id
from sidecar.domain.limits import Reservation
from sidecar.domain.money import Money
from sidecar.domain.payment import (
    PRODUCT_CURRENCIES,
    TERMINAL,
    IdempotencyClass,
    Payment,
    PaymentInstruction,
    PaymentProduct,
    PaymentState,
)
from sidecar.domain.provider import Answer, NotSent, ProviderRequest, SendOutcome, Unknown
from sidecar.domain.text import check_iban, check_sepa_text
from sidecar.errors import (
    CustodyError,
    FieldViolation,
    InvalidField,
    NotFound,
    PreconditionFailed,
    StaleVersion,
    Unavailable,
)
from sidecar.ports import Claim, Clock, Hsm, PaymentFilter, Prepared, Store, TokenEgress

__all__ = [
    "INTENT_SECONDS",
    "NETWORK_LIFE_SECONDS",
    "UNKNOWN_POLL_SECONDS",
    "InitiatePayment",
    "Payments",
    "payment_draft",
    "reading_of",
]

# How long a run may take from the intent to the dispatch record before the payment is given up.
INTENT_SECONDS = 60.0
# After the send deadline nothing of ours is on its way out; this long after it, nothing is on its way through the network.
NETWORK_LIFE_SECONDS = 5.0
# An unknown outcome is worked on at least this often, so that it is known a minute after what was in the way has gone.
UNKNOWN_POLL_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InitiatePayment:
    """`debtor_account` may be left out where the consent names exactly one account."""

    consent: ConsentId
    owner: OwnerId
    request_id: RequestId
    amount: Money
    creditor_account: AccountReference
    creditor_name: str
    product: PaymentProduct
    debtor_account: AccountReference | None = None
    remittance_information: str = ""
    end_to_end_id: str = ""
    psu: PsuContext | None = None


class Payments:
    def __init__(
        self,
        *,
        store: Store,
        egress: TokenEgress,
        hsm: Hsm,
        clock: Clock,
        connectors: Mapping[ProviderId, Connector],
        tokens: Tokens,
        tasks: OwnedTasks,
    ) -> None:
        self._store = store
        self._egress = egress
        self._hsm = hsm
        self._clock = clock
        self._connectors = connectors
        self._tokens = tokens
        self._tasks = tasks
        self._running: set[PaymentId] = set()

    # -- the story

    async def initiate(self, caller: Caller, request: InitiatePayment) -> Payment:
        """The payment as it stands after one try; with an earlier request id, that payment as it stands.

        Raises InvalidField, NotFound, Refused, PreconditionFailed (nothing was and will be sent), Conflict (the request id was
        used for another payment) and Unavailable (nothing was sent; the same request id goes on with the same payment).
        """
        consent = await consent_for(self._store, caller, request.consent, request.owner)
        claim = _claim(caller, request, now=self._clock.now())
        earlier = await self._store.claim(caller.workload, request.request_id)
        if earlier is None:
            instruction = self._check(caller, consent, request)
            payment = self._intend(caller, consent, request, instruction, claim)
            reservations = (
                *consent.reservations(request.amount, payment.create_time),
                *caller.reservations(request.amount, payment.create_time),
            )
            begun = await self._tasks.run(self._begin(payment, consent, request.psu, claim, reservations))
            if isinstance(begun, Payment):
                return begun
            earlier = begun
        check_same_request(earlier, claim)
        payment = await self._existing(PaymentId(earlier.resource))
        if payment.state is not PaymentState.INTENT or payment.id in self._running:
            return payment
        self._check(caller, consent, request)  # nothing was sent yet, and policy or consent may have changed meanwhile
        return await self._tasks.run(self._take_up(payment, consent, request.psu))

    async def _begin(
        self,
        payment: Payment,
        consent: Consent,
        psu: PsuContext | None,
        claim: Claim,
        reservations: Sequence[Reservation],
    ) -> Payment | Claim:
        """The claim with the intent, within all limits, and the way from there; or the claim that was there first."""
        with self._run_of(payment.id):
            draft = payment_draft(payment, consent, AuditEvent.PAYMENT_INTENT, AuditOutcome.INTENDED)
            earlier = await self._store.claim_payment(payment, claim, draft, reservations=reservations)
            return earlier or await self._drive(payment, consent, psu)

    async def _take_up(self, payment: Payment, consent: Consent, psu: PsuContext | None) -> Payment:
        """A repeat finds that nothing was sent and nobody is at it: the same payment goes on, fenced by the next epoch."""
        if payment.id in self._running:
            return await self._existing(payment.id)
        with self._run_of(payment.id):
            taken = payment.to(
                PaymentState.INTENT,
                now=self._clock.now(),
                epoch=payment.epoch + 1,
                next_attempt_time=self._in(INTENT_SECONDS),
            )
            draft = payment_draft(taken, consent, AuditEvent.PAYMENT_INTENT, AuditOutcome.INTENDED)
            try:
                await self._store.change_payment(
                    taken, expected_states=frozenset({PaymentState.INTENT}), expected_epoch=payment.epoch, audit=[draft]
                )
            except StaleVersion:
                return await self._existing(payment.id)
            return await self._drive(taken, consent, psu)

    async def _drive(self, payment: Payment, consent: Consent, psu: PsuContext | None) -> Payment:
        """From the intent to a recorded outcome. Until the dispatch record nothing has left; after it nothing is repeated."""
        connector = connector_for(self._connectors, consent.provider)
        consent.check_usable(Purpose.PAYMENTS, self._clock.now())
        access = await self._tokens.access(consent)
        unsigned = connector.initiate_payment(
            access.consent, payment.instruction, bank_key=payment.bank_key, psu=psu, call_id=payment.bank_key
        )
        request = await sign_request(self._hsm, unsigned)
        prepared = await self.prepare(request, access, connector)
        begin_ns, now = self._clock.boot_time_ns(), self._clock.now()
        send_by = now + timedelta(seconds=connector.descriptor.payments.send_seconds)
        dispatched = payment.to(
            PaymentState.DISPATCHED,
            now=now,
            attempts=1,
            rendered_request=encode_request(request),
            dispatch_time=now,
            dispatch_boot_id=self._clock.boot_id(),
            dispatch_boot_time_ns=begin_ns,
            send_deadline_time=send_by,
            next_attempt_time=send_by + timedelta(seconds=NETWORK_LIFE_SECONDS),
        )
        try:
            outcome = await self.dispatch(dispatched, access.consent, prepared, connector, begin_ns=begin_ns)
        except StaleVersion:
            return await self._existing(payment.id)  # another run took it over before anything was sent, and goes on
        return await self._record(dispatched, access.consent, connector, outcome)

    @contextmanager
    def _run_of(self, payment_id: PaymentId) -> Iterator[None]:
        self._running.add(payment_id)
        try:
            yield
        finally:
            self._running.discard(payment_id)

    async def prepare(self, request: ProviderRequest, access: Access, connector: Connector) -> Prepared:
        return await self._egress.prepare(
            request,
            wrapped_data_key=access.consent.wrapped_data_key,
            secrets=[access.secret],
            deadline_seconds=connector.descriptor.call_seconds,
        )

    async def dispatch(
        self, dispatched: Payment, consent: Consent, prepared: Prepared, connector: Connector, *, begin_ns: int
    ) -> SendOutcome:
        """The dispatch record under a signed checkpoint, and only then the one send that it permits.

        The send's time runs from `begin_ns` (CLOCK_BOOTTIME), which was read before the record's own times and the last checks:
        a process that was paused anywhere after it sends nothing, and who reads the record knows when the send is over.
        """
        send_by_ns = begin_ns + int(connector.descriptor.payments.send_seconds * 1e9)
        draft = payment_draft(
            dispatched,
            consent,
            AuditEvent.PAYMENT_DISPATCHED,
            AuditOutcome.INTENDED,
            detail=hashlib.sha256(dispatched.rendered_request).digest(),
        )
        expected_epoch = dispatched.epoch - (1 if dispatched.state is PaymentState.RECONCILING else 0)
        try:
            self._check_still_allowed(dispatched)
            permit = await self._store.record_dispatch(dispatched, expected_epoch=expected_epoch, audit=draft)
        except BaseException as error:
            await self._discard(prepared)
            if isinstance(error, Unavailable) and dispatched.state is PaymentState.DISPATCHED:
                # The record may still become durable, but nothing was sent and nothing will be: not unknown, not a human's work.
                undone = NotSent(code="DISPATCH_NOT_RECORDED")
                self._tasks.begin(self._back_to_intent(dispatched, consent, undone))
            raise
        permit.send_before_boot_time_ns = send_by_ns
        left_seconds = (send_by_ns - self._clock.boot_time_ns()) / 1e9
        if left_seconds <= 0:
            await self._discard(prepared)
            return NotSent(code="SEND_DEADLINE_PASSED")
        try:
            return await self._egress.send(prepared, permit, deadline_seconds=left_seconds)
        except CustodyError:
            return Unknown(code="EGRESS_FAILED")  # the dispatch is on record: whatever went wrong, bytes may be out

    def _check_still_allowed(self, dispatched: Payment) -> None:
        """Preparing takes time, and the window of a repeat may have closed meanwhile. That the consent has not ended is the
        store's to say, in the transaction of the record."""
        if dispatched.state is PaymentState.RECONCILING and not self.window_is_open(dispatched):
            raise PreconditionFailed("OUTCOME_UNKNOWN", "the provider's window for repeats has closed")

    def window_is_open(self, payment: Payment) -> bool:
        """Whether the provider still promises that a repeat under the same key is the same payment."""
        connector = self._connectors.get(payment.provider)
        if connector is None or payment.dispatch_time is None:
            return False
        idempotency = connector.descriptor.payments.idempotency
        if idempotency.window_seconds is None:
            return False
        usable_seconds = idempotency.window_seconds - idempotency.margin_seconds
        now = self._clock.now()
        if now < max(payment.dispatch_time, payment.update_time):
            return False  # the wall clock was set back: how much of the window is left cannot be told
        if payment.dispatch_boot_id == self._clock.boot_id():
            since_ns = self._clock.boot_time_ns() - payment.dispatch_boot_time_ns
            if since_ns >= usable_seconds * 1e9:
                return False
        return now < payment.dispatch_time + timedelta(seconds=usable_seconds)

    async def _discard(self, prepared: Prepared) -> None:
        with suppress(Unavailable):  # an egress that is gone holds nothing any more
            await self._egress.discard(prepared)

    async def _record(
        self, dispatched: Payment, consent: Consent, connector: Connector, outcome: SendOutcome
    ) -> Payment:
        if isinstance(outcome, NotSent):
            await self._back_to_intent(dispatched, consent, outcome)
            raise Unavailable(
                "PROVIDER_UNAVAILABLE", "nothing was sent to the provider; repeat with the same request id"
            )
        after = self.after(dispatched, connector, reading_of(outcome, connector, dispatched))
        return await self.write_outcome(dispatched, after, consent)

    async def _back_to_intent(self, dispatched: Payment, consent: Consent, outcome: NotSent) -> None:
        """Egress proves that this permit's request never began: the same payment may go on under a new permit."""
        intent = dispatched.to(
            PaymentState.INTENT,
            now=self._clock.now(),
            epoch=dispatched.epoch + 1,
            attempts=0,
            status_reason=outcome.code,
            next_attempt_time=self._in(INTENT_SECONDS),
        )
        draft = payment_draft(intent, consent, AuditEvent.PAYMENT_OUTCOME, AuditOutcome.FAILED, reason="NOT_SENT")
        with suppress(StaleVersion):  # whoever took over finds out; that nothing was sent under this permit stays true
            await self._persist(dispatched, intent, draft)

    def after(self, dispatched: Payment, connector: Connector, reading: InitiationReading) -> Payment:
        """The payment after what its newest send brought back. The refusal of a repeat settles nothing (rule 9)."""
        now = self._clock.now()
        terms = connector.descriptor.payments
        longest_seconds = min(terms.longest_poll_seconds, UNKNOWN_POLL_SECONDS)
        match reading:
            case InitiationAccepted():
                state = _initial(reading.reading.state)
                return dispatched.to(
                    state,
                    now=now,
                    provider_payment_id=reading.provider_payment_id,
                    provider_status=reading.reading.provider_status,
                    authorisation_uri=reading.reading.authorisation_uri,
                    status_reason="",
                    next_attempt_time=None if state in TERMINAL else self._in(terms.first_poll_seconds),
                )
            case InitiationRefused() if dispatched.state is PaymentState.DISPATCHED:
                return dispatched.to(PaymentState.REJECTED, now=now, status_reason=reading.code, next_attempt_time=None)
            case InitiationRefused() | InitiationUnknown():
                return dispatched.to(
                    PaymentState.RECONCILING,
                    now=now,
                    epoch=dispatched.epoch + 1,
                    status_reason=reading.code,
                    next_attempt_time=self._in(min(_pause_seconds(dispatched.attempts), longest_seconds)),
                )

    async def write_outcome(self, before: Payment, after: Payment, consent: Consent | None) -> Payment:
        """Writes `after` where nobody has taken the payment over; gives what stands in the store afterwards."""
        draft = payment_draft(
            after, consent, AuditEvent.PAYMENT_OUTCOME, _audit_outcome(after.state), reason=_reason(after.status_reason)
        )
        try:
            await self._persist(before, after, draft)
        except StaleVersion:
            return await self._existing(before.id)  # fenced off: whoever took over writes the outcome
        return after

    async def _persist(self, before: Payment, after: Payment, draft: AuditDraft) -> None:
        """A bank's answer comes once: while the store does not answer, it is tried again."""
        await persist(
            self._clock,
            lambda: self._store.change_payment(
                after, expected_states=frozenset({before.state}), expected_epoch=before.epoch, audit=[draft]
            ),
        )

    # -- read

    async def get(self, caller: Caller, payment_id: PaymentId, owner: OwnerId | None) -> Payment:
        if owner is not None and not caller.is_administrator:
            caller.check_owner(owner)
        payment = await self._store.payment(payment_id)
        if (
            payment is None
            or not may_see(caller, payment.caller, payment.provider)
            or (owner != payment.owner and not (owner is None and caller.is_administrator))
        ):
            raise NotFound("PAYMENT_NOT_FOUND", "there is no such payment for this owner")
        return payment

    async def list(self, caller: Caller, where: PaymentFilter, *, after: str, limit: int) -> Sequence[Payment]:
        if not caller.is_administrator:
            if where.owner is None:
                raise InvalidField(FieldViolation(field="owner", rule="required", description="must name the owner"))
            caller.check_owner(where.owner)
            where = replace(where, caller=caller.workload)
        return await permitted_page(partial(self._store.payments, where), caller, after=after, limit=limit)

    def is_running(self, payment_id: PaymentId) -> bool:
        return payment_id in self._running

    # -- parts

    def _check(self, caller: Caller, consent: Consent, request: InitiatePayment) -> PaymentInstruction:
        """The instruction, if policy, consent and form allow it. Nothing is written before this has passed."""
        connector = connector_for(self._connectors, consent.provider)
        caller.check_purposes(frozenset({Purpose.PAYMENTS}))
        if request.amount.currency_code != PRODUCT_CURRENCIES[request.product]:
            raise _violation("amount.currency_code", "product", "must be the currency of the payment product")
        if request.amount.minor_units <= 0:
            raise _violation("amount", "positive", "must be more than zero")
        caller.check_amount(request.amount)
        consent.check_usable(Purpose.PAYMENTS, self._clock.now())
        consent.check_amount(request.amount)
        if request.product not in connector.descriptor.payments.products:
            raise _violation("product", "provider", "must be a payment product that the provider offers")
        debtor = _debtor(consent, request)
        check_iban(request.creditor_account.iban, field="creditor_account.iban")
        if request.creditor_account.iban == debtor.iban:
            raise _violation("creditor_account.iban", "other_account", "must not be the account that pays")
        return PaymentInstruction(
            amount=request.amount,
            creditor_account=request.creditor_account,
            creditor_name=check_sepa_text(request.creditor_name, field="creditor_name", min_length=1, max_length=70),
            debtor_account=debtor,
            product=request.product,
            remittance_information=check_sepa_text(
                request.remittance_information, field="remittance_information", max_length=140
            ),
            end_to_end_id=check_sepa_text(request.end_to_end_id, field="end_to_end_id", max_length=35),
        )

    def _intend(
        self,
        caller: Caller,
        consent: Consent,
        request: InitiatePayment,
        instruction: PaymentInstruction,
        claim: Claim,
    ) -> Payment:
        connector = connector_for(self._connectors, consent.provider)
        now = self._clock.now()
        return Payment(
            id=PaymentId(claim.resource),
            caller=caller.workload,
            request_id=request.request_id,
            consent=consent.id,
            owner=consent.owner,
            provider=consent.provider,
            instruction=instruction,
            state=PaymentState.INTENT,
            idempotency_class=IdempotencyClass(connector.descriptor.payments.idempotency.class_),
            bank_key=str(uuid4()),
            create_time=now,
            update_time=now,
            next_attempt_time=self._in(INTENT_SECONDS),
        )

    async def _existing(self, payment_id: PaymentId) -> Payment:
        payment = await self._store.payment(payment_id)
        if payment is None:
            raise NotFound("PAYMENT_NOT_FOUND", "there is no such payment for this owner")
        return payment

    def _in(self, seconds: float) -> datetime:
        return self._clock.now() + timedelta(seconds=seconds)


def _claim(caller: Caller, request: InitiatePayment, *, now: datetime) -> Claim:
    debtor = request.debtor_account or AccountReference(iban="")
    digest = request_digest(
        request.consent,
        request.owner,
        f"{request.amount.currency_code} {request.amount.minor_units}",
        f"{debtor.iban}/{debtor.currency_code}",
        f"{request.creditor_account.iban}/{request.creditor_account.currency_code}",
        request.creditor_name,
        request.product,
        request.remittance_information,
        request.end_to_end_id,
    )
    return Claim(
        caller=caller.workload,
        request_id=request.request_id,
        method="InitiatePayment",
        digest=digest,
        resource=new_payment_id(now),
    )


def reading_of(outcome: SendOutcome, connector: Connector, payment: Payment) -> InitiationReading:
    """What a send brought back. Only a complete answer can say yes or no."""
    if not isinstance(outcome, Answer):
        return InitiationUnknown(code=outcome.code)
    return connector.read_initiation(outcome, call_id=payment.bank_key)


def payment_draft(
    payment: Payment,
    consent: Consent | None,
    event: AuditEvent,
    outcome: AuditOutcome,
    *,
    reason: str = "",
    detail: bytes = b"",
) -> AuditDraft:
    return AuditDraft(
        event=event,
        outcome=outcome,
        caller=payment.caller,
        provider=payment.provider,
        consent=payment.consent,
        payment=payment.id,
        subject=consent.subject() if consent else b"",
        epoch=payment.epoch,
        reason=reason,
        detail_digest=detail,
    )


def _initial(state: PaymentState) -> PaymentState:
    """A payment that the very answer to its initiation calls refused or cancelled was never accepted."""
    return PaymentState.REJECTED if state in (PaymentState.REJECTED_LATE, PaymentState.CANCELLED) else state


def _pause_seconds(attempts: int) -> float:
    """1 s after the first send, then twice as long each time; bounded, because a window of a day has room for many attempts."""
    return 2.0 ** min(max(attempts - 1, 0), 16)


def _audit_outcome(state: PaymentState) -> AuditOutcome:
    if state in (PaymentState.REJECTED, PaymentState.REJECTED_LATE, PaymentState.CANCELLED):
        return AuditOutcome.REFUSED
    return AuditOutcome.UNKNOWN if state is PaymentState.RECONCILING else AuditOutcome.SUCCEEDED


def _reason(code: str) -> str:
    """Reasons in the log have no digits: HTTP_500 becomes HTTP, the row has the whole."""
    return "".join(character for character in code if character == "_" or "A" <= character <= "Z").strip("_")[:63]


def _debtor(consent: Consent, request: InitiatePayment) -> AccountReference:
    if request.debtor_account is None:
        if len(consent.accounts) != 1:
            raise _violation(
                "debtor_account", "required", "must be named, because the consent does not name exactly one account"
            )
        return consent.accounts[0]
    check_iban(request.debtor_account.iban, field="debtor_account.iban")
    if consent.named_account(request.debtor_account) is None:
        raise PreconditionFailed("ACCOUNT_NOT_CONSENTED", "the consent does not cover the account that is to pay")
    return request.debtor_account


def _violation(field: str, rule: str, description: str) -> InvalidField:
    return InvalidField(FieldViolation(field=field, rule=rule, description=description))
