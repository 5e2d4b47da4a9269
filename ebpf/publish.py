"""The tracer's families, from what is known of the processes and of itself. Pure.

The first `limit` processes have series of their own, as long as they live and a minute longer; further ones
are summed in `process="other"`. None moves between the two, so no counter falls."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import gpuglass
from ebpf.layout import LATENCY_SLOTS, SIZE_SLOTS, Kind, Layer
from ebpf.ledger import Sums
from ebpf.results import result_name
from ebpf.view import Traced
from gpuglass.families import tracer as families
from gpuglass.family import Batch, Family, Histogram
from gpuglass.self_metrics import resident_bytes

_Labels = tuple[str, ...]
_Add = Callable[..., None]
LIBRARIES = {Layer.DRIVER: "libcuda", Layer.RUNTIME: "libcudart", Layer.TENSORS: "libc10_cuda"}
"""Label of a layer's library."""
_OTHER: _Labels = ("", "", "", "other", "")


@dataclass(frozen=True, slots=True)
class Self:
    """What the tracer says of itself."""

    loader: str
    state: str
    libraries: Mapping[Layer, int]
    probes: int
    unknown_functions: int
    losses: Mapping[str, int]
    calls: int
    trap_seconds: float
    program_seconds: float
    cost_ratio: float
    pair: float | None
    agent_connected: bool
    agent_dropped: int
    driver_up: bool
    started: float
    """Unix time."""


class Publisher:
    """Makes batches."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._admitted: set[int] = set()
        self._others: set[int] = set()

    def batch(self, processes: Iterable[Traced], wall_offset_ns: int, own: Self) -> Batch:
        """All samples. `wall_offset_ns` added to CLOCK_MONOTONIC gives Unix time."""
        batch = Batch()
        sums: dict[Family, dict[_Labels, float]] = {}
        merged: dict[_Labels, Sums] = {}
        listed = list(processes)
        self._admit(listed)

        def add(family: Family, value: float, *labels: str) -> None:
            into = sums.setdefault(family, {})
            into[labels] = into.get(labels, 0) + value

        for traced in listed:
            labels: _Labels = (*traced.identity, str(traced.process.pid))
            if traced.process.id not in self._admitted:
                labels = _OTHER
            self._of_ledger(traced, labels, add, merged)
            for reconciled in traced.reconciled if traced.ended_at is None else ():
                add(families.TRACKED, reconciled.tracked, *labels, reconciled.gpu_uuid)
                add(families.UNTRACKED, reconciled.untracked, *labels, reconciled.gpu_uuid)
            if labels is not _OTHER:
                since = round((traced.since_ns + wall_offset_ns) / 1e9, 3)
                sums.setdefault(families.SINCE, {})[labels] = since
                sums.setdefault(families.EXACT, {})[labels] = int(traced.exact)
                add(families.RESYNCS, traced.resyncs, *labels)
        for family, samples in sums.items():
            for of, value in samples.items():
                batch.add(family, value, *of)
        for of, one in merged.items():
            sizes = Histogram(_buckets(one.sizes, range(10, 40, 2), SIZE_SLOTS), one.allocated_bytes)
            times = Histogram(_buckets(one.latencies, range(10, 34, 2), LATENCY_SLOTS), one.allocate_ns / 1e9)
            batch.add_histogram(families.SIZE, sizes, *of)
            batch.add_histogram(families.LATENCY, times, *of)
        _of_itself(batch, own, len(listed))
        return batch

    def _admit(self, listed: list[Traced]) -> None:
        ids = {traced.process.id for traced in listed}
        self._admitted &= ids
        self._others &= ids
        for traced in listed:
            id = traced.process.id
            if id not in self._admitted and id not in self._others:
                (self._admitted if len(self._admitted) < self._limit else self._others).add(id)

    @staticmethod
    def _of_ledger(traced: Traced, labels: _Labels, add: _Add, merged: dict[_Labels, Sums]) -> None:
        for (layer, kind), sums in traced.process.sums.items():
            if layer is Layer.TENSORS:
                if traced.tensors_known:
                    add(families.TENSOR_LIVE, sums.live_bytes, *labels)
                    add(families.TENSOR_LIVE_COUNT, sums.live_count, *labels)
                add(families.TENSOR_ALLOCATED, sums.allocated_bytes, *labels)
                continue
            of_kind = (*labels, kind.name.lower())
            driver = layer is Layer.DRIVER
            if kind is not Kind.UNKNOWN:
                add(families.LIVE if driver else families.RUNTIME_LIVE, sums.live_bytes, *of_kind)
                add(
                    families.ALLOCATED if driver else families.RUNTIME_ALLOCATED,
                    sums.allocated_bytes,
                    *of_kind,
                )
            for how, size, count in (
                ("call", sums.freed_bytes, sums.frees),
                ("context", sums.context_bytes, sums.context_frees),
                ("exit", sums.exit_bytes, sums.exit_frees),
            ):
                if kind is not Kind.UNKNOWN:
                    add(families.FREED if driver else families.RUNTIME_FREED, size, *of_kind, how)
                if driver:
                    add(families.FREES, count, *of_kind, how)
            if driver and kind is not Kind.UNKNOWN:
                add(families.LIVE_COUNT, sums.live_count, *of_kind)
                if kind is not Kind.MAPPED:
                    _merge(merged.setdefault(of_kind, Sums()), sums)
        for (layer, kind, code), count in traced.process.failures.items():
            family = families.FAILURES if layer is Layer.DRIVER else families.RUNTIME_FAILURES
            add(family, count, *labels, kind.name.lower(), result_name(layer, code))
        for what, launches in (
            ("kernel", traced.process.record.launches),
            ("graph", traced.process.record.graph_launches),
        ):
            if launches:
                add(families.LAUNCHES, launches, *labels, what)


def _merge(into: Sums, sums: Sums) -> None:
    into.allocated_bytes += sums.allocated_bytes
    into.allocate_ns += sums.allocate_ns
    for index, count in enumerate(sums.sizes):
        into.sizes[index] += count
    for index, count in enumerate(sums.latencies):
        into.latencies[index] += count


def _buckets(slots: list[int], bounds: range, count: int) -> list[int]:
    """Counts by bucket from counts by power of two: slot n holds what is above 2^(n-1) up to 2^n."""
    found, start = [], 0
    for bound in bounds:
        found.append(sum(slots[start : bound + 1]))
        start = bound + 1
    return [*found, sum(slots[start:count])]


def _of_itself(batch: Batch, own: Self, processes: int) -> None:
    batch.add(families.INFO, 1, gpuglass.__version__, own.loader, os.uname().release, platform.machine())
    batch.add(families.STATE, 1, own.state)
    for layer, library in LIBRARIES.items():
        batch.add(families.LIBRARIES, own.libraries.get(layer, 0), library)
    batch.add(families.PROBES, own.probes)
    batch.add(families.UNKNOWN_SYMBOLS, own.unknown_functions)
    batch.add(families.PROCESSES, processes)
    batch.add(families.CALLS, own.calls)
    for what, count in own.losses.items():
        if what.startswith("held_back_"):
            batch.add(families.HELD_BACK, count, what.removeprefix("held_back_"))
        else:
            batch.add(families.LOST, count, what)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = round(usage.ru_utime + usage.ru_stime, 2)
    for part, seconds in (
        ("traps", own.trap_seconds),
        ("programs", own.program_seconds),
        ("collector", cpu),
    ):
        batch.add(families.COST, round(seconds, 6), part)
    batch.add(families.COST_RATIO, round(own.cost_ratio, 6))
    if own.pair is not None:
        batch.add(families.PAIR, round(own.pair, 9))
    batch.add(families.AGENT_UP, int(own.agent_connected))
    batch.add(families.AGENT_DROPPED, own.agent_dropped)
    batch.add(families.NVML_UP, int(own.driver_up))
    batch.add(families.CPU, cpu)
    batch.add(families.START, own.started)
    memory = resident_bytes()
    if memory is not None:
        batch.add(families.MEMORY, memory)
