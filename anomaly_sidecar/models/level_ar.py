"""The fitted model between two fits: a level that wanders and an autoregressive part, moved by Kalman's
equations.

In flow parameters of a fit (`models.seasonal`) and cells, out flow expected values at the horizons. All
series move at once in a fixed number of operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.models.history import Floats, History

_DIFFUSE = 1e3
"""Variance of a level that is not known, in units of the series' own variances."""


@dataclass(slots=True)
class LevelAr:
    """State per series. Not fitted rows have NaN parameters and expect nothing."""

    pattern: Floats
    """(rows, slots of the day) distance of the course of the day from the level."""
    parameters: Floats
    """(rows, 3) variance of the level's steps, variance and coefficient of the autoregressive part."""
    mean: Floats
    """(rows, 2) level and autoregressive part."""
    covariance: Floats
    """(rows, 3) variance of the level, covariance, variance of the autoregressive part."""

    @classmethod
    def empty(cls, rows: int, day: int) -> LevelAr:
        """Nothing fitted."""
        return cls(
            np.zeros((rows, day)), np.full((rows, 3), np.nan), np.zeros((rows, 2)), np.zeros((rows, 3))
        )

    def push(self, index: int, cell: Floats) -> None:
        """Take in the cell `index`; NaN moves the state on without an observation."""
        level_variance, ar_variance, phi = self.parameters.T
        level, ar = self.mean[:, 0], phi * self.mean[:, 1]
        p = self.covariance[:, 0] + level_variance
        c = phi * self.covariance[:, 1]
        r = phi * phi * self.covariance[:, 2] + ar_variance
        total = np.maximum(p + 2 * c + r, 1e-300)
        there = ~np.isnan(cell)
        innovation = np.where(there, cell, 0.0) - self.pattern[:, index % self.pattern.shape[1]] - level - ar
        gain_level = there * (p + c) / total
        gain_ar = there * (c + r) / total
        self.mean = np.stack([level + gain_level * innovation, ar + gain_ar * innovation], axis=1)
        self.covariance = np.stack(
            [p - gain_level * (p + c), c - gain_level * (c + r), r - gain_ar * (c + r)], axis=1
        )

    def expect(self, index: int, horizons: NDArray[np.int64]) -> Floats:
        """(rows, horizons) expected values so many cells after `index`; NaN where nothing is fitted."""
        pattern = self.pattern[:, (index + horizons) % self.pattern.shape[1]]
        phi = self.parameters[:, 2:]
        return pattern + self.mean[:, :1] + self.mean[:, 1:] * phi**horizons

    def refit(self, row: int, pattern: Floats, parameters: Floats, history: History) -> None:
        """Take a new fit of one row and bring its state up to the present with the last day's cells."""
        day = self.pattern.shape[1]
        alone = LevelAr(
            pattern[None, :].copy(), parameters[None, :].copy(), np.zeros((1, 2)), np.zeros((1, 3))
        )
        numbers = np.arange(history.index - day + 1, history.index + 1)
        cells = history.ring[row, numbers % history.ring.shape[1]].astype(np.float64)
        cells[cells == 0.0] = np.nan
        alone.mean[0, 0] = (
            np.nan_to_num(np.nanmedian(cells - pattern[numbers % day])) if (~np.isnan(cells)).any() else 0.0
        )
        alone.covariance[0] = _DIFFUSE * parameters[0] + parameters[1], 0.0, _DIFFUSE * parameters[1]
        for number, cell in zip(numbers, cells, strict=True):
            alone.push(int(number), np.array([cell]))
        self.pattern[row], self.parameters[row] = pattern, parameters
        self.mean[row], self.covariance[row] = alone.mean[0], alone.covariance[0]
