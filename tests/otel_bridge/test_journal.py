"""What is noted of open requests, and that it stays bounded."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuglass.record_hub import Allocation, Speaker
from gpuglass_vllm import records
from otel_bridge import attributes as names
from otel_bridge import journal as module
from otel_bridge.journal import FORGET_NS, LARGE_BYTES, Journal, Notes, Steps
from tests.otel_bridge.made import BEGIN, INSTANCE, OFFSET, TRACE, WORKER, at, start, step

A, B = "cmpl-a-0", "cmpl-b-0"


@pytest.fixture
def journal() -> Journal:
    """Two requests run."""
    journal = Journal()
    for name in (A, B):
        journal.start(INSTANCE, start(name), BEGIN)
    return journal


def taken(journal: Journal, name: str = A) -> Notes:
    notes = journal.take(INSTANCE, name)
    assert notes is not None
    return notes


def numbers(notes: Notes) -> list[int]:
    return [seen.step.sample.step for seen in notes.steps.kept()] if notes.steps is not None else []


def test_a_step_is_noted_for_all_its_requests(journal: Journal) -> None:
    journal.step(WORKER, step(7, 1, 2, (A, B, "cmpl-unknown-0")), at(2))
    one, other = taken(journal, A), taken(journal, B)
    assert numbers(one) == numbers(other) == [7]
    assert one.steps is not None and other.steps is not None
    (mine,), (theirs,) = one.steps.kept(), other.steps.kept()
    assert mine.step is theirs.step and (mine.place, theirs.place) == (0, 1)
    assert mine.step.places[:2] == (one.place, other.place)
    assert [place.context is None for place in mine.step.places if place] == [False, False, True]


def test_what_is_told_before_anybody_says_who_asked_is_kept() -> None:
    journal = Journal()
    journal.step(WORKER, step(1, 1, 2, (A, B)), at(2))
    journal.preempted(INSTANCE, records.Preemption(at=at(2), cause="kv_full", victim=A), at(2))
    journal.start(INSTANCE, start(A), at(3))
    notes = taken(journal)
    assert numbers(notes) == [1] and len(notes.events) == 1
    assert notes.steps is not None
    places = notes.steps.kept()[0].step.places
    assert [place is not None and place.context is not None for place in places] == [True, False]
    journal.start(INSTANCE, start(B), at(3))
    assert all(place is not None and place.context for place in places), "links find it from now on"


def test_a_late_word_on_a_request_that_is_over_begins_nothing(journal: Journal) -> None:
    taken(journal)
    journal.step(WORKER, step(9, 1, 2, (A, B)), at(2))
    assert journal.take(INSTANCE, A) is None
    other = taken(journal, B)
    assert other.steps is not None and other.steps.kept()[0].step.places[0] is None


def test_other_ranks_and_other_servers_say_nothing_of_it(journal: Journal) -> None:
    journal.step(Speaker(4, 78, 0, "worker", INSTANCE, OFFSET, rank=1), step(1, 1, 2, (A,)), at(2))
    journal.step(Speaker(5, 79, 0, "worker", "server-b", OFFSET, rank=0), step(2, 1, 2, (A,)), at(2))
    assert numbers(taken(journal)) == []


def test_the_first_the_slowest_and_some_of_the_others_are_kept() -> None:
    journal = Journal(steps_per_request=8)
    journal.start(INSTANCE, start(A), BEGIN)
    for number in range(1, 1001):
        took = 0.9 if number in (333, 777) else 0.01
        journal.step(WORKER, step(number, number, number + took, (A,)), at(number))
    kept = numbers(taken(journal))
    assert len(kept) <= 8 and kept[0] == 1 and {333, 777} <= set(kept)
    others = sorted(set(kept) - {1, 333, 777})
    assert others[0] < 500 < others[-1], "spread over the whole life"


@given(st.lists(st.floats(0.001, 1.0), max_size=200), st.integers(0, 64))
def test_never_more_steps_than_the_limit(lengths: list[float], limit: int) -> None:
    journal = Journal(steps_per_request=limit)
    journal.start(INSTANCE, start(A), BEGIN)
    for number, took in enumerate(lengths, 1):
        journal.step(WORKER, step(number, number, number + took, (A,)), at(number))
    kept = numbers(taken(journal))
    assert len(kept) == len(set(kept)) <= limit
    assert kept == sorted(kept)
    assert bool(kept) == bool(lengths and limit)


def test_a_request_that_never_ends_costs_no_more_than_one_that_does(journal: Journal) -> None:
    for number in range(5000):
        journal.step(WORKER, step(number, number, number + 0.5, (A,)), at(number))
        lost = records.Preemption(at=at(number), cause="kv_full", victim=A)
        journal.preempted(INSTANCE, lost, at(number))
        chunk = records.PrefillChunks(
            at=at(number), request_ids=[A], begin_ns=[at(number)], end_ns=[at(number + 1)], tokens=[10]
        )
        journal.prefill(WORKER, chunk, at(number))
    notes = taken(journal)
    assert len(numbers(notes)) <= 8
    assert len(notes.events) == module.MAX_EVENTS
    assert len(notes.chunks) == module.MAX_CHUNKS
    assert sum(chunk.tokens for chunk in notes.chunks) == 50_000, "those beyond are put together"


def test_too_many_open_requests_push_out_those_not_heard_of(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 2)
    journal.step(WORKER, step(1, 1, 2, (A,)), at(2))
    journal.start(INSTANCE, start("cmpl-c-0"), at(3))
    assert journal.take(INSTANCE, B) is None and journal.forgotten == 1
    assert numbers(taken(journal)) == [1]


def test_what_is_not_heard_of_for_long_is_forgotten(journal: Journal) -> None:
    journal.step(WORKER, step(1, 1, 2, (A,)), BEGIN + FORGET_NS - 1)
    journal.sweep(BEGIN + FORGET_NS)
    assert journal.take(INSTANCE, B) is None and journal.forgotten == 1
    assert journal.take(INSTANCE, A) is not None


def test_a_start_told_again_changes_nothing(journal: Journal) -> None:
    journal.step(WORKER, step(1, 1, 2, (A,)), at(2))
    journal.start(INSTANCE, start(A), at(3))
    assert numbers(taken(journal)) == [1]


def test_a_preemption_names_who_held_the_blocks(journal: Journal) -> None:
    told = records.Preemption(
        at=at(2), cause="kv_full", victim=A, lost_tokens=96, holders=[B, A], holder_blocks=[50.0, 20.0]
    )
    journal.preempted(INSTANCE, told, at(2))
    (note,) = taken(journal).events
    assert note.name == names.E_PREEMPTED and note.at_ns == at(2)
    assert dict(note.attributes) == {names.CAUSE: "kv_full", names.LOST_TOKENS: 96, names.HOLDERS: (B,)}
    assert taken(journal, B).events == []


def test_out_of_memory_names_the_batch(journal: Journal) -> None:
    told = records.OutOfMemory(at=at(2), requested=1 << 30, request_ids=[A, B], tokens=[512, 1])
    journal.out_of_memory(INSTANCE, told, at(2))
    (note,) = taken(journal, B).events
    assert dict(note.attributes) == {names.BYTES: 1 << 30, names.BATCH: (f"{A}: 512", f"{B}: 1")}


def allocation(size: int, code: int = 0) -> Allocation:
    return Allocation(at(1), at(2), 77, 77, "cuMemAlloc", "device", size, code, (), "exact", 7, ((A, 512),))


@pytest.mark.parametrize("size, code, noted", [(LARGE_BYTES, 0, 1), (1024, 2, 1), (LARGE_BYTES - 1, 0, 0)])
def test_large_and_failed_allocations_are_noted(journal: Journal, size: int, code: int, noted: int) -> None:
    journal.allocated([INSTANCE], allocation(size, code), at(2))
    events = taken(journal).events
    assert len(events) == noted
    if events:
        told = dict(events[0].attributes)
        assert (told[names.BYTES], told[names.CODE], told[names.LINKED]) == (size, code, "exact")
    assert taken(journal, B).events == []


def test_an_allocation_of_another_server_is_not_noted(journal: Journal) -> None:
    journal.allocated(["server-b"], allocation(LARGE_BYTES), at(2))
    assert taken(journal).events == []


def experts(*layers: list[int], tokens: int = 1000) -> records.ExpertSums:
    counts = b"".join(array("I", layer).tobytes() for layer in layers)
    return records.ExpertSums(first=3, counts=counts, counted_tokens=tokens, seen_tokens=tokens)


def test_uneven_experts_are_told_to_those_who_ran_then(journal: Journal) -> None:
    even, hot = [10] * 8, [80, 0, 0, 0, 0, 0, 0, 0]
    journal.experts(WORKER, experts(even, hot), at(10))
    found = journal.worst_experts(INSTANCE, "0", at(9.5), at(20))
    assert found is not None and (found.ratio, found.layer) == (8.0, 4)
    assert journal.worst_experts(INSTANCE, "0", at(11), at(20)) is None
    assert journal.worst_experts("server-b", "0", at(9.5), at(20)) is None


def test_even_experts_and_few_tokens_are_no_event(journal: Journal) -> None:
    journal.experts(WORKER, experts([10] * 8), at(10))
    journal.experts(WORKER, experts([8, 0, 0, 0, 0, 0, 0, 0], tokens=1), at(10))
    assert journal.worst_experts(INSTANCE, "0", at(0), at(20)) is None


def test_kernels_find_their_step(journal: Journal) -> None:
    journal.step(WORKER, step(1, 1, 2, (A,)), at(2))
    journal.step(WORKER, step(2, 2, 3, (A,)), at(3))
    told = records.StepKernels(
        at=at(3), step=2, names=["gemm"], streams=[7], begin_ns=[at(2)], duration_ns=[1000]
    )
    journal.kernels(WORKER, told, at(3))
    journal.kernels(
        WORKER,
        records.StepKernels(at=at(3), step=9, names=[], streams=[], begin_ns=[], duration_ns=[]),
        at(3),
    )
    notes = taken(journal)
    assert notes.steps is not None
    assert [seen.step.kernels for seen in notes.steps.kept()] == [None, told]


def test_a_profiled_step_is_kept_whatever_the_limit() -> None:
    journal = Journal(steps_per_request=1)
    journal.start(INSTANCE, start(A, TRACE), BEGIN)
    for number in (1, 2):
        journal.step(WORKER, step(number, number, number + 1, (A,)), at(number))
    told = records.StepKernels(at=at(3), step=2, names=["k"], streams=[7], begin_ns=[at(2)], duration_ns=[1])
    journal.kernels(WORKER, told, at(3))
    assert numbers(taken(journal)) == [1, 2]


def test_steps_of_nobody_are_none() -> None:
    assert Steps().kept() == []
