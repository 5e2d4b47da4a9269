"""Forecasts of many series at once on a grid of cells: persistence, regression and fitted model behind a
gate.

In flow cells (means of a query over one step of the grid), out flow point forecasts and quantiles per
horizon, and how good they were of late. Nothing here reads a clock or waits for anything: fits come in
from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.models.gate import Gate
from anomaly_sidecar.models.history import DAY, FEATURES, Floats, History
from anomaly_sidecar.models.level_ar import LevelAr
from anomaly_sidecar.models.ridge import Ridge

CANDIDATES = ("persistence", "regression_half", "regression", "model", "mean")
SOLVE_SECONDS = 3600.0
"""Weights of the regression are solved anew this often."""


@dataclass(slots=True)
class Forecaster:
    """All state of the forecasts of `rows` series."""

    step: float
    cells_ahead: tuple[int, ...]
    """Horizons in cells, ascending."""
    nonnegative: bool
    history: History
    ridge: Ridge
    model: LevelAr
    gate: Gate
    features: NDArray[np.float32]
    """(rows, pending, FEATURES): features behind each forecast whose target has not come. Each horizon
    has as many places as it has cells, used in turn."""
    pending: Floats
    """(rows, pending, candidates + point + quantiles + base + scale)."""
    states: NDArray[np.int64]
    """(rows, pending)."""
    point: Floats = field(default_factory=lambda: np.empty((0, 0)))
    """(rows, horizons) of now."""
    bounds: Floats = field(default_factory=lambda: np.empty((0, 0, 0)))
    """(rows, horizons, quantiles) of now."""
    chosen: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 0), np.int64))
    """(rows, horizons) number of the candidate."""

    @property
    def horizons(self) -> NDArray[np.int64]:
        """(horizons,) in cells, ascending."""
        return np.array(self.cells_ahead, np.int64)

    @classmethod
    def empty(
        cls, rows: int, step: float, horizons: Sequence[int], quantiles: Sequence[float], nonnegative: bool
    ) -> Forecaster:
        """`step` in seconds divides a day; `horizons` in cells, ascending, at most a day; `quantiles`
        ascending."""
        cells = np.asarray(horizons, np.int64)
        count, places = len(cells), int(cells.sum())
        width = len(CANDIDATES) + 1 + len(quantiles) + 2
        return cls(
            step=step,
            cells_ahead=tuple(horizons),
            nonnegative=nonnegative,
            history=History.empty(rows, step),
            ridge=Ridge.empty(rows, count, FEATURES),
            model=LevelAr.empty(rows, round(DAY / step)),
            gate=Gate.empty(rows, count, len(CANDIDATES), quantiles),
            features=np.zeros((rows, places, FEATURES), np.float32),
            pending=np.full((rows, places, width), np.nan),
            states=np.zeros((rows, places), np.int64),
            point=np.full((rows, count), np.nan),
            bounds=np.full((rows, count, len(quantiles)), np.nan),
            chosen=np.zeros((rows, count), np.int64),
        )

    def push(self, index: int, cell: Floats) -> None:
        """Take in the mean (rows,) of the cell `index`, whose end is `index * step`; NaN is a gap."""
        dropout = self.history.dropout(cell)
        self._skip(index)
        self._learn(index, cell, dropout)
        self.model.push(index, np.where(dropout, np.nan, cell))
        self.history.push(index, cell)
        if index % max(1, round(SOLVE_SECONDS / self.step)) == 0:
            self.ridge.solve()
        self._forecast(index, dropout)

    def _skip(self, index: int) -> None:
        """Cells that never came: their places hold forecasts whose targets are unknown."""
        last = self.history.index
        if last < 0:
            return
        for number in range(max(last + 1, index - int(self.horizons[-1])), index):
            self.pending[:, self._places(number)] = np.nan
        nothing = np.full(len(self.point), np.nan)
        for number in range(max(last + 1, index - self.history.day), index):
            self.model.push(number, nothing)

    def _places(self, index: int) -> NDArray[np.int64]:
        """(horizons,) place of each horizon's forecast that was made for, or is made at, cell `index`."""
        return np.cumsum(self.horizons) - self.horizons + index % self.horizons

    def _learn(self, index: int, cell: Floats, dropout: NDArray[np.bool_]) -> None:
        count, quantiles = len(CANDIDATES), len(self.gate.quantiles)
        believed = np.where(dropout, np.nan, cell)
        for horizon, place in enumerate(self._places(index)):
            then = self.pending[:, place]
            base, scale = then[:, -2], then[:, -1]
            self.ridge.learn(
                horizon, self.features[:, place].astype(np.float64), (believed - base) / scale, self.step
            )
            bounds = then[:, count + 1 : count + 1 + quantiles]
            self.gate.learn(
                horizon, then[:, :count], then[:, count], bounds, self.states[:, place], cell, self.step
            )

    def _forecast(self, index: int, dropout: NDArray[np.bool_]) -> None:
        history = self.history
        features = history.features(self.horizons)
        now = history.now[:, None]
        moves = self.ridge.predict(features) * history.scale[:, None]
        stays = np.where(dropout[:, None], 0.0, now) + 0.0 * moves
        regression = self._clip(now + moves)
        model = self._clip(self.model.expect(index, self.horizons)) + 0.0 * now
        half = self._clip(now + moves / 2)
        candidates = np.stack([stays, half, regression, model, (regression + model) / 2], axis=2)
        candidates = np.where(np.isnan(candidates), stays[..., None], candidates)
        state = dropout.astype(np.int64)
        self.chosen = self.gate.choose(state)
        self.point = np.take_along_axis(candidates, self.chosen[..., None], axis=2)[..., 0]
        self.bounds = self._clip(self.gate.bounds(self.point))
        places = self._places(index)
        base = np.where(history.age == 0, history.now, np.nan)
        self.features[:, places] = features
        self.states[:, places] = state[:, None]
        shape = (*self.point.shape, 1)
        self.pending[:, places] = np.concatenate(
            [
                candidates,
                self.point[..., None],
                self.bounds,
                np.broadcast_to(base[:, None, None], shape),
                np.broadcast_to(history.scale[:, None, None], shape),
            ],
            axis=2,
        )

    def _clip(self, values: Floats) -> Floats:
        return np.maximum(values, 0.0) if self.nonnegative else values
