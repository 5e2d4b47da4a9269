"""The thread of one GPU: runs its collectors at the rate of their tiers and leaves a reading for the
publisher.

All GPUs sample at the same moments (multiples of the interval), so that a row of a heatmap is one instant. A
call that hangs in the driver stops this thread only; the publisher sees since when it has been busy.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from exporters.gpu.collectors import Collector
from exporters.gpu.device import Gpu
from exporters.gpu.observe import DriverDown, Entry, GpuDown, Observations, State
from gpuglass.family import Tier
from gpuglass.logs import LOG


@dataclass(frozen=True, slots=True)
class Run:
    """How the last run of a collector went."""

    seconds: float
    success: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read from one GPU. Times are CLOCK_MONOTONIC in seconds."""

    at: float
    fast: tuple[Entry, ...]
    slow_at: float
    slow: tuple[Entry, ...]
    states: Mapping[str, State]
    runs: Mapping[str, Run]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Seconds between samples of each tier, and before a GPU that is down is tried again."""

    interval: float
    slow_interval: float
    retry_interval: float


class Worker:
    """Samples one GPU in one life of the driver, in whichever thread has it."""

    def __init__(
        self,
        gpu: Gpu,
        collectors: Sequence[Collector],
        schedule: Schedule,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gpu = gpu
        self.reading: Reading | None = None
        self.busy_since: float | None = None
        self.down: str | None = None
        """Why the GPU does not answer; None while it does."""
        self.driver_down: str | None = None
        """Why the driver has to be initialised again; nothing is sampled any more then."""
        self.schedule = schedule
        self._collectors = collectors
        self._clock = clock
        self._see = Observations(clock)
        self._runs: dict[str, Run] = {}
        self._due_at = 0.0
        self._lock = threading.Lock()
        self._complained: set[str] = set()

    def due_at(self) -> float:
        """When the next sample is due."""
        return self._due_at

    def sample(self) -> bool:
        """Take a sample if one is due and no other thread is at it; True if so."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self.driver_down is not None or self._clock() < self._due_at:
                return False
            self._sample()
            self._due_at = self._next(self._clock())
            return True
        finally:
            self._lock.release()

    def _next(self, now: float) -> float:
        if self.driver_down is not None:
            return math.inf
        if self.down is not None:
            return now + self.schedule.retry_interval
        interval = self.schedule.interval
        return now - now % interval + interval

    def reschedule(self, schedule: Schedule) -> None:
        """Take other intervals from now on."""
        self.schedule = schedule
        self._due_at = min(self._due_at, self._next(self._clock()))

    def close(self, until: float) -> bool:
        """Give back what the driver lent; no thread samples any more.

        False if a collector's own thread is still inside the driver at that moment of the monotonic clock.
        """
        threads = [thread for collector in self._collectors if (thread := collector.close()) is not None]
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _sample(self) -> None:
        now = self.busy_since = self._clock()
        last = self.reading
        # A slow run that is due within half an interval is taken along, so that both tiers share their
        # instants.
        slow_due = (
            last is None or now - last.slow_at >= self.schedule.slow_interval - self.schedule.interval / 2
        )
        reads = self._see.reads
        try:
            fast = self._run(Tier.FAST, now)
            if self._see.reads == reads and self._see.errors:
                raise GpuDown("error")
            if slow_due or last is None:
                slow_at, slow = now, self._run(Tier.SLOW, now)
            else:
                slow_at, slow = last.slow_at, last.slow
        except GpuDown as down:
            self._go_down(down.reason)
        except DriverDown as down:
            self.driver_down = down.reason
            self._go_down("driver")
        else:
            if self.down is not None:
                LOG.warning("%s (%s): answers again", self.gpu.device, self.gpu.uuid)
            self.down = None
            self.reading = Reading(now, fast, slow_at, slow, dict(self._see.states), dict(self._runs))
        finally:
            self._see.take()  # entries of a run that was broken off are no reading
            self.busy_since = None

    def _go_down(self, reason: str) -> None:
        if self.down != reason:
            LOG.warning("%s (%s): down, %s", self.gpu.device, self.gpu.uuid, reason)
        self.down = reason
        self.reading = None

    def _run(self, tier: Tier, now: float) -> tuple[Entry, ...]:
        """Run the collectors of a tier; each one's own failure is its own."""
        entries: list[Entry] = []
        for collector in self._collectors:
            if collector.tier is not tier:
                continue
            started, errors = self._clock(), self._see.errors
            success = True
            try:
                collector.collect(self._see, now)
            except (GpuDown, DriverDown):
                raise
            except Exception:
                # A defect of ours or garbage from the driver must cost this collector's series only.
                success = False
                if collector.name not in self._complained:
                    self._complained.add(collector.name)
                    LOG.exception("%s: collector %s failed", self.gpu.device, collector.name)
            noted = self._see.take()
            if success:
                entries += noted
            self._runs[collector.name] = Run(self._clock() - started, success and self._see.errors == errors)
        return tuple(entries)

    def state(self, now: float, hang_timeout: float) -> str | None:
        """Why the GPU is down; None if it answers. A thread that is busy too long is hung."""
        busy_since = self.busy_since
        if busy_since is not None and now - busy_since > hang_timeout:
            return "hung"
        return self.down
