"""What is exported of single allocations: failures and sizes, with the newest exemplar of each series.

In flow joined events with the labels of their process; out flow counters and histograms. Series are
bounded: beyond the limit a process is called `other`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client.samples import Exemplar

from ebpf.verdict.events import Joined, Link
from gpuglass import exemplar as exemplars
from gpuglass.exemplar import ExemplarPolicy, Names
from gpuglass.families import cuda as families
from gpuglass.family import Batch, Histogram

MAX_SERIES = 512
MAX_FUNCTIONS = 64
CODES: Mapping[int, str] = {
    1: "invalid_value",
    2: "out_of_memory",
    3: "not_initialized",
    4: "deinitialized",
    201: "invalid_context",
    304: "operating_system",
    700: "illegal_address",
    719: "launch_failed",
    800: "not_permitted",
    801: "not_supported",
    999: "unknown",
}
"""Names of CUresult values that calls for memory give (cuda.h)."""
_T = TypeVar("_T")
Owner = tuple[str, str, str, str, str]
"""Workload, process, GPU."""
_OTHER: Owner = ("", "", "", "other", "")


@dataclass(slots=True)
class _Failures:
    count: int = 0
    exemplar: Exemplar | None = None


@dataclass(slots=True)
class _Sizes:
    counts: list[int] = field(default_factory=lambda: [0] * (len(families.EVENT_BYTES.buckets) + 1))
    total: float = 0.0
    exemplars: dict[int, Exemplar] = field(default_factory=dict)


class EventAccount:
    """Totals since the agent started."""

    def __init__(self) -> None:
        self.links: Counter[Link] = Counter()
        self._failures: dict[tuple[Owner, str, str], _Failures] = {}
        self._sizes: dict[tuple[Owner, str, str], _Sizes] = {}
        self._functions: set[str] = set()

    def add(self, joined: Joined, owner: Owner, policy: ExemplarPolicy, unix: float) -> None:
        """One allocation; `unix` is when it returned, in Unix time."""
        event, step = joined.event, joined.step
        self.links[joined.link] += 1
        names: Names = []
        if step is not None:
            request, *others = policy.names(step.request) or [("request_id", step.request.request_id)]
            names = [request, ("link", joined.link.value), *others]
        labels = exemplars.fit(names)
        sizes = self._of(self._sizes, owner, event.kind, event.reason, _Sizes)
        index = bisect_left(families.EVENT_BYTES.buckets, event.bytes)
        sizes.counts[index] += 1
        sizes.total += event.bytes
        found = exemplars.exemplar(labels, float(event.bytes), unix)
        kept = exemplars.newer(sizes.exemplars.get(index), found)
        if kept is not None:
            sizes.exemplars[index] = kept
        if event.code:
            failures = self._of(
                self._failures, owner, self._function(event.function), code_name(event.code), _Failures
            )
            failures.count += 1
            failures.exemplar = exemplars.newer(failures.exemplar, exemplars.exemplar(labels, 1.0, unix))

    def fill(self, batch: Batch) -> None:
        """Samples of all families of events."""
        for (owner, function, code), failures in self._failures.items():
            batch.add(
                families.EVENT_FAILURES, failures.count, *owner, function, code, exemplar=failures.exemplar
            )
        for (owner, kind, reason), sizes in self._sizes.items():
            histogram = Histogram(sizes.counts, sizes.total, sizes.exemplars)
            batch.add_histogram(families.EVENT_BYTES, histogram, *owner, kind, reason)
        for link in Link:
            batch.add(families.EVENT_LINKS, self.links[link], link.value)

    def _function(self, name: str) -> str:
        if name in self._functions or len(self._functions) < MAX_FUNCTIONS:
            self._functions.add(name)
            return name
        return "other"

    @staticmethod
    def _of(
        series: dict[tuple[Owner, str, str], _T], owner: Owner, one: str, other: str, new: type[_T]
    ) -> _T:
        key = (owner, one, other)
        if key not in series and len(series) >= MAX_SERIES:
            key = (_OTHER, one, other)
        found = series.get(key)
        if found is None:
            found = series[key] = new()
        return found


def code_name(code: int) -> str:
    """A CUresult as a label."""
    return CODES.get(code, "other")
