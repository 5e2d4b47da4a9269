"""Decides which requests are kept. In: requests that have ended. Out: a decision for each, at once or, for
the slowest of a minute, when the minute is over.

A caller's word is final: sampled is kept, not sampled is not, unless the configuration says otherwise. All
others are kept by ratio, or by the tail rules within their budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

from gpuglass.config import TailConfig, TracesConfig
from gpuglass.record_hub import EndedRequest
from otel_bridge.identity import Identity
from otel_bridge.model import Decision

MINUTE_NS = 60_000_000_000

T = TypeVar("T")


def by_tail(request: EndedRequest, tail: TailConfig) -> Decision | None:
    """The tail rule that wants a request, if any does; the slowest ones are found otherwise."""
    if tail.failed and request.outcome in ("error", "rejected"):
        return Decision.FAILED
    if tail.aborted and request.outcome == "abort":
        return Decision.ABORTED
    if tail.preempted and request.preemptions:
        return Decision.PREEMPTED
    return None


class Sampler(Generic[T]):
    """Budget and slowest requests of the current minute. `T` is what the caller keeps of a request."""

    def __init__(self, config: TracesConfig) -> None:
        self.config = config
        self._spent = 0
        self._minute_ends = 0
        self._slowest: list[tuple[int, int, T]] = []
        """A heap, the fastest of them first."""
        self._number = 0

    def decide(self, request: EndedRequest, identity: Identity, item: T) -> Decision | tuple[T | None]:
        """The decision on a request, or, where it waits to be among the slowest, the item that had to give
        way."""
        if not request.caller_known:
            return Decision.UNKNOWN
        if identity.follows_caller:
            return Decision.CALLER
        if identity.caller is not None and not self.config.ignore_unsampled:
            return Decision.UNSAMPLED
        if identity.is_in_ratio(self.config.ratio):
            return Decision.RATIO
        wanted = by_tail(request, self.config.tail)
        if wanted is not None:
            return wanted if self._spend() else Decision.BUDGET
        if not self.config.tail.slowest or self.config.tail.per_minute <= self._spent:
            return Decision.UNSAMPLED
        self._number += 1
        entry = (request.end_ns - request.begin_ns, self._number, item)
        if len(self._slowest) < self.config.tail.slowest:
            heapq.heappush(self._slowest, entry)
            return (None,)
        return (heapq.heappushpop(self._slowest, entry)[2],)

    def _spend(self) -> bool:
        if self._spent >= self.config.tail.per_minute:
            return False
        self._spent += 1
        return True

    def minute(self, now_ns: int, over: bool = False) -> Iterator[tuple[T, Decision]]:
        """To be called now and then: when a minute is over (or `over`), its slowest with their decision."""
        if now_ns < self._minute_ends and not over:
            return
        waiting, self._slowest = sorted(self._slowest, reverse=True), []
        found = [(item, Decision.SLOWEST if self._spend() else Decision.BUDGET) for _, _, item in waiting]
        self._minute_ends = now_ns + MINUTE_NS
        self._spent = 0
        yield from found
