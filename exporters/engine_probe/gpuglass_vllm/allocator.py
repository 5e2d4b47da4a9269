"""The caching allocator's statistics and what an out-of-memory error says, without walking its segments."""

from __future__ import annotations

import re
from typing import Any

from gpuglass_vllm.records import AllocatorState, OutOfMemory

MAX_BATCH = 16
"""Requests of the batch that an `OutOfMemory` names."""

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_REQUESTED = re.compile(r"Tried to allocate (\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB|TiB)")


def state(nested: dict[str, Any], at: int) -> AllocatorState:
    """From `torch.cuda.memory_stats_as_nested_dict`, which is one call into the allocator.

    Raises KeyError if the allocator does not keep these statistics.
    """

    def current(name: str) -> int:
        return int(nested[name]["all"]["current"])

    return AllocatorState(
        at=at,
        allocated=current("allocated_bytes"),
        active=current("active_bytes"),
        reserved=current("reserved_bytes"),
        inactive_split=current("inactive_split_bytes"),
        retries=int(nested.get("num_alloc_retries", 0)),
        ooms=int(nested.get("num_ooms", 0)),
    )


def out_of_memory(error: BaseException, tokens_of: dict[str, int], at: int) -> OutOfMemory:
    """The batch that ran when an allocation failed, most scheduled tokens first."""
    found = _REQUESTED.search(str(error)[:2000])
    requested = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    largest = sorted(tokens_of.items(), key=lambda item: item[1], reverse=True)[:MAX_BATCH]
    return OutOfMemory(
        at=at,
        requested=requested,
        request_ids=[request_id for request_id, _ in largest],
        tokens=[tokens for _, tokens in largest],
    )
