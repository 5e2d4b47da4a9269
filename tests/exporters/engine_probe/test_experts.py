"""Expert counts: whole steps, exact, whoever asked; padding and strangers left out."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import msgspec
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuglass_vllm import experts, records
from gpuglass_vllm.experts import OTHER, TENANTS, Choices, Experts, HostCounts, Layout, Routing

LAYOUT = Layout((3, 5), 8, 2)


class Ids:
    """What is used of a tensor."""

    def __init__(self, rows: Any) -> None:
        self.array = numpy.array(rows, dtype=numpy.int32)
        self.ndim = self.array.ndim
        self.shape = self.array.shape

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.array

    def numel(self) -> int:
        return int(self.array.size)

    def element_size(self) -> int:
        return 4


def ids(tokens: int, seed: int = 0, layout: Layout = LAYOUT) -> Ids:
    rng = numpy.random.default_rng(seed)
    return Ids([rng.choice(layout.experts, layout.top_k, replace=False) for _ in range(tokens)])


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def counted(layout: Layout, sums: list[records.ExpertSums]) -> Any:
    """Counts [layer, expert] out of records."""
    return numpy.concatenate(
        [numpy.frombuffer(record.counts, dtype="<u4").reshape(-1, layout.experts) for record in sums]
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from([f"t{i}" for i in range(20)]), st.integers(1, 30)),
            min_size=1,
            max_size=12,
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 40),
)
def test_counts_are_tokens_times_top_k_in_every_layer(
    steps: list[list[tuple[str, int]]], padding: int
) -> None:
    """Padded rows are left out, and each tenant has its own tokens' choices."""
    clock = Time()
    routing = Routing(LAYOUT)
    see = [routing.capture_fn(index, None) for index in range(2)]
    counter = Experts(routing, HostCounts(LAYOUT), 1, clock)
    tokens = 0
    truth = numpy.zeros((2, 8), dtype=int)
    by_tenant: dict[str, int] = {}
    for number, spans in enumerate(steps):
        width = sum(count for _, count in spans)
        assert counter.begin(width)
        for layer in range(2):
            found = ids(width + padding, number * 2 + layer)
            see[layer](found)
            for expert in found.array[:width].reshape(-1):
                truth[layer, expert] += 1
        names = {tenant for tenant, _ in spans}
        counter.finish(width, names.pop() if len(names) == 1 else None, lambda spans=spans: spans)
        tokens += width
        for tenant, count in spans:
            by_tenant[tenant] = by_tenant.get(tenant, 0) + count
    clock.now = 100
    sums, hot = counter.drain(7)
    counts = counted(LAYOUT, sums)
    assert (counts == truth).all()
    assert (counts.sum(axis=1) == tokens * 2).all()
    assert sums[0].counted_tokens == sums[0].seen_tokens == tokens
    assert hot is not None and hot.at == 7
    assert hot.experts == counts.argmax(axis=1).tolist()
    assert [sum(row) for row in hot.counts] == counts.max(axis=1).tolist()
    assert len(hot.tenants) <= TENANTS
    if len(by_tenant) >= TENANTS:
        assert hot.tenants[-1] == OTHER
    else:
        assert set(hot.tenants) == set(by_tenant)


def test_a_captured_graph_leaves_its_choices_at_every_replay() -> None:
    routing = Routing(LAYOUT)
    see = [routing.capture_fn(index, None) for index in range(2)]
    first, second = ids(4), ids(4)
    held = routing.capture_begin()
    see[0](first)
    see[1](second)
    routing.capture_end()
    for _ in range(2):
        routing.begin()
        routing.replayed(held)
        choices = routing.take(3)
        assert choices == Choices([first, second], (held.serial,), 4)


def test_what_a_graph_left_goes_with_the_graph() -> None:
    """A tensor that we keep keeps its place in the graph's memory."""
    routing = Routing(LAYOUT)
    tensors = [ids(4), ids(4)]
    kept = [weakref.ref(tensor) for tensor in tensors]
    held = routing.capture_begin()
    for index, tensor in enumerate(tensors):
        routing.capture_fn(index, None)(tensor)
    routing.capture_end()
    routing.begin()
    routing.replayed(held)
    assert routing.take(4) is not None
    del held, tensors, tensor
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def test_pieces_of_a_step_are_put_together() -> None:
    routing = Routing(LAYOUT)
    see = [routing.capture_fn(index, None) for index in range(2)]
    pieces = []
    for layer in range(2):
        pieces.append(routing.capture_begin())
        see[layer](ids(4, layer))
        routing.capture_end()
    empty = routing.capture_begin()
    routing.capture_end()
    routing.begin()
    for piece in (pieces[0], empty, pieces[1]):
        routing.replayed(piece)
    choices = routing.take(4)
    assert choices is not None and choices.key == (pieces[0].serial, pieces[1].serial)
    routing.begin()
    routing.replayed(pieces[0])
    see[1](ids(4))
    mixed = routing.take(4)
    assert mixed is not None and mixed.key == (), "an eager layer lies elsewhere each time"


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([ids(4)], id="a layer is missing"),
        pytest.param([ids(4), ids(2)], id="a layer saw fewer tokens"),
        pytest.param([ids(4), Ids([[1, 2, 3]] * 4)], id="other top-k"),
        pytest.param([ids(4), Ids([1, 2, 3, 4])], id="other shape"),
    ],
)
def test_a_step_is_counted_whole_or_not_at_all(rows: list[Ids]) -> None:
    clock = Time()
    routing = Routing(LAYOUT)
    counter = Experts(routing, HostCounts(LAYOUT), 1, clock)
    counter.begin(4)
    for index, row in enumerate(rows):
        routing.capture_fn(index, None)(row)
    counter.finish(4, "t", list)
    clock.now = 100
    sums, hot = counter.drain(0)
    assert routing.incomplete == 1 and hot is None
    assert sums[0].counted_tokens == 0 and sums[0].seen_tokens == 4
    assert not counted(LAYOUT, sums).any()


def test_what_runs_outside_of_steps_is_not_kept() -> None:
    routing = Routing(LAYOUT)
    see = routing.capture_fn(0, None)
    see(ids(4))
    routing.replayed(experts.Held(1, {0: ids(4)}))
    routing.begin()
    routing.drop()
    see(ids(4))
    assert routing.take(4) is None
    assert routing.incomplete == 0
    assert not routing._eager and not routing._replayed


def test_a_function_that_was_there_before_is_called() -> None:
    routing = Routing(LAYOUT)
    seen: list[Ids] = []
    see = routing.capture_fn(0, seen.append)
    tensor = ids(2)
    see(tensor)
    routing.capture_begin()
    see(tensor)
    routing.capture_end()
    routing.begin()
    see(tensor)
    assert seen == [tensor] * 3


def test_what_graphs_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "MAX_HELD_BYTES", 100)
    routing = Routing(LAYOUT)
    see = [routing.capture_fn(index, None) for index in range(2)]
    graphs = []
    for _ in range(3):
        graphs.append(routing.capture_begin())
        for layer in range(2):
            see[layer](ids(4))
        routing.capture_end()
    assert routing.held_bytes <= 100
    assert [len(held.ids) for held in graphs] == [2, 1, 0]


def test_one_step_in_so_many_is_counted_and_all_are_seen() -> None:
    clock = Time()
    routing = Routing(LAYOUT)
    see = [routing.capture_fn(index, None) for index in range(2)]
    counter = Experts(routing, HostCounts(LAYOUT), 8, clock)
    chosen = []
    for number in range(800):
        chosen.append(counter.begin(3))
        for function in see:
            function(ids(3, number))
        if chosen[-1]:
            counter.finish(3, "", list)
    assert all(sum(chosen[start : start + 8]) == 1 for start in range(0, 800, 8))
    places = {chosen[start : start + 8].index(True) for start in range(0, 800, 8)}
    assert places == set(range(8)), "every place in the row is chosen at times"
    clock.now = 10
    sums, _ = counter.drain(0)
    assert sums[0].counted_tokens == 300 and sums[0].seen_tokens == 2400


def test_each_choice_is_told_once() -> None:
    clock = Time()
    routing = Routing(LAYOUT)
    see = [routing.capture_fn(index, None) for index in range(2)]
    counter = Experts(routing, HostCounts(LAYOUT), 1, clock)

    def step() -> None:
        counter.begin(5)
        for function in see:
            function(ids(5))
        counter.finish(5, "", list)

    step()
    assert counter.drain(0) == ([], None), "not yet"
    clock.now = 3
    assert counted(LAYOUT, counter.drain(0)[0]).sum() == 20
    clock.now = 6
    assert counter.drain(0) == ([], None)
    step()
    assert counted(LAYOUT, counter.drain(0)[0]).sum() == 20
    step()
    assert counter.drain(0) == ([], None), "not yet"
    assert counted(LAYOUT, counter.drain(0, hurry=True)[0]).sum() == 20, "the process ends"


def test_counts_that_are_not_ready_come_later() -> None:
    class Slow(HostCounts):
        ready = False

        def collect(self) -> Any | None:
            return super().collect() if self.ready else None

    clock = Time()
    routing = Routing(LAYOUT)
    see = [routing.capture_fn(index, None) for index in range(2)]
    slow = Slow(LAYOUT)
    counter = Experts(routing, slow, 1, clock)

    def step() -> None:
        counter.begin(5)
        for function in see:
            function(ids(5))
        counter.finish(5, "", list)

    step()
    clock.now = 3
    assert counter.drain(0) == ([], None)
    step()
    assert counter.drain(0) == ([], None)
    slow.ready = True
    sums, _ = counter.drain(0)
    assert sums[0].counted_tokens == 5 and counted(LAYOUT, sums).sum() == 20
    clock.now = 6
    assert counted(LAYOUT, counter.drain(0)[0]).sum() == 20


def test_a_step_is_counted_in_the_window_that_saw_it() -> None:
    clock = Time()
    routing = Routing(LAYOUT)
    see = [routing.capture_fn(index, None) for index in range(2)]
    counter = Experts(routing, HostCounts(LAYOUT), 1, clock)
    clock.now = 3
    counter.begin(5)
    assert counter.drain(0) == ([], None), "it is under way"
    for function in see:
        function(ids(5))
    counter.finish(5, "", list)
    sums, _ = counter.drain(0)
    assert sums[0].counted_tokens == sums[0].seen_tokens == 5
    clock.now = 6
    counter.begin(5)
    counter.cancel()
    sums, _ = counter.drain(0)
    assert (sums[0].counted_tokens, sums[0].seen_tokens) == (0, 5)


def test_nothing_is_copied_while_a_graph_is_captured() -> None:
    """A call into CUDA from another thread would break the capture."""
    clock = Time()
    routing = Routing(LAYOUT)
    counter = Experts(routing, HostCounts(LAYOUT), 1, clock)
    counter.begin(5)
    counter.finish(5, "", list)
    clock.now = 3
    routing.capture_begin()
    assert counter.drain(0) == ([], None)
    routing.capture_end()
    assert counter.drain(0)[0]


def test_without_an_agent_counting_rests_below_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "MAX_COUNTED", 12)
    clock = Time()
    routing = Routing(LAYOUT)
    see = [routing.capture_fn(index, None) for index in range(2)]
    counter = Experts(routing, HostCounts(LAYOUT), 1, clock)
    for _ in range(4):
        counter.begin(5)
        for function in see:
            function(ids(5))
        counter.finish(5, "", list)
    clock.now = 3
    sums, _ = counter.drain(0)
    assert sums[0].counted_tokens == 10 and sums[0].seen_tokens == 20


@pytest.mark.parametrize(("layers", "number"), [(26, 64), (58, 256), (60, 384), (94, 1024)])
def test_records_fit_into_packets(layers: int, number: int) -> None:
    window = experts.Window(7, 9, {f"{'t' * 60}{i}": i for i in range(TENANTS - 1)})
    counts = numpy.full((TENANTS, layers, number), 2**24, dtype=numpy.int64)
    sums, hot = experts.records_of(experts.Counted(counts, window), 0)
    layout = Layout(tuple(range(layers)), number, 8)
    assert counted(layout, sums).shape == (layers, number)
    assert sums[0].first == 0
    assert hot is not None
    for record in [*sums, hot]:
        assert len(msgspec.msgpack.encode(record)) < records.MAX_PACKET - 64


def test_ids_that_are_no_expert_are_left_out() -> None:
    counts = HostCounts(LAYOUT)
    choices = Choices([Ids([[-1, 3], [8, 100]]), Ids([[0, 1], [2, 3]])], ())
    counts.add(choices, 2, 0)
    counts.add(choices, 2, [(0, 1), (1, 1)])
    counts.swap()
    result = counts.collect()
    assert result.sum(axis=(0, 2)).tolist() == [2, 8]
