"""Silent failure and stranded memory: alive but producing nothing, and memory that nobody works with.

Both count how long a condition has held for each series. A gap neither starts nor breaks one; a gap
longer than the condition needs ends it, because nobody knows what was in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.models.history import Floats


@dataclass(slots=True)
class Held:
    """Since when a condition holds; arrays have one row per series."""

    needed: float
    """Seconds that it must hold for a verdict."""
    since: Floats
    """(rows,) time of its first sample; NaN while it does not hold."""
    last: Floats
    """(rows,) time of the latest sample that could be judged."""

    @classmethod
    def empty(cls, rows: int, needed: float) -> Held:
        """It holds nowhere."""
        return cls(needed, np.full(rows, np.nan), np.full(rows, np.nan))

    def observe(self, time: float, holds: NDArray[np.bool_], known: NDArray[np.bool_]) -> None:
        """Whether it holds now (rows,), where that is known."""
        lost = time - self.last > self.needed
        self.since[lost | (known & ~holds)] = np.nan
        begins = known & holds & np.isnan(self.since)
        self.since[begins] = time
        self.last[known] = time

    def seconds(self, time: float) -> Floats:
        """(rows,) for how long it has held, 0 where it does not; NaN where the latest sample is too old."""
        held = np.where(np.isnan(self.since), 0.0, self.last - self.since)
        return np.where(time - self.last <= self.needed, held, np.nan)

    def verdict(self, time: float) -> NDArray[np.bool_]:
        """(rows,) whether it has held for long enough."""
        return np.nan_to_num(self.seconds(time), nan=-1.0) >= self.needed


def silent(alive: Floats, demand: Floats, produced: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(rows,) whether an engine that is `alive` (1) with `demand` (requests running and waiting) has
    `produced` (tokens per second, prompt and output) nothing, and whether that is known."""
    known = ~np.isnan(alive) & ~np.isnan(demand) & ~np.isnan(produced)
    return (alive > 0) & (demand > 0) & (produced <= 0), known


def stranded(
    used: Floats, busy: Floats, demand: Floats | None, minimum: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(rows,) whether at least `minimum` bytes are `used` while the GPU is not `busy` (ratio) and there is no
    `demand` where that is told, and whether that is known."""
    known = ~np.isnan(used) & ~np.isnan(busy)
    holds = (used >= minimum) & (busy <= 0.0)
    if demand is not None:
        holds &= ~(demand > 0)
    return holds, known
