"""What a worker's memory is for, read from model runners of several makes, without vLLM or torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gpuglass_vllm import memory, settings
from gpuglass_vllm.memory import UNKNOWN, Memory, NotTold, graph_pools

HOOKS = (memory.WEIGHTS, memory.KV_CACHE, memory.GRAPHS, memory.ACTIVATIONS)


class Tensor:
    """As much of a tensor as is looked at."""

    def __init__(self, address: int, size: int, is_meta: bool = False) -> None:
        self.address, self.size, self.is_meta = address, size, is_meta

    def data_ptr(self) -> int:
        return self.address

    def untyped_storage(self) -> Any:
        assert not self.is_meta
        return SimpleNamespace(data_ptr=self.data_ptr, nbytes=lambda: self.size)


def model(*parameters: Tensor) -> Any:
    return SimpleNamespace(parameters=lambda: iter(parameters))


def segment(
    address: int, size: int, allocated: int, pool: tuple[int, int], device: int = 0
) -> dict[str, Any]:
    return {
        "device": device,
        "address": address,
        "total_size": size,
        "allocated_size": allocated,
        "segment_pool_id": pool,
    }


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hooks as in a process that has just begun."""
    monkeypatch.setattr(memory, "_loaded", {})
    before = [(hook.state, hook.reason, hook.on, hook.errors, hook.fault) for hook in HOOKS]
    for hook in HOOKS:
        hook.state, hook.reason, hook.on, hook.errors, hook.fault = "unavailable", "", False, 0, False
    yield
    for hook, (state, reason, on, errors, fault) in zip(HOOKS, before, strict=True):
        hook.state, hook.reason, hook.on, hook.errors, hook.fault = state, reason, on, errors, fault


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A torch whose allocator holds weights (pool of sleep mode), KV cache, graphs and others."""
    segments = [
        segment(9000, 500, 100, (3, 0), device=1),
        segment(1000, 1000, 900, (0, 7)),
        segment(5000, 2000, 2000, (0, 0)),
        segment(3000, 300, 40, (2, 0)),
        segment(3300, 200, 10, (2, 0)),
        segment(8000, 100, 100, (0, 0)),
    ]
    fake = SimpleNamespace(
        cuda=SimpleNamespace(memory_snapshot=lambda: segments, current_device=lambda: 0), segments=segments
    )
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


def worker(**runner: Any) -> Any:
    told: dict[str, Any] = {
        "model": model(Tensor(1000, 600), Tensor(1600, 300)),
        "model_memory_usage": 910.0,
        "kv_caches": [Tensor(5000, 1500), [Tensor(6500, 500), Tensor(5000, 1500)]],
    }
    return SimpleNamespace(
        model_runner=SimpleNamespace(**told | runner),
        device=SimpleNamespace(type="cuda", index=0),
        peak_activation_memory=77,
    )


def test_a_worker_on_a_gpu_tells_all_parts(torch: SimpleNamespace) -> None:
    state = Memory(worker(), True).state(5)
    assert (state.at, state.weights, state.kv_cache) == (5, 910, 2000), "a storage counts once"
    assert (state.graphs, state.graph_tensors) == (500, 50), (
        "not the pool that holds weights, not the other GPU"
    )
    assert (state.activation_peak, state.asleep) == (77, [])
    assert all(hook.state == "active" for hook in HOOKS)


def test_an_engine_without_graphs_has_none_of_it_which_is_known(torch: SimpleNamespace) -> None:
    torch.segments[:] = [s for s in torch.segments if s["segment_pool_id"] != (2, 0)]
    assert Memory(worker(), True).state(1).graphs == 0
    assert memory.GRAPHS.state == "active"


def test_on_a_cpu_the_parameters_count_as_they_were_loaded() -> None:
    memory._loaded[1] = 640
    state = Memory(worker(model_memory_usage=0), False).state(1)
    assert (state.weights, state.kv_cache) == (640, 2000)
    assert (state.graphs, state.graph_tensors, state.activation_peak) == (UNKNOWN,) * 3
    assert memory.GRAPHS.reason == memory.ACTIVATIONS.reason == "the engine runs on a CPU"


def test_a_model_runner_of_another_make_leaves_unknown_what_it_does_not_tell(torch: SimpleNamespace) -> None:
    other = SimpleNamespace(model_runner=SimpleNamespace(), device=SimpleNamespace(index=0))
    read = Memory(other, True)
    assert not read.is_known
    assert list(read.states(1, True)) == []
    for hook in HOOKS:
        assert hook.state == "unavailable" and hook.reason, hook.name
    assert (memory.WEIGHTS.errors, memory.KV_CACHE.errors, memory.ACTIVATIONS.errors) == (0, 0, 0)


def test_a_worker_without_a_model_runner_harms_nobody(torch: SimpleNamespace) -> None:
    assert not Memory(SimpleNamespace(), True).is_known


def test_a_torch_that_does_not_tell_pools_leaves_graphs_unknown(torch: SimpleNamespace) -> None:
    for each in torch.segments:
        del each["segment_pool_id"]
    state = Memory(worker(), True).state(1)
    assert (state.weights, state.graphs, state.graph_tensors) == (910, UNKNOWN, UNKNOWN)
    assert "does not tell the pools" in memory.GRAPHS.reason


def test_a_planned_cache_counts_where_no_tensors_are_kept() -> None:
    planned = SimpleNamespace(kv_cache_tensors=[SimpleNamespace(size=300), SimpleNamespace(size=200)])
    assert memory.kv_cache(SimpleNamespace(kv_caches=[], kv_cache_config=planned)) == 500
    with pytest.raises(NotTold):
        memory.kv_cache(SimpleNamespace(kv_caches=[]))


def test_what_versions_add_for_graphs_is_no_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = SimpleNamespace(VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS=True)
    module = ModuleType("vllm")
    module.envs = envs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    newer = SimpleNamespace(peak_activation_memory=100, cudagraph_memory_estimate=30, total_consumed=1)
    assert memory.activation_peak(newer, True) == 70
    envs.VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS = False
    assert memory.activation_peak(newer, True) == 100


def test_segments_of_graphs_are_those_of_private_pools_without_other_tensors() -> None:
    mine = [segment(0, 10, 5, (0, 0)), segment(100, 10, 4, (1, 0)), segment(200, 10, 3, (2, 0))]
    assert graph_pools(mine, 0, []) == (20, 7)
    assert graph_pools(mine, 0, [109]) == (10, 3)
    assert graph_pools(mine, 0, [110, 99, 5]) == (20, 7), "addresses in no private pool"
    assert graph_pools([], 0, [1]) == (0, 0)


def test_parts_that_sleep_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {
        1: SimpleNamespace(tag="weights", is_asleep=True),
        2: SimpleNamespace(tag="kv_cache", is_asleep=False),
        3: SimpleNamespace(tag="cudagraph", is_asleep=True),
        4: SimpleNamespace(tag="something else", is_asleep=True),
        5: SimpleNamespace(tag="weights"),
    }
    module = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=SimpleNamespace(pointer_to_data=data)))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)
    assert memory.asleep() == ["graphs", "weights"]
    module.CuMemAllocator.instance = None
    assert memory.asleep() == []


def test_records_come_now_and_then_and_to_whoever_is_new(torch: SimpleNamespace) -> None:
    read = Memory(worker(), True)
    assert [state.at for state in read.states(1, False)] == [1]
    assert list(read.states(2, False)) == []
    assert [state.at for state in read.states(3, True)] == [3]


def test_an_error_while_it_is_told_is_swallowed_and_counted(
    torch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Memory(worker(), True)
    monkeypatch.setitem(
        sys.modules, "vllm.device_allocator.cumem", SimpleNamespace(CuMemAllocator=BrokenSleep)
    )
    assert list(read.states(1, True)) == []
    assert memory.WEIGHTS.errors == 1


class BrokenSleep:
    instance = SimpleNamespace(pointer_to_data=None)


def test_an_injected_fault_leaves_a_part_unknown(
    torch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = settings.Settings(fault=frozenset({"worker.memory_kv_cache"}))
    monkeypatch.setattr(settings, "current", lambda: faulty)
    state = Memory(worker(), True).state(1)
    assert (state.weights, state.kv_cache) == (910, UNKNOWN)
    assert memory.KV_CACHE.state == "unavailable" and memory.KV_CACHE.errors == 1


def test_models_are_seen_as_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def process_weights_after_loading(model: Any, config: Any, device: Any) -> str:
        return "packed"

    loader = ModuleType("base_loader")
    loader.process_weights_after_loading = process_weights_after_loading  # type: ignore[attr-defined]
    package = ModuleType("vllm.model_executor.model_loader")
    package.base_loader = loader  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.model_executor", ModuleType("vllm.model_executor"))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.model_loader", package)
    memory.watch_loading()
    main = model(Tensor(1, 500), Tensor(1, 500), Tensor(0, 0, is_meta=True))
    draft = model(Tensor(2, 40))
    for each in (main, draft, main):  # weights may be loaded anew
        assert loader.process_weights_after_loading(each, None, "cpu") == "packed"
    assert sum(memory._loaded.values()) == 540
    assert Memory(worker(model_memory_usage=0), False).weights == 540
