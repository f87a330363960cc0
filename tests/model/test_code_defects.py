"""Defects in the real code: each changes one line of payments, reconciliation or the connector, and the simulation must notice.

The model says that a rule is needed; this says that the simulation would see the product break it. A defect whose line is not
there any more fails, so that the list is kept.
"""

import asyncio
import importlib
import inspect
import types
from dataclasses import dataclass

import pytest

from tests.unit.custody.test_simulation import simulate

CLASS_A, CLASS_C = "sandbox-bank-idempotent", "sandbox-bank"
MOST_SEEDS = 25  # some need as many as ten

PAYMENTS, RECONCILE = "sidecar.custody.payments", "sidecar.custody.reconcile"
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
    bank: str = CLASS_C
    more: str = ""  # put at the end of the module


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
        line="left_seconds = (send_by_ns - self._clock.boot_time_ns()) / 1e9",
        instead="left_seconds = 1e6",
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


def _replace_in(monkeypatch: pytest.MonkeyPatch, defect: CodeDefect) -> None:
    """The methods of the module's classes, from its source with the defect in it."""
    module = importlib.import_module(defect.module)
    source = inspect.getsource(module)
    assert source.count(defect.line) == 1, f"{defect.module} has not exactly one such line: {defect.line}"
    broken = types.ModuleType(module.__name__)
    text = source.replace(defect.line, defect.instead) + "\n" + defect.more
    exec(compile(text, f"{module.__file__} with a defect", "exec"), broken.__dict__)
    for name, value in vars(module).items():
        if (
            isinstance(value, type)
            and value.__module__ == module.__name__
            and not hasattr(value, "__dataclass_fields__")
        ):
            for method, function in vars(getattr(broken, name)).items():
                if inspect.isfunction(function):
                    monkeypatch.setattr(value, method, function)


def _first_failure(bank: str) -> AssertionError | None:
    for seed in range(MOST_SEEDS):
        try:
            asyncio.run(simulate(seed, bank))
        except AssertionError as failure:
            return failure
    return None


@pytest.mark.parametrize("defect", CODE_DEFECTS, ids=lambda defect: f"rule {defect.rule}: {defect.name}")
def test_the_simulation_notices(defect: CodeDefect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a few seeds, by an invariant and not by an error that the defect raises; without the defect the same seeds pass
    (tests/unit/custody/test_simulation.py)."""
    _replace_in(monkeypatch, defect)

    failure = _first_failure(defect.bank)

    assert failure is not None
    assert failure.__cause__ is None, "the defect does not run: it raises an error"
