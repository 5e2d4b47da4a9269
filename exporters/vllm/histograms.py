"""A histogram that grows: what requests and steps are observed in until it is published."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.samples import Exemplar

from gpuglass.exemplar import newer
from gpuglass.family import Family, Histogram


class Observed:
    """Counts by bucket, their sum, and the newest exemplar of each bucket."""

    __slots__ = ("bounds", "counts", "exemplars", "sum")

    def __init__(self, family: Family) -> None:
        self.bounds = family.buckets
        self.counts = [0] * (len(family.buckets) + 1)
        self.sum = 0.0
        self.exemplars: dict[int, Exemplar] = {}

    def observe(self, value: float, exemplar: Exemplar | None = None) -> None:
        """One observation, in the unit of the family."""
        # A value that equals a bound belongs below it: `le` is less or equal.
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
        if exemplar is not None:
            self.exemplify(value, exemplar)

    def exemplify(self, value: float, exemplar: Exemplar) -> None:
        """Name one of the observations that were made, `value`."""
        index = bisect_left(self.bounds, value)
        kept = newer(self.exemplars.get(index), exemplar)
        if kept is not None:
            self.exemplars[index] = kept

    def add(self, counts: Sequence[int], total: float) -> None:
        """Observations that come as counts by bucket (none: nothing) and the sum of their values.

        Raises ValueError for another number of buckets; then nothing is taken.
        """
        if not counts:
            return
        if len(counts) != len(self.counts):
            raise ValueError(f"{len(counts)} buckets instead of {len(self.counts)}")
        for index, count in enumerate(counts):
            self.counts[index] += count
        self.sum += total

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self.counts)

    def published(self) -> Histogram:
        """As the catalog takes it. Sums are rounded to what a nanosecond clock and whole tokens can know."""
        return Histogram(self.counts, round(self.sum, 9), self.exemplars)
