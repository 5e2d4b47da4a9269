"""Forecasts as the sidecar runs them: frames to cells, daily fits in worker processes, what is published.

In flow frames of a query (demand in tokens per second, requests, used memory), out flow values at the
horizons by quantile, how good they were of late, and, where a limit is given, the time until it is reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar import replicas
from anomaly_sidecar import rows as table
from anomaly_sidecar.fits import Asked, Fits
from anomaly_sidecar.forecaster import CANDIDATES, Forecaster
from anomaly_sidecar.interface import (
    Column,
    FloatArray,
    Frame,
    Kind,
    Labels,
    Output,
    Role,
    RowArray,
    State,
    StateError,
    Workers,
)
from anomaly_sidecar.models.gate import MIN_TARGETS
from anomaly_sidecar.models.history import DAY
from anomaly_sidecar.models.panel import Panel
from gpuglass.families import anomaly as families

VERSION = 2
MAX_CELLS = 1440
"""Of a horizon, and of a day."""


class ForecastSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Keys of a forecast. Durations in seconds."""

    step: float = 300.0
    """Forecasts are of means over this time and move on with it; divides a day."""
    horizons: tuple[float, ...] = (300.0, 600.0, 900.0, 1800.0)
    """Multiples of the step."""
    quantiles: tuple[float, ...] = (0.5, 0.9)
    nonnegative: bool = True
    """A demand is never below 0."""
    refit: float = 86400.0
    """Between two fits of the decomposition."""
    fit: bool = True
    """False leaves the fitted model out."""
    decomposition: bool = False
    """Publish trend, course of the day and remainder too, and how strong they are: five more series each."""

    def __post_init__(self) -> None:
        if not (60 <= self.step <= 3600 and 86400 % self.step == 0):
            raise ValueError(f"step: must divide a day, from 60s to 3600s, is {self.step:g}s")
        cells = [horizon / self.step for horizon in self.horizons]
        if (
            not cells
            or sorted(set(cells)) != cells
            or not all(1 <= cell <= min(MAX_CELLS, DAY / self.step) and cell == int(cell) for cell in cells)
        ):
            raise ValueError(f"horizons: must be ascending multiples of step ({self.step:g}s) up to a day")
        quantiles = list(self.quantiles)
        if not quantiles or sorted(set(quantiles)) != quantiles or not 0 < quantiles[0] <= quantiles[-1] < 1:
            raise ValueError("quantiles: must be ascending and between 0 and 1")
        if not (math.isfinite(self.refit) and self.refit >= 3600):
            raise ValueError(f"refit: must be at least 3600s, is {self.refit:g}s")


class Forecast:
    """Analyzer with the role "value" and, optionally, "limit", or "quota_used" and "quota"."""

    def __init__(self, name: str, settings: ForecastSettings, workers: Workers) -> None:
        self.name = name
        self.settings = settings
        self._cells = [round(horizon / settings.step) for horizon in settings.horizons]
        self.state = self._empty(0)
        self._sum = np.zeros(0)
        self._count = np.zeros(0)
        self.fits = Fits(name, settings.step, settings.refit, workers)
        self.panel = Panel.empty(0)
        self._limit = np.zeros(0)
        self._now = np.zeros(0)
        self._used = np.zeros(0)
        self._quota = np.zeros(0)
        self._open = -1
        """Number of the cell that is being filled."""

    def _empty(self, rows: int) -> Forecaster:
        settings = self.settings
        return Forecaster.empty(rows, settings.step, self._cells, settings.quantiles, settings.nonnegative)

    def admit(self, rows: RowArray, labels: Sequence[Labels], capacity: int) -> None:
        """See `Analyzer`."""
        more = max(0, capacity - len(self._sum))
        if more:
            table.resize(self.state, self._empty(capacity))
            self._sum = np.concatenate([self._sum, np.zeros(more)])
            self._count = np.concatenate([self._count, np.zeros(more)])
            self.fits.resize(capacity)
            table.resize(self.panel, Panel.empty(capacity))
            self._limit = np.concatenate([self._limit, np.full(more, np.nan)])
            self._now = np.concatenate([self._now, np.full(more, np.nan)])
            self._used = np.concatenate([self._used, np.full(more, np.nan)])
            self._quota = np.concatenate([self._quota, np.full(more, np.nan)])
        self.evict(rows)
        self.fits.admit(rows, labels)

    def evict(self, rows: RowArray) -> None:
        """See `Analyzer`."""
        table.clear(self.state, rows, self._empty(1))
        table.clear(self.panel, rows, Panel.empty(1))
        self.fits.evict(rows)
        for array, nothing in (
            (self._sum, 0.0),
            (self._count, 0.0),
            (self._limit, np.nan),
            (self._now, np.nan),
            (self._used, np.nan),
            (self._quota, np.nan),
        ):
            array[rows] = nothing

    @property
    def taken(self) -> NDArray[np.bool_]:
        """(rows,) whether a series has the row."""
        return ~np.isnan(self.fits.asked.cell)

    def observe(self, frame: Frame) -> None:
        """See `Analyzer`. A sample at a cell's end belongs to the cell: that is what a rate of PromQL is
        about."""
        number = math.ceil(frame.time / self.settings.step - 1e-9)
        if number > self._open >= 0:
            self._close(frame.live)
        if number > self.state.history.index:
            self._open = number
            values = frame.values["value"]
            there = ~np.isnan(values)
            self._sum += np.where(there, values, 0.0)
            self._count += there
            self._now = values.copy()
            if abs(number * self.settings.step - frame.time) < 1e-6 * self.settings.step:
                self._close(frame.live)
        limit = frame.values.get("limit")
        if limit is not None:
            self._limit = limit.copy()
        used, quota = frame.values.get("quota_used"), frame.values.get("quota")
        if used is not None and quota is not None:
            self._used, self._quota = used.copy(), quota.copy()
        if frame.live and self.settings.fit:
            self.fits.ask(self.state.history, live=True)

    def _close(self, live: bool) -> None:
        """The open cell has ended: take in its mean, and fits."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self._sum / self._count
        self.state.push(self._open, mean)
        self._sum[:] = 0.0
        self._count[:] = 0.0
        self.panel.push(self._open, mean, self.state.model.pattern, self.settings.step)
        if self.settings.fit:
            for row, fitted in self.fits.take(self._open, live):
                self._take(row, fitted)
            self.fits.ask(self.state.history, live)
        self._open = -1

    def _take(self, row: int, fitted: State) -> None:
        history, model = self.state.history, self.state.model
        pattern, parameters = fitted.arrays["pattern"], fitted.arrays["parameters"]
        model.refit(row, pattern, parameters, history)
        self.panel.refit(row, fitted.arrays["panel"], int(fitted.meta["last"]), pattern, history)

    @property
    def ready(self) -> NDArray[np.bool_]:
        """(rows, horizons) whether enough targets have come: errors of a few say nothing."""
        enough: NDArray[np.bool_] = self.state.gate.published[..., 0] >= MIN_TARGETS / 2
        return enough & self.taken[:, None]

    def outputs(self) -> Iterable[Output]:
        """See `Analyzer`."""
        state, settings = self.state, self.settings
        skill, wape = state.gate.skill(), state.gate.wape()
        ready = self.ready
        for number, horizon in enumerate(settings.horizons):
            labels = {"horizon": shown(horizon)}
            known = ready[:, number]
            for place, quantile in enumerate(settings.quantiles):
                values = np.where(known, state.bounds[:, number, place], np.nan)
                yield Column(families.FORECAST, values, {**labels, "quantile": f"{quantile:g}"})
                covered = np.where(known, state.gate.covered[:, number, place], np.nan)
                yield Column(families.FORECAST_COVERAGE, covered, {**labels, "quantile": f"{quantile:g}"})
            yield Column(families.FORECAST_SKILL, np.where(known, skill[:, number], np.nan), labels)
            yield Column(families.FORECAST_WAPE, np.where(known, wape[:, number], np.nan), labels)
            used = np.where(known, state.chosen[:, number] > 0, np.nan)
            yield Column(families.FORECAST_USABLE, used, labels)
        yield from self._exhaustion(ready)
        if settings.decomposition:
            yield from self._decomposition()

    def _exhaustion(self, ready: NDArray[np.bool_]) -> Iterable[Output]:
        """Time to the limit of a level, and to the quota of what is used up at the forecast rate."""
        horizons = np.asarray(self.settings.horizons)
        for place, quantile in enumerate(self.settings.quantiles):
            values = np.where(ready, self.state.bounds[..., place], np.nan)
            to_limit = replicas.seconds_to_limit(self._now, self._limit, values, horizons)
            to_quota = replicas.seconds_to_quota(self._used, self._quota, values, horizons)
            seconds = np.fmin(to_limit, to_quota)
            if not np.isnan(seconds).all():
                yield Column(families.EXHAUSTION, seconds, {"quantile": f"{quantile:g}"})

    def _decomposition(self) -> Iterable[Output]:
        """Parts of the latest closed cell by the latest fit; they add up to it."""
        history, panel = self.state.history, self.panel
        known = history.age == 0
        seasonal = self.state.model.pattern[:, history.index % history.day]
        for part, values in (
            ("trend", panel.trend),
            ("seasonal", seasonal),
            ("remainder", history.now - panel.trend - seasonal),
        ):
            shown_values = np.where(known & ~np.isnan(panel.trend), values, np.nan)
            yield Column(families.DECOMPOSITION, shown_values, {"part": part})
        for place, part in enumerate(("trend", "seasonal")):
            strength = np.where(known, panel.strength[:, place], np.nan)
            yield Column(families.DECOMPOSITION_STRENGTH, strength, {"part": part})

    def _own(self) -> dict[str, FloatArray]:
        """Arrays of state beside the parts', one entry per row."""
        return {
            "open_sum": self._sum,
            "open_count": self._count,
            "limit": self._limit,
            "now": self._now,
            "used": self._used,
            "quota": self._quota,
        }

    def save(self) -> State:
        """See `Analyzer`. Fits under way are asked for again, about the same cells."""
        saved = table.save(self.state, VERSION)
        table.nest(saved, "fits", table.save(self.fits.asked, VERSION))
        table.nest(saved, "panel", table.save(self.panel, VERSION))
        saved.arrays.update(self._own())
        saved.meta.update(
            open=self._open, horizons=list(self._cells), quantiles=list(self.settings.quantiles)
        )
        return saved

    def restore(self, state: State) -> None:
        """See `Analyzer`."""
        meta = state.meta
        if meta.get("horizons") != list(self._cells) or meta.get("quantiles") != list(
            self.settings.quantiles
        ):
            raise StateError("forecast: other horizons or quantiles")
        rows = len(self._sum)
        taken: list[FloatArray] = []
        for name, own in self._own().items():
            array = state.arrays.get(name)
            if array is None or array.ndim != 1 or len(array) > rows or array.dtype != own.dtype:
                raise StateError(f"forecast: the array {name} is missing or has another shape")
            taken.append(np.concatenate([array, own[len(array) :]]))
        if not isinstance(meta.get("open"), int):
            raise StateError("forecast: the open cell is missing")
        asked, panel = Asked.empty(rows), Panel.empty(rows)
        table.restore(asked, table.nested(state, "fits"), VERSION)
        table.restore(panel, table.nested(state, "panel"), VERSION)
        table.restore(self.state, state, VERSION)
        self._sum, self._count, self._limit, self._now, self._used, self._quota = taken
        self.fits.asked, self.panel = asked, panel
        self._open = int(meta["open"])

    def candidate(self, row: int, horizon: int) -> str:
        """Name of the forecast that is published of a row at the horizon of that place."""
        return CANDIDATES[int(self.state.chosen[row, horizon])]


def shown(seconds: float) -> str:
    """As a label: 300 is 5m."""
    whole = round(seconds)
    for size, unit in ((3600, "h"), (60, "m")):
        if whole % size == 0:
            return f"{whole // size}{unit}"
    return f"{whole}s"


KIND = Kind(
    "forecast",
    "values at horizons by quantile, and the time until a limit is reached",
    (
        Role("value", "What is forecast."),
        Role("limit", "Largest value that can be, in the same unit: size of a cache.", required=False),
        Role("quota_used", "What the value, as a rate, has used up of a quota.", required=False),
        Role("quota", "That quota.", required=False),
    ),
    ForecastSettings,
    Forecast,
    history=8 * DAY,
    history_step=300.0,
)
