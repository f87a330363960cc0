"""fi_P1: SIGKILL at every await of payment, consent completion, refresh and revocation, and of what comes after.

The core is the real one on a real database file; the bank and its books are in another process. After each kill a new process
starts on the file, the application asks again, and the whole is judged (`sweeps.Place.judge`).
"""

import random
from collections.abc import Callable

import pytest

from tests.faults.extent import everything, sample, seed
from tests.faults.scenarios import SCENARIOS
from tests.faults.sweeps import Harness

Record = Callable[[str, object], None]
POINTS_IN_A_SAMPLE = 5


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_an_await(harness: Harness, name: str, record_property: Record) -> None:
    """Once without a kill, which counts the points; then killed at each of them (or at a sample of them)."""
    whole = harness.place(name, "no kill")
    points = whole.act().last("points")
    whole.recover(number=0)
    whole.judge()
    harness.done(whole)

    chosen = sample(range(1, points + 1), POINTS_IN_A_SAMPLE, of=name)
    killed = 0
    for point in chosen:
        place = harness.place(name, f"killed at point {point} of {points} (seed {seed()})")
        killed += place.act(kill_at=point).killed
        place.recover(number=point)
        place.judge()
        harness.done(place)

    record_property("injected", killed)
    assert points >= 15
    assert killed >= len(chosen) - 1  # the last point may be one that a run of other timing does not have


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_again_while_it_recovers(harness: Harness, name: str, record_property: Record) -> None:
    """The process after the killed one is killed as well, at any of its points; the third one comes through."""
    chance = random.Random(f"{seed()} again {name}")
    killed = 0
    for _ in range(25 if everything() else 1):
        first, second = chance.randrange(1, 45), chance.randrange(1, 60)
        place = harness.place(name, f"killed at points {first} and {second} (seed {seed()})")
        killed += place.act(kill_at=first).killed
        killed += place.recover(number=first, kill_at=second).killed
        place.recover(number=second)
        place.judge()
        harness.done(place)

    record_property("injected", killed)
