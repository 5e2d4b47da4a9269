"""Judges a stretch of floors: is it a steady growth, such as a leak makes and nothing else for so long?

In flows a `Row`, out flows a `Trend` or the reason why it is none. Growth is called steady when it is

- large enough: `MIN_GROWTH` bytes and several times what floors scatter;
- spread: most intervals rise, none makes up most of it, nothing is given back;
- not slowing down: caches that fill, warm-ups and logarithmic growth slow down, leaks do not. Where the
  scatter allows, a bend of a tenth is seen. Before the stretch there must be a clear beginning, or growth at
  the same pace: a curve that has been bending all along looks straight in every short piece;
- not explained by more work: growth while more requests per second are served than ever before is load.

A leak per request bends with the load; so where requests are known, the same is tried against requests served.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ebpf.verdict.floors import Row

MIB = 1 << 20
GIB = 1 << 30
HOUR = 3600.0

STRETCHES = (12, 18)
"""Intervals of a stretch: with scales that double, each is 1.3 to 1.5 times as long as the one before."""
MIN_GROWTH = 144 * MIB
"""1 GiB/h grows by 188 MiB between the floors of the first and the last of 12 minutes."""
MIN_SLOPE = 48 * MIB / HOUR
"""Bytes per second below which nobody is accused."""
FAST = 6 * GIB / HOUR
"""Above it growth is more likely a cache being filled than a leak, and has to last longer."""
FAST_SECONDS = {"host": 5400.0, "managed": 5400.0}
FAST_SECONDS_DEVICE = 1800.0
"""How long fast growth has to last; large caches live in host memory."""

_RISING = 0.6
"""Share of intervals that have to rise."""
_LARGEST_RISE = 0.34
"""Share of the growth that one interval may bring."""
_LARGEST_FALL = 0.25
_SCATTER = 5.0
"""Growth must be so many times the scatter around the line."""
_BEND = 0.72
"""Pace of the second half ÷ the first below which growth slows down, whatever the scatter."""
_BEND_SEEN = 0.93
"""The same where the bend stands out of the scatter."""
_BEND_T = 3.0
_SHARP_START = 2.5
"""A beginning is sharp if the pace before it was so many times faster, or a load or warm-up ended there."""
_SAME_PACE = 1.25
_STEP_SHARE = 0.55
"""Share of the excess before the beginning that one interval has if it was a step and not a curve."""


class Why(StrEnum):
    """Why a stretch is no steady growth. What follows `GROWING` is growth all the same."""

    SHORT = "short"
    """Not enough intervals with samples."""
    FLAT = "flat"
    SMALL = "small"
    """Growth within the scatter, or given back."""
    GROWING = "growing"
    STEPS = "steps"
    """In too few steps."""
    SLOWING = "slowing"
    FAST = "fast"
    """So fast that it is more likely a cache being filled, and too short to tell."""
    LOAD = "load"
    """More requests are served than ever before."""
    DOUBT = "doubt"
    """The ledger missed allocations or frees that could explain it."""


@dataclass(frozen=True, slots=True)
class Trend:
    """A steady growth."""

    slope: float
    """Bytes per second."""
    growth: float
    """Bytes over the stretch."""
    since: float
    """Seconds on the samples' clock: when it began, as far back as the line fits."""
    seconds: float
    """Length of the stretch."""
    straightness: float
    """Share of the variation that the line explains, 0 to 1."""
    per_request: float = math.nan
    """Bytes per request served; NaN if unknown."""


def judge(row: Row, count: int, kind: str) -> Trend | Why:
    """Judge the last `count` intervals of a row of floors of one kind of memory."""
    floors = row.floors[-count:]
    if len(floors) < count:
        return Why.SHORT
    filled = _filled(floors)
    if filled is None:
        return Why.SHORT
    seconds = (count - 1) * row.seconds
    times = [i * row.seconds for i in range(count)]
    line = _Fit(times, filled)
    growth = line.slope * seconds
    if growth < MIN_GROWTH or line.slope < MIN_SLOPE:
        return Why.FLAT
    if growth < _SCATTER * line.scatter or _largest_fall(filled) > _LARGEST_FALL * growth:
        return Why.SMALL
    explained = _growth_by_load(row, filled, count)
    if growth - explained < max(MIN_GROWTH, 0.6 * growth):
        return Why.LOAD
    rises = [b - a for a, b in zip(filled, filled[1:], strict=False)]
    mean = growth / (count - 1)
    if sum(rise > 0.1 * mean for rise in rises) < _RISING * (count - 1):
        return Why.STEPS
    if max(rises) > _LARGEST_RISE * growth:
        return Why.STEPS
    if row.doubt[-1] - row.doubt[-count] > 0.3 * growth:
        return Why.DOUBT
    is_straight = not line.bends
    served = row.work[-count:]
    requests = served[-1] - served[0]
    by_request = requests == requests and requests >= 2 * count
    if not is_straight and by_request and not _Fit(served, filled).bends:
        is_straight = True
    if not is_straight:
        return Why.SLOWING
    began = _beginning(row, count, line, growth)
    if began is None:
        return Why.SLOWING
    lasts = seconds + row.seconds * began
    patience = FAST_SECONDS.get(kind, FAST_SECONDS_DEVICE)
    if line.slope > FAST and lasts < patience:
        return Why.FAST
    since = row.end - count * row.seconds - row.seconds * began
    per_request = growth / requests if by_request else math.nan
    return Trend(line.slope, growth, since, seconds, line.straightness, per_request)


def _filled(floors: Sequence[float]) -> list[float] | None:
    """Floors with gaps filled in; None if there are too many.

    Intervals far below the others are gaps as well: the engine slept and gave its memory back for a while.
    """
    known = sorted(floor for floor in floors if floor == floor)
    if not known:
        return None
    asleep = 0.7 * known[len(known) // 2]
    points = [(i, floor) for i, floor in enumerate(floors) if floor >= asleep]
    if len(points) < 0.7 * len(floors) or points[0][0] > 1 or points[-1][0] < len(floors) - 2:
        return None
    if len(points) == len(floors):
        return list(floors)
    filled: list[float] = []
    for (i, one), (j, other) in zip(points, points[1:], strict=False):
        filled += [one + (other - one) * k / (j - i) for k in range(j - i)]
    head, tail = points[0][0], len(floors) - points[-1][0]
    return [points[0][1]] * head + filled + [points[-1][1]] * tail


def _largest_fall(floors: Sequence[float]) -> float:
    peak, fall = floors[0], 0.0
    for floor in floors:
        peak = max(peak, floor)
        fall = max(fall, peak - floor)
    return fall


class _Fit:
    """Least squares: a line through the points, and the bend that a parabola adds to it."""

    __slots__ = ("bend", "bend_t", "scatter", "slope", "straightness")

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        n = len(xs)
        mean_x, mean_y = sum(xs) / n, sum(ys) / n
        half = (xs[-1] - xs[0]) / 2 or 1.0
        # Orthogonal polynomials on any points: u is the linear one, q what is left of u² beside 1 and u.
        us = [(x - mean_x) / half for x in xs]
        vs = [y - mean_y for y in ys]
        uu = sum(u * u for u in us) or 1.0
        squares = [u * u for u in us]
        mean_square = uu / n
        tilt = sum(u * s for u, s in zip(us, squares, strict=True)) / uu
        qs = [s - mean_square - tilt * u for u, s in zip(us, squares, strict=True)]
        qq = sum(q * q for q in qs) or 1.0
        linear = sum(u * v for u, v in zip(us, vs, strict=True)) / uu
        square = sum(q * v for q, v in zip(qs, vs, strict=True)) / qq
        vv = sum(v * v for v in vs)
        left_of_line = max(0.0, vv - linear * linear * uu)
        left = max(0.0, left_of_line - square * square * qq) / (n - 3)
        self.slope = linear / half
        """Units of y per unit of x."""
        self.scatter = math.sqrt(left)
        self.straightness = 1.0 - left_of_line / vv if vv else 0.0
        first, second = linear - square, linear + square
        self.bend = second / first if first > 0 else math.inf if second > 0 else 0.0
        """Pace of the second half ÷ pace of the first."""
        # Sizes come in pages and segments: a bend within rounding is none.
        noise = max(self.scatter, 1e-3 * abs(linear))
        self.bend_t = square * math.sqrt(qq) / noise if noise > 0 else 0.0

    @property
    def bends(self) -> bool:
        """Whether growth slows down."""
        return self.bend < _BEND or (self.bend < _BEND_SEEN and self.bend_t < -_BEND_T)


def _growth_by_load(row: Row, filled: Sequence[float], count: int) -> float:
    """Growth in intervals in which more requests were served than in any interval before."""
    work = row.work
    if len(work) < 2 or work[-1] != work[-1]:
        return 0.0
    highest, by_load = 0.0, 0.0
    start = len(work) - count
    for i in range(1, len(work)):
        served = work[i] - work[i - 1]
        if served != served:
            continue
        # A count scatters by its root; a tenth more is the same load.
        if served > 1.1 * highest + 2 * math.sqrt(highest) and i > start and highest > 0:
            by_load += max(0.0, filled[i - start] - filled[i - start - 1])
        highest = max(highest, served)
    return by_load


def _beginning(row: Row, count: int, line: _Fit, growth: float) -> int | None:
    """How many intervals before the stretch the line still fits; None if growth bends there instead of
    beginning.

    The line is drawn on into the past. Where the floors leave it, the pace before tells what they came from: a
    plateau, a fall or a step (a beginning), or a growth somewhat faster (a bend).
    """
    older = row.floors[: len(row.floors) - count]
    stretch = [floor for floor in row.floors[-count:] if floor == floor]
    if not older or not stretch:
        return 0
    per_bin = line.slope * row.seconds
    middle = sum(stretch) / len(stretch)
    tolerance = max(0.25 * growth, 3 * line.scatter)
    fits = 0
    for back in range(1, len(older) + 1):
        floor = older[-back]
        expected = middle - per_bin * ((count - 1) / 2 + back)
        if floor == floor and abs(floor - expected) > tolerance:
            break
        fits = back
    else:
        return fits
    end = len(older) - fits
    before = [floor for floor in older[max(0, end - count // 2) : end + 1] if floor == floor]
    if len(before) < 3:
        return fits
    rises = [b - a for a, b in zip(before, before[1:], strict=False)]
    pace = sum(rises) / len(rises) / per_bin
    if pace <= _SAME_PACE or pace >= _SHARP_START:
        return fits
    excess = [rise - per_bin for rise in rises]
    return fits if max(excess) >= _STEP_SHARE * sum(excess) else None
