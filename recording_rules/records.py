"""All records of the pack, declared: name, labels, unit, what they say. Rules, alerts and dashboards import
them.

Labels that a source does not have are empty. `cluster` is a label that targets may carry; `node` is the
machine. `model` is the card (`NVIDIA H100 80GB HBM3`), `model_name` what an engine serves. The expressions
stand in `devices`, `engines`, `latency`, `cost`, `jobs`, `tenants`, `advice` and `rollups`.
"""

from __future__ import annotations

from types import MappingProxyType

from recording_rules.model import ADVICE as ADVICE_NAME
from recording_rules.model import Record

DEVICE = ("cluster", "node", "gpu_uuid", "device", "model")
NODE = ("cluster", "node")
FLEET = ("cluster",)
CARD = ("cluster", "model")
ENGINE = (
    "cluster", "model_name", "engine", "server", "workload_namespace", "workload_pod", "workload_container",
)  # fmt: skip
MODEL = ("cluster", "model_name")
TENANT = ("cluster", "tenant")
WORKLOAD = ("cluster", "workload_namespace", "workload_pod", "workload_container", "process")
"""A job: a process on a GPU that belongs to no known engine."""

# Devices

DEVICE_INFO = Record(
    "device:gpu_info:max", DEVICE, "", "Always 1: which GPU is where, by the newest scrape that lists it."
)
DEVICE_UP = Record(
    "device:gpu_up:min",
    DEVICE,
    "",
    "1 while the GPU answers, 0 while it does not (only by the pack's agent).",
)
DEVICE_BUSY = Record(
    "device:busy:avg", DEVICE, "ratio", "Share of time in which some kernel ran; not SM use."
)
DEVICE_GRAPHICS_ACTIVE = Record(
    "device:graphics_active:avg", DEVICE, "ratio",
    "Share of time in which the compute or graphics engine was active, by profiling counters.",
)  # fmt: skip
DEVICE_SM_ACTIVE = Record("device:sm_active:avg", DEVICE, "ratio", "Share of SMs that were busy.")
DEVICE_SM_OCCUPANCY = Record(
    "device:sm_occupancy:avg", DEVICE, "ratio", "Active warps as a share of the most that the SMs can hold."
)
DEVICE_TENSOR_ACTIVE = Record(
    "device:tensor_active:avg", DEVICE, "ratio", "Share of time in which the SMs used the tensor pipes."
)
DEVICE_DRAM_ACTIVE = Record(
    "device:dram_active:avg", DEVICE, "ratio", "Memory bandwidth used as a share of the card's maximum."
)
DEVICE_ACTIVE = Record(
    "device:active:avg", DEVICE, "ratio",
    "Best measure of work that the card gives: SM activity, else engine activity, else the busy ratio.",
)  # fmt: skip
DEVICE_MEMORY_USED_BYTES = Record(
    "device:memory_used_bytes:max", DEVICE, "bytes", "Device memory allocated to processes."
)
DEVICE_MEMORY_TOTAL_BYTES = Record(
    "device:memory_total_bytes:max", DEVICE, "bytes", "Device memory of the card."
)
DEVICE_MEMORY_USED = Record(
    "device:memory_used:ratio", DEVICE, "ratio", "Device memory allocated as a share of the card's."
)
DEVICE_POWER = Record("device:power_watts:avg", DEVICE, "watts", "Power drawn.")
DEVICE_POWER_LIMIT = Record("device:power_limit_watts:max", DEVICE, "watts", "Power limit in force.")
DEVICE_TEMPERATURE = Record(
    "device:temperature_celsius:max", (*DEVICE, "sensor"), "celsius", "Temperature at a sensor (gpu, memory)."
)
DEVICE_THROTTLED = Record(
    "device:throttled:ratio", (*DEVICE, "reason"), "ratio", "Share of time in which clocks were held down."
)
DEVICE_PCIE_RECEIVE = Record(
    "device:pcie_receive_bytes:rate", DEVICE, "bytes/s", "What the GPU received over PCIe."
)
DEVICE_PCIE_TRANSMIT = Record(
    "device:pcie_transmit_bytes:rate", DEVICE, "bytes/s", "What the GPU sent over PCIe."
)
DEVICE_NVLINK_RECEIVE = Record(
    "device:nvlink_receive_bytes:rate", DEVICE, "bytes/s", "What the GPU received over all its NVLinks."
)
DEVICE_NVLINK_TRANSMIT = Record(
    "device:nvlink_transmit_bytes:rate", DEVICE, "bytes/s", "What the GPU sent over all its NVLinks."
)
DEVICE_PCIE_REPLAYS = Record(
    "device:pcie_replays:rate", DEVICE, "events/s", "PCIe packets that were sent again."
)
DEVICE_NVLINK_ERRORS = Record(
    "device:nvlink_errors:rate", (*DEVICE, "type"), "events/s", "NVLink errors by type, all links together."
)
DEVICE_NVLINKS_UP = Record("device:nvlinks_up:sum", DEVICE, "", "NVLinks of the GPU that are active.")
DEVICE_XID = Record(
    "device:xid_errors:increase", (*DEVICE, "xid", "class"), "events",
    "XID errors in the rate window by code and class; dcgm-exporter keeps the last code only: class unknown.",
)  # fmt: skip
DEVICE_ECC = Record(
    "device:ecc_errors:increase", (*DEVICE, "type"), "events",
    "Memory errors in the rate window (corrected, uncorrected).",
)  # fmt: skip
DEVICE_REMAPPED_ROWS = Record(
    "device:remapped_rows:max", (*DEVICE, "cause"), "events",
    "Memory rows replaced over the life of the card, by cause (corrected, uncorrected).",
)  # fmt: skip
DEVICE_REMAP_PENDING = Record(
    "device:row_remap_pending:max", DEVICE, "", "1 if a row waits to be remapped at the next reset."
)
DEVICE_REMAP_FAILED = Record("device:row_remap_failed:max", DEVICE, "", "1 if a row could not be remapped.")

NODE_GPUS = Record("node:gpus:count", NODE, "GPUs", "GPUs of the node.")
NODE_ACTIVE = Record("node:active:avg", NODE, "ratio", "Mean activity of the node's GPUs.")
NODE_MEMORY_USED = Record("node:memory_used:ratio", NODE, "ratio", "Device memory allocated on the node.")
NODE_POWER = Record("node:power_watts:sum", NODE, "watts", "Power drawn by the node's GPUs.")
CARD_GPUS = Record("card:gpus:count", CARD, "GPUs", "GPUs of a card model.")
CARD_ACTIVE = Record("card:active:avg", CARD, "ratio", "Mean activity of the GPUs of a card model.")
FLEET_GPUS = Record("fleet:gpus:count", FLEET, "GPUs", "GPUs.")
FLEET_ACTIVE = Record("fleet:active:avg", FLEET, "ratio", "Mean activity of all GPUs.")
FLEET_MEMORY_USED = Record(
    "fleet:memory_used:ratio", FLEET, "ratio", "Device memory allocated, of all GPUs'."
)
FLEET_POWER = Record("fleet:power_watts:sum", FLEET, "watts", "Power drawn by all GPUs.")

# Engines

ENGINE_INFO = Record(
    "engine:engine_info:max", (*ENGINE, "dialect"), "",
    "Always 1: which engines are there, and whose series are read, as dialect: probe, vllm, sglang, trtllm, "
    "triton_vllm or triton_trtllm.",
)  # fmt: skip
ENGINE_UP = Record(
    "engine:up:max", ENGINE, "", "1 while the engine's core is connected to the agent (probe only)."
)
ENGINE_RUNNING = Record("engine:requests_running:sum", ENGINE, "requests", "Requests that run.")
ENGINE_WAITING = Record("engine:requests_waiting:sum", ENGINE, "requests", "Requests that wait.")
ENGINE_KV_USED = Record("engine:kv_used:ratio", ENGINE, "ratio", "Share of the KV cache that requests hold.")
ENGINE_KV_CACHED = Record(
    "engine:kv_cached:ratio", ENGINE, "ratio",
    "Share of the KV cache that keeps prefixes no request holds (probe only).",
)  # fmt: skip
ENGINE_KV_WASTE = Record(
    "engine:kv_waste:ratio", ENGINE, "ratio",
    "Empty places in the last blocks of requests as a share of the KV cache (probe only).",
)  # fmt: skip
ENGINE_KV_HOLDER = Record(
    "engine:kv_holder:max", (*ENGINE, "tenant"), "ratio",
    "Share of the KV cache that the largest request holds, with its tenant (probe only).",
)  # fmt: skip
ENGINE_TOKENS = Record(
    "engine:tokens:rate", (*ENGINE, "kind"), "tokens/s",
    "Tokens by kind: input (computed), cached (prompt tokens that the prefix cache had) and output.",
)  # fmt: skip
ENGINE_REQUESTS = Record(
    "engine:requests:rate", (*ENGINE, "outcome"), "requests/s",
    "Requests that ended by outcome: stop, length, abort, error, rejected, or ok where it is not told apart.",
)  # fmt: skip
ENGINE_PREEMPTIONS = Record(
    "engine:preemptions:rate", ENGINE, "events/s", "Running requests that lost their KV blocks."
)
ENGINE_PREFIX_HIT = Record(
    "engine:prefix_hit:ratio", ENGINE, "ratio", "Prompt tokens that the prefix cache had, of all."
)
ENGINE_GPUS = Record(
    "engine:gpus:count", (*ENGINE, "model"), "GPUs", "GPUs that the engine runs on, by card."
)
ENGINE_GPU_SECONDS = Record(
    "engine:gpu_seconds:rate", (*ENGINE, "gpu_uuid", "part"), "GPU-seconds/s",
    "GPU time of the engine on each GPU by part: prefill, decode, overhead (padding, dummy and unattributed "
    "steps, and the gaps in which the GPU waited for the engine's CPU).",
)  # fmt: skip
ENGINE_WASTED = Record(
    "engine:wasted:ratio", ENGINE, "ratio",
    "Share of the requests' GPU time whose result nobody used: recomputed, aborted, failed (probe only).",
)  # fmt: skip
ENGINE_EXPERT_IMBALANCE = Record(
    "engine:expert_imbalance:max", ENGINE, "", "Busiest expert ÷ mean, in the layer where that is worst."
)
ENGINE_EXPERT_RANK_IMBALANCE = Record(
    "engine:expert_rank_imbalance:ratio", ENGINE, "",
    "Load of the busiest expert-parallel rank ÷ the mean of the ranks.",
)  # fmt: skip
ENGINE_STEP_SECONDS = Record(
    "engine:step_seconds:avg", (*ENGINE, "rank", "gpu_uuid"), "seconds", "Mean time of a worker's step."
)
ENGINE_FRAGMENTATION = Record(
    "engine:allocator_fragmentation:max", (*ENGINE, "rank", "gpu_uuid"), "ratio",
    "Inactive split memory of the caching allocator ÷ what it has reserved.",
)  # fmt: skip

MODEL_ENGINES = Record("model:engines:count", MODEL, "", "Engines that serve the model.")
MODEL_RUNNING = Record("model:requests_running:sum", MODEL, "requests", "Requests that run.")
MODEL_WAITING = Record("model:requests_waiting:sum", MODEL, "requests", "Requests that wait.")
MODEL_KV_USED = Record("model:kv_used:max", MODEL, "ratio", "Share of KV cache held in the fullest engine.")
MODEL_TOKENS = Record(
    "model:tokens:rate", (*MODEL, "kind"), "tokens/s", "Tokens by kind: input, cached, output."
)
MODEL_REQUESTS = Record(
    "model:requests:rate", (*MODEL, "outcome"), "requests/s", "Requests that ended, by outcome."
)
MODEL_PREEMPTIONS = Record("model:preemptions:rate", MODEL, "events/s", "Preemptions.")
MODEL_PREFIX_HIT = Record(
    "model:prefix_hit:ratio", MODEL, "ratio", "Prompt tokens that the prefix cache had, of all."
)
MODEL_ACTIVE = Record(
    "model:active:avg", MODEL, "ratio", "Mean activity of the GPUs that the model's engines run on."
)
FLEET_TOKENS = Record("fleet:tokens:rate", (*FLEET, "kind"), "tokens/s", "Tokens by kind, of all models.")
FLEET_RUNNING = Record("fleet:requests_running:sum", FLEET, "requests", "Requests that run.")
FLEET_WAITING = Record("fleet:requests_waiting:sum", FLEET, "requests", "Requests that wait.")

# Latency and service levels

_QUANTILE = (*MODEL, "quantile")
MODEL_FIRST_TOKEN = Record(
    "model:first_token_seconds:quantile", _QUANTILE, "seconds", "Time to first token (0.5, 0.95, 0.99)."
)
MODEL_INTER_TOKEN = Record(
    "model:inter_token_seconds:quantile", _QUANTILE, "seconds",
    "Time between two tokens, from the engines' own histograms (0.5, 0.95, 0.99).",
)  # fmt: skip
MODEL_DURATION = Record(
    "model:request_duration_seconds:quantile", _QUANTILE, "seconds", "Time of a request (0.5, 0.95, 0.99)."
)
MODEL_QUEUE = Record(
    "model:request_queue_seconds:quantile", _QUANTILE, "seconds", "Time in the queue (0.5, 0.95, 0.99)."
)
_BUCKETS = (*MODEL, "le")
MODEL_FIRST_TOKEN_BUCKETS = Record(
    "model:first_token_seconds_bucket:rate", _BUCKETS, "events/s",
    "Histogram of times to first token: cumulative buckets, or a native histogram without le.",
)  # fmt: skip
MODEL_INTER_TOKEN_BUCKETS = Record(
    "model:inter_token_seconds_bucket:rate", _BUCKETS, "events/s", "The same of times between tokens."
)
MODEL_DURATION_BUCKETS = Record(
    "model:request_duration_seconds_bucket:rate", _BUCKETS, "events/s", "The same of times of requests."
)
MODEL_QUEUE_BUCKETS = Record(
    "model:request_queue_seconds_bucket:rate", _BUCKETS, "events/s", "The same of times in the queue."
)
_SLO = (*MODEL, "slo")
SLO_TOTAL = Record(
    "model:slo_total:rate", _SLO, "events/s",
    "What an objective counts: requests; tokens for inter_token. slo is first_token, inter_token, "
    "request_duration or errors.",
)  # fmt: skip
SLO_BAD = Record(
    "model:slo_bad:rate", _SLO, "events/s", "Part of model:slo_total:rate that misses the objective."
)
SLO_BAD_RATIO = Record(
    "model:slo_bad:ratio", (*_SLO, "window"), "ratio",
    "Share that misses the objective over a window (5m, 30m, 1h, 2h, 6h, 1d, 3d by default).",
)  # fmt: skip
SLO_BUDGET = Record(
    "model:slo_budget:ratio", _SLO, "ratio", "Share that the objective allows to miss it (1 − objective)."
)
SLO_BURN = Record(
    "model:slo_burn:ratio",
    (*_SLO, "window"),
    "",
    "Burn rate over a window: 1 uses the budget up in its time.",
)

# Tenants

TENANT_GPU_SECONDS = Record(
    "tenant:gpu_seconds:rate", (*TENANT, "model_name"), "GPU-seconds/s", "GPU time of a tenant's requests."
)
TENANT_TOKENS = Record(
    "tenant:tokens:rate", (*TENANT, "model_name", "kind"), "tokens/s",
    "Tokens of a tenant by kind: input, cached, output.",
)  # fmt: skip
TENANT_REQUESTS = Record(
    "tenant:requests:rate",
    (*TENANT, "model_name", "outcome"),
    "requests/s",
    "Requests of a tenant that ended.",
)
TENANT_KV = Record(
    "tenant:kv_used:max", (*TENANT, "model_name"), "ratio",
    "Largest share of an engine's KV cache that the tenant's requests hold.",
)  # fmt: skip
TENANT_GPU_SHARE = Record(
    "tenant:gpu_seconds:ratio", (*TENANT, "model_name"), "ratio", "Tenant's share of the model's GPU time."
)
TENANT_GPU_DAY = Record(
    "tenant:gpu_seconds:day", TENANT, "GPU-seconds", "GPU time of a tenant in the last 24 hours."
)
TENANT_GPU_QUOTA_USED = Record(
    "tenant:gpu_quota_used:ratio", TENANT, "ratio", "GPU time of the last 24 hours ÷ the tenant's quota."
)
TENANT_KV_QUOTA_USED = Record(
    "tenant:kv_quota_used:ratio", (*TENANT, "model_name"), "ratio", "KV share held ÷ the tenant's quota."
)
TENANT_COST = Record(
    "tenant:cost_per_hour:sum", (*TENANT, "model_name", "basis"), "price/h",
    "Cost of a tenant: usage is the GPU time that its requests used, allocation its share of all that the "
    "engines hold.",
)  # fmt: skip

# Cost

DEVICE_PRICE = Record("device:price_per_hour:max", DEVICE, "price/h", "Price of an hour of the GPU.")
WORKLOAD_GPU_USED = Record(
    "workload:gpu_used:avg", (*WORKLOAD, "gpu_uuid"), "ratio",
    "SM time that a job used on a GPU; 0 where it only holds memory.",
)  # fmt: skip
DEVICE_HOLDERS = Record(
    "device:holders:count", ("cluster", "gpu_uuid"), "", "Engines and jobs that are on the GPU."
)
DEVICE_HELD = Record(
    "device:gpu_share:sum", ("cluster", "gpu_uuid"), "ratio",
    "GPU time that holders used, added up; above 1 they overlap.",
)  # fmt: skip
ENGINE_GPU_SHARE = Record(
    "engine:gpu_share:ratio", (*ENGINE, "gpu_uuid", "part"), "ratio",
    "Part of a GPU that the engine answers for: prefill, decode, overhead, unmeasured, idle. What nobody "
    "used is divided evenly among a GPU's holders, so the parts of all holders add up to 1.",
)  # fmt: skip
WORKLOAD_GPU_SHARE = Record(
    "workload:gpu_share:ratio", (*WORKLOAD, "gpu_uuid", "part"), "ratio",
    "Part of a GPU that a job answers for: used, idle; with the engines' parts they add up to 1.",
)  # fmt: skip
_ENGINE_COST = (*ENGINE, "model", "part")
ENGINE_COST = Record(
    "engine:cost_per_hour:sum", _ENGINE_COST, "price/h",
    "Cost of an engine by card and part: prefill, decode, waste (GPU time whose result nobody used), "
    "overhead, unmeasured (no probe), idle. All parts together are the allocation.",
)  # fmt: skip
MODEL_COST_PART = Record(
    "model:cost_part_per_hour:sum", (*MODEL, "model", "part"), "price/h",
    "Cost of a model by card and part: prefill, decode, waste, overhead, unmeasured, idle.",
)  # fmt: skip
MODEL_COST = Record(
    "model:cost_per_hour:sum", (*MODEL, "model", "basis"), "price/h",
    "Cost of a model by card; basis allocation is what the bill says, usage what its requests used.",
)  # fmt: skip
MODEL_CARD_TOKENS = Record(
    "model:card_tokens:rate", (*MODEL, "model", "kind"), "tokens/s", "Tokens of a model by card and kind."
)
MODEL_PREFILL_SHARE = Record(
    "model:prefill_cost:ratio", (*MODEL, "model"), "ratio",
    "Share of the cost of a model's tokens that is prefill; the rest is decode.",
)  # fmt: skip
MODEL_COST_PER_1K = Record(
    "model:cost_per_1k_tokens:ratio", (*MODEL, "model", "basis", "kind"), "price/1k tokens",
    "Cost of a thousand tokens by card, basis and kind: input, cached, output, all.",
)  # fmt: skip
MODEL_WHAT_IF = Record(
    "model:what_if_cost_per_hour:sum", (*MODEL, "model"), "price/h",
    "What the model's present tokens would cost on each card that it runs on, at the efficiency measured "
    "there (usage basis).",
)  # fmt: skip
WORKLOAD_COST = Record(
    "workload:cost_per_hour:sum", (*WORKLOAD, "model", "basis"), "price/h",
    "Cost of a job by card; allocation is the GPU that it holds, usage the part of it that it uses.",
)  # fmt: skip
CARD_COST = Record(
    "card:cost_per_hour:sum", (*CARD, "part"), "price/h",
    "Cost of all GPUs of a card by part: those of engines, job_used, job_idle, and unallocated (no holder).",
)  # fmt: skip
FLEET_COST_PART = Record(
    "fleet:cost_part_per_hour:sum", (*FLEET, "part"), "price/h", "As card:cost_per_hour:sum, of all GPUs."
)
FLEET_COST = Record(
    "fleet:cost_per_hour:sum", FLEET, "price/h", "GPUs that have a price, times it: what an hour costs."
)

# Jobs

WORKLOAD_GPUS = Record(
    "workload:gpus:sum",
    (*WORKLOAD, "model"),
    "GPUs",
    "GPUs that a job answers for; over time these are GPU-hours.",
)
WORKLOAD_GPUS_IDLE = Record(
    "workload:gpus_idle:sum",
    (*WORKLOAD, "model"),
    "GPUs",
    "Part of workload:gpus:sum that the job does not use.",
)
WORKLOAD_SM = Record(
    "workload:sm_active:avg", WORKLOAD, "ratio", "SM time that the job used, mean over its GPUs."
)
WORKLOAD_TENSOR = Record(
    "workload:tensor_active:avg", WORKLOAD, "ratio",
    "Tensor activity, mean over the GPUs that the job has for itself.",
)  # fmt: skip
WORKLOAD_MEMORY = Record(
    "workload:memory_used_bytes:sum", WORKLOAD, "bytes", "Device memory that the job holds."
)
WORKLOAD_MEMORY_RATIO = Record(
    "workload:memory_used:ratio", WORKLOAD, "ratio", "The same as a share of the memory of its GPUs."
)

# Waste

FLEET_WASTED_GPU_SECONDS = Record(
    "fleet:wasted_gpu_seconds:rate", (*FLEET, "model_name", "tenant", "reason"), "GPU-seconds/s",
    "GPU time whose result nobody used, by reason: recompute, abort, error.",
)  # fmt: skip
FLEET_IDLE_GPUS = Record(
    "fleet:idle_gpus:sum", (*FLEET, "model"), "GPUs", "GPUs by card that did nothing: idle parts of all "
    "holders, and those without one.",
)  # fmt: skip

# Long ranges

DEVICE_ACTIVE_ROLLUP = Record(
    "device:active:rollup", DEVICE, "ratio", "device:active:avg, mean of the long interval (2m30s)."
)
DEVICE_MEMORY_ROLLUP = Record(
    "device:memory_used:rollup",
    DEVICE,
    "ratio",
    "device:memory_used:ratio, mean of the long interval (2m30s).",
)
DEVICE_POWER_ROLLUP = Record(
    "device:power_watts:rollup", DEVICE, "watts", "device:power_watts:avg, mean of the long interval (2m30s)."
)
ENGINE_KV_ROLLUP = Record(
    "engine:kv_used:rollup", ENGINE, "ratio", "engine:kv_used:ratio, mean of the long interval (2m30s)."
)
MODEL_TOKENS_ROLLUP = Record(
    "model:tokens:rollup",
    (*MODEL, "kind"),
    "tokens/s",
    "model:tokens:rate, mean of the long interval (2m30s).",
)
MODEL_COST_ROLLUP = Record(
    "model:cost_per_hour:rollup", (*MODEL, "model", "basis"), "price/h",
    "model:cost_per_hour:sum, mean of the long interval (2m30s).",
)  # fmt: skip
FLEET_COST_ROLLUP = Record(
    "fleet:cost_part_per_hour:rollup", (*FLEET, "part"), "price/h",
    "fleet:cost_part_per_hour:sum, mean of the long interval (2m30s).",
)  # fmt: skip
WORKLOAD_GPUS_ROLLUP = Record(
    "workload:gpus:rollup",
    (*WORKLOAD, "model"),
    "GPUs",
    "workload:gpus:sum, mean of the long interval (2m30s).",
)

# Advice

ADVICE = Record(
    ADVICE_NAME,
    ("id", "cluster", "model_name", "node", "gpu_uuid", "model", "query", *WORKLOAD[1:]),
    "",
    "A change of configuration that the data supports; the value is the evidence, id names the runbook's "
    "section, the other labels say about what.",
)

BY_NAME = MappingProxyType({r.name: r for r in list(vars().values()) if isinstance(r, Record)})
