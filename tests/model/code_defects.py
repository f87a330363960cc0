"""Defects in the real code: each changes a line of payments, reconciliation, the connector or the store.

This is data. tests/model/test_code_defects.py sees each of them noticed, and docs/reliability.md shows it.
"""

from dataclasses import dataclass
from typing import Final

from tests.simulation.bank import ClassName

__all__ = ["CODE_DEFECTS", "STORE_DEFECTS", "CodeDefect"]

CLASS_A: Final = "A"
CLASS_C: Final = "C"

PAYMENTS, RECONCILE = "sidecar.custody.payments", "sidecar.custody.reconcile"
PAYMENT_TABLE, STORE = "sidecar.store.payments", "sidecar.store.store"
BERLIN_GROUP = "sidecar.connectors.berlin_group"
PERMIT = "DispatchPermit(payment=dispatched.id, epoch=dispatched.epoch)"
NEW_KEY = """
from uuid import uuid4 as _uuid4

def _with_new_key(request):
    headers = tuple(
        replace(header, value=str(_uuid4())) if header.name.lower() == "idempotency-key" else header
        for header in request.headers
    )
    return replace(request, headers=headers)
"""
SEND_AGAIN = f"""if not isinstance(outcome, Answer | NotSent):
            again = await self.prepare(request, access, connector)
            outcome = await self._egress.send(again, {PERMIT}, deadline_seconds=10.0)
        return await self._record(dispatched, access.consent, connector, outcome)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeDefect:
    name: str
    rule: str
    module: str
    line: str
    instead: str
    bank: ClassName = CLASS_C
    more: str = ""  # put at the end of the module
    contract: str = ""  # the test of the store's contract that must fail; else the simulation must


CODE_DEFECTS = (
    CodeDefect(
        name="each call is a payment of its own",
        rule="1",
        module=PAYMENTS,
        line="claim = _claim(caller, request, now=self._clock.now())",
        instead="request = replace(request, request_id=RequestId(str(uuid4())))\n"
        "        claim = _claim(caller, request, now=self._clock.now())",
    ),
    CodeDefect(
        name="a permit without a record",
        rule="3",
        module=PAYMENTS,
        line="permit = await self._store.record_dispatch(dispatched, expected_epoch=expected_epoch, audit=draft)",
        instead=f"permit = {PERMIT}",
        more="from sidecar.domain.payment import DispatchPermit\n",
    ),
    CodeDefect(
        name="a time of sending that begins after the record",
        rule="4",
        module=PAYMENTS,
        line="send_by_ns = begin_ns + int(connector.descriptor.payments.send_seconds * 1e9)",
        instead="send_by_ns = begin_ns + 10**15",
        bank=CLASS_A,
    ),
    CodeDefect(
        name="a second POST after no answer",
        rule="5",
        module=PAYMENTS,
        line="return await self._record(dispatched, access.consent, connector, outcome)",
        instead=SEND_AGAIN,
        more="from sidecar.domain.payment import DispatchPermit\n",
    ),
    CodeDefect(
        name="no answer is a refusal",
        rule="6",
        module=PAYMENTS,
        line="return InitiationUnknown(code=outcome.code)",
        instead="return InitiationRefused(code=outcome.code)",
    ),
    CodeDefect(
        name="no answer proves that nothing was sent",
        rule="6",
        module=PAYMENTS,
        line="if isinstance(outcome, NotSent):",
        instead="if not isinstance(outcome, Answer):",
    ),
    CodeDefect(
        name="any error is a refusal",
        rule="6",
        module=BERLIN_GROUP,
        line='return InitiationUnknown(code=f"HTTP_{answer.status}")',
        instead='return InitiationRefused(code="HTTP")',
    ),
    CodeDefect(
        name="a sender that is lost has failed",
        rule="7",
        module=RECONCILE,
        line="reconciling = payment.to(\n            PaymentState.RECONCILING,",
        instead="reconciling = payment.to(\n            PaymentState.REJECTED,",
    ),
    CodeDefect(
        name="a repeat under a new key",
        rule="8",
        module=RECONCILE,
        line="decode_request(payment.rendered_request)",
        instead="_with_new_key(decode_request(payment.rendered_request))",
        bank=CLASS_A,
        more=NEW_KEY,
    ),
    CodeDefect(
        name="a window without an end",
        rule="8",
        module=PAYMENTS,
        line="usable_seconds = idempotency.window_seconds - idempotency.margin_seconds",
        instead="usable_seconds = 3e8",
        bank=CLASS_A,
    ),
    CodeDefect(
        name="what a human would have to find out has failed",
        rule="8",
        module=RECONCILE,
        line="PaymentState.NEEDS_ATTENTION, now=self._clock.now(), next_attempt_time=None",
        instead="PaymentState.REJECTED, now=self._clock.now(), next_attempt_time=None",
    ),
    CodeDefect(
        name="the refusal of a repeat is final",
        rule="9",
        module=PAYMENTS,
        line="case InitiationRefused() if dispatched.state is PaymentState.DISPATCHED:",
        instead="case InitiationRefused():",
        bank=CLASS_A,
    ),
    CodeDefect(
        name="no human is ever asked",
        rule="8",
        module=RECONCILE,
        line="flagged = payment.to(PaymentState.NEEDS_ATTENTION,",
        instead="return\n        flagged = payment.to(PaymentState.NEEDS_ATTENTION,",
    ),
)

_CHECK_PAYS = "self._consents.check_pays(transaction, payment.consent, transaction.now)"
STORE_DEFECTS = (
    CodeDefect(
        name="a change whatever the epoch",
        rule="7",
        module=PAYMENT_TABLE,
        line=" or epoch != expected_epoch",
        instead="",
        contract="test_a_payment_changes_only_from_the_state_and_epoch_expected",
    ),
    CodeDefect(
        name="a change whatever the state",
        rule="7",
        module=PAYMENT_TABLE,
        line="or before not in expected_states",
        instead="",
        contract="test_a_payment_changes_only_from_the_state_and_epoch_expected",
    ),
    CodeDefect(
        name="two permits an epoch",
        rule="3",
        module=PAYMENT_TABLE,
        line="if dispatched >= payment.epoch:",
        instead="if False:",
        contract="test_a_repeat_needs_a_new_epoch",
    ),
    CodeDefect(
        name="a dispatch without its entry",
        rule="3",
        module=STORE,
        line=f"{_CHECK_PAYS}\n            transaction.append(audit)",
        instead=_CHECK_PAYS,
        contract="test_a_permit_comes_with_a_signed_checkpoint_over_its_entry",
    ),
    CodeDefect(
        name="a permit before the signature",
        rule="3",
        module=STORE,
        line="transaction.append(audit)\n\n        await self._committer.run(command, signed=True)\n        return DispatchPermit",
        instead="transaction.append(audit)\n\n        await self._committer.run(command)\n        return DispatchPermit",
        contract="test_without_a_signature_there_is_no_dispatch",
    ),
    CodeDefect(
        name="a dispatch under a consent that has ended",
        rule="consent",
        module=STORE,
        line=_CHECK_PAYS,
        instead="",
        contract="test_no_dispatch_once_the_consent_has_ended",
    ),
)
