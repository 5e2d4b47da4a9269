"""False alarms of the default rule, `gpuglass_anomaly_score > 1 for 5m`, on series without anomalies.

A simulated fleet at one sample a minute: loads with a shape of the day and the week, GPUs that idle and are
busy in bursts, memory that steps when models are swapped, queues that are mostly empty, temperatures that
follow the load, and constants; two weeks of each, of which the first three days are learned from. With
`--data`, the files of the Numenta benchmark that hold no anomaly, too. Steps of six standard deviations say
that the silence is no deafness. The peer is a band of four standard deviations around the mean of a day.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.interface import FloatArray, Query
from anomaly_sidecar.scores import Scores
from tests.support import bench, nab

DAY = 86_400.0
START = 1_700_006_400.0
LEARN_DAYS = 3.0
TARGETS = {
    "fleet_alarms_per_series_day": "<= 0.1",
    "nab_alarms_per_series_day": "<= 0.1",
    "steps_found_within_two_samples": ">= 0.95",
}


def fleet(kind: str, series: int, days: float, seed: int) -> tuple[FloatArray, FloatArray]:
    """Times and values of one kind of series, shape (steps, series)."""
    generator = np.random.default_rng(seed)
    times = START + 60.0 * np.arange(int(days * DAY / 60))
    steps = len(times)
    hour = 2 * np.pi * times[:, None] / DAY
    phase = generator.uniform(0, 2 * np.pi, series)
    weekend = (times[:, None] // DAY % 7 >= 5) * generator.uniform(0, 0.5, series)
    shape = 1 + 0.4 * np.sin(hour + phase) - weekend
    noise = generator.standard_normal((steps, series))
    slow = np.zeros((steps, series))
    for step in range(1, steps):  # an hour's memory: what makes one day unlike another
        slow[step] = slow[step - 1] * (1 - 1 / 60) + noise[step] * 0.18
    fresh = generator.standard_normal((steps, series))
    if kind == "load":
        return times, 100 * np.maximum(shape + 0.08 * slow + 0.05 * fresh, 0)
    if kind == "bursts":
        busy = generator.random((steps, series)) < 0.15 * np.maximum(shape, 0)
        return times, np.where(busy, generator.uniform(0.5, 1.0, (steps, series)), 0.0)
    if kind == "memory":
        # Twice a day a pod loads one of the four models that it serves; a flat pool lies below it.
        sizes = generator.uniform(0, 20, (4, series))
        swaps = (generator.random((steps, series)) < 2 / 1440).cumsum(0)
        chosen = generator.integers(0, 4, (int(swaps.max()) + 1, series))
        column = np.arange(series)
        return times, 40 + sizes[chosen[swaps, column], column] + 0.02 * fresh
    if kind == "queue":
        rate = 0.5 * np.maximum(shape, 0.05)
        return times, generator.poisson(rate * np.exp(0.5 * slow)).astype(float)
    if kind == "temperature":
        return times, 55 + 10 * shape + 2 * slow + np.rint(0.5 * fresh)
    return times, np.repeat(generator.uniform(1, 9, (1, series)), steps, axis=0)


FLOORS = {"bursts": 0.1, "memory": 1.0, "queue": 5.0, "temperature": 3.0}
"""Smallest deviations that matter, as the presets set them."""
KINDS = ("load", "bursts", "memory", "queue", "temperature", "constant")


def streamed(times: FloatArray, values: FloatArray, floor: float) -> FloatArray:
    """Scores, shape (steps, series)."""
    series = values.shape[1]
    scores = Scores(Query("q", "q", min_deviation=floor, min_relative_deviation=0.02))
    scores.admit(np.arange(series), [()] * series, series)
    return np.array([scores.step(at, row) for at, row in zip(times.tolist(), values, strict=True)])


def alarms(above: NDArray[np.bool_], samples: int) -> Iterator[int]:
    """Steps at which `above`, of one series, has been true for so many samples more than one."""
    run = 0
    for step, now in enumerate(above.tolist()):
        run = run + 1 if now else 0
        if run == samples + 1:
            yield step


def alarm_count(above: NDArray[np.bool_], samples: int) -> int:
    """Alarms of all series, shape (steps, series)."""
    return sum(len(list(alarms(above[:, column], samples))) for column in range(above.shape[1]))


def four_sigma(values: FloatArray) -> NDArray[np.bool_]:
    """The peer: outside of four standard deviations around the mean of the day before."""
    window = 1440
    sums = np.cumsum(np.vstack([np.zeros_like(values[:1]), values]), axis=0)
    squares = np.cumsum(np.vstack([np.zeros_like(values[:1]), values**2]), axis=0)
    mean = (sums[window:-1] - sums[: -window - 1]) / window
    spread = np.sqrt(np.maximum((squares[window:-1] - squares[: -window - 1]) / window - mean**2, 1e-12))
    above = np.zeros(values.shape, bool)
    above[window:] = np.abs(values[window:] - mean) > 4 * spread
    return above


def steps_found(series: int, seed: int) -> float:
    """Share of steps of six sigma of the noise after which the score is above 1 within two samples."""
    generator = np.random.default_rng(seed)
    times = START + 60.0 * np.arange(int(6 * DAY / 60))
    values = 100 + 30 * np.sin(2 * np.pi * times[:, None] / DAY + generator.uniform(0, 6, series))
    values += 3 * generator.standard_normal(values.shape)
    cut = len(times) - 200
    values[cut:] += 6 * 3
    found = streamed(times, values, 0.0)
    return float((found[cut : cut + 2] > 1).any(0).mean())


def main() -> int:
    """Measure, report on standard error, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer series and days")
    parser.add_argument("--data", type=Path, help="folder with data/ and combined_windows.json")
    arguments = parser.parse_args()
    series, days = (20, 6.0) if arguments.quick else (100, 14.0)
    figures: dict[str, float] = {}
    total = peer = 0
    for number, kind in enumerate(KINDS):
        times, values = fleet(kind, series, days, 100 + number)
        found = streamed(times, values, FLOORS.get(kind, 0.0))
        judged = times >= START + LEARN_DAYS * DAY
        count = alarm_count(np.nan_to_num(found[judged]) > 1, 5)
        total += count
        peer += alarm_count(four_sigma(values)[judged], 5)
        figures[f"{kind}_alarms_per_series_day"] = round(count / series / (days - LEARN_DAYS), 4)
        print(f"{kind}: {figures[f'{kind}_alarms_per_series_day']} per series and day", file=sys.stderr)
    watched = len(KINDS) * series * (days - LEARN_DAYS)
    figures["fleet_alarms_per_series_day"] = round(total / watched, 4)
    figures["peer_four_sigma_alarms_per_series_day"] = round(peer / watched, 4)
    if arguments.data is not None:
        quiet = [one for one in nab.load(arguments.data) if not one.windows]
        count, spent = 0, 0.0
        for one in quiet:
            found = streamed(one.times, one.values[:, None], 0.0)
            count += alarm_count(np.nan_to_num(found[one.probation :]) > 1, 1)  # 5 minutes are one step
            spent += (one.times[-1] - one.times[one.probation]) / DAY
        figures["nab_alarms_per_series_day"] = round(count / max(spent, 1e-9), 4)
        figures["nab_files"] = len(quiet)
    figures["steps_found_within_two_samples"] = round(steps_found(20 if arguments.quick else 100, 5), 3)
    return bench.finish("anomaly_false_alarms", figures, TARGETS)


if __name__ == "__main__":
    raise SystemExit(main())
