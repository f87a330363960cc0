"""Payments under faults, by the thousand: the bank's ledger, what callers were told and what is on record agree; all ends in time.

A failure names its seed; `make simulate SEED=…` plays it again, and `make simulate PAYMENTS=…` plays as many as there is time for.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.domain.payment import PaymentState
from tests.simulation.bank import ClassName
from tests.simulation.defects import DEFECTS
from tests.simulation.support import Databases, databases
from tests.simulation.world import Violation, simulate

S = PaymentState
PAYMENTS_A_CHUNK, CHUNKS = 850, 12  # more than 10,000 in all; many chunks, so that none needs a test's time
RUNS_FOR_A_DEFECT = 120  # the rarest is met at the 84th


@pytest.fixture(scope="module")
def places() -> Iterator[Databases]:
    with databases() as made:
        yield made


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_fault_pays_twice_or_lies(places: Databases, chunk: int) -> None:
    """Executed at most once; yes and no never both, and each true; on record before the act; known or flagged in time."""
    states: Counter[PaymentState] = Counter()
    faults: Counter[str] = Counter()
    seed = 1_000 * chunk
    while states.total() < PAYMENTS_A_CHUNK:
        with places.new() as directory:
            played = simulate(seed, directory=directory)
        states, faults, seed = states + played.states, faults + played.faults, seed + 1

    assert states[S.SETTLED] > PAYMENTS_A_CHUNK // 3
    assert min(states[state] for state in (S.REJECTED, S.NEEDS_ATTENTION, S.ABANDONED)) > 10
    assert faults.total() > 50


def test_each_fault_strikes(places: Databases) -> None:
    """A fault that never comes proves nothing: all kinds come within some runs."""
    faults: Counter[str] = Counter()
    for seed in range(24):
        with places.new() as directory:
            faults += simulate(seed, directory=directory, orders=60).faults

    assert faults.keys() >= {
        "answer of a commit lost", "commit failed after", "commit failed before", "died at a call", "killed", "machine restarted",
        "no connection", "no signature", "revoked", "signature too late", "stood still", "stood still at a call",
        "suspended for 90000 s", "wall clock set", "writer stalled",
    }  # fmt: skip


def test_one_seed_is_one_run(places: Databases, tmp_path: Path) -> None:
    """The same trace twice, in this process and in another, whose hashes of texts are others."""
    digests = []
    for _ in range(2):
        with places.new() as directory:
            digests.append(simulate(5, directory=directory).digest)
    command = [sys.executable, "-m", "tests.simulation", "--seed", "5", "--digest"]
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    with places.new() as directory:
        another_seed = simulate(6, directory=directory).digest

    assert digests == [other.stdout.strip()] * 2
    assert another_seed != digests[0]


@pytest.mark.parametrize("name", DEFECTS)
def test_the_simulation_catches_it(places: Databases, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The real code with one rule left out breaks an invariant within some runs, and the text names the seed."""
    defect = DEFECTS[name]
    defect.apply(monkeypatch)

    with pytest.raises(Violation, match=r"make simulate SEED=\d+ CLASS=[ABC]") as caught:
        _simulate_many(places, defect.class_name)

    assert defect.breaks in str(caught.value).partition("\n")[0]


def _simulate_many(places: Databases, class_name: ClassName) -> None:
    for seed in range(RUNS_FOR_A_DEFECT):
        with places.new() as directory:
            simulate(seed, directory=directory, class_name=class_name)
