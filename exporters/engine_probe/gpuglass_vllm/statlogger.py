"""vLLM's official channel for finished requests: used where the output processor cannot be observed.

Loaded by the entry point group `vllm.stat_logger_plugins`. An exception in `record` would end the serving
process, so everything here swallows its own errors.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from gpuglass_vllm import frontend, settings
from gpuglass_vllm.hooks import table


class GpuGlassStatLogger(StatLoggerBase):  # type: ignore[misc]
    """Tells how requests ended, by their external id, while `frontend.answers` is not active."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._hook = table.hook("frontend.stat_logger")
        if settings.current().socket:
            self._hook.activate()
        self._hook.run(self._begin, vllm_config)

    def _begin(self, vllm_config: Any) -> None:
        frontend.probe().configured(vllm_config)

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """One step's statistics."""
        if iteration_stats is not None and not table.hook("frontend.answers").on:
            self._hook.run(self._answered, iteration_stats)

    def _answered(self, iteration_stats: Any) -> None:
        for finished in iteration_stats.finished_requests:
            frontend.probe().on_finished_by_external_id(
                str(finished.request_id or ""), str(getattr(finished.finish_reason, "name", "")).lower()
            )

    def log(self) -> None:
        """Nothing is logged."""

    def log_engine_initialized(self) -> None:
        """Nothing is logged."""
