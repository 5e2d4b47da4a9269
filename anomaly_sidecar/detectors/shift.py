"""Level shift after a deployment: is the level afterwards another than the series' own ups and downs explain?

In flow samples and the identity of what runs (a version or a start time as a number); out flow the shift
per series. The level before is compared with the level after a settling time. How much levels of such
windows differ without any deployment is taken from the series itself, so a series that wanders needs a
larger shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.models.history import Floats, median

BLOCK_SECONDS = 300.0
BLOCKS = 288
"""A day of blocks, for the differences without a deployment."""
BEFORE = 12
"""Blocks before the deployment: an hour."""
SETTLE = 2
"""Blocks from the deployment on that do not count: caches fill, the first requests compile."""
AFTER = 6
"""Blocks after that: half an hour."""
MIN_BEFORE = 6
FACTOR = 1.5
"""Times the largest difference without a deployment."""
MIN_RELATIVE = 0.05
"""Smallest shift as a share of the level before."""
MIN_PLACEBOS = 24
"""Comparisons without a deployment that are needed."""
KEEP_SECONDS = 6 * 3600.0
"""A verdict is published for so long."""


@dataclass(slots=True)
class Shifts:
    """State and verdicts; arrays have one row per series."""

    blocks: Floats
    """(rows, BLOCKS) means of the closed blocks, oldest first; NaN is a gap."""
    total: Floats
    count: Floats
    identity: Floats
    """(rows,) of what runs; NaN if unknown."""
    since: NDArray[np.int64]
    """(rows,) blocks closed since the latest deployment; negative without one in reach."""
    shift: Floats
    """(rows,) level after minus before; NaN without a verdict."""
    relative: Floats
    """(rows,) the same as a share of the level before."""
    at: Floats
    """(rows,) time of the verdict; NaN without."""
    judged: NDArray[np.int64]
    """(rows,) deployments that were judged."""
    index: int = -1

    @classmethod
    def empty(cls, rows: int) -> Shifts:
        """Nothing seen."""
        return cls(
            blocks=np.full((rows, BLOCKS), np.nan),
            total=np.zeros(rows),
            count=np.zeros(rows),
            identity=np.full(rows, np.nan),
            since=np.full(rows, -1, np.int64),
            shift=np.full(rows, np.nan),
            relative=np.full(rows, np.nan),
            at=np.full(rows, np.nan),
            judged=np.zeros(rows, np.int64),
        )

    def observe(self, time: float, values: Floats, identity: Floats) -> None:
        """Samples (rows,) with NaN for gaps, and what runs now; another number is a deployment."""
        index = int(time // BLOCK_SECONDS)
        if 0 <= self.index < index:
            self._close(min(index - self.index, BLOCKS), time)
        self.index = index
        deployed = ~np.isnan(identity) & ~np.isnan(self.identity) & (identity != self.identity)
        self.since[deployed] = 0
        # A new deployment ends the verdict on the one before.
        self._clear(deployed)
        self.identity = np.where(np.isnan(identity), self.identity, identity)
        there = ~np.isnan(values)
        self.total += np.where(there, values, 0.0)
        self.count += there

    def _clear(self, rows: NDArray[np.bool_]) -> None:
        for verdict in (self.shift, self.relative, self.at):
            verdict[rows] = np.nan

    def _close(self, moved: int, time: float) -> None:
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.total / self.count
        self.blocks[:, :-moved] = self.blocks[:, moved:]
        self.blocks[:, -moved:] = np.nan
        self.blocks[:, -moved] = mean
        self.total[:] = 0.0
        self.count[:] = 0.0
        self.since = np.where(self.since < 0, -1, self.since + moved)
        self._clear(time - self.at > KEEP_SECONDS)
        due = np.flatnonzero((self.since >= SETTLE + AFTER) & (self.since < BLOCKS))
        self.since[due] = -1
        if due.size:
            self._judge(due, time)

    def _judge(self, rows: NDArray[np.intp], time: float) -> None:
        blocks = self.blocks[rows]
        after = median(blocks[:, -AFTER:])
        before_blocks = blocks[:, -AFTER - SETTLE - BEFORE : -AFTER - SETTLE]
        before = median(before_blocks)
        shift = after - before
        usual, placebos = placebo(blocks[:, : -AFTER - SETTLE])
        enough = (~np.isnan(before_blocks)).sum(axis=1) >= MIN_BEFORE
        enough &= (placebos >= MIN_PLACEBOS) & ((~np.isnan(blocks[:, -AFTER:])).sum(axis=1) > AFTER // 2)
        found = enough & (np.abs(shift) > FACTOR * usual) & (np.abs(shift) > MIN_RELATIVE * np.abs(before))
        self.judged[rows] += enough
        self.shift[rows[found]] = shift[found]
        with np.errstate(divide="ignore"):
            self.relative[rows[found]] = shift[found] / np.abs(before[found])
        self.at[rows[found]] = time


def placebo(blocks: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """(rows,) largest difference that the same comparison finds in `blocks` (rows, blocks) without a
    deployment, and how many comparisons there were."""
    span = BEFORE + SETTLE + AFTER
    largest = np.zeros(len(blocks))
    count = np.zeros(len(blocks), np.int64)
    for start in range(0, blocks.shape[1] - span + 1, 3):
        before = median(blocks[:, start : start + BEFORE])
        after = median(blocks[:, start + BEFORE + SETTLE : start + span])
        difference = np.abs(after - before)
        known = ~np.isnan(difference)
        largest = np.where(known, np.maximum(largest, np.nan_to_num(difference)), largest)
        count += known
    return largest, count
