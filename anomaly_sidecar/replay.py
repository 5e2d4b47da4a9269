"""Runs the scores over a stretch of history: what `backtest` and `explain` show.

In flow a query and times, out flow scores, expected values and the alerts that the default rule would have
raised, computed by the same code and in the same order as in the running sidecar.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from anomaly_sidecar.interface import FloatArray, Labels, Query
from anomaly_sidecar.reader import Reader
from anomaly_sidecar.scores import Reason, Scores
from anomaly_sidecar.table import SeriesTable
from anomaly_sidecar.unit import Spec


@dataclass(frozen=True, slots=True)
class Replayed:
    """One array per quantity, shape (steps, rows); NaN where there is no sample or no score."""

    labels: list[Labels]
    times: FloatArray
    values: FloatArray
    scores: FloatArray
    expected: FloatArray
    reasons: list[list[Reason]]
    """By row: the parts of its highest score."""
    latest: list[list[Reason]]
    """By row: the parts of its latest score."""


@dataclass(frozen=True, slots=True)
class Alert:
    """A stretch over which the rule `score > threshold for: …` fires."""

    row: int
    start: float
    """When it fires: after the score has been above the threshold for so long."""
    end: float
    peak: float
    index: int
    """Of the peak's step."""


def replay(
    reader: Reader, query: Query, learn_from: float, start: float, end: float, step: float
) -> Replayed:
    """Learn from `learn_from` on and keep what lies in [start, end]. Raises `ReadError`.

    Times are Unix seconds, `step` in seconds. All is read at one step, so that the scores are those of a
    sidecar with `interval` = `step`.
    """
    scores = Scores(query)
    table = SeriesTable(query.limit, ttl=float("inf"))
    first = np.ceil(learn_from / step) * step
    kept: list[tuple[float, FloatArray, FloatArray, FloatArray]] = []
    peaks: dict[int, tuple[float, list[Reason]]] = {}
    series = max(len(reader.instant(query.expression, at).keys) for at in (start, end))
    for matrix in reader.history(query.expression, first, end, step, series):
        rows, changes = table.locate(matrix.keys, admit=True)
        if changes.admitted:
            scores.admit(
                np.array(changes.admitted, np.intp),
                [table.labels[row] or () for row in changes.admitted],
                table.capacity,
            )
        low, high = query.valid_min, query.valid_max
        with np.errstate(invalid="ignore"):
            samples = np.where((matrix.values >= low) & (matrix.values <= high), matrix.values, np.nan)
        placed, _ = table.place(rows, samples)
        for at, values in zip(matrix.times.tolist(), placed, strict=True):
            result = scores.step(at, values)
            if at < start:
                continue
            kept.append((at, values, result, scores.expected_values()))
            for row in np.flatnonzero(result > 1.0).tolist():
                if row not in peaks or result[row] > peaks[row][0]:
                    peaks[row] = float(result[row]), scores.explain(row)
    count = len(table)
    return Replayed(
        [labels or () for labels in table.labels[:count]],
        np.array([entry[0] for entry in kept]),
        _stacked([values for _, values, _, _ in kept], count),
        _stacked([scored for _, _, scored, _ in kept], count),
        _stacked([usual for _, _, _, usual in kept], count),
        [peaks.get(row, (0.0, scores.explain(row)))[1] for row in range(count)],
        [scores.explain(row) for row in range(count)],
    )


def _stacked(arrays: list[FloatArray], rows: int) -> FloatArray:
    """Arrays of growing capacity as one."""
    stacked = np.full((len(arrays), rows), np.nan)
    for index, array in enumerate(arrays):
        stacked[index, : min(rows, len(array))] = array[:rows]
    return stacked


def alerts(replayed: Replayed, threshold: float, hold: float) -> Iterator[Alert]:
    """What the rule would have raised, by row and time. `hold` is the rule's `for` in seconds."""
    times = replayed.times
    for row in range(replayed.scores.shape[1]):
        above = np.nan_to_num(replayed.scores[:, row]) > threshold
        edges = np.flatnonzero(np.diff(np.concatenate([[False], above, [False]]).astype(int)))
        for begin, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if times[stop - 1] - times[begin] >= hold:
                index = begin + int(np.argmax(replayed.scores[begin:stop, row]))
                yield Alert(
                    row,
                    float(times[begin]) + hold,
                    float(times[stop - 1]),
                    float(replayed.scores[index, row]),
                    index,
                )


def spec_of(query: Query, ttl: float) -> Spec:
    """What the unit of a query reads."""
    return Spec(
        name=query.name,
        roles={"value": query.expression},
        interval=query.interval,
        offset=query.offset,
        history=query.history,
        history_step=query.history_step,
        limit=query.limit,
        ttl=ttl,
        valid=(query.valid_min, query.valid_max),
        identity=query.direction.value,
    )
