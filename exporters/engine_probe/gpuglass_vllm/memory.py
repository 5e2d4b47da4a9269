"""What a worker's device memory is for: weights, KV cache, captured graphs, and the peak of activations.

In goes a worker that is ready to serve; out goes a `MemoryState` now and then. All figures are read once,
when the engine is ready, because they do not change from then on; later only sleep is looked at. Attributes
are read, and the allocator's list of segments (once): nothing waits for the device. What a version of the
engine does not tell stays unknown, and the capability of that part says why.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpuglass_vllm import hooks
from gpuglass_vllm.records import MemoryState

UNKNOWN = -1
INTERVAL = 5.0
"""Seconds between two records."""

WEIGHTS = hooks.table.hook("worker.memory_weights")
KV_CACHE = hooks.table.hook("worker.memory_kv_cache")
GRAPHS = hooks.table.hook("worker.memory_graphs")
ACTIVATIONS = hooks.table.hook("worker.memory_activations")

_ON_A_CPU = "the engine runs on a CPU"
_MAX_MODELS = 8
_SLEEPERS = {"weights": "weights", "kv_cache": "kv_cache", "cudagraph": "graphs"}
"""The part that vLLM's tag of an allocation stands for."""

_loaded: dict[int, int] = {}
"""Bytes of parameters as they were loaded, by model (`id`): the main one, and one that drafts."""


class NotTold(Exception):
    """This engine does not tell a part; the text says why."""


def watch_loading() -> None:
    """See the weights of each model when they are loaded and the engine has not yet repacked them.

    On a CPU it keeps packed copies where no attribute leads to them.
    """
    if not WEIGHTS.activate():
        return
    try:
        from vllm.model_executor.model_loader import base_loader
    except ImportError:
        return  # the model runner's own figure may be there

    def loaded(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(_loaded) < _MAX_MODELS:
            _loaded[id(model)] = storage_bytes(model.parameters())

    if hasattr(base_loader, "process_weights_after_loading"):
        hooks.wrap(base_loader, "process_weights_after_loading", WEIGHTS, before=loaded)


class Memory:
    """The parts of one worker's memory. Made on the engine's thread, asked by the link's."""

    def __init__(self, worker: Any, on_cuda: bool) -> None:
        self.loaded = sum(_loaded.values())
        """Bytes of parameters when they were loaded; 0 if that was not seen."""
        runner = getattr(worker, "model_runner", None)
        self.weights = _read(WEIGHTS, lambda: weights(runner, on_cuda, self.loaded))
        self.kv_cache = _read(KV_CACHE, lambda: kv_cache(runner))
        self.graph_tensors = UNKNOWN
        self.graphs = _read(GRAPHS, lambda: self._graphs(worker, on_cuda))
        self.activation_peak = _read(ACTIVATIONS, lambda: activation_peak(worker, on_cuda))
        self._next = 0.0

    def _graphs(self, worker: Any, on_cuda: bool) -> int:
        if not on_cuda:
            raise NotTold(_ON_A_CPU)
        import torch

        runner = worker.model_runner
        others = [tensor.data_ptr() for tensor in _flat(getattr(runner, "kv_caches", ()))]
        others += [parameter.data_ptr() for parameter in runner.model.parameters()]
        index = worker.device.index
        device = index if index is not None else torch.cuda.current_device()
        reserved, self.graph_tensors = graph_pools(torch.cuda.memory_snapshot(), device, others)
        return reserved

    @property
    def is_known(self) -> bool:
        """Whether any part is."""
        return max(self.weights, self.kv_cache, self.graphs, self.activation_peak) > UNKNOWN

    def states(self, at: int, everything: bool) -> Iterable[MemoryState]:
        """The record, if it is time for one; never raises."""
        now = time.monotonic()
        if not self.is_known or not (everything or now >= self._next):
            return ()
        self._next = now + INTERVAL
        try:
            return (self.state(at),)
        except Exception as error:
            WEIGHTS.failed(error)
            return ()

    def state(self, at: int) -> MemoryState:
        """All that is known now."""
        return MemoryState(
            at=at,
            weights=self.weights,
            kv_cache=self.kv_cache,
            graphs=self.graphs,
            graph_tensors=self.graph_tensors,
            activation_peak=self.activation_peak,
            asleep=asleep(),
        )


def _read(hook: hooks.Hook, read: Callable[[], int]) -> int:
    """A part's bytes, or `UNKNOWN` with the reason in its capability."""
    if not hook.activate():
        return UNKNOWN
    try:
        hook.check()
        return read()
    except NotTold as reason:
        hook.unavailable(str(reason))
    except Exception as error:
        hook.failed(error)
        hook.unavailable(f"this version keeps it otherwise: {error!r}"[:200])
    return UNKNOWN


# What is read from vLLM and torch


def weights(runner: Any, on_cuda: bool, loaded: int) -> int:
    """What loading the model left in the allocator, by the runner's own figure (it has what loading derives
    from the parameters, too); else the parameters as they were loaded."""
    measured = getattr(runner, "model_memory_usage", 0)
    if on_cuda and measured > 0:
        return int(measured)
    if loaded > 0:
        return loaded
    raise NotTold("this version's model runner does not tell it, and its way of loading was not seen")


def kv_cache(runner: Any) -> int:
    """The rank's KV cache: the storages of its tensors, each once, else what was planned."""
    held = list(_flat(getattr(runner, "kv_caches", ())))
    if held:
        return storage_bytes(held)
    planned = getattr(getattr(runner, "kv_cache_config", None), "kv_cache_tensors", None)
    if planned is None:
        raise NotTold("this version's model runner keeps its KV cache elsewhere")
    return sum(int(tensor.size) for tensor in planned)


def activation_peak(worker: Any, on_cuda: bool) -> int:
    """What the largest batch needed beyond weights when the engine profiled itself."""
    if not on_cuda:
        raise NotTold(_ON_A_CPU)
    peak = getattr(worker, "peak_activation_memory", None)
    if peak is None:
        raise NotTold("the engine did not profile its memory: the size of its KV cache is configured")
    if hasattr(worker, "total_consumed"):
        # These versions add what they expect of graphs, if they are told to.
        from vllm import envs

        if getattr(envs, "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", False):
            peak -= getattr(worker, "cudagraph_memory_estimate", 0)
    return max(0, int(peak))


def graph_pools(segments: Sequence[dict[str, Any]], device: int, others: Sequence[int]) -> tuple[int, int]:
    """Bytes that the private pools of captured graphs have from the driver, and those of tensors in them.

    `segments` is `torch.cuda.memory_snapshot()`. A private pool with one of the addresses `others` (weights,
    KV cache) is no graph's: sleep mode has pools of its own for these.
    """
    mine = sorted((s for s in segments if s["device"] == device), key=lambda segment: segment["address"])
    if any("segment_pool_id" not in segment for segment in mine):
        raise NotTold("this version of torch does not tell the pools of its segments")
    begins = [segment["address"] for segment in mine]
    not_graphs = {(0, 0)}
    for address in others:
        place = bisect_right(begins, address) - 1
        if place >= 0 and address < begins[place] + mine[place]["total_size"]:
            not_graphs.add(tuple(mine[place]["segment_pool_id"]))
    pools = [segment for segment in mine if tuple(segment["segment_pool_id"]) not in not_graphs]
    return sum(int(s["total_size"]) for s in pools), sum(int(s["allocated_size"]) for s in pools)


def asleep() -> list[str]:
    """Parts that sleep mode has taken off the device; the allocator goes on counting them."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    instance = getattr(getattr(module, "CuMemAllocator", None), "instance", None)
    if instance is None:
        return []
    tags = {data.tag for data in list(instance.pointer_to_data.values()) if getattr(data, "is_asleep", False)}
    return sorted({_SLEEPERS[tag] for tag in tags if tag in _SLEEPERS})


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind tensors, each storage once; those without data do not count."""
    found: dict[int, int] = {}
    for tensor in tensors:
        if getattr(tensor, "is_meta", False):
            continue
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _flat(held: Any) -> Iterable[Any]:
    """The tensors of a list that holds tensors, or lists of them."""
    if isinstance(held, dict):
        held = held.values()
    for each in held or ():
        if isinstance(each, (list, tuple)):
            yield from _flat(each)
        elif hasattr(each, "untyped_storage"):
            yield each
