"""Tenants: which have series of their own, and what each has used.

Names come from outside. The first ones that come are kept for the life of the agent, all others are `other`,
so that no counter ever moves between a name and `other`.
"""

from __future__ import annotations

from collections.abc import Iterable

from gpuglass_vllm.records import NO_TENANT, UNVERIFIED, TenantSums

OTHER = "other"
"""Tenants beyond the limit, together."""
NONE = "none"
"""Requests of an engine whose probe is not told of tenants. A value, because a missing label would make a
sum over all tenants out of the series of a few."""
MAX_OUTCOMES = 32
"""Pairs of outcome and error type that a tenant can have; the record stream knows eleven."""


class TenantNames:
    """Gives the label value of a tenant's name."""

    __slots__ = ("_known", "_limit")

    def __init__(self, limit: int, first: Iterable[str] = ()) -> None:
        self._limit = limit
        self._known: dict[str, str] = {}
        self.admit_first(first)

    def admit_first(self, names: Iterable[str]) -> None:
        """Tenants that the configuration knows, whether they have come or not."""
        for name in names:
            self.label(name)

    def raise_limit(self, limit: int) -> None:
        """Take a new limit. A lower one admits nobody new; who has series keeps them."""
        self._limit = limit

    def label(self, name: str) -> str:
        """The value of label `tenant` for a tenant's name."""
        known = self._known.get(name)
        if known is not None:
            return known
        if name == NO_TENANT:
            return NONE
        if name in (UNVERIFIED, OTHER, NONE):
            return name
        if len(self._known) >= self._limit:
            return OTHER
        self._known[name] = name
        return name

    def __len__(self) -> int:
        """Tenants with series of their own; `other`, `none` and `unverified` are not counted."""
        return len(self._known)


class TenantTotals:
    """What a tenant used on one engine since the agent started."""

    __slots__ = (
        "cached_tokens",
        "gpu_ns",
        "kv_block_ns",
        "kv_byte_ns",
        "output_tokens",
        "preemptions",
        "prompt_tokens",
        "recompute_ns",
        "recomputed_tokens",
        "requests",
    )

    def __init__(self) -> None:
        self.gpu_ns = 0.0
        self.recompute_ns = 0.0
        self.kv_block_ns = 0.0
        """Not yet in `kv_byte_ns`, because the size of a block is not known."""
        self.kv_byte_ns: float | None = None
        """None until the size of a block is known."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.recomputed_tokens = 0
        self.preemptions = 0
        self.requests: dict[tuple[str, str], int] = {}
        """By outcome and error type."""

    def add(self, sums: TenantSums, block_bytes: int) -> None:
        """Take in one increase; `block_bytes` 0 means unknown."""
        self.gpu_ns += sums.gpu_ns
        self.recompute_ns += sums.recompute_ns
        self.kv_block_ns += sums.kv_block_ns
        self.weigh(block_bytes)
        self.prompt_tokens += sums.prompt_tokens
        self.cached_tokens += sums.cached_tokens
        self.output_tokens += sums.output_tokens
        self.recomputed_tokens += sums.recomputed_tokens
        self.preemptions += sums.preemptions
        for key, count in sums.requests.items():
            outcome, _, error_type = key.partition("/")
            self.ended(outcome, error_type, count)

    def weigh(self, block_bytes: int) -> None:
        """Turn blocks into bytes as soon as a block's size is known."""
        if block_bytes > 0:
            self.kv_byte_ns = (self.kv_byte_ns or 0.0) + self.kv_block_ns * block_bytes
            self.kv_block_ns = 0.0

    def ended(self, outcome: str, error_type: str, count: int = 1) -> None:
        """Requests of this tenant that ended."""
        key = (outcome, error_type)
        if key not in self.requests and len(self.requests) >= MAX_OUTCOMES:
            key = ("error", "")
        self.requests[key] = self.requests.get(key, 0) + count
