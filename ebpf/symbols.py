"""Which functions are probed, with which programs.

A library exports a function in several variants: `_v2` (64-bit addresses, where the first version has 32-bit
ones), `_ptsz` and `_ptds` (per-thread default stream). Each exported variant is a function of its own and is
probed, except where two names stand for one address. A version that this table does not know has arguments
that it does not know: it is not probed but named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ebpf.layout import Layer


@dataclass(frozen=True, slots=True)
class Probe:
    """Programs at a function's entry and return; no program at the return if that is empty."""

    entry: str
    leave: str = ""


@dataclass(frozen=True, slots=True)
class Function:
    """One function by its plain name, with the programs for each version of its arguments."""

    group: str
    versions: Mapping[int, Probe]
    """1 is the name without `_v`."""


MEMORY, CONTEXTS, LAUNCHES, GRAPHS = "memory", "contexts", "launches", "graphs"
"""Groups of functions, which can be switched on and off apart. `contexts` are the frequent ones among those
that tell an allocation's context."""


def _same(group: str, entry: str, leave: str = "", versions: Iterable[int] = (1, 2)) -> Function:
    return Function(group, dict.fromkeys(versions, Probe(entry, leave)))


def _grown(entry: str, leave: str) -> Function:
    """The first version has 32-bit addresses or sizes."""
    return Function(MEMORY, {1: Probe(f"{entry}_32", leave), 2: Probe(entry, leave)})


DRIVER: Mapping[str, Function] = {
    "cuMemAlloc": _grown("alloc_device", "left_alloc"),
    "cuMemAllocPitch": _grown("alloc_pitch", "left_alloc"),
    "cuMemAllocHost": _grown("alloc_host", "left_alloc"),
    "cuMemAllocManaged": _same(MEMORY, "alloc_managed", "left_alloc", (1,)),
    "cuMemHostAlloc": _same(MEMORY, "alloc_host", "left_alloc", (1,)),
    "cuMemAllocAsync": _same(MEMORY, "alloc_device", "left_alloc", (1,)),
    "cuMemAllocFromPoolAsync": _same(MEMORY, "alloc_device", "left_alloc", (1,)),
    "cuMemFree": _grown("free_address", "left_free"),
    "cuMemFreeHost": _same(MEMORY, "free_address", "left_free", (1,)),
    "cuMemFreeAsync": _same(MEMORY, "free_address", "left_free", (1,)),
    "cuMemCreate": _same(MEMORY, "create", "left_alloc", (1,)),
    "cuMemMap": _same(MEMORY, "map", "left_map", (1,)),
    "cuMemUnmap": _same(MEMORY, "unmap_range", "left_unmap", (1,)),
    "cuMemRelease": _same(MEMORY, "release", "left_handle", (1,)),
    "cuMemRetainAllocationHandle": _same(MEMORY, "retain", "left_handle", (1,)),
    "cuCtxCreate": Function(
        MEMORY,
        {
            1: Probe("context_create", "left_context"),
            2: Probe("context_create", "left_context"),
            3: Probe("context_create_v3", "left_context"),
            4: Probe("context_create_v4", "left_context"),
        },
    ),
    "cuCtxDestroy": _same(MEMORY, "context_destroy", "left_context"),
    "cuDevicePrimaryCtxRetain": _same(MEMORY, "primary_retain", "left_context", (1,)),
    "cuDevicePrimaryCtxRelease": _same(MEMORY, "primary_release", "left_context"),
    "cuDevicePrimaryCtxReset": _same(MEMORY, "primary_reset", "left_context"),
    "cuCtxSetCurrent": _same(CONTEXTS, "context_set", versions=(1,)),
    "cuCtxPushCurrent": _same(CONTEXTS, "context_push"),
    "cuCtxPopCurrent": _same(CONTEXTS, "context_pop"),
    "cuLaunchKernel": _same(LAUNCHES, "launch", versions=(1,)),
    "cuLaunchKernelEx": _same(LAUNCHES, "launch", versions=(1,)),
    "cuLaunchCooperativeKernel": _same(LAUNCHES, "launch", versions=(1,)),
    "cuGraphLaunch": _same(GRAPHS, "launch_graph", versions=(1,)),
}

RUNTIME: Mapping[str, Function] = {
    "cudaMalloc": _same(MEMORY, "runtime_alloc_device", "runtime_left_alloc", (1,)),
    "cudaMallocPitch": _same(MEMORY, "runtime_alloc_pitch", "runtime_left_alloc", (1,)),
    "cudaMallocHost": _same(MEMORY, "runtime_alloc_host", "runtime_left_alloc", (1,)),
    "cudaHostAlloc": _same(MEMORY, "runtime_alloc_host", "runtime_left_alloc", (1,)),
    "cudaMallocManaged": _same(MEMORY, "runtime_alloc_managed", "runtime_left_alloc", (1,)),
    "cudaMallocAsync": _same(MEMORY, "runtime_alloc_device", "runtime_left_alloc", (1,)),
    "cudaMallocFromPoolAsync": _same(MEMORY, "runtime_alloc_device", "runtime_left_alloc", (1,)),
    "cudaFree": _same(MEMORY, "runtime_free", "runtime_left_free", (1,)),
    "cudaFreeHost": _same(MEMORY, "runtime_free", "runtime_left_free", (1,)),
    "cudaFreeAsync": _same(MEMORY, "runtime_free", "runtime_left_free", (1,)),
    "cudaDeviceReset": _same(MEMORY, "runtime_reset", "runtime_left_reset", (1,)),
}

FUNCTIONS: Mapping[Layer, Mapping[str, Function]] = {Layer.DRIVER: DRIVER, Layer.RUNTIME: RUNTIME}


@dataclass(frozen=True, slots=True)
class StaticProbe:
    """A static probe, the program for it, and which of its arguments are the address and the size."""

    program: str
    address: int
    size: int | None


PYTORCH = "pytorch"
"""Who provides them."""
STATIC: Mapping[str, StaticProbe] = {
    "malloc": StaticProbe("tensor_allocated", 0, 2),
    "free": StaticProbe("tensor_freed", 0, None),
}
"""By name. PyTorch's allocator has them since 2.2."""

ALWAYS = frozenset({"thread_exit", "program_exec", "empty"})
"""Programs that are needed whatever is probed."""

_VARIANT = re.compile(r"([A-Za-z]+?)(?:_v([0-9]+))?(?:_pt[sd][sz])?\Z")


@dataclass(frozen=True, slots=True)
class Point:
    """Where programs are to run in a library."""

    symbol: str
    offset: int
    probe: Probe
    group: str


def programs(groups: frozenset[str], layers: Iterable[Layer]) -> frozenset[str]:
    """Names of the programs that the groups need."""
    wanted = set(ALWAYS)
    for layer in layers:
        if layer is Layer.TENSORS:
            wanted |= {static.program for static in STATIC.values()}
        for function in FUNCTIONS.get(layer, {}).values():
            if function.group in groups:
                for probe in function.versions.values():
                    wanted |= {name for name in (probe.entry, probe.leave) if name}
    return frozenset(wanted)


def points(
    exported: Mapping[str, int], layer: Layer, groups: frozenset[str]
) -> tuple[list[Point], list[str]]:
    """Where to probe a library that exports functions at these offsets, and exported versions that are not
    known."""
    found: dict[int, Point] = {}
    unknown: list[str] = []
    for symbol in sorted(exported):
        match = _VARIANT.match(symbol)
        function = FUNCTIONS[layer].get(match[1]) if match else None
        if match is None or function is None or function.group not in groups:
            continue
        probe = function.versions.get(int(match[2] or 1))
        if probe is None:
            unknown.append(symbol)
        else:
            # Two names of one address are one function; a plain name that stands for a later version has that
            # version's arguments, and the later one sorts last.
            found[exported[symbol]] = Point(symbol, exported[symbol], probe, function.group)
    return list(found.values()), unknown
