"""Online scores: how unusual is the latest value of each series, from five cheap features.

In flow frames of one query, out flows a score per series that means the same on every one: above 1 it
deviates more than it does about once in two weeks. All series are scored at once, with O(1) work and memory
per sample.

Features (signed deviations, in the series' unit):

| name | is |
|---|---|
| seasonal | value outside of what the daily profile (5-minute slots) expects around this time of day |
| weekly | value against the profile of the week (3-hour slots) |
| median | value against its running median of a day |
| short | mean of 3 hours against the mean of 2 days |
| long | mean of 12 hours against the mean of 7 days |

Each is divided by its own return level: the size that it exceeds once in `return_period`, an order statistic
of its maxima in blocks of 6 hours over 4 weeks (block maxima, as in extreme value theory). A block counts
from its end on, so that an anomaly does not hide itself while it lasts, and one long anomaly is a few
blocks, not thousands of samples. The ratios are combined by an 8-norm, close to the maximum but higher where
they agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.interface import (
    Column,
    Direction,
    FloatArray,
    Frame,
    Labels,
    Output,
    Query,
    RowArray,
    State,
    StateError,
)
from gpuglass.families import anomaly as families

HOUR = 3600.0
DAY = 86400.0

FEATURES = ("seasonal", "weekly", "median", "short", "long")

_SLOT = 300.0
_SLOTS = int(DAY / _SLOT)
_WEEK_SLOT = 3 * HOUR
_WEEK_SLOTS = int(7 * DAY / _WEEK_SLOT)
_MEANS = np.array([3 * HOUR, 12 * HOUR, 2 * DAY, 7 * DAY])
"""Time constants of the running means, in seconds: short, long, and what each is held against."""

_RESOLUTION = 1e-7
"""Deviations of a smaller share of the value are the rounding of float32 profiles."""

VERSION = 1


@dataclass(frozen=True, slots=True)
class Tuning:
    """Constants of the method. One set for all series: the benchmark is run with these defaults."""

    profile_days: float = 6.0
    """Memory of the daily profile."""
    week_samples: float = 108.0
    """Memory of a slot of the week: three weeks of 5-minute samples."""
    week_min: float = 3.0
    """Samples that a slot of the week needs before it expects anything."""
    winsor: float = 4.0
    """A profile takes in at most this many mean deviations of a sample."""
    median_days: float = 1.0
    block: float = 6 * HOUR
    blocks: int = 112
    return_period: float = 14 * DAY
    min_blocks: int = 4
    """Blocks that a feature needs before it counts."""
    growth: float = 0.04
    """By which share a return level lies above the largest of e times fewer blocks."""
    norm: float = 8.0
    margin: float = 1.2
    """By which the combined ratio exceeds its return level before the score is 1."""
    cap: float = 5.0
    """Highest ratio of one feature: a score says how unusual, not how many times larger."""
    spread_floor: float = 0.1
    """A return level is at least this share of the series' mean absolute deviation: smooth series creep."""
    warm_up: float = DAY


@dataclass(frozen=True, slots=True)
class Reason:
    """One feature's part in a score."""

    feature: str
    deviation: float
    """In the series' unit, signed."""
    usual: float
    """Size that deviations of this kind exceed about once in two weeks."""
    ratio: float


class Scores:
    """Analyzer with the single role "value"."""

    def __init__(self, query: Query, tuning: Tuning = Tuning()) -> None:
        self.query = query
        self.tuning = tuning
        self._capacity = 0
        self._allocate(0)
        self._live = np.zeros(0, bool)

    # Rows

    def _allocate(self, rows: int) -> None:
        t = self.tuning
        nan = np.nan
        self._a: dict[str, NDArray[Any]] = {
            "first": np.full(rows, nan),
            "last": np.full(rows, nan),
            "spread": np.zeros(rows),
            "spread_weight": np.zeros(rows),
            "residual": np.zeros(rows),
            "residual_weight": np.zeros(rows),
            "median": np.full(rows, nan),
            "median_scale": np.zeros(rows),
            "median_weight": np.zeros(rows),
            "mean": np.zeros((len(_MEANS), rows)),
            "mean_weight": np.zeros((len(_MEANS), rows)),
            "day": np.full((_SLOTS, rows), nan, np.float32),
            "day_weight": np.zeros((_SLOTS, rows), np.float32),
            "week": np.full((_WEEK_SLOTS, rows), nan, np.float32),
            "week_weight": np.zeros((_WEEK_SLOTS, rows), np.float32),
            "block": np.full(rows, -1, np.int64),
            "blocks_seen": np.zeros(rows, np.int64),
            "blocks_known": np.zeros((len(FEATURES), rows), np.int64),
            "block_max": np.full((len(FEATURES), rows), nan, np.float32),
            "maxima": np.zeros((t.blocks, len(FEATURES), rows), np.float32),
            "usual": np.full((len(FEATURES), rows), nan),
            # What `outputs` and `explain` show of the latest frame.
            "score": np.full(rows, nan),
            "expected": np.full(rows, nan),
            "deviation": np.full((len(FEATURES), rows), nan),
            "ratio": np.full((len(FEATURES), rows), nan),
        }

    def admit(self, rows: RowArray, labels: Sequence[Labels], capacity: int) -> None:
        """See `Analyzer`."""
        if capacity > self._capacity:
            old, had = self._a, self._capacity
            self._allocate(capacity)
            for name, array in old.items():
                self._a[name][..., :had] = array
            self._live = np.concatenate([self._live, np.zeros(capacity - had, bool)])
            self._capacity = capacity
        self._clear(rows)

    def evict(self, rows: RowArray) -> None:
        """See `Analyzer`."""
        self._clear(rows)

    def _clear(self, rows: RowArray) -> None:
        if not len(rows):
            return
        for name, array in self._a.items():
            array[..., rows] = _EMPTY.get(name, 0)
        self._live[rows] = False

    # Samples

    def observe(self, frame: Frame) -> None:
        """See `Analyzer`."""
        self.step(frame.time, frame.values["value"])

    def step(self, time: float | FloatArray, values: FloatArray) -> FloatArray:
        """Take in one sample per series, shape (rows,), and give the scores; NaN where there is none.

        `time` is one for all, or one per row: the benchmark runs series of different times side by side.
        """
        a, t = self._a, self.tuning
        rows = np.arange(self._capacity)
        x = np.asarray(values, float)
        ok = np.isfinite(x)
        self._live = ok
        at = np.broadcast_to(np.asarray(time, float), x.shape)
        at = np.where(ok, at, 0.0)

        new = ok & np.isnan(a["first"])
        a["first"][new] = at[new]
        elapsed = at - a["first"]
        since = np.where(np.isnan(a["last"]), _SLOT, at - a["last"])
        dt = np.where(ok, np.clip(since, 1.0, DAY), 0.0)
        a["last"][ok] = at[ok]

        expected, deviation = self._deviations(x, at, ok, dt, rows)
        size = self._sizes(deviation)

        spread = a["spread"] / np.maximum(a["spread_weight"], 1e-12)
        usual = np.fmax(a["usual"], np.fmax(t.spread_floor * spread, _RESOLUTION * np.abs(x)))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(usual > 0, size / usual, np.where(size > 0, np.inf, 0.0))
        ratio = np.where(np.isnan(size) | np.isnan(a["usual"]), np.nan, np.minimum(ratio, t.cap))
        powers = np.where(np.isnan(ratio), 0.0, ratio) ** t.norm
        score = powers.sum(0) ** (1 / t.norm) / t.margin

        floor = np.fmax(self.query.min_deviation, self.query.min_relative_deviation * np.abs(expected))
        largest = np.where(np.isnan(size), 0.0, size).max(0)
        score = np.where(largest <= floor, np.minimum(score, 1.0), score)
        ready = ok & (elapsed >= t.warm_up) & np.isfinite(a["usual"]).any(0)
        scores: FloatArray = np.where(ready, score, np.nan)
        a["score"] = scores
        a["expected"] = np.where(ok, expected, np.nan)
        a["deviation"], a["ratio"] = deviation, ratio

        self._update_blocks(at, ok, size)
        return scores

    def _deviations(
        self, x: FloatArray, at: FloatArray, ok: NDArray[np.bool_], dt: FloatArray, rows: RowArray
    ) -> tuple[FloatArray, FloatArray]:
        """Expected value, shape (rows,), and deviations, shape (features, rows); updates their sources."""
        a, t = self._a, self.tuning
        day, day_weight, week, week_weight = a["day"], a["day_weight"], a["week"], a["week_weight"]
        share = np.minimum(dt / _SLOT, 1.0)

        slot = (at % DAY // _SLOT).astype(np.intp)
        here = day[slot, rows].astype(float)
        before = day[slot - 1, rows]
        after = day[(slot + 1) % _SLOTS, rows]
        high = np.fmax(np.fmax(here, before), after)
        low = np.fmin(np.fmin(here, before), after)
        seasonal = np.maximum(x - high, 0.0) + np.minimum(x - low, 0.0)
        residual = x - here
        known = ok & np.isfinite(residual)
        seasonal = np.where(known, seasonal, np.nan)

        week_slot = (at % (7 * DAY) // _WEEK_SLOT).astype(np.intp)
        week_here = week[week_slot, rows].astype(float)
        week_n = week_weight[week_slot, rows].astype(float)
        week_residual = x - week_here
        weekly = np.where(week_n >= t.week_min, week_residual, np.nan)

        # The profiles take in a sample up to some mean deviations, which it cannot widen by itself.
        settled = a["residual_weight"] >= 0.02
        scale = a["residual"] / np.maximum(a["residual_weight"], 1e-12)
        bound = np.where(settled, t.winsor * scale, np.inf)
        bounded = np.clip(residual, -bound, bound)
        rate = 1 - np.exp(-dt / (2 * DAY))
        a["residual"] = np.where(known, a["residual"] * (1 - rate) + rate * np.abs(bounded), a["residual"])
        a["residual_weight"] = np.where(known, a["residual_weight"] * (1 - rate) + rate, a["residual_weight"])

        seen = day_weight[slot, rows] + share
        gain = share / np.clip(seen, 1e-9, t.profile_days)
        updated = np.where(np.isnan(here), x, here + np.minimum(gain, 1.0) * bounded)
        day[slot[ok], rows[ok]] = updated[ok]
        day_weight[slot[ok], rows[ok]] = seen[ok]

        seen = week_n + share
        gain = share / np.clip(seen, 1e-9, t.week_samples)
        bounded = np.clip(week_residual, -bound, bound)
        updated = np.where(np.isnan(week_here), x, week_here + np.minimum(gain, 1.0) * bounded)
        week[week_slot[ok], rows[ok]] = updated[ok]
        week_weight[week_slot[ok], rows[ok]] = seen[ok]

        median = self._median(x, ok, dt)

        keep = np.exp(-dt / _MEANS[:, None])
        filled = np.where(ok, x, 0.0)
        a["mean"] = keep * a["mean"] + (1 - keep) * filled
        a["mean_weight"] = keep * a["mean_weight"] + (1 - keep)
        means = a["mean"] / np.maximum(a["mean_weight"], 1e-12)
        short, long = means[0] - means[2], means[1] - means[3]

        rate = 1 - keep[3]
        a["spread"] = a["spread"] * (1 - rate) + rate * np.abs(filled - means[3])
        a["spread_weight"] = a["spread_weight"] * (1 - rate) + rate

        deviation = np.stack([seasonal, weekly, median, short, long])
        expected = np.where(known, here, means[2])
        return expected, np.where(ok, deviation, np.nan)

    def _median(self, x: FloatArray, ok: NDArray[np.bool_], dt: FloatArray) -> FloatArray:
        """Deviation from the running median, a tracker whose steps are bounded by the usual deviation."""
        a = self._a
        error: FloatArray = x - a["median"]
        known = ok & np.isfinite(error)
        rate = 1 - np.exp(-dt / (self.tuning.median_days * DAY))
        young = a["median_weight"] < 0.1
        scale = a["median_scale"] / np.maximum(a["median_weight"], 1e-12)
        step = np.where(young, np.maximum(rate, 0.02) * 3 * error, 3 * rate * np.clip(error, -scale, scale))
        a["median"] = np.where(ok, np.where(np.isnan(a["median"]), x, a["median"] + step), a["median"])
        size = np.abs(error)
        size = np.where(young, size, np.minimum(size, 6 * scale))
        a["median_scale"] = np.where(known, a["median_scale"] * (1 - rate) + rate * size, a["median_scale"])
        a["median_weight"] = np.where(known, a["median_weight"] * (1 - rate) + rate, a["median_weight"])
        return error

    def _sizes(self, deviation: FloatArray) -> FloatArray:
        """Deviations to the side that the query asks about."""
        if self.query.direction is Direction.ABOVE:
            return np.maximum(deviation, 0.0)
        if self.query.direction is Direction.BELOW:
            return np.maximum(-deviation, 0.0)
        return np.abs(deviation)

    # Return levels

    def _update_blocks(self, at: FloatArray, ok: NDArray[np.bool_], size: FloatArray) -> None:
        a, t = self._a, self.tuning
        block = (at // t.block).astype(np.int64)
        ended = np.flatnonzero(ok & (a["block"] != block) & (a["block"] >= 0))
        if len(ended):
            largest = a["block_max"][:, ended]
            a["blocks_known"][:, ended] += np.isfinite(largest)
            a["maxima"][a["blocks_seen"][ended] % t.blocks, :, ended] = np.nan_to_num(largest).T
            a["blocks_seen"][ended] += 1
            a["block_max"][:, ended] = np.nan
            for part in np.array_split(ended, len(ended) // 4096 + 1):
                a["usual"][:, part] = self._return_levels(part)
        a["block"][ok] = block[ok]
        np.fmax(a["block_max"], np.where(ok, size, np.nan), out=a["block_max"], casting="same_kind")

    def _return_levels(self, rows: RowArray) -> FloatArray:
        """Size exceeded once per return period, shape (features, rows): the k-th largest block, interpolated.

        Over n return periods k is n. For a series younger than one period it is its maximum and some more, as
        block maxima grow with the logarithm of their number. NaN before a feature was known for `min_blocks`.
        """
        a, t = self._a, self.tuning
        used = int(np.minimum(a["blocks_seen"][rows], t.blocks).max())
        periods = np.minimum(a["blocks_known"][:, rows], t.blocks) * t.block / t.return_period
        rank = np.maximum(periods - 1.0, 0.0)
        depth = min(int(np.ceil(t.blocks * t.block / t.return_period)) + 1, used)
        top = np.sort(
            np.partition(a["maxima"][:used][..., rows], used - depth, axis=0)[used - depth :], axis=0
        )
        whole = np.minimum(rank.astype(np.intp), depth - 1)
        following = np.minimum(whole + 1, depth - 1)
        feature, column = np.arange(len(FEATURES))[:, None], np.arange(len(rows))
        first = top[depth - 1 - whole, feature, column].astype(float)
        second = top[depth - 1 - following, feature, column]
        levels = first + (rank - whole) * (second - first)
        levels *= 1.0 + t.growth * np.log(1.0 / np.clip(periods, 1e-3, 1.0))
        known: FloatArray = np.where(a["blocks_known"][:, rows] >= t.min_blocks, levels, np.nan)
        return known

    # What comes out

    def outputs(self) -> Iterable[Output]:
        """See `Analyzer`."""
        a = self._a
        ready = np.isfinite(a["score"])
        yield Column(families.SCORE, a["score"])
        yield Column(families.READY, np.where(self._live, ready.astype(float), np.nan))
        if self.query.bands:
            spread = a["spread"] / np.maximum(a["spread_weight"], 1e-12)
            usual = np.fmax(a["usual"][0], self.tuning.spread_floor * spread) * self.tuning.margin
            floor = np.fmax(
                self.query.min_deviation, self.query.min_relative_deviation * np.abs(a["expected"])
            )
            half = np.where(ready, np.fmax(usual, floor), np.nan)
            yield Column(families.EXPECTED, np.where(ready, a["expected"], np.nan))
            if self.query.direction is not Direction.ABOVE:
                yield Column(families.LOWER, a["expected"] - half)
            if self.query.direction is not Direction.BELOW:
                yield Column(families.UPPER, a["expected"] + half)

    def explain(self, row: int) -> list[Reason]:
        """What the latest score of a row is made of, the largest part first."""
        a = self._a
        reasons = [
            Reason(
                name,
                float(a["deviation"][index, row]),
                float(a["usual"][index, row]),
                float(a["ratio"][index, row]),
            )
            for index, name in enumerate(FEATURES)
        ]
        return sorted(reasons, key=lambda reason: -np.nan_to_num(reason.ratio, nan=-1.0))

    def ratios(self) -> FloatArray:
        """Features of the latest frame against their return levels, shape (features, rows)."""
        ratios: FloatArray = self._a["ratio"]
        return ratios

    def expected_values(self) -> FloatArray:
        """Values that were expected at the latest frame, shape (rows,)."""
        expected: FloatArray = self._a["expected"]
        return expected

    # State

    def save(self) -> State:
        """See `Analyzer`."""
        return State({**self._a, "live": self._live}, {"version": VERSION})

    def restore(self, state: State) -> None:
        """See `Analyzer`."""
        if state.meta.get("version") != VERSION:
            raise StateError(f"scores of version {state.meta.get('version')}, this is {VERSION}")
        for name, own in {**self._a, "live": self._live}.items():
            stored = state.arrays.get(name)
            if stored is None or stored.dtype != own.dtype or stored.shape[:-1] != own.shape[:-1]:
                raise StateError(f"scores: the array {name} is missing or has another shape")
            if stored.shape[-1] > self._capacity:
                raise StateError(f"scores: {stored.shape[-1]} rows are more than {self._capacity}")
        for name, own in {**self._a, "live": self._live}.items():
            stored = state.arrays[name]
            own[..., : stored.shape[-1]] = stored


_EMPTY: dict[str, float] = {
    **dict.fromkeys(("first", "last", "median", "day", "week", "usual", "score", "expected"), np.nan),
    **dict.fromkeys(("deviation", "ratio", "block_max"), np.nan),
    "block": -1,
}
"""What a row without a series holds, where it is not 0."""
