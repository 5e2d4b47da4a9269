"""Experts: how evenly tokens fall on them; exact where all steps are counted, else scaled and marked."""

from __future__ import annotations

import math
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.vllm.experts import ExpertsRefused, decode, imbalance, jain, rank_loads
from exporters.vllm.ledger import LedgerSettings
from exporters.vllm.sink import Refusal, Refused, Sender
from gpuglass.families import engine as families
from gpuglass_vllm import records
from tests.exporters.vllm.engine_world import World

EXPERTS = records.Experts(layers=[1, 2, 5], experts=4, top_k=2, every=1)


def counted(
    *layers: list[int], first: int = 0, tokens: int = 10, seen: int | None = None
) -> records.ExpertSums:
    return records.ExpertSums(
        first=first,
        counts=array("I", [count for layer in layers for count in layer]).tobytes(),
        counted_tokens=tokens,
        seen_tokens=tokens if seen is None else seen,
    )


def worker_of(world: World, **more: object) -> Sender:
    return world.connect("worker", **({"experts": EXPERTS} | more))


def test_load_of_each_layer_is_told_by_the_layers_own_number() -> None:
    world = World()
    world.tell(worker_of(world), counted([5, 5, 5, 5], [20, 0, 0, 0], [2, 14, 2, 2]))
    selections = {s.labels["layer"]: s.value for s in world.find(families.EXPERT_SELECTIONS)}
    assert selections == {"1": 20, "2": 20, "5": 20}
    assert {s.labels["counting"] for s in world.find(families.EXPERT_SELECTIONS)} == {"exact"}
    assert world.value(families.EXPERT_COUNTED) == 1
    assert world.value(families.EXPERT_IMBALANCE, layer="1") == 1
    assert world.value(families.EXPERT_IMBALANCE, layer="2") == 4
    assert world.value(families.EXPERT_JAIN, layer="1") == 1
    assert world.value(families.EXPERT_JAIN, layer="2") == 0.25
    assert world.value(families.EXPERT_HOTTEST, layer="5") == 1
    assert world.value(families.EXPERT_HOTTEST_SHARE, layer="5") == 0.7
    assert world.find(families.EXPERT_MATRIX) == [] == world.find(families.EXPERT_RANK)


def test_a_sample_is_scaled_by_tokens_and_marked() -> None:
    world = World()
    sampled = records.Experts(layers=[1], experts=4, top_k=2, every=8)
    worker = worker_of(world, experts=sampled)
    world.tell(worker, counted([0, 0, 0, 0], tokens=0, seen=30), counted([8, 4, 4, 4], tokens=10, seen=50))
    (selections,) = world.find(families.EXPERT_SELECTIONS)
    assert (selections.labels["counting"], selections.value) == ("sampled", 160), (
        "80 tokens, two choices each"
    )
    assert world.value(families.EXPERT_COUNTED) == 0.125
    assert world.value(families.EXPERT_IMBALANCE) == 1.6


def test_the_window_forgets_what_is_older_than_a_minute_and_totals_do_not() -> None:
    world = World()
    worker = worker_of(world)
    world.tell(worker, counted([20, 0, 0, 0]))
    world.wait(40)
    assert world.value(families.EXPERT_HOTTEST, layer="1") == 0
    world.tell(worker, counted([0, 20, 20, 0]))
    world.wait(40)
    assert world.value(families.EXPERT_HOTTEST, layer="1") == 1
    assert world.value(families.EXPERT_HOTTEST_SHARE, layer="1") == 0.5
    world.wait(40)
    assert world.find(families.EXPERT_HOTTEST) == world.find(families.EXPERT_COUNTED) == []
    assert world.value(families.EXPERT_SELECTIONS, layer="1") == 60


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("linear", [0.65, 0.35]), ("round_robin", [0.6, 0.4]), ("unknown", [])],
)
def test_load_of_expert_parallel_ranks_follows_their_placement(placement: str, expected: list[float]) -> None:
    world = World()
    experts = records.Experts(layers=[1, 2], experts=4, top_k=2, every=1, ranks=2, placement=placement)
    world.tell(worker_of(world, experts=experts), counted([8, 5, 4, 3], [8, 5, 4, 3]))
    found = {s.labels["expert_rank"]: s.value for s in world.find(families.EXPERT_RANK)}
    assert found == {str(rank): share for rank, share in enumerate(expected)}


def test_the_whole_matrix_only_comes_on_request() -> None:
    world = World(LedgerSettings(expert_matrix=True))
    world.tell(worker_of(world), counted([1, 2, 3, 4], first=2), counted([1, 0, 0, 0], first=2))
    found = {(s.labels["layer"], s.labels["expert"]): s.value for s in world.find(families.EXPERT_MATRIX)}
    assert found == {("5", "0"): 2, ("5", "1"): 2, ("5", "2"): 3, ("5", "3"): 4}


def test_a_hot_expert_has_the_names_of_its_three_largest_tenants() -> None:
    world = World(LedgerSettings(tenants=3))
    worker = worker_of(world)
    hot = records.HotExperts(
        at=world.now, tenants=["a", "b", "c", "d", "e"], layers=[1], experts=[0], counts=[[40, 30, 5, 10, 15]]
    )
    world.tell(worker, counted([100, 0, 0, 0], first=1), hot)
    found = {s.labels["tenant"]: s.value for s in world.find(families.EXPERT_TENANT, layer="2")}
    assert found == {"a": 0.4, "b": 0.3, "other": 0.25}, "the fourth and fifth are other together"
    world.wait(70)
    assert world.find(families.EXPERT_TENANT) == []


def test_layers_of_several_pipeline_ranks_come_together() -> None:
    world = World()
    for rank, layers in enumerate(([1, 2], [3])):
        experts = records.Experts(layers=layers, experts=4, top_k=2, every=1)
        world.tell(worker_of(world, rank=rank, experts=experts), counted(*([[5, 5, 5, 5]] * len(layers))))
    assert [s.labels["layer"] for s in world.find(families.EXPERT_JAIN)] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "wrong",
    [
        counted([1, 2, 3]),
        counted([]),
        counted([1, 2, 3, 4], first=3),
        counted([1, 2, 3, 4], [1, 2, 3, 4], first=2),
        records.ExpertSums(first=0, counts=b"\0" * 17, counted_tokens=1, seen_tokens=1),
    ],
)
def test_counts_that_do_not_fit_what_was_announced_are_refused_whole(wrong: records.ExpertSums) -> None:
    world = World()
    worker = worker_of(world)
    world.tell(worker, counted([1, 1, 1, 1]))
    with pytest.raises(Refused) as refused:
        world.tell(worker, wrong)
    assert refused.value.reason is Refusal.OUT_OF_RANGE
    assert world.value(families.EXPERT_SELECTIONS, layer="1") == 4
    with pytest.raises(Refused):
        world.tell(world.connect("worker", rank=1), counted([1, 1, 1, 1]))


def test_an_engine_has_a_bounded_number_of_experts() -> None:
    world = World()
    for rank in range(100):
        experts = records.Experts(layers=[rank], experts=4096, top_k=1, every=1)
        try:
            world.tell(worker_of(world, rank=rank, experts=experts), counted([1] * 4096))
        except Refused:
            break
    else:
        pytest.fail("no bound")
    (account,) = world.ledger.accounts.values()
    assert sum(len(layer.window) for layer in account.experts.layers.values()) == 1 << 18


# The functions over counts

some_counts = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64)


@given(some_counts)
def test_bounds_of_the_indices(counts: list[int]) -> None:
    if not sum(counts):
        assert math.isnan(imbalance(counts)) and math.isnan(jain(counts))
        return
    assert 1 - 1e-9 <= imbalance(counts) <= len(counts) + 1e-9
    assert 1 / len(counts) - 1e-9 <= jain(counts) <= 1 + 1e-9


@given(some_counts, st.integers(1, 70), st.sampled_from(["linear", "round_robin"]))
def test_ranks_have_all_choices_together(counts: list[int], ranks: int, placement: str) -> None:
    loads = rank_loads(counts, ranks, placement)
    if 1 < ranks <= len(counts):
        assert loads is not None
        assert (len(loads), sum(loads)) == (ranks, sum(counts))
    else:
        assert loads is None


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_counts_come_out_as_they_were_packed(layers: list[list[int]]) -> None:
    packed = b"".join(count.to_bytes(4, "little") for layer in layers for count in layer)
    assert [list(layer) for layer in decode(packed, 4)] == layers
    with pytest.raises(ExpertsRefused):
        decode(packed[:-1], 4)


@given(st.lists(st.lists(st.integers(0, 1000), min_size=4, max_size=4), max_size=12), st.integers(1, 90))
def test_choices_are_tokens_times_top_k_times_layers(told: list[list[int]], seconds: int) -> None:
    world = World()
    worker = worker_of(world)
    for layer in told:
        tokens = sum(layer) // 2
        layer[0] += sum(layer) % 2
        tokens = sum(layer) // 2
        world.tell(worker, counted(layer, layer, layer, tokens=tokens))
        world.wait(seconds / 10)
    choices = sum(s.value for s in world.find(families.EXPERT_SELECTIONS))
    assert choices == sum(map(sum, told)) * 3
