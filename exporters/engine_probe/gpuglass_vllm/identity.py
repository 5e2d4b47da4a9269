"""Who an engine is, read from its own configuration: model, data-parallel index, version."""

from __future__ import annotations

from typing import Any


def engine_version() -> str:
    """Version of the vLLM that is loaded."""
    import vllm

    return str(getattr(vllm, "__version__", "unknown"))


def of(vllm_config: Any) -> dict[str, Any]:
    """Fields of `Hello` that the configuration of an engine gives."""
    return {
        "engine_name": "vllm",
        "engine_version": engine_version(),
        "model_name": model_name(vllm_config),
        "engine": engine_index(vllm_config),
    }


def model_name(vllm_config: Any) -> str:
    """Name under which the model is served: the `model_name` of vLLM's own metrics."""
    model = vllm_config.model_config
    served = getattr(model, "served_model_name", None)
    if isinstance(served, (list, tuple)):
        served = served[0] if served else None
    return str(served or getattr(model, "model", "unknown"))[:256]


def engine_index(vllm_config: Any) -> str:
    """Data-parallel index: the `engine` of vLLM's own metrics."""
    parallel = vllm_config.parallel_config
    index = getattr(parallel, "data_parallel_index", None)
    if index is None:
        index = getattr(parallel, "data_parallel_rank", 0)
    return str(index or 0)


def short_id(request_id: str, limit: int = 128) -> str:
    """The engine's request id, cut to what a record may carry; the random end that makes it unique stays."""
    if len(request_id) <= limit:
        return request_id
    return f"{request_id[: limit - 41]}~{request_id[-40:]}"
