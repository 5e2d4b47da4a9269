"""Trend of decomposed series between two decompositions, and how strong trend and course of the day are.

In flow STL's trend of a fit and, cell by cell, what is left without the course of the day; out flows the
trend of now. STL's own is smoothed over a day and a half to both sides; here only the past is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anomaly_sidecar.models.history import DAY, Floats, History

HALF_LIFE = DAY / 3
"""Seconds after which a cell counts half for the trend: as smooth as STL's."""


@dataclass(slots=True)
class Panel:
    """State per series; NaN before the first fit."""

    trend: Floats
    """(rows,) of the latest cell, in the series' unit."""
    strength: Floats
    """(rows, 2) of trend and course of the day, 0 to 1, by the latest fit."""

    @classmethod
    def empty(cls, rows: int) -> Panel:
        """Nothing decomposed."""
        return cls(np.full(rows, np.nan), np.full((rows, 2), np.nan))

    def push(self, index: int, cell: Floats, pattern: Floats, step: float) -> None:
        """Take in the cell `index` of all rows; NaN changes nothing. `pattern` is (rows, cells of a day)."""
        adjusted = cell - pattern[:, index % pattern.shape[1]]
        moved = self.trend + (1.0 - 0.5 ** (step / HALF_LIFE)) * (adjusted - self.trend)
        self.trend = np.where(np.isnan(cell), self.trend, moved)

    def refit(self, row: int, fitted: Floats, last: int, pattern: Floats, history: History) -> None:
        """Take a new decomposition of one row: `fitted` is the trend of the cell `last` and the two
        strengths. The cells since then move it on."""
        alone = Panel(fitted[:1].copy(), fitted[None, 1:].copy())
        for number in range(max(last, history.index - history.ring.shape[1]) + 1, history.index + 1):
            cell = history.ring[[row], number % history.ring.shape[1]].astype(np.float64)
            alone.push(number, cell, pattern[None, :], history.step)
        self.trend[row], self.strength[row] = alone.trend[0], alone.strength[0]
