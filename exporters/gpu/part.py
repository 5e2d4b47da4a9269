"""The GPU part of the agent: keeps the driver loaded, a worker for each GPU at work, and the store fed.

The supervisor thread loads the driver, starts a life of workers, and replaces it when the driver was lost,
reloaded or lists other GPUs. The publisher thread puts together what the workers read. Neither is ever inside
a driver call on behalf of a scrape.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from exporters.gpu.collectors import Collector
from exporters.gpu.collectors.activity import Activity, MemoryController
from exporters.gpu.collectors.errors import Errors
from exporters.gpu.collectors.links import NvLink, Pcie
from exporters.gpu.collectors.memory import MemoryRest, MemoryUsed
from exporters.gpu.collectors.mig import MigActivity, MigInstances
from exporters.gpu.collectors.power import Power, Thermals
from exporters.gpu.collectors.processes import Attribution, Listed, Processes, Resolve
from exporters.gpu.crew import Crew
from exporters.gpu.device import Gpu
from exporters.gpu.driver import DriverUnavailable, Nvml, missing
from exporters.gpu.publish import GpuView, fast_batch, slow_batch
from exporters.gpu.worker import Schedule, Worker
from exporters.gpu.workloads import Workloads
from exporters.gpu.xid import XidCounts, XidWatcher, watched
from gpuglass.config import Config, GpuConfig
from gpuglass.families import gpu as families
from gpuglass.family import Batch, Tier
from gpuglass.gpu_processes import GpuProcesses
from gpuglass.logs import LOG
from gpuglass.part import Part, PartContext
from gpuglass.store import Store

LONGEST_RETRY = 300.0
"""Seconds between attempts to get back GPUs that are down: each one initialises the driver for all."""

_LONGEST_WAIT = 2.0
"""Seconds in which every thread that is not stuck notices that it has to end."""


def collectors_of(gpu: Gpu, config: GpuConfig, resolve: Resolve, listed: Listed) -> tuple[Collector, ...]:
    """Collectors of one GPU. Order matters: slow ones read what fast ones found."""
    activity = Activity(gpu, config.interval)
    used = MemoryUsed(gpu)
    limit, pid_label = config.process.limit, config.process.pid_label
    common = (
        activity,
        used,
        Power(gpu),
        MemoryController(gpu),
        MemoryRest(gpu, used),
        Thermals(gpu),
        Pcie(gpu, activity, config.slow_interval),
        NvLink(gpu),
        Errors(gpu),
    )
    if not gpu.mig:
        return (*common, Processes(gpu, resolve, limit, pid_label, listed))
    instances = MigInstances(gpu, lambda: Attribution(resolve, limit, pid_label, False, listed))
    return (*common, instances, MigActivity(gpu, instances))


@dataclass(slots=True)
class Life:
    """One life of the driver: its GPUs and the threads that use their handles."""

    gpus: tuple[Gpu, ...]
    listed: int
    crew: Crew
    watcher: XidWatcher | None

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Workers of the GPUs, in the driver's order."""
        return self.crew.workers

    def start(self) -> None:
        """Start all threads."""
        self.crew.start()
        if self.watcher is not None:
            self.watcher.start()

    def close(self) -> None:
        """Ask all threads to end."""
        self.crew.close()
        if self.watcher is not None:
            self.watcher.close()

    def join(self, timeout: float) -> bool:
        """Wait for them and give back what the driver lent; False if one is stuck in the driver."""
        until = time.monotonic() + timeout
        clean = self.crew.join(until)
        if self.watcher is not None:
            self.watcher.join(max(0.0, until - time.monotonic()))
            clean = clean and not self.watcher.is_alive()
        if not clean:
            return False
        # Each is to be closed, whatever the others say.
        ended = [worker.close(until) for worker in self.workers]
        return all(ended)

    def driver_down(self) -> str | None:
        """Why the driver has to be initialised again, if a worker found out."""
        return next((worker.driver_down for worker in self.workers if worker.driver_down is not None), None)


class GpuPart(Part):
    """Exports all GPUs of the node."""

    def __init__(
        self,
        config: Config,
        store: Store,
        workloads: Workloads,
        clock: Callable[[], float] = time.monotonic,
        processes: GpuProcesses | None = None,
        models: set[str] | None = None,
    ) -> None:
        self._models = models if models is not None else set()
        self._processes = processes or GpuProcesses(clock)
        self._config = config.gpu
        self._store = store
        self._workloads = workloads
        self._clock = clock
        self._nvml = Nvml(config.gpu.nvml_library)
        self._xids = XidCounts()
        self._known: dict[str, Gpu] = {}
        self._last_down: dict[str, str] = {}
        """Why GPUs were down at the end of the last life."""
        self._life: Life | None = None
        self._driver_reason: str | None = "starting"
        self._driver_busy_since: float | None = None
        self._loads = 0
        self._closing = threading.Event()
        self._changed = threading.Event()
        self._attention = threading.Event()
        self._tried = threading.Event()
        self._fast = Batch()
        self._slow = Batch()
        self._complete = False
        self._slow_key: tuple[object, ...] = ()
        self._supervisor = threading.Thread(target=self._supervise, name="gpu-driver", daemon=True)
        self._publisher = threading.Thread(target=self._publish_loop, name="gpu-publish", daemon=True)

    # Part

    def start(self) -> None:
        """Start supervisor, publisher and the kubelet's poller."""
        self._store.add_live("gpu.live", self._fill_live, Tier.FAST)
        self._workloads.start()
        self._supervisor.start()
        self._publisher.start()

    def reload(self, config: Config) -> None:
        """Take new intervals at once; limits of process labels need new collectors, so the life is
        replaced."""
        old, self._config = self._config, config.gpu
        life = self._life
        if life is None:
            return
        for worker in life.workers:
            worker.reschedule(self._schedule())
        life.crew.reschedule()
        if old.process != config.gpu.process:
            for worker in life.workers:
                worker.driver_down = worker.driver_down or "reload"
            self._attention.set()

    def stop(self, timeout: float) -> bool:
        """Stop all threads; False if one is stuck in the driver."""
        self._closing.set()
        self._attention.set()
        self._changed.set()
        self._workloads.stop()
        until = self._clock() + timeout
        for thread in (self._supervisor, self._publisher):
            thread.join(max(0.0, until - self._clock()))
        return not self._supervisor.is_alive()

    def not_ready(self) -> str | None:
        """Why there is no data yet. A node without a driver is ready: it says so in its metrics."""
        if not self._tried.is_set():
            return "gpu: the driver has not answered yet"
        return None if self._complete else "gpu: not all GPUs were read yet"

    # Supervisor

    def _supervise(self) -> None:
        """Lives of the driver, one after the other."""
        retries = 0
        while not self._closing.is_set():
            try:
                life = self._open()
            except DriverUnavailable as error:
                self._set_driver_reason(error.reason, str(error))
                self._tried.set()
                self._closing.wait(self._config.retry_interval)
                continue
            self._set_driver_reason(None, f"driver loaded, {life.listed} GPUs")
            life.start()
            self._life = life
            self._tried.set()
            retries = self._watch(life, retries)
            life.close()
            self._last_down |= {
                w.gpu.uuid: w.down for w in life.workers if w.down is not None and w.driver_down is None
            }
            if not life.join(max(self._config.hang_timeout, _LONGEST_WAIT)):
                LOG.warning("a call into the driver does not return; waiting for it before loading it again")
                # Shutting down under a thread that is inside the library could crash us.
                while not life.join(_LONGEST_WAIT) and not self._closing.is_set():
                    pass
            if not life.join(LONGEST_RETRY):
                return  # the process is ending, with a thread still inside the library
            self._life = None
            self._nvml.close()

    def _open(self) -> Life:
        self._driver_busy_since = self._clock()
        try:
            self._nvml.open()
            gpus, listed = self._nvml.gpus()
        except DriverUnavailable:
            self._nvml.close()
            raise
        finally:
            self._driver_busy_since = None
        self._loads += 1
        for gpu in gpus:
            self._known[gpu.uuid] = gpu
            self._models.add(gpu.model)
            self._last_down.pop(gpu.uuid, None)
        workers = tuple(
            Worker(
                gpu,
                collectors_of(gpu, self._config, self._workloads.resolve, self._processes.note),
                self._schedule(),
                self._clock,
            )
            for gpu in gpus
        )
        crew = Crew(workers, self._worker_changed)
        watcher = XidWatcher(gpus, self._xids, self._worker_changed) if self._config.xid_events else None
        return Life(gpus, listed, crew, watcher)

    def _schedule(self) -> Schedule:
        config = self._config
        return Schedule(config.interval, config.slow_interval, config.retry_interval)

    def _worker_changed(self) -> None:
        self._changed.set()
        life = self._life
        if life is not None and life.driver_down() is not None:
            self._attention.set()

    def _watch(self, life: Life, retries: int) -> int:
        """Return when a new life is needed; gives the number of attempts made in vain to get back lost
        GPUs."""
        born = self._clock()
        while not self._closing.is_set():
            self._attention.wait(self._config.retry_interval)
            self._attention.clear()
            if self._closing.is_set():
                return retries
            reason = life.driver_down()
            if reason is not None:
                self._set_driver_reason(
                    None if reason == "reload" else reason, f"driver: {reason}; loading it again"
                )
                if self._clock() - born < self._config.retry_interval and reason != "reload":
                    self._closing.wait(
                        self._config.retry_interval
                    )  # a driver that dies at once is not hurried
                return 0
            now = self._clock()
            states = [worker.state(now, self._config.hang_timeout) for worker in life.workers]
            if "hung" in states:
                continue  # nothing can be mended while a call is stuck
            if self._nvml.count() not in (life.listed, None):
                LOG.info("the driver lists other GPUs than before; loading it again")
                return 0
            lost = [state for state in states if state is not None]
            if not lost and not missing(tuple(self._known.values()), life.gpus):
                retries = 0
                continue
            if now - born >= min(LONGEST_RETRY, self._config.retry_interval * 2 ** min(retries + 1, 16)):
                LOG.info("loading the driver again to get back GPUs that are down")
                return retries + 1
        return retries

    def _set_driver_reason(self, reason: str | None, text: str) -> None:
        if reason != self._driver_reason:
            LOG.log(20 if reason is None else 30, "%s", text)
        self._driver_reason = reason
        self._changed.set()

    # Publisher

    def _publish_loop(self) -> None:
        while not self._closing.is_set():
            self._changed.wait(min(1.5 * self._config.interval, 1.5))
            self._changed.clear()
            try:
                self._publish(self._clock())
            except Exception:
                # Rather a stale snapshot that says its age than no publisher.
                LOG.exception("publishing the GPU snapshot failed")
                self._closing.wait(self._config.interval)

    def _views(self, now: float) -> list[GpuView]:
        life = self._life
        workers = {worker.gpu.uuid: worker for worker in life.workers} if life is not None else {}
        states = watched(life.gpus, life.watcher) if life is not None else {}
        views = []
        for uuid, gpu in sorted(self._known.items(), key=lambda item: item[1].index):
            worker = workers.get(uuid)
            if worker is None:
                views.append(GpuView(gpu, self._absent(gpu, life), None, None))
            else:
                down = worker.state(now, self._config.hang_timeout)
                views.append(GpuView(gpu, down, None if down else worker.reading, states.get(uuid)))
        return views

    def _absent(self, gpu: Gpu, life: Life | None) -> str:
        """Why a known GPU has no worker."""
        if life is None:
            return "driver"
        # Listed, but it does not even tell who it is: what ailed it before still does.
        return self._last_down.get(gpu.uuid, "gone") if life.listed > len(life.gpus) else "gone"

    def _publish(self, now: float) -> None:
        life = self._life
        if life is not None:
            life.crew.relieve(now)
        complete = self._tried.is_set() and all(
            worker.reading is not None or worker.down is not None for worker in (life.workers if life else ())
        )
        views = self._views(now)
        self._fast = fast_batch(views, self._fast)
        self._store.publish("gpu.fast", self._fast)
        allocations = self._workloads.allocations
        key = (
            allocations,
            self._driver(now),
            self._loads,
            self._xids.version,
            tuple((v.gpu.uuid, v.down, v.xid_state, v.reading.slow_at if v.reading else None) for v in views),
        )
        if key != self._slow_key:
            self._slow_key = key
            self._slow = slow_batch(views, self._xids, allocations, self._slow)
            self._driver_samples(self._slow, now)
            self._store.publish("gpu.slow", self._slow)
        self._complete = complete

    def _driver(self, now: float) -> str | None:
        busy_since = self._driver_busy_since
        if busy_since is not None and now - busy_since > self._config.hang_timeout:
            return "hung"
        return self._driver_reason

    def _driver_samples(self, batch: Batch, now: float) -> None:
        reason = self._driver(now)
        batch.add(families.DRIVER_UP, int(reason is None), reason or "")
        batch.add(families.DRIVER_LOADS, self._loads)
        life = self._life
        if life is not None:
            batch.add(families.GPUS, life.listed)

    def _fill_live(self, batch: Batch) -> None:
        """Ages at the moment of a scrape."""
        now = self._clock()
        life = self._life
        for worker in life.workers if life is not None else ():
            reading = worker.reading
            if reading is not None:
                age = max(0.0, round(now - reading.at, 3))
                batch.add(families.SNAPSHOT_AGE, age, worker.gpu.device, worker.gpu.uuid)


def create(context: PartContext) -> Part | None:
    """Make the part; None if `gpu.enabled` is false."""
    if not context.config.gpu.enabled:
        return None
    workloads = Workloads(context.config)
    context.add_capabilities(workloads.capabilities)
    return GpuPart(
        context.config,
        context.store,
        workloads,
        processes=context.gpu_processes,
        models=context.gpu_models,
    )
