"""Which forecast is published: the one that was best of late, and never one that persistence beats.

Candidates are scored by their absolute errors when their targets have come, per series and horizon, with
forgetting; the best one is taken, and "as now" (persistence) unless another is better by a margin over the
last day and better over the last hours: a load that changes entirely takes away what was gained before. What
speaks for the last hours are this and all shorter horizons, whose targets come first. Quantiles are the
point forecast plus a margin that is moved so that its share of the values above it comes true (adaptive
conformal inference, Gibbs and Candès 2021). No assumption about the distribution of errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.models.history import DAY, Floats

PERSISTENCE = 0
HALF_LIFE = DAY
"""Seconds after which an error counts half for the choice."""
RECENT_HALF_LIFE = 4 * 3600.0
"""The same for the last hours: half of it sees a change sooner and loses a tenth of what is gained on real
loads, twice of it loses twice as much to changes."""
MARGIN = 0.01
"""Share of persistence's error by which another candidate must be better."""
LESSON = 10.0
"""What was published and lost against persistence widens that margin by so many times its loss."""
SCALE_HALF_LIFE = 0.5 * DAY
"""The same for the size of errors, the unit of margins."""
MAX_MARGIN = 20.0
"""In units of the mean absolute error. The median is the point forecast, and the others do not cross it."""
RATE = 0.1
"""How far one value moves a margin, in units of the mean absolute error."""
MIN_TARGETS = 20
"""Targets that must have come before errors are believed."""
MIN_DROPOUTS = 5
"""The same for forecasts made in a dropout, which are rare."""


@dataclass(slots=True)
class Gate:
    """State per series and horizon."""

    errors: Floats
    """(rows, horizons, states, candidates) sums of absolute errors. State 1: the latest value is a
    dropout."""
    weights: Floats
    """(rows, horizons, states) sums of the weights of those errors."""
    recent: Floats
    """(rows, horizons, candidates) sums of absolute errors over the last hours, in both states."""
    published: Floats
    """(rows, horizons, 4) sums: weight, absolute error of what was published, of persistence, of the
    value itself."""
    covered: Floats
    """(rows, horizons, quantiles) share of values at or below the quantile, with the same forgetting."""
    margins: Floats
    """(rows, horizons, quantiles) in units of `scale`."""
    scale: Floats
    """(rows, horizons) moving mean of the absolute error; NaN until the first."""
    quantiles: tuple[float, ...]
    """Ascending."""

    @classmethod
    def empty(cls, rows: int, horizons: int, candidates: int, quantiles: Sequence[float]) -> Gate:
        """No target has come yet."""
        count = len(quantiles)
        return cls(
            errors=np.zeros((rows, horizons, 2, candidates)),
            weights=np.zeros((rows, horizons, 2)),
            recent=np.zeros((rows, horizons, candidates)),
            published=np.zeros((rows, horizons, 4)),
            covered=np.zeros((rows, horizons, count)),
            margins=np.tile([_normal_margin(q) for q in quantiles], (rows, horizons, 1)),
            scale=np.full((rows, horizons), np.nan),
            quantiles=tuple(quantiles),
        )

    def learn(
        self,
        horizon: int,
        candidates: Floats,
        point: Floats,
        bounds: Floats,
        state: NDArray[np.int64],
        value: Floats,
        step: float,
    ) -> None:
        """The target of one horizon has come: `candidates` (rows, candidates), `point` (rows,) and
        `bounds` (rows, quantiles) as they were published then, `state` (rows,) of that time, `value`
        (rows,) of now."""
        there = ~np.isnan(value) & ~np.isnan(point)
        keep = 0.5 ** (there * step / HALF_LIFE)
        value = np.where(there, value, 0.0)
        # A candidate that did not speak then counts like persistence: it gains and loses nothing.
        spoken = np.where(np.isnan(candidates), candidates[:, [PERSISTENCE]], candidates)
        error = np.where(there[:, None], np.abs(spoken - value[:, None]), 0.0)
        for number in (0, 1):
            chosen = there & (state == number)
            kept = np.where(chosen, keep, 1.0)
            self.errors[:, horizon, number] *= kept[:, None]
            self.errors[:, horizon, number] += chosen[:, None] * error
            self.weights[:, horizon, number] = kept * self.weights[:, horizon, number] + chosen
        self.recent[:, horizon] *= (0.5 ** (there * step / RECENT_HALF_LIFE))[:, None]
        self.recent[:, horizon] += error
        known = np.where(there, point, 0.0)
        missed = value - known
        sums = np.stack([there * 1.0, np.abs(missed), error[:, PERSISTENCE], np.abs(value)], axis=1)
        self.published[:, horizon] = keep[:, None] * self.published[:, horizon] + there[:, None] * sums
        self._move_margins(horizon, there, missed, np.where(there[:, None], bounds, 0.0), value, step)

    def _move_margins(
        self,
        horizon: int,
        there: NDArray[np.bool_],
        missed: Floats,
        bounds: Floats,
        value: Floats,
        step: float,
    ) -> None:
        scale = self.scale[:, horizon]
        size = np.abs(missed)
        rate = np.maximum(
            1.0 - 0.5 ** (step / SCALE_HALF_LIFE), 1.0 / np.maximum(self.published[:, horizon, 0], 1.0)
        )
        moved = np.where(np.isnan(scale), size, scale + rate * (size - scale))
        self.scale[:, horizon] = np.where(there, np.maximum(moved, 1e-12), scale)
        above = value[:, None] > bounds + 1e-9 * np.abs(bounds)
        quantiles = np.array(self.quantiles)
        target = 1.0 - quantiles
        change = RATE * (above - target) * there[:, None]
        low = np.where(quantiles >= 0.5, 0.0, -MAX_MARGIN)
        high = np.where(quantiles <= 0.5, 0.0, MAX_MARGIN)
        self.margins[:, horizon] = np.clip(self.margins[:, horizon] + change, low, high)
        share = np.maximum(
            1.0 - 0.5 ** (step / HALF_LIFE), 1.0 / np.maximum(self.published[:, horizon, 0], 1.0)
        )
        covered = self.covered[:, horizon]
        self.covered[:, horizon] = covered + (there * share)[:, None] * (~above - covered)

    def choose(self, state: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows, horizons) the candidate to publish."""
        rows = np.arange(len(state))
        errors, weights = self.errors[rows, :, state], self.weights[rows, :, state]
        # What lost against persistence of late has to win by more.
        lost = np.maximum(0.0, np.nan_to_num(-self.skill(), nan=0.0))
        margin = MARGIN + np.minimum(LESSON * lost, 0.5)
        handicap = errors.copy()
        handicap[..., PERSISTENCE] *= 1.0 - margin
        handicap[self._lags() & (state == 0)[:, None, None]] = np.inf
        best = handicap.argmin(axis=2)
        needed = np.where(state == 0, MIN_TARGETS, MIN_DROPOUTS)[:, None]
        return np.where(weights >= needed, best, PERSISTENCE)

    def _lags(self) -> NDArray[np.bool_]:
        """(rows, horizons, candidates) whether persistence was better over the last hours, at this and the
        shorter horizons together, each in units of its usual error."""
        usual = self.errors[:, :, 0, PERSISTENCE] / np.maximum(self.weights[:, :, 0], 1.0)
        together = np.cumsum(self.recent / np.maximum(usual, 1e-12)[..., None], axis=1)
        lags: NDArray[np.bool_] = together > together[..., [PERSISTENCE]]
        return lags

    def bounds(self, point: Floats) -> Floats:
        """(rows, horizons, quantiles) of the point forecasts (rows, horizons), ascending over the
        quantiles."""
        raised = point[..., None] + self.margins * np.nan_to_num(self.scale, nan=0.0)[..., None]
        return np.maximum.accumulate(raised, axis=2)

    def skill(self) -> Floats:
        """(rows, horizons) 1 − error ÷ persistence's error of what was published; NaN without targets."""
        with np.errstate(invalid="ignore", divide="ignore"):
            skill: Floats = 1.0 - self.published[..., 1] / self.published[..., 2]
        return skill

    def wape(self) -> Floats:
        """(rows, horizons) sum of absolute errors ÷ sum of values; NaN without targets."""
        with np.errstate(invalid="ignore", divide="ignore"):
            share: Floats = self.published[..., 1] / self.published[..., 3]
        return share


def _normal_margin(quantile: float) -> float:
    """The margin of normally distributed errors, with which every series begins."""
    return NormalDist().inv_cdf(quantile) * math.sqrt(math.pi / 2)
