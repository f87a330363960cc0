"""Finding out what became of payments, by the provider's class, fenced by the epoch.

Nothing here ever makes a new payment: a class A provider gets the identical bytes under the same key within its window; a class B
provider is asked for the payment by our key, once nothing of ours can be under way and its quiet period is over; everything else
goes to a human. The refusal of a repeat settles nothing, and neither does "not found", except where the provider promises that
what it has not got by then is not made later.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

from sidecar.connectors.base import (
    Connector,
    InitiationUnknown,
    PaymentReading,
    Problem,
    ProblemKind,
    Reading,
    UnsignedRequest,
)
from sidecar.custody.access import connector_for
from sidecar.custody.payments import (
    INTENT_SECONDS,
    NETWORK_LIFE_SECONDS,
    UNKNOWN_POLL_SECONDS,
    Payments,
    payment_draft,
    reading_of,
)
from sidecar.custody.provider_calls import answer_of, new_call_id, problem_error, sign_request
from sidecar.custody.rendered import decode_request
from sidecar.custody.tokens import Access, Tokens
from sidecar.domain.audit import AuditEvent, AuditOutcome
from sidecar.domain.consent import Consent, Purpose
from sidecar.domain.ids import PaymentId, ProviderId
from sidecar.domain.payment import TERMINAL, IdempotencyClass, Payment, PaymentState
from sidecar.domain.provider import NotSent
from sidecar.errors import CustodyError, Exhausted, Internal, PreconditionFailed, StaleVersion, Unavailable
from sidecar.ports import Clock, Hsm, Store, TokenEgress

__all__ = ["Reconciler"]

T = TypeVar("T")

# A provider that is no longer configured may come back with the next configuration.
_WITHOUT_PROVIDER_SECONDS = 60.0

_A_DAY_SECONDS = 86_400.0
_OLD_PAYMENT_POLL_SECONDS = 3600.0  # an owner who has not approved within a day is not waited for by the minute
_STEPS_PER_PROVIDER = 32
_REMEMBERED = 10_000
_FOR_EVER = timedelta(days=36_500)
# What nobody puts off further than this, except where a bank asks for it or its quiet period is longer.
_FURTHEST = {
    PaymentState.INTENT: timedelta(seconds=INTENT_SECONDS),
    PaymentState.DISPATCHED: timedelta(seconds=UNKNOWN_POLL_SECONDS),
    PaymentState.RECONCILING: timedelta(seconds=UNKNOWN_POLL_SECONDS),
}
_NO_LONGER_THAN = timedelta(seconds=2)
# A clock that is only made to go slower is not set back.
_SLEW = timedelta(seconds=1)
# A provider that cannot be asked for so long is not asked any more: a human is.
_LOOK_UP_SECONDS = 86_400.0
_UNKNOWN = frozenset({PaymentState.DISPATCHED, PaymentState.RECONCILING})
_TAKEN_OVER = frozenset({PaymentState.DISPATCHED})
_FOLLOWED = frozenset({PaymentState.ACCEPTED, PaymentState.AWAITING_AUTHORISATION})


class Reconciler:
    def __init__(
        self,
        *,
        store: Store,
        egress: TokenEgress,
        hsm: Hsm,
        clock: Clock,
        connectors: Mapping[ProviderId, Connector],
        tokens: Tokens,
        payments: Payments,
    ) -> None:
        self._store = store
        self._egress = egress
        self._hsm = hsm
        self._clock = clock
        self._connectors = connectors
        self._tokens = tokens
        self._payments = payments
        self._at_work: dict[PaymentId, ProviderId] = {}
        self._asked_ns: OrderedDict[PaymentId, int] = OrderedDict()
        self._seen_unknown_ns: OrderedDict[PaymentId, int] = OrderedDict()
        self._newest_round: tuple[datetime, int] | None = None  # by the wall clock and by CLOCK_BOOTTIME
        self._newest_sweep_ns = 0  # when it began
        self._sweep: set[PaymentId] | None = (
            None  # who has had a turn since the wall clock was set back; None: all have
        )

    async def run_due(self, *, limit: int = 200) -> int:
        """One step for every payment whose time has come; returns how many there were.

        Raises the first error of a step that could not even be put off, after all steps were tried. One payment that cannot be
        worked on keeps no other from its turn.
        """
        due = list(await self._store.due_payments(self._clock.now(), limit=limit))
        self._notice_clock_set_back()
        sweep = self._sweep
        if sweep is not None:
            due += await self._put_off_too_far(sweep, limit=limit)
        reserved = [payment for payment in due if self._reserve(payment)]
        results = await asyncio.gather(*map(self._reserved_step, reserved), return_exceptions=True)
        if sweep is not None:
            done = zip(reserved, results, strict=True)
            had_it = (payment for payment, result in done if result is None and payment.state not in _TAKEN_OVER)
            sweep.update(payment.id for payment in had_it)
        for result in results:
            if isinstance(result, CustodyError) or not isinstance(result, Exception | None):
                raise result
            if result is not None:
                raise Internal from result
        return len(due)

    def _notice_clock_set_back(self) -> None:
        """A process that begins does not know what the wall clock showed before; and now and then one looks all the same, because
        another sidecar's clock may have been ahead, and its payments are nobody's when it has ended."""
        now, boot_ns = self._clock.now(), self._clock.boot_time_ns()
        before, self._newest_round = self._newest_round, (now, boot_ns)
        is_set_back = before is None or before[0] + timedelta(seconds=(boot_ns - before[1]) / 1e9) - now > _SLEW
        is_time = self._sweep is None and boot_ns - self._newest_sweep_ns >= UNKNOWN_POLL_SECONDS * 1e9
        if is_set_back or is_time:
            self._sweep, self._newest_sweep_ns = set(), boot_ns

    async def _put_off_too_far(self, sweep: set[PaymentId], *, limit: int) -> list[Payment]:
        """Payments that nobody has put off for so long: the wall clock was set back, perhaps while no sidecar ran, and they would
        wait until it stands there again. Each has one turn; what is still being sent has it when that is over."""
        now = self._clock.now()
        waiting = await self._store.due_payments(now + _FOR_EVER, limit=limit)
        for payment in waiting:
            if payment.state in _UNKNOWN:
                self._first_seen_ns(payment)
        late = [payment for payment in waiting if _is_put_off_too_far(payment, now) and payment.id not in sweep]
        whole = len(waiting) < limit or any(payment.state in _FOLLOWED for payment in waiting)  # which come last
        if whole and not late and self._sweep is sweep:  # rounds overlap, and the clock may have been set again
            self._sweep = None
        return late

    def _reserve(self, payment: Payment) -> bool:
        """Takes the payment for one step. Rounds overlap, so it is taken here and now and not when the step's task begins: a
        payment is worked on once at a time, and a provider that hangs keeps only its own payments waiting."""
        if self._payments.is_running(payment.id) or payment.id in self._at_work:
            return False
        if sum(provider == payment.provider for provider in self._at_work.values()) >= _STEPS_PER_PROVIDER:
            return False
        self._at_work[payment.id] = payment.provider
        return True

    async def latest(self, payment: Payment) -> Payment:
        """The payment with the provider's news, where it is one that is followed and was not asked for just now.

        A provider that does not answer leaves the payment as it stands.
        """
        connector = self._connectors.get(payment.provider)
        if payment.state not in _FOLLOWED or payment.next_attempt_time is None or connector is None:
            return payment
        pace_ns = int(connector.descriptor.payments.first_poll_seconds * 1e9)
        now_ns = self._clock.boot_time_ns()
        if now_ns - self._asked_ns.get(payment.id, now_ns - pace_ns) < pace_ns:
            return payment
        await self.step(payment)
        return await self._store.payment(payment.id) or payment

    async def step(self, payment: Payment) -> None:
        """One step for one payment, if nobody is at it. A step that cannot be made now is put off, never dropped."""
        if self._reserve(payment):
            await self._reserved_step(payment)

    async def _reserved_step(self, payment: Payment) -> None:
        try:
            if payment.state in _FOLLOWED:  # another round may just have read a newer status, which must not be lost
                payment = await self._store.payment(payment.id) or payment
            await self._step(payment)
        except StaleVersion:
            return  # another sidecar was faster; the row has its own next time
        finally:
            del self._at_work[payment.id]

    async def _step(self, payment: Payment) -> None:
        match payment.state:
            case PaymentState.INTENT:
                await self._abandon(payment)
            case PaymentState.DISPATCHED:
                await self._take_over(payment)
            case PaymentState.RECONCILING if self._can_be_repeated(payment):
                await self._put_off_on_error(payment, self._repeat(payment))
            case PaymentState.RECONCILING if self._can_be_looked_up(payment):
                await self._put_off_on_error(payment, self._look_up(payment))
            case PaymentState.RECONCILING:
                await self._hand_over(
                    payment
                )  # where the store is away the payment stays due: a human is not asked later
            case PaymentState.ACCEPTED | PaymentState.AWAITING_AUTHORISATION:
                await self._put_off_on_error(payment, self._follow(payment))
            case _:
                return  # it has come to its end since it was listed

    async def _abandon(self, payment: Payment) -> None:
        """Nothing was sent, and nobody has gone on with it in time."""
        now = self._clock.now()
        if payment.next_attempt_time is not None and payment.next_attempt_time > now:  # the wall clock was set back
            await self._wait(payment, INTENT_SECONDS)
            return
        abandoned = payment.to(
            PaymentState.ABANDONED, now=self._clock.now(), status_reason="NOT_SENT", next_attempt_time=None
        )
        await self._change(payment, abandoned, AuditEvent.PAYMENT_ABANDONED, AuditOutcome.FAILED)

    async def _take_over(self, payment: Payment) -> None:
        """The run that dispatched it is gone, and nothing of its send can still be under way."""
        if self._seconds_until_over(payment) > 0:
            return  # the wall clock was set; it comes up again
        reconciling = payment.to(
            PaymentState.RECONCILING,
            now=self._clock.now(),
            epoch=payment.epoch + 1,
            status_reason="SENDER_LOST",
            next_attempt_time=self._clock.now(),
        )
        await self._change(payment, reconciling, AuditEvent.PAYMENT_RECONCILING, AuditOutcome.UNKNOWN)

    def _can_be_repeated(self, payment: Payment) -> bool:
        is_class_a = payment.idempotency_class is IdempotencyClass.KEY_WITH_WINDOW
        return is_class_a and self._payments.window_is_open(payment)

    async def _repeat(self, payment: Payment) -> None:
        """Class A: the identical bytes under the same key, on a new permit."""
        connector = connector_for(self._connectors, payment.provider)
        access = await self._access(payment)
        # Another sidecar may have dispatched it and found its outcome unknown; each log is judged by itself, so it says first that
        # the payment is reconciled here.
        await self._store.record(
            [payment_draft(payment, access.consent, AuditEvent.PAYMENT_RECONCILING, AuditOutcome.UNKNOWN)]
        )
        prepared = await self._payments.prepare(decode_request(payment.rendered_request), access, connector)
        begin_ns = self._clock.boot_time_ns()
        seconds = connector.descriptor.payments.send_seconds
        repeated = payment.to(
            PaymentState.RECONCILING,
            now=self._clock.now(),
            epoch=payment.epoch + 1,
            attempts=payment.attempts + 1,
            send_deadline_time=self._clock.now() + timedelta(seconds=seconds),
            next_attempt_time=self._clock.now() + timedelta(seconds=seconds + NETWORK_LIFE_SECONDS),
        )
        outcome = await self._payments.dispatch(repeated, access.consent, prepared, connector, begin_ns=begin_ns)
        reading = (
            InitiationUnknown(code=outcome.code)
            if isinstance(outcome, NotSent)
            else reading_of(outcome, connector, payment)
        )
        after = self._payments.after(repeated, connector, reading)
        await self._payments.write_outcome(repeated, after, access.consent)

    def _can_be_looked_up(self, payment: Payment) -> bool:
        connector = self._connectors.get(payment.provider)
        if (
            payment.idempotency_class is not IdempotencyClass.LOOK_UP
            or connector is None
            or payment.dispatch_time is None
        ):
            return False
        offered = connector.descriptor.payments.idempotency.quiet_seconds is not None
        return offered and self._clock.now() < payment.dispatch_time + timedelta(seconds=_LOOK_UP_SECONDS)

    async def _look_up(self, payment: Payment) -> None:
        """Class B: what became of our key, asked for under the next epoch, and not before the answer can be relied upon."""
        connector = connector_for(self._connectors, payment.provider)
        wait_seconds = self._seconds_until_quiet(payment, connector)
        if wait_seconds > 0:
            # Another sidecar may have seen it earlier than this one: it stays due for that one.
            own_boot = payment.dispatch_boot_id == self._clock.boot_id()
            await self._wait(payment, wait_seconds if own_boot else 0.0)
            return
        now = self._clock.now()
        taken = payment.to(
            PaymentState.RECONCILING,
            now=now,
            epoch=payment.epoch + 1,
            next_attempt_time=now + timedelta(seconds=connector.descriptor.call_seconds),
        )
        await self._change(payment, taken, AuditEvent.PAYMENT_RECONCILING, AuditOutcome.UNKNOWN)
        await self._put_off_on_error(taken, self._settle_by_look_up(taken, connector))

    def _seconds_until_quiet(self, payment: Payment, connector: Connector) -> float:
        """How long it takes until what had reached the provider is on its list, and nothing more can reach it."""
        quiet_seconds = connector.descriptor.payments.idempotency.quiet_seconds
        if quiet_seconds is None:
            raise Internal
        return self._seconds_until_over(payment) + quiet_seconds

    def _seconds_until_over(self, payment: Payment) -> float:
        """How long it takes until no request of the first dispatch can reach the provider any more.

        Only CLOCK_BOOTTIME counts, because a wall clock that jumps must not make a payment that is under way "not found". What
        another run of the machine dispatched is waited for from when this process first saw it.
        """
        if payment.dispatch_time is None or payment.send_deadline_time is None:
            raise Internal
        send_seconds = (payment.send_deadline_time - payment.dispatch_time).total_seconds()
        now_ns = self._clock.boot_time_ns()
        own_boot = payment.dispatch_boot_id == self._clock.boot_id()
        since_ns = payment.dispatch_boot_time_ns if own_boot else self._first_seen_ns(payment)
        return send_seconds + NETWORK_LIFE_SECONDS - (now_ns - since_ns) / 1e9

    def _first_seen_ns(self, payment: Payment) -> int:
        first_ns = self._seen_unknown_ns.setdefault(payment.id, self._clock.boot_time_ns())
        _forget_oldest(self._seen_unknown_ns)
        return first_ns

    async def _settle_by_look_up(self, taken: Payment, connector: Connector) -> None:
        found = await self._ask(
            taken, connector, connector.look_up_payment, partial(connector.read_look_up, payment=taken)
        )
        if found is not None:
            after = self._payments.after(taken, connector, found)
        elif connector.descriptor.payments.idempotency.not_found == "never-executed":
            now = self._clock.now()
            after = taken.to(PaymentState.REJECTED, now=now, status_reason="NOT_FOUND", next_attempt_time=None)
        else:
            await self._hand_over(taken)
            return
        await self._payments.write_outcome(taken, after, await self._store.consent(taken.consent))

    async def _hand_over(self, payment: Payment) -> None:
        """No machine can find this out safely: a human asks the bank."""
        flagged = payment.to(PaymentState.NEEDS_ATTENTION, now=self._clock.now(), next_attempt_time=None)
        await self._change(payment, flagged, AuditEvent.PAYMENT_NEEDS_ATTENTION, AuditOutcome.UNKNOWN)

    async def _follow(self, payment: Payment) -> None:
        """The status of a payment that the bank has; a status that cannot be read changes nothing."""
        connector = connector_for(self._connectors, payment.provider)
        reading = _as_it_stands(payment, await self._read_status(payment, connector))
        now = self._clock.now()
        age = abs((now - payment.create_time).total_seconds())  # a clock that was set back makes it no new one
        terms = connector.descriptor.payments
        longest = terms.longest_poll_seconds if age < _A_DAY_SECONDS else _OLD_PAYMENT_POLL_SECONDS
        wait = min(max(terms.first_poll_seconds, age / 4), longest)
        unchanged = reading.state is payment.state and reading.provider_status == payment.provider_status
        followed = payment.to(
            reading.state,
            now=payment.update_time if unchanged else now,
            provider_status=reading.provider_status,
            authorisation_uri=reading.authorisation_uri,
            next_attempt_time=None if reading.state in TERMINAL else now + timedelta(seconds=wait),
        )
        if unchanged:
            await self._postpone(payment, followed)  # that it was asked is on record already
        else:
            await self._change(payment, followed, AuditEvent.PAYMENT_STATUS, AuditOutcome.SUCCEEDED)

    async def _wait(self, payment: Payment, seconds: float) -> None:
        """Nothing can be done yet. That it is waited for changes nothing about the payment."""
        later = self._clock.now() + timedelta(seconds=seconds)
        await self._postpone(payment, payment.to(payment.state, now=payment.update_time, next_attempt_time=later))

    async def _postpone(self, before: Payment, after: Payment) -> None:
        await self._store.change_payment(
            after, expected_states=frozenset({before.state}), expected_epoch=before.epoch, audit=[]
        )

    async def _read_status(self, payment: Payment, connector: Connector) -> PaymentReading:
        self._remember_asked(payment.id)
        return await self._ask(payment, connector, connector.payment_status, connector.read_payment_status)

    async def _ask(
        self,
        payment: Payment,
        connector: Connector,
        render: Callable[..., UnsignedRequest | None],
        read: Callable[..., Reading[T] | Problem],
    ) -> T:
        """What the provider says about a payment. Raises what stands in the way."""
        access = await self._access(payment)
        call_id = new_call_id()
        unsigned = render(payment, call_id=call_id)
        if unsigned is None:
            raise Internal
        request = await sign_request(self._hsm, unsigned)
        await self._store.record([payment_draft(payment, access.consent, AuditEvent.TOKEN_USE, AuditOutcome.INTENDED)])
        outcome = await self._egress.call(
            request,
            wrapped_data_key=access.consent.wrapped_data_key,
            secrets=[access.secret],
            deadline_seconds=connector.descriptor.call_seconds,
        )
        reading: Reading[T] | Problem = read(answer_of(outcome), call_id=call_id)
        if not isinstance(reading, Problem):
            return reading.value
        if reading.kind is ProblemKind.TOKEN_EXPIRED:
            await self._tokens.access(access.consent, refuse_older_than=access.secret.secret.row_version)
        if reading.kind is ProblemKind.CONSENT_ENDED:
            await self._tokens.mark_ended(access.consent, reason="PROVIDER_ENDED")
        raise problem_error(reading)

    def _remember_asked(self, payment_id: PaymentId) -> None:
        self._asked_ns[payment_id] = self._clock.boot_time_ns()
        self._asked_ns.move_to_end(payment_id)
        _forget_oldest(self._asked_ns)

    async def _access(self, payment: Payment) -> Access:
        consent = await self._store.consent(payment.consent)
        if consent is None:
            raise Internal
        consent.check_usable(Purpose.PAYMENTS, self._clock.now())
        return await self._tokens.access(consent)

    async def _put_off_on_error(self, payment: Payment, step: Coroutine[None, None, None]) -> None:
        """What may pass is tried again later. Where it cannot pass a human is asked about an unknown outcome; a payment that the
        bank has is followed until its consent has ended."""
        try:
            await step
        except StaleVersion:
            raise
        except (Unavailable, Exhausted) as error:
            await self._put_off(payment, error, self._later(payment, at_least_seconds=error.retry_after_seconds))
        except CustodyError as error:
            if payment.state is PaymentState.RECONCILING:
                await self._hand_over(payment)
            else:
                ended = isinstance(error, PreconditionFailed) and error.reason.startswith("CONSENT_")
                await self._put_off(payment, error, None if ended else self._later(payment))

    async def _put_off(self, payment: Payment, error: CustodyError, until: datetime | None) -> None:
        later = payment.to(payment.state, now=payment.update_time, next_attempt_time=until)
        await self._change(payment, later, AuditEvent.PAYMENT_STATUS, AuditOutcome.UNKNOWN, reason=error.reason)

    def _later(self, payment: Payment, *, at_least_seconds: float = 0.0) -> datetime:
        connector = self._connectors.get(payment.provider)
        seconds = connector.descriptor.payments.longest_poll_seconds if connector else _WITHOUT_PROVIDER_SECONDS
        if payment.state is PaymentState.RECONCILING:
            seconds = min(seconds, UNKNOWN_POLL_SECONDS)
        return self._clock.now() + timedelta(seconds=max(seconds, at_least_seconds))

    async def _change(
        self, before: Payment, after: Payment, event: AuditEvent, outcome: AuditOutcome, *, reason: str = ""
    ) -> None:
        consent: Consent | None = await self._store.consent(before.consent)
        await self._store.change_payment(
            after,
            expected_states=frozenset({before.state}),
            expected_epoch=before.epoch,
            audit=[payment_draft(after, consent, event, outcome, reason=reason)],
        )


def _is_put_off_too_far(payment: Payment, now: datetime) -> bool:
    furthest = _FURTHEST.get(payment.state)
    if payment.state is PaymentState.RECONCILING and payment.idempotency_class is IdempotencyClass.NONE:
        furthest = _NO_LONGER_THAN  # nobody is asked but a human, who is asked at once
    return furthest is not None and payment.next_attempt_time is not None and payment.next_attempt_time > now + furthest


def _forget_oldest(times: OrderedDict[PaymentId, int]) -> None:
    if len(times) > _REMEMBERED:
        times.popitem(last=False)


def _as_it_stands(payment: Payment, reading: PaymentReading) -> PaymentReading:
    """A status that says only that the bank has the payment does not say that its owner has approved it, and a status resource
    repeats no links: such a payment still awaits the owner, at the same address."""
    if payment.state is PaymentState.AWAITING_AUTHORISATION and reading.undecided and not reading.authorisation_uri:
        return replace(reading, state=PaymentState.AWAITING_AUTHORISATION, authorisation_uri=payment.authorisation_uri)
    return reading
