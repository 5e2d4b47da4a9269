"""Ready queries for the pack's own series, dcgm-exporter and vLLM.

Floors say what is too small to matter: they are in the unit of the series, and the reason stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpuglass.families import engine, gpu


def _query(name: str, expr: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "expr": expr, **settings}


GIB = float(1 << 30)

_ENGINE = ", ".join(engine.ENGINE)
_WORKER = ", ".join(engine.WORKER)
_TOKENS = "sum by (model_name) (rate(vllm:generation_tokens_total[5m]))"
_RUNNING = "sum by (model_name) (vllm:num_requests_running)"
_WAITING = "sum by (model_name) (vllm:num_requests_waiting)"

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "gpu": {
        "queries": (
            _query(
                "gpu_power",
                f"max by (gpu_uuid) (avg_over_time({gpu.POWER.name}[2m]))",
                min_deviation=30.0,  # a card's idle power alone moves by some watts
            ),
            _query(
                "gpu_temperature",
                f'max by (gpu_uuid) ({gpu.TEMPERATURE.name}{{sensor="gpu"}})',
                direction="above",
                min_deviation=3.0,
                valid=[-20, 150],
            ),
            _query(
                "gpu_memory_used",
                f"max by (gpu_uuid) ({gpu.MEMORY_USED.name})",
                min_deviation=GIB,  # fragments and contexts
            ),
            _query(
                "gpu_sm_active",
                f"max by (gpu_uuid) (avg_over_time({gpu.SM_ACTIVE.name}[2m]))",
                min_deviation=0.1,
                valid=[0, 1],
            ),
            _query(
                "gpu_pcie_receive",
                f"max by (gpu_uuid) (rate({gpu.PCIE_RX.name}[5m]))",
                direction="above",
                min_deviation=5e8,
            ),
        ),
        "detectors": (
            {
                "name": "gpu_memory_leak",
                "kind": "leak",
                "inputs": {"used": f"max by (gpu_uuid) ({gpu.MEMORY_USED.name})"},
            },
            {
                "name": "gpu_memory_stranded",
                "kind": "stranded",
                "inputs": {
                    "used": f"max by (gpu_uuid) ({gpu.MEMORY_USED.name})",
                    "busy": f"max by (gpu_uuid) ({gpu.BUSY.name})",
                },
            },
            {
                "name": "gpu_memory_exhaustion",
                "kind": "forecast",
                "inputs": {
                    "value": f"max by (gpu_uuid) ({gpu.MEMORY_USED.name})",
                    # What the driver keeps for itself cannot be allocated.
                    "limit": f"max by (gpu_uuid) ({gpu.MEMORY_TOTAL.name})"
                    f" - max by (gpu_uuid) ({gpu.MEMORY_RESERVED.name})",
                },
            },
        ),
    },
    "engine": {
        "queries": (
            _query(
                "kv_used",
                f"max by ({_ENGINE}) ({engine.KV_USED_BLOCKS.name} / {engine.KV_POOL_BLOCKS.name})",
                min_deviation=0.1,
                valid=[0, 1],
            ),
        ),
        "detectors": (
            {
                "name": "kv_exhaustion",
                "kind": "forecast",
                "inputs": {
                    "value": f"max by ({_ENGINE}) ({engine.KV_USED_BLOCKS.name})",
                    "limit": f"max by ({_ENGINE}) ({engine.KV_POOL_BLOCKS.name})",
                },
            },
            {
                "name": "engine_fragmentation",  # the alert on daily peaks knows it by its name
                "kind": "recurring",
                "inputs": {"value": f"max by ({_WORKER}) ({engine.FRAGMENTATION.name})"},
            },
            {
                "name": "engine_straggler",
                "kind": "straggler",
                "inputs": {
                    "value": f"sum by ({_WORKER}) (rate({engine.STEP.name}_sum[2m]))"
                    f" / (sum by ({_WORKER}) (rate({engine.STEP.name}_count[2m])) > 0)",
                },
                "settings": {"group_by": list(engine.ENGINE)},
            },
        ),
    },
    "dcgm": {
        "queries": (
            _query(
                "dcgm_power", "max by (UUID) (avg_over_time(DCGM_FI_DEV_POWER_USAGE[2m]))", min_deviation=30.0
            ),
            _query(
                "dcgm_temperature",
                "max by (UUID) (DCGM_FI_DEV_GPU_TEMP)",
                direction="above",
                min_deviation=3.0,
                valid=[-20, 150],
            ),
            # Framebuffer sizes are in MiB.
            _query("dcgm_memory_used", "max by (UUID) (DCGM_FI_DEV_FB_USED)", min_deviation=1024.0),
            _query(
                "dcgm_sm_active",
                "max by (UUID) (avg_over_time(DCGM_FI_PROF_SM_ACTIVE[2m]))",
                min_deviation=0.1,
                valid=[0, 1],
            ),
        ),
        "detectors": (
            {
                "name": "dcgm_memory_leak",
                "kind": "leak",
                "inputs": {"used": "max by (UUID) (DCGM_FI_DEV_FB_USED) * 1048576"},
            },
            {
                "name": "dcgm_memory_stranded",
                "kind": "stranded",
                "inputs": {
                    "used": "max by (UUID) (DCGM_FI_DEV_FB_USED) * 1048576",
                    # Per cent; only 0 counts as idle.
                    "busy": "max by (UUID) (DCGM_FI_DEV_GPU_UTIL) / 100",
                },
            },
        ),
    },
    "vllm": {
        "queries": (
            _query(
                "vllm_tokens",
                _TOKENS,
                min_deviation=10.0,
            ),
            _query(
                "vllm_requests",
                "sum by (model_name) (rate(vllm:request_success_total[5m]))",
                min_deviation=0.1,
            ),
            _query(
                "vllm_waiting",
                _WAITING,
                direction="above",
                min_deviation=5.0,
            ),
            _query(
                "vllm_kv_used",
                "max by (model_name) (vllm:kv_cache_usage_perc or vllm:gpu_cache_usage_perc)",
                min_deviation=0.1,
                valid=[0, 1],
            ),
            _query(
                "vllm_first_token",
                "sum by (model_name) (rate(vllm:time_to_first_token_seconds_sum[5m]))"
                " / (sum by (model_name) (rate(vllm:time_to_first_token_seconds_count[5m])) > 0)",
                direction="above",
                min_deviation=0.1,
            ),
            _query(
                "vllm_preemptions",
                "sum by (model_name) (rate(vllm:num_preemptions_total[5m]))",
                direction="above",
                min_deviation=0.05,
            ),
        ),
        "detectors": (
            {
                "name": "vllm_tokens_forecast",
                "kind": "forecast",
                "inputs": {"value": _TOKENS},
            },
            {
                "name": "vllm_demand_forecast",
                "kind": "forecast",
                "inputs": {"value": f"{_RUNNING} + {_WAITING}"},
            },
            {
                "name": "vllm_demand_peaks",
                "kind": "recurring",
                "inputs": {"value": f"{_RUNNING} + {_WAITING}"},
            },
            {
                "name": "vllm_replicas",
                "kind": "replicas",
                "inputs": {
                    "value": _TOKENS,
                    "waiting": _WAITING,
                    "running": _RUNNING,
                    # Servers that answer the scrape; one may have several engines (data parallel).
                    "ready": "count by (model_name) (count by (model_name, job, instance) "
                    "(vllm:num_requests_running))",
                },
            },
            {
                "name": "vllm_silent",
                "kind": "silent",
                "inputs": {
                    # An engine that answers the scrape is up: its gauge of running requests is there.
                    "alive": "max by (model_name) (vllm:num_requests_running >= bool 0)",
                    "demand": "sum by (model_name) (vllm:num_requests_running + vllm:num_requests_waiting)",
                    "tokens": "sum by (model_name) (rate(vllm:generation_tokens_total[2m])"
                    " + rate(vllm:prompt_tokens_total[2m]))",
                },
            },
        ),
    },
}
"""Sections of a configuration by name."""
