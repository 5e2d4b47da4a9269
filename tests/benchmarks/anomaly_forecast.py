"""Quality of the forecasts against persistence, on real and made loads, by the sidecar's own analyzer.

Each load is fed cell by cell, with its daily fits, and judged after the learning days: absolute error as a
share of persistence's at each horizon, and how often the value lay at or below the 90 % quantile. Nothing is
tuned per load. A real load (`--data FILE.csv`: a header, then seconds and value in even steps) is run
twice: with its zeros as gaps, which they mostly are in a sum over many clients, and with zeros as values. The
made loads (`tests/support/demand.py`) are of seeds that nothing was chosen with; `worst_loss` is over the
real ones and those of `loads`, for the `abrupt` ones the share within 2 % is told beside the worst.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from anomaly_sidecar.forecast import Forecast, ForecastSettings
from anomaly_sidecar.interface import FloatArray, Frame
from anomaly_sidecar.workers import InlineWorkers
from tests.support import bench, demand

MINUTES = (10, 30, 60, 120)
DAY = 86400.0
TARGETS = {
    "worst_loss_percent": "<= 2",
    "abrupt_within_2_percent": ">= 0.85",
    "load_better_30min_percent": ">= 10",
    "load_better_120min_percent": ">= 20",
    "load_coverage_lowest": ">= 0.88",
    "load_coverage_highest": "<= 0.92",
    "fit_cpu_ms": "<= 300",
    "kept_kib_per_series": "<= 1024",
}
SEEDS = (31, 32)
"""Of made loads: none that the gate was chosen with."""


def read(path: Path) -> tuple[float, FloatArray]:
    """Step in seconds and values of a file; raises ValueError."""
    table = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    steps = np.unique(np.diff(table[:, 0]))
    if len(steps) != 1:
        raise ValueError(f"--data: {path} has uneven steps")
    return float(steps[0]), table[:, 1]


@dataclass(frozen=True, slots=True)
class Followed:
    """Of each series (rows) and horizon, shape (rows, horizons)."""

    persistence: FloatArray
    """Its error ÷ sum of values."""
    ours: FloatArray
    """The forecast's."""
    coverage: FloatArray
    """Share of values at or below the 90 % quantile."""

    @property
    def loss(self) -> FloatArray:
        """Per cent by which the forecast is worse than persistence; 0 where both have no error."""
        same = np.ones_like(self.ours)
        return 100 * (np.divide(self.ours, self.persistence, out=same, where=self.persistence > 0) - 1)


def follow(values: FloatArray, step: float, learn: float) -> Followed:
    """Feed series (rows, cells), all at once, and judge them from `learn` days on, where both the value and
    the one that persistence goes by are known."""
    horizons = tuple(60.0 * minutes for minutes in MINUTES)
    rows, cells = values.shape
    forecast = Forecast("load", ForecastSettings(step=step, horizons=horizons), InlineWorkers())
    forecast.admit(np.arange(rows), [(("row", str(row)),) for row in range(rows)], rows)
    points = np.empty((cells, rows, len(MINUTES)))
    bounds = np.empty((cells, rows, len(MINUTES)))
    for index in range(cells):
        live = index * step >= (learn - 1) * DAY
        forecast.observe(Frame((index + 1) * step, {"value": values[:, index]}, step, live))
        points[index], bounds[index] = forecast.state.point, forecast.state.bounds[..., 1]
    found = Followed(*(np.empty((rows, len(MINUTES))) for _ in range(3)))
    for place, horizon in enumerate(horizons):
        ahead = round(horizon / step)
        at = np.arange(round(learn * DAY / step), cells)
        value, before = values[:, at], values[:, at - ahead]
        known = ~np.isnan(value) & ~np.isnan(before)
        point, bound = points[at - ahead, :, place].T, bounds[at - ahead, :, place].T
        total = np.where(known, np.abs(value), 0.0).sum(axis=1)
        found.persistence[:, place] = np.where(known, np.abs(value - before), 0.0).sum(axis=1) / total
        found.ours[:, place] = np.where(known, np.abs(value - point), 0.0).sum(axis=1) / total
        found.coverage[:, place] = (known & (value <= bound)).sum(axis=1) / known.sum(axis=1)
    return found


def tell(name: str, found: Followed, row: int) -> None:
    """One line on standard error."""
    shown = ", ".join(
        f"{m} min {p:.3f} → {o:.3f} ({-x:+.1f} %, p90 {c:.3f})"
        for m, p, o, x, c in zip(
            MINUTES,
            found.persistence[row],
            found.ours[row],
            found.loss[row],
            found.coverage[row],
            strict=True,
        )
    )
    print(f"{name}: {shown}", file=sys.stderr)


def real(path: Path, days: float, prefix: str) -> tuple[dict[str, float], float]:
    """Figures of a real load, both ways, and the worst loss; raises OSError and ValueError."""
    step, values = read(path)
    both = np.stack([np.where(values == 0, np.nan, values), values])
    found = follow(both, step, min(days, len(values) * step / DAY / 2))
    figures: dict[str, float] = {}
    for row, name in enumerate((prefix, f"{prefix}_zeros_as_values")):
        tell(f"{path.stem} as {name}", found, row)
        for minutes, percent in zip(MINUTES, found.loss[row], strict=True):
            figures[f"{name}_better_{minutes}min_percent"] = round(-float(percent), 2)
        figures[f"{name}_coverage_lowest"] = round(float(found.coverage[row].min()), 3)
        figures[f"{name}_coverage_highest"] = round(float(found.coverage[row].max()), 3)
    return figures, float(found.loss.max())


def made(
    name: str, make: Callable[[int, float], dict[str, FloatArray]], seeds: Sequence[int], days: float
) -> dict[str, float]:
    """Figures of made loads, all seeds together."""
    series = {f"{key}:{seed}": values for seed in seeds for key, values in make(seed, days).items()}
    found = follow(np.stack(list(series.values())), 600.0, days / 2)
    for row, key in enumerate(series):
        tell(f"{name} {key}", found, row)
    worst = found.loss.max(axis=1)
    steady = found.coverage[found.persistence > 0]
    return {
        f"{name}_loads": len(series),
        f"{name}_worst_loss_percent": round(float(worst.max()), 2),
        f"{name}_within_2_percent": round(float((worst <= 2.0).mean()), 3),
        f"{name}_better_30min_percent": round(-float(found.loss[:, 1].mean()), 2),
        f"{name}_better_120min_percent": round(-float(found.loss[:, 3].mean()), 2),
        f"{name}_coverage_mean": round(float(steady.mean()), 3),
    }


def main() -> int:
    """Measure, report on standard error, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="one seed of made loads over 8 days, no abrupt ones"
    )
    parser.add_argument("--data", type=Path, action="append", default=[], help="CSV of a load; repeatable")
    parser.add_argument("--learn", type=float, default=7.0, metavar="DAYS", help="before judging (7)")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    worst = -np.inf
    targets = dict(TARGETS)
    if not arguments.data:
        print("no real load: --data FILE.csv (seconds,value)", file=sys.stderr)
        targets = {name: target for name, target in targets.items() if not name.startswith("load_")}
    for number, path in enumerate(arguments.data):
        try:
            of_load, loss = real(path, arguments.learn, path.stem if number else "load")
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        figures |= of_load
        worst = max(worst, loss)
    if arguments.quick:
        figures |= made("made", demand.loads, SEEDS[:1], 8.0)
    else:
        figures |= made("made", demand.loads, SEEDS, 14.0)
        figures |= made("abrupt", demand.abrupt_loads, SEEDS, 14.0)
    figures["worst_loss_percent"] = max(round(worst, 2), figures["made_worst_loss_percent"])
    figures |= cost()
    return bench.finish("anomaly_forecast", figures, targets)


def cost() -> dict[str, float]:
    """CPU time of a fit of a week of 5-minute cells and of a cell for 200 series; memory kept per series."""
    from anomaly_sidecar.models import seasonal

    rng = np.random.default_rng(2)
    week = 1000 * (1 + 0.5 * np.sin(np.arange(2016) * 2 * np.pi / 288)) * rng.lognormal(0, 0.1, 2016)
    seasonal.fit(week, 0, 288)
    fit = min(_seconds(lambda: seasonal.fit(week, 0, 288)) for _ in range(3))
    rows = 200
    forecast = Forecast("cost", ForecastSettings(fit=False), InlineWorkers())
    forecast.admit(np.arange(rows), [()] * rows, rows)
    for index in range(50):
        forecast.observe(Frame(300.0 * (index + 1), {"value": rng.uniform(1, 2, rows)}, 300.0))
    cells = []
    for index in range(50, 70):
        frame = Frame(300.0 * (index + 1), {"value": rng.uniform(1, 2, rows)}, 300.0)
        cells.append(_seconds(lambda frame=frame: forecast.observe(frame)))  # type: ignore[misc]
    kept = sum(array.nbytes for array in forecast.save().arrays.values())
    return {
        "fit_cpu_ms": round(1e3 * fit, 1),
        "cell_us_per_series": round(1e6 * float(np.median(cells)) / rows, 2),
        "kept_kib_per_series": round(kept / rows / 1024, 1),
    }


def _seconds(call: object) -> float:
    start = time.process_time()
    call()  # type: ignore[operator]
    return time.process_time() - start


if __name__ == "__main__":
    raise SystemExit(main())
