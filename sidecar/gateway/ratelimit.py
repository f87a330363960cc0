"""Per caller, so that one workload cannot use up what belongs to all: a token bucket each, and one bound on calls in flight."""

import time
from collections import OrderedDict
from collections.abc import Callable

from sidecar.domain.ids import WorkloadId
from sidecar.errors import Exhausted

__all__ = ["RateLimiter"]

_CALLERS = 4096


class RateLimiter:
    """`calls_per_second` is also the burst, which is one call at least; `concurrent_calls` counts over all callers."""

    def __init__(
        self, *, calls_per_second: float, concurrent_calls: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = calls_per_second
        self._burst = max(calls_per_second, 1.0)
        self._now = now
        self._concurrent_calls = concurrent_calls
        self._buckets: OrderedDict[WorkloadId, tuple[float, float]] = OrderedDict()
        self._in_flight = 0

    def enter(self, workload: WorkloadId) -> None:
        """Counts a call in. Raises Exhausted; a call that was let in must `leave`."""
        if self._in_flight >= self._concurrent_calls:
            raise Exhausted("RATE_LIMITED", "too many calls are in flight; try again", retry_after_seconds=0.1)
        now = self._now()
        tokens, since = self._buckets.pop(workload, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._rate)
        self._buckets[workload] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > _CALLERS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            wait = (1 - tokens) / self._rate
            raise Exhausted("RATE_LIMITED", "this workload calls too often; try again", retry_after_seconds=wait)
        self._in_flight += 1

    def leave(self) -> None:
        self._in_flight -= 1
