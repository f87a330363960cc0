"""The seeded defects: each leaves a rule, or a part of one, out of a model, and names the invariant that must then break.

This is data. tests/model/test_defects.py proves each line, and docs/reliability.md shows it (`make model` prints the traces).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tests.model.explorer import Exploration, explore
from tests.model.payment_model import ACCEPTED, AWAITING, REJECTED, SETTLED, Bounds, PaymentModel, Rules
from tests.model.refresh_model import GRACE, NO_ROTATION, STRICT, WHEN_FIRST_USED, RefreshModel, RefreshRules

__all__ = [
    "DEFECTS",
    "EQUIVALENT",
    "WORLDS",
    "Defect",
    "explore_with_defect",
    "payment_model",
    "refresh_model",
]

_BOUNDS = Bounds(crashes=2, dispatches=3, epochs=6)
_ALL_STATUSES = (ACCEPTED, AWAITING, SETTLED, REJECTED)

# Where a payment is tried: the bank's class, and what may happen there.
WORLDS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "A": {"bank": "A", "bounds": _BOUNDS},
        "B": {"bank": "B", "bounds": _BOUNDS},
        "C": {"bank": "C", "bounds": _BOUNDS},
        "A, revoked": {"bank": "A", "revokes": True},
        "C, revoked": {"bank": "C", "revokes": True},
        "A, followed": {"bank": "A", "follows": True, "first_statuses": _ALL_STATUSES},
        "B, followed": {"bank": "B", "follows": True, "first_statuses": _ALL_STATUSES},
        "C, followed": {"bank": "C", "follows": True, "first_statuses": _ALL_STATUSES},
        "A, no faults": {"bank": "A", "faults": False},
        "C, no faults": {"bank": "C", "faults": False},
        "strict": {"kind": STRICT},
        "grace": {"kind": GRACE},
        "when first used": {"kind": WHEN_FIRST_USED},
        "no rotation": {"kind": NO_ROTATION},
        "strict, no faults": {"kind": STRICT, "faults": False},
        "grace, no faults": {"kind": GRACE, "faults": False},
        "when first used, no faults": {"kind": WHEN_FIRST_USED, "faults": False},
        "no rotation, no faults": {"kind": NO_ROTATION, "faults": False},
    }
)

TWICE = "executed twice"
NO_AND_PAID = "told rejected, and executed"
YES_AND_NOT = "told accepted, and not executed"
TAKEN_BACK = "an answer was taken back"
UNRECORDED = "sent without a record"
UNSIGNED = "sent before the checkpoint over its record was signed"
NO_END = "once faults stop, it never comes to an end"
NEEDLESS = "unknown where nothing failed but our own preparation"
AFTER_REVOCATION = "sent after the revocation was answered"
REUSE = "a dead token was sent again, and the family is revoked"
OVERWRITTEN = "a newer pair was overwritten by an older one"
OWN_RACE = "flagged as lost by our own race"
NEEDLESS_FLAG = "flagged as lost where the provider lets us go on"
NOTHING = ""  # an equivalent defect: nothing breaks, because another rule holds alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """`rule`: 1 to 12 as in docs/reliability.md, "consent" for the promise below them, R1 to R6 for refresh."""

    name: str
    rule: str
    left_out: str
    fields: tuple[str, ...]  # of Rules or RefreshRules
    world: str
    breaks: str
    why: str = ""  # of an equivalent defect


def _defect(rule: str, field: str, world: str, breaks: str, left_out: str, *more: str, why: str = "") -> Defect:
    fields = (field, *more)
    name = "+".join(fields).replace("_", "-")
    return Defect(name=f"no-{name}", rule=rule, left_out=left_out, fields=fields, world=world, breaks=breaks, why=why)


_D = _defect
DEFECTS: tuple[Defect, ...] = (
    _D("1", "claim_is_unique", "C, no faults", NO_AND_PAID, "two calls both find no claim, and both insert one"),
    _D("1", "body_is_compared", "C", YES_AND_NOT, "a repeat with another body gets the first one's answer"),
    _D("1", "key_is_stored", "A", TWICE, "our key towards the bank lives only in memory"),
    _D(
        "2",
        "prepares_before_record",
        "C, no faults",
        NEEDLESS,
        "token and connection are opened after the dispatch record",
    ),
    _D("3", "record_before_send", "C", UNRECORDED, "sent on the intent alone"),
    _D("3", "entry_before_send", "C", UNRECORDED, "the log's entry is written after the send"),
    _D("3", "checkpoint_before_send", "C", UNSIGNED, "the send does not wait for the HSM's signature"),
    _D("3", "repeat_is_recorded", "A", UNRECORDED, "a repeat goes out on the first record"),
    _D("3", "permit_is_redeemed_once", "C", TWICE, "one permit is sent on twice"),
    _D("3", "lost_record_is_not_sent", "C", UNRECORDED, "sent although the record's commit gave no answer"),
    _D("4", "send_has_deadline", "B", NO_AND_PAID, "a paused process sends when it wakes up"),
    _D("4", "deadline_closes_connection", "A", NO_AND_PAID, "the connection stays open after the deadline"),
    _D("4", "connection_is_never_reopened", "C", TWICE, "a reset connection is opened again under the same permit"),
    _D("5", "transport_never_repeats", "C", TWICE, "the HTTP client retries by itself"),
    _D("5", "run_never_repeats_after_timeout", "C", TWICE, "a time-out is answered by a second POST"),
    _D("5", "run_never_repeats_after_error", "C", TWICE, "a 5xx is answered by a second POST"),
    _D("6", "timeout_is_unknown", "C", NO_AND_PAID, "a time-out counts as rejected"),
    _D("6", "error_is_unknown", "C", NO_AND_PAID, "a 5xx counts as rejected"),
    _D("6", "reset_is_not_proof_of_not_sent", "C", NO_AND_PAID, "a reset after the first byte counts as not sent"),
    _D("6", "success_status_is_not_enough", "C", YES_AND_NOT, "any 200 counts as accepted"),
    _D(
        "7",
        "outcome_checks_state",
        "A",
        NO_AND_PAID,
        "an outcome is written whatever state and epoch the row has",
        "outcome_checks_epoch",
    ),
    _D(
        "7",
        "outcome_checks_state",
        "A",
        TAKEN_BACK,
        "a take-over keeps the epoch, and an outcome does not look at the state",
        "take_over_raises_epoch",
    ),
    _D(
        "7",
        "outcome_checks_state",
        "A, followed",
        TAKEN_BACK,
        "an outcome looks at the epoch alone",
    ),
    _D(
        "7",
        "outcome_checks_epoch",
        "A, followed",
        NOTHING,
        "an outcome looks at the state alone",
        why="a first send expects DISPATCHED, which a take-over ends for good, and a refused repeat settles nothing",
    ),
    _D("7", "undo_checks_epoch", "C", NO_AND_PAID, 'a late "nothing was sent" undoes a newer dispatch'),
    _D("7", "record_checks_state", "C", NO_AND_PAID, "a dispatch record over a row that is no intent any more"),
    _D("7", "record_checks_epoch", "C", NO_AND_PAID, "a dispatch record by a run that was overtaken"),
    _D("7", "abandon_checks_row", "C", NO_AND_PAID, "an intent is given up on the strength of an old look"),
    _D("7", "hand_over_checks_row", "A", TAKEN_BACK, "a human is asked on the strength of an old look"),
    _D("7", "final_rows_never_change", "A", TAKEN_BACK, "a late outcome is written over a final one"),
    _D("8", "repeat_has_same_key", "A", TWICE, "a repeat under a new key"),
    _D("8", "repeat_has_same_bytes", "A", TWICE, "a repeat is rendered again, with other bytes"),
    _D("8", "repeat_within_window", "A", TWICE, "the window is not looked at"),
    _D("8", "window_has_margin", "A", TWICE, "repeats until the very end of the window"),
    _D("8", "window_checked_at_record", "A", TWICE, "the window is looked at before preparing, not at the record"),
    _D("8", "only_class_a_repeats", "C", TWICE, "a bank without a promise gets a repeat"),
    _D("8", "class_c_goes_to_human", "C", NO_END, "an unknown outcome of class C waits for ever"),
    _D("8", "closed_window_goes_to_human", "A", NO_AND_PAID, "the end of the window counts as rejected"),
    _D(
        "8", "refused_repeat_record_goes_to_human", "A, revoked", NO_END, "a repeat that the consent forbids is dropped"
    ),
    _D("9", "refused_repeat_is_unsettled", "A", NO_AND_PAID, "the refusal of a repeat counts as rejected"),
    _D("9", "not_found_is_unsettled_until_quiet", "B", NO_AND_PAID, '"not found" counts as rejected at once'),
    _D("9", "look_up_is_asked_after_quiet", "B", NO_AND_PAID, "a look-up from before the quiet period counts after it"),
    _D("9", "quiet_includes_network_life", "B", NO_AND_PAID, "quiet is the send deadline without the network's life"),
    _D("9", "human_waits_for_quiet", "C", NO_AND_PAID, "an operator writes down what the bank says too early"),
    _D("10", "unknown_is_told_as_unknown", "C", NO_AND_PAID, "the call that timed out is told rejected"),
    _D("10", "progress_is_told_as_progress", "C", NO_AND_PAID, "a call that finds it dispatched is told rejected"),
    _D("10", "attention_is_told_as_attention", "C", NO_AND_PAID, "a call that finds it with a human is told rejected"),
    _D("10", "unknown_keeps_its_request_id", "C", NO_AND_PAID, "an error that invites a new request id"),
    _D("11", "take_up_raises_epoch", "C", NO_AND_PAID, "two runs prepare the same intent under one epoch"),
    _D(
        "11",
        "take_over_raises_epoch",
        "A, followed",
        NOTHING,
        "a take-over keeps the epoch",
        why="the state changes with it, and is compared too; with that left out as well it is caught (rule 7)",
    ),
    _D("11", "clock_set_back_closes_window", "A", NO_AND_PAID, "a wall clock that is set back opens the window again"),
    _D("11", "orphan_is_taken_over", "C", NO_END, "a lease that never looks expired"),
    _D("11", "old_intent_is_given_up", "C", NO_END, "an intent whose run is gone waits for ever"),
    _D("12", "claims_outlive_payment", "C", NO_AND_PAID, "the claim goes with the finished payment"),
    _D("12", "claims_have_no_time_limit", "C", NO_AND_PAID, "claims are deleted after a day"),
    _D("12", "rejection_keeps_claim", "C", NO_AND_PAID, "a rejected payment frees its request id"),
    _D(
        "consent",
        "record_checks_consent",
        "C, revoked",
        AFTER_REVOCATION,
        "the consent is looked at before the record only",
    ),
    _D("consent", "repeat_checks_consent", "A, revoked", AFTER_REVOCATION, "a repeat does not look at the consent"),
    _D(
        "consent",
        "revocation_waits_for_permits",
        "C, revoked",
        AFTER_REVOCATION,
        "a revocation is answered while a permit can still be sent on",
    ),
    _D("R1", "one_refresher", "grace", REUSE, "no lease"),
    _D("R1", "lease_outlives_send", "strict, no faults", OWN_RACE, "the lease ends before the send's deadline"),
    _D(
        "R1",
        "lease_is_kept_until_saved",
        "strict, no faults",
        OWN_RACE,
        "the lease is given back before the pair is stored",
    ),
    _D("R2", "intent_before_call", "strict", REUSE, "no record before the call"),
    _D("R2", "open_intent_is_unknown", "strict", REUSE, "a restart does not look for calls without an outcome"),
    _D("R2", "not_sent_closes_intent", "strict, no faults", OWN_RACE, "a connection that failed counts as unknown"),
    _D("R2", "not_sent_repeat_stays_unknown", "grace", REUSE, "a repeat that was not sent settles the call before it"),
    _D("R3", "send_has_deadline", "grace", REUSE, "a paused process refreshes when it wakes up"),
    _D("R3", "transport_never_repeats", "strict", REUSE, "the HTTP client retries by itself"),
    _D("R4", "stored_before_used", "when first used", NEEDLESS_FLAG, "the new pair is used before it is stored"),
    _D("R4", "save_is_fenced", "grace", OVERWRITTEN, "a pair is stored whoever has refreshed since"),
    _D(
        "R4",
        "old_is_kept_until_new_worked",
        "when first used",
        NEEDLESS_FLAG,
        "the old pair goes when the new one comes",
    ),
    _D("R5", "strict_never_repeats", "strict", REUSE, "the same token is tried again at a strict provider"),
    _D("R5", "grace_repeats_only_in_grace", "grace", REUSE, "the same token is tried again after the grace period"),
    _D("R5", "unknown_is_not_refused", "no rotation", NEEDLESS_FLAG, "no answer counts as refused"),
    _D("R6", "unknown_at_strict_is_flagged", "strict", REUSE, "a token lost at a strict provider is not flagged"),
    _D("R6", "refused_is_flagged", "strict", NO_END, "a refused token is tried for ever"),
)
EQUIVALENT = tuple(defect for defect in DEFECTS if not defect.breaks)

_LIVENESS = NO_END


def is_payment_world(world: str) -> bool:
    return "bank" in WORLDS[world]


def payment_model(world: str, *left_out: str, bounds: Bounds | None = None) -> PaymentModel:
    options = {**WORLDS[world], **({"bounds": bounds} if bounds else {})}
    return PaymentModel(rules=Rules(**dict.fromkeys(left_out, False)), **options)  # type: ignore[arg-type]


def refresh_model(world: str, *left_out: str) -> RefreshModel:
    return RefreshModel(rules=RefreshRules(**dict.fromkeys(left_out, False)), **WORLDS[world])  # type: ignore[arg-type]


def explore_with_defect(defect: Defect, *, max_states: int = 200_000) -> Exploration:
    """Until the first broken invariant. Liveness is asked only where it is what breaks: it costs the most."""
    check_liveness = defect.breaks == _LIVENESS
    if is_payment_world(defect.world):
        return explore(
            payment_model(defect.world, *defect.fields), max_states=max_states, check_liveness=check_liveness
        )
    return explore(refresh_model(defect.world, *defect.fields), max_states=max_states, check_liveness=check_liveness)
