"""Families of the vLLM exporter (`exporters/vllm`): KV cache, requests, tenants, experts, steps.

All start with the labels of the engine: `model_name`, `engine` as the engine spells it, `server` where an
operator named it or two would be one, and the workload of its processes. Families of a worker carry `rank`
and `gpu_uuid` besides, which joins them to `gpuglass_gpu_info`.
"""

from __future__ import annotations

from gpuglass.families.gpu import WORKLOAD
from gpuglass.family import Family, Kind, Tier

ENGINE = ("model_name", "engine", "server", *WORKLOAD)
WORKER = (*ENGINE, "rank", "gpu_uuid")
_ENGINE_OPTIONAL = frozenset({"server", *WORKLOAD})

STEP_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
"""As in the record stream (`StepSums.seconds`), whose counts come in these buckets."""
STEP_REQUESTS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""As in the record stream (`StepSums.requests`)."""
EVICT_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""As in the record stream (`CoreSums.evictions`)."""
REQUEST_SECONDS = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0,
    300.0, 600.0, 1800.0,
)  # fmt: skip
PHASE_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
    30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
"""Queue, prefill and first token: an idle engine schedules within a millisecond."""
GPU_SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
TOKENS = (
    0, 1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576,
)  # fmt: skip
SHARES = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6,
    0.7, 0.8, 0.9, 0.95, 1.0,
)  # fmt: skip

_NO_CORE = "The engine's core is not connected, or its probe cannot see this (gpuglass_probe_capability)."
_NO_POOL = "The engine's core is not connected, or the size of its pool or of a block is unknown."
_NO_WORKER = (
    "No worker with this rank has said so; gpuglass_probe_capability tells what its probe cannot see."
)
_NO_REQUEST = "No request ended this way since the agent started, or none of them had this phase."
_NO_TENANT = "Nothing of this tenant was seen on this engine since the agent started."
_NO_EXPERTS = (
    "No expert was counted in the last minute: no mixture-of-experts model, an idle engine, or routing that "
    "cannot be seen (gpuglass_probe_capability)."
)


def _engine(
    name: str,
    kind: Kind,
    unit: str,
    help: str,
    *labels: str,
    tier: Tier = Tier.SLOW,
    absent: str = _NO_CORE,
    buckets: tuple[float, ...] = (),
    optional: frozenset[str] = frozenset(),
) -> Family:
    return Family(
        f"gpuglass_{name}",
        kind,
        help,
        (*ENGINE, *labels),
        unit,
        tier,
        absent=absent,
        optional=_ENGINE_OPTIONAL | optional,
        buckets=buckets,
    )


def _worker(
    name: str,
    kind: Kind,
    unit: str,
    help: str,
    *labels: str,
    absent: str = _NO_WORKER,
    buckets: tuple[float, ...] = (),
) -> Family:
    return _engine(
        name,
        kind,
        unit,
        help,
        "rank",
        "gpu_uuid",
        *labels,
        absent=absent,
        buckets=buckets,
        optional=frozenset({"gpu_uuid"}),
    )


def _request(name: str, unit: str, help: str, buckets: tuple[float, ...]) -> Family:
    return _engine(
        f"request_{name}",
        Kind.HISTOGRAM,
        unit,
        f"{help} By outcome (stop, length, abort, error, rejected), error_type and whether it was preempted; "
        "each request is observed once, when it has ended.",
        "outcome",
        "error_type",
        "preempted",
        absent=_NO_REQUEST,
        buckets=buckets,
        optional=frozenset({"error_type"}),
    )


# Engine

UP = _engine(
    "engine_up",
    Kind.GAUGE,
    "",
    "1 while the engine's core is connected; 0 after it has gone, until it is forgotten ten minutes later.",
    tier=Tier.FAST,
    absent="No core of this engine has connected, or it was forgotten.",
)
INFO = _engine(
    "engine_info",
    Kind.INFO,
    "",
    "What an engine is: engine_name (vllm, sglang, …) and its version.",
    "engine_name",
    "engine_version",
    absent="No process of this engine is connected.",
)
REQUESTS = _engine(
    "engine_requests",
    Kind.GAUGE,
    "",
    "Requests in the engine's scheduler, by state (running, waiting).",
    "state",
    tier=Tier.FAST,
)

# KV cache

KV_POOL_BLOCKS = _engine(
    "kv_pool_blocks",
    Kind.GAUGE,
    "",
    "Blocks of the KV cache that requests can hold.",
    tier=Tier.FAST,
    absent=_NO_POOL,
)
KV_POOL_BYTES = _engine(
    "kv_pool_bytes",
    Kind.GAUGE,
    "bytes",
    "Bytes of the KV cache that requests can hold, on all ranks together.",
    tier=Tier.FAST,
    absent=_NO_POOL,
)
KV_USED_BLOCKS = _engine("kv_used_blocks", Kind.GAUGE, "", "Blocks that some request holds.", tier=Tier.FAST)
KV_USED_BYTES = _engine(
    "kv_used_bytes",
    Kind.GAUGE,
    "bytes",
    "Bytes of the blocks that some request holds.",
    tier=Tier.FAST,
    absent=_NO_POOL,
)
KV_CACHED_BLOCKS = _engine(
    "kv_cached_blocks",
    Kind.GAUGE,
    "",
    "Blocks that no request holds and that still keep a prefix for reuse; they can be taken at any time.",
    tier=Tier.FAST,
)
KV_CACHED_BYTES = _engine(
    "kv_cached_bytes",
    Kind.GAUGE,
    "bytes",
    "Bytes of the blocks that no request holds and that still keep a prefix for reuse.",
    tier=Tier.FAST,
    absent=_NO_POOL,
)
KV_WASTE_TOKENS = _engine(
    "kv_waste_tokens",
    Kind.GAUGE,
    "tokens",
    "Empty places in the last blocks of running requests: held, and of no use to others.",
    tier=Tier.FAST,
)
KV_WASTE_BYTES = _engine(
    "kv_waste_bytes",
    Kind.GAUGE,
    "bytes",
    "Bytes of the empty places in the last blocks of running requests.",
    tier=Tier.FAST,
    absent="As gpuglass_kv_pool_bytes, or blocks hold different numbers of tokens.",
)
KV_HOLDER = _engine(
    "kv_holder_ratio",
    Kind.GAUGE,
    "ratio",
    "Share of the KV cache that the requests with the largest shares hold: holder 1 is the largest, 5 the "
    "fifth, with its tenant. A block that n requests share counts 1/n for each, so all shares add up to at "
    "most 1. The exemplar of gpuglass_kv_hog_seconds_total names a large one.",
    "holder",
    "tenant",
    tier=Tier.FAST,
    absent="Fewer requests than that hold blocks, or " + _NO_POOL[0].lower() + _NO_POOL[1:],
)
KV_HOG_SECONDS = _engine(
    "kv_hog_seconds_total",
    Kind.COUNTER,
    "seconds",
    "Time that single requests held more than a quarter of the KV cache, by tenant; two at once count twice. "
    "Grows while such a request runs, and its exemplar names the largest with the seconds that it has held "
    "so much.",
    "tenant",
    tier=Tier.FAST,
    absent="No request of the tenant held so much since the agent started.",
)
KV_PEAK = _engine(
    "kv_request_peak_ratio",
    Kind.HISTOGRAM,
    "ratio",
    "Largest share of the KV cache that each request held in its life; observed when it has ended.",
    absent=_NO_POOL,
    buckets=SHARES,
)
KV_EVICT = _engine(
    "kv_evict_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "Time from when the last request let go of a cached block until the block was taken for something else.",
    absent="No cached block was evicted since the agent started, or " + _NO_CORE[0].lower() + _NO_CORE[1:],
    buckets=EVICT_SECONDS,
)

# Requests

REQUEST_DURATION = _request(
    "duration_seconds",
    "seconds",
    "From a request's arrival in the server to its last output; as the server that answered it saw it, "
    "otherwise to when it left the scheduler.",
    REQUEST_SECONDS,
)
REQUEST_QUEUE = _request(
    "queue_seconds", "seconds", "From a request's arrival to its first scheduling.", PHASE_SECONDS
)
REQUEST_PREFILL = _request(
    "prefill_seconds", "seconds", "From a request's first scheduling to its first token.", PHASE_SECONDS
)
REQUEST_DECODE = _request(
    "decode_seconds", "seconds", "From a request's first token to its last.", REQUEST_SECONDS
)
REQUEST_FIRST_TOKEN = _request(
    "first_token_seconds",
    "seconds",
    "From a request's arrival to its first token; as the server that answered it saw it, otherwise as the "
    "engine's core did.",
    PHASE_SECONDS,
)
REQUEST_PROMPT_TOKENS = _request("prompt_tokens", "tokens", "Tokens of a request's prompt.", TOKENS)
REQUEST_CACHED_TOKENS = _request(
    "cached_tokens", "tokens", "Tokens of a request's prompt that the prefix cache had.", TOKENS
)
REQUEST_OUTPUT_TOKENS = _request(
    "output_tokens", "tokens", "Tokens that the engine made for a request.", TOKENS
)
REQUEST_GPU = _request(
    "gpu_seconds",
    "seconds",
    "GPU time of a request on all ranks together: its share of each step that it ran in, by modelled work.",
    GPU_SECONDS,
)
PREEMPTIONS = _engine(
    "request_preemptions_total",
    Kind.COUNTER,
    "",
    "Running requests that lost their KV blocks, by cause (kv_full, cache_reset, unknown). The exemplar "
    "names the victim and, as holder_…, the request that held most blocks at that moment.",
    "cause",
)
WASTED = _engine(
    "request_wasted_gpu_seconds_total",
    Kind.COUNTER,
    "seconds",
    "GPU time whose result nobody used, by tenant and reason: recompute (tokens computed again after a "
    "preemption), abort and error (all other GPU time of requests that ended so; the exemplar names the "
    "last).",
    "reason",
    "tenant",
    absent="No GPU time of the tenant was wasted so since the agent started.",
)
TRACKED = _engine(
    "requests_tracked",
    Kind.GAUGE,
    "",
    "Requests that the agent follows now: open ones, and ended ones until all processes have told of them.",
    absent="No process of this engine is connected.",
)
UNTRACKED = _engine(
    "requests_untracked_total",
    Kind.COUNTER,
    "",
    "Requests that are missing in the histograms of requests, by reason: limit (too many open ones), expired "
    "(no news for 15 minutes), lost (their end was never told). Totals of tenants have them all the same.",
    "reason",
    absent="No process of this engine has connected.",
)

# Tenants

TENANTS = Family(
    "gpuglass_tenants",
    Kind.GAUGE,
    "Tenants that have series of their own; further ones share tenant other, requests without one are none.",
    absent="The agent does not receive from engines.",
)
TENANT_GPU = _engine(
    "tenant_gpu_seconds_total",
    Kind.COUNTER,
    "seconds",
    "GPU time of a tenant's requests on all ranks together, with what was computed again; each step's time "
    "is split over its requests by modelled work. On a CPU engine it is wall time (label clock of "
    "gpuglass_engine_gpu_seconds_total).",
    "tenant",
    absent=_NO_TENANT,
)
TENANT_KV = _engine(
    "tenant_kv_byte_seconds_total",
    Kind.COUNTER,
    "seconds",
    "KV cache that a tenant's requests held, in bytes times seconds, on all ranks together.",
    "tenant",
    absent=_NO_TENANT + " Or the size of a block is unknown.",
)
TENANT_KV_SHARE = _engine(
    "tenant_kv_ratio",
    Kind.GAUGE,
    "ratio",
    "Share of the KV cache that a tenant's requests hold now.",
    "tenant",
    tier=Tier.FAST,
    absent=_NO_TENANT + " " + _NO_POOL,
)
TENANT_TOKENS = _engine(
    "tenant_tokens_total",
    Kind.COUNTER,
    "tokens",
    "Tokens of a tenant's requests by kind: prompt, cached (the part of prompt that the prefix cache had), "
    "output, recomputed (computed again after a preemption).",
    "tenant",
    "kind",
    absent=_NO_TENANT,
)
TENANT_REQUESTS = _engine(
    "tenant_requests_total",
    Kind.COUNTER,
    "",
    "Requests of a tenant that ended, by outcome (stop, length, abort, error, rejected) and error_type.",
    "tenant",
    "outcome",
    "error_type",
    absent="No request of the tenant ended this way since the agent started.",
    optional=frozenset({"error_type"}),
)
TENANT_PREEMPTIONS = _engine(
    "tenant_preemptions_total",
    Kind.COUNTER,
    "",
    "Times that a running request of a tenant lost its KV blocks.",
    "tenant",
    absent=_NO_TENANT,
)
TENANT_IN_FLIGHT = _engine(
    "tenant_requests_in_flight",
    Kind.GAUGE,
    "",
    "Requests of a tenant that have not ended, by state: running, waiting, or unknown where no core is "
    "connected that would tell.",
    "tenant",
    "state",
    tier=Tier.FAST,
    absent=_NO_TENANT,
)
TENANT_GPU_QUOTA = Family(
    "gpuglass_tenant_gpu_quota_seconds",
    Kind.GAUGE,
    "GPU-seconds a day that the configuration grants a tenant. Every agent says the same: read it through "
    "max by (tenant).",
    ("tenant",),
    "seconds",
    absent="The configuration sets no such quota.",
)
TENANT_KV_QUOTA = Family(
    "gpuglass_tenant_kv_quota_ratio",
    Kind.GAUGE,
    "Share of an engine's KV cache that the configuration grants a tenant. Every agent says the same: read "
    "it through max by (tenant).",
    ("tenant",),
    "ratio",
    absent="The configuration sets no such quota.",
)

# Experts

EXPERT_SELECTIONS = _engine(
    "expert_selections_total",
    Kind.COUNTER,
    "",
    "Times that a layer's router chose an expert, all experts together. counting is exact, or sampled where "
    "only some steps are counted and the count is scaled by tokens.",
    "layer",
    "counting",
    absent=_NO_EXPERTS,
)
EXPERT_MATRIX = _engine(
    "expert_matrix_selections_total",
    Kind.COUNTER,
    "",
    "Times that each expert of each layer was chosen; counting as in gpuglass_expert_selections_total.",
    "layer",
    "expert",
    "counting",
    absent="The configuration does not ask for it, or "
    + "the engine's experts were not counted since the agent started.",
)
EXPERT_COUNTED = _engine(
    "expert_counted_ratio",
    Kind.GAUGE,
    "ratio",
    "Share of the last minute's tokens whose expert choices were counted; below 1 all other expert families "
    "rest on a sample.",
    absent=_NO_EXPERTS,
)
EXPERT_IMBALANCE = _engine(
    "expert_load_imbalance",
    Kind.GAUGE,
    "",
    "Choices of a layer's busiest expert ÷ the mean of the layer's experts, over the last minute; 1 is even.",
    "layer",
    absent=_NO_EXPERTS,
)
EXPERT_JAIN = _engine(
    "expert_jain_index",
    Kind.GAUGE,
    "",
    "Jain's fairness index of a layer's experts over the last minute: 1 is even, 1 ÷ experts is all load on "
    "one.",
    "layer",
    absent=_NO_EXPERTS,
)
EXPERT_HOTTEST = _engine(
    "expert_hottest",
    Kind.GAUGE,
    "",
    "Number of a layer's busiest expert over the last minute (the value is the expert, so that a change "
    "makes no new series).",
    "layer",
    absent=_NO_EXPERTS,
)
EXPERT_HOTTEST_SHARE = _engine(
    "expert_hottest_ratio",
    Kind.GAUGE,
    "ratio",
    "Share of a layer's choices that fell on its busiest expert over the last minute.",
    "layer",
    absent=_NO_EXPERTS,
)
EXPERT_RANK = _engine(
    "expert_rank_load_ratio",
    Kind.GAUGE,
    "ratio",
    "Share of all choices that fell on the experts of an expert-parallel rank over the last minute.",
    "expert_rank",
    absent=_NO_EXPERTS + " Or one rank holds all experts, or their placement is unknown.",
)
EXPERT_TENANT = _engine(
    "expert_hottest_tenant_ratio",
    Kind.GAUGE,
    "ratio",
    "Share of the choices of a layer's hottest expert that came from a tenant, in the last counted steps; "
    "the three largest tenants of each layer.",
    "layer",
    "tenant",
    absent=_NO_EXPERTS,
)

# Steps

GPU_SECONDS_BY_PART = _worker(
    "engine_gpu_seconds_total",
    Kind.COUNTER,
    "seconds",
    "Time that a worker's steps took on the GPU's stream, by part: prefill and decode (split over requests), "
    "padding (padded tokens of captured batches), dummy (steps without a request), unattributed (steps whose "
    "requests are unknown). The parts add up to the time of all steps. clock is cuda (events on the stream) "
    "or wall (a CPU engine).",
    "clock",
    "part",
)
IDLE = _worker(
    "engine_idle_seconds_total",
    Kind.COUNTER,
    "seconds",
    "Time between steps in which the GPU waited although requests ran: the engine's CPU was the brake. Not "
    "part of gpuglass_engine_gpu_seconds_total.",
    "clock",
)
HOST_FED = _worker(
    "engine_host_fed_seconds_total",
    Kind.COUNTER,
    "seconds",
    "Part of gpuglass_engine_gpu_seconds_total in steps that were not one captured graph. The GPU may have "
    "waited for the host within them; how long cannot be told.",
    absent="No such worker, or it runs on a CPU.",
)
STEP = _worker(
    "engine_step_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "Time of each step of a worker.",
    "clock",
    buckets=STEP_SECONDS,
)
BATCH = _worker(
    "engine_step_requests",
    Kind.HISTOGRAM,
    "",
    "Requests in each step of a worker.",
    buckets=STEP_REQUESTS,
)
STEP_TOKENS = _worker(
    "engine_step_tokens_total",
    Kind.COUNTER,
    "tokens",
    "Tokens that a worker computed, by phase: prefill, decode, padding (computed for the shape of a captured "
    "batch only).",
    "phase",
)
FLOPS = _worker(
    "engine_model_flops_total",
    Kind.COUNTER,
    "",
    "Floating-point operations of a worker, by the engine's own model of itself.",
    absent="The engine has no model of itself, or no such worker.",
)
FLOPS_RATIO = _worker(
    "engine_flops_utilization_ratio",
    Kind.GAUGE,
    "ratio",
    "Modelled floating-point operations of the last 15 seconds ÷ what the card could do in that time by its "
    "maker's dense figure for the model's compute type.",
    absent="The engine has no model of itself, the card's peak is unknown, or no such worker is connected.",
)
ALLOCATOR_ALLOCATED = _worker(
    "allocator_allocated_bytes", Kind.GAUGE, "bytes", "Memory that live tensors of a worker hold."
)
ALLOCATOR_ACTIVE = _worker(
    "allocator_active_bytes",
    Kind.GAUGE,
    "bytes",
    "Memory that live tensors of a worker hold or that work on a stream still uses.",
)
ALLOCATOR_RESERVED = _worker(
    "allocator_reserved_bytes",
    Kind.GAUGE,
    "bytes",
    "Memory that a worker's caching allocator has from the driver.",
)
ALLOCATOR_INACTIVE_SPLIT = _worker(
    "allocator_inactive_split_bytes",
    Kind.GAUGE,
    "bytes",
    "Free pieces of split segments: reserved, and of no use to larger requests.",
)
MEMORY = _worker(
    "engine_memory_bytes",
    Kind.GAUGE,
    "bytes",
    "What a worker's device memory is for, by part: weights, kv_cache, graphs (the private pools of captured "
    "CUDA graphs), activations (live tensors that are none of these, the engine's buffers among them), "
    "in_flight (freed, still used by the stream), allocator_cache (reserved and not in use), unknown (live, "
    "where one of the first three is unknown). The parts add up to gpuglass_allocator_reserved_bytes; parts "
    "that sleep mode has taken off the device are 0.",
    "part",
    absent=_NO_WORKER + " On a CPU there are weights and kv_cache only.",
)
ACTIVATION_PEAK = _worker(
    "engine_activation_peak_bytes",
    Kind.GAUGE,
    "bytes",
    "Memory that the engine found its largest batch to need beside weights and KV cache, when it started. No "
    "part of gpuglass_engine_memory_bytes: it comes and goes.",
    absent="The worker runs on a CPU, or was told the size of its KV cache and so did not measure it.",
)
FRAGMENTATION = _worker(
    "allocator_fragmentation_ratio",
    Kind.GAUGE,
    "ratio",
    "Inactive split memory ÷ reserved memory of a worker.",
    absent=_NO_WORKER + " Or nothing is reserved.",
)
ALLOCATOR_RETRIES = _worker(
    "allocator_retries_total",
    Kind.COUNTER,
    "",
    "Times that a worker's allocator had to give all cached memory back to the driver to serve a request.",
)
ALLOCATOR_OOMS = _worker(
    "allocator_ooms_total", Kind.COUNTER, "", "Allocations of a worker that failed, by its allocator's count."
)
OUT_OF_MEMORY = _worker(
    "engine_out_of_memory_total",
    Kind.COUNTER,
    "",
    "Steps of a worker that ended because an allocation failed. The exemplar names the request with most "
    "tokens in that step.",
)
