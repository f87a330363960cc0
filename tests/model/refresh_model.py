"""The refresh of a rotating token as a model: one consent's pair in the store, the runs that refresh it, and the provider.

It is written from the rules of refresh in docs/reliability.md. Tokens are numbers, in the order in which the provider made them.
Four kinds of provider: *strict* (a token dies when it is used, and using a dead one revokes the whole family), *grace* (the one
before still works for a while and gives the same newest pair), *when first used* (the old one works until the new one was first
used), *none* (tokens do not rotate).

Invariants: no request ever carries a dead token to a provider that punishes it; a newer pair is never overwritten by an older; a
call is on record before it is made; a token that is lost is flagged; where the provider's kind lets us go on, nothing is lost;
nothing is flagged by our own race; once faults stop, every way comes to an end.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.explorer import Step

__all__ = ["GRACE", "NO_ROTATION", "STRICT", "WHEN_FIRST_USED", "RefreshBounds", "RefreshModel", "RefreshRules"]

STRICT, GRACE, WHEN_FIRST_USED, NO_ROTATION = "strict", "grace", "when first used", "none"

IDLE, SENDING, WAITING, SAVING, REFUSED, LOST = "idle", "sending", "waiting", "saving", "refused", "lost"


class Run(NamedTuple):
    at: str = IDLE
    epoch: int = 0
    token: int = 0  # that it asks with
    got: int = 0  # the newest pair in its hands
    in_time: bool = True
    repeats: bool = False  # an intent before this one has no outcome


class State(NamedTuple):
    # the store
    token: int = 1  # the newest pair
    old: int = 0  # the pair before, until the new one has worked
    worked: bool = True
    epoch: int = 0  # of the newest lease
    held: bool = False
    intent: int = 0  # epoch of the newest intent
    is_open: bool = False  # that intent has no outcome on record
    flagged: bool = False
    # the provider
    current: int = 1
    before: int = 0  # grace: works still
    pending: int = 0  # when first used: made, and not used yet
    made: int = 1
    withdrawn: bool = False  # the owner has ended the consent there
    # everything else
    live: bool = False  # the newest send's deadline is still to come
    runs: tuple[Run, ...] = ()
    late: tuple[int, ...] = ()
    crashes: int = 0
    sends: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshRules:
    """The rules of refresh. Each field is one, or a part of one; False leaves it out."""

    # R1: one refresher, by a lease with an epoch
    one_refresher: bool = True
    lease_outlives_send: bool = True
    lease_is_kept_until_saved: bool = True
    # R2: the intent before the call, and what an intent without an outcome means
    intent_before_call: bool = True
    open_intent_is_unknown: bool = True
    not_sent_closes_intent: bool = True
    not_sent_repeat_stays_unknown: bool = True
    # R3: one bounded send
    send_has_deadline: bool = True
    transport_never_repeats: bool = True
    # R4: stored before used, fenced, the old pair kept
    stored_before_used: bool = True
    save_is_fenced: bool = True
    old_is_kept_until_new_worked: bool = True
    # R5: an unknown outcome, by the kind of the provider
    strict_never_repeats: bool = True
    grace_repeats_only_in_grace: bool = True
    unknown_is_not_refused: bool = True
    # R6: what is lost is flagged
    unknown_at_strict_is_flagged: bool = True
    refused_is_flagged: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshBounds:
    runs: int = 2
    crashes: int = 2
    sends: int = 4
    late: int = 2


class RefreshModel:
    def __init__(
        self,
        kind: str,
        *,
        rules: RefreshRules | None = None,
        bounds: RefreshBounds | None = None,
        faults: bool = True,  # network and processes may fail; without, only races and failed connections are left
    ) -> None:
        self.kind = kind
        self.rules = rules or RefreshRules()
        self.bounds: RefreshBounds | None = bounds or RefreshBounds()
        self._faults = faults

    def initial(self) -> State:
        assert self.bounds
        return State(runs=(Run(),) * self.bounds.runs)

    # -- the invariants

    def broken(self, state: State) -> str:
        if not state.flagged or state.withdrawn:
            return ""
        if self.kind in (NO_ROTATION, WHEN_FIRST_USED):
            return "flagged as lost where the provider lets us go on"
        if self.kind == GRACE and state.before and self._works(state, state.token):
            return "flagged as lost where the provider lets us go on"
        if not self._faults:
            return "flagged as lost by our own race"
        return ""

    def is_settled(self, state: State) -> bool:
        return state.flagged or (not state.is_open and self._works(state, state.token))

    def _works(self, state: State, token: int) -> bool:
        if state.withdrawn:
            return False
        return token in {state.current, state.before if self.kind == GRACE else 0, state.pending} - {0}

    # -- everything that may happen

    def unbounded(self) -> "RefreshModel":
        same = copy(self)
        same.bounds = None
        return same

    def steps(self, state: State) -> Iterator[Step[State]]:
        seen: set[Run] = set()
        for index, run in enumerate(state.runs):
            if run not in seen:
                seen.add(run)
                yield from self._run_steps(state, index, run)
        yield from self._late_steps(state)
        if state.live:
            sending = [run.at == SENDING for run in state.runs]
            runs = tuple(sorted(run._replace(in_time=run.at != SENDING) for run in state.runs))
            if self._faults or not any(sending):
                yield Step("the send deadline passes", state._replace(live=False, runs=runs), calm=not any(sending))
        yield from self._provider_steps(state)
        yield from self._use_steps(state)

    def _run_steps(self, state: State, index: int, run: Run) -> Iterator[Step[State]]:
        match run.at:
            case "idle":
                yield from self._begin_steps(state, index)
            case "sending":
                yield from self._send_steps(state, index, run)
            case "waiting":
                yield from self._wait_steps(state, index, run)
            case "saving":
                yield self._save(state, index, run)
                if not self.rules.stored_before_used:
                    yield Step(f"pair {run.got} is used before it is stored", self._first_use(state, run.got))
            case "refused":
                yield self._refused(state, index, run)
            case "lost":
                yield self._unknown(state, index, run)
        if run.at != IDLE and self._faults and (self.bounds is None or state.crashes < self.bounds.crashes):
            late = (*state.late, run.token) if run.at == WAITING else state.late
            if self.bounds is None or len(late) <= self.bounds.late:
                after = _with(state, index, Run())._replace(late=tuple(sorted(late)), crashes=state.crashes + 1)
                yield Step(f"the run of epoch {run.epoch} dies while {run.at}", after)

    def _begin_steps(self, state: State, index: int) -> Iterator[Step[State]]:
        """The lease with the intent, in one transaction. What an open intent allows is the provider's kind's to say."""
        rules = self.rules
        if state.flagged or (self.bounds is not None and state.sends >= self.bounds.sends):
            return
        if rules.one_refresher and state.held and not self._lease_is_over(state):
            return
        epoch = state.epoch + 1
        is_calm = (state.is_open or not self._works(state, state.token)) and self._nobody_at_it(state)
        if state.is_open and rules.open_intent_is_unknown and not self._may_repeat(state):
            flagged = state._replace(epoch=epoch, held=False, flagged=True, is_open=False)
            label = "a run finds a refresh without an outcome, which must not be repeated: flagged"
            yield Step(label, flagged, calm=is_calm)
            return
        is_open = state.is_open or rules.intent_before_call
        begun = state._replace(epoch=epoch, intent=epoch, is_open=is_open, held=True, live=True, sends=state.sends + 1)
        sending = Run(SENDING, epoch, state.token, repeats=state.is_open)
        label = f"a run takes the lease of epoch {epoch}, to refresh token {state.token}"
        yield Step(label, _with(begun, index, sending), calm=is_calm)

    def _lease_is_over(self, state: State) -> bool:
        """The lease is longer than deadline and network life together; who holds a new pair is still writing it down."""
        if not self.rules.lease_outlives_send:
            return True
        is_quiet = not state.live and not state.late and all(run.at != WAITING for run in state.runs)
        return is_quiet if self._faults else self._nobody_at_it(state)

    def _nobody_at_it(self, state: State) -> bool:
        return not state.live and not state.late and all(run.at == IDLE for run in state.runs)

    def _may_repeat(self, state: State) -> bool:
        rules = self.rules
        if self.kind == STRICT:
            return not rules.strict_never_repeats
        if self.kind == GRACE:
            return self._grace_is_open(state) or not rules.grace_repeats_only_in_grace
        return True

    def _grace_is_open(self, state: State) -> bool:
        """By our clock: from the moment of the unknown send on, less a margin; so it is over before the provider's is."""
        return self._works(state, state.token)

    def _send_steps(self, state: State, index: int, run: Run) -> Iterator[Step[State]]:
        if run.in_time or not self.rules.send_has_deadline:
            late = state.late if self.rules.transport_never_repeats else tuple(sorted((*state.late, run.token)))
            after = _with(state, index, run._replace(at=WAITING))._replace(late=late)
            yield Step(f"the run of epoch {run.epoch} sends token {run.token}", after, calm=True)
        else:
            yield self._not_sent(state, index, run, "its deadline has passed")
        if run.in_time:
            yield self._not_sent(state, index, run, "the connection fails")

    def _not_sent(self, state: State, index: int, run: Run, why: str) -> Step[State]:
        after = _with(state, index, Run())
        if state.intent == run.epoch:
            stays = run.repeats and self.rules.not_sent_repeat_stays_unknown
            is_open = state.is_open and (stays or not self.rules.not_sent_closes_intent)
            after = after._replace(is_open=is_open, held=state.held and state.epoch != run.epoch)
        return Step(f"the run of epoch {run.epoch} sends nothing: {why}", after, calm=not run.in_time)

    def _wait_steps(self, state: State, index: int, run: Run) -> Iterator[Step[State]]:
        name = f"the run of epoch {run.epoch}"
        what, at_provider, got, broken = self._provider_acts(state, run.token)
        after = run._replace(at=SAVING if got else REFUSED, got=got, in_time=True, repeats=False)
        answered = _with(at_provider, index, after)
        if not self.rules.lease_is_kept_until_saved and state.epoch == run.epoch:
            answered = answered._replace(held=False)
        yield Step(f"{what}; {name} has the answer", answered, broken, calm=True)
        if not self._faults:
            return
        lost = run._replace(at=LOST, in_time=True, repeats=False)
        yield Step(f"{what}; {name} gets no answer", _with(at_provider, index, lost), broken)
        yield Step(f"the request of epoch {run.epoch} is lost", _with(state, index, lost))
        if self.bounds is None or len(state.late) < self.bounds.late:
            under_way = state._replace(late=tuple(sorted((*state.late, run.token))))
            yield Step(f"{name} times out while its request is under way", _with(under_way, index, lost))

    def _late_steps(self, state: State) -> Iterator[Step[State]]:
        for token in dict.fromkeys(state.late):
            left = list(state.late)
            left.remove(token)
            rest = state._replace(late=tuple(left))
            yield Step(f"a request that is under way, token {token}, is lost", rest, calm=True)
            what, at_provider, _, broken = self._provider_acts(rest, token)
            yield Step(f"a late request arrives: {what}", at_provider, broken, calm=True)

    # -- the provider

    def _provider_acts(self, state: State, token: int) -> tuple[str, State, int, str]:
        """Its words, its books afterwards, the pair it gives (0: refused), and what this breaks."""
        if state.withdrawn:
            return "the consent was withdrawn: refused", state, 0, ""
        new = state.made + 1
        words = f"the provider takes token {token}"
        match self.kind:
            case "none":
                return f"{words}, and it stays", state, token, ""
            case "when first used" if token in (state.current, state.pending):
                return f"{words}, makes {new}", state._replace(current=token, pending=new, made=new), new, ""
            case "grace" if token == state.before and token:
                return f"{words} once more, gives {state.current}", state, state.current, ""
            case "grace" if token == state.current:
                return f"{words}, makes {new}", state._replace(current=new, before=token, made=new), new, ""
            case "strict" if token == state.current:
                return f"{words}, makes {new}", state._replace(current=new, made=new), new, ""
        punished = self.kind in (STRICT, GRACE)
        broken = "a dead token was sent again, and the family is revoked" if punished else ""
        return f"token {token} is dead: refused", state, 0, broken

    def _provider_steps(self, state: State) -> Iterator[Step[State]]:
        asked = state.live or bool(state.late) or any(run.at == WAITING for run in state.runs)
        if self.kind == GRACE and state.before and not asked:
            # Our own clock ends the time for repeats first, so nothing of ours is under way when the provider's ends.
            yield Step("the grace period ends", state._replace(before=0))
        if self.kind == WHEN_FIRST_USED and state.pending and not asked and self._faults:
            saving = any(run.at == SAVING for run in state.runs)
            if not saving and state.token == state.pending and not state.worked:
                yield Step("the provider drops the pair that nobody has used", state._replace(pending=0))
        if self._faults and not state.withdrawn:
            yield Step("the owner withdraws the consent at the provider", state._replace(withdrawn=True))

    def _use_steps(self, state: State) -> Iterator[Step[State]]:
        """The access token of the stored pair is used, and works: from then on the pair before it is not needed."""
        if not state.worked and self._works(state, state.token):
            used = self._first_use(state, state.token)
            yield Step(f"pair {state.token} is used, and works", used._replace(worked=True, old=0))

    def _first_use(self, state: State, token: int) -> State:
        if self.kind == WHEN_FIRST_USED and token == state.pending:
            return state._replace(current=token, pending=0)
        return state

    # -- what comes of it

    def _save(self, state: State, index: int, run: Run) -> Step[State]:
        """The new pair, where no newer intent stands: one that came late is still the only one there is."""
        if state.intent != run.epoch and self.rules.save_is_fenced:
            return Step(f"pair {run.got} of epoch {run.epoch} is fenced off", _with(state, index, Run()), calm=True)
        broken = "a newer pair was overwritten by an older one" if run.got < state.token else ""
        rotated = run.got != state.token
        after = _with(state, index, Run())._replace(
            token=run.got,
            old=state.token if rotated and self.rules.old_is_kept_until_new_worked else 0,
            worked=not rotated,
            is_open=False,
            flagged=False,
            held=state.held and state.epoch != run.epoch,
        )
        return Step(f"the run of epoch {run.epoch} stores pair {run.got}", after, broken, calm=True)

    def _refused(self, state: State, index: int, run: Run) -> Step[State]:
        """A pair that never worked may be refused while the one before it works, but not where that would be a reuse."""
        after = _with(state, index, Run())
        if state.intent != run.epoch:
            return Step(f"the refusal of epoch {run.epoch} is fenced off", after, calm=True)
        after = after._replace(is_open=False, held=state.held and state.epoch != run.epoch)
        goes_back = self.kind in (WHEN_FIRST_USED, NO_ROTATION)
        if state.old and not state.worked and goes_back:
            back = after._replace(token=state.old, old=0, worked=True)
            return Step(f"token {run.token} never worked: back to token {state.old}", back, calm=True)
        if not self.rules.refused_is_flagged:
            return Step(f"token {run.token} is refused, and stays", after, calm=True)
        return Step(f"token {run.token} is refused: flagged", after._replace(flagged=True), calm=True)

    def _unknown(self, state: State, index: int, run: Run) -> Step[State]:
        """The intent stays open, and the lease runs out by itself. At a strict provider it is said at once."""
        rules = self.rules
        after = _with(state, index, Run())
        if state.intent != run.epoch:
            return Step(f"what became of epoch {run.epoch} is not asked any more", after, calm=True)
        if not rules.unknown_is_not_refused:
            return Step(
                "no answer is taken for a refusal: flagged", after._replace(flagged=True, is_open=False), calm=True
            )
        if self.kind == STRICT and rules.strict_never_repeats:
            if rules.unknown_at_strict_is_flagged:
                flagged = after._replace(flagged=True, is_open=False, held=False)
                return Step(f"the outcome of epoch {run.epoch} is unknown: flagged", flagged, calm=True)
            closed = after._replace(is_open=False, held=False)
            return Step(f"the outcome of epoch {run.epoch} is unknown: nothing is said", closed, calm=True)
        return Step(f"the outcome of epoch {run.epoch} is unknown", after, calm=True)


def _with(state: State, index: int, run: Run) -> State:
    runs = list(state.runs)
    runs[index] = run
    return state._replace(runs=tuple(sorted(runs)))
