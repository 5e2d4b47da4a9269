"""Sums per tenant that wait for the agent: added to on the engine's threads, drained by the link."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from gpuglass_vllm import records

MAX_TENANTS = 1000
"""Tenants with sums of their own between two drains; later ones are summed as `OTHER`."""
OTHER = "other"


class Sums:
    """One tenant's increases; the fields are those of `records.TenantSums`."""

    __slots__ = (
        "cached_tokens",
        "gpu_ns",
        "kv_block_ns",
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
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.recomputed_tokens = 0
        self.preemptions = 0
        self.requests: dict[str, int] = {}

    def end(self, outcome: str, error_type: str) -> None:
        """Count a request that ended."""
        key = f"{outcome}/{error_type}" if error_type else outcome
        self.requests[key] = self.requests.get(key, 0) + 1

    def record(self, tenant: str) -> records.TenantSums:
        """As it is sent."""
        return records.TenantSums(tenant=tenant, **{name: getattr(self, name) for name in self.__slots__})


class TenantTable:
    """Sums of all tenants. Hold `lock` while adding; a drain takes the whole table at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._sums: dict[str, Sums] = {}

    def of(self, tenant: str) -> Sums:
        """The sums to add to; call and add under `lock`."""
        sums = self._sums.get(tenant)
        if sums is None:
            if len(self._sums) >= MAX_TENANTS:
                tenant = OTHER
            sums = self._sums.setdefault(tenant, Sums())
        return sums

    def drain(self) -> Iterator[records.TenantSums]:
        """All increases since the last drain."""
        with self.lock:
            taken, self._sums = self._sums, {}
        for tenant, sums in taken.items():
            yield sums.record(tenant)
