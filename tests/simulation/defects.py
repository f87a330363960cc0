"""Seeded defects: the real code with one rule of docs/reliability.md left out. The simulation has to notice each.

Each defect names the class of provider in whose runs it shows, and words of the invariant that it breaks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import pytest

from sidecar.connectors.base import InitiationReading, InitiationRefused
from sidecar.connectors.berlin_group import BerlinGroupConnector
from sidecar.custody import payments, reconcile
from sidecar.custody.payments import Payments
from sidecar.custody.reconcile import Reconciler
from sidecar.custody.rendered import decode_request
from sidecar.domain.audit import AuditDraft, AuditEvent, AuditOutcome
from sidecar.domain.payment import TRANSITIONS, DispatchPermit, Payment, PaymentState
from sidecar.domain.provider import Answer, ProviderRequest, SendOutcome, Unknown
from sidecar.errors import StaleVersion
from sidecar.store.committer import GroupCommitter
from sidecar.store.consents import ConsentTables
from sidecar.store.payments import PaymentTable
from tests.simulation.bank import ClassName

__all__ = ["DEFECTS", "Defect"]

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True, kw_only=True)
class Defect:
    class_name: ClassName
    breaks: str
    apply: Patch


def _no_fence(patch: pytest.MonkeyPatch) -> None:
    """Rule 7: an outcome is written whoever holds the newest epoch."""
    real = PaymentTable.change

    def change(self: PaymentTable, connection: Any, payment: Payment, **_seen: Any) -> None:
        state, epoch, _ = connection.rows(self._seen, {"id": payment.id})[0]
        if payment.state not in TRANSITIONS[PaymentState(state)]:
            raise StaleVersion
        payment = replace(payment, epoch=max(payment.epoch, epoch))
        real(self, connection, payment, expected_states=frozenset({PaymentState(state)}), expected_epoch=epoch)

    patch.setattr(PaymentTable, "change", change)


def _no_fence_at_the_dispatch(patch: pytest.MonkeyPatch) -> None:
    """Rules 3 and 7: whoever has prepared a payment may dispatch it, though another was faster."""
    real = PaymentTable.dispatch

    def dispatch(self: PaymentTable, connection: Any, payment: Payment, **_seen: Any) -> None:
        state, epoch, _ = connection.rows(self._seen, {"id": payment.id})[0]
        at = PaymentState(state)
        if at is PaymentState.DISPATCHED:
            return
        real(self, connection, replace(payment, epoch=max(payment.epoch, epoch)), expected_epoch=epoch)

    patch.setattr(PaymentTable, "dispatch", dispatch)


def _time_out_is_a_refusal(patch: pytest.MonkeyPatch) -> None:
    """Rule 6."""
    real = payments.reading_of

    def reading_of(outcome: SendOutcome, connector: Any, payment: Payment) -> InitiationReading:
        return (
            real(outcome, connector, payment) if isinstance(outcome, Answer) else InitiationRefused(code=outcome.code)
        )

    patch.setattr(payments, "reading_of", reading_of)


def _server_error_is_a_refusal(patch: pytest.MonkeyPatch) -> None:
    """Rule 6, in the connector."""
    real = BerlinGroupConnector.read_initiation

    def read_initiation(self: BerlinGroupConnector, answer: Answer, *, call_id: str) -> InitiationReading:
        if answer.status >= 500:
            return InitiationRefused(code="INTERNAL_SERVER_ERROR")
        return real(self, answer, call_id=call_id)

    patch.setattr(BerlinGroupConnector, "read_initiation", read_initiation)


def _refused_repeat_settles(patch: pytest.MonkeyPatch) -> None:
    """Rule 9: the refusal of a repeat is taken for the payment's."""
    real = Payments.after

    def after(self: Payments, dispatched: Payment, connector: Any, reading: InitiationReading) -> Payment:
        if isinstance(reading, InitiationRefused):
            now = self._clock.now()
            return dispatched.to(PaymentState.REJECTED, now=now, status_reason=reading.code, next_attempt_time=None)
        return real(self, dispatched, connector, reading)

    patch.setattr(Payments, "after", after)


def _not_found_settles_at_once(patch: pytest.MonkeyPatch) -> None:
    """Rule 9: nobody waits until the payment could have been found."""
    patch.setattr(Reconciler, "_seconds_until_quiet", lambda _self, _payment, _connector: 0.0)


def _quiet_by_the_wall_clock(patch: pytest.MonkeyPatch) -> None:
    """Rule 11: the quiet period ends when the wall clock says so."""
    real = Reconciler._seconds_until_quiet

    def seconds_until_quiet(self: Reconciler, payment: Payment, connector: Any) -> float:
        assert payment.next_attempt_time is not None
        since_seconds = (self._clock.now() - payment.create_time).total_seconds()
        return min(real(self, payment, connector), 20.0 - since_seconds)

    patch.setattr(Reconciler, "_seconds_until_quiet", seconds_until_quiet)


def _sent_before_the_record(patch: pytest.MonkeyPatch) -> None:
    """Rule 3: the dispatch is put on record after the act."""

    async def dispatch(
        self: Payments, dispatched: Payment, consent: Any, prepared: Any, _connector: Any, **_begin: Any
    ) -> SendOutcome:
        permit = DispatchPermit(payment=dispatched.id, epoch=dispatched.epoch)
        outcome = await self._egress.send(prepared, permit, deadline_seconds=10.0)
        await self._store.record_dispatch(
            dispatched, expected_epoch=_epoch_before(dispatched), audit=_dispatch_draft(dispatched, consent)
        )
        return outcome

    patch.setattr(Payments, "dispatch", dispatch)


def _epoch_before(dispatched: Payment) -> int:
    return dispatched.epoch - (dispatched.state is PaymentState.RECONCILING)


def _dispatch_draft(dispatched: Payment, consent: Any) -> AuditDraft:
    event, intended = AuditEvent.PAYMENT_DISPATCHED, AuditOutcome.INTENDED
    return payments.payment_draft(dispatched, consent, event, intended)


def _post_is_retried(patch: pytest.MonkeyPatch) -> None:
    """Rule 5: a layer sends again by itself what was not answered."""
    real = Payments.dispatch

    async def dispatch(
        self: Payments, dispatched: Payment, consent: Any, prepared: Any, connector: Any, **begin: Any
    ) -> SendOutcome:
        outcome = await real(self, dispatched, consent, prepared, connector, **begin)
        if isinstance(outcome, Unknown):
            access = await self._tokens.access(consent)
            request = decode_request(dispatched.rendered_request)
            again = await self.prepare(request, access, connector)
            permit = DispatchPermit(payment=dispatched.id, epoch=dispatched.epoch)
            return await self._egress.send(again, permit, deadline_seconds=10.0)
        return outcome

    patch.setattr(Payments, "dispatch", dispatch)


def _new_key_on_a_repeat(patch: pytest.MonkeyPatch) -> None:
    """Rule 8: a repeat under another key is another payment."""
    real = decode_request

    def under_another_key(rendered: bytes) -> ProviderRequest:
        request = real(rendered)
        headers = tuple(
            replace(header, value=str(uuid4())) if header.name == "Idempotency-Key" else header
            for header in request.headers
        )
        return replace(request, headers=headers)

    patch.setattr(reconcile, "decode_request", under_another_key)


def _window_is_not_checked(patch: pytest.MonkeyPatch) -> None:
    """Rule 8: a repeat when the bank may have forgotten the key."""
    patch.setattr(Payments, "window_is_open", lambda _self, _payment: True)


def _send_is_not_bounded(patch: pytest.MonkeyPatch) -> None:
    """Rule 4: a sender that stood still sends whenever it goes on."""

    async def dispatch(
        self: Payments, dispatched: Payment, consent: Any, prepared: Any, _connector: Any, **_begin: Any
    ) -> SendOutcome:
        permit = await self._store.record_dispatch(
            dispatched, expected_epoch=_epoch_before(dispatched), audit=_dispatch_draft(dispatched, consent)
        )
        return await self._egress.send(prepared, permit, deadline_seconds=10.0)

    patch.setattr(Payments, "dispatch", dispatch)


def _consent_is_not_checked(patch: pytest.MonkeyPatch) -> None:
    """A revocation that was answered lets payments out all the same."""
    patch.setattr(ConsentTables, "check_pays", lambda *_arguments: None)


def _no_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """No signature, no money: here the dispatch record is not covered by one."""
    patch.setattr(GroupCommitter, "_sign_if_needed", lambda _self, _transaction, _group: None)


def _commit_is_assumed(patch: pytest.MonkeyPatch) -> None:
    """A commit that failed is taken for one that happened."""

    def happened(self: GroupCommitter, _after: Any) -> bool:
        self._drop_connection()
        return True

    patch.setattr(GroupCommitter, "_happened", happened)


def _nobody_takes_over(patch: pytest.MonkeyPatch) -> None:
    """What a dead sender left is left."""

    async def take_over(_self: Reconciler, _payment: Payment) -> None:
        return None

    patch.setattr(Reconciler, "_take_over", take_over)


def _clock_set_back_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    """What was put off by a clock that stood ahead waits until it stands there again."""
    patch.setattr(Reconciler, "_notice_clock_set_back", lambda _self: None)


def _human_is_asked_late(patch: pytest.MonkeyPatch) -> None:
    """A payment of class C waits although no machine can find it out."""
    patch.setattr(payments, "_pause_seconds", lambda _attempts: 20.0)


DEFECTS = {
    "no fence": Defect(class_name="A", breaks="", apply=_no_fence),
    "no fence at the dispatch": Defect(class_name="C", breaks="", apply=_no_fence_at_the_dispatch),
    "time-out is a refusal": Defect(class_name="C", breaks="told no", apply=_time_out_is_a_refusal),
    "server error is a refusal": Defect(class_name="B", breaks="told no", apply=_server_error_is_a_refusal),
    "refused repeat settles": Defect(class_name="A", breaks="told no", apply=_refused_repeat_settles),
    "not found settles at once": Defect(class_name="B", breaks="told no", apply=_not_found_settles_at_once),
    "quiet by the wall clock": Defect(class_name="B", breaks="told no", apply=_quiet_by_the_wall_clock),
    "sent before the record": Defect(
        class_name="C", breaks="without a dispatch on record", apply=_sent_before_the_record
    ),
    "POST is retried": Defect(class_name="C", breaks="", apply=_post_is_retried),
    "new key on a repeat": Defect(class_name="A", breaks="executed twice", apply=_new_key_on_a_repeat),
    "window is not checked": Defect(class_name="A", breaks="executed twice", apply=_window_is_not_checked),
    "send is not bounded": Defect(class_name="B", breaks="told no", apply=_send_is_not_bounded),
    "consent is not checked": Defect(class_name="C", breaks="consent was revoked", apply=_consent_is_not_checked),
    "no checkpoint": Defect(class_name="C", breaks="without a dispatch on record", apply=_no_checkpoint),
    "commit is assumed": Defect(class_name="C", breaks="", apply=_commit_is_assumed),
    "nobody takes over": Defect(class_name="B", breaks="is still dispatched", apply=_nobody_takes_over),
    "clock set back is not noticed": Defect(class_name="B", breaks="is still", apply=_clock_set_back_is_not_noticed),
    "human is asked late": Defect(class_name="C", breaks="asked no human", apply=_human_is_asked_late),
}
