"""Each caller has its own bucket; calls in flight are bounded over all callers."""

import pytest

from sidecar.domain.ids import WorkloadId
from sidecar.errors import Exhausted
from sidecar.gateway.ratelimit import RateLimiter

ONE, OTHER = WorkloadId("workload:one"), WorkloadId("workload:other")


@pytest.fixture
def now() -> list[float]:
    """The time, in the test's hand."""
    return [1000.0]


def _limiter(now: list[float], *, calls_per_second: float, concurrent_calls: int = 100) -> RateLimiter:
    return RateLimiter(calls_per_second=calls_per_second, concurrent_calls=concurrent_calls, now=lambda: now[0])


def _calls(limiter: RateLimiter, workload: WorkloadId, count: int) -> int:
    """How many of `count` calls, one after the other, are let in."""
    let_in = 0
    for _ in range(count):
        try:
            limiter.enter(workload)
        except Exhausted:
            continue
        limiter.leave()
        let_in += 1
    return let_in


def test_burst_then_rate(now: list[float]) -> None:
    """A second's worth at once; then as many as the time since has earned, and never more than a second's worth."""
    limiter = _limiter(now, calls_per_second=10, concurrent_calls=100)

    assert _calls(limiter, ONE, 30) == 10
    now[0] += 0.35
    assert _calls(limiter, ONE, 30) == 3
    now[0] += 3600
    assert _calls(limiter, ONE, 30) == 10


def test_others_are_not_touched(now: list[float]) -> None:
    """What one caller uses up is not taken from another."""
    limiter = _limiter(now, calls_per_second=10, concurrent_calls=100)
    _calls(limiter, ONE, 1000)

    assert _calls(limiter, OTHER, 10) == 10


def test_wait_that_is_told_is_enough(now: list[float]) -> None:
    """Who waits as long as the refusal says is let in, with less than a call a second, too."""
    limiter = _limiter(now, calls_per_second=0.5, concurrent_calls=100)
    assert _calls(limiter, ONE, 10) == 1
    with pytest.raises(Exhausted) as first:
        limiter.enter(ONE)
    now[0] += first.value.retry_after_seconds + 0.001

    limiter.enter(ONE)


def test_calls_in_flight(now: list[float]) -> None:
    """A call more than the bound is refused; one that leaves makes room for one."""
    limiter = _limiter(now, calls_per_second=1000, concurrent_calls=2)
    limiter.enter(ONE)
    limiter.enter(OTHER)
    with pytest.raises(Exhausted):
        limiter.enter(ONE)
    limiter.leave()

    limiter.enter(OTHER)
    with pytest.raises(Exhausted):
        limiter.enter(ONE)


def test_memory_is_bounded(now: list[float]) -> None:
    """Ten thousand names leave no more than the bound behind, and the newest keep their state."""
    limiter = _limiter(now, calls_per_second=1, concurrent_calls=10)
    for number in range(10_000):
        _calls(limiter, WorkloadId(f"workload:{number}"), 1)

    assert len(limiter._buckets) == 4096
    assert _calls(limiter, WorkloadId("workload:9999"), 1) == 0
