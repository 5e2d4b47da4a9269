"""What a forecast knows of the past: a ring of cells per series, moving averages, and a profile of the day.

In flow cells, one value per series and step of the grid; out flow features, which say how far other
guesses of the future (the same time yesterday, last week, the usual course of the day, averages) lie from
the latest value. All series move at once, memory is bounded by the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DAY = 86400.0
RING_DAYS = 7
AVERAGES = (0.5, 2.0, 8.0)
"""Half-lives of the moving averages, in hours."""
SMOOTH_SECONDS = 600.0
"""A slot of the day or of last week counts with its neighbours up to this far to each side: single cells are
noisy."""
PROFILE_RATE = 0.3
"""Share of the newest day in the profile: days before the last six count for a tenth."""
PROFILE_CLIP = 1.0
"""A cell moves its slot by at most this share of the scale, so that one outage does not stay for a week."""
RECENT = 9
"""Cells whose median is the level that an outlier cannot move."""
SURPRISE = 4.0
"""A cell that lies further from that median than this many usual changes is a surprise, for which there are
features apart: whether surprises stay or go is learnt by itself."""
FEATURES = 15
CLIP = 5.0
"""Largest feature, in units of the scale."""
FIT_DELAY = 3600.0
"""Seconds for which the ring remembers more than its days: a fit is about cells up to so long ago."""


def median(values: Floats) -> Floats:
    """Median of each row, gaps left out; NaN for a row of gaps."""
    ordered = np.sort(values, axis=1)  # NaN last
    count = (~np.isnan(values)).sum(axis=1)
    rows = np.arange(len(values))
    low = ordered[rows, np.maximum(count - 1, 0) // 2]
    middle: Floats = (low + ordered[rows, np.minimum(count // 2, values.shape[1] - 1)]) / 2
    return middle


@dataclass(slots=True)
class History:
    """State per series; arrays have one row per series. `step` in seconds divides a day."""

    step: float
    ring: NDArray[np.float32]
    """(rows, cells), by number of the cell modulo its length; NaN is a gap."""
    profile: Floats
    """(rows, slots of the day), NaN until seen."""
    averages: Floats
    """(rows, averages)."""
    scale: Floats
    """(rows,) moving mean of the absolute value, the unit of features."""
    change: Floats
    """(rows,) moving mean of the absolute change from cell to cell, surprises cut."""
    now: Floats
    """(rows,) latest value, kept over at most `RECENT` gaps."""
    age: NDArray[np.int64]
    """(rows,) cells since then."""
    seen: NDArray[np.int64]
    """(rows,) cells with a value."""
    index: int = -1
    """Number of the latest cell: its end is `index * step` in Unix seconds. Negative before the first."""

    @classmethod
    def empty(cls, rows: int, step: float) -> History:
        """A history of nothing."""
        day = round(DAY / step)
        cells = RING_DAYS * day + max(2 * _width(step) + RECENT, round(FIT_DELAY / step))
        nothing = np.full(rows, np.nan)
        return cls(
            step=step,
            ring=np.full((rows, cells), np.nan, np.float32),
            profile=np.full((rows, day), np.nan),
            averages=np.full((rows, len(AVERAGES)), np.nan),
            scale=nothing.copy(),
            change=nothing.copy(),
            now=nothing.copy(),
            age=np.zeros(rows, np.int64),
            seen=np.zeros(rows, np.int64),
        )

    @property
    def day(self) -> int:
        """Cells of a day."""
        return int(self.profile.shape[1])

    def latest(self, cells: int) -> Floats:
        """(rows, cells) the latest cells, oldest first."""
        numbers = np.arange(self.index - cells + 1, self.index + 1) % self.ring.shape[1]
        return self.ring[:, numbers].astype(np.float64)

    def dropout(self, cell: Floats) -> NDArray[np.bool_]:
        """(rows,) whether the next cell says nothing about the demand: nothing at all from one cell to
        the next, far below what was usual, is a failure of the measurement or of the whole service. One
        that lasts makes the median 0 and is believed."""
        dropped: NDArray[np.bool_] = (cell == 0.0) & (
            median(self.latest(RECENT)) > 2 * SURPRISE * self.change
        )
        return dropped

    def push(self, index: int, cell: Floats) -> None:
        """Take in the cell `index`, which is later than all before; cells between them become gaps."""
        length = self.ring.shape[1]
        skipped = min(index - self.index - 1, length) if self.index >= 0 else 0
        dropout = self.dropout(cell)
        before = self.now
        self.ring[:, np.arange(index - skipped, index) % length] = np.nan
        # What dropped out stays in the ring: only so can its median learn that it lasts.
        self.ring[:, index % length] = cell
        self.index = index
        there = ~np.isnan(cell) & ~dropout
        connected = there & (self.age + skipped == 0)
        self.age = np.where(there, 0, np.minimum(self.age + skipped + 1, length))
        self.now = np.where(there, cell, np.where(self.age > RECENT, np.nan, before))
        self.seen += there
        value = np.where(there, cell, 0.0)
        fresh = there & np.isnan(self.scale)
        # A moving mean that begins as a plain mean: the first cell is no better than the others.
        rate = np.maximum(1.0 / np.maximum(self.seen, 1), 1.0 - 0.5 ** (self.step / DAY))
        # A value that nobody has seen the like of counts in full when the next one is so, too.
        cut = np.minimum(np.abs(value), np.fmax(SURPRISE * self.scale, np.abs(before)))
        moved = np.maximum(self.scale + rate * (cut - self.scale), 1e-9)
        self.scale = np.where(fresh, np.maximum(np.abs(value), 1e-9), np.where(there, moved, self.scale))
        self._move_change(connected, np.abs(value - before), rate)
        for number, hours in enumerate(AVERAGES):
            average = self.averages[:, number]
            moved = average + (1.0 - 0.5 ** (self.step / (3600.0 * hours))) * (value - average)
            self.averages[:, number] = np.where(there, np.where(np.isnan(average), value, moved), average)
        slot = index % self.day
        old = self.profile[:, slot]
        bound = PROFILE_CLIP * self.scale
        moved = old + PROFILE_RATE * np.clip(value - old, -bound, bound)
        self.profile[:, slot] = np.where(there, np.where(np.isnan(old), value, moved), old)

    def _move_change(self, connected: NDArray[np.bool_], changed: Floats, rate: Floats) -> None:
        fresh = np.isnan(self.change)
        cut = np.where(fresh, changed, np.minimum(changed, SURPRISE * self.change))
        moved = np.where(fresh, cut, self.change + rate * (cut - self.change))
        self.change = np.where(connected, np.maximum(moved, 1e-9 * self.scale), self.change)

    def _smooth(self, source: NDArray[np.floating], numbers: NDArray[np.int64]) -> Floats:
        """(rows, numbers) means over each number's neighbours, gaps left out; NaN where all are gaps."""
        width = _width(self.step)
        around = (numbers[:, None] + np.arange(-width, width + 1)) % source.shape[1]
        values = source[:, around].astype(np.float64)
        there = ~np.isnan(values)
        count = there.sum(axis=2)
        total = np.where(there, values, 0.0).sum(axis=2)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def features(self, horizons: NDArray[np.int64]) -> Floats:
        """(rows, horizons, features): distances of other guesses from the latest value in units of the scale.

        0, which says "as now", where a guess is not known. `horizons` in cells, ascending, at most a day."""
        now = self.now[:, None]
        targets = self.index + horizons
        today = np.array([self.index])
        usual_now, usual = self._smooth(self.profile, today), self._smooth(self.profile, targets)
        yesterday_now = self._smooth(self.ring, today - self.day)
        yesterday = self._smooth(self.ring, targets - self.day)
        week_now = self._smooth(self.ring, today - RING_DAYS * self.day)
        week = self._smooth(self.ring, targets - RING_DAYS * self.day)
        recent = self.latest(RECENT)
        level = median(recent)[:, None]
        bound = SURPRISE * np.nan_to_num(self.change, nan=0.0)[:, None]
        off = now - level
        calm = level + np.clip(off, -bound, bound)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            ratio = np.clip(self.averages[:, :1] / usual_now, 1 / 3, 3.0)
        guesses = (
            usual - usual_now,
            usual - calm,
            usual * ratio - calm,
            yesterday - calm,
            yesterday - yesterday_now,
            week - calm,
            week - week_now,
            *(self.averages[:, [number]] - calm for number in range(len(AVERAGES))),
            level - calm,
            np.minimum(off + bound, 0.0),
            np.maximum(off - bound, 0.0),
            np.clip(now - recent[:, [-2]], -bound, bound),
            np.clip(recent[:, [-2]] - recent[:, [-3]], -bound, bound),
        )
        shape = (len(now), len(horizons))
        with np.errstate(invalid="ignore", over="ignore"):
            stacked = np.stack([np.broadcast_to(g, shape) for g in guesses], axis=2)
            stacked /= self.scale[:, None, None]
        clipped: Floats = np.clip(np.nan_to_num(stacked, nan=0.0, posinf=0.0, neginf=0.0), -CLIP, CLIP)
        return clipped


def _width(step: float) -> int:
    return max(1, round(SMOOTH_SECONDS / step))
