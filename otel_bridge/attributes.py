"""Names of all attributes and events that the bridge writes, with what they mean: one table.

The GenAI and hardware semantic conventions of OpenTelemetry are followed where they have a name; all else is
below `gpuglass.`. The table in README.md is made from `TABLE`.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One name: where it stands, and what it says."""

    name: str
    on: str
    meaning: str


TABLE: list[Row] = []


def _name(name: str, on: str, meaning: str) -> str:
    TABLE.append(Row(name, on, meaning))
    return name


_REQUEST, _CHUNK, _STEP, _GPU, _KERNEL = (
    "request",
    "prefill.chunk",
    "engine.step",
    "gpu.execute",
    "gpu.kernel",
)
_RESOURCE = "resource"

# Conventions

SERVICE_NAME = _name("service.name", _RESOURCE, "GPUGLASS_SERVER of the engine, else traces.service_name")
SERVICE_INSTANCE = _name(
    "service.instance.id", _RESOURCE, "random name that all processes of a server share; new at each start"
)
SERVICE_VERSION = _name("service.version", _RESOURCE, "version of the engine")
HOST_NAME = _name("host.name", _RESOURCE, "name of the node, as the agent sees it")
K8S_NAMESPACE = _name("k8s.namespace.name", _RESOURCE, "of the engine's pod")
K8S_POD = _name("k8s.pod.name", _RESOURCE, "the engine's pod")
K8S_CONTAINER = _name("k8s.container.name", _RESOURCE, "the engine's container")
OPERATION = _name("gen_ai.operation.name", _REQUEST, "chat, text_completion, embeddings or generate_content")
PROVIDER = _name("gen_ai.provider.name", _REQUEST, "the engine: vllm")
REQUEST_MODEL = _name("gen_ai.request.model", _REQUEST, "name under which the model is served")
RESPONSE_MODEL = _name("gen_ai.response.model", _REQUEST, "the same")
MAX_TOKENS = _name("gen_ai.request.max_tokens", _REQUEST, "limit that the client set")
RESPONSE_ID = _name("gen_ai.response.id", _REQUEST, "id of the request as client or server named it")
FINISH_REASONS = _name("gen_ai.response.finish_reasons", _REQUEST, "stop or length")
FIRST_CHUNK = _name(
    "gen_ai.response.time_to_first_chunk", _REQUEST, "seconds from arrival to the first token"
)
INPUT_TOKENS = _name("gen_ai.usage.input_tokens", _REQUEST, "tokens of the prompt")
CACHED_TOKENS = _name(
    "gen_ai.usage.cache_read.input_tokens", _REQUEST, "tokens of the prompt found in the prefix cache"
)
OUTPUT_TOKENS = _name("gen_ai.usage.output_tokens", _REQUEST, "tokens generated")
ERROR_TYPE = _name(
    "error.type",
    _REQUEST,
    "validation, admission, timeout, out_of_memory, engine; aborted where the client left",
)
HW_ID = _name("hw.id", _GPU, "UUID of the GPU")
HW_TYPE = _name("hw.type", _GPU, "gpu")

# Own: requests

GPU_UUIDS = _name("gpuglass.gpu.uuids", _RESOURCE, "UUIDs of the engine's GPUs, by rank")
ENGINE = _name("gpuglass.engine", _RESOURCE, "data-parallel index of the engine")
REQUEST_ID = _name("gpuglass.request.id", f"{_REQUEST}, links", "the engine's own id of the request")
TENANT = _name("gpuglass.tenant", _REQUEST, "tenant as the metrics name it")
OUTCOME = _name("gpuglass.outcome", _REQUEST, "stop, length, abort, error or rejected")
KEPT_BY = _name(
    "gpuglass.kept_by", _REQUEST, "why it is here: caller, ratio, failed, aborted, preempted, slowest"
)
GPU_SECONDS = _name(
    "gpuglass.gpu.seconds",
    f"{_REQUEST}, {_CHUNK}, {_STEP}, links",
    "GPU time that went to the request, summed over ranks; on a step, a chunk or a link its share of that",
)
RECOMPUTE = _name(
    "gpuglass.gpu.recompute_seconds", _REQUEST, "part of it that computed anew what a preemption threw away"
)
KV_PEAK = _name("gpuglass.kv.peak_ratio", f"{_REQUEST}, event", "largest share of the KV cache that it held")
PREEMPTIONS = _name("gpuglass.preemptions", _REQUEST, "times that it lost its blocks")
LORA = _name("gpuglass.lora", _REQUEST, "LoRA adapter")

# Own: steps

TOKENS = _name("gpuglass.tokens", f"{_CHUNK}, {_STEP}, links", "tokens of the request that the step computed")
PHASE = _name("gpuglass.phase", f"{_STEP}, links", "prefill or decode: what the step did for the request")
STEP = _name(
    "gpuglass.step.number", _STEP, "number of the step in its worker: the same in all requests' traces"
)
STEP_RANK = _name("gpuglass.step.rank", _STEP, "rank of the worker that tells of it")
STEP_KIND = _name("gpuglass.step.kind", _STEP, "graph, piecewise or eager")
STEP_REQUESTS = _name("gpuglass.step.requests", _STEP, "requests in the step; links name 63 others at most")
STEP_TOKENS = _name("gpuglass.step.tokens", _STEP, "tokens of all of them")
CLOCK_ERROR = _name(
    "gpuglass.clock.error_seconds", f"{_GPU}, {_KERNEL}", "how far the device's times may be off on this axis"
)
KERNEL = _name("gpuglass.kernel.name", _KERNEL, "the kernel; `other` for all that are not shown")
STREAM = _name("gpuglass.kernel.stream", _KERNEL, "CUDA stream")
KERNEL_SECONDS = _name(
    "gpuglass.kernel.seconds",
    _KERNEL,
    "its share of the device's time (shared where several run); of `other`, the sum",
)
KERNELS = _name("gpuglass.kernel.count", _KERNEL, "how many kernels `other` stands for")

# Own: events

E_PREEMPTED = _name("gpuglass.preempted", "event", "the request lost its blocks")
CAUSE = _name("gpuglass.preemption.cause", E_PREEMPTED, "kv_full, cache_reset or unknown")
HOLDERS = _name("gpuglass.preemption.holders", E_PREEMPTED, "requests that held most blocks, most first")
LOST_TOKENS = _name("gpuglass.preemption.lost_tokens", E_PREEMPTED, "tokens that must be computed again")
E_KV_PEAK = _name("gpuglass.kv_peak", "event", "it was first told of the largest share of the KV cache")
E_ALLOCATION = _name("gpuglass.cuda.allocation", "event", "CUDA memory was asked for while its step ran")
FUNCTION = _name("gpuglass.cuda.function", E_ALLOCATION, "the driver's function")
BYTES = _name("gpuglass.cuda.bytes", f"{E_ALLOCATION}, gpuglass.out_of_memory", "bytes that were asked for")
CODE = _name("gpuglass.cuda.result", E_ALLOCATION, "CUresult: 0 success, 2 out of memory")
LINKED = _name("gpuglass.cuda.link", E_ALLOCATION, "exact or temporal: how surely it belongs to this step")
E_EXPERTS = _name("gpuglass.expert_imbalance", "event", "a layer's busiest expert stood out while it ran")
IMBALANCE = _name("gpuglass.expert.imbalance", E_EXPERTS, "choices of the busiest expert ÷ mean")
LAYER = _name("gpuglass.expert.layer_index", E_EXPERTS, "which of the expert layers, from 0")
E_OUT_OF_MEMORY = _name("gpuglass.out_of_memory", "event", "an allocation failed while its batch ran")
BATCH = _name("gpuglass.batch", E_OUT_OF_MEMORY, "requests of the batch and their tokens, most first")


def markdown() -> str:
    """The table for README.md."""
    lines = ["| attribute or event | on | meaning |", "|---|---|---|"]
    lines += [f"| `{row.name}` | {row.on} | {row.meaning} |" for row in TABLE]
    return "\n".join(lines) + "\n"
