"""The running tracer: loads the program, finds libraries, reads the ledger, keeps within its budget, tells
what it sees.

One thread does all of it, woken by starting programs, ending processes and time. The /metrics server, the
connection to the agent and the driver's figures have threads of their own and only pass values."""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import Protocol

from ebpf import gate, kernel, symbols
from ebpf.attach import Attacher
from ebpf.cost import Budget, Spent, measure_pair
from ebpf.discovery import Discovery
from ebpf.layout import EVENT, EXECED, Event, EventType, Kind, Layer, Record, map_specs
from ebpf.ledger import Holding, Ledger, Process, drifts
from ebpf.loaders import PROGRAM, RAW_TRACEPOINTS, load
from ebpf.maps import Maps
from ebpf.nvml import Nvml
from ebpf.publish import Publisher, Self
from ebpf.reconcile import reconcile, visible_gpus
from ebpf.send import Sender
from ebpf.stacks import Names
from ebpf.view import Traced
from gpuglass.config import Config
from gpuglass.family import Batch
from gpuglass.logs import LOG
from gpuglass.procfs import ProcFs
from gpuglass.workload import WorkloadResolver
from gpuglass_vllm import records

RING_BYTES = 1 << 19
PER_SECOND = (100, 100, 100)
"""Most failures, large allocations and starts of programs that the kernel tells in a second."""
LINGER = 60.0
"""Seconds for which the last values of an ended process are shown, and an unused library stays probed."""
NAMELESS = 15.0
"""Seconds after which a process without a namespace is taken to have none."""
_TICKS = os.sysconf("SC_CLK_TCK")
_TICK = 1.0


class Publish(Protocol):
    """Where batches go: `Store.publish`."""

    def __call__(self, source: str, batch: Batch, /) -> None: ...


def default_object() -> Path:
    """Where `make bpf` puts the object for this machine."""
    return PROGRAM / f"trace.{os.uname().machine}.o"


def groups_of(config: Config) -> frozenset[str]:
    """Groups of functions that the configuration asks for."""
    wanted = {symbols.MEMORY}
    if config.tracer.contexts:
        wanted.add(symbols.CONTEXTS)
    if config.tracer.launches != "off":
        wanted.add(symbols.GRAPHS)
    if config.tracer.launches == "all":
        wanted.add(symbols.LAUNCHES)
    return frozenset(wanted)


def layers_of(config: Config, multi: bool) -> frozenset[Layer]:
    """Ledgers that the configuration asks for, as far as the kernel can have them."""
    wanted = {Layer.DRIVER}
    if config.tracer.runtime:
        wanted.add(Layer.RUNTIME)
    if config.tracer.tensors and multi:
        wanted.add(Layer.TENSORS)
    elif config.tracer.tensors:
        LOG.warning("tracer.tensors needs Linux 6.6 or newer: PyTorch's tensors are not traced")
    return frozenset(wanted)


class Tracer:
    """Made (which loads the program and may raise `LoaderError`), run, stopped."""

    def __init__(self, config: Config, publish: Publish, only: frozenset[int] = frozenset()) -> None:
        self._config = config.tracer
        self._publish = publish
        self._proc = ProcFs(config.proc)
        groups = groups_of(config)
        object_file = Path(config.tracer.object) if config.tracer.object else default_object()
        version = gate.kernel_version(os.uname().release)
        multi = kernel.has_uprobe_multi(version)
        layers = layers_of(config, multi)
        self.maps = Maps(map_specs(config.tracer.live_entries, RING_BYTES), version)
        failures, large, starts = PER_SECOND
        rates = (failures, large, config.tracer.samples_per_second, starts)
        self.maps.configure(config.tracer.large_bytes, rates, bool(only), True)
        for pid in only:
            self.maps["filter"].set(pid.to_bytes(4, "little"), (1).to_bytes(4, "little"))
        self._loaded = load(
            config.tracer.loader, object_file, self.maps.fds, symbols.programs(groups, layers), multi
        )
        self.loader = self._loaded.loader
        self._tracepoints = [
            kernel.attach_raw_tracepoint(self._loaded.programs[name], tracepoint)
            for name, tracepoint in RAW_TRACEPOINTS.items()
        ]
        self.pair = measure_pair(self._loaded.programs["empty"], multi)
        self.attacher = Attacher(self._loaded.programs, groups, layers, multi, self.maps["sites"])
        self.discovery = Discovery(self.attacher, self._proc)
        self.ledger = Ledger(self.maps)
        self._events: deque[Event] = deque(maxlen=8192)
        self._started: dict[int, None] = {}
        self._ring = self._loaded.open_ring(self.maps["events"].fd, self._take)
        self._resolver = WorkloadResolver(
            self._proc, Path(config.kubernetes.container_logs), Path(config.kubernetes.pod_logs)
        )
        self._names = Names(self._proc)
        self._nvml = Nvml(config.gpu.nvml_library, config.tracer.reconcile_interval)
        self._sender = Sender(config.tracer.socket) if config.tracer.socket else None
        self._publisher = Publisher(config.tracer.processes)
        self._budget = Budget(config.tracer.budget, self.pair or 0.0)
        self._over_budget = False
        self._cost = 0.0
        self.traced: dict[int, Traced] = {}
        self._pidfds: dict[int, int] = {}
        """Descriptors of living processes by pid."""
        self._epoll = select.epoll()
        self._epoll.register(self.maps["events"].fd, select.EPOLLIN)
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        self._began = time.time()
        self._calls_gone = 0
        self._programs_gone = 0.0
        self._serial = 0

    # Life

    def stop(self, *_: int | FrameType | None) -> None:
        """Ask `run` to come back; may be called from a signal handler."""
        self._stopping = True
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def run(self) -> None:
        """Trace until stopped."""
        self._nvml.start()
        if self._sender is not None:
            self._sender.start()
        try:
            self.discovery.host()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # imports and libbpf leave 1 to 2 MB behind
            next_tick = next_read = next_reconcile = 0.0
            while not self._stopping:
                now = time.monotonic()
                if now >= next_tick:
                    next_tick = now + _TICK
                    self._look(now)
                if now >= next_read:
                    next_read = now + self._config.interval
                    self.read(now)
                if now >= next_reconcile:
                    next_reconcile = now + self._config.reconcile_interval
                    self.reconcile(now)
                self._wait(max(min(next_tick, next_read, next_reconcile) - time.monotonic(), 0.0))
            self.read(time.monotonic())
        finally:
            self.close()

    def close(self) -> None:
        """Take everything off and give everything back."""
        self.attacher.close()
        for fd in (*self._tracepoints, *self._loaded.programs.values(), *self._pidfds.values()):
            os.close(fd)
        self._ring.close()
        self._epoll.close()
        self._nvml.stop()
        if self._sender is not None:
            self._sender.stop()
        self.maps.close()

    def _wait(self, timeout: float) -> None:
        for fd, _ in self._epoll.poll(timeout):
            if fd == self._wake_read:
                with suppress(BlockingIOError):
                    os.read(fd, 512)
        self._ring.consume()
        now = time.monotonic()
        for pid in self._started:
            if not self._over_budget:
                self.discovery.started(pid, now)
        self._started.clear()
        self._reap(now)

    def _take(self, raw: bytes) -> None:
        event = Event(*EVENT.unpack(raw))
        if event.type == EventType.EXEC:
            self._started[event.tgid] = None
        else:
            self._events.append(event)

    def _look(self, now: float) -> None:
        if self._over_budget:
            return
        self.discovery.round(now, self._nvml.latest().memory)
        self.attacher.detach_unused(now, LINGER)

    # The ledger

    def _reap(self, now: float) -> None:
        """Take note of processes that have ended, and settle their accounts."""
        dead = set()
        for pid, fd in self._pidfds.items():
            if select.select([fd], [], [], 0)[0]:
                dead.add(pid)
        if dead:
            self.read(now)

    def read(self, now: float) -> None:
        """Read the kernel's sums, settle what has ended, watch the budget, publish."""
        self._ring.consume()
        found = self.ledger.read()
        current = self.ledger.current()
        for id, process in found.items():
            self._know(id, process, now)
        self._settle(found, current, now)
        self._tell_events()
        self._watch_cost(found, now)
        self._forget(now)
        self._publish("tracer", self._batch())

    def _know(self, id: int, process: Process, now: float) -> None:
        traced = self.traced.get(id)
        if traced is not None:
            traced.process = process
            found = self._resolver.resolve(process.pid)
            if found is not None and found[0].start_time == traced.start_ticks:
                traced.workload = found[1]
            self._decide(traced, now)
            return
        resolved = self._resolver.resolve(process.pid)
        name = process.record.comm.split(b"\0", 1)[0].decode("utf-8", "replace")
        traced = Traced(process, name, 0, seen_at=now)
        if resolved is not None:
            traced.name, traced.start_ticks = resolved[0].name, resolved[0].start_time
            traced.workload = resolved[1]
        traced.started_ns = _started_ns(traced.start_ticks)
        traced.since_ns = self._complete_since(process.pid, traced.started_ns, process.record)
        self.traced[id] = traced
        if process.pid not in self._pidfds:
            with suppress(OSError):  # gone already: seen when accounts are settled
                self._pidfds[process.pid] = fd = os.pidfd_open(process.pid)
                self._epoll.register(fd, select.EPOLLIN)
        self._decide(traced, now)

    def _decide(self, traced: Traced, now: float) -> None:
        """Whether a process is to be traced. A pod's names may come some seconds after its first call."""
        if traced.wanted is not None:
            return
        patterns = self._config.namespaces
        if not patterns or traced.workload.is_named:
            namespace = traced.workload.namespace
            matches = (fnmatchcase(namespace, pattern) for pattern in patterns)
            traced.wanted = not patterns or any(matches)
        elif now - traced.seen_at > NAMELESS:
            traced.wanted = False
        if traced.wanted is False:
            self.ledger.ignore(traced.process.pid)

    def _complete_since(self, pid: int, started_ns: int, record: Record) -> int:
        """A process that began after its library was probed is known from its beginning."""
        libraries = self.discovery.libraries.get(pid) or self.discovery.look(pid, time.monotonic())
        libraries = libraries or self.attacher.all()
        drivers = [one for one in libraries if one.layer is Layer.DRIVER]
        if not drivers or not started_ns:
            return record.first_ns
        return max(started_ns, *(one.attached_ns for one in drivers))

    def _knows_tensors(self, traced: Traced) -> bool:
        """Whether all live tensors of a process are in the ledger: its PyTorch was probed before the process
        began, or, in a process whose driver's calls are all known, before the first of these."""
        allocators = [
            one.attached_ns
            for one in self.discovery.libraries.get(traced.process.pid, [])
            if one.layer is Layer.TENSORS
        ]
        if not allocators or not traced.started_ns:
            return False
        is_whole = traced.since_ns == traced.started_ns
        return max(allocators) <= (traced.process.record.first_ns if is_whole else traced.started_ns)

    def _settle(self, found: dict[int, Process], current: dict[int, int], now: float) -> None:
        """What has ended: replaced by exec, or its process is gone."""
        ended = {id for id, process in found.items() if self._has_ended(id, process, current)}
        for id in ended:
            traced = self.traced[id]
            for sums in traced.process.sums.values():
                sums.end()
            traced.process.devices.clear()
            traced.reconciled.clear()
            traced.holdings.clear()
            traced.ended_at = now
            self._calls_gone += traced.process.record.calls
            self._programs_gone += traced.process.record.spent_ns / 1e9
        self.ledger.forget(frozenset(ended))
        alive = {process.pid for id, process in found.items() if id not in ended}
        for pid in [pid for pid in self._pidfds if pid not in alive]:
            fd = self._pidfds.pop(pid)
            self._epoll.unregister(fd)
            os.close(fd)

    def _has_ended(self, id: int, process: Process, current: dict[int, int]) -> bool:
        if process.record.reason == EXECED or current.get(process.pid, id) != id:
            return True
        fd = self._pidfds.get(process.pid)
        if fd is not None:
            return bool(select.select([fd], [], [], 0)[0])
        try:
            os.close(os.pidfd_open(process.pid))
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False

    def _forget(self, now: float) -> None:
        for id in [
            id for id, traced in self.traced.items() if traced.ended_at and now - traced.ended_at > LINGER
        ]:
            del self.traced[id]
            self._names.forget(id)

    def _tell_events(self) -> None:
        while self._events:
            event = self._events.popleft()
            traced = self.traced.get(event.id)
            if traced is None or not traced.wanted or self._sender is None:
                continue
            frames = self._names.frames(event.id, event.tgid, self.ledger.stack(event.stack))
            self._sender.event(event, traced.start_ticks, frames)

    # The driver's figures

    def reconcile(self, now: float) -> None:
        """Compare each process with what the driver lists, and tell the agent."""
        usage = self._nvml.latest()
        is_new, self._serial = usage.serial != self._serial, usage.serial
        before, holdings, after = self.ledger.read(), self.ledger.holdings(), self.ledger.read()
        for id, traced in self.traced.items():
            if traced.ended_at is not None:
                continue
            traced.holdings = holdings.get(id, {})
            traced.tensors_known = traced.tensors_known or self._knows_tensors(traced)
            if id in before and id in after:
                self._check_drift(traced, drifts(before[id], after[id], traced.holdings))
            lost = traced.process.record.lost
            if lost > traced.lost_before:
                traced.exact = False
            if is_new:
                self._compare(traced, usage.memory.get(traced.process.pid, {}), list(usage.gpus))
        if self._sender is not None:
            told = []
            for traced in self.traced.values():
                if traced.wanted and not traced.told_end:
                    traced.told_end = traced.ended_at is not None
                    told.append((traced, self._owners(traced)))
            self._sender.processes(time.monotonic_ns(), told)

    def _check_drift(self, traced: Traced, found: dict[Kind, int]) -> None:
        """A difference that stays is no call under way: the sum is corrected, and tracking begins anew."""
        if traced.corrected and not found:
            traced.corrected = False
            self._resync(traced)
        for kind, drift in found.items():
            if traced.drift.get(kind) == drift:
                LOG.warning(
                    "%s: %d bytes too many in %s memory; corrected", traced.name, drift, kind.name.lower()
                )
                self.ledger.correct(traced.process.id, kind, drift)
                traced.corrected, traced.exact = True, False
        traced.drift = {} if traced.corrected else found

    @staticmethod
    def _resync(traced: Traced) -> None:
        """What was lost is settled: the ledger is complete for what comes."""
        traced.lost_before = traced.process.record.lost
        traced.since_ns = time.monotonic_ns()
        traced.resyncs += 1
        traced.epoch += 1
        traced.exact = True

    def _compare(self, traced: Traced, listed: dict[str, int | None] | object, gpus: list[str]) -> None:
        assert isinstance(listed, dict)
        visible = None
        if len(listed) > 1:
            environment = self._proc.read(traced.process.pid, "environ", 1 << 18) or b""
            visible = visible_gpus(environment, gpus)
        traced.reconciled = reconcile(traced.process.devices, listed, visible)
        contradicts = any(one.contradicts for one in traced.reconciled)
        if contradicts:
            traced.exact = False
        elif not traced.exact and not traced.corrected and traced.reconciled:
            self._resync(traced)  # what was lost stands in the untracked part from now on

    def _owners(self, traced: Traced) -> list[records.CudaOwner]:
        assert self._sender is not None
        most = sorted(traced.holdings.items(), key=lambda item: -item[1].bytes)
        merged: dict[tuple[int, Kind], Holding] = {}
        for (kind, number), holding in most[: 4 * records.MAX_STACKS]:
            frames = self._names.frames(traced.process.id, traced.process.pid, self.ledger.stack(number))
            id = self._sender.stack(frames)
            if not id:
                continue
            into = merged.setdefault((id, kind), Holding(0, 0, holding.oldest_ns))
            into.bytes += holding.bytes
            into.count += holding.count
            into.oldest_ns = min(into.oldest_ns, holding.oldest_ns)
        return [
            records.CudaOwner(
                stack=id,
                kind=kind.name.lower(),
                live_bytes=holding.bytes,
                live_allocations=holding.count,
                oldest_ns=holding.oldest_ns,
            )
            for (id, kind), holding in list(merged.items())[: records.MAX_STACKS]
        ]

    # Cost

    def _watch_cost(self, found: dict[int, Process], now: float) -> None:
        spent = {id: Spent(p.record.calls, p.record.spent_ns / 1e9) for id, p in found.items()}
        self._cost = self._budget.cost(now, spent, time.process_time())
        if self._over_budget or not self._budget.exceeded(self._cost):
            return
        self._over_budget = True
        self.attacher.close()
        LOG.error(
            "tracing takes %.2f %% of a core per traced process, more than tracer.budget (%.2f %%): all "
            "probes are off "
            "until the tracer is started again",
            100 * self._cost,
            100 * self._config.budget,
        )

    # Output

    def _batch(self) -> Batch:
        alive = [traced.process.record for traced in self.traced.values() if traced.ended_at is None]
        calls = self._calls_gone + sum(record.calls for record in alive)
        programs = self._programs_gone + sum(record.spent_ns for record in alive) / 1e9
        attached = self.attacher.all()
        state = "over_budget" if self._over_budget else "tracing" if attached else "waiting"
        libraries = {layer: sum(one.layer is layer for one in attached) for layer in Layer}
        own = Self(
            loader=self.loader,
            state=state,
            libraries=libraries,
            probes=sum(one.functions for one in attached),
            unknown_functions=sum(len(one.unknown) for one in attached),
            losses=self.ledger.losses(),
            calls=calls,
            trap_seconds=calls * (self.pair or 0.0),
            program_seconds=programs,
            cost_ratio=self._cost,
            pair=self.pair,
            agent_connected=self._sender is not None and self._sender.connected,
            agent_dropped=self._sender.dropped if self._sender is not None else 0,
            driver_up=self._nvml.up,
            started=round(self._began, 3),
        )
        offset = time.time_ns() - time.monotonic_ns()
        return self._publisher.batch([one for one in self.traced.values() if one.wanted], offset, own)


def _started_ns(start_ticks: int) -> int:
    """CLOCK_MONOTONIC of a process's start; 0: unknown."""
    if not start_ticks:
        return 0
    offset = time.monotonic_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return start_ticks * 1_000_000_000 // _TICKS + offset


def stop_on_signals(stop: Callable[..., None]) -> None:
    """Call `stop` on SIGTERM and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
