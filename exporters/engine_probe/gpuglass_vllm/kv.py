"""How many blocks of the KV pool a request holds, shared blocks divided among their holders.

Works on vLLM's block lists as they are: objects with `ref_cnt` and `is_null`. Counting must be cheap, because
it runs between two steps: long lists are not walked but halved, using that shared blocks are a request's
first ones (a block's holders hold all blocks before it as well) and that null blocks stand before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

_WALK = 48
"""Blocks up to which a list is walked rather than halved."""


class Block(Protocol):
    """vLLM's KVCacheBlock, as far as it is read."""

    block_id: int
    ref_cnt: int
    is_null: bool


Memo = dict[tuple[int, int, int], float]
"""Weights of shared beginnings, by first index, last index and last block's id; good for one count of all."""


def weight(blocks: Sequence[Block], memo: Memo) -> float:
    """Blocks held: 1 for an own block, 1 ÷ holders for a shared one, 0 for a null block."""
    size = len(blocks)
    if not size:
        return 0.0
    first = blocks[0]
    if first.ref_cnt == 1 and not first.is_null:
        return float(size)
    if size <= _WALK:
        return walked(blocks, 0, size)
    start = _first(blocks, 0, lambda block: not block.is_null)
    end = _first(blocks, start, lambda block: block.ref_cnt <= 1)
    if start == end:
        return float(size - end)
    key = (start, end, blocks[end - 1].block_id)
    shared = memo.get(key)
    if shared is None:
        shared = memo[key] = walked(blocks, start, end)
    return shared + (size - end)


def walked(blocks: Sequence[Block], start: int, end: int) -> float:
    """Weight of some blocks, each looked at."""
    total = 0.0
    for index in range(start, end):
        block = blocks[index]
        if not block.is_null:
            total += 1.0 / block.ref_cnt if block.ref_cnt > 1 else 1.0
    return total


def _first(blocks: Sequence[Block], low: int, holds: Any) -> int:
    """First index from `low` at which `holds` is true, if it stays true from there on."""
    high = len(blocks)
    while low < high:
        middle = (low + high) // 2
        if holds(blocks[middle]):
            high = middle
        else:
            low = middle + 1
    return low


class PoolReader:
    """Reads a scheduler's KV cache manager."""

    def __init__(self, manager: Any, kv_cache_config: Any, ranks: int) -> None:
        """`ranks` are the tensor × pipeline ranks that keep a part of each block.

        Raises AttributeError if the manager is not built as expected.
        """
        self.pool = manager.block_pool
        self._managers = list(manager.coordinator.single_type_managers)
        self._tables = [group.req_to_blocks for group in self._managers]
        self.blocks = int(self.pool.num_gpu_blocks) - 1
        sizes = {int(group.block_size) for group in self._managers}
        self.block_tokens = sizes.pop() if len(sizes) == 1 else 0
        self.block_bytes = _block_bytes(kv_cache_config) * ranks
        self.one_group = len(self._managers) == 1
        self.pool.get_num_free_blocks()

    def held(self, request_id: str, memo: Memo) -> float:
        """Blocks that a request holds, shared ones divided."""
        if self.one_group:  # most models
            blocks = self._tables[0].get(request_id)
            return weight(blocks, memo) if blocks else 0.0
        total = 0.0
        for table in self._tables:
            blocks = table.get(request_id)
            if blocks:
                total += weight(blocks, memo)
        return total

    def count(self, request_id: str) -> int:
        """Places in a request's block lists, shared or not."""
        if self.one_group:
            return len(self._tables[0].get(request_id, ()))
        return sum(len(table.get(request_id, ())) for table in self._tables)

    def lists(self, request_id: str) -> list[Sequence[Block]]:
        """A request's blocks, by group."""
        return [table.get(request_id, ()) for table in self._tables]

    def used(self) -> int:
        """Blocks that some request holds."""
        return self.blocks - int(self.pool.get_num_free_blocks())


def _block_bytes(config: Any) -> int:
    """Bytes of one block on one rank; 0 if the configuration does not say."""
    try:
        total = sum(int(tensor.size) for tensor in config.kv_cache_tensors)
        return total // int(config.num_blocks)
    except (AttributeError, TypeError, ZeroDivisionError):
        return 0
