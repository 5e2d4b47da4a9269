"""Parts of a worker's memory add up to what its allocator reserved, whatever is known of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.vllm.memory import PARTS, parts
from gpuglass.families import engine as families
from gpuglass_vllm.records import AllocatorState, MemoryState
from tests.exporters.vllm.engine_world import World

GIB = 2**30
SLEEPERS = ("weights", "kv_cache", "graphs")

size = st.integers(0, 2**40)
maybe = st.integers(-1, 2**40)


@st.composite
def allocators(draw: st.DrawFn) -> AllocatorState:
    allocated, in_flight, cache = draw(size), draw(size), draw(size)
    return AllocatorState(
        at=1,
        allocated=allocated,
        active=allocated + in_flight,
        reserved=allocated + in_flight + cache,
        inactive_split=draw(st.integers(0, cache)),
    )


anything = st.builds(
    AllocatorState, at=st.just(1), allocated=size, active=size, reserved=size, inactive_split=size
)


@st.composite
def memories(draw: st.DrawFn) -> MemoryState:
    graphs = draw(maybe)
    return MemoryState(
        at=1,
        weights=draw(maybe),
        kv_cache=draw(maybe),
        graphs=graphs,
        graph_tensors=draw(st.integers(-1, graphs)),
        asleep=draw(st.lists(st.sampled_from(SLEEPERS), unique=True)),
    )


def state(**more: int) -> AllocatorState:
    told = {"allocated": 70, "active": 75, "reserved": 100, "inactive_split": 0} | more
    return AllocatorState(at=1, **told)


@given(memories(), st.one_of(allocators(), anything))
def test_parts_add_up_to_what_is_reserved_and_none_is_negative(
    memory: MemoryState, allocator: AllocatorState
) -> None:
    found = parts(memory, allocator)
    assert set(found) <= set(PARTS)
    assert min(found.values()) >= 0
    awake = parts(
        MemoryState(
            at=1,
            weights=memory.weights,
            kv_cache=memory.kv_cache,
            graphs=memory.graphs,
            graph_tensors=memory.graph_tensors,
        ),
        allocator,
    )
    assert sum(awake.values()) == allocator.reserved
    off = {part for part in memory.asleep if part in found}
    assert sum(found.values()) == allocator.reserved - sum(awake[part] for part in off)
    for part in SLEEPERS:
        told = getattr(memory, part)
        assert found.get(part, 0) <= max(0, told), "no more than the engine said"
        assert (part in found) == (told >= 0), "unknown is absent, never 0"
    assert ("unknown" in found) != ("activations" in found)


def test_each_byte_is_where_it_belongs() -> None:
    memory = MemoryState(at=1, weights=30, kv_cache=20, graphs=12, graph_tensors=4)
    assert parts(memory, state()) == {
        "weights": 30,
        "kv_cache": 20,
        "graphs": 12,
        "activations": 70 - 30 - 20 - 4,
        "in_flight": 5,
        "allocator_cache": 25 - 8,
    }


def test_what_cannot_be_told_apart_is_called_unknown() -> None:
    assert parts(MemoryState(at=1, weights=30, kv_cache=20), state()) == {
        "weights": 30,
        "kv_cache": 20,
        "unknown": 20,
        "in_flight": 5,
        "allocator_cache": 25,
    }


def test_an_engine_that_claims_more_than_there_is_gets_what_there_is() -> None:
    found = parts(MemoryState(at=1, weights=60, kv_cache=60, graphs=60, graph_tensors=60), state())
    assert found == {
        "weights": 60,
        "kv_cache": 10,
        "graphs": 25,
        "activations": 0,
        "in_flight": 5,
        "allocator_cache": 0,
    }


def test_without_an_allocator_only_what_was_said_is_told() -> None:
    assert parts(MemoryState(at=1, weights=3, kv_cache=0), None) == {"weights": 3, "kv_cache": 0}


def test_parts_are_published_by_rank_and_card_until_the_worker_goes() -> None:
    world = World()
    worker = world.connect("worker", rank=2)
    worker.gpu_uuid = "GPU-2"
    world.tell(worker, state(allocated=70 * GIB, active=71 * GIB, reserved=80 * GIB))
    assert world.find(families.MEMORY) == [], "an older probe tells none"
    told = MemoryState(at=5, weights=30 * GIB, kv_cache=35 * GIB, graphs=2 * GIB, graph_tensors=GIB)
    world.tell(worker, told, MemoryState(at=4, weights=1))
    samples = world.find(families.MEMORY, rank="2", gpu_uuid="GPU-2")
    assert {s.labels["part"]: s.value / GIB for s in samples} == {
        "weights": 30,
        "kv_cache": 35,
        "graphs": 2,
        "activations": 4,
        "in_flight": 1,
        "allocator_cache": 8,
    }
    assert world.find(families.ACTIVATION_PEAK) == [], "unknown is not 0"
    world.tell(worker, MemoryState(at=6, weights=30 * GIB, activation_peak=7))
    assert world.value(families.ACTIVATION_PEAK, rank="2", gpu_uuid="GPU-2") == 7
    world.kill(worker)
    assert world.find(families.MEMORY) == [] == world.find(families.ACTIVATION_PEAK)


def test_a_process_that_starts_anew_has_said_nothing_yet() -> None:
    world = World()
    world.tell(world.connect("worker", sender="first"), MemoryState(at=1, weights=7))
    assert world.value(families.MEMORY, part="weights") == 7
    world.connect("worker", sender="second")
    assert world.find(families.MEMORY) == []


@pytest.mark.parametrize("asleep", [["weights"], ["weights", "kv_cache"]])
def test_parts_that_sleep_are_off_the_device(asleep: list[str]) -> None:
    found = parts(MemoryState(at=1, weights=30, kv_cache=20, graphs=0, asleep=asleep), state())
    assert [found[part] for part in asleep] == [0] * len(asleep)
    assert found["activations"] == 20, "what else there is does not change"
