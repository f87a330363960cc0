"""The rules of refresh hold in every state that their model can reach, for each kind of provider."""

import pytest

from tests.model.defects import WORLDS, is_payment_world, refresh_model
from tests.model.explorer import Step, explore
from tests.model.refresh_model import STRICT, RefreshBounds, RefreshModel, State

MAX_STATES = 200_000
REFRESH_WORLDS = [world for world in WORLDS if not is_payment_world(world)]


@pytest.mark.parametrize("world", REFRESH_WORLDS)
def test_no_invariant_breaks_in_any_state(world: str) -> None:
    """Exhaustive within the bounds, and from every state every way without faults ends in a token that works, or in a flag."""
    seen = explore(refresh_model(world), max_states=MAX_STATES, check_liveness=True)

    assert not seen.broken, str(seen)
    assert seen.is_exhaustive, str(seen)


def test_three_refreshers_at_once_change_nothing() -> None:
    for kind in ("strict", "grace", "no rotation"):
        seen = explore(
            RefreshModel(refresh_model(kind).kind, bounds=RefreshBounds(runs=3, crashes=1, sends=3)),
            max_states=MAX_STATES,
        )

        assert not seen.broken, str(seen)
        assert seen.is_exhaustive, str(seen)


def test_a_token_lost_at_a_strict_provider_is_flagged_and_cannot_be_kept() -> None:
    """What no rule can prevent is in the model: the provider has rotated, the answer is lost, and the consent is flagged."""
    lost: list[State] = []

    def note(_before: State, step: Step[State]) -> None:
        state = step.state
        if state.flagged and not state.withdrawn and state.token != state.current:
            lost.append(state)

    explore(RefreshModel(STRICT), max_states=MAX_STATES, on_step=note)

    assert lost
