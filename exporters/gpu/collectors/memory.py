"""Device memory and BAR1 of a GPU or a MIG instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pynvml

from exporters.gpu.device import Gpu
from exporters.gpu.observe import Observations
from gpuglass.families import gpu as families
from gpuglass.family import Tier


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of device memory. `reserved` is None where the driver counts it into `used` (before 510)."""

    total: int
    used: int
    free: int
    reserved: int | None


def read_memory(see: Observations, handle: Any, field: str = "memory") -> Memory | None:
    """Read memory by version 2 of the call, else by version 1."""
    info = see.read(f"{field}_reserved", pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    if info is not None:
        see.succeeded(field)
        return Memory(info.total, info.used, info.free, info.reserved)
    info = see.read(field, pynvml.nvmlDeviceGetMemoryInfo, handle)
    return None if info is None else Memory(info.total, info.used, info.free, None)


class MemoryUsed:
    """Used memory, each fast sample; remembers the whole for the slow collectors of the same GPU."""

    name = "memory_used"
    tier = Tier.FAST

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.latest: Memory | None = None

    def collect(self, see: Observations, now: float) -> None:
        """Note the used bytes."""
        self.latest = read_memory(see, self._gpu.handle)
        if self.latest is not None:
            see.add(families.MEMORY_USED, self.latest.used)

    def close(self) -> None:
        """Nothing is held."""


class MemoryRest:
    """Total, free and reserved memory as last read by `MemoryUsed`, and BAR1."""

    name = "memory"
    tier = Tier.SLOW

    def __init__(self, gpu: Gpu, used: MemoryUsed) -> None:
        self._gpu = gpu
        self._used = used

    def collect(self, see: Observations, now: float) -> None:
        """Note the parts of memory that change seldom."""
        memory = self._used.latest
        if memory is not None:
            see.add(families.MEMORY_TOTAL, memory.total)
            see.add(families.MEMORY_FREE, memory.free)
            see.add(families.MEMORY_RESERVED, memory.reserved)
        bar1 = see.read("bar1", pynvml.nvmlDeviceGetBAR1MemoryInfo, self._gpu.handle)
        if bar1 is not None:
            see.add(families.BAR1_TOTAL, bar1.bar1Total)
            see.add(families.BAR1_USED, bar1.bar1Used)

    def close(self) -> None:
        """Nothing is held."""
