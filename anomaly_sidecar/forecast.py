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
from gpuglass.families import anomaly as families

VERSION = 1
JOB = "anomaly_sidecar.models.seasonal:job"
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
    """Publish trend, course of the day and remainder too: three more series each."""

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
        self._workers = workers
        self._cells = [round(horizon / settings.step) for horizon in settings.horizons]
        self.state = self._empty(0)
        self._sum = np.zeros(0)
        self._count = np.zeros(0)
        self._fitted = np.zeros(0)
        """(rows,) time of the latest fit that was asked for; -1 before the first, NaN for a free row."""
        self._waiting: dict[str, int] = {}
        """Row of each fit under way, by its key."""
        self._limit = np.zeros(0)
        self._now = np.zeros(0)
        self._used = np.zeros(0)
        self._quota = np.zeros(0)
        self._open = -1
        """Number of the cell that is being filled."""
        self.fit_errors = 0

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
            self._fitted = np.concatenate([self._fitted, np.full(more, np.nan)])
            self._limit = np.concatenate([self._limit, np.full(more, np.nan)])
            self._now = np.concatenate([self._now, np.full(more, np.nan)])
            self._used = np.concatenate([self._used, np.full(more, np.nan)])
            self._quota = np.concatenate([self._quota, np.full(more, np.nan)])
        self.evict(rows)
        self._fitted[rows] = -1.0

    def evict(self, rows: RowArray) -> None:
        """See `Analyzer`."""
        table.clear(self.state, rows, self._empty(1))
        for array, nothing in (
            (self._sum, 0.0),
            (self._count, 0.0),
            (self._fitted, np.nan),
            (self._limit, np.nan),
            (self._now, np.nan),
            (self._used, np.nan),
            (self._quota, np.nan),
        ):
            array[rows] = nothing
        gone = {int(row) for row in rows}
        self._waiting = {key: row for key, row in self._waiting.items() if row not in gone}

    def observe(self, frame: Frame) -> None:
        """See `Analyzer`. A sample at a cell's end belongs to the cell: that is what a rate of PromQL is
        about."""
        number = math.ceil(frame.time / self.settings.step - 1e-9)
        if number > self._open >= 0:
            self._close()
        if number > self.state.history.index:
            self._open = number
            values = frame.values["value"]
            there = ~np.isnan(values)
            self._sum += np.where(there, values, 0.0)
            self._count += there
            self._now = values.copy()
            if abs(number * self.settings.step - frame.time) < 1e-6 * self.settings.step:
                self._close()
        limit = frame.values.get("limit")
        if limit is not None:
            self._limit = limit.copy()
        used, quota = frame.values.get("quota_used"), frame.values.get("quota")
        if used is not None and quota is not None:
            self._used, self._quota = used.copy(), quota.copy()
        if frame.live and self.settings.fit:
            self._take_fits()
            self._ask_for_fits(frame.time)

    def _close(self) -> None:
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self._sum / self._count
        self.state.push(self._open, mean)
        self._sum[:] = 0.0
        self._count[:] = 0.0
        self._open = -1

    def _ask_for_fits(self, time: float) -> None:
        history = self.state.history
        due = (self._fitted <= time - self.settings.refit) & (history.seen >= 2 * history.day)
        for row in np.flatnonzero(due):
            key = f"{self.name}/{row}"
            cells = history.ring[
                row, np.arange(history.index - 7 * history.day + 1, history.index + 1) % history.ring.shape[1]
            ]
            first = history.index - len(cells) + 1
            begin = int((~np.isnan(cells)).argmax())
            arguments = State(
                {"values": cells[begin:].astype(np.float64)}, {"first": first + begin, "period": history.day}
            )
            if key in self._waiting or not self._workers.submit(key, JOB, arguments):
                break
            self._waiting[key] = int(row)
            self._fitted[row] = time

    def _take_fits(self) -> None:
        for key, row in list(self._waiting.items()):
            result = self._workers.take(key)
            if result is None:
                continue
            del self._waiting[key]
            arrays = result.state.arrays if result.state is not None else {}
            pattern, parameters = arrays.get("pattern"), arrays.get("parameters")
            if pattern is None or parameters is None or pattern.shape != (self.state.history.day,):
                self.fit_errors += result.state is None
                continue
            self.state.model.refit(row, pattern, parameters, self.state.history)

    @property
    def ready(self) -> NDArray[np.bool_]:
        """(rows, horizons) whether enough targets have come: errors of a few say nothing."""
        enough: NDArray[np.bool_] = self.state.gate.published[..., 0] >= MIN_TARGETS / 2
        return enough & ~np.isnan(self._fitted)[:, None]

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
        history, model = self.state.history, self.state.model
        fitted = ~np.isnan(model.parameters[:, 0]) & (history.age == 0)
        trend = model.mean[:, 0]
        seasonal = model.pattern[:, history.index % history.day]
        for part, values in (
            ("trend", trend),
            ("seasonal", seasonal),
            ("remainder", history.now - trend - seasonal),
        ):
            yield Column(families.DECOMPOSITION, np.where(fitted, values, np.nan), {"part": part})

    def save(self) -> State:
        """See `Analyzer`. Fits under way are asked for again."""
        saved = table.save(self.state, VERSION)
        waiting = np.zeros(len(self._fitted), np.bool_)
        waiting[list(self._waiting.values())] = True
        saved.arrays.update(
            {
                "open_sum": self._sum,
                "open_count": self._count,
                "fitted": np.where(waiting, -1.0, self._fitted),
                "limit": self._limit,
                "now": self._now,
                "used": self._used,
                "quota": self._quota,
            }
        )
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
        own = ("open_sum", "open_count", "fitted", "limit", "now", "used", "quota")
        arrays = [state.arrays.get(name) for name in own]
        if not isinstance(meta.get("open"), int) or any(
            array is None or array.ndim != 1 or len(array) > len(self._sum) for array in arrays
        ):
            raise StateError("forecast: parts are missing")
        table.restore(self.state, state, VERSION)
        taken: list[FloatArray] = []
        for array, now in zip(
            arrays,
            (self._sum, self._count, self._fitted, self._limit, self._now, self._used, self._quota),
            strict=True,
        ):
            whole = now.copy()
            if array is not None:
                whole[: len(array)] = array
            taken.append(whole)
        self._sum, self._count, self._fitted, self._limit, self._now, self._used, self._quota = taken
        self._open = int(meta["open"])
        self._waiting = {}

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
