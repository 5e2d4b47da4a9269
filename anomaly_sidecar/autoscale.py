"""Replicas needed, as the sidecar runs it: a forecast of the load, measured capacity, one gauge per service.

In flow load, requests that wait and run, and ready replicas; out flow `replicas_needed`, which KEDA or an HPA
compares with 1 per replica (an AverageValue of 1 makes the gauge the number of replicas).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from anomaly_sidecar import rows as table
from anomaly_sidecar.forecast import Forecast, ForecastSettings
from anomaly_sidecar.interface import (
    Column,
    FloatArray,
    Frame,
    Kind,
    Labels,
    Output,
    Role,
    RowArray,
    State,
    Workers,
)
from anomaly_sidecar.models.history import DAY
from anomaly_sidecar.replicas import Capacity, needed
from gpuglass.families import anomaly as families

VERSION = 1


class ReplicasSettings(ForecastSettings, frozen=True):
    """Keys of a forecast, and what is made of it."""

    horizon: float = 600.0
    """Of the forecast that counts, in seconds: as long as a new replica takes to serve, and some."""
    quantile: float = 0.9
    capacity: float = 0.0
    """Load that one replica takes, in the unit of "value"; 0: measured while requests wait."""
    requests_each: float = 0.0
    """Requests that one replica runs at once; 0: measured likewise."""
    min_replicas: float = 1.0
    max_replicas: float = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon not in self.horizons:
            raise ValueError(f"horizon: must be one of horizons, is {self.horizon:g}s")
        if self.quantile not in self.quantiles:
            raise ValueError(f"quantile: must be one of quantiles, is {self.quantile:g}")
        for name in ("capacity", "requests_each"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: must be 0 (measured) or more, is {value:g}")
        if not 0 <= self.min_replicas <= self.max_replicas < math.inf:
            raise ValueError("min_replicas: must be between 0 and max_replicas")


class Replicas(Forecast):
    """Analyzer with the roles "value", "waiting", "running" and "ready"."""

    def __init__(self, name: str, settings: ReplicasSettings, workers: Workers) -> None:
        super().__init__(name, settings, workers)
        self.wanted = settings
        self.load = Capacity.empty(0)
        self.requests = Capacity.empty(0)
        self._open_requests: FloatArray = np.zeros(0)
        self._horizon = settings.horizons.index(settings.horizon)
        self._quantile = settings.quantiles.index(settings.quantile)

    def admit(self, rows: RowArray, labels: Sequence[Labels], capacity: int) -> None:
        """See `Analyzer`."""
        for part in (self.load, self.requests):
            table.resize(part, Capacity.empty(capacity))
        more = max(0, capacity - len(self._open_requests))
        self._open_requests = np.concatenate([self._open_requests, np.full(more, np.nan)])
        super().admit(rows, labels, capacity)

    def evict(self, rows: RowArray) -> None:
        """See `Analyzer`."""
        super().evict(rows)
        for part in (self.load, self.requests):
            table.clear(part, rows, Capacity.empty(1))
        self._open_requests[rows] = np.nan

    def observe(self, frame: Frame) -> None:
        """See `Analyzer`."""
        super().observe(frame)
        value, ready = frame.values["value"], frame.values["ready"]
        waiting, running = frame.values["waiting"], frame.values["running"]
        self._now = value.copy()
        self._open_requests = waiting + running
        self.load.observe(frame.time, value, waiting, running, ready)
        self.requests.observe(frame.time, running, waiting, running, ready)

    def outputs(self) -> Iterable[Output]:
        """See `Analyzer`."""
        yield from super().outputs()
        wanted = self.wanted
        rows = len(self._now)
        each = np.full(rows, wanted.capacity) if wanted.capacity else self.load.each()
        # Without saturation the number of requests that a replica can run is not known, and not judged.
        measured = np.where(self.requests.measured, self.requests.each(), np.nan)
        requests_each = np.full(rows, wanted.requests_each) if wanted.requests_each else measured
        forecast = np.where(
            self.ready[:, self._horizon], self.state.bounds[:, self._horizon, self._quantile], np.nan
        )
        total, now, later = needed(
            self._now,
            self._open_requests,
            forecast,
            each,
            requests_each,
            wanted.min_replicas,
            wanted.max_replicas,
        )
        for basis, values in (("all", total), ("now", now), ("forecast", later)):
            yield Column(families.REPLICAS, values, {"basis": basis})
        live = self.taken
        if wanted.capacity:
            yield Column(families.REPLICA_CAPACITY, np.where(live, each, np.nan), {"source": "configured"})
        else:
            known = self.load.measured
            yield Column(
                families.REPLICA_CAPACITY, np.where(live & known, each, np.nan), {"source": "measured"}
            )
            yield Column(
                families.REPLICA_CAPACITY, np.where(live & ~known, each, np.nan), {"source": "observed"}
            )

    def save(self) -> State:
        """See `Analyzer`."""
        saved = super().save()
        for name, part in (("load", self.load), ("requests", self.requests)):
            table.nest(saved, name, table.save(part, VERSION))
        saved.arrays["open_requests"] = self._open_requests
        return saved

    def restore(self, state: State) -> None:
        """See `Analyzer`."""
        parts = {}
        for name in ("load", "requests"):
            parts[name] = Capacity.empty(len(self._now))
            table.restore(parts[name], table.nested(state, name), VERSION)
        super().restore(state)
        self.load, self.requests = parts["load"], parts["requests"]
        stored = state.arrays.get("open_requests")
        if stored is not None and stored.ndim == 1 and len(stored) <= len(self._open_requests):
            self._open_requests[: len(stored)] = stored


KIND = Kind(
    "replicas",
    "replicas that the load needs now and soon, for autoscalers",
    (
        Role("value", "Load of a service, as tokens per second."),
        Role("waiting", "Its requests that wait."),
        Role("running", "Its requests that run."),
        Role("ready", "Its replicas that serve."),
    ),
    ReplicasSettings,
    Replicas,
    history=8 * DAY,
    history_step=300.0,
)
