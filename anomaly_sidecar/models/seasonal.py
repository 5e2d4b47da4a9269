"""Decomposition and forecast model of single series with statsmodels, and their steps between two fits.

`decompose` splits a series into trend, course of the day and remainder (STL, Cleveland et al. 1990, with
jumps: 30 times faster at 288 cells a day and as good). `fit` is the job that a worker runs: it decomposes,
and fits a level with an autoregressive part (unobserved components) to what is left without the course of
the day. What comes back are a few numbers per series, never a results object. `models.panel` and
`models.level_ar` move on from them, all series at once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from statsmodels.tsa.seasonal import STL
from statsmodels.tsa.statespace.structural import UnobservedComponents

from anomaly_sidecar.interface import State
from anomaly_sidecar.models.history import Floats

JUMP = 0.15
"""Share of the period after which STL calculates anew; it interpolates between."""
MIN_CYCLES = 2
"""Periods that a decomposition needs."""
MAX_GAPS = 0.5
"""A series with a larger share of gaps is not decomposed."""
MAX_ITERATIONS = 50
FIT_CELLS = 600
"""Latest cells from which the three parameters are estimated: more cost time and change little."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """Parts of one series, each (cells,); they add up to the series, whose gaps are filled by straight
    lines."""

    trend: Floats
    seasonal: Floats
    remainder: Floats


def filled(values: Floats) -> Floats | None:
    """Gaps replaced by straight lines between their neighbours; None with too many of them.

    STL answers a single NaN with nothing but NaN, and says no word."""
    there = ~np.isnan(values)
    if there.mean() < 1.0 - MAX_GAPS:
        return None
    places = np.arange(len(values))
    return np.interp(places, places[there], values[there])


def decompose(values: Floats, period: int) -> Decomposition | None:
    """Split `values` (cells,), oldest first, with `period` cells in a cycle; None if there are too few."""
    if len(values) < MIN_CYCLES * period or period < 4:
        return None
    whole = filled(values)
    if whole is None:
        return None
    jump = max(1, round(JUMP * period))
    result = STL(whole, period=period, robust=True, trend_jump=jump, low_pass_jump=jump).fit()
    return Decomposition(
        *(np.asarray(part, np.float64) for part in (result.trend, result.seasonal, result.resid))
    )


@dataclass(frozen=True, slots=True)
class Fit:
    """What is kept of a fit."""

    pattern: Floats
    """(period,) expected distance from the level, by number of the cell modulo the period."""
    parameters: Floats
    """(3,) variance of the level's steps, variance and coefficient of the autoregressive part."""
    panel: Floats
    """(3,) trend of the last cell, strength of the trend and of the course of the day."""


def strength(part: Floats, remainder: Floats) -> float:
    """0 to 1: how much of the variance of part and remainder together is the part's (Hyndman and
    Athanasopoulos, Forecasting: Principles and Practice, 4.3)."""
    whole = float(np.var(part + remainder))
    return max(0.0, 1.0 - float(np.var(remainder)) / whole) if whole > 0 else 0.0


def fit(values: Floats, first: int, period: int) -> Fit | None:
    """Fit one series; `first` is the number of the first cell of `values`. None if it cannot be fitted."""
    parts = decompose(values, period)
    if parts is None:
        return None
    # The last cycle, its noise averaged out over a few neighbours.
    last = parts.seasonal[-period:]
    width = max(1, period // 96)
    around = (np.arange(period)[:, None] + np.arange(-width, width + 1)) % period
    pattern = np.empty(period)
    pattern[(first + len(values) - period + np.arange(period)) % period] = last[around].mean(axis=1)
    adjusted = values - pattern[(first + np.arange(len(values))) % period]
    adjusted = adjusted[-FIT_CELLS:]
    if np.isnan(adjusted).mean() > MAX_GAPS:
        return None
    scale = float(np.nanstd(adjusted))
    if not scale > 1e-9 * float(np.nanmean(np.abs(values))):
        return None
    model = UnobservedComponents(
        (adjusted - np.nanmean(adjusted)) / scale,
        level=True,
        stochastic_level=True,
        irregular=False,
        autoregressive=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: judged by the forecasts, not by the optimiser
        result = model.fit(disp=False, maxiter=MAX_ITERATIONS)
    named = dict(zip(model.param_names, np.asarray(result.params, np.float64), strict=True))
    parameters = np.array([named["sigma2.level"] * scale**2, named["sigma2.ar"] * scale**2, named["ar.L1"]])
    panel = np.array(
        [
            parts.trend[-1],
            strength(parts.trend, parts.remainder),
            strength(parts.seasonal, parts.remainder),
        ]
    )
    return Fit(pattern, parameters, panel) if np.isfinite(parameters).all() else None


def job(arguments: State) -> State:
    """`fit` in a worker: array "values", numbers "first" and "period". Gives the arrays of a `Fit` and the
    number of its last cell, or nothing where there is no fit."""
    values = np.asarray(arguments.arrays["values"], np.float64)
    first, period = int(arguments.meta["first"]), int(arguments.meta["period"])
    found = fit(values, first, period)
    if found is None:
        return State()
    arrays = {"pattern": found.pattern, "parameters": found.parameters, "panel": found.panel}
    return State(arrays, {"last": first + len(values) - 1})
