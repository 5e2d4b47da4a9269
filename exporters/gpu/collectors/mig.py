"""MIG instances of a GPU, in families of their own.

Compute instances of one GPU instance share its memory and its GPM counters: those are reported once, at the
lowest compute instance, so that a sum over instances never counts a byte twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml

from exporters.gpu import gpm
from exporters.gpu.collectors.memory import read_memory
from exporters.gpu.collectors.processes import Attribution
from exporters.gpu.device import Gpu, mig_mode, text
from exporters.gpu.observe import Observations
from gpuglass.families import gpu as families
from gpuglass.family import Tier

_GPM_FAMILIES = {
    gpm.GRAPHICS: families.MIG_BUSY,
    gpm.SM: families.MIG_SM_ACTIVE,
    gpm.OCCUPANCY: families.MIG_SM_OCCUPANCY,
    gpm.DRAM: families.MIG_DRAM_ACTIVE,
}


@dataclass(frozen=True, slots=True)
class Instance:
    """One MIG device: a compute instance in a GPU instance."""

    handle: Any
    uuid: str
    profile: str
    gpu_instance: int
    compute_instance: int


def instances(see: Observations, handle: Any) -> tuple[Instance, ...]:
    """MIG devices of a GPU, lowest GPU and compute instance first."""
    highest = see.read("mig", pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
    found = []
    for index in range(highest):
        try:
            mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
            found.append(
                Instance(
                    mig,
                    text(pynvml.nvmlDeviceGetUUID(mig)),
                    _profile(text(pynvml.nvmlDeviceGetName(mig))),
                    pynvml.nvmlDeviceGetGpuInstanceId(mig),
                    pynvml.nvmlDeviceGetComputeInstanceId(mig),
                )
            )
        except pynvml.NVMLError_NotFound:
            continue  # slots need not be filled in order
        except pynvml.NVMLError as error:
            see.failed("mig", error)
    return tuple(sorted(found, key=lambda instance: (instance.gpu_instance, instance.compute_instance)))


def _profile(name: str) -> str:
    """1g.18gb of "NVIDIA H200 MIG 1g.18gb"."""
    return name.rpartition("MIG ")[2]


class MigInstances:
    """Which instances there are: looked up by the slow collector, read by the fast one of the same GPU."""

    name = "mig"
    tier = Tier.SLOW

    def __init__(self, gpu: Gpu, attribution: Callable[[], Attribution]) -> None:
        self._gpu = gpu
        self._make_attribution = attribution
        self._attributions: dict[str, Attribution] = {}
        self.leaders: tuple[Instance, ...] = ()
        """The lowest compute instance of each GPU instance, which reports what they share."""

    def collect(self, see: Observations, now: float) -> None:
        """Note identity, memory and processes of each instance."""
        found = instances(see, self._gpu.handle) if mig_mode(self._gpu.handle) == "enabled" else ()
        leaders: dict[int, Instance] = {}
        for instance in found:
            leaders.setdefault(instance.gpu_instance, instance)
            see.add(
                families.MIG_INFO,
                1,
                instance.uuid,
                instance.profile,
                str(instance.gpu_instance),
                str(instance.compute_instance),
            )
        self.leaders = tuple(leaders.values())
        self._attributions = {
            instance.uuid: self._attributions.get(instance.uuid) or self._make_attribution()
            for instance in found
        }
        for instance in self.leaders:
            self._memory(see, now, instance)

    def _memory(self, see: Observations, now: float, instance: Instance) -> None:
        memory = read_memory(see, instance.handle, "mig_memory")
        if memory is not None:
            see.add(families.MIG_MEMORY_TOTAL, memory.total, instance.uuid)
            see.add(families.MIG_MEMORY_FREE, memory.free, instance.uuid)
            see.add(families.MIG_MEMORY_RESERVED, memory.reserved, instance.uuid)
        self._attributions[instance.uuid].collect(
            see,
            now,
            instance.handle,
            instance.uuid,
            families.MIG_PROCESS_MEMORY,
            families.MIG_MEMORY_UNATTRIBUTED,
            instance.uuid,
        )

    def close(self) -> None:
        """Nothing is held."""


class MigActivity:
    """Memory used and GPM ratios of each instance."""

    name = "mig_activity"
    tier = Tier.FAST

    def __init__(self, gpu: Gpu, known: MigInstances) -> None:
        self._gpu = gpu
        self._known = known
        self._samplers: dict[str, gpm.GpmSampler] = {}

    def collect(self, see: Observations, now: float) -> None:
        """Note them for the instances that the slow collector found last."""
        leaders = self._known.leaders
        for uuid in self._samplers.keys() - {instance.uuid for instance in leaders}:
            self._samplers.pop(uuid).close()  # a new instance may get an old one's number, never its uuid
        for instance in leaders:
            memory = read_memory(see, instance.handle, "mig_memory")
            if memory is not None:
                see.add(families.MIG_MEMORY_USED, memory.used, instance.uuid)
            sampler = self._samplers.get(instance.uuid)
            if sampler is None:
                sampler = self._samplers[instance.uuid] = self._sampler(instance)
            answer = sampler.sample(see)
            if answer is not None:
                gpm.add_ratios(see, answer[0], _GPM_FAMILIES, families.MIG_PIPE_ACTIVE, instance.uuid)

    def _sampler(self, instance: Instance) -> gpm.GpmSampler:
        def take(buffer: Any) -> None:
            pynvml.nvmlGpmMigSampleGet(self._gpu.handle, instance.gpu_instance, buffer)

        return gpm.GpmSampler(take, gpm.RATIOS, "mig_")

    def close(self) -> None:
        """Free GPM's buffers."""
        for sampler in self._samplers.values():
            sampler.close()
        self._samplers.clear()
