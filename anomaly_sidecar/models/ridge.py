"""Direct regression: how far the value moves until a horizon, from the distances of other guesses.

One weighted ridge regression per series and horizon with forgetting. The weights start at, and are drawn
to, 0: that is "as now". Sums are updated with each cell, weights are solved for now and then, so the work
per cell is bounded. Large errors count less, which brings it close to the smallest absolute error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anomaly_sidecar.models.history import DAY, Floats

HALF_LIFE = 7 * DAY
"""Seconds after which what was learnt counts half."""
RIDGE = 0.02
NEAR = 0.02
"""Errors below this share of the scale count alike."""


@dataclass(slots=True)
class Ridge:
    """Sums and weights per series and horizon."""

    squares: Floats
    """(rows, horizons, features, features)."""
    products: Floats
    """(rows, horizons, features)."""
    weights: Floats
    """(rows, horizons, features)."""

    @classmethod
    def empty(cls, rows: int, horizons: int, features: int) -> Ridge:
        """Nothing learnt: every weight is 0."""
        return cls(
            np.zeros((rows, horizons, features, features)),
            np.zeros((rows, horizons, features)),
            np.zeros((rows, horizons, features)),
        )

    def learn(self, horizon: int, features: Floats, moved: Floats, step: float) -> None:
        """One more observation per row: `features` (rows, features) and how far the value `moved`
        (rows,), both in units of the scale; NaN teaches nothing."""
        there = ~np.isnan(moved)
        moved = np.where(there, moved, 0.0)
        error = np.abs(moved - (features * self.weights[:, horizon]).sum(axis=1))
        weight = there * NEAR / np.maximum(error, NEAR)
        keep = 0.5 ** (there * step / HALF_LIFE)
        self.squares[:, horizon] *= keep[:, None, None]
        self.products[:, horizon] *= keep[:, None]
        weighted = features * weight[:, None]
        self.squares[:, horizon] += weighted[:, :, None] * features[:, None, :]
        self.products[:, horizon] += weighted * moved[:, None]

    def solve(self) -> None:
        """Bring the weights up to date with the sums."""
        eye = RIDGE * np.eye(self.squares.shape[-1])
        self.weights = np.asarray(
            np.linalg.solve(self.squares + eye, self.products[..., None])[..., 0], np.float64
        )

    def predict(self, features: Floats) -> Floats:
        """(rows, horizons) expected moves in units of the scale, from `features` (rows, horizons,
        features)."""
        moves: Floats = (features * self.weights).sum(axis=2)
        return moves
