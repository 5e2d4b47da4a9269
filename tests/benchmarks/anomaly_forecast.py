"""Quality of the forecasts against persistence, on real and made loads, by the sidecar's own analyzer.

Each load is fed cell by cell, with its daily fits, and judged after the learning days: absolute error as a
share of persistence's at each horizon, and how often the value lay at or below the 90 % quantile. Nothing is
tuned per load. A real load (`--data FILE.csv`: a header, then seconds and value in even steps) is run
twice: with its zeros as gaps, which they mostly are in a sum over many clients, and with zeros as values.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from anomaly_sidecar.forecast import Forecast, ForecastSettings
from anomaly_sidecar.interface import FloatArray, Frame
from anomaly_sidecar.workers import InlineWorkers
from tests.support import bench

MINUTES = (10, 30, 60, 120)
DAY = 86400.0
TARGETS = {
    "worst_loss_percent": "<= 2",
    "load_better_30min_percent": ">= 10",
    "load_better_120min_percent": ">= 20",
    "load_coverage_lowest": ">= 0.88",
    "load_coverage_highest": "<= 0.92",
    "fit_cpu_ms": "<= 300",
    "kept_kib_per_series": "<= 1024",
}
STEP = 600.0


def made_loads(days: int) -> dict[str, FloatArray]:
    """Loads of 10-minute cells: what forecasts like, and what they do not."""
    rng = np.random.default_rng(1)
    cells = round(days * DAY / STEP)
    times = np.arange(cells) * STEP
    phase = 2 * np.pi * times / DAY
    course = 1000 * (1 + 0.5 * np.sin(phase) + 0.2 * np.sin(2 * phase + 1))
    return {
        "course_of_day": course * rng.lognormal(0, 0.1, cells),
        "weekends": course * np.where(times // DAY % 7 < 5, 1.0, 0.4) * rng.lognormal(0, 0.05, cells),
        "random_walk": np.abs(1000 + np.cumsum(rng.normal(0, 30, cells))),
        "course_and_walk": np.abs(course + np.cumsum(rng.normal(0, 40, cells)) + 500),
        "few_requests": rng.poisson(3 * (1 + 0.8 * np.sin(phase))).astype(float),
        "growth": course * np.exp(np.arange(cells) / cells) * rng.lognormal(0, 0.03, cells),
        "phase_jump": 1000 * (1 + 0.5 * np.sin(phase + np.pi * (np.arange(cells) > cells // 2))),
    }


def read(path: Path) -> tuple[float, FloatArray]:
    """Step in seconds and values of a file; raises ValueError."""
    table = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    steps = np.unique(np.diff(table[:, 0]))
    if len(steps) != 1:
        raise ValueError(f"--data: {path} has uneven steps")
    return float(steps[0]), table[:, 1]


def follow(values: FloatArray, step: float, learn: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Error of persistence and of the forecast, each ÷ sum of values, and coverage, each (horizons,).

    Judged from `learn` days on, where both the value and the one persistence goes by are known."""
    horizons = tuple(60.0 * minutes for minutes in MINUTES)
    forecast = Forecast("load", ForecastSettings(step=step, horizons=horizons), InlineWorkers())
    forecast.admit(np.arange(1), [()], 1)
    points = np.empty((len(values), len(MINUTES)))
    bounds = np.empty((len(values), len(MINUTES)))
    for index, value in enumerate(values):
        live = index * step >= (learn - 1) * DAY
        forecast.observe(Frame((index + 1) * step, {"value": np.array([value])}, step, live))
        points[index], bounds[index] = forecast.state.point[0], forecast.state.bounds[0, :, 1]
    persistence, ours, coverage = (np.empty(len(MINUTES)) for _ in range(3))
    for place, horizon in enumerate(horizons):
        ahead = round(horizon / step)
        at = np.arange(round(learn * DAY / step), len(values))
        known = ~np.isnan(values[at]) & ~np.isnan(values[at - ahead])
        at = at[known]
        total = np.abs(values[at]).sum()
        persistence[place] = np.abs(values[at] - values[at - ahead]).sum() / total
        ours[place] = np.abs(values[at] - points[at - ahead, place]).sum() / total
        coverage[place] = (values[at] <= bounds[at - ahead, place]).mean()
    return persistence, ours, coverage


def main() -> int:
    """Measure, report on standard error, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer made loads")
    parser.add_argument("--data", type=Path, action="append", default=[], help="CSV of a load; repeatable")
    parser.add_argument("--learn", type=float, default=7.0, metavar="DAYS", help="before judging (7)")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    worst = -np.inf
    loads = [(name, STEP, values, 7.0) for name, values in made_loads(14).items()]
    loads = loads[:3] if arguments.quick else loads
    for path in reversed(arguments.data):
        try:
            step, values = read(path)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        learn = min(arguments.learn, len(values) * step / DAY / 2)
        loads.insert(0, (f"{path.stem}_zeros_as_values", step, values, learn))
        loads.insert(0, (path.stem, step, np.where(values == 0, np.nan, values), learn))
    targets = dict(TARGETS)
    if not arguments.data:
        print("no real load: --data FILE.csv (seconds,value)", file=sys.stderr)
        targets = {name: target for name, target in targets.items() if not name.startswith("load_")}
    for number, (name, step, values, learn) in enumerate(loads):
        persistence, ours, coverage = follow(values, step, learn)
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = np.nan_to_num(100 * (ours / persistence - 1))
        worst = max(worst, float(loss.max()))
        shown = ", ".join(
            f"{m} min {p:.3f} → {o:.3f} ({-x:+.1f} %, p90 {c:.3f})"
            for m, p, o, x, c in zip(MINUTES, persistence, ours, loss, coverage, strict=True)
        )
        print(f"{name}: {shown}", file=sys.stderr)
        prefix = "load" if number == 0 and arguments.data else name
        for minutes, percent in zip(MINUTES, loss, strict=True):
            figures[f"{prefix}_better_{minutes}min_percent"] = round(-float(percent), 2)
        figures[f"{prefix}_coverage_lowest"] = round(float(coverage.min()), 3)
        figures[f"{prefix}_coverage_highest"] = round(float(coverage.max()), 3)
    figures["worst_loss_percent"] = round(worst, 2)
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
