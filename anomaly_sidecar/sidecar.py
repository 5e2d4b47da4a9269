"""The main loop: reads what is due, lets the units analyze it, publishes, writes states.

Reads run in a few threads and everything else in one, so that no analyzer needs a lock. A unit has one read
under way at most; one that fails waits, longer each time and by chance a little less than that, and holds up
no other.
"""

from __future__ import annotations

import fcntl
import os
import platform
import random
import resource
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpuglass
from anomaly_sidecar.clock import ServerClock
from anomaly_sidecar.config import Config, DetectorConfig, QueryConfig
from anomaly_sidecar.fits import RESULTS
from anomaly_sidecar.forecast import Forecast
from anomaly_sidecar.interface import Analyzer, Clock, StateError
from anomaly_sidecar.publish import merged
from anomaly_sidecar.reader import Matrix, Reader, ReadError, Vector
from anomaly_sidecar.unit import Probe, Range, Request, Spec, Unit
from anomaly_sidecar.workers import InlineWorkers, WorkerPool
from gpuglass.errors import ConfigError
from gpuglass.families import anomaly as families
from gpuglass.family import Batch, Tier
from gpuglass.logs import LOG
from gpuglass.self_metrics import ReloadState, resident_bytes
from gpuglass.store import Store

MAX_BACKOFF = 300.0
SOURCE = "anomaly"


@dataclass(frozen=True, slots=True)
class Made:
    """An entry of the configuration as it runs."""

    spec: Spec
    """What its unit reads."""
    make: Callable[[], Analyzer]
    """A new analyzer."""
    entry: QueryConfig | DetectorConfig
    """Where both come from: the same entry means that nothing changed."""


Answers = Mapping[str, Vector | Matrix]


@dataclass(slots=True)
class _Running:
    """A unit with its read under way and its failures."""

    unit: Unit
    made: Made
    request: Request | None = None
    failures: int = 0
    not_before: float = 0.0
    """By the monotonic clock."""
    answered: float = 0.0
    """Of the latest good live evaluation, by the monotonic clock."""


class Sidecar:
    """Runs until its clock's `wait` says so, or cycle by cycle with `turn`."""

    def __init__(
        self,
        config: Config,
        made: list[Made],
        workers: WorkerPool | InlineWorkers,
        store: Store,
        clock: Clock,
    ) -> None:
        self.config = config
        self.store = store
        self.reader = Reader(config.prometheus)
        self.server_clock = ServerClock(clock)
        self._clock = clock
        self._workers = workers
        self._running = [_Running(Unit(each.spec, each.make()), each) for each in made]
        self.reloads = ReloadState(clock.time)
        self._next: tuple[Config, list[Made]] | None = None
        self._next_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(config.prometheus.concurrency, "reader")
        self._reads: dict[Future[Answers], tuple[_Running, Unit]] = {}
        self._asked: Future[float] | None = None
        self._ask_failures = 0
        self._ask_not_before = 0.0
        self._trouble = "the server was not reached yet"
        self._folder = Path(config.state.folder) if config.state.folder else None
        self._lock_file: int | None = None
        self._snapshot_due = clock.monotonic() + config.state.interval
        self._snapshot_time: float | None = None
        self._snapshot_bytes = 0
        self._snapshot_failures = 0
        self._dirty = False
        self._started = round(clock.time(), 3)
        self._random = random.Random()
        store.add_live(SOURCE, self._fill, Tier.SLOW)

    @property
    def latest(self) -> Config:
        """The configuration that was taken last; it runs from the next turn on."""
        with self._next_lock:
            return self._next[0] if self._next else self.config

    @property
    def units(self) -> list[Unit]:
        """All units, in the order of the configuration."""
        return [running.unit for running in self._running]

    # Running

    def open(self) -> None:
        """Lock the folder for states and take the states. Raises `ConfigError`."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"state.folder: another sidecar uses {self._folder}") from None
        except OSError as error:
            raise ConfigError(f"state.folder: cannot use {self._folder}: {error.strerror}") from None
        for running in self._running:
            running.unit.restore(self._folder, [running.made.make(), running.made.make()])

    def run(self) -> None:
        """Run until the clock's `wait` says that it is the end; then write the states."""
        while not self._clock.wait(0.0):
            self.turn(1.0)
        self.close()

    def turn(self, longest: float) -> bool:
        """Start the reads that are due, wait for one of them at most `longest` seconds, take in what came.

        False if nothing is under way: everything has been read up to now.
        """
        with self._next_lock:
            following, self._next = self._next, None
        if following is not None:
            self._change(*following)
        self._ask()
        for running in self._running:
            self._start(running)
        if not self._reads and self._asked is None:
            self._housekeeping()
            self._clock.wait(min(longest, self._until_due()))
            return False
        pending: set[Future[Any]] = set(self._reads)
        if self._asked is not None:
            pending.add(self._asked)
        wait(pending, longest, FIRST_COMPLETED)
        for future in [future for future in self._reads if future.done()]:
            running, unit = self._reads.pop(future)
            if unit is running.unit:
                self._finish(running, future)
        self._housekeeping()
        return True

    def reload(self, config: Config, made: list[Made]) -> None:
        """Run another configuration from the next turn on; see `check_reload` for what cannot change. From
        any thread."""
        with self._next_lock:
            self._next = config, made

    def _change(self, config: Config, made: list[Made]) -> None:
        """Entries that did not change go on, those whose state still fits take it over, others start anew."""
        if config.prometheus != self.config.prometheus:
            self.reader = Reader(config.prometheus)
            self.server_clock.doubt()
        self.config = config
        before = {running.unit.spec.name: running for running in self._running}
        following: list[_Running] = []
        for each in made:
            old = before.get(each.spec.name)
            if old is not None and (old.made.entry, old.unit.spec) == (each.entry, each.spec):
                following.append(before.pop(each.spec.name))
                continue
            running = _Running(Unit(each.spec, each.make()), each)
            fits = old is not None and old.unit.spec.signature == each.spec.signature
            if old is not None and fits and running.unit.adopt(old.unit, each.make()):
                running.answered = old.answered
            elif self._folder is not None:
                running.unit.restore(self._folder, [each.make(), each.make()])
            following.append(running)
        for old in before.values():
            old.request = None  # what is being read for it will be dropped
            old.unit.analyzer.evict(old.unit.table.rows())
        self._running = following
        self._dirty = True

    def settle(self, seconds: float = 600.0) -> None:
        """Turn until everything up to now has been read; raises TimeoutError. For tests and backtests."""
        deadline = time.monotonic() + seconds
        while self.turn(0.05) or not self.server_clock.known:
            if time.monotonic() > deadline:
                raise TimeoutError(self.not_ready() or "still reading")

    def close(self) -> None:
        """Write the states and end the threads and workers."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._snapshot()
        self._workers.close()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def not_ready(self) -> str | None:
        """Why there is nothing to scrape yet, in one line that anyone may read: without addresses."""
        waiting = [running.unit.spec.name for running in self._running if running.unit.last_live is None]
        if not self._running or len(waiting) < len(self._running):
            return None
        return "the server to read from does not answer" if self._trouble else "reading history"

    def _until_due(self) -> float:
        if not self.server_clock.known:
            return max(0.05, self._ask_not_before - self._clock.monotonic())
        now, monotonic = self.server_clock.now(), self._clock.monotonic()
        due = [
            max(running.unit.next_due(now) - now, running.not_before - monotonic) for running in self._running
        ]
        return max(0.02, min(due, default=1.0))

    # Time

    def _ask(self) -> None:
        """Ask the server for its time, when it is time to."""
        if self._asked is not None and self._asked.done():
            future, self._asked = self._asked, None
            try:
                jumped = self.server_clock.set(future.result())
            except ReadError as error:
                self._ask_failures += 1
                delay = self._backoff(self._ask_failures, 1.0, error.retry_after)
                self._ask_not_before = self._clock.monotonic() + delay
                self._say(f"{self.config.prometheus.url}: {error}")
            else:
                self._ask_failures = 0
                self._say("")
                if jumped < -3600:
                    self._start_anew()
        if (
            self._asked is None
            and self.server_clock.must_ask()
            and self._clock.monotonic() >= self._ask_not_before
        ):
            self._asked = self._pool.submit(self.reader.now)

    def _start_anew(self) -> None:
        """The server's clock went back by more than an hour: what was learned is of a time that is to
        come."""
        for running in self._running:
            unit = running.unit
            if unit.last is not None and unit.last > self.server_clock.now():
                LOG.warning("%s: learned ahead of the server's clock; starting anew", unit.spec.name)
                running.request = None  # what is being read is of the old unit, and will be dropped
                running.unit = Unit(unit.spec, running.made.make())
                running.unit.counts = unit.counts
                unit.analyzer.evict(unit.table.rows())

    def _say(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            LOG.warning("%s", trouble)
        elif not trouble and self._trouble and self._ask_failures == 0:
            LOG.info("%s answers", self.config.prometheus.url)
        self._trouble = trouble

    # Reads

    def _start(self, running: _Running) -> None:
        if running.request is not None or not self.server_clock.known:
            return
        if self._clock.monotonic() < running.not_before:
            return
        prometheus = self.config.prometheus
        request = running.unit.plan(self.server_clock.now(), prometheus.max_points, prometheus.max_samples)
        if request is not None:
            running.request = request
            self._reads[self._pool.submit(self._read, running.unit, request)] = running, running.unit

    def _read(self, unit: Unit, request: Request) -> Answers:
        """In a thread: ask for all roles."""
        started = time.perf_counter()
        try:
            if isinstance(request, Range):
                return {
                    role: self.reader.range(expression, request.start, request.end, request.step)
                    for role, expression in unit.spec.roles.items()
                }
            roles = list(unit.spec.roles.items())[: 1 if isinstance(request, Probe) else None]
            return {role: self.reader.instant(expression, request.at) for role, expression in roles}
        finally:
            unit.counts.stages["read"] += time.perf_counter() - started

    def _finish(self, running: _Running, future: Future[Answers]) -> None:
        unit, request = running.unit, running.request
        running.request = None
        if request is None:
            return
        try:
            answers = future.result()
            unit.take(request, answers)
        except ReadError as error:
            if error.smaller and unit.too_much(request):
                return
            self._failed(running, str(error), error.retry_after)
        except Exception as error:
            # An analyzer's defect ends neither the others nor the sidecar.
            LOG.exception("%s: %s", unit.spec.name, type(error).__name__)
            self._failed(running, f"{type(error).__name__}: {error}", 0.0)
        else:
            if running.failures:
                LOG.info("%s: is read again after %d failures", unit.spec.name, running.failures)
            running.failures = 0
            if unit.last_live == unit.last:
                running.answered = self._clock.monotonic()
                self._dirty = True

    def _failed(self, running: _Running, text: str, retry_after: float) -> None:
        unit = running.unit
        unit.counts.evaluations["failed"] += 1
        running.failures += 1
        delay = self._backoff(running.failures, min(unit.spec.interval / 4, 15.0), retry_after)
        running.not_before = self._clock.monotonic() + delay
        if running.failures in (1, 10, 100):
            LOG.warning("%s: %s; trying again", unit.spec.name, text)

    def _backoff(self, failures: int, first: float, retry_after: float) -> float:
        longest = min(MAX_BACKOFF, first * 2.0 ** min(failures - 1, 16))
        return max(longest * self._random.uniform(0.5, 1.0), min(retry_after, MAX_BACKOFF))

    # What comes out

    def _housekeeping(self) -> None:
        monotonic = self._clock.monotonic()
        for running in self._running:
            unit = running.unit
            stale = monotonic - running.answered > max(300.0, 3 * unit.spec.interval)
            if unit.lines and stale:
                LOG.warning("%s: no evaluation for too long; its series are withdrawn", unit.spec.name)
                unit.lines = {}
                self._dirty = True
        if self._dirty:
            self.publish()
        if monotonic >= self._snapshot_due:
            self._snapshot()

    def publish(self) -> None:
        """Hand the lines of all units to the store."""
        self._dirty = False
        self.store.publish(SOURCE, Batch(), merged(unit.lines for unit in self.units))

    def _snapshot(self) -> None:
        self._snapshot_due = self._clock.monotonic() + self.config.state.interval
        if self._folder is None:
            return
        size = 0
        for unit in self.units:
            if unit.last is None:
                continue
            started = time.perf_counter()
            try:
                size += unit.save(self._folder)
            except (OSError, StateError) as error:
                self._snapshot_failures += 1
                LOG.error("%s: the state was not written: %s", unit.spec.name, error)
            unit.counts.stages["snapshot"] += time.perf_counter() - started
        if size:
            self._snapshot_time, self._snapshot_bytes = round(self._clock.time(), 3), size

    def _fill(self, batch: Batch) -> None:
        """Metrics about the sidecar itself, at each scrape."""
        batch.add(families.BUILD_INFO, 1, gpuglass.__version__, platform.python_version())
        batch.add(families.START_TIME, self._started)
        batch.add(families.CONFIG_RELOAD_OK, int(self.reloads.ok))
        batch.add(families.CONFIG_RELOAD_TIME, self.reloads.taken_at)
        for unit in self.units:
            name, counts = unit.spec.name, unit.counts
            for result, count in sorted(counts.evaluations.items()):
                batch.add(families.EVALUATIONS, count, name, result)
            for change in ("admitted", "evicted", "refused", "ambiguous"):
                batch.add(families.SERIES_CHANGES, counts.changes[change], name, change)
            for stage in ("read", "join", "analyze", "publish", "snapshot"):
                batch.add(families.STAGE_SECONDS, round(counts.stages[stage], 4), name, stage)
            batch.add(families.SAMPLES, counts.samples, name)
            batch.add(families.BACKFILLED, counts.backfilled, name)
            batch.add(families.READ_BYTES, counts.read_bytes, name)
            batch.add(families.SERIES, len(unit.table), name)
            batch.add(families.COLLISIONS, unit.publisher.collisions, name)
            batch.add(families.RESTORED, int(unit.restored in ("latest", "previous")), name, unit.restored)
            if isinstance(unit.analyzer, Forecast) and unit.analyzer.settings.fit:
                for result in RESULTS:
                    batch.add(families.FITS, unit.analyzer.fits.counts[result], name, result)
            if unit.last_live is not None:
                batch.add(families.LAST_EVALUATION, unit.last_live, name)
        if self.server_clock.known:
            batch.add(families.CLOCK_OFFSET, round(self.server_clock.offset(), 3))
        batch.add(families.CLOCK_JUMPS, self.server_clock.jumps)
        batch.add(families.SNAPSHOT_FAILURES, self._snapshot_failures)
        if self._snapshot_time is not None:
            batch.add(families.SNAPSHOT_TIME, self._snapshot_time)
            batch.add(families.SNAPSHOT_BYTES, self._snapshot_bytes)
        if isinstance(self._workers, WorkerPool):
            batch.add(families.WORKER_JOBS, self._workers.jobs - self._workers.failed, "ok")
            batch.add(families.WORKER_JOBS, self._workers.failed, "failed")
            batch.add(families.WORKER_PENDING, self._workers.pending)
            batch.add(families.WORKER_RESTARTS, self._workers.restarts)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        batch.add(families.CPU, round(usage.ru_utime + usage.ru_stime, 2))
        resident = resident_bytes()
        if resident is not None:
            batch.add(families.MEMORY, resident)
