"""Peaks that come back: the same hours of the day, or of one weekday, again and again.

In flow samples; out flow, per series, the window of hours in which it peaks, on how many of the observed days
it did, and how much of its variation the recurring hours explain ("fragmentation from 19:00 to 21:00"). By
chance the same hour is the largest on three days in 1 of 600 cases, so three repeats are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.models.history import Floats

HOURS = 24
DAYS = 28
"""Kept: four weeks, so that each weekday was seen four times."""
REPEATS = 3
"""Days with the peak that are needed; of one weekday: weeks."""
DAILY_DAYS = 7
"""Latest days that a daily peak is judged by."""
SHARE = 0.6
"""Share of the observed days that must have it."""
ABOVE = 4.0
"""An hour peaks when it lies above the day's median by so many times the usual spread of the day's hours …"""
ABOVE_RELATIVE = 0.1
"""… and by this share of the median: on a flat series every grain is a peak."""
LONGEST = 8
"""Hours of a peak; what is high for longer is a level."""
MIN_HOURS = 18
"""Observed hours that a day needs to be judged."""
WEEK = 7


@dataclass(slots=True)
class Recurrences:
    """State and verdicts; arrays have one row per series."""

    means: NDArray[np.float32]
    """(rows, DAYS, HOURS) means by local day modulo DAYS and hour; NaN where nothing came."""
    total: Floats
    count: Floats
    """(rows,) sum and number of the open hour's samples."""
    start: NDArray[np.int64]
    """(rows,) first hour of the declared window; -1 where none is."""
    hours: NDArray[np.int64]
    """(rows,) its length."""
    weekday: NDArray[np.int64]
    """(rows,) 0 (Monday) to 6, or -1 for every day."""
    repeats: NDArray[np.int64]
    """(rows,) days with the peak."""
    strength: Floats
    """(rows,) share of the variance that the window explains, 0–1."""
    hour: int = -1
    """Number of the open hour since 1970 in local time."""

    @classmethod
    def empty(cls, rows: int) -> Recurrences:
        """Nothing seen."""
        return cls(
            means=np.full((rows, DAYS, HOURS), np.nan, np.float32),
            total=np.zeros(rows),
            count=np.zeros(rows),
            start=np.full(rows, -1, np.int64),
            hours=np.zeros(rows, np.int64),
            weekday=np.full(rows, -1, np.int64),
            repeats=np.zeros(rows, np.int64),
            strength=np.full(rows, np.nan),
        )

    def observe(self, local: float, values: Floats) -> None:
        """Samples (rows,) at `local`, seconds since 1970 in local time; NaN is a gap."""
        hour = int(local // 3600)
        if hour < self.hour:
            return  # the clock was put back: that hour was counted already
        if self.hour >= 0 and hour > self.hour:
            self._close(hour)
        self.hour = hour
        there = ~np.isnan(values)
        self.total += np.where(there, values, 0.0)
        self.count += there

    def _close(self, hour: int) -> None:
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.total / self.count
        day, of_day = divmod(self.hour, HOURS)
        self.means[:, day % DAYS, of_day] = mean
        self.total[:] = 0.0
        self.count[:] = 0.0
        for number in range(self.hour + 1, min(hour, self.hour + DAYS * HOURS) + 1):
            later, slot = divmod(number, HOURS)
            self.means[:, later % DAYS, slot] = np.nan
        if hour // HOURS > day:
            self._judge(day)

    def _judge(self, last: int) -> None:
        """At the end of the local day `last`."""
        days = np.arange(last - DAYS + 1, last + 1)
        means = self.means[:, days % DAYS].astype(np.float64)
        peaks, observed = peaking(means)
        recent = slice(DAYS - DAILY_DAYS, None)
        self.start[:], self.hours[:], self.repeats[:] = window(peaks[:, recent], observed[:, recent])
        self.weekday[:] = -1
        found = self.start >= 0
        for weekday in range(WEEK):
            of_day = (days + 3) % WEEK == weekday  # 1970-01-01 was a Thursday
            start, hours, repeats = window(peaks[:, of_day], observed[:, of_day])
            better = ~found & (start >= 0) & ((self.start < 0) | (repeats > self.repeats))
            self.start[better], self.hours[better] = start[better], hours[better]
            self.repeats[better], self.weekday[better] = repeats[better], weekday
        self.strength[:] = np.nan
        for row in np.flatnonzero(self.start >= 0):
            chosen = (
                (days + 3) % WEEK == self.weekday[row] if self.weekday[row] >= 0 else days > last - DAILY_DAYS
            )
            self.strength[row] = strength(means[row, chosen], int(self.start[row]), int(self.hours[row]))


def peaking(means: Floats) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(rows, days, hours) hours that stand out of their day, and (rows, days) days that can be judged.

    A day's spread is the median distance of its hours from their median: a peak of some hours does not
    move it."""
    observed = (~np.isnan(means)).sum(axis=2) >= MIN_HOURS
    whole = np.where(observed[..., None], means, 0.0)
    middle = _nanmedian(whole)[..., None]
    spread = _nanmedian(np.abs(whole - middle))[..., None]
    above = np.nan_to_num(whole - middle, nan=-np.inf)
    peaks = (above > ABOVE * spread) & (above > ABOVE_RELATIVE * np.abs(middle)) & (above > 0.0)
    peaks &= observed[..., None] & (peaks.sum(axis=2, keepdims=True) <= LONGEST)
    return peaks, observed


def _nanmedian(values: Floats) -> Floats:
    """Median over the last axis, gaps left out; for days with hours enough never of nothing."""
    ordered = np.sort(values, axis=-1)
    count = np.maximum((~np.isnan(values)).sum(axis=-1), 1)
    low = np.take_along_axis(ordered, ((count - 1) // 2)[..., None], axis=-1)[..., 0]
    high = np.take_along_axis(ordered, (count // 2)[..., None], axis=-1)[..., 0]
    middle: Floats = (low + high) / 2
    return middle


def window(
    peaks: NDArray[np.bool_], observed: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Start, length and repeats (rows,) of the hours that peaked on enough of the days; start -1 without any.

    `peaks` (rows, days, hours), `observed` (rows, days). The window may go over midnight."""
    repeats = peaks.sum(axis=1)
    days = observed.sum(axis=1)
    recurring = (repeats >= REPEATS) & (repeats >= SHARE * days[:, None])
    strongest = np.where(recurring, repeats, -1).argmax(axis=1)
    rows = np.arange(len(peaks))
    found = recurring[rows, strongest]
    start, end = strongest.copy(), strongest.copy()
    open_start, open_end = found.copy(), found.copy()
    for _ in range(LONGEST):
        open_start &= recurring[rows, (start - 1) % HOURS] & (end - start < HOURS - 1)
        start -= open_start
        open_end &= recurring[rows, (end + 1) % HOURS] & (end - start < HOURS - 1)
        end += open_end
    return (
        np.where(found, start % HOURS, -1),
        np.where(found, end - start + 1, 0),
        np.where(found, repeats[rows, strongest], 0),
    )


def strength(means: Floats, start: int, hours: int) -> float:
    """Share of the variance of hourly means (days, hours) that lies between the window and the rest of
    the day."""
    inside = np.zeros(HOURS, bool)
    inside[(start + np.arange(hours)) % HOURS] = True
    there = ~np.isnan(means)
    total = means[there]
    variance = float(total.var()) if total.size else 0.0
    if variance <= 0.0:
        return 0.0
    within = 0.0
    for part in (means[:, inside], means[:, ~inside]):
        values = part[~np.isnan(part)]
        within += float(((values - values.mean()) ** 2).sum()) if values.size else 0.0
    return max(0.0, 1.0 - within / (variance * total.size))
