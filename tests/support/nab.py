"""The Numenta Anomaly Benchmark's files and its scoring, written anew from its description and tables.

In: a folder with `data/*/*.csv` and `combined_windows.json`. Out: the benchmark's normalised scores, 0 for a
detector that says nothing and 100 for a perfect one. `check` holds the scoring against published results.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

HALF_DAY = 43_200.0
THRESHOLDS = np.round(np.concatenate([np.arange(0.7, 2.0, 0.05), np.arange(2.0, 4.2, 0.25)]), 2)


@dataclass(frozen=True, slots=True)
class Profile:
    """What a detection is worth: NAB's application profiles."""

    false_positive: float
    false_negative: float


STANDARD = Profile(0.11, 1.0)
LOW_FP = Profile(0.22, 1.0)
LOW_FN = Profile(0.11, 2.0)


@dataclass(frozen=True, slots=True)
class Series:
    """One file: times in Unix seconds, values, and the worth of a detection at each row."""

    name: str
    times: FloatArray
    values: FloatArray
    window: NDArray[np.int64]
    """Number of the labelled window of each row, -1 outside."""
    worth: FloatArray
    """Unweighted: in a window 1 at its left edge, falling to 0; behind a window 0 falling to -1."""
    probation: int
    """Rows at the beginning that are not scored."""

    @property
    def group(self) -> str:
        """The folder of the benchmark."""
        return self.name.partition("/")[0]

    @property
    def windows(self) -> int:
        """Labelled windows that are scored."""
        return len(set(self.window[self.probation :].tolist()) - {-1})


def load(folder: Path) -> list[Series]:
    """All files that are there."""
    labels = json.loads((folder / "combined_windows.json").read_text())
    found = []
    for path in sorted((folder / "data").glob("*/*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        name = f"{path.parent.name}/{path.name}"
        times = np.array([_time(row[0]) for row in rows])
        windows = [(_time(begin), _time(end)) for begin, end in labels[name]]
        found.append(_series(name, times, np.array([float(row[1]) for row in rows]), windows))
    return found


def _time(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def _sigmoid(position: FloatArray) -> FloatArray:
    """2 / (1 + exp(5 x)) - 1, and -1 from three widths on."""
    value: FloatArray = np.where(position >= 3, -1.0, 2 / (1 + np.exp(5 * np.minimum(position, 3.0))) - 1)
    return value


_BEST = float(_sigmoid(np.array([-1.0]))[0])


def _series(
    name: str, times: FloatArray, values: FloatArray, windows: Sequence[tuple[float, float]]
) -> Series:
    rows = len(times)
    window, worth = np.full(rows, -1), np.full(rows, -1.0)
    spans = [(int(np.flatnonzero(times == a)[0]), int(np.flatnonzero(times == b)[0])) for a, b in windows]
    for number, (begin, end) in enumerate(spans):
        width = end - begin + 1
        inside = np.arange(begin, end + 1)
        window[inside] = number
        worth[inside] = _sigmoid(-(end - inside + 1) / width) / _BEST
        following = spans[number + 1][0] if number + 1 < len(spans) else rows
        behind = np.arange(end + 1, following)
        if width > 1:
            worth[behind] = _sigmoid((behind - end) / (width - 1))
    probation = int(min(math.floor(0.15 * rows), 0.15 * 5000))
    return Series(name, times, values, window, worth, probation)


def raw_score(series: Series, fired: NDArray[np.bool_], profile: Profile = STANDARD) -> float:
    """Score of one file for the rows at which a detector fired."""
    rows = np.flatnonzero(fired)
    rows = rows[rows >= series.probation]
    total = profile.false_positive * float(series.worth[rows[series.window[rows] < 0]].sum())
    for number in set(series.window[series.probation :].tolist()) - {-1}:
        hits = rows[series.window[rows] == number]
        total += float(series.worth[hits].max()) if len(hits) else -profile.false_negative
    return total


def normalised(total: float, windows: int, profile: Profile = STANDARD) -> float:
    """On the scale from 0 (says nothing) to 100 (perfect)."""
    return 100 * (total + profile.false_negative * windows) / (windows * (1 + profile.false_negative))


def events(
    series: Series, scores: FloatArray, threshold: float, quiet: float = HALF_DAY
) -> NDArray[np.bool_]:
    """Rows at which an alert is raised: above the threshold, and none in the `quiet` seconds before."""
    fired = np.zeros(len(scores), bool)
    last = -math.inf
    for row in np.flatnonzero(scores > threshold).tolist():
        if row >= series.probation and series.times[row] - last >= quiet:
            fired[row] = True
            last = series.times[row]
    return fired


def table(corpus: Sequence[Series], scores: Sequence[FloatArray], profile: Profile = STANDARD) -> FloatArray:
    """Raw scores of each file, shape (files, THRESHOLDS)."""
    return np.array(
        [
            [raw_score(series, events(series, own, float(threshold)), profile) for threshold in THRESHOLDS]
            for series, own in zip(corpus, scores, strict=True)
        ]
    )


def windowed_gaussian(values: FloatArray, size: int = 6400, step: int = 100) -> FloatArray:
    """NAB's simplest detector, as deviations in standard deviations: the window moves in steps."""
    shifted = values - values[0]
    sums = np.concatenate([[0.0], np.cumsum(shifted)])
    squares = np.concatenate([[0.0], np.cumsum(shifted**2)])
    row = np.arange(len(values))
    high = np.where(row <= size, row, size + (row - size) // step * step)
    low = np.maximum(0, high - size)
    count = np.maximum(high - low, 1)
    mean = (sums[high] - sums[low]) / count
    deviation = np.sqrt(np.maximum((squares[high] - squares[low]) / count - mean**2, 0.0))
    deviation[deviation == 0] = 1e-6
    z: FloatArray = np.abs(shifted - mean) / deviation
    z[0] = 0.0
    return z


PUBLISHED_THRESHOLD = 7.13
"""Of the tail probability: the results file says 1.0, rounded. In standard deviations."""


def check(corpus: Sequence[Series], published: Path) -> tuple[float, int]:
    """Largest difference from the published score of a file, over the files there, and their number.

    `published` is NAB's results/windowedGaussian/windowedGaussian_standard_scores.csv.
    """
    with published.open(newline="") as file:
        known = {row["File"]: float(row["Score"]) for row in csv.DictReader(file) if row["Score"]}
    differences = [
        abs(raw_score(s, windowed_gaussian(s.values) >= PUBLISHED_THRESHOLD) - known[s.name])
        for s in corpus
        if s.name in known
    ]
    return max(differences), len(differences)
