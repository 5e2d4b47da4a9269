"""Who holds a GPU's memory and uses its SMs: processes, joined to container and pod.

The driver names pids; the resolver knows each pid's process and workload and guards against re-used pids.
Parts never exceed the whole: what no listed process holds is `unattributed`, and where the driver's parts are
larger than its own whole (they are read at different moments) they are scaled down and that is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pynvml

from exporters.gpu.collectors.memory import read_memory
from exporters.gpu.device import Gpu
from exporters.gpu.observe import Observations
from gpuglass.families import gpu as families
from gpuglass.family import Family, Tier

OTHER = ("", "", "", "other", "")
UNKNOWN_PROCESS = "unknown"
"""Name of processes whose pids mean nothing in our pid namespace."""

_LISTS = {
    "compute": (
        pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
        pynvml.nvmlDeviceGetComputeRunningProcesses_v2,
    ),
    "graphics": (
        pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses_v2,
    ),
    "mps": (
        pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
        pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v2,
    ),
}
"""Lists of processes by type, as newer and as older drivers give them. A process can stand in several."""

_GROWTH_RETRIES = 3
MIN_UTILIZATION_WINDOW = 2.0
"""Seconds between two reads of the SM shares: drivers sample them about each second, and a shorter look finds
nothing."""


def running(kind: str, handle: Any) -> Sequence[Any]:
    """Processes of one list; raises NVMLError."""
    newer, older = _LISTS[kind]
    for _ in range(_GROWTH_RETRIES):
        try:
            return list(newer(handle))
        except pynvml.NVMLError_InsufficientSize:
            continue  # a process started between the driver's two answers
        except pynvml.NVMLError_FunctionNotFound:
            return list(older(handle))
    raise pynvml.NVMLError(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)


class Resolve(Protocol):
    """Names of a pid that uses a device: (namespace, pod, container, process name); None if it has gone."""

    def __call__(self, pid: int, device_uuid: str) -> tuple[str, str, str, str] | None: ...


Listed = Callable[[str, Iterable[int]], None]
"""Takes note of the pids that the driver lists on a device, by its uuid."""


def _nobody_asks(uuid: str, pids: Iterable[int]) -> None:
    """The `Listed` of who does not care."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one process, or several of one name and workload, has of a GPU. None is unknown."""

    memory: float | None
    sm: float | None


@dataclass(slots=True)
class Admission:
    """Which names have series of their own: first come, and kept while they are there, at most `limit`."""

    limit: int
    admitted: dict[tuple[str, ...], None] = field(default_factory=dict)

    def admit(self, shares: Mapping[tuple[str, ...], Share]) -> set[tuple[str, ...]]:
        """Names among `shares` with series of their own; the rest goes to `other`."""
        self.admitted = {key: None for key in self.admitted if key in shares}
        newcomers = sorted(
            (key for key in shares if key not in self.admitted),
            key=lambda key: (-(shares[key].memory or 0), key),
        )
        for key in newcomers[: max(0, self.limit - len(self.admitted))]:
            self.admitted[key] = None
        return set(self.admitted)


def combine(shares: Iterable[tuple[tuple[str, ...], Share]]) -> dict[tuple[str, ...], Share]:
    """Sum shares of the same key; a sum with an unknown part is unknown."""
    total: dict[tuple[str, ...], Share] = {}
    for key, share in shares:
        other = total.get(key)
        total[key] = (
            share if other is None else Share(_plus(other.memory, share.memory), _plus(other.sm, share.sm))
        )
    return total


def _plus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left + right


def scale_to(parts: Mapping[int, float], whole: float) -> tuple[dict[int, float], bool]:
    """Parts that add up to at most `whole`, and whether they had to be scaled down."""
    total = sum(parts.values())
    if total <= whole or total <= 0:
        return dict(parts), False
    return {pid: value * whole / total for pid, value in parts.items()}, True


class UtilizationCursor:
    """SM share by pid since the last look, from whichever call this driver has."""

    def __init__(self) -> None:
        self._since_us = 0
        self._read_at = 0.0
        self._latest: dict[int, float] | None = None

    def read(self, see: Observations, handle: Any, now: float) -> dict[int, float] | None:
        """Ratio of SM time by pid; an idle process is not in it. None if the driver does not tell."""
        if self._latest is None or now - self._read_at >= MIN_UTILIZATION_WINDOW:
            self._latest, self._read_at = self._read(see, handle), now
        return self._latest

    def _read(self, see: Observations, handle: Any) -> dict[int, float] | None:
        samples = see.read_list(
            "process_sm", pynvml.nvmlDeviceGetProcessesUtilizationInfo, handle, self._since_us
        )
        if samples is None:
            samples = see.read_list(
                "process_sm_old", pynvml.nvmlDeviceGetProcessUtilization, handle, self._since_us
            )
        if samples is None:
            return None
        latest: dict[int, tuple[int, float]] = {}
        for sample in samples:
            stale = sample.timeStamp <= self._since_us or sample.timeStamp > _FAR_FUTURE_US
            if stale or sample.pid <= 0 or sample.smUtil > 100:
                continue  # buffers of some drivers hold garbage between real samples
            if sample.timeStamp >= latest.get(sample.pid, (0, 0.0))[0]:
                latest[sample.pid] = (sample.timeStamp, sample.smUtil / 100)
        first, self._since_us = (
            self._since_us == 0,
            max([self._since_us, 1, *(when for when, _ in latest.values())]),
        )
        # The first answer holds samples of any age since the driver was loaded: it sets the cursor, no more.
        return None if first else {pid: ratio for pid, (_, ratio) in latest.items()}


_FAR_FUTURE_US = 4_102_444_800_000_000  # the year 2100


class Attribution:
    """Splits the memory and SM time of one device or MIG instance over workloads."""

    def __init__(
        self, resolve: Resolve, limit: int, pid_label: bool, sm: bool, listed: Listed = _nobody_asks
    ) -> None:
        self._resolve = resolve
        self._listed = listed
        self._admission = Admission(limit)
        self._pid_label = pid_label
        self._cursor = UtilizationCursor() if sm else None
        self.clamped = {"memory": 0, "sm": 0}

    def collect(
        self,
        see: Observations,
        now: float,
        handle: Any,
        uuid: str,
        memory_family: Family,
        unattributed: Family,
        *labels: str,
    ) -> dict[str, int]:
        """Note the parts of one device; gives the number of processes by type."""
        held, counts = self._held(see, handle)
        if held is None:
            return counts
        self._listed(uuid, held)
        whole = read_memory(see, handle)
        known = {pid: value for pid, value in held.items() if value is not None}
        if whole is not None:
            known, clamped = scale_to(known, whole.used)
            self.clamped["memory"] += clamped
        sm = self._cursor.read(see, handle, now) if self._cursor is not None else None
        if sm is not None:
            sm, clamped = scale_to(
                {pid: ratio for pid, ratio in sm.items() if pid in held or self._alive(pid, uuid)}, 1
            )
            self.clamped["sm"] += clamped
        named = {pid: key for pid in {*held, *(sm or ())} if (key := self._key(pid, uuid)) is not None}
        shares = combine(
            (key, Share(known.get(pid) if pid in held else 0, None if sm is None else sm.get(pid, 0.0)))
            for pid, key in named.items()
        )
        self._emit(see, shares, memory_family, *labels)
        if whole is not None and len(known) == len(held):
            attributed = sum(int(value) for pid, value in known.items() if pid in named)
            see.add(unattributed, max(0, whole.used - attributed), *labels)
        return counts

    def _held(self, see: Observations, handle: Any) -> tuple[dict[int, float | None] | None, dict[str, int]]:
        """Bytes by pid (None: hidden) over all lists, and the number of processes in each."""
        held: dict[int, float | None] = {}
        counts: dict[str, int] = {}
        answered = False
        for kind in _LISTS:
            processes = see.read_list(f"processes_{kind}", running, kind, handle)
            if processes is None:
                continue
            answered = True
            counts[kind] = len(processes)
            for process in processes:
                if process.pid > 0:
                    used = process.usedGpuMemory
                    before = held.get(process.pid)
                    held[process.pid] = used if before is None else max(before, used or 0)
        return (held if answered else None), counts

    def _alive(self, pid: int, uuid: str) -> bool:
        return self._resolve(pid, uuid) is not None

    def _key(self, pid: int, uuid: str) -> tuple[str, ...] | None:
        names = self._resolve(pid, uuid)
        return None if names is None else (*names, str(pid) if self._pid_label else "")

    def _emit(
        self, see: Observations, shares: Mapping[tuple[str, ...], Share], memory_family: Family, *labels: str
    ) -> None:
        admitted = self._admission.admit(shares)
        capped = combine((key if key in admitted else OTHER, share) for key, share in shares.items())
        for key, share in capped.items():
            see.add(memory_family, None if share.memory is None else int(share.memory), *labels, *key)
            if self._cursor is not None:
                see.add(families.PROCESS_SM, None if share.sm is None else round(share.sm, 4), *labels, *key)


class Processes:
    """Processes of a GPU that is not split by MIG."""

    name = "processes"
    tier = Tier.SLOW

    def __init__(
        self, gpu: Gpu, resolve: Resolve, limit: int, pid_label: bool, listed: Listed = _nobody_asks
    ) -> None:
        self._gpu = gpu
        self._attribution = Attribution(resolve, limit, pid_label, True, listed)

    def collect(self, see: Observations, now: float) -> None:
        """Note memory and SM share by workload, what is unattributed, and the number of processes."""
        counts = self._attribution.collect(
            see, now, self._gpu.handle, self._gpu.uuid, families.PROCESS_MEMORY, families.MEMORY_UNATTRIBUTED
        )
        for kind, count in counts.items():
            see.add(families.PROCESSES, count, kind)
        for kind, count in self._attribution.clamped.items():
            see.add(families.PROCESSES_CLAMPED, count, kind)

    def close(self) -> None:
        """Nothing is held."""
