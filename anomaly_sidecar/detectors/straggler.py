"""Stragglers: the rank that lags behind its peers, by comparison across series of one group.

In flow values of all members (step time, SM activity, tokens per second); out flow, per series, its ratio
to the median of its peers, its place among them, and whether it has lagged for long enough. What slows
all members alike, load for example, cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.models.history import Floats

MIN_PEERS = 3
"""Members of a group with a value now; of two nobody can say which one is wrong."""


@dataclass(slots=True)
class Stragglers:
    """State and verdicts; arrays have one row per series."""

    tolerance: float
    """Share of the peers' median by which a member may lag."""
    hold: float
    """Seconds for which it must lag, and be at par, before the verdict changes: half-life of the share
    below."""
    low_is_slow: bool
    """True for rates (tokens per second), False for times (seconds per step)."""
    group: NDArray[np.int64]
    """(rows,) number of the group, -1 for a free row."""
    lagging: Floats
    """(rows,) moving share of the time in which it lagged."""
    ratio: Floats
    """(rows,) value ÷ median of the group; NaN where it cannot be told."""
    rank: Floats
    """(rows,) place in the group, 1 is the slowest; NaN likewise."""
    verdict: NDArray[np.bool_]
    """(rows,)."""
    time: float = -1.0

    @classmethod
    def empty(cls, rows: int, tolerance: float, hold: float, low_is_slow: bool) -> Stragglers:
        """Nothing seen."""
        return cls(
            tolerance,
            hold,
            low_is_slow,
            group=np.full(rows, -1, np.int64),
            lagging=np.zeros(rows),
            ratio=np.full(rows, np.nan),
            rank=np.full(rows, np.nan),
            verdict=np.zeros(rows, np.bool_),
        )

    def observe(self, time: float, values: Floats) -> None:
        """Samples (rows,) of one time, NaN for gaps: a gap is no lag and keeps what was known."""
        passed = min(time - self.time, self.hold) if self.time >= 0 else 0.0
        self.time = time
        self.ratio, self.rank = compare(values, self.group, self.low_is_slow)
        known = ~np.isnan(self.ratio)
        with np.errstate(invalid="ignore"):
            bound = 1.0 - self.tolerance if self.low_is_slow else 1.0 + self.tolerance
            lags = self.ratio < bound if self.low_is_slow else self.ratio > bound
        rate = 1.0 - 0.5 ** (passed / self.hold)
        self.lagging = np.where(known, self.lagging + rate * (lags - self.lagging), self.lagging)
        self.verdict = np.where(self.verdict, self.lagging > 0.25, self.lagging > 0.75) & (self.group >= 0)


def compare(values: Floats, group: NDArray[np.int64], low_is_slow: bool) -> tuple[Floats, Floats]:
    """(rows,) ratio to the median of the group and place in it, 1 for the slowest. NaN for gaps, for
    groups with fewer than `MIN_PEERS` values, and the ratio where the median is 0."""
    ratio, rank = np.full(len(values), np.nan), np.full(len(values), np.nan)
    known = np.flatnonzero(~np.isnan(values) & (group >= 0))
    if not known.size:
        return ratio, rank
    order = known[np.lexsort((values[known] if low_is_slow else -values[known], group[known]))]
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    low, high = order[starts + (sizes - 1) // 2], order[starts + sizes // 2]
    middle = np.repeat((values[low] + values[high]) / 2, sizes)
    many = np.repeat(sizes >= MIN_PEERS, sizes)
    rank[order] = np.where(many, np.arange(len(order)) - np.repeat(starts, sizes) + 1.0, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio[order] = np.where(many & (middle != 0.0), values[order] / middle, np.nan)
    return ratio, rank
