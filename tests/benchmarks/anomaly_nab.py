"""Quality of the anomaly scores on the Numenta Anomaly Benchmark, streamed by the sidecar's own code.

All files side by side, each sample once, in order, with the defaults of a query: no look-ahead, nothing
tuned per file. Reported: the benchmark's score at its optimised threshold (its protocol, in-sample) and at
the sidecar's fixed threshold of 1.0, both with alerts that are half a day apart; and nested cross-
validation, in which the features and the threshold are chosen on half of the files and scored on the others.
The scoring itself is held against published results first. The peer is the benchmark's windowed Gaussian, in
the same run. `--stl-seeds` tells what it would bring to set the daily profiles to those of an STL
decomposition each midnight, which the sidecar does not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from anomaly_sidecar.interface import FloatArray, Query
from anomaly_sidecar.scores import FEATURES, Scores
from tests.support import bench, nab

PUBLISHED = Path(__file__).parents[1] / "fixtures/nab/windowed_gaussian_standard_scores.csv"
TARGETS = {
    "scorer_error": "<= 0.001",
    "optimised": ">= 66",
    "fixed": ">= 60",
    "nested": ">= 60",
}
DAY_STEPS = 288
_FIXED = int(np.argmin(np.abs(nab.THRESHOLDS - 1.0)))


def streamed(corpus: Sequence[nab.Series], seeds: bool = False) -> tuple[list[FloatArray], list[FloatArray]]:
    """Scores by file, shape (rows,), and the ratios of the features, shape (rows, features); with `seeds`
    from daily profiles that STL sets anew each midnight."""
    files = len(corpus)
    scores = Scores(Query("nab", "nab"))
    scores.admit(np.arange(files), [()] * files, files)
    longest = max(len(series.times) for series in corpus)
    times, values = np.zeros((longest, files)), np.full((longest, files), np.nan)
    for column, series in enumerate(corpus):
        times[: len(series.times), column] = series.times
        values[: len(series.times), column] = series.values
    found = np.zeros((longest, files))
    ratios = np.zeros((longest, len(FEATURES), files))
    for row in range(longest):
        if seeds and row >= 3 * DAY_STEPS:
            for column in np.flatnonzero(np.isfinite(values[row]) & (times[row] % 86_400 == 0)).tolist():
                seed(scores, column, times[:row, column], values[:row, column])
        found[row] = scores.step(times[row], values[row])
        ratios[row] = scores.ratios()
    lengths = [len(series.times) for series in corpus]
    return (
        [np.nan_to_num(found[:length, column]) for column, length in enumerate(lengths)],
        [np.nan_to_num(ratios[:length, :, column]) for column, length in enumerate(lengths)],
    )


def seed(scores: Scores, column: int, times: FloatArray, values: FloatArray) -> None:
    """Set the daily profile of a series to STL's over its last week, if its samples are 5 minutes apart."""
    from anomaly_sidecar.models import seasonal

    at, week = times[-7 * DAY_STEPS :], values[-7 * DAY_STEPS :]
    if not np.allclose(np.diff(at), 300.0):
        return
    first = int(at[0] % 86_400 // 300)
    found = seasonal.fit(week, first, DAY_STEPS)
    parts = seasonal.decompose(week, DAY_STEPS)
    if found is not None and parts is not None:
        scores.save().arrays["day"][:, column] = found.pattern + np.median(parts.trend[-DAY_STEPS:])


def choices(ratios: Sequence[FloatArray]) -> list[list[FloatArray]]:
    """Scores for each set of features among which the cross-validation may choose: all, and all but one."""
    tuning = Scores(Query("nab", "nab")).tuning
    sets = [list(range(len(FEATURES)))]
    sets += [[index for index in sets[0] if index != left_out] for left_out in sets[0]]
    return [
        [(own[:, chosen] ** tuning.norm).sum(1) ** (1 / tuning.norm) / tuning.margin for own in ratios]
        for chosen in sets
    ]


def nested(corpus: Sequence[nab.Series], tables: Sequence[FloatArray], repeats: int) -> tuple[float, float]:
    """Mean and standard deviation of the score on the half that was not chosen on, both halves each time."""
    generator = np.random.default_rng(7)
    windows = np.array([series.windows for series in corpus])
    stacked = np.array(tables)  # (choices, files, thresholds)
    found = []
    for _ in range(repeats):
        order = generator.permutation(len(corpus))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        for learn, test in (halves, halves[::-1]):
            if not windows[test].sum():
                continue
            totals = stacked[:, learn].sum(1)
            choice, threshold = np.unravel_index(int(totals.argmax()), totals.shape)
            total = float(stacked[choice][test][:, threshold].sum())
            found.append(nab.normalised(total, int(windows[test].sum())))
    return float(np.mean(found)), float(np.std(found))


def main() -> int:
    """Measure, report on standard error, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer repeats of the cross-validation")
    parser.add_argument("--data", type=Path, help="folder with data/ and combined_windows.json")
    parser.add_argument(
        "--stl-seeds", action="store_true", help="also with daily profiles from STL (a minute)"
    )
    arguments = parser.parse_args()
    if arguments.data is None or not (arguments.data / "combined_windows.json").is_file():
        print("no data: --data FOLDER with data/*/*.csv and combined_windows.json", file=sys.stderr)
        return bench.finish("anomaly_nab", {}, TARGETS)
    corpus = nab.load(arguments.data)
    error, checked = nab.check(corpus, PUBLISHED)
    print(f"{len(corpus)} files; scoring held against {checked} published results", file=sys.stderr)
    started = time.process_time()
    scores, ratios = streamed(corpus)
    seconds = time.process_time() - started
    windows = sum(series.windows for series in corpus)

    table = nab.table(corpus, scores)
    totals = table.sum(0)
    best = int(totals.argmax())
    figures = {
        "scorer_error": round(error, 6),
        "files": len(corpus),
        "windows": windows,
        "optimised": round(nab.normalised(float(totals[best]), windows), 2),
        "optimised_threshold": float(nab.THRESHOLDS[best]),
        "fixed": round(nab.normalised(float(totals[_FIXED]), windows), 2),
    }
    for name, profile in (("low_fp", nab.LOW_FP), ("low_fn", nab.LOW_FN)):
        other = nab.table(corpus, scores, profile).sum(0)
        figures[f"optimised_{name}"] = round(nab.normalised(float(other.max()), windows, profile), 2)
        figures[f"fixed_{name}"] = round(nab.normalised(float(other[_FIXED]), windows, profile), 2)
    tables = [nab.table(corpus, chosen) for chosen in choices(ratios)]
    mean, deviation = nested(corpus, tables, 20 if arguments.quick else 200)
    figures["nested"], figures["nested_deviation"] = round(mean, 2), round(deviation, 2)

    for group in sorted({series.group for series in corpus}):
        chosen = [index for index, series in enumerate(corpus) if series.group == group]
        inside = sum(corpus[index].windows for index in chosen)
        if inside:
            part = float(table[chosen][:, _FIXED].sum())
            figures[f"fixed_{group}"] = round(nab.normalised(part, inside), 2)
    peer = nab.table(corpus, [nab.windowed_gaussian(series.values) / 8 for series in corpus]).sum(0)
    figures["peer_windowed_gaussian_optimised"] = round(nab.normalised(float(peer.max()), windows), 2)
    if arguments.stl_seeds:
        seeded, _ = streamed(corpus, seeds=True)
        of_seeded = nab.table(corpus, seeded).sum(0)
        figures["stl_seeds_optimised"] = round(nab.normalised(float(of_seeded.max()), windows), 2)
        figures["stl_seeds_fixed"] = round(nab.normalised(float(of_seeded[_FIXED]), windows), 2)
        figures["stl_seeds_false_alerts_per_series_day"] = round(_false_alerts(corpus, seeded), 3)
    rows = sum(len(series.times) for series in corpus)
    figures["false_alerts_per_series_day"] = round(_false_alerts(corpus, scores), 3)
    figures["microseconds_per_sample"] = round(1e6 * seconds / rows, 2)
    return bench.finish("anomaly_nab", figures, TARGETS)


def _false_alerts(corpus: Sequence[nab.Series], scores: Sequence[FloatArray]) -> float:
    """Alerts outside of windows at 1.0, per scored day."""
    alerts, days = 0, 0.0
    for series, own in zip(corpus, scores, strict=True):
        alerts += int((nab.events(series, own, 1.0) & (series.window < 0)).sum())
        days += (series.times[-1] - series.times[series.probation]) / 86_400
    return alerts / days


if __name__ == "__main__":
    raise SystemExit(main())
