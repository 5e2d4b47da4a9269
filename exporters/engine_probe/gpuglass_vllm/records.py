"""The record stream: what an engine tells the agent, over a SOCK_SEQPACKET Unix socket, in msgpack.

One packet is one msgpack map of at most `MAX_PACKET` bytes: `{"seq": n, "records": [...]}`. Each record is
a map with a `type`. The first record of a connection is a `Hello`. Unknown types and unknown fields are
passed over, so that a newer sender can speak to an older receiver.

There are three sorts of records, and the sort decides what happens when the receiver is away:

state   absolute values: the last one counts. Repeating one changes nothing, losing one costs freshness only.
event   a thing that happened once. Kept in a bounded queue until sent; the oldest are dropped and counted.
sum     an increase since the last sum of the same kind. Sums travel in packets with `seq` > 0, which the
        receiver acknowledges with `{"ack": n}` (everything up to n is taken in). Until then the sender keeps
        the packet and sends it again on the next connection; a receiver takes in each (`Hello.sender`, `seq`)
        once. Packets with `seq` 0 hold no sums and are not acknowledged.

All times are CLOCK_MONOTONIC nanoseconds (`at`); `Hello.clock_offset_ns` added gives Unix time. Durations
are in nanoseconds. `request_id` is the engine's own id of one sequence; it joins what the processes of an
engine tell. Of a request's content nothing travels but lengths.
"""

from __future__ import annotations

import msgspec

VERSION = 1
"""Version of the protocol; a receiver refuses a `Hello` with another one."""

MAX_PACKET = 64 * 1024
"""Bytes of a packet; larger ones are refused by the receiver."""

MAX_ID = 128
"""Characters of a request id, external id or sender id; the sender shortens longer ones."""

MAX_TENANT = 64
"""Characters of a tenant's name."""

UNVERIFIED = "unverified"
"""Tenant of a request whose claim is not believed, or that makes none while tenants are configured."""

NO_TENANT = ""
"""Tenant of all requests while no middleware identifies tenants."""

STEP_SECONDS = (
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
)
"""Upper bounds of `StepSums.seconds`, without +Inf."""

BATCH_REQUESTS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Upper bounds of `StepSums.requests`, without +Inf."""

EVICT_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""Upper bounds of `CoreSums.evictions`, without +Inf."""

OUTCOMES = ("stop", "length", "abort", "error", "rejected")
ERROR_TYPES = ("", "validation", "admission", "timeout", "out_of_memory", "engine")
PREEMPTION_CAUSES = ("kv_full", "cache_reset", "unknown")

TRACER = "tracer"
"""Role of a CUDA memory tracer, which is no part of an engine: it speaks of any process of the machine."""

STEP_KINDS = ("graph", "piecewise", "eager")
"""How a step was launched: one captured graph, graphs with eager pieces between them, or kernel by kernel."""

STEP_PHASES = ("prefill", "decode")

MAX_STEP_REQUESTS = 64
"""Requests that a `StepSample` names."""

MAX_KERNELS = 32
"""Kernels that a `StepKernels` names."""

MAX_CHUNKS = 256
"""Entries of a `PrefillChunks`."""

MEMORY_KINDS = ("device", "host", "managed", "virtual", "tensor")
"""Kinds of CUDA memory: device memory of cuMemAlloc and its like, pinned host memory, managed memory,
physical memory of cuMemCreate (expandable segments, vLLM's sleep mode). `tensor` is what PyTorch's caching
allocator has handed out: it lies inside of device or virtual memory and is never added to it."""

CUDA_EVENT_REASONS = ("failure", "large", "sample")

MAX_STACKS = 16
"""Stacks of a `CudaProcess`."""

MAX_FRAMES = 48
"""Frames of a `CudaStack`."""


class _Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    pass


class _Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    pass


# Who speaks


class Capability(_Part, frozen=True, kw_only=True):
    """Whether one hook works in this process. `state` is active, unavailable or disabled."""

    hook: str
    state: str
    reason: str = ""
    """In a few words, for people; empty while active."""


class Pool(_Part, frozen=True, kw_only=True):
    """Geometry of the KV cache. Shares are blocks ÷ `blocks`."""

    blocks: int
    """Blocks that requests can hold (without vLLM's null block)."""
    block_bytes: int
    """Bytes of one block on all ranks together; 0 if unknown."""
    block_tokens: int
    """Tokens that fill one block; 0 where groups differ."""


class Experts(_Part, frozen=True, kw_only=True):
    """The expert layers of this rank's model, in the order of `ExpertSums`."""

    layers: list[int]
    """Layer numbers as the model counts them."""
    experts: int
    """Logical experts per layer."""
    top_k: int
    every: int
    """One step in `every` is counted."""
    ranks: int = 1
    """Expert-parallel ranks; expert e lives on rank e·ranks÷experts where `placement` is linear."""
    placement: str = "linear"
    """linear, round_robin, or unknown (then no per-rank load can be told)."""


class Hello(_Record, tag="hello", frozen=True, kw_only=True):
    """State: who speaks. First on each connection, and again whenever something in it changes."""

    version: int
    sender: str
    """Random name of this process's life; scopes `seq`."""
    instance: str
    """Random name that all processes of one server share (inherited through the environment)."""
    server: str = ""
    """Name that the operator gave the server (GPUGLASS_SERVER): tells servers of one model apart."""
    role: str
    """frontend (knows who asked), core (knows blocks and outcomes), worker (knows time and experts), tracer
    (knows the CUDA memory of every process)."""
    engine_name: str
    """vllm, sglang, …; cuda-tracer for a tracer, whose model_name is empty."""
    engine_version: str
    software: str
    """What sends, with version: gpuglass-vllm/0.1.0."""
    model_name: str
    engine: str = "0"
    """Data-parallel index as the engine spells it."""
    rank: int = -1
    """Worker's rank in its engine (tensor × pipeline); -1 for the other roles."""
    gpu_uuid: str = ""
    """Claimed; the receiver believes it only if the driver lists this process on that GPU."""
    device_name: str = ""
    """Name of the accelerator, or cpu."""
    peak_flops: float = 0.0
    """Dense FLOP/s that the maker gives for the model's compute type; 0 if unknown."""
    clock_offset_ns: int
    capabilities: list[Capability] = []
    pool: Pool | None = None
    experts: Experts | None = None


class ProbeState(_Record, tag="probe", frozen=True, kw_only=True):
    """State: how the sender itself fares. All counts since the process began."""

    at: int
    hook_errors: dict[str, int] = {}
    """Errors swallowed, by hook."""
    dropped: int = 0
    """Events dropped because the receiver was away or slow."""
    hook_ns: int = 0
    """Time spent in hooks on the engine's own threads."""
    send_errors: int = 0


# Requests


class RequestStart(_Record, tag="request_start", frozen=True, kw_only=True):
    """Event of a frontend: a request entered the engine. Sent again for open requests on a new connection."""

    at: int
    request_id: str
    external_id: str = ""
    """As the client or server named it; several sequences may share it."""
    tenant: str = NO_TENANT
    trace_id: str = ""
    """32 hex digits of W3C trace context, or empty."""
    span_id: str = ""
    """16 hex digits: the caller's span."""
    sampled: bool = False
    """The caller's sampled flag."""
    prompt_tokens: int = 0
    max_tokens: int = 0
    lora: str = ""


class RequestAnswered(_Record, tag="request_answered", frozen=True, kw_only=True):
    """Event of a frontend: it is done with a request (answered, or gave it up). What the user felt."""

    at: int
    request_id: str
    outcome: str
    error_type: str = ""
    duration_ns: int
    """From arrival in the server to the last output."""
    first_token_ns: int = -1
    """From arrival to the first token; -1 if there was none."""
    external_id: str = ""
    trace_id: str = ""
    span_id: str = ""
    sampled: bool = False
    max_tokens: int = 0
    lora: str = ""
    """As in `RequestStart`, which an agent that was started in between has not heard."""
    again: bool = False
    """As in `RequestEnd`."""


class RequestRefused(_Record, tag="request_refused", frozen=True, kw_only=True):
    """Event of a frontend: a request that never entered the engine (outcome rejected)."""

    at: int
    error_type: str
    tenant: str = NO_TENANT
    external_id: str = ""
    trace_id: str = ""
    span_id: str = ""
    sampled: bool = False
    """The caller's trace context, as in `RequestStart`."""
    duration_ns: int = 0


class RequestTraced(_Record, tag="request_traced", frozen=True, kw_only=True):
    """Event of a frontend: the engine itself exports a span of the request, which is this one."""

    at: int
    request_id: str
    trace_id: str
    span_id: str


class RequestProgress(_Record, tag="request_progress", frozen=True, kw_only=True):
    """State of a core: an open request. Sent while something in it changes."""

    at: int
    request_id: str
    tenant: str = NO_TENANT
    running: bool = False
    blocks: float = 0.0
    """Blocks held now, a block shared by n requests counting 1/n."""
    peak_blocks: float = 0.0
    computed_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0


class RequestEnd(_Record, tag="request_end", frozen=True, kw_only=True):
    """Event of a core: a request left the scheduler, by whatever way. Totals of its life."""

    at: int
    request_id: str
    outcome: str
    error_type: str = ""
    tenant: str = NO_TENANT
    arrival_ns: int
    """When it arrived in the server, on the monotonic clock."""
    queue_ns: int = -1
    """Arrival to first scheduling; -1 if it never ran."""
    prefill_ns: int = -1
    """First scheduling to first token."""
    decode_ns: int = -1
    """First token to last."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    output_tokens: int = 0
    preemptions: int = 0
    peak_blocks: float = 0.0
    kv_block_ns: float = 0.0
    """Integral of blocks held over time."""
    again: bool = False
    """An agent before this one was told, a moment before it went. It completes what another process tells for
    the first time; alone it is no news."""


class GpuProgress(_Record, tag="gpu_progress", frozen=True, kw_only=True):
    """State of a worker: GPU time of requests on this rank since they began. Parallel lists."""

    at: int
    request_ids: list[str]
    gpu_ns: list[float]
    recompute_ns: list[float] = []
    """Part of `gpu_ns` that computed tokens anew which a preemption had thrown away; empty: none."""
    ended: list[str] = []
    """Requests of this list or an earlier one that will not change any more."""


class Preemption(_Record, tag="preemption", frozen=True, kw_only=True):
    """Event of a core: a running request lost its blocks."""

    at: int
    cause: str
    victim: str
    tenant: str = NO_TENANT
    victim_blocks: float = 0.0
    lost_tokens: int = 0
    """Tokens that must be computed again, less what the prefix cache still has by then."""
    holders: list[str] = []
    """The requests that held most blocks at that moment, most first, at most three."""
    holder_blocks: list[float] = []


# Engine


class PoolState(_Record, tag="pool", frozen=True, kw_only=True):
    """State of a core: its KV pool and queues now."""

    at: int
    used_blocks: int
    """Blocks that a request holds."""
    cached_blocks: int = 0
    """Free blocks that still hold a reusable prefix."""
    waste_tokens: int = 0
    """Empty places in the last blocks of running requests; -1 if unknown."""
    running: int = 0
    waiting: int = 0


class TenantSums(_Record, tag="tenant", frozen=True, kw_only=True):
    """Sum: what a tenant used since the last one, in this process."""

    tenant: str
    gpu_ns: float = 0.0
    recompute_ns: float = 0.0
    kv_block_ns: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    requests: dict[str, int] = {}
    """Ended requests by `outcome` or, for errors and rejections, `outcome/error_type`."""


class CoreSums(_Record, tag="core", frozen=True, kw_only=True):
    """Sum of a core: preemptions by cause, evictions of cached blocks by time since last held."""

    preemptions: dict[str, int] = {}
    evictions: list[int] = []
    """Counts by bucket of `EVICT_SECONDS`, not cumulative, the last is +Inf; empty: none."""
    eviction_seconds: float = 0.0


class StepSums(_Record, tag="steps", frozen=True, kw_only=True):
    """Sum of a worker: its steps. GPU time is attributed + padding + dummy + unattributed."""

    clock: str
    """cuda (events on the stream) or wall (a CPU engine, or events unavailable)."""
    steps: int = 0
    attributed_ns: float = 0.0
    """Divided over requests: the sum of their `gpu_ns`."""
    padding_ns: float = 0.0
    """Share of padded tokens in captured batches."""
    dummy_ns: float = 0.0
    """Steps without a request (data-parallel dummies)."""
    unattributed_ns: float = 0.0
    """Steps whose requests are unknown."""
    idle_ns: float = 0.0
    """Stream idle between steps while requests ran: the engine's CPU was the brake. Not in GPU time."""
    prefill_tokens: int = 0
    decode_tokens: int = 0
    padded_tokens: int = 0
    prefill_ns: float = 0.0
    """Part of `attributed_ns` that went to prefill."""
    host_fed_ns: float = 0.0
    """Part of GPU time in steps that were not one captured graph: the device may have waited for the host
    within them, and how long cannot be told."""
    flops: float = 0.0
    """Modelled floating-point operations of this rank; 0 if the engine has no model of itself."""
    seconds: list[int] = []
    """Steps by bucket of `STEP_SECONDS`, not cumulative, the last is +Inf."""
    requests: list[int] = []
    """Steps by bucket of `BATCH_REQUESTS`."""
    request_steps: int = 0
    """Sum over steps of the requests in them."""


class ExpertSums(_Record, tag="experts", frozen=True, kw_only=True):
    """Sum of a worker: how often experts were chosen, for some of the layers in `Hello.experts`."""

    first: int
    """Index into `Hello.experts.layers` of the first layer here."""
    counts: bytes
    """Little-endian uint32, layer after layer, `Hello.experts.experts` numbers each."""
    counted_tokens: int
    """Tokens in the steps that were counted: each layer's counts add up to `counted_tokens` × top_k."""
    seen_tokens: int
    """Tokens in all steps since the last such sum: counts × seen ÷ counted estimates all of them."""


class HotExperts(_Record, tag="hot_experts", frozen=True, kw_only=True):
    """Event of a worker: who chose each layer's hottest expert, over the steps of the last `ExpertSums`."""

    at: int
    tenants: list[str]
    layers: list[int]
    """Indices into `Hello.experts.layers`."""
    experts: list[int]
    """The hottest expert of each of `layers`."""
    counts: list[list[int]]
    """For each of `layers`, choices by each of `tenants`."""


class AllocatorState(_Record, tag="allocator", frozen=True, kw_only=True):
    """State of a worker: the caching allocator's statistics (bytes; counts since the process began)."""

    at: int
    allocated: int
    active: int
    reserved: int
    inactive_split: int
    """Free pieces of split segments: reserved, and no use to larger requests."""
    retries: int = 0
    ooms: int = 0


class MemoryState(_Record, tag="memory", frozen=True, kw_only=True):
    """State of a worker: what its device memory is for, in bytes; -1: unknown. The parts lie inside of what
    the allocator reserved (`AllocatorState`), where there is one."""

    at: int
    weights: int = -1
    kv_cache: int = -1
    graphs: int = -1
    """What the private pools of captured graphs have from the driver."""
    graph_tensors: int = -1
    """Part of `graphs` that is allocated."""
    activation_peak: int = -1
    """What the engine found that its largest batch needs beside the rest. Not a part: it comes and goes."""
    asleep: list[str] = []
    """weights, kv_cache, graphs: parts that the engine has taken off the device for now, though its allocator
    goes on counting them."""


class OutOfMemory(_Record, tag="out_of_memory", frozen=True, kw_only=True):
    """Event of a worker: an allocation failed while this batch ran."""

    at: int
    requested: int = 0
    """Bytes that were asked for; 0 if the error does not say."""
    request_ids: list[str] = []
    """Most scheduled tokens first, at most 16."""
    tokens: list[int] = []


class StepSample(_Record, tag="step", frozen=True, kw_only=True):
    """Event of a worker: one step that it ran, and for whom. Parallel lists, most scheduled tokens first.

    Worth sending are a bounded sample, the steps of traced requests, and every step in which the allocator
    asked the driver for memory: what was allocated then is traced to the requests of the step.
    """

    at: int
    """When the thread that ran it was done with it."""
    begin_ns: int
    """When it began, on the same clock."""
    step: int
    """Number of the step in this process."""
    tid: int
    """The thread that ran it, as it sees itself (gettid(2)); the receiver translates it to the host's."""
    kind: str
    """graph (one captured graph), piecewise, or eager."""
    request_ids: list[str]
    """At most 64."""
    tokens: list[int]
    """Tokens scheduled for each."""
    phases: list[str] = []
    """prefill or decode, for each; empty: unknown."""
    gpu_ns: list[float] = []
    """GPU time of the step that went to each; empty: unknown."""
    requests: int = 0
    """Requests in the step, also those that are not named; 0: as many as are named."""
    scheduled_tokens: int = 0
    """Tokens of all of them; 0: the sum of `tokens`."""
    gpu_begin_ns: int = 0
    """When the device began and ended it, on the host's monotonic clock; 0: unknown."""
    gpu_end_ns: int = 0
    gpu_error_ns: int = 0
    """How far off the two may be."""


class PrefillChunks(_Record, tag="prefill", frozen=True, kw_only=True):
    """Event of a worker (of rank 0 only): prompts, or pieces of them, that its steps computed. Parallel
    lists."""

    at: int
    request_ids: list[str]
    begin_ns: list[int]
    """When the step began and ended, as in `StepSample`."""
    end_ns: list[int]
    tokens: list[int]
    gpu_ns: list[float] = []
    """GPU time of the step that went to it; empty: unknown."""


class StepKernels(_Record, tag="kernels", frozen=True, kw_only=True):
    """Event of a worker: what ran on the device in a step that was profiled. Parallel lists, longest first.

    The step is told by a `StepSample`, too.
    """

    at: int
    step: int
    names: list[str]
    """At most 32."""
    streams: list[int]
    begin_ns: list[int]
    """On the host's monotonic clock."""
    duration_ns: list[int]
    error_ns: int = 0
    """How far off the times may be."""
    device_ns: list[int] = []
    """What each had of the device's time: where several run at once they share it, and the device's own pause
    before a kernel is that kernel's. Empty: not told."""
    other_ns: int = 0
    """What all further ones had of it together, and how many they are."""
    others: int = 0
    begun_ns: int = 0
    """When the first of all began and the last one ended."""
    ended_ns: int = 0


# CUDA memory of any process


class CudaMemory(_Part, frozen=True, kw_only=True):
    """One kind of CUDA memory in a process. Counts since `CudaProcess.tracking_since_ns`."""

    kind: str
    """device, host, managed, virtual or tensor."""
    live_bytes: int
    live_allocations: int = 0
    allocated_bytes: int = 0
    freed_bytes: int = 0
    """What contexts and processes free at their end is in it."""
    allocations: int = 0
    frees: int = 0
    failures: dict[int, int] = {}
    """Calls that failed, by CUresult (2 is CUDA_ERROR_OUT_OF_MEMORY)."""


class CudaOwner(_Part, frozen=True, kw_only=True):
    """What one user stack has allocated and not freed."""

    stack: int
    """Id of the stack, below 2^53: the same for the same frames in every report of the sender."""
    kind: str
    live_bytes: int
    live_allocations: int = 0
    oldest_ns: int = 0
    """When its oldest live allocation was made; 0: unknown."""


class CudaProcess(_Record, tag="cuda_process", frozen=True, kw_only=True):
    """State of a tracer: the CUDA memory of one process on one GPU, each 15 s, and once more when it ends."""

    at: int
    pid: int
    """As the machine's first pid namespace numbers it."""
    start_ticks: int
    """When it started, in clock ticks since boot (field 22 of /proc/PID/stat): a pid alone names nobody."""
    name: str = ""
    """Its command name."""
    gpu_uuid: str = ""
    """The GPU that it uses; empty: unknown, or several."""
    memory: list[CudaMemory] = []
    """At most one of each kind."""
    stacks: list[CudaOwner] = []
    """The stacks that hold most, most first, at most 16."""
    tracking_since_ns: int
    """Since when allocations and frees of this process are seen; what it had before is unknown."""
    untracked_bytes: int = -1
    """What the driver's list of processes says beyond the ledger (context, modules, before tracking); -1:
    unknown."""
    lost: int = 0
    """Allocations and frees of this process that were seen and not booked, since tracking began."""
    epoch: int = 0
    """Changes whenever live bytes change by anything but an allocation or a free: tracking began anew, the
    ledger was corrected. Nothing is concluded across such a change."""
    drifted: bool = False
    """Ledger and driver contradict each other, and were not brought together yet."""
    ended: bool = False
    """The process has gone; this is the last word on it."""


class CudaStack(_Record, tag="cuda_stack", frozen=True, kw_only=True):
    """State of a tracer: the frames of a stack, once per connection, before it is named for the first
    time."""

    stack: int
    frames: list[str]
    """Innermost first, at most 48: `function (module)`, or `module+0x12ab` where there is no symbol."""


class CudaEvent(_Record, tag="cuda_event", frozen=True, kw_only=True):
    """Event of a tracer: one call that allocates CUDA memory. Failures, large ones, and a bounded sample."""

    at: int
    """When the call returned."""
    begin_ns: int
    """When it was made, on the same clock."""
    pid: int
    tid: int
    """As the machine's first pid namespace numbers them."""
    start_ticks: int = 0
    """Of the process, as in `CudaProcess`; 0: unknown."""
    function: str
    """The driver's function, without suffixes: cuMemAlloc."""
    kind: str
    """device, host, managed, virtual or tensor."""
    bytes: int
    """Bytes that were asked for."""
    code: int = 0
    """CUresult: 0 is success."""
    stack: int = 0
    """0: unknown."""
    reason: str
    """failure, large, or sample: the first of them that holds."""


Record = (
    Hello
    | ProbeState
    | RequestStart
    | RequestAnswered
    | RequestRefused
    | RequestTraced
    | RequestProgress
    | RequestEnd
    | GpuProgress
    | Preemption
    | PoolState
    | TenantSums
    | CoreSums
    | StepSums
    | ExpertSums
    | HotExperts
    | AllocatorState
    | MemoryState
    | OutOfMemory
    | StepSample
    | PrefillChunks
    | StepKernels
    | CudaProcess
    | CudaStack
    | CudaEvent
)
Sum = (TenantSums, CoreSums, StepSums, ExpertSums)
"""The records that may stand only in packets with `seq` > 0."""


class Packet(msgspec.Struct, frozen=True, gc=False):
    """One packet. Records stay raw, so that one that cannot be read does not spoil the others."""

    seq: int
    records: list[msgspec.Raw]


class Ack(msgspec.Struct, frozen=True, gc=False):
    """The receiver's only message: all packets up to `ack` are taken in."""

    ack: int
