"""The history of one process's live bytes at several resolutions, bounded for any length of life.

In flow samples (time, bytes, and what goes with them); out flow rows of floors: the least bytes in each
interval, which is what is left when everything temporary has been freed. Scale k has intervals of
`BIN_SECONDS`·2^k and keeps `BINS` of them: the first reaches back half an hour by the minute, the last three
days by two hours. A complete interval is handed on to the next scale, so a sample costs the same however long
the history is.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

BIN_SECONDS = 60.0
SCALES = 8
BINS = 36
_NAN = math.nan


@dataclass(frozen=True, slots=True)
class Row:
    """Complete intervals of one scale, oldest first; NaN where nothing is known."""

    seconds: float
    """Length of an interval."""
    end: float
    """When the last one ended."""
    floors: list[float]
    """Least bytes in each."""
    times: list[float]
    """When they were seen."""
    work: list[float]
    """Requests served since the beginning, at each interval's end."""
    doubt: list[float]
    """Bytes that may have been booked wrongly since the beginning, at each interval's end."""


class _Scale:
    __slots__ = ("doubt", "floors", "times", "work")

    def __init__(self) -> None:
        self.floors = array("d")
        self.times = array("d")
        self.work = array("d")
        self.doubt = array("d")

    def push(self, floor: float, time: float, work: float, doubt: float) -> None:
        values = ((self.floors, floor), (self.times, time), (self.work, work), (self.doubt, doubt))
        for row, value in values:
            row.append(value)
            if len(row) > BINS:
                del row[0]


class Floors:
    """Floors of one series at all scales."""

    __slots__ = ("_doubt", "_floor", "_number", "_scales", "_time", "_work")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything: what comes is not comparable with what was."""
        self._scales = [_Scale() for _ in range(SCALES)]
        self._number = -1
        """Of the interval that is being filled, counted from the clock's zero; -1: none yet."""
        self._floor = self._time = self._work = _NAN
        self._doubt = 0.0

    def keep(self, last: int) -> None:
        """Forget all but the last intervals of the first scale."""
        recent = self._scales[0]
        for row in (recent.floors, recent.times, recent.work, recent.doubt):
            del row[:-last]
        self._scales[1:] = [_Scale() for _ in range(1, SCALES)]

    def add(self, at: float, live: float, work: float = _NAN, doubt: float = 0.0) -> int:
        """One sample, not older than the one before. Gives how many scales have a new complete interval."""
        number = int(at // BIN_SECONDS)
        if self._number >= 0 and number - self._number > BINS << (SCALES - 1):
            self.clear()
        if self._number < 0:
            self._number = number
        done = 0
        while self._number < number:
            done = max(done, self._complete())
        if not self._floor <= live:
            self._floor, self._time = live, at
        self._work = work
        self._doubt = doubt
        return done

    def row(self, scale: int) -> Row:
        """The complete intervals of a scale."""
        found = self._scales[scale]
        seconds = BIN_SECONDS * (1 << scale)
        end = (self._number >> scale) * seconds
        return Row(
            *(seconds, end, list(found.floors), list(found.times), list(found.work), list(found.doubt))
        )

    def _complete(self) -> int:
        """Close the interval of the first scale, and those above that end with it."""
        floor, time = self._floor, self._time
        self._floor = self._time = _NAN
        self._number += 1
        scale = 0
        while True:
            bins = self._scales[scale]
            bins.push(floor, time, self._work, self._doubt)
            scale += 1
            if scale == SCALES or self._number & ((1 << scale) - 1):
                return scale
            if len(bins.floors) > 1 and not floor < bins.floors[-2]:
                before = bins.floors[-2]
                if before == before:  # else nothing was seen in the first of the two
                    floor, time = before, bins.times[-2]
