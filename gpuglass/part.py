"""What a part of the agent is. Rooms register theirs as entry points of the group `gpuglass.agent_parts`.

A part runs threads of its own, publishes batches to the store, and never lets an error reach the agent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gpuglass.config import Config
from gpuglass.gpu_processes import GpuProcesses
from gpuglass.record_hub import RecordHub
from gpuglass.store import Store


class Part(Protocol):
    """A running part of the agent."""

    def start(self) -> None:
        """Start the part's threads; returns at once."""

    def reload(self, config: Config) -> None:
        """Take a new configuration whose changed keys need no restart."""

    def stop(self, timeout: float) -> bool:
        """Stop within `timeout` seconds; False if a thread is stuck and was left behind."""

    def not_ready(self) -> str | None:
        """Why the part has no data yet, in one line; None once it has looked."""


@dataclass(frozen=True, slots=True)
class PartContext:
    """What the agent gives to a part."""

    config: Config
    store: Store
    add_capabilities: Callable[[Callable[[], Mapping[str, str]]], None]
    """Takes a function that gives states of node features by name, for `gpuglass_agent_capability`."""
    gpu_processes: GpuProcesses = field(default_factory=GpuProcesses)
    """Written by the GPU exporter, read by whoever has to know which process uses which GPU."""
    gpu_models: set[str] = field(default_factory=set)
    """Names of the models that the GPU exporter has seen since the agent started, as in gpuglass_gpu_info."""
    records: RecordHub = field(default_factory=RecordHub)
    """Filled by the receiver of engines' and tracers' records, heard by other parts."""


CreatePart = Callable[[PartContext], Part | None]
"""Makes a part; None if the configuration switches it off."""
