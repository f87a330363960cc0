"""The rules of payment that an auditor reads off the log: a table of named trails."""

from collections.abc import Sequence
from typing import Any

import pytest

from sidecar.audit.verifier import Verdict
from sidecar.domain.audit import AuditEvent, AuditOutcome
from tests.unit.audit.log_builder import LogBuilder, verify

# Each step: event, outcome, payment, epoch. "checkpoint" signs what is there. The end of every trail is signed.
Step = str | tuple[AuditEvent, AuditOutcome, str, int]

EVENTS = {
    "intent": (AuditEvent.PAYMENT_INTENT, AuditOutcome.INTENDED),
    "dispatch": (AuditEvent.PAYMENT_DISPATCHED, AuditOutcome.INTENDED),
    "paid": (AuditEvent.PAYMENT_OUTCOME, AuditOutcome.SUCCEEDED),
    "unknown": (AuditEvent.PAYMENT_OUTCOME, AuditOutcome.UNKNOWN),
    "refused": (AuditEvent.PAYMENT_OUTCOME, AuditOutcome.REFUSED),
    "reconcile": (AuditEvent.PAYMENT_RECONCILING, AuditOutcome.UNKNOWN),
    "status": (AuditEvent.PAYMENT_STATUS, AuditOutcome.SUCCEEDED),
    "abandoned": (AuditEvent.PAYMENT_ABANDONED, AuditOutcome.FAILED),
    "flagged": (AuditEvent.PAYMENT_NEEDS_ATTENTION, AuditOutcome.UNKNOWN),
    "resolved": (AuditEvent.PAYMENT_RESOLVED, AuditOutcome.SUCCEEDED),
}
RESOLUTION = {"caller": "workload:operator", "reason": "NOT_EXECUTED", "detail_digest": b"d" * 32}

NO_INTENT = "a payment was dispatched without an intent on record before"
SAME_EPOCH = "a payment was dispatched again without a new epoch"
NOT_COVERED = "a payment has an outcome, but no checkpoint covered its dispatch before"
NO_DISPATCH = "a payment has an outcome, but no dispatch on record before"
AFTER_FINDING = "a payment was dispatched after a person had said what became of it"
TWICE_FOUND = "a payment was resolved twice"
HALF_FOUND = "a payment was resolved without saying by whom, with what finding, or what was checked"
NO_NAME = "an entry about a payment names none"

# name: (trail, violations). A step is "what payment epoch"; "|" is a checkpoint.
TRAILS: dict[str, tuple[str, list[str]]] = {
    "paid under a checkpoint": ("intent A 1, dispatch A 1, |, paid A 1", []),
    "still under way": ("intent A 1, dispatch A 1, |", []),
    "abandoned before dispatch": ("intent A 1, abandoned A 1", []),
    "refused before dispatch": ("intent A 1, refused A 1", []),
    "unknown, reconciled, sent again": (
        "intent A 1, dispatch A 1, |, unknown A 1, reconcile A 2, dispatch A 2, |, paid A 2",
        [],
    ),
    "taken over from another instance": ("reconcile A 2, dispatch A 2, |, paid A 2", []),
    "taken over and looked up": ("reconcile A 2, paid A 2", []),
    "two payments interleaved": ("intent A 1, intent B 1, dispatch A 1, dispatch B 1, |, paid B 1, paid A 1", []),
    "status asked at any time": ("status A 0, intent A 1, status A 1", []),
    "outcome before any checkpoint": ("intent A 1, dispatch A 1, paid A 1", [NOT_COVERED]),
    "refusal before any checkpoint": ("intent A 1, dispatch A 1, refused A 1", [NOT_COVERED]),
    "checkpoint before the dispatch only": ("intent A 1, |, dispatch A 1, paid A 1", [NOT_COVERED]),
    "checkpoint after the outcome": ("intent A 1, dispatch A 1, paid A 1, |", [NOT_COVERED]),
    "second dispatch without checkpoint": (
        "intent A 1, dispatch A 1, |, reconcile A 2, dispatch A 2, paid A 2",
        [NOT_COVERED],
    ),
    "checkpoint covers another payment's dispatch only": (
        "intent A 1, intent B 1, dispatch B 1, |, dispatch A 1, paid A 1, paid B 1",
        [NOT_COVERED],
    ),
    "dispatch without intent": ("dispatch A 1, |, paid A 1", [NO_INTENT]),
    "dispatch before its intent": ("dispatch A 1, intent A 1, |, paid A 1", [NO_INTENT]),
    "intent of another payment": ("intent B 1, dispatch A 1, |, paid A 1", [NO_INTENT]),
    "dispatched twice on one permit": ("intent A 1, dispatch A 1, |, dispatch A 1, |, paid A 1", [SAME_EPOCH]),
    "dispatched with an older epoch": ("intent A 1, dispatch A 2, |, dispatch A 1, |, paid A 1", [SAME_EPOCH]),
    "dispatched three times, twice wrongly": (
        "intent A 1, dispatch A 2, |, dispatch A 1, |, dispatch A 2, |, paid A 2",
        [SAME_EPOCH, SAME_EPOCH],
    ),
    "paid without dispatch": ("intent A 1, paid A 1", [NO_DISPATCH]),
    "unknown without dispatch": ("intent A 1, unknown A 1", [NO_DISPATCH]),
    "resolved by a person": (
        "intent A 1, dispatch A 1, |, unknown A 1, reconcile A 2, flagged A 2, resolved A 3",
        [],
    ),
    "flagged by another instance, resolved here": ("resolved A 3", []),
    "two payments resolved": ("resolved A 3, resolved B 3", []),
    "resolved twice": ("intent A 1, dispatch A 1, |, unknown A 1, resolved A 3, resolved A 4", [TWICE_FOUND]),
    "dispatched after a finding": (
        "intent A 1, dispatch A 1, |, unknown A 1, resolved A 3, dispatch A 4, |, paid A 4",
        [AFTER_FINDING],
    ),
    "no name": ("intent - 1, dispatch - 1", [NO_NAME, NO_NAME]),
}


def trail_of(text: str) -> LogBuilder:
    log = LogBuilder().put(AuditEvent.SIDECAR_STARTED)
    for step in text.split(", "):
        if step == "|":
            log.checkpoint()
            continue
        what, payment, epoch = step.split(" ")
        event, outcome = EVENTS[what]
        more: dict[str, Any] = RESOLUTION if what == "resolved" else {}
        log.put(event, outcome, payment="" if payment == "-" else f"p-{payment}", epoch=int(epoch), **more)
    return log.put(AuditEvent.SIDECAR_STOPPED).checkpoint()


@pytest.mark.parametrize(("trail", "violations"), TRAILS.values(), ids=TRAILS.keys())
def test_trails_of_payments(trail: str, violations: Sequence[str]) -> None:
    """Each trail has exactly the violations that the table names; with none, the log is verified."""
    report = verify(trail_of(trail).export())

    assert [violation.message for violation in report.violations] == list(violations)
    assert report.verdict is (Verdict.FAILED if violations else Verdict.VERIFIED)
    assert report.failure is None


def test_a_violation_names_the_entry_that_shows_it() -> None:
    """Index and line point at the entry: here the outcome, behind start, intent and dispatch."""
    (violation,) = verify(trail_of("intent A 1, dispatch A 1, paid A 1").export()).violations

    assert (violation.entry, violation.line) == (3, 5)


def test_dispatched_payments_are_counted_once() -> None:
    """A payment that was sent again counts as one."""
    report = verify(
        trail_of("intent A 1, dispatch A 1, |, reconcile A 2, dispatch A 2, |, intent B 1, dispatch B 1").export()
    )

    assert report.payments_dispatched == 2


def test_the_list_of_violations_is_bounded() -> None:
    """Of many violations a hundred are listed and all are counted."""
    report = verify(trail_of(", ".join(f"dispatch P{number} 1" for number in range(150))).export())

    assert (len(report.violations), report.violation_count) == (100, 150)


@pytest.mark.parametrize("missing", [{"caller": ""}, {"reason": ""}, {"reason": "SETTLED"}, {"detail_digest": b""}])
def test_a_finding_says_who_what_and_why(missing: dict[str, Any]) -> None:
    """An entry without its administrator, its finding or the digest of what was checked is a violation."""
    log = LogBuilder().put(AuditEvent.SIDECAR_STARTED)
    log.put(*EVENTS["resolved"], payment="p-A", epoch=3, **{**RESOLUTION, **missing})

    report = verify(log.checkpoint().export())

    assert [violation.message for violation in report.violations] == [HALF_FOUND]
