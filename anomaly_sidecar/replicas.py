"""How many replicas the load needs: now and, by the forecast, later. Shaped for KEDA and the HPA.

In flow load per service (tokens per second, requests running and waiting) and ready replicas; out flow
one gauge per service. A replica's capacity is measured: what it did while requests waited. The result is
the larger of what the load needs now and what the forecast needs, so a forecast raises it and never
lowers it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anomaly_sidecar.models.history import Floats

SATURATED_WAITING = 0.05
"""Requests that wait as a share of those that run: above, a replica gives all that it has."""
BINS = 64
"""Of the histogram of throughput per replica while saturated, in steps of `RATIO` from `LOWEST` on."""
LOWEST = 1e-2
RATIO = 1.25
QUANTILE = 0.5
"""The median of saturated throughput: a burst is no capacity, a hiccup neither."""
MIN_SATURATED = 10
"""Samples while saturated that are needed."""
HALF_LIFE = 7 * 86400.0
"""Seconds of saturated time after which a sample counts half: new hardware and models change capacity."""
HEADROOM = 0.8
"""Share of its capacity that a replica shall use."""


@dataclass(slots=True)
class Capacity:
    """Measured capacity of one replica; arrays have one row per service."""

    saturated: Floats
    """(rows, BINS) weights of throughput per replica while saturated."""
    sums: Floats
    """(rows, BINS) sums of that throughput."""
    highest: Floats
    """(rows,) highest smoothed throughput per replica ever seen: a lower bound of capacity."""
    time: float = -1.0

    @classmethod
    def empty(cls, rows: int) -> Capacity:
        """Nothing measured."""
        return cls(np.zeros((rows, BINS)), np.zeros((rows, BINS)), np.full(rows, np.nan))

    def observe(self, time: float, load: Floats, waiting: Floats, running: Floats, replicas: Floats) -> None:
        """Samples (rows,): what was served, requests that wait and run, replicas that are ready."""
        with np.errstate(invalid="ignore", divide="ignore"):
            each = load / replicas
            saturated = (waiting > SATURATED_WAITING * running) & (each > 0) & np.isfinite(each)
            place = np.clip(np.log(each / LOWEST) / np.log(RATIO), 0, BINS - 1)
        passed = min(time - self.time, 3600.0) if self.time >= 0 else 0.0
        self.time = time
        rows = np.flatnonzero(saturated)
        keep = 0.5 ** (passed / HALF_LIFE)
        self.saturated[rows] *= keep
        self.sums[rows] *= keep
        places = place[rows].astype(np.intp)
        self.saturated[rows, places] += 1.0
        self.sums[rows, places] += each[rows]
        seen = np.isfinite(each) & (each > 0)
        # Three quarters of the way down, a tenth up: one sample does not make the bound.
        old = np.where(np.isnan(self.highest), 0.0, self.highest)
        raised = np.where(each > old, old + np.where(old > 0, 0.25, 1.0) * (each - old), old)
        self.highest = np.where(seen, raised, self.highest)

    @property
    def measured(self) -> NDArray[np.bool_]:
        """(rows,) whether saturation was seen for long enough."""
        enough: NDArray[np.bool_] = self.saturated.sum(axis=1) >= MIN_SATURATED
        return enough

    def each(self) -> Floats:
        """(rows,) throughput of one replica: measured under saturation, else the highest that was seen;
        NaN before any load. The latter is too low, never too high: then more replicas are asked for, not
        fewer."""
        weights = np.cumsum(self.saturated, axis=1)
        place = (weights >= QUANTILE * weights[:, -1:]).argmax(axis=1)
        rows = np.arange(len(place))
        with np.errstate(invalid="ignore", divide="ignore"):
            median = self.sums[rows, place] / self.saturated[rows, place]
        return np.where(self.measured, median, self.highest)


def needed(
    load: Floats,
    open_requests: Floats,
    forecast: Floats,
    capacity: Floats,
    requests_each: Floats,
    minimum: float = 1.0,
    maximum: float = np.inf,
) -> tuple[Floats, Floats, Floats]:
    """(rows,) replicas needed, needed now, and needed by the forecast.

    `load` and `forecast` in units of `capacity`, the throughput of one replica; `open_requests` run or wait,
    `requests_each` run at once on one replica (NaN: not judged by requests). A forecast that is NaN asks for
    nothing. NaN where neither load nor capacity is known: then no series is published, and the scaler's
    fallback holds.
    """
    by_load = _count(load, HEADROOM * capacity)
    by_requests = _count(open_requests, requests_each)
    now = np.clip(np.fmax(by_load, by_requests), minimum, maximum)
    later = np.clip(_count(forecast, HEADROOM * capacity), minimum, maximum)
    return np.where(np.isnan(now), np.nan, np.fmax(now, later)), now, later


def _count(amount: Floats, each: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = np.where(each > 0, amount / each, np.nan)
    # A millionth too much is rounding of sums, not need for one more.
    counted: Floats = np.ceil(exact - 1e-6)
    return counted


def seconds_to_limit(now: Floats, limit: Floats, forecast: Floats, horizons: Floats) -> Floats:
    """(rows,) seconds until a level reaches its limit (KV cache, memory), by straight lines through the
    forecasts.

    `forecast` (rows, horizons) at one quantile, `horizons` (horizons,) in seconds, ascending. 0 where it is
    reached already; NaN where it is not within the longest horizon, or unknown."""
    values = np.concatenate([now[:, None], forecast], axis=1)
    times = np.concatenate([[0.0], horizons])
    over = values >= limit[:, None]
    first = over.argmax(axis=1)
    rows = np.arange(len(values))
    before = np.maximum(first - 1, 0)
    rise = values[rows, first] - values[rows, before]
    left = limit - values[rows, before]
    share = np.divide(left, rise, out=np.full(len(values), np.nan), where=rise > 0)
    exact = np.where(first == 0, 0.0, times[before] + share * (times[first] - times[before]))
    return np.where(over.any(axis=1), exact, np.nan)


def seconds_to_quota(used: Floats, quota: Floats, rate: Floats, horizons: Floats) -> Floats:
    """(rows,) seconds until what is `used` of a `quota` reaches it, with the forecast `rate` (rows,
    horizons) per second; after the longest horizon the last rate goes on. Infinite becomes NaN: it is
    never reached."""
    left = np.maximum(quota - used, 0.0)
    edges = np.concatenate([[0.0], horizons])
    spans = np.diff(edges)
    total = np.zeros_like(left)
    found = np.where(left <= 0.0, 0.0, np.nan)
    for number, span in enumerate(spans):
        speed = np.maximum(np.nan_to_num(rate[:, number], nan=0.0), 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            within = (left - total) / speed
        last = number == len(spans) - 1
        hit = np.isnan(found) & (speed > 0) & ((within <= span) | last)
        found = np.where(hit, edges[number] + within, found)
        total = total + speed * span
    return found
