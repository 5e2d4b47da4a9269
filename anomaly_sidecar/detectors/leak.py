"""Memory leak from metrics alone: floors that rise steadily, at several resolutions.

In flow bytes in use per process or GPU, if known the KV cache's part, the rate of requests and the start of
the process; out flow verdicts with bytes per hour. The floor of a bin is its smallest level: what requests
hold for a moment is not in it. A leak rises in nearly every bin; a model that is loaded is one step, a cache
that fills slows down, and load that grows explains itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.models.history import Floats

GIB = float(1 << 30)


@dataclass(frozen=True, slots=True)
class Scale:
    """One resolution of the search."""

    bin_seconds: float
    floors: int
    """In the window that is judged."""
    rising: float
    """Share of all pairs of floors that must rise."""
    noise: float
    """The rise per bin must exceed so many times the usual change between floors."""


SCALES = (
    Scale(bin_seconds=300.0, floors=7, rising=0.90, noise=1.0),
    Scale(bin_seconds=900.0, floors=8, rising=0.95, noise=0.75),
    Scale(bin_seconds=1800.0, floors=10, rising=0.90, noise=0.5),
    Scale(bin_seconds=3600.0, floors=6, rising=0.93, noise=0.4),
)
"""A steep leak on a flat pool shows at the first, slow ones and noisy pods need the others."""
STEADY = 0.55
"""Share of the rise that must remain without the largest single step."""
SLOWING = 0.7
"""The later half must rise at least so fast compared with the earlier: a cache that fills slows down."""
LOAD_GROWTH = 1.1
"""If the rate of requests in the window's later half exceeds the earlier's by this factor, load explains
it."""
LOAD_CREEP = 1.03
LOAD_RISING = 0.8
"""The same for a smaller factor if this share of all pairs of loads rises."""
HOLD_SECONDS = 1800.0
"""A verdict stays for this long after its last confirmation."""
NOISE_RATE = 0.05
"""Share of the newest change in the usual one; changes count up to four times the usual."""
RESTART_SECONDS = 1.0
"""A start time that moves by more is another process."""


@dataclass(slots=True)
class Floors:
    """Bins of one scale; arrays have one row per series."""

    bin_seconds: float
    current: Floats
    """(rows,) smallest level of the open bin; infinite where nothing came."""
    load_sum: Floats
    load_count: Floats
    floors: Floats
    """(rows, floors) of the closed bins, oldest first; NaN is a gap or before the process's start."""
    loads: Floats
    """(rows, floors) mean rate of requests in those bins; NaN if unknown."""
    usual: Floats
    """(rows,) moving mean of absolute changes between floors; NaN until the first."""
    index: int = -1
    """Number of the open bin."""

    @classmethod
    def empty(cls, rows: int, scale: Scale) -> Floors:
        """No bin yet."""
        return cls(
            bin_seconds=scale.bin_seconds,
            current=np.full(rows, np.inf),
            load_sum=np.zeros(rows),
            load_count=np.zeros(rows),
            floors=np.full((rows, scale.floors), np.nan),
            loads=np.full((rows, scale.floors), np.nan),
            usual=np.full(rows, np.nan),
        )

    def add(self, time: float, level: Floats, load: Floats) -> bool:
        """Take in samples of one time; True if a bin was closed by them."""
        index = int(time // self.bin_seconds)
        closed = 0 <= self.index < index
        if closed:
            self._close(min(index - self.index, self.floors.shape[1]))
        self.index = index
        self.current = np.fmin(self.current, level)
        known = ~np.isnan(load)
        self.load_sum += np.where(known, load, 0.0)
        self.load_count += known
        return closed

    def _close(self, moved: int) -> None:
        """Shift by `moved` bins: the open one, and gaps for those in which nothing came."""
        floor = np.where(np.isinf(self.current), np.nan, self.current)
        with np.errstate(invalid="ignore", divide="ignore"):
            load = self.load_sum / self.load_count
        change = np.abs(floor - self.floors[:, -1])
        cut = np.where(np.isnan(self.usual), change, np.minimum(change, 4 * self.usual + 1.0))
        known = ~np.isnan(change)
        old = np.where(np.isnan(self.usual), cut, self.usual)
        self.usual = np.where(known, old + NOISE_RATE * (cut - old), self.usual)
        for ring, newest in ((self.floors, floor), (self.loads, load)):
            ring[:, :-moved] = ring[:, moved:]
            ring[:, -moved:] = np.nan
            ring[:, -moved] = newest
        self.current[:] = np.inf
        self.load_sum[:] = 0.0
        self.load_count[:] = 0.0

    def forget(self, rows: NDArray[np.bool_]) -> None:
        """Another process: its floors say nothing about the last one's. What is usual stays."""
        self.floors[rows] = np.nan
        self.loads[rows] = np.nan
        self.current[rows] = np.inf
        self.load_sum[rows] = 0.0
        self.load_count[rows] = 0.0


def slope(floors: Floats) -> Floats:
    """(rows,) median of the slopes of all pairs (Theil 1950, Sen 1968), per bin; NaN for a row with a gap."""
    later, earlier = np.triu_indices(floors.shape[1], 1)[::-1]
    slopes: Floats = np.median((floors[:, later] - floors[:, earlier]) / (later - earlier), axis=1)
    return slopes


def is_leaking(
    floors: Floats, loads: Floats, usual: Floats, scale: Scale, minimum: float
) -> NDArray[np.bool_]:
    """(rows,) whether a window of floors (rows, floors) in bytes rises like a leak of at least `minimum`
    bytes per hour. `loads` (rows, floors) and `usual` (rows,) as in `Floors`."""
    later, earlier = np.triu_indices(scale.floors, 1)[::-1]
    steps = np.diff(floors, axis=1)
    total = floors[:, -1] - floors[:, 0]
    per_bin = slope(floors)
    half = steps.shape[1] // 2
    usual = np.nan_to_num(usual, nan=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        leaking = per_bin * 3600.0 / scale.bin_seconds >= minimum
        leaking &= per_bin > scale.noise * np.minimum(usual, np.abs(steps).mean(axis=1))
        leaking &= (floors[:, later] > floors[:, earlier]).mean(axis=1) >= scale.rising
        leaking &= total - steps.max(axis=1) >= STEADY * total
        cut = np.clip(steps, -2 * per_bin[:, None], 2 * per_bin[:, None])
        leaking &= cut[:, -half:].mean(axis=1) >= SLOWING * cut[:, :half].mean(axis=1)
        middle = scale.floors // 2
        before, after = loads[:, :middle].mean(axis=1), loads[:, -middle:].mean(axis=1)
        creeps = (loads[:, later] > loads[:, earlier]).mean(axis=1) >= LOAD_RISING
        leaking &= ~((after > LOAD_GROWTH * before) | (creeps & (after > LOAD_CREEP * before)))
    return leaking


@dataclass(slots=True)
class Leaks:
    """Verdicts over all series."""

    minimum: float
    """Bytes per hour."""
    fine: Floors
    middle: Floors
    coarse: Floors
    coarsest: Floors
    started: Floats
    """(rows,) start of the process in Unix seconds; NaN if unknown."""
    confirmed: Floats
    """(rows,) time of the last confirmation; NaN without a verdict."""
    rate: Floats
    """(rows,) bytes per hour of the verdict."""
    restarts: NDArray[np.int64]
    """(rows,) restarts seen."""

    @classmethod
    def empty(cls, rows: int, minimum: float) -> Leaks:
        """Nothing seen. `minimum` in bytes per hour."""
        fine, middle, coarse, coarsest = (Floors.empty(rows, scale) for scale in SCALES)
        return cls(
            minimum=minimum,
            fine=fine,
            middle=middle,
            coarse=coarse,
            coarsest=coarsest,
            started=np.full(rows, np.nan),
            confirmed=np.full(rows, np.nan),
            rate=np.full(rows, np.nan),
            restarts=np.zeros(rows, np.int64),
        )

    def observe(
        self,
        time: float,
        used: Floats,
        kv: Floats | None = None,
        load: Floats | None = None,
        started: Floats | None = None,
    ) -> None:
        """One sample per series, each (rows,) with NaN for gaps: bytes in use, bytes of them in the KV cache,
        requests per second, start of the process."""
        level = used if kv is None else used - kv
        load = np.full(len(used), np.nan) if load is None else load
        if started is not None:
            self._restart(started)
        for scale, floors in zip(SCALES, self.scales, strict=True):
            if floors.add(time, level, load):
                found = is_leaking(floors.floors, floors.loads, floors.usual, scale, self.minimum)
                self.confirmed[found] = time
                self.rate[found] = slope(floors.floors[found]) * 3600.0 / scale.bin_seconds
        over = time - self.confirmed > HOLD_SECONDS
        self.confirmed[over] = np.nan
        self.rate[over] = np.nan

    def _restart(self, started: Floats) -> None:
        other = np.abs(started - self.started) > RESTART_SECONDS
        for floors in self.scales:
            floors.forget(other)
        self.confirmed[other] = np.nan
        self.rate[other] = np.nan
        self.restarts += other
        self.started = np.where(np.isnan(started), self.started, started)

    @property
    def scales(self) -> tuple[Floors, ...]:
        """In the order of `SCALES`."""
        return self.fine, self.middle, self.coarse, self.coarsest

    @property
    def leaking(self) -> NDArray[np.bool_]:
        """(rows,) verdicts of now."""
        return ~np.isnan(self.confirmed)
