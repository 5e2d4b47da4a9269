"""Families of the verdicts on CUDA memory (`ebpf/verdict`), made in the agent from what the tracer sends.

The ledger itself (live bytes, calls, untracked memory) is on the tracer's own /metrics. Here are the
verdict on each process and kind of memory, and the single allocations that were told: failures, large ones,
a sample.
"""

from __future__ import annotations

from gpuglass.families.gpu import PROCESS, WORKLOAD
from gpuglass.family import Family, Kind

LEAK = (*PROCESS, "gpu_uuid", "kind")
EVENT = (*WORKLOAD, "process", "gpu_uuid")
_OPTIONAL = frozenset({*WORKLOAD, "gpu_uuid"})
_MIB, _GIB = float(1 << 20), float(1 << 30)

_NO_TRACER = "No CUDA tracer is connected, or it reports no such process."
_NOT_SUSPECTED = "The process is not suspected (gpuglass_cuda_leak_state says what is thought of it)."
_NO_EVENT = "No such allocation was told since the agent started."


def _leak(name: str, unit: str, help: str, *labels: str, absent: str = _NOT_SUSPECTED) -> Family:
    return Family(
        f"gpuglass_cuda_{name}",
        Kind.GAUGE,
        help,
        (*LEAK, *labels),
        unit,
        absent=absent,
        optional=_OPTIONAL | ({"why"} & set(labels)),
    )


LEAK_SUSPECTED = _leak(
    "leak_suspected",
    "",
    "1 while this kind of memory of the process grows as only a leak does for so long, 0 while it does not.",
    absent="It cannot be told now: learning, undecided growth, or an unreliable ledger; "
    "gpuglass_cuda_leak_state says which.",
)
LEAK_STATE = _leak(
    "leak_state",
    "",
    "Always 1: what is thought of this kind of memory of the process, with state learning, healthy, "
    "unknown (it "
    "grows, and why tells what keeps that from being called a leak), blind or suspected.",
    "state",
    "why",
    absent=_NO_TRACER,
)
LEAK_RATE = _leak("leak_bytes_per_second", "", "How fast the suspected memory grows.")
LEAK_GROWTH = _leak("leak_growth_bytes", "bytes", "By how much it has grown since that began.")
LEAK_SINCE = _leak(
    "leak_since_timestamp_seconds",
    "seconds",
    "Unix time at which the growth began, as far as it can be followed back.",
)
LEAK_CONFIDENCE = _leak(
    "leak_confidence_ratio",
    "ratio",
    "Strength of the evidence. 0.5: just enough; 1: a straight line, three times the least that is judged.",
)
LEAK_PER_REQUEST = _leak(
    "leak_request_bytes",
    "bytes",
    "Growth divided by the requests that the process's engine served meanwhile.",
    absent="The process is not suspected, or no engine tells of its requests.",
)
LEAK_STACK = _leak(
    "leak_stack_growth_bytes",
    "bytes",
    "Memory that a stack has allocated and not freed since the growth began; place 1 grew most. "
    "stack names the "
    "innermost functions first.",
    "place",
    "stack",
    absent="The process is not suspected, or the tracer's largest stacks did not grow.",
)
TENSOR_RATIO = Family(
    "gpuglass_cuda_tensor_ratio",
    Kind.GAUGE,
    "Live tensors as a share of the device memory that the process has allocated: the rest is "
    "cached, fragmented or "
    "not PyTorch's.",
    (*PROCESS, "gpu_uuid"),
    "ratio",
    absent="The tracer does not watch PyTorch's allocator (opt-in).",
    optional=_OPTIONAL,
)

EVENT_FAILURES = Family(
    "gpuglass_cuda_event_failures_total",
    Kind.COUNTER,
    "Calls for CUDA memory that failed, by code. The exemplar names the request that ran then, with "
    "link exact or "
    "temporal.",
    (*EVENT, "function", "code"),
    absent=_NO_EVENT,
    optional=_OPTIONAL,
)
EVENT_BYTES = Family(
    "gpuglass_cuda_event_bytes",
    Kind.HISTOGRAM,
    "Sizes of the calls for CUDA memory that were told, by reason: failure, large, or sample. "
    "Exemplars as in "
    "gpuglass_cuda_event_failures_total.",
    (*EVENT, "kind", "reason"),
    "bytes",
    absent=_NO_EVENT,
    optional=_OPTIONAL,
    buckets=(
        64 * 1024.0,
        _MIB,
        2 * _MIB,
        20 * _MIB,
        64 * _MIB,
        256 * _MIB,
        _GIB,
        4 * _GIB,
        16 * _GIB,
        64 * _GIB,
    ),
)
EVENT_LINKS = Family(
    "gpuglass_cuda_event_links_total",
    Kind.COUNTER,
    "Allocations told, by how they were joined with a request: exact, temporal, or none.",
    ("link",),
    absent="The receiver is off (engines.enabled) or the agent does not run.",
)
EVENT_DROPPED = Family(
    "gpuglass_cuda_event_dropped_total",
    Kind.COUNTER,
    "Allocations told that were not joined because too many came at once.",
    absent="The receiver is off (engines.enabled) or the agent does not run.",
)
TRACERS = Family(
    "gpuglass_cuda_tracers",
    Kind.GAUGE,
    "CUDA tracers that are connected.",
    absent="The receiver is off (engines.enabled) or the agent does not run.",
)
PROCESSES = Family(
    "gpuglass_cuda_processes",
    Kind.GAUGE,
    "Processes whose CUDA memory is judged, per GPU that they use.",
    absent="The receiver is off (engines.enabled) or the agent does not run.",
)
PROCESSES_REFUSED = Family(
    "gpuglass_cuda_process_reports_refused_total",
    Kind.COUNTER,
    "Reports of processes that were not judged because there are too many.",
    absent="The receiver is off (engines.enabled) or the agent does not run.",
)
