"""Divides what a worker's caching allocator has from the driver into parts that add up to it.

In go the worker's own words: what its memory is for (`MemoryState`) and the allocator's statistics. Out go
bytes by part. Weights and KV cache are live tensors; graphs are private pools, of which a piece is live and
the rest can be used by nothing else; what is live and none of these are activations and the engine's buffers.
"""

from __future__ import annotations

from gpuglass_vllm.records import AllocatorState, MemoryState

PARTS = ("weights", "kv_cache", "graphs", "activations", "in_flight", "allocator_cache", "unknown")
"""`in_flight`: freed, and work on a stream still uses it. `unknown`: live, and for want of another part's
size nobody can say whether it is an activation."""


def parts(memory: MemoryState, allocator: AllocatorState | None) -> dict[str, int]:
    """Bytes on the device by part; parts that cannot be told are left out.

    With the allocator's statistics they add up to what it reserved, less the parts that are asleep: none is
    negative, none counted twice. Should the engine claim more than is live, the later parts get what is left.
    """
    told = {"weights": memory.weights, "kv_cache": memory.kv_cache, "graphs": memory.graphs}
    known = {part: size for part, size in told.items() if size >= 0}
    found = _divided(known, memory.graph_tensors, allocator) if allocator is not None else known
    for part in memory.asleep:
        if part in found:
            found[part] = 0
    return found


def _divided(known: dict[str, int], graph_tensors: int, allocator: AllocatorState) -> dict[str, int]:
    live = left = min(allocator.allocated, allocator.reserved)
    active = min(max(allocator.active, live), allocator.reserved)
    cache = allocator.reserved - active
    found: dict[str, int] = {}
    for part in ("weights", "kv_cache"):
        if part in known:
            found[part] = min(known[part], left)
            left -= found[part]
    if "graphs" in known:
        tensors = min(max(0, graph_tensors), known["graphs"], left)
        free = min(known["graphs"] - tensors, cache)
        found["graphs"] = tensors + free
        left -= tensors
        cache -= free
    found["activations" if len(known) == 3 else "unknown"] = left
    found["in_flight"] = active - live
    found["allocator_cache"] = cache
    return found
