"""fi_P2, fi_L1, fi_L2: SIGKILL, ENOSPC and EIO at every system call that writes, of the store's writer and of the loop that
speaks to the bank. Judged as every kill is (`sweeps.Place.judge`)."""

from collections.abc import Callable, Sequence

import pytest

from tests.faults.extent import everything, sample, seed
from tests.faults.scenarios import SCENARIOS, A
from tests.faults.sweeps import Harness
from tests.faults.tracing import LOOP_CALLS, WRITER_CALLS, Call, why_not

Record = Callable[[str, object], None]
NAMES = ("payment, class A", "payment, class C, answer lost, flagged", "consent completion", "refresh", "revocation")
THREADS = {"writer": WRITER_CALLS, "loop": LOOP_CALLS}
# What a full disk and a failing one answer, and to which calls.
ERRORS = {"ENOSPC": ("pwrite64", "ftruncate"), "EIO": ("pwrite64", "fdatasync", "fsync", "ftruncate")}

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


def _calls(harness: Harness, name: str, thread: str, of: Sequence[str]) -> list[Call]:
    """What the thread calls in a run without a fault."""
    place = harness.place(name, "no fault")
    _, tracer = place.act_traced(thread, of)
    place.recover(number=0)
    place.judge()
    found = tracer.calls()
    harness.done(place)
    return found


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_a_system_call(harness: Harness, name: str, thread: str, record_property: Record) -> None:
    """fi_P2, fi_L1: the process does not live through the n-th of its calls."""
    calls = _calls(harness, name, thread, THREADS[thread])
    chosen = sample(calls, 3, of=f"kill {name} {thread}")
    killed = 0
    for number, call in enumerate(chosen):
        place = harness.place(name, f"killed at {call} of the {thread} (seed {seed()})")
        ended, _ = place.act_traced(thread, [call.name], f"{call.name}:signal=KILL:when={call.number}")
        killed += ended.killed
        place.recover(number=number)
        place.judge()
        harness.done(place)

    record_property("injected", killed)
    assert len(calls) >= (15 if thread == "writer" else 8)
    # What the timing of a run decides, such as a wake-up, is not in each of them.
    assert killed >= len(chosen) * (0.9 if everything() else 0.5)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", NAMES)
def test_an_error_at_a_system_call(harness: Harness, name: str, error: str, record_property: Record) -> None:
    """fi_L2: once, and the call is repeated with the same request id: it is answered, and nothing is doubled or lost."""
    calls = _calls(harness, name, "writer", ERRORS[error])
    struck = 0
    for number, call in enumerate(sample(calls, 3, of=f"{error} {name}")):
        place = harness.place(name, f"{error} at {call} (seed {seed()})")
        ended, tracer = place.act_traced("writer", [call.name], f"{call.name}:error={error}:when={call.number}")
        struck += tracer.injected()
        place.recover(number=number)
        place.judge()
        assert ended.all("told"), f"{place.story}: {ended.said}"
        if name == "payment, class A":  # the bank's answer is written when the store can: nobody has to ask again
            assert place.bank.count("initiate") == 1, place.story
        harness.done(place)

    record_property("injected", struck)
    assert struck > 0


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_that_stays(harness: Harness, error: str, record_property: Record) -> None:
    """fi_L2, fi_U1: from the n-th call on the disk takes nothing more, until the process is killed; the next one has space."""
    name = "payment, class A"
    calls = _calls(harness, name, "writer", ERRORS[error])
    struck = 0
    for number, call in enumerate(sample(calls, 3, of=f"{error} stays")):
        place = harness.place(name, f"{error} from {call} on (seed {seed()})")
        injected = [f"{other}:error={error}:when={_first(calls, call, other)}+" for other in ERRORS[error]]
        _, tracer = place.act_traced("writer", ERRORS[error], *injected, kill_after_seconds=0.5)
        struck += tracer.injected()
        place.recover(number=number)
        place.judge()
        harness.done(place)

    record_property("injected", struck)
    assert struck > 0
    assert SCENARIOS[name].descriptor == A


def _first(calls: Sequence[Call], since: Call, name: str) -> int:
    """The number of the first call of `name` at or after `since`."""
    before = calls[: calls.index(since)]
    return 1 + sum(call.name == name for call in before)


def test_the_whole_run_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test-faults` takes every call, not a sample."""
    monkeypatch.setenv("FAULTS", "all")

    assert everything()
    assert sample(range(500), 3, of="x") == list(range(500))
