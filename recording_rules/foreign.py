"""Metrics of other exporters that the first layer of rules reads: dcgm-exporter and the engines themselves.

Declared like the catalog's families, with the labels that rules may match, so that a rule cannot misspell one
and the keep-list knows whose endpoint a metric comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Exporter = Literal["dcgm", "vllm", "sglang", "trtllm", "triton"]


@dataclass(frozen=True, slots=True, eq=False)
class Foreign:
    """A metric as another exporter spells it; of a histogram the name without `_bucket`."""

    name: str
    exporter: Exporter
    labels: tuple[str, ...]
    histogram: bool = False


_DCGM = ("UUID", "device", "modelName", "Hostname", "hostname", "exported_pod", "exported_namespace")
_VLLM = ("model_name", "engine", "model", "version")
_SGLANG = ("model_name", "engine_type", "dp_rank", "tp_rank", "pp_rank", "priority")
_TRTLLM = ("model_name", "engine_type", "pid")
_TRITON = ("model", "version")


def _dcgm(name: str) -> Foreign:
    return Foreign(f"DCGM_FI_{name}", "dcgm", _DCGM)


# dcgm-exporter: MiB, °C, W; profiling fields are ratios and need its profiling module

DCGM_BUSY = _dcgm("DEV_GPU_UTIL")  # percent
DCGM_GRAPHICS_ACTIVE = _dcgm("PROF_GR_ENGINE_ACTIVE")
DCGM_SM_ACTIVE = _dcgm("PROF_SM_ACTIVE")
DCGM_SM_OCCUPANCY = _dcgm("PROF_SM_OCCUPANCY")
DCGM_TENSOR_ACTIVE = _dcgm("PROF_PIPE_TENSOR_ACTIVE")
DCGM_DRAM_ACTIVE = _dcgm("PROF_DRAM_ACTIVE")
DCGM_PCIE_RECEIVE = _dcgm("PROF_PCIE_RX_BYTES")  # bytes per second, a gauge whatever its type says
DCGM_PCIE_TRANSMIT = _dcgm("PROF_PCIE_TX_BYTES")
DCGM_MEMORY_USED = _dcgm("DEV_FB_USED")
DCGM_MEMORY_FREE = _dcgm("DEV_FB_FREE")
DCGM_MEMORY_RESERVED = _dcgm("DEV_FB_RESERVED")
DCGM_POWER = _dcgm("DEV_POWER_USAGE")
DCGM_TEMPERATURE = _dcgm("DEV_GPU_TEMP")
DCGM_MEMORY_TEMPERATURE = _dcgm("DEV_MEMORY_TEMP")
DCGM_PCIE_REPLAYS = _dcgm("DEV_PCIE_REPLAY_COUNTER")
DCGM_XID = _dcgm("DEV_XID_ERRORS")  # the last code, kept for ever
DCGM_REMAP_FAILED = _dcgm("DEV_ROW_REMAP_FAILURE")
DCGM_REMAPPED_CORRECTED = _dcgm("DEV_CORRECTABLE_REMAPPED_ROWS")
DCGM_REMAPPED_UNCORRECTED = _dcgm("DEV_UNCORRECTABLE_REMAPPED_ROWS")


def _vllm(name: str, histogram: bool = False) -> Foreign:
    return Foreign(f"vllm:{name}", "vllm", _VLLM, histogram)


# vLLM: `model_name` and `engine`; behind Triton `model` and `version`, and only some of them

VLLM_RUNNING = _vllm("num_requests_running")
VLLM_WAITING = _vllm("num_requests_waiting")
VLLM_KV_USED = _vllm("kv_cache_usage_perc")  # a ratio
VLLM_PROMPT = _vllm("prompt_tokens_total")  # with those that were cached
VLLM_CACHED = _vllm("prompt_tokens_cached_total")
VLLM_OUTPUT = _vllm("generation_tokens_total")
VLLM_SUCCESS = _vllm("request_success_total")
VLLM_PREEMPTIONS = _vllm("num_preemptions_total")
VLLM_FIRST_TOKEN = _vllm("time_to_first_token_seconds", histogram=True)
VLLM_INTER_TOKEN = _vllm("inter_token_latency_seconds", histogram=True)
VLLM_DURATION = _vllm("e2e_request_latency_seconds", histogram=True)
VLLM_QUEUE = _vllm("request_queue_time_seconds", histogram=True)
TRITON_VLLM_INTER_TOKEN = _vllm("time_per_output_token_seconds", histogram=True)


def _sglang(name: str, histogram: bool = False, *labels: str) -> Foreign:
    return Foreign(f"sglang:{name}", "sglang", (*_SGLANG, *labels), histogram)


# SGLang: gauges by scheduler rank, counters and latencies by tokenizer

SGLANG_RUNNING = _sglang("num_running_reqs")
SGLANG_WAITING = _sglang("num_queue_reqs")
SGLANG_GRAMMAR = _sglang("num_grammar_queue_reqs")
SGLANG_KV_USED = _sglang("token_usage")
SGLANG_PROMPT = _sglang("prompt_tokens_total")
SGLANG_CACHED = _sglang("cached_tokens_total", False, "cache_source")
SGLANG_OUTPUT = _sglang("generation_tokens_total")
SGLANG_REQUESTS = _sglang("num_requests_total")
SGLANG_ABORTED = _sglang("num_aborted_requests_total")
SGLANG_RETRACTED = _sglang("num_retracted_requests_total")
SGLANG_FIRST_TOKEN = _sglang("time_to_first_token_seconds", True)
SGLANG_INTER_TOKEN = _sglang("inter_token_latency_seconds", True)
SGLANG_DURATION = _sglang("e2e_request_latency_seconds", True)
SGLANG_QUEUE = _sglang("queue_time_seconds", True)


def _trtllm(name: str, histogram: bool = False, *labels: str) -> Foreign:
    return Foreign(f"trtllm_{name}", "trtllm", (*_TRTLLM, *labels), histogram)


# trtllm-serve

TRTLLM_RUNNING = _trtllm("num_requests_running")
TRTLLM_WAITING = _trtllm("num_requests_waiting")
TRTLLM_KV_USED = _trtllm("kv_cache_utilization")
TRTLLM_PROMPT = _trtllm("prompt_tokens_total")
TRTLLM_CACHED = _trtllm("prompt_cached_tokens_total")
TRTLLM_OUTPUT = _trtllm("generation_tokens_total")
TRTLLM_SUCCESS = _trtllm("request_success_total", False, "finished_reason")
TRTLLM_ERRORS = _trtllm("request_error_total", False, "http_code")
TRTLLM_FIRST_TOKEN = _trtllm("time_to_first_token_seconds", True)
TRTLLM_DURATION = _trtllm("e2e_request_latency_seconds", True)
TRTLLM_QUEUE = _trtllm("request_queue_time_seconds", True)


def _triton(name: str, histogram: bool = False, *labels: str) -> Foreign:
    return Foreign(name, "triton", (*_TRITON, *labels), histogram)


# Triton Inference Server, and the metrics of its former C++ backend for TensorRT-LLM

TRITON_PENDING = _triton("nv_inference_pending_request_count")
TRITON_SUCCESS = _triton("nv_inference_request_success")
TRITON_FAILURE = _triton("nv_inference_request_failure", False, "reason")
TRITON_TRTLLM_REQUESTS = _triton("nv_trt_llm_request_metrics", False, "request_type")
TRITON_TRTLLM_KV = _triton("nv_trt_llm_kv_cache_block_metrics", False, "kv_cache_block_type")
TRITON_TRTLLM_INPUT = _triton("nv_llm_input_token_len", True, "response_metric_type")
TRITON_TRTLLM_OUTPUT = _triton("nv_llm_output_token_len", True, "response_metric_type")


def escaped(metric: Foreign) -> Foreign:
    """A metric of SGLang as scrapers that negotiate underscore escaping see it."""
    return Foreign(metric.name.replace(":", "_"), metric.exporter, metric.labels, metric.histogram)


_ALL = [m for m in list(vars().values()) if isinstance(m, Foreign)]
BY_NAME = MappingProxyType(
    {m.name: m for m in (*_ALL, *(escaped(m) for m in _ALL if m.exporter == "sglang"))}
)
