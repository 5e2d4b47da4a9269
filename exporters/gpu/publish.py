"""Turns readings of all GPUs into the batches that a scrape sees. Pure: readings in, samples out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from exporters.gpu.device import Gpu
from exporters.gpu.observe import State
from exporters.gpu.worker import Reading
from exporters.gpu.xid import XidCounts
from gpuglass.families import gpu as families
from gpuglass.family import Batch
from gpuglass.podresources import Allocation


@dataclass(frozen=True, slots=True)
class GpuView:
    """One GPU as it is published: down with a reason, or up with a reading, or not read yet."""

    gpu: Gpu
    down: str | None
    reading: Reading | None
    xid_state: State | None


def fast_batch(views: Iterable[GpuView], previous: Batch) -> Batch:
    """Samples of the fast tier."""
    batch = Batch(previous=previous.samples)
    for view in views:
        scope = batch.scoped(view.gpu.device, view.gpu.uuid)
        if view.down is not None:
            scope.add(families.UP, 0, view.down)
        elif view.reading is not None:
            scope.add(families.UP, 1, "")
            for entry in view.reading.fast:
                scope.add(entry.family, entry.value, *entry.labels)
    return batch


def slow_batch(
    views: Iterable[GpuView], xids: XidCounts, allocations: Iterable[Allocation], previous: Batch
) -> Batch:
    """Samples of the slow tier. Identity, XIDs and allocations outlive a GPU that is down; its data do
    not."""
    batch = Batch(previous=previous.samples)
    views = tuple(views)
    for view in views:
        gpu = view.gpu
        scope = batch.scoped(gpu.device, gpu.uuid)
        scope.add(
            families.INFO,
            1,
            gpu.model,
            gpu.pci_bus_id,
            gpu.architecture,
            gpu.compute_capability,
            gpu.driver_version,
            gpu.cuda_version,
            gpu.mig_mode,
        )
        xids.fill(scope, gpu.uuid)
        if view.xid_state is not None:
            scope.add(families.CAPABILITY, 1, "xid_events", view.xid_state.value)
        if view.reading is not None and view.down is None:
            _data(scope, view.reading)
    _allocations(batch, allocations, device_names(views))
    return batch


def _data(scope: Batch, reading: Reading) -> None:
    for entry in reading.slow:
        scope.add(entry.family, entry.value, *entry.labels)
    for field, state in reading.states.items():
        scope.add(families.CAPABILITY, 1, field, state.value)
    for name, run in reading.runs.items():
        scope.add(families.COLLECTOR_DURATION, round(run.seconds, 4), name)
        scope.add(families.COLLECTOR_SUCCESS, int(run.success), name)


def device_names(views: Iterable[GpuView]) -> dict[str, tuple[Gpu, str]]:
    """GPU, and uuid of its MIG instance if it is one, by each name that the kubelet's plugins give to
    devices.

    GPU-… and MIG-… uuids, nvidia0 (GKE), gpu-0 (DRA), 0-1 (GPU index and GPU instance).
    """
    names: dict[str, tuple[Gpu, str]] = {}
    for view in views:
        gpu = view.gpu
        for name in (gpu.uuid, gpu.device, gpu.device.replace("nvidia", "gpu-")):
            names[name] = (gpu, "")
        for entry in view.reading.slow if view.reading is not None else ():
            if entry.family is families.MIG_INFO:
                mig_uuid, _, gpu_instance, _ = entry.labels
                names[mig_uuid] = names[f"{gpu.index}-{gpu_instance}"] = (gpu, mig_uuid)
    return names


def _allocations(
    batch: Batch, allocations: Iterable[Allocation], names: Mapping[str, tuple[Gpu, str]]
) -> None:
    """What the kubelet gave to containers; devices that NVML does not list here are left out."""
    found = {
        (gpu.device, gpu.uuid, held.namespace, held.pod, held.container, held.resource, mig_uuid): None
        for held in allocations
        if held.device_id in names
        for gpu, mig_uuid in (names[held.device_id],)
    }
    for labels in found:
        batch.add(families.ALLOCATION_INFO, 1, *labels)
