"""The maps' keys and values, as `program/layout.h` declares them, and the maps themselves.

Each `Struct` here has the size of the C structure; loading fails if the two differ. Values come out as named
tuples."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Layer(IntEnum):
    """Whose allocations a ledger holds. Ledgers are never added: one allocation passes through several."""

    DRIVER = 0
    RUNTIME = 1
    TENSORS = 2
    """What PyTorch's caching allocator has given out."""


class Kind(IntEnum):
    """What an allocation is."""

    DEVICE = 0
    HOST = 1
    MANAGED = 2
    VIRTUAL = 3
    MAPPED = 4
    UNKNOWN = 5


class Op(IntEnum):
    """What a call does."""

    ALLOC = 0
    ALLOC_32 = 1
    PITCH = 2
    PITCH_32 = 3
    FREE = 4
    CREATE = 5
    MAP = 6
    UNMAP = 7
    RELEASE = 8
    RETAIN = 9
    CONTEXT_CREATE = 10
    CONTEXT_DESTROY = 11
    PRIMARY_RETAIN = 12
    PRIMARY_RELEASE = 13
    PRIMARY_RESET = 14
    RUNTIME_RESET = 15


class EventType(IntEnum):
    """Why a single call is told."""

    FAILURE = 0
    LARGE = 1
    SAMPLE = 2
    EXEC = 3


LOSSES = (
    *("process", "call", "totals", "live", "failure", "context", "stack", "event", "result", "unmap"),
    *("held_back_failure", "held_back_large", "held_back_sample", "held_back_exec"),
)
"""Names of `enum loss`."""

EXECED = 2
"""Of `record.reason`: the process became another program."""

SIZE_SLOTS = 40
LATENCY_SLOTS = 34

OF_RUNTIME = 1 << 63
OF_OBJECT = 1 << 62
OF_MAPPING = 1 << 61
OF_TENSOR = 1 << 60

STACK_DEPTH = 31
"""Frames kept of a stack."""

SETTINGS = struct.Struct("=Q4III8Q")
PROCESS = struct.Struct("=QII")
RECORD = struct.Struct("=9QqII16s")
LIVE_KEY = struct.Struct("=QQ")
LIVE = struct.Struct("=QQQihBxII")
TOTALS_KEY = struct.Struct("=QQhBBI")
TOTALS = struct.Struct(f"={10 + SIZE_SLOTS + LATENCY_SLOTS}Q")
FAILURE_KEY = struct.Struct("=QIBBBx")
CONTEXT_KEY = struct.Struct("=QQ")
CONTEXT = struct.Struct("=QiI")
THREAD = struct.Struct(f"=12Q192x3Q{8 + 8 * STACK_DEPTH}x")
EVENT = struct.Struct("=5QIIiIBBBBhxx")
SITE = struct.Struct("=qHBB4xqHBB4x")
SITES = 512
"""Places of static probes in all libraries."""
U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")
STACK = struct.Struct(f"=Q{STACK_DEPTH}Q")


class Record(NamedTuple):
    """One life of one program."""

    first_ns: int
    ended_ns: int
    calls: int
    spent_ns: int
    lost: int
    launches: int
    graph_launches: int
    driver_reset_ns: int
    runtime_reset_ns: int
    contexts: int
    tgid: int
    reason: int
    comm: bytes


class Live(NamedTuple):
    """One live allocation, object or mapping."""

    size: int
    time_ns: int
    context: int
    stack: int
    device: int
    kind: int
    references: int
    mappings: int


class TotalsKey(NamedTuple):
    """Whose sums."""

    id: int
    context: int
    device: int
    layer: int
    kind: int
    pad: int = 0


class FailureKey(NamedTuple):
    """Which failures."""

    id: int
    code: int
    layer: int
    kind: int
    op: int


class Event(NamedTuple):
    """One call that is told by itself."""

    time_ns: int
    id: int
    address: int
    size: int
    latency_ns: int
    tgid: int
    tid: int
    stack: int
    code: int
    type: int
    op: int
    kind: int
    layer: int
    device: int


HASH, ARRAY, PERCPU_ARRAY, RINGBUF = 1, 2, 6, 27
NO_PREALLOC = 1


@dataclass(frozen=True, slots=True)
class MapSpec:
    """One map of the program. A `sparse` one takes memory entry by entry where the kernel can do that
    safely."""

    kind: int
    key_size: int
    value_size: int
    max_entries: int
    sparse: bool = False


def map_specs(live_entries: int, ring_bytes: int) -> dict[str, MapSpec]:
    """The program's maps by name. `ring_bytes` is a power of two and a multiple of the page size."""
    return {
        "settings": MapSpec(ARRAY, 4, SETTINGS.size, 1),
        "filter": MapSpec(HASH, 4, 4, 4096),
        "processes": MapSpec(HASH, 4, PROCESS.size, 4096),
        "records": MapSpec(HASH, 8, RECORD.size, 8192, sparse=True),
        "threads": MapSpec(HASH, 8, THREAD.size, 16384, sparse=True),
        "no_thread": MapSpec(ARRAY, 4, THREAD.size, 1),
        "live": MapSpec(HASH, LIVE_KEY.size, LIVE.size, live_entries, sparse=True),
        "totals": MapSpec(HASH, TOTALS_KEY.size, TOTALS.size, 16384, sparse=True),
        "nothing": MapSpec(ARRAY, 4, TOTALS.size, 1),
        "failures": MapSpec(HASH, FAILURE_KEY.size, 8, 4096, sparse=True),
        "contexts": MapSpec(HASH, CONTEXT_KEY.size, CONTEXT.size, 4096, sparse=True),
        "destroyed": MapSpec(HASH, 8, 8, 8192, sparse=True),
        "losses": MapSpec(PERCPU_ARRAY, 4, 8, len(LOSSES)),
        "stacks": MapSpec(HASH, 4, STACK.size, 8192, sparse=True),
        "sites": MapSpec(ARRAY, 4, SITE.size, SITES),
        "events": MapSpec(RINGBUF, 0, 0, ring_bytes),
    }
