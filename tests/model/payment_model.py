"""The payment protocol as a model: one payment's row, the runs that work on it, the bank, the network and the clocks.

It is written from the twelve rules in docs/reliability.md and says what may happen, not how it is done. A *run* is anything that
works on the payment by itself: a call of the application, a step of the reconciler, in one sidecar or in several; runs share
nothing but the row, so the model allows more than the product does. Time is abstract: a lease may look expired, a process may
pause, and a request may be under way for as long as the rules do not forbid it.

Each field of `Rules` is a rule that can be left out; with all of them, no invariant may break in any state.

Invariants: the bank executes at most once; yes and no are never both told; "rejected" was never executed, now or later;
"accepted" was executed; each send has its own record under a signed checkpoint before it; no send after a revocation was
answered; an answer is never taken back; no human is asked where nothing failed; once faults stop, every way comes to an end.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.explorer import Step

__all__ = ["Bounds", "PaymentModel", "Rules", "State", "Transition", "transition_of"]

# -- the states of the row; their names in the product are in test_conformance.py
NONE, INTENT, DISPATCHED, RECONCILING = "none", "intent", "dispatched", "reconciling"
AWAITING, ACCEPTED, SETTLED = "awaiting", "accepted", "settled"
REJECTED, REJECTED_LATE, CANCELLED, ABANDONED = "rejected", "rejected late", "cancelled", "abandoned"
NEEDS_ATTENTION = "needs attention"

YES = frozenset({AWAITING, ACCEPTED, SETTLED})
NO = frozenset({REJECTED, ABANDONED})
TERMINAL = frozenset({SETTLED, REJECTED, REJECTED_LATE, CANCELLED, ABANDONED})
UNKNOWN = frozenset({DISPATCHED, RECONCILING})
NEVER_EXECUTED = frozenset({REJECTED_LATE, CANCELLED})  # the bank had it, and dropped it for good

# -- what a run is at; FIRST is the send of a new payment, REPEAT that of the reconciler
IDLE = "idle"
PREPARING, CLAIMING, RECORDING, SENDING, WAITING, WRITING, UNDOING = (
    "preparing",  # has the intent, and not yet the record
    "claiming",  # only with a rule left out: has seen that there is no claim
    "recording",  # only with a rule left out: has decided to repeat, and not yet recorded it
    "sending",  # has the permit
    "waiting",  # has sent
    "writing",  # has the outcome
    "undoing",  # knows that nothing was sent under its permit
)
LOOKED, READ, ACTING = (
    "looked up",  # class B: has the answer of a look-up
    "has read",  # has the status of a payment that the bank has
    "acting",  # only with a rule left out: acts on a row that it saw a while ago
)
FIRST, REPEAT = "first", "repeat"

# -- what came back
REFUSED, LOST, GARBLED, NOT_SENT = "refused", "lost", "garbled", "not sent"
NOT_FOUND = "not found"

NO_RECORD, UNSIGNED, SIGNED = 0, 1, 2
# -- told to the caller, as a set of bits
TOLD_YES, TOLD_NO = 1, 2
STATUS_WRITTEN = "a run writes the status"
OPEN, CLOSED, FORGOTTEN = "open", "closed", "forgotten"  # the window: usable; over by our clocks; over at the bank
ACTIVE, REVOKED, ANSWERED = "active", "revoked", "revocation answered"


class Request(NamedTuple):
    """What is under way to the bank: our key there, and which rendering of the instruction."""

    key: int
    rendering: int = 1


NOTHING = Request(0, 0)


class Run(NamedTuple):
    at: str = IDLE
    epoch: int = 0
    kind: str = ""  # FIRST or REPEAT; for ACTING the state it saw
    request: Request = NOTHING
    outcome: str = ""
    record: int = 0  # of the permit's entry: NO_RECORD, UNSIGNED or SIGNED
    quiet: bool = False  # whether the look-up was asked when nothing could be under way any more
    sends: int = 0  # under this permit
    in_time: bool = True  # whether the permit's own send deadline is still to come


class State(NamedTuple):
    row: str = NONE
    epoch: int = 0
    key: int = 1
    consent: str = ACTIVE
    live: bool = False  # the newest permit's send deadline is still to come
    window: str = OPEN
    made: int = 0  # payments at the bank that it executes
    status: str = ""  # what the bank says of the one it has
    known_keys: frozenset[int] = frozenset()
    runs: tuple[Run, ...] = ()
    late: tuple[Request, ...] = ()  # under way, and nobody waits for the answer any more
    told: int = 0
    crashes: int = 0
    dispatches: int = 0
    stored_key_lost: bool = False


class Transition(NamedTuple):
    """A change of the row: by how much the epoch grew is part of it."""

    before: str
    after: str
    epochs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The protocol. Each field is one rule, or a part of one; False leaves it out."""

    # 1: insert first
    claim_is_unique: bool = True
    body_is_compared: bool = True
    key_is_stored: bool = True
    # 2: prepare first
    prepares_before_record: bool = True
    # 3: record, checkpoint, permit
    record_before_send: bool = True
    entry_before_send: bool = True
    checkpoint_before_send: bool = True
    repeat_is_recorded: bool = True
    permit_is_redeemed_once: bool = True
    lost_record_is_not_sent: bool = True
    # 4: one bounded send
    send_has_deadline: bool = True
    deadline_closes_connection: bool = True
    connection_is_never_reopened: bool = True
    # 5: no layer retries
    transport_never_repeats: bool = True
    run_never_repeats_after_timeout: bool = True
    run_never_repeats_after_error: bool = True
    # 6: unknown is not failed
    timeout_is_unknown: bool = True
    error_is_unknown: bool = True
    reset_is_not_proof_of_not_sent: bool = True
    success_status_is_not_enough: bool = True
    # 7: fencing
    outcome_checks_state: bool = True
    outcome_checks_epoch: bool = True
    undo_checks_epoch: bool = True
    record_checks_state: bool = True
    record_checks_epoch: bool = True
    abandon_checks_row: bool = True
    hand_over_checks_row: bool = True
    final_rows_never_change: bool = True
    # 8: reconciliation
    repeat_has_same_key: bool = True
    repeat_has_same_bytes: bool = True
    repeat_within_window: bool = True
    window_has_margin: bool = True
    window_checked_at_record: bool = True
    only_class_a_repeats: bool = True
    class_c_goes_to_human: bool = True
    closed_window_goes_to_human: bool = True
    refused_repeat_record_goes_to_human: bool = True
    # 9: refusal of a repeat, not found
    refused_repeat_is_unsettled: bool = True
    not_found_is_unsettled_until_quiet: bool = True
    look_up_is_asked_after_quiet: bool = True
    quiet_includes_network_life: bool = True
    human_waits_for_quiet: bool = True
    # 10: what the caller is told
    unknown_is_told_as_unknown: bool = True
    progress_is_told_as_progress: bool = True
    attention_is_told_as_attention: bool = True
    unknown_keeps_its_request_id: bool = True
    # 11: epochs, not leases; the clocks of the window
    take_over_raises_epoch: bool = True
    take_up_raises_epoch: bool = True
    clock_set_back_closes_window: bool = True
    orphan_is_taken_over: bool = True
    old_intent_is_given_up: bool = True
    # 12: kept for ever
    claims_outlive_payment: bool = True
    claims_have_no_time_limit: bool = True
    rejection_keeps_claim: bool = True
    # and the consent: a payment leaves only while it is active
    record_checks_consent: bool = True
    repeat_checks_consent: bool = True
    revocation_waits_for_permits: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much may happen, so that the search ends. `crashes` are also those of a store whose answer is lost."""

    runs: int = 2
    crashes: int = 1
    dispatches: int = 2
    epochs: int = 4
    late: int = 2


class PaymentModel:
    """One payment at a bank of one class: A (idempotency key within a window), B (look-up by our own key), C (neither)."""

    def __init__(
        self,
        bank: str,
        *,
        rules: Rules | None = None,
        bounds: Bounds | None = None,
        first_statuses: tuple[str, ...] = (ACCEPTED,),  # what the bank may say of a new payment
        follows: bool = False,  # what becomes of the payment at the bank afterwards
        revokes: bool = False,  # the consent may be revoked; clocks agree well enough that no take-over comes before the deadline
        faults: bool = True,  # the network and the processes may fail
    ) -> None:
        self.bank = bank
        self.rules = rules or Rules()
        self.bounds: Bounds | None = bounds or Bounds()
        self._first_statuses = first_statuses
        self._follows = follows
        self._revokes = revokes
        self._faults = faults

    def initial(self) -> State:
        assert self.bounds
        return State(runs=(Run(),) * self.bounds.runs)

    # -- the invariants

    def broken(self, state: State) -> str:
        if state.made > 1:
            return "executed twice"
        if state.told & TOLD_NO and state.made and state.status not in NEVER_EXECUTED:
            return "told rejected, and executed"
        if state.told == TOLD_YES | TOLD_NO:
            return "told both yes and no"
        if state.row in YES and not state.made:
            return "told accepted, and not executed"
        if state.row in (SETTLED, REJECTED_LATE, CANCELLED) and state.status != state.row:
            return "told an end that the bank does not know"
        if state.told & TOLD_YES and state.row in (INTENT, DISPATCHED, RECONCILING, NEEDS_ATTENTION):
            return "an answer was taken back"
        if not self._faults and state.row in (RECONCILING, NEEDS_ATTENTION):
            return "unknown where nothing failed but our own preparation"
        return ""

    def is_settled(self, state: State) -> bool:
        """A human is an end where the class has no other, or where the bank's promise is over or was not kept."""
        if state.row == NEEDS_ATTENTION:
            return self.bank != "A" or state.window != OPEN or state.consent != ACTIVE
        return state.row in TERMINAL or state.row in YES or state.row == NONE

    # -- everything that may happen

    def unbounded(self) -> "PaymentModel":
        same = copy(self)
        same.bounds = None
        return same

    def steps(self, state: State) -> Iterator[Step[State]]:
        seen: set[Run] = set()
        for index, run in enumerate(state.runs):
            if run not in seen:  # runs are alike: two that stand at the same point have the same ways to go
                seen.add(run)
                yield from self._run_steps(state, index, run)
        yield from self._late_steps(state)
        yield from self._clock_steps(state)
        yield from self._human_steps(state)
        if self._revokes:
            yield from self._revocation_steps(state)
        if self._follows:
            yield from self._bank_steps(state)
        yield from self._defective_steps(state)

    def _run_steps(self, state: State, index: int, run: Run) -> Iterator[Step[State]]:
        match run.at:
            case "idle":
                yield from self._call_steps(state, index)
                yield from self._reconciler_steps(state, index)
            case "preparing":
                yield from self._record_steps(state, index, run)
            case "sending":
                yield from self._send_steps(state, index, run)
            case "waiting":
                yield from self._wait_steps(state, index, run)
            case "writing":
                yield self._write_outcome(state, index, run)
            case "undoing":
                yield from self._undo_steps(state, index, run)
            case "looked up":
                yield self._settle_look_up(state, index, run)
            case "has read":
                yield self._write_status(state, index, run)
            case "claiming" | "recording" | "acting":
                yield from self._stale_steps(state, index, run)
        if run.at != IDLE and self._faults and self._left(state.crashes, "crashes"):
            late = (run.request,) if run.at == WAITING else ()
            if self.bounds is None or len(state.late) + len(late) <= self.bounds.late:
                yield Step(
                    f"the run of epoch {run.epoch} dies while {run.at}",
                    _with(state, index, Run(), late=state.late + late, crashes=state.crashes + 1),
                )

    # -- a call of the application

    def _call_steps(self, state: State, index: int) -> Iterator[Step[State]]:
        rules = self.rules
        if state.row == NONE:
            if rules.claim_is_unique:
                preparing = Run(PREPARING, 1)
                yield Step("a call claims the request id, intent 1", self._to(state, index, preparing, INTENT, 1))
            else:
                yield Step("a call finds no claim", _with(state, index, Run(CLAIMING)))
        elif state.row == INTENT and self._left(state.epoch, "epochs"):
            epoch = state.epoch + (1 if rules.take_up_raises_epoch else 0)
            yield Step(
                f"a repeat of the call takes the intent up, epoch {epoch}",
                self._to(state, index, Run(PREPARING, epoch), INTENT, epoch),
            )

    def _record_steps(self, state: State, index: int, run: Run) -> Iterator[Step[State]]:
        """The dispatch record of a first send: one compare-and-set, its entry and the signed checkpoint in one transaction."""
        rules, epoch = self.rules, run.epoch
        yield Step(f"the run of epoch {epoch} cannot prepare; nothing was sent", _with(state, index, Run()))
        if not self._left(state.dispatches, "dispatches"):
            return
        key = state.key
        if not rules.key_is_stored and state.stored_key_lost:
            key = 2
        sending = Run(
            SENDING,
            epoch,
            FIRST,
            Request(key),
            record=self._record() if rules.record_before_send else NO_RECORD,
        )
        if not rules.record_before_send:
            yield Step(
                f"the run of epoch {epoch} goes on to send without a record",
                _with(state, index, sending, live=True, dispatches=state.dispatches + 1),
                calm=True,
            )
            return
        as_expected = (state.row == INTENT or not rules.record_checks_state) and (
            state.epoch == epoch or not rules.record_checks_epoch
        )
        allowed = state.consent == ACTIVE or not rules.record_checks_consent
        if not as_expected or not allowed:
            why = "another run was faster" if allowed else "the consent has ended"
            yield Step(f"the run of epoch {epoch} may not dispatch: {why}", _with(state, index, Run()), calm=True)
            return
        changes = {"live": True, "dispatches": state.dispatches + 1}
        yield Step(
            f"the run of epoch {epoch} records its dispatch under a signed checkpoint",
            self._to(state, index, sending, DISPATCHED, epoch, **changes),
            calm=True,
        )
        if self._faults and self._left(state.crashes, "crashes"):
            changes["crashes"] = state.crashes + 1
            after = Run(UNDOING, epoch)
            yield Step(
                f"the run of epoch {epoch} records its dispatch, and the commit's answer is lost",
                self._to(state, index, after, DISPATCHED, epoch, **changes),
            )
            if not rules.lost_record_is_not_sent:
                after = sending._replace(record=NO_RECORD)
            yield Step(
                f"the run of epoch {epoch} does not get its dispatch recorded: the store is away",
                _with(state, index, after, crashes=state.crashes + 1),
            )

    def _send_steps(self, state: State, index: int, run: Run) -> Iterator[Step[State]]:
        rules = self.rules
        if not rules.prepares_before_record:
            yield Step(
                f"the run of epoch {run.epoch} cannot open the token, after its record",
                _with(state, index, run._replace(at=WRITING, outcome=LOST, request=NOTHING)),
                calm=True,
            )
        if run.in_time or not rules.send_has_deadline:
            yield self._sent(state, index, run)
        if not run.in_time or self._faults:
            why = "its connection fails before the first byte" if run.in_time else "its deadline has passed"
            unsent = Run(UNDOING, run.epoch) if run.kind == FIRST else run._replace(at=WRITING, outcome=NOT_SENT)
            yield Step(
                f"the run of epoch {run.epoch} sends nothing: {why}",
                _with(state, index, unsent._replace(request=NOTHING)),
                calm=not run.in_time,
            )

    def _sent(self, state: State, index: int, run: Run) -> Step[State]:
        broken = ""
        if run.record == NO_RECORD:
            broken = "sent without a record"
        elif run.record == UNSIGNED:
            broken = "sent before the checkpoint over its record was signed"
        elif state.consent == ANSWERED:
            broken = "sent after the revocation was answered"
        late = state.late
        if not self.rules.transport_never_repeats and len(late) < 2:
            late = (*late, run.request)
        waiting = run._replace(at=WAITING, sends=run.sends + 1)
        if not self.rules.permit_is_redeemed_once and waiting.sends < 2:
            waiting, late = waiting._replace(at=SENDING), (*late, run.request)
        label = f"the run of epoch {run.epoch} sends key {run.request.key}"
        return Step(label, _with(state, index, waiting, late=late), broken, calm=True)

    # -- what comes of a send

    def _wait_steps(self, state: State, index: int, run: Run) -> Iterator[Step[State]]:
        request = run.request
        name = f"the run of epoch {run.epoch}"
        for what, at_bank, outcome in self._bank_acts(state, request):
            is_calm = outcome != REFUSED or run.kind == FIRST
            yield Step(f"{what}; {name} has the answer", self._answered(at_bank, index, run, outcome), calm=is_calm)
            if self._faults:
                yield Step(f"{what}; {name} gets no answer", self._answered(at_bank, index, run, LOST))
                yield Step(f"{what}; {name} gets a 500", self._answered(at_bank, index, run, GARBLED))
        if self._faults:
            yield Step(f"the request of epoch {run.epoch} is lost", self._answered(state, index, run, LOST))
            yield Step(f"{name} gets a 500 from before the bank", self._answered(state, index, run, GARBLED))
            if self.bounds is None or len(state.late) < self.bounds.late:
                under_way = state._replace(late=_sorted((*state.late, request)))
                yield Step(
                    f"{name} times out while its request is under way", self._answered(under_way, index, run, LOST)
                )

    def _bank_acts(self, state: State, request: Request) -> Iterator[tuple[str, State, str]]:
        """What the bank may do with a request that arrives: its words, its books afterwards, and what it answers."""
        rules = self.rules
        known = self.bank == "A" and request.key in state.known_keys and state.window != FORGOTTEN
        if known and request.rendering == 1:
            yield f"the bank knows key {request.key}", state, state.status
        elif self.bank == "B" and state.known_keys:
            pass  # the consent is used up: it refuses
        else:
            for status in self._first_statuses:
                made = state.made + (status != REJECTED)
                keys = state.known_keys | {request.key}
                books = state._replace(made=made, known_keys=keys, status=status)
                yield f"the bank takes the payment as {status}, key {request.key}", books, status
        if rules.success_status_is_not_enough:
            yield f"the bank refuses key {request.key}", state, REFUSED
        else:
            yield "a proxy answers 200 with a page of its own", state, ACCEPTED

    def _answered(self, state: State, index: int, run: Run, outcome: str) -> State:
        """The run after its send. What is no answer is unknown; the rest of this method is rules left out."""
        rules = self.rules
        again = run._replace(at=SENDING) if run.sends < 2 else None
        if again and outcome == LOST and not rules.run_never_repeats_after_timeout:
            return _with(state, index, again)
        if again and outcome == LOST and not rules.connection_is_never_reopened:
            return _with(state, index, again._replace(in_time=True))
        if again and outcome == GARBLED and not rules.run_never_repeats_after_error:
            return _with(state, index, again)
        if outcome == LOST and run.kind == FIRST and not rules.reset_is_not_proof_of_not_sent:
            return _with(state, index, Run(UNDOING, run.epoch))
        told = state.told
        if outcome in (LOST, GARBLED):
            if not rules.unknown_is_told_as_unknown:
                told |= TOLD_NO
            fails = not (rules.timeout_is_unknown if outcome == LOST else rules.error_is_unknown)
            outcome = REJECTED if fails else LOST
        return _with(state, index, run._replace(at=WRITING, request=NOTHING, outcome=outcome, sends=0), told=told)

    def _write_outcome(self, state: State, index: int, run: Run) -> Step[State]:
        """Rule 7: only the run that holds the newest epoch. Rule 9: the refusal of a repeat settles nothing."""
        rules = self.rules
        name = f"the run of epoch {run.epoch}"
        expected = DISPATCHED if run.kind == FIRST else RECONCILING
        if not rules.record_before_send and run.kind == FIRST:
            expected = INTENT
        fits = (state.row == expected or not rules.outcome_checks_state) and (
            state.epoch == run.epoch or not rules.outcome_checks_epoch
        )
        fits = fits and state.row not in TERMINAL
        if not rules.final_rows_never_change:
            fits = fits or (state.row in TERMINAL | YES | {NEEDS_ATTENTION})
        if not fits:
            return Step(f"{name} is fenced off", _with(state, index, Run()), calm=True)
        outcome = run.outcome
        if outcome == REFUSED and (run.kind == FIRST or not rules.refused_repeat_is_unsettled):
            outcome = REJECTED
        if outcome in (LOST, GARBLED, REFUSED, NOT_SENT):
            epoch = run.epoch + 1
            after = self._to(state, index, Run(), RECONCILING, max(epoch, state.epoch))
            return Step(f"{name} writes that the outcome is unknown, epoch {epoch}", after, calm=True)
        outcome = _first_told(outcome)
        after = self._to(state, index, Run(), outcome, max(run.epoch, state.epoch))
        return Step(f"{name} writes {outcome}", after, calm=True)

    def _undo_steps(self, state: State, index: int, run: Run) -> Iterator[Step[State]]:
        """Nothing was sent under this permit: back to the intent. Written again and again until the store has answered."""
        same_epoch = state.epoch == run.epoch or not self.rules.undo_checks_epoch
        if state.row != DISPATCHED or not same_epoch:
            yield Step(f"the run of epoch {run.epoch} has nothing to undo", _with(state, index, Run()), calm=True)
            return
        epoch = state.epoch + 1
        label = f"the run of epoch {run.epoch} writes that nothing was sent, intent {epoch}"
        yield Step(label, self._to(state, index, Run(), INTENT, epoch), calm=True)
        if self._faults and self._left(state.crashes, "crashes"):
            after = self._to(state, index, run, INTENT, epoch, crashes=state.crashes + 1)
            yield Step(f"{label}, and the commit's answer is lost", after)

    # -- the reconciler, in this sidecar, in another, or after a restart

    def _reconciler_steps(self, state: State, index: int) -> Iterator[Step[State]]:
        rules, epoch = self.rules, state.epoch
        nobody_at_it = not state.live and not state.late and all(run.at == IDLE for run in state.runs)
        # A lease may look expired at any time, as far as money goes; what is promised of a revocation rests on clocks that agree.
        is_due = nobody_at_it if not self._faults else (not state.live or not self._revokes)
        match state.row:
            case "intent":
                if not rules.old_intent_is_given_up:
                    pass
                elif rules.abandon_checks_row:
                    yield Step("the intent is given up", self._to(state, index, Run(), ABANDONED, epoch), calm=True)
                else:
                    yield Step("the reconciler finds an old intent", _with(state, index, Run(ACTING, epoch, INTENT)))
            case "dispatched":
                if is_due and self._left(epoch, "epochs") and rules.orphan_is_taken_over:
                    after = epoch + (1 if rules.take_over_raises_epoch else 0)
                    yield Step(
                        f"a run takes the dispatch over, epoch {after}",
                        self._to(state, index, Run(), RECONCILING, after),
                        calm=nobody_at_it,
                    )
            case "reconciling" if is_due:
                yield from self._reconcile_steps(state, index, nobody_at_it)
            case "accepted" | "awaiting":
                if self._follows:
                    reads = Run(READ, epoch, state.row, outcome=state.status)
                    yield Step(f"a run reads the status {state.status}", _with(state, index, reads))

    def _reconcile_steps(self, state: State, index: int, is_calm: bool) -> Iterator[Step[State]]:
        rules, epoch = self.rules, state.epoch
        window_open = state.window == OPEN or not rules.repeat_within_window
        may_repeat = self.bank == "A" or not rules.only_class_a_repeats
        if may_repeat and (window_open or self.bank != "A"):
            if not rules.window_checked_at_record:
                yield Step("a run finds the window open", _with(state, index, Run(RECORDING, epoch)))
                return
            yield from self._repeat_steps(state, index, epoch, is_calm)
        elif self.bank == "B":
            yield from self._look_up_steps(state, index, is_calm)
        elif not rules.closed_window_goes_to_human and self.bank == "A":
            yield Step("the window is over: rejected", self._to(state, index, Run(), REJECTED, epoch), calm=is_calm)
        elif rules.class_c_goes_to_human:
            yield self._hand_over(state, index, epoch, is_calm)

    def _look_up_steps(self, state: State, index: int, is_calm: bool) -> Iterator[Step[State]]:
        """Class B: under the next epoch, asked for what the bank has. It reads its own writes."""
        if not self._left(state.epoch, "epochs"):
            return
        epoch = state.epoch + 1
        looked = Run(LOOKED, epoch, outcome=state.status or NOT_FOUND, quiet=self._is_quiet(state))
        after = self._to(state, index, looked, RECONCILING, epoch)
        yield Step(f"a run looks the payment up, epoch {epoch}: {looked.outcome}", after, calm=is_calm)
        if self._faults:
            yield self._hand_over(state, index, state.epoch, is_calm=False)  # the bank refuses to be asked

    def _hand_over(self, state: State, index: int, epoch: int, is_calm: bool) -> Step[State]:
        if not self.rules.hand_over_checks_row:
            return Step("the reconciler decides to ask a human", _with(state, index, Run(ACTING, epoch, RECONCILING)))
        return Step("a human is asked", self._to(state, index, Run(), NEEDS_ATTENTION, epoch), calm=is_calm)

    def _repeat_steps(self, state: State, index: int, seen_epoch: int, is_calm: bool) -> Iterator[Step[State]]:
        """Class A: identical bytes, same key, on a permit of its own under the next epoch."""
        rules = self.rules
        if state.row != RECONCILING or state.epoch != seen_epoch:
            yield Step(f"the repeat of epoch {seen_epoch} is fenced off", _with(state, index, Run()), calm=True)
            return
        if state.consent != ACTIVE and rules.repeat_checks_consent:
            if rules.refused_repeat_record_goes_to_human:
                yield self._hand_over(state, index, seen_epoch, is_calm)
            return
        if not (self._left(state.dispatches, "dispatches") and self._left(seen_epoch, "epochs")):
            return
        epoch = seen_epoch + (1 if rules.repeat_is_recorded else 0)
        request = Request(
            state.key if rules.repeat_has_same_key and not state.stored_key_lost else 2,
            1 if rules.repeat_has_same_bytes else 2,
        )
        record = self._record() if rules.repeat_is_recorded else NO_RECORD
        sending = Run(SENDING, epoch, REPEAT, request, record=record)
        changes = {"live": True, "dispatches": state.dispatches + 1}
        yield Step(
            f"a run records the dispatch of a repeat, epoch {epoch}",
            self._to(state, index, sending, RECONCILING, epoch, **changes),
            calm=is_calm,
        )
        if self._faults and self._left(state.crashes, "crashes"):
            changes["crashes"] = state.crashes + 1
            yield Step(
                f"a run records the dispatch of a repeat, epoch {epoch}, and the commit's answer is lost",
                self._to(state, index, Run(), RECONCILING, epoch, **changes),
            )

    def _settle_look_up(self, state: State, index: int, run: Run) -> Step[State]:
        """Class B. "Not found" counts only where it was asked when nothing of ours could arrive any more."""
        rules = self.rules
        name = f"the look-up of epoch {run.epoch}"
        if state.row != RECONCILING or state.epoch != run.epoch:
            return Step(f"{name} is fenced off", _with(state, index, Run()), calm=True)
        if run.outcome != NOT_FOUND:
            outcome = _first_told(run.outcome)
            return Step(f"{name} writes {outcome}", self._to(state, index, Run(), outcome, run.epoch), calm=True)
        quiet = run.quiet if rules.look_up_is_asked_after_quiet else self._is_quiet(state)
        if quiet or not rules.not_found_is_unsettled_until_quiet:
            return Step(
                f"{name} writes rejected: not found", self._to(state, index, Run(), REJECTED, run.epoch), calm=True
            )
        return Step(f"{name} settles nothing yet", _with(state, index, Run()), calm=True)

    def _write_status(self, state: State, index: int, run: Run) -> Step[State]:
        fits = state.row == run.kind and state.epoch == run.epoch
        if not self.rules.final_rows_never_change:
            fits = True
        if not fits:
            return Step("the status comes late, and is fenced off", _with(state, index, Run()), calm=True)
        after = self._to(state, index, Run(), run.outcome, state.epoch)
        return Step(f"{STATUS_WRITTEN} {run.outcome}", after, calm=True)

    # -- the network, the clocks, the bank, the human, the consent

    def _late_steps(self, state: State) -> Iterator[Step[State]]:
        for request in dict.fromkeys(state.late):
            left = list(state.late)
            left.remove(request)
            rest = state._replace(late=tuple(left))
            yield Step(f"a request that is under way, key {request.key}, is lost", rest, calm=True)
            for what, at_bank, _ in self._bank_acts(rest, request):
                yield Step(f"a late request arrives: {what}", at_bank, calm=True)

    def _clock_steps(self, state: State) -> Iterator[Step[State]]:
        rules = self.rules
        if state.live:
            sending = [run.at == SENDING for run in state.runs]
            runs = tuple(sorted(run._replace(in_time=run.at != SENDING) for run in state.runs))
            # Who has a permit and is not paused sends before its deadline.
            yield Step("the send deadline passes", state._replace(live=False, runs=runs), calm=not any(sending))
        if self.bank != "A" or not state.dispatches:
            return
        if state.window == OPEN:
            yield Step("the window is over by our clocks", state._replace(window=CLOSED))
        forgets = self._is_quiet(state) or not rules.window_has_margin
        if state.window == CLOSED and forgets:
            yield Step("the bank forgets the key", state._replace(window=FORGOTTEN))
        if not rules.repeat_within_window and state.window == OPEN and self._is_quiet(state):
            yield Step("the bank forgets the key", state._replace(window=FORGOTTEN))
        if not rules.clock_set_back_closes_window and state.window == FORGOTTEN:
            yield Step(
                "the wall clock is set back, and the window looks open", state._replace(window=CLOSED, live=False)
            )

    def _is_quiet(self, state: State) -> bool:
        """Nothing of ours is on its way out, and nothing is on its way through the network: what deadline and network life say."""
        if state.live:
            return False
        if not self.rules.quiet_includes_network_life:
            return True
        under_way = any(run.at == WAITING for run in state.runs) or bool(state.late)
        return not under_way or not self.rules.deadline_closes_connection

    def _human_steps(self, state: State) -> Iterator[Step[State]]:
        if state.row != NEEDS_ATTENTION:
            return
        if self._is_quiet(state) or not self.rules.human_waits_for_quiet:
            found = _first_told(state.status or REJECTED)
            after = self._to(state, None, Run(), found if found != AWAITING else ACCEPTED, state.epoch)
            yield Step(f"the operator has asked the bank, and writes {found}", after, calm=True)

    def _revocation_steps(self, state: State) -> Iterator[Step[State]]:
        if state.consent == ACTIVE:
            yield Step("the consent is revoked", state._replace(consent=REVOKED))
        out = state.live and state.row in UNKNOWN
        if state.consent == REVOKED and not (out and self.rules.revocation_waits_for_permits):
            yield Step("the revocation is answered", state._replace(consent=ANSWERED), calm=True)

    def _bank_steps(self, state: State) -> Iterator[Step[State]]:
        """What becomes of a payment that the bank has."""
        following = {
            ACCEPTED: (AWAITING, SETTLED, REJECTED_LATE, CANCELLED),
            AWAITING: (ACCEPTED, SETTLED, REJECTED_LATE, CANCELLED),
        }
        for status in following.get(state.status, ()):
            yield Step(f"at the bank it becomes {status}", state._replace(status=status))

    # -- only with a rule left out

    def _stale_steps(self, state: State, index: int, run: Run) -> Iterator[Step[State]]:
        """Acts of a run on what it saw a while ago."""
        if run.at == CLAIMING:
            key = 1 if state.row == NONE else 2
            claimed = self._to(state, index, Run(PREPARING, 1), INTENT, 1, key=key)._replace(told=0)
            yield Step(f"the call that found no claim inserts its own, key {key}", claimed, calm=True)
        elif run.at == RECORDING:
            yield from self._repeat_steps(state, index, run.epoch, is_calm=True)
        elif state.row not in TERMINAL:
            after = ABANDONED if run.kind == INTENT else NEEDS_ATTENTION
            yield Step(
                f"the reconciler writes {after} over what it saw",
                self._to(state, index, Run(), after, state.epoch),
                calm=True,
            )
        else:
            yield Step("the reconciler finds it final", _with(state, index, Run()), calm=True)

    def _defective_steps(self, state: State) -> Iterator[Step[State]]:
        """Ways that only a defect opens."""
        rules = self.rules
        if not rules.body_is_compared and state.row in YES:
            yield Step(
                "a call with another body and the same request id is told accepted",
                state,
                "told accepted, and not executed",
            )
        if not rules.key_is_stored and state.row in UNKNOWN and not state.stored_key_lost:
            yield Step(
                "the process restarts, and its key towards the bank is gone", state._replace(stored_key_lost=True)
            )
        if not rules.progress_is_told_as_progress and state.row == DISPATCHED:
            yield Step("a call that finds it dispatched is told rejected", state._replace(told=state.told | TOLD_NO))
        if not rules.attention_is_told_as_attention and state.row == NEEDS_ATTENTION:
            yield Step("a call that finds it with a human is told rejected", state._replace(told=state.told | TOLD_NO))
        # The row of the payment before is out of sight, and so is what was told of it.
        new = state._replace(row=NONE, epoch=0, key=2, told=0, runs=(Run(),) * len(state.runs))
        if not rules.unknown_keeps_its_request_id and state.row == RECONCILING and state.key == 1:
            yield Step("the caller is told an error, and comes with a new request id", new)
        if not rules.claims_outlive_payment and state.row in YES and state.key == 1:
            yield Step("the claim of a finished payment is deleted", new)
        if not rules.claims_have_no_time_limit and state.row == NEEDS_ATTENTION and state.key == 1:
            yield Step("the claim is a day old, and is deleted", new)
        if not rules.rejection_keeps_claim and state.row in NO and state.key == 1:
            yield Step("the claim of a rejected payment is deleted", new._replace(told=state.told))

    # -- parts

    def _to(self, state: State, index: int | None, run: Run, row: str, epoch: int, **changes: object) -> State:
        """The row written, and what any caller that asks is told from then on."""
        told = state.told | (TOLD_YES if row in YES else TOLD_NO if row in NO else 0)
        after = state._replace(row=row, epoch=epoch, told=told, **changes)  # type: ignore[arg-type]
        return after if index is None else _with(after, index, run)

    def _record(self) -> int:
        if not self.rules.entry_before_send:
            return NO_RECORD
        return SIGNED if self.rules.checkpoint_before_send else UNSIGNED

    def _left(self, used: int, what: str) -> bool:
        return self.bounds is None or used < getattr(self.bounds, what)


def _first_told(status: str) -> str:
    """Who is told for the first time is told rejected of a payment that the bank has dropped meanwhile."""
    return REJECTED if status in NEVER_EXECUTED else status


def _with(state: State, index: int, run: Run, **changes: object) -> State:
    """The state with one run changed; runs are alike, so their order says nothing and is made the same."""
    runs = list(state.runs)
    runs[index] = run
    changes["runs"] = tuple(sorted(runs))
    if "late" in changes:
        changes["late"] = _sorted(changes["late"])  # type: ignore[arg-type]
    return state._replace(**changes)  # type: ignore[arg-type]


def _sorted(requests: tuple[Request, ...]) -> tuple[Request, ...]:
    return tuple(sorted(requests))


def transition_of(before: State, step: Step[State]) -> Transition | None:
    """What this step writes into the row, if it writes; a status that brings no news is written too."""
    after = step.state
    if (before.row, before.epoch) == (after.row, after.epoch) and not step.label.startswith(STATUS_WRITTEN):
        return None
    return Transition(before.row, after.row, after.epoch - before.epoch)
