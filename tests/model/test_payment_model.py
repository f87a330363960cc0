"""The payment protocol holds in every state that its model can reach, with all rules in place."""

import pytest

from tests.model.defects import WORLDS, is_payment_world, payment_model
from tests.model.explorer import explore
from tests.model.payment_model import (
    ABANDONED,
    NEEDS_ATTENTION,
    RECONCILING,
    REJECTED,
    SETTLED,
    Bounds,
    PaymentModel,
    State,
)

MAX_STATES = 200_000
PAYMENT_WORLDS = [world for world in WORLDS if is_payment_world(world)]


@pytest.mark.parametrize("world", PAYMENT_WORLDS)
def test_no_invariant_breaks_in_any_state(world: str) -> None:
    """Exhaustive within the bounds, and from every state every way without faults comes to an end."""
    seen = explore(payment_model(world), max_states=MAX_STATES, check_liveness=True)

    assert not seen.broken, str(seen)
    assert seen.is_exhaustive, str(seen)


def test_three_runs_at_once_change_nothing() -> None:
    """A third run that shares nothing but the row finds no way that two do not find."""
    for bank in "BC":
        seen = explore(payment_model(bank, bounds=Bounds(runs=3, crashes=2, dispatches=3)), max_states=MAX_STATES)

        assert not seen.broken, str(seen)
        assert seen.is_exhaustive, str(seen)


@pytest.mark.parametrize(
    ("world", "rows"),
    [
        ("A", {SETTLED, REJECTED, ABANDONED, RECONCILING, NEEDS_ATTENTION}),
        ("B", {REJECTED, ABANDONED, RECONCILING}),
        ("C", {REJECTED, ABANDONED, RECONCILING, NEEDS_ATTENTION}),
    ],
)
def test_the_model_reaches_what_it_is_about(world: str, rows: set[str]) -> None:
    """A model that cannot reach an unknown outcome proves nothing of it. Payments are executed, refused, lost, and late."""
    met: set[str] = set()
    facts: set[str] = set()

    def note(_before: State, step: object) -> None:
        state = step.state  # type: ignore[attr-defined]
        met.add(state.row)
        facts.update({f"executed {state.made}", f"late {len(state.late)}", f"window {state.window}"})

    model = payment_model(f"{world}, followed", bounds=Bounds(crashes=1, dispatches=2))
    explore(model, max_states=MAX_STATES, on_step=note)

    assert rows <= met
    assert {"executed 0", "executed 1", "late 1"} <= facts
    assert ("window forgotten" in facts) == (world == "A")


def test_class_b_needs_no_human_where_nothing_fails() -> None:
    """Where the bank can be asked after the quiet period, only a bank that refuses to be asked leaves an outcome with a human."""
    ends: set[str] = set()

    def note(before: State, step: object) -> None:
        if step.calm and step.state.row != before.row:  # type: ignore[attr-defined]
            ends.add(step.state.row)  # type: ignore[attr-defined]

    seen = explore(PaymentModel("B"), max_states=MAX_STATES, on_step=note)

    assert seen.is_exhaustive
    assert NEEDS_ATTENTION not in ends
    assert {REJECTED, ABANDONED} <= ends


def test_the_search_is_the_same_each_time() -> None:
    """States, transitions and traces do not depend on the run: a counter-example can be talked about."""
    first, second = (explore(payment_model("A", "window_has_margin"), max_states=MAX_STATES) for _ in range(2))

    assert first == second
    assert first.broken
