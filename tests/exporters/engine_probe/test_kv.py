"""Blocks that a request holds, shared ones divided."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuglass_vllm import kv


@dataclass
class Block:
    block_id: int
    ref_cnt: int = 1
    is_null: bool = False


NULL = Block(0, 10_000, True)


def own(count: int, first: int = 1) -> list[Block]:
    return [Block(first + n) for n in range(count)]


@pytest.mark.parametrize(
    ("blocks", "weight"),
    [
        ([], 0.0),
        (own(5), 5.0),
        ([Block(1, 2), Block(2, 4), Block(3)], 1.75),
        ([NULL, NULL, Block(3)], 1.0),
        ([NULL], 0.0),
    ],
)
def test_weight(blocks: list[Block], weight: float) -> None:
    assert kv.weight(blocks, {}) == weight


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_holders_add_up_to_the_blocks_in_use(data: st.DataObject) -> None:
    """Requests that share beginnings of several lengths: all weights are the blocks held by anyone."""
    serial = 0
    prefixes: list[list[Block]] = [[]]
    for _ in range(data.draw(st.integers(1, 4))):
        parent = data.draw(st.sampled_from(prefixes))
        fresh = [Block(serial + n + 1, 0) for n in range(data.draw(st.integers(0, 120)))]
        serial += len(fresh)
        prefixes.append(parent + fresh)
    requests = []
    for _ in range(data.draw(st.integers(1, 8))):
        tail = [Block(serial + n + 1, 0) for n in range(data.draw(st.integers(0, 60)))]
        serial += len(tail)
        requests.append(data.draw(st.sampled_from(prefixes)) + tail)
    used = {block.block_id: block for request in requests for block in request}
    for block in used.values():
        block.ref_cnt = sum(block in request for request in requests)
    memo: kv.Memo = {}
    weights = [kv.weight(request, memo) for request in requests]
    assert sum(weights) == pytest.approx(len(used))
    for request, weight in zip(requests, weights, strict=True):
        assert weight == pytest.approx(kv.walked(request, 0, len(request)))


@given(nulls=st.integers(0, 200), shared=st.integers(0, 100), tail=st.integers(0, 100))
def test_null_blocks_of_a_sliding_window_count_nothing(nulls: int, shared: int, tail: int) -> None:
    blocks = [NULL] * nulls + [Block(n + 1, 2) for n in range(shared)] + own(tail, 1000)
    assert kv.weight(blocks, {}) == pytest.approx(shared / 2 + tail)


def test_a_long_list_is_not_walked() -> None:
    """What is looked at grows with the logarithm of a long request, not with its length."""
    looks = 0

    class Counting(list[Block]):
        def __getitem__(self, index: object) -> Block:  # type: ignore[override]
            nonlocal looks
            looks += 1
            return super().__getitem__(index)  # type: ignore[index]

    blocks = Counting([Block(1, 2), *own(65_535, 2)])
    assert kv.weight(blocks, {}) == 65_535.5
    assert looks < 60
