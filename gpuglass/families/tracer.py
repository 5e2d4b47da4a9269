"""Families of the CUDA memory tracer (`ebpf`, `gpuglass cuda-tracer`): the ledgers of CUDA memory per
process, what the driver says beyond them, and the tracer itself.

`gpuglass_cuda_*` is the ledger of the driver's library, through which every allocation passes;
`gpuglass_cudart_*` that of the runtime's, a second view of a part of the same memory: the two are never
added."""

from __future__ import annotations

from gpuglass.families.gpu import PROCESS, WORKLOAD
from gpuglass.family import Family, Kind, Owner

_OPTIONAL = frozenset({*WORKLOAD, "pid"})
_UNSEEN = "The process has made no traced call, or has gone."
_RUNS = "The tracer does not run."

SIZES = tuple(float(1 << bits) for bits in range(10, 40, 2))
"""Bounds of sizes in bytes: 1 KiB to 256 GiB by powers of four."""
LATENCIES = tuple((1 << bits) / 1e9 for bits in range(10, 34, 2))
"""Bounds of a call's time in seconds: 2^10 ns to 2^32 ns by powers of four."""


def _of_process(name: str, kind: Kind, unit: str, help: str, *labels: str, absent: str = _UNSEEN) -> Family:
    return Family(
        f"gpuglass_{name}",
        kind,
        help,
        (*PROCESS, *labels),
        unit,
        owner=Owner.TRACER,
        absent=absent,
        optional=_OPTIONAL,
    )


def _own(name: str, kind: Kind, unit: str, help: str, *labels: str, absent: str = _RUNS) -> Family:
    return Family(f"gpuglass_tracer_{name}", kind, help, labels, unit, owner=Owner.TRACER, absent=absent)


# The driver's ledger

LIVE = _of_process(
    "cuda_live_bytes",
    Kind.GAUGE,
    "bytes",
    "CUDA memory that the process has allocated and not freed, by kind: device, host, managed, virtual "
    "(physical "
    "memory of cuMemCreate) and mapped (addresses given to virtual memory: never add it to the others).",
    "kind",
)
LIVE_COUNT = _of_process(
    "cuda_live_allocations", Kind.GAUGE, "", "Allocations in gpuglass_cuda_live_bytes.", "kind"
)
ALLOCATED = _of_process(
    "cuda_allocated_bytes_total", Kind.COUNTER, "bytes", "CUDA memory that the process has allocated.", "kind"
)
FREED = _of_process(
    "cuda_freed_bytes_total",
    Kind.COUNTER,
    "bytes",
    "CUDA memory that was freed, by how: call, context (destroyed with memory in it), exit (the process "
    "ended).",
    "kind",
    "how",
)
FREES = _of_process(
    "cuda_frees_total",
    Kind.COUNTER,
    "",
    "Allocations that were freed; kind unknown: allocated before tracing began.",
    "kind",
    "how",
)
FAILURES = _of_process(
    "cuda_call_failures_total",
    Kind.COUNTER,
    "",
    "Calls that failed, by the driver's result (out_of_memory, …) and the kind of memory (unknown: "
    "frees, contexts).",
    "kind",
    "result",
)
SIZE = Family(
    "gpuglass_cuda_allocation_size_bytes",
    Kind.HISTOGRAM,
    "Sizes of successful allocations.",
    (*PROCESS, "kind"),
    "bytes",
    owner=Owner.TRACER,
    absent=_UNSEEN,
    optional=_OPTIONAL,
    buckets=SIZES,
)
LATENCY = Family(
    "gpuglass_cuda_allocation_duration_seconds",
    Kind.HISTOGRAM,
    "Time that successful allocations took, with the probes' own cost.",
    (*PROCESS, "kind"),
    "seconds",
    owner=Owner.TRACER,
    absent=_UNSEEN,
    optional=_OPTIONAL,
    buckets=LATENCIES,
)
LAUNCHES = _of_process(
    "cuda_launches_total",
    Kind.COUNTER,
    "",
    "Launches by what is launched (kernel, graph).",
    "what",
    absent="Launches are not counted (--launches), or none was made.",
)

# Against the driver's own figures

TRACKED = _of_process(
    "cuda_tracked_bytes",
    Kind.GAUGE,
    "bytes",
    "GPU memory of the process in the ledger (device and virtual), when it was last compared with the "
    "driver's figure.",
    "gpu_uuid",
    absent="The driver does not list the process, or the ledger does not know which of its GPUs holds what.",
)
UNTRACKED = _of_process(
    "cuda_untracked_bytes",
    Kind.GAUGE,
    "bytes",
    "GPU memory that the driver lists for the process beyond the ledger: contexts, modules, managed "
    "memory, what was "
    "allocated before tracing began. Negative: the ledger holds more than the driver says.",
    "gpu_uuid",
    absent="The driver does not list the process, or hides its memory; see gpuglass_cuda_tracked_bytes.",
)
SINCE = _of_process(
    "cuda_tracking_since_timestamp_seconds",
    Kind.GAUGE,
    "seconds",
    "Unix time from which on the ledger of the process is complete.",
)
EXACT = _of_process(
    "cuda_ledger_exact",
    Kind.GAUGE,
    "",
    "1 while the ledger misses nothing since gpuglass_cuda_tracking_since_timestamp_seconds; 0 from a "
    "loss or a "
    "contradiction on until it has been brought together with the driver's figure again.",
)
RESYNCS = _of_process(
    "cuda_ledger_resyncs_total",
    Kind.COUNTER,
    "",
    "Times that the ledger of the process was brought together with the driver's figure after a loss.",
)

# The runtime's ledger

RUNTIME_LIVE = _of_process(
    "cudart_live_bytes",
    Kind.GAUGE,
    "bytes",
    "What the process has allocated and not freed through libcudart; a part of gpuglass_cuda_live_bytes "
    "seen again.",
    "kind",
    absent="The runtime is not traced (--runtime), or the process made no call to it.",
)
RUNTIME_ALLOCATED = _of_process(
    "cudart_allocated_bytes_total",
    Kind.COUNTER,
    "bytes",
    "What the process has allocated through libcudart.",
    "kind",
    absent="The runtime is not traced (--runtime), or the process made no call to it.",
)
RUNTIME_FREED = _of_process(
    "cudart_freed_bytes_total",
    Kind.COUNTER,
    "bytes",
    "What was freed of it, by how: call, context (cudaDeviceReset), exit.",
    "kind",
    "how",
    absent="The runtime is not traced (--runtime), or the process made no call to it.",
)
RUNTIME_FAILURES = _of_process(
    "cudart_call_failures_total",
    Kind.COUNTER,
    "",
    "Calls to libcudart that failed, by its result.",
    "kind",
    "result",
    absent="The runtime is not traced (--runtime), or the process made no call to it.",
)

# PyTorch's allocator

TENSOR_LIVE = _of_process(
    "cuda_tensor_bytes",
    Kind.GAUGE,
    "bytes",
    "What PyTorch's caching allocator has given out and not got back: live tensors, inside of memory that "
    "gpuglass_cuda_live_bytes holds.",
    absent="Tensors are not traced (--tensors), or PyTorch was in use before it was probed.",
)
TENSOR_LIVE_COUNT = _of_process(
    "cuda_tensors",
    Kind.GAUGE,
    "",
    "Pieces of memory in gpuglass_cuda_tensor_bytes.",
    absent="Tensors are not traced (--tensors), or PyTorch was in use before it was probed.",
)
TENSOR_ALLOCATED = _of_process(
    "cuda_tensor_allocated_bytes_total",
    Kind.COUNTER,
    "bytes",
    "What PyTorch's caching allocator has given out, as it was asked for.",
    absent="Tensors are not traced (--tensors), or the process has made none.",
)

# The tracer

INFO = Family(
    "gpuglass_tracer_build_info",
    Kind.INFO,
    "Version of the tracer, which loader brought its program into the kernel, and which kernel it is.",
    ("version", "loader", "kernel", "architecture"),
    owner=Owner.TRACER,
    absent=_RUNS,
)
STATE = _own(
    "state",
    Kind.GAUGE,
    "",
    "Always 1: what the tracer does, waiting (no CUDA library was found yet), tracing, or over_budget "
    "(it took its "
    "probes off because they cost more than tracer.budget).",
    "state",
)
LIBRARIES = _own("libraries", Kind.GAUGE, "", "Files that are probed, by library.", "library")
PROBES = _own("functions", Kind.GAUGE, "", "Functions that are probed, in all libraries together.")
UNKNOWN_SYMBOLS = _own(
    "unknown_functions",
    Kind.GAUGE,
    "",
    "Versions of traced functions that a library exports and this tracer does not know: calls to them "
    "are not seen.",
)
PROCESSES = _own("processes", Kind.GAUGE, "", "Processes in the ledger.")
CALLS = _own("calls_total", Kind.COUNTER, "", "Calls booked.")
LOST = _own(
    "lost_total",
    Kind.COUNTER,
    "",
    "What could not be kept: calls, live allocations, events, … by the table that was full or the reason.",
    "what",
)
HELD_BACK = _own(
    "held_back_events_total",
    Kind.COUNTER,
    "",
    "Single calls that were booked but not told, because there were more in a second than are wanted, by "
    "reason.",
    "reason",
)
COST = _own(
    "cost_seconds_total",
    Kind.COUNTER,
    "seconds",
    "Time that tracing took: traps (the kernel's way to the probes, calls times the measured cost of an "
    "empty pair), "
    "programs (within them; both on the traced threads), collector (the tracer's own process).",
    "part",
)
COST_RATIO = _own(
    "cost_ratio",
    Kind.GAUGE,
    "ratio",
    "Share of a core that tracing took of each traced process in the last half minute; compare with "
    "tracer.budget.",
)
PAIR = _own(
    "probe_pair_seconds",
    Kind.GAUGE,
    "seconds",
    "Measured cost of an empty pair of probes on this machine, at the start.",
    absent="It could not be measured.",
)
AGENT_UP = _own("agent_connected", Kind.GAUGE, "", "1 while records reach the agent's socket.")
AGENT_DROPPED = _own(
    "agent_dropped_total", Kind.COUNTER, "", "Events that were not sent because the agent was away or slow."
)
NVML_UP = _own("driver_up", Kind.GAUGE, "", "1 while NVML answers, so that ledgers are compared with it.")
MEMORY = _own("resident_memory_bytes", Kind.GAUGE, "bytes", "Memory of the tracer that is resident.")
CPU = _own("cpu_seconds_total", Kind.COUNTER, "seconds", "CPU time of the tracer's own process.")
START = _own("start_timestamp_seconds", Kind.GAUGE, "seconds", "Unix time at which the tracer started.")
