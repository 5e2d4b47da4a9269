"""Backtests and explanations as text: pure functions over what `replay` found."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

import numpy as np

from anomaly_sidecar.interface import FloatArray, Labels, Query
from anomaly_sidecar.replay import Alert, Replayed
from anomaly_sidecar.scores import Reason

MAX_SERIES = 20
"""Series drawn, those with the highest scores first."""

_BARS = "▁▂▃▄▅▆▇█"
_MEANS = {
    "seasonal": "against what is usual at this time of day",
    "weekly": "against what is usual at this time of the week",
    "median": "against the median of a day",
    "short": "3 hours against 2 days",
    "long": "12 hours against 7 days",
}


@dataclass(frozen=True, slots=True)
class Look:
    """How wide the terminal is, and whether it takes colours."""

    width: int = 100
    colour: bool = False

    @staticmethod
    def of(stream: TextIO) -> Look:
        """For a stream: colours only on a terminal that wants them."""
        terminal = stream.isatty()
        width = shutil.get_terminal_size().columns if terminal else 100
        return Look(max(40, min(width, 160)), terminal and not os.environ.get("NO_COLOR"))

    def red(self, text: str) -> str:
        """What fired."""
        return f"\x1b[31m{text}\x1b[0m" if self.colour else text


def named(labels: Labels) -> str:
    """A series as PromQL writes it."""
    pairs = dict(labels)
    name = pairs.pop("metric", "")
    inner = ", ".join(f'{label}="{value}"' for label, value in pairs.items())
    return f"{name}{{{inner}}}" if inner or not name else name


def clock(at: float) -> str:
    """A time, to the minute."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def spark(values: FloatArray, width: int) -> str:
    """A series as one line: the largest value of each cell, blank where there is none."""
    with np.errstate(all="ignore"):
        low, high = np.nanmin(values), np.nanmax(values)
    line = []
    for cell in np.array_split(values, min(width, len(values))):
        known = cell[np.isfinite(cell)]
        if not len(known):
            line.append(" ")
            continue
        share = (known.max() - low) / (high - low) if high > low else 0.0
        line.append(_BARS[min(len(_BARS) - 1, int(share * len(_BARS)))])
    return "".join(line)


def marks(length: int, stretches: Sequence[tuple[int, int]], width: int, look: Look) -> str:
    """A line below a spark line with a mark in each cell that a stretch touches."""
    hit = np.zeros(length, bool)
    for begin, end in stretches:
        hit[begin : end + 1] = True
    cells = np.array_split(hit, min(width, length))
    return "".join(look.red("▲") if cell.any() else "·" for cell in cells)


def backtest(query: Query, found: Replayed, raised: Sequence[Alert], look: Look) -> str:
    """The drawing of a backtest."""
    days = (found.times[-1] - found.times[0]) / 86400.0
    rows = len(found.labels)
    lines = [
        f"{query.expression}",
        f"{clock(found.times[0])} to {clock(found.times[-1])} UTC, {rows} series: "
        f"{len(raised)} alerts, {len(raised) / max(days * rows, 1e-9):.2f} per series and day",
    ]
    order = sorted(range(rows), key=lambda row: -_highest(found.scores[:, row]))
    width = look.width - 10
    for row in order[:MAX_SERIES]:
        mine = [alert for alert in raised if alert.row == row]
        values = found.values[:, row]
        known = values[np.isfinite(values)]
        if not len(known):
            continue
        lines += ["", named(found.labels[row])[: look.width]]
        lines.append(f"{'value':<8}  {spark(values, width)}")
        stretches = [
            (int(np.searchsorted(found.times, alert.start)), int(np.searchsorted(found.times, alert.end)))
            for alert in mine
        ]
        lines.append(f"{'fired':<8}  {marks(len(values), stretches, width, look)}")
        highest = _highest(found.scores[:, row])
        lines.append(f"{'':<8}  {known.min():.4g} to {known.max():.4g}, highest score {highest:.2f}")
        for alert in mine[:5]:
            value, usual = found.values[alert.index, row], found.expected[alert.index, row]
            lines.append(
                f"{'':<8}  {clock(alert.start)} for {(alert.end - alert.start) / 60:.0f} min: "
                f"score {alert.peak:.2f}, {value:.4g} where {usual:.4g} is expected"
            )
        if len(mine) > 5:
            lines.append(f"{'':<8}  and {len(mine) - 5} more")
    if rows > MAX_SERIES:
        lines += ["", f"{rows - MAX_SERIES} further series are not drawn; --json has all alerts"]
    return "\n".join(lines) + "\n"


def _highest(scores: FloatArray) -> float:
    known = scores[np.isfinite(scores)]
    return float(known.max()) if len(known) else 0.0


def explain(query: Query, found: Replayed, look: Look) -> str:
    """The parts of the latest score of each series."""
    lines = []
    rows = range(len(found.labels))
    for row in sorted(rows, key=lambda row: -np.nan_to_num(found.scores[-1, row]))[:MAX_SERIES]:
        lines += _explained(query, found, row, look)
    if len(found.labels) > MAX_SERIES:
        lines.append(f"{len(found.labels) - MAX_SERIES} further series with lower scores")
    return "\n".join(lines) + "\n"


def _explained(query: Query, found: Replayed, row: int, look: Look) -> list[str]:
    at = clock(found.times[-1])
    value, usual, score = (array[-1, row] for array in (found.values, found.expected, found.scores))
    head = [named(found.labels[row])]
    if not np.isfinite(value):
        return [*head, f"  no sample at {at} UTC", ""]
    if not np.isfinite(score):
        return [
            *head,
            f"  {value:.6g} at {at} UTC; not ready: seen for less than a day, or with gaps only",
            "",
        ]
    text = f"score {score:.2f}"
    head.append(f"  {look.red(text) if score > 1 else text} at {at} UTC: {value:.6g}, expected {usual:.6g}")
    floor = max(query.min_deviation, query.min_relative_deviation * abs(usual))
    head.append(f"  deviations up to {floor:.4g} are no anomaly; direction {query.direction.value}")
    return [*head, *(f"  {line}" for line in reasons(found.latest[row])), ""]


def reasons(parts: Sequence[Reason]) -> list[str]:
    """A line per feature, the largest first."""
    return [
        f"{part.feature:<9} {part.deviation:+12.5g}  usual up to {part.usual:<10.5g} ratio "
        f"{part.ratio:5.2f}  {_MEANS[part.feature]}"
        if np.isfinite(part.ratio)
        else f"{part.feature:<9} {'not known yet':>12}"
        for part in parts
    ]


def as_json(found: Replayed, raised: Sequence[Alert]) -> dict[str, Any]:
    """All alerts, for programs."""
    return {
        "start": float(found.times[0]),
        "end": float(found.times[-1]),
        "series": len(found.labels),
        "alerts": [
            {
                "labels": dict(found.labels[alert.row]),
                "start": alert.start,
                "end": alert.end,
                "score": round(alert.peak, 3),
                "value": float(found.values[alert.index, alert.row]),
                "expected": float(found.expected[alert.index, alert.row]),
                "feature": found.reasons[alert.row][0].feature,
            }
            for alert in raised
        ],
    }
