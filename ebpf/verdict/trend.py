"""Judges a stretch of floors: is it a steady growth, such as a leak makes and nothing else for so long?

In flows a `Row`, out flows a `Trend` or the reason why it is none. Growth is called steady when it is

- large enough: `MIN_GROWTH` bytes and several times what floors scatter;
- spread: most intervals rise, none makes up most of it, nothing is given back;
- not slowing down: caches that fill, warm-ups and logarithmic growth slow down, leaks do not. Where the
  scatter allows, a bend of a tenth is seen. Before the stretch there must be a clear beginning, or growth at
  the same pace: a curve that has been bending all along looks straight in every short piece;
- not explained by more work: growth while more requests per second are served than ever before is load.

A leak per request bends with the load; so where requests are known, the same is tried against requests
served.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from ebpf.verdict.floors import BIN_SECONDS, Row

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
_ASLEEP = 0.7
"""Share of the highest floor below which an engine has given its memory back for a while."""
_CUT = 3.0
"""Median deviations from the line above which a single floor is cut."""
_SCATTER = 12.0
"""Growth must be so many times the scatter around the line."""
_LEAST_BEND = (0.9, 0.96)
"""Pace of the second half ÷ the first below which growth slows down: the lower where the scatter is large,
the upper where a small bend would be seen."""
_MOST_BEND = 1.22
"""Growth that becomes faster all the time is load that rises, or chance."""
_LEAST_MOST_BEND = 1.15
"""The same where requests are told, so that chance is in the scatter and not in the load: from here on, as
far as the scatter lets it be seen, it is memory that follows the load."""
_BEND_SIGMAS = 2.5
_MOST_BEND_ERROR = (0.14, 0.08)
"""Standard error of the bend above which nothing can be told from it: for the shortest stretch, and for
longer ones, which have grown more."""
_LOAD_FACTOR = 1.5
"""Memory that is in step with the load may grow by so many times the load's share."""
_SHARP_START = 2.5
"""A beginning is sharp if the pace before it was so many times faster, or a load or warm-up ended there."""
_SAME_PACE = 1.25
_DOUBT = 0.5
_STEP_SHARE = 0.7
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
    bend: float
    """Pace of the second half ÷ pace of the first."""
    straightness: float
    """Share of the variation that the line explains, 0 to 1."""
    per_request: float = math.nan
    """Bytes per request served; NaN if unknown."""


def judge(row: Row, count: int, kind: str) -> Trend | Why:
    """Judge the last `count` intervals of a row of floors of one kind of memory."""
    floors = row.floors[-count:]
    if len(floors) < count:
        return Why.SHORT
    if floors[-1] != floors[-1] and len(row.floors) > count:
        return judge(_without_last(row), count, kind)  # nothing was seen in it, so it tells nothing
    filled = _filled(floors)
    if filled is None:
        return Why.SHORT
    seconds = (count - 1) * row.seconds
    start = row.end - count * row.seconds
    filled = _without_bumps(filled, count // STRETCHES[0])
    times = [
        time - start if time == time else (i + 0.5) * row.seconds for i, time in enumerate(row.times[-count:])
    ]
    lasting = _lasting(filled)
    line = _Fit(times, lasting)
    growth = line.slope * seconds
    if growth < MIN_GROWTH or line.slope < MIN_SLOPE:
        return Why.FLAT
    if growth < _SCATTER * _Fit(times, filled).scatter or _largest_fall(filled) > _LARGEST_FALL * growth:
        return Why.SMALL
    if growth < _LOAD_FACTOR * _load_rise(row.work, count) * filled[-1]:
        return Why.LOAD
    rises = [b - a for a, b in pairwise(lasting)]
    mean = growth / (count - 1)
    if sum(rise > 0.1 * mean for rise in rises) < _RISING * (count - 1):
        return Why.STEPS
    if max(rises) > _LARGEST_RISE * growth:
        return Why.STEPS
    if row.doubt[-1] - row.doubt[-count] > _DOUBT * growth:
        return Why.DOUBT
    served = row.work[-count:]
    requests = served[-1] - served[0]
    by_request = requests == requests and requests >= 2 * count
    most_error = _MOST_BEND_ERROR[seconds > STRETCHES[0] * BIN_SECONDS]
    if not line.is_straight(most_error, by_request) and not (
        by_request and _Fit(served, lasting).is_straight(most_error, by_request)
    ):
        return Why.SLOWING
    began = _beginning(row, count, line, growth)
    if began is None or (began >= count // 3 and _slows(row.floors[-count - began :])):
        return Why.SLOWING
    lasts = seconds + row.seconds * began
    patience = FAST_SECONDS.get(kind, FAST_SECONDS_DEVICE)
    if line.slope > FAST and lasts < patience:
        return Why.FAST
    since = row.end - count * row.seconds - row.seconds * began
    per_request = growth / requests if by_request else math.nan
    return Trend(line.slope, growth, since, seconds, line.bend, line.straightness, per_request)


def _without_last(row: Row) -> Row:
    return Row(
        row.seconds,
        row.end - row.seconds,
        *(values[:-1] for values in (row.floors, row.times, row.work, row.doubt)),
    )


def _filled(floors: Sequence[float]) -> list[float] | None:
    """Floors with gaps filled in; None if there are too many.

    Intervals far below the others are gaps as well: the engine slept and gave its memory back for a while.
    """
    points: list[tuple[int, float]] = []
    highest = 0.0
    for i, floor in enumerate(floors):
        if floor >= _ASLEEP * highest:
            points.append((i, floor))
            highest = max(highest, floor)
    if len(points) < 0.7 * len(floors) or points[0][0] > 1 or points[-1][0] < len(floors) - 2:
        return None
    if len(points) == len(floors):
        return list(floors)
    filled: list[float] = []
    for (i, one), (j, other) in pairwise(points):
        filled += [one + (other - one) * k / (j - i) for k in range(j - i)]
    head, tail = points[0][0], len(floors) - points[-1][0]
    return [points[0][1]] * head + filled + [points[-1][1]] * tail


def _without_bumps(floors: Sequence[float], most: int) -> list[float]:
    """Floors without the `most` highest bumps of one interval: floors above both of their neighbours on a way
    up. In that interval no sample was without something temporary: what the next floor lacks was freed."""
    found = list(floors)
    for _ in range(most):
        heights = [
            (found[i] - (found[i - 1] + found[i + 1]) / 2, i)
            for i in range(1, len(found) - 1)
            if found[i] > found[i + 1] >= found[i - 1]
        ]
        if not heights:
            break
        _, i = max(heights)
        found[i] = (found[i - 1] + found[i + 1]) / 2
    return found


def _slows(floors: Sequence[float]) -> bool:
    """Whether growth slows down clearly over a longer stretch."""
    filled = _filled(floors)
    if filled is None:
        return False
    fit = _Fit(list(range(len(filled))), _lasting(filled))
    return fit.bend < min(1 - _BEND_SIGMAS * fit.bend_error, _LEAST_BEND[1])


def _lasting(floors: Sequence[float]) -> list[float]:
    """What of each floor was still there at the end: the least of it and all later ones. Single floors far
    above the others' line are cut: in that interval no sample was without something temporary."""
    if len(floors) < 3:
        return list(floors)
    rise = sorted(b - a for a, b in pairwise(floors))[(len(floors) - 1) // 2]
    off = [floor - rise * i for i, floor in enumerate(floors)]
    middle = sorted(off)[len(off) // 2]
    spread = sorted(abs(value - middle) for value in off)[len(off) // 2]
    lasting = [min(floor, middle + rise * i + _CUT * spread) for i, floor in enumerate(floors)]
    for i in range(len(lasting) - 2, -1, -1):
        lasting[i] = min(lasting[i], lasting[i + 1])
    return lasting


def _largest_fall(floors: Sequence[float]) -> float:
    peak, fall = floors[0], 0.0
    for floor in floors:
        peak = max(peak, floor)
        fall = max(fall, peak - floor)
    return fall


class _Fit:
    """Least squares: a line through the points, and the bend that a parabola adds to it."""

    __slots__ = ("bend", "bend_error", "scatter", "slope", "straightness")

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
        self.bend_error = 2 * self.scatter / math.sqrt(qq) / abs(linear) if linear else math.inf
        """Standard error of `bend`."""

    def is_straight(self, most_error: float, load_is_told: bool) -> bool:
        """Whether growth neither slows down nor quickens, as far as the scatter lets that be seen."""
        seen = _BEND_SIGMAS * self.bend_error
        least = min(max(1 - seen, _LEAST_BEND[0]), _LEAST_BEND[1])
        most = min(max(1 + seen, _LEAST_MOST_BEND), _MOST_BEND) if load_is_told else _MOST_BEND
        return self.bend_error <= most_error and least <= self.bend <= most


def _load_rise(work: Sequence[float], count: int) -> float:
    """By how much more requests were served in the last third of a stretch than in its first, as a share; 0
    where that is within what counts scatter, or unknown."""
    third = count // 3
    before = -count if len(work) > count else 0
    early = work[before + third] - work[before]
    late = work[-1] - work[-1 - third]
    if not late > 0 or not early >= 0:
        return 0.0
    if early == 0:
        return math.inf  # its first load
    return max(0.0, late / early - 1 - 0.5 * math.sqrt(1 / late + 1 / early))


def follows_load(row: Row, trend: Trend) -> bool:
    """Whether the load has been rising over a whole row, and memory no more than with it.

    A longer time tells what the scatter of counts hides in a stretch alone.
    """
    third = STRETCHES[0] // 3
    work = row.work
    if len(work) < 3 * third:
        return False
    late = work[-1] - work[-1 - third]
    before = [work[i] - work[i - third] for i in range(third, len(work) - third)]
    early = min((served for served in before if served > 0), default=0.0)
    if not early > 0 or late > 10 * early:  # unknown, or traffic has only begun
        return False
    rise = late / early - 1 - 3 * math.sqrt(1 / late + 1 / early)
    return rise > 0 and trend.growth < _LOAD_FACTOR * rise * row.floors[-1]


def _beginning(row: Row, count: int, line: _Fit, growth: float) -> int | None:
    """How many intervals before the stretch the line still fits; None if growth bends there instead of
    beginning.

    The line is drawn on into the past. Where the floors leave it, the pace before tells what they came
    from: a plateau, a fall or a step (a beginning), or a growth somewhat faster (a bend).
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
    before = _lasting([floor for floor in older[max(0, end - count // 2) : end + 1] if floor == floor])
    if len(before) < 3:
        return fits
    rises = [b - a for a, b in pairwise(before)]
    pace = sum(rises) / len(rises) / per_bin
    if pace <= _SAME_PACE or pace >= _SHARP_START:
        return fits
    excess = [rise - per_bin for rise in rises]
    return fits if max(excess) >= _STEP_SHARE * sum(excess) else None
