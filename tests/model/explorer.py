"""Explicit-state search: every state that a model can reach, breadth first, so the first broken invariant has the shortest trace.

Rules: the search is deterministic (steps come in the order in which the model yields them), needs nothing but the standard
library, and says whether it saw everything: a search that was cut off by its bound proves nothing, and does not claim to.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

__all__ = ["Exploration", "Model", "Step", "explore", "unsettled_trace"]

S = TypeVar("S", bound=Hashable)

_LONGEST_CALM_WAY = 200  # steps; a way without faults that is longer goes on for ever


class Step(NamedTuple, Generic[S]):
    """One thing that may happen. `broken` names an invariant that the act itself breaks, whatever state it leads to."""

    label: str
    state: S
    broken: str = ""
    calm: bool = False  # no fault, and nothing that only the world may choose: it goes on once faults have stopped


class Model(Protocol[S]):
    def initial(self) -> S: ...

    def steps(self, state: S) -> Iterator[Step[S]]: ...

    def unbounded(self) -> "Model[S]":
        """The same without the bounds that make `steps` finite: its calm steps alone come to an end by themselves."""

    def broken(self, state: S) -> str:
        """The invariant that this state breaks; "" where all hold."""

    def is_settled(self, state: S) -> bool:
        """Whether everything has come to an end here: liveness asks that each calm way leads to such a state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """`broken` is "" where every invariant holds in every state that was seen; `trace` leads to the first that does not."""

    states: int
    is_exhaustive: bool
    broken: str
    trace: tuple[str, ...]
    transitions: int

    def __str__(self) -> str:
        if not self.broken:
            seen = "exhaustive" if self.is_exhaustive else "CUT OFF by the bound"
            return f"no violation in {self.states:,} states ({seen})"
        steps = "".join(f"\n  {number:2}. {label}" for number, label in enumerate(self.trace, start=1))
        return f"{self.broken}, after {len(self.trace)} steps:{steps}"


def explore(
    model: Model[S],
    *,
    max_states: int,
    check_liveness: bool = False,
    on_step: Callable[[S, Step[S]], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Exploration:
    """Sees all that `model` can reach, at most `max_states`. `on_progress` gets the states worked on and those found so far.

    With `check_liveness`, each state is also asked what becomes of it once faults stop (`unsettled_trace`).
    """
    first = model.initial()
    found: dict[S, int] = {first: 0}
    order = [first]
    parents = [0]
    transitions = 0
    unbounded, calm_ends = model.unbounded(), dict[S, bool]()

    def result(broken: str, at: int, *last: str, is_exhaustive: bool = False) -> Exploration:
        trace = (*_trace(model, order, parents, at), *last) if broken else ()
        return Exploration(
            states=len(order), is_exhaustive=is_exhaustive, broken=broken, trace=trace, transitions=transitions
        )

    if broken := model.broken(first):
        return result(broken, 0)
    at = 0
    while at < len(order):
        state = order[at]
        for step in model.steps(state):
            transitions += 1
            if on_step:
                on_step(state, step)
            if step.broken:
                return result(step.broken, at, step.label)
            if step.state in found:
                continue
            if broken := model.broken(step.state):
                return result(broken, at, step.label)
            if len(order) == max_states:
                return result("", at)
            found[step.state] = len(order)
            order.append(step.state)
            parents.append(at)
        if check_liveness and (rest := unsettled_trace(unbounded, state, calm_ends)) is not None:
            return result("once faults stop, it never comes to an end", at, "(faults stop)", *rest)
        at += 1
        if on_progress and at % 5_000 == 0:
            on_progress(at, len(order))
    return result("", 0, is_exhaustive=True)


def unsettled_trace(model: Model[S], start: S, known: dict[S, bool]) -> list[str] | None:
    """A way of calm steps from `start` that ends in no settled state, or goes round for ever; None where every way settles.
    `model` is one without bounds.

    `known` carries what was found out from one call to the next: True for states from which every calm way settles.
    """
    if known.get(start):
        return None
    path: list[tuple[S, Iterator[Step[S]], str]] = []
    on_path: set[S] = set()

    def enter(state: S, label: str) -> bool:
        """Goes on to `state`; False where it ends unsettled, or was met on this very way."""
        if state in on_path or len(path) > _LONGEST_CALM_WAY:
            return False
        calm = [step for step in model.steps(state) if step.calm]
        if not calm and not model.is_settled(state):
            return False
        path.append((state, iter(calm), label))
        on_path.add(state)
        return True

    if not enter(start, ""):
        return []
    while path:
        state, steps, _ = path[-1]
        step = next(steps, None)
        if step is None:
            known[state] = True
            on_path.discard(state)
            path.pop()
        elif not known.get(step.state) and not enter(step.state, step.label):
            return [label for _, _, label in path[1:]] + [step.label]
    return None


def _trace(model: Model[S], order: list[S], parents: list[int], at: int) -> tuple[str, ...]:
    """The labels from the first state to that at `at`, found again from the states: keeping them all would cost memory."""
    labels: list[str] = []
    while at:
        before, after = order[parents[at]], order[at]
        labels.append(next(step.label for step in model.steps(before) if step.state == after))
        at = parents[at]
    return tuple(reversed(labels))
