"""Tenants of requests, and sums per tenant that wait for the agent: added to on the engine's threads, drained
by the link."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from gpuglass_vllm import records

MAX_TENANTS = 1000
"""Tenants with sums of their own between two drains; later ones are summed as `OTHER`."""
OTHER = "other"
MAX_OPEN = 16384
"""Open requests whose tenants are known by name."""


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


class OpenTenants:
    """The tenant of each open request, for who has to know it at once. Used by one thread."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {}
        self._open: dict[str, int] = {}
        self._all_known = True

    def begin(self, request_id: str, tenant: str) -> None:
        """A request is seen for the first time (or again)."""
        if request_id in self._of:
            return
        if len(self._of) >= MAX_OPEN:
            self._all_known = False
            return
        self._of[request_id] = tenant
        self._open[tenant] = self._open.get(tenant, 0) + 1

    def end(self, request_id: str) -> None:
        """A request has ended; unknown ones are passed over."""
        tenant = self._of.pop(request_id, None)
        if tenant is None:
            return
        left = self._open.pop(tenant) - 1
        if left:
            self._open[tenant] = left
        if not self._of:
            self._all_known = True

    @property
    def single(self) -> str | None:
        """The tenant of all open requests; None if there are several, or one that is not known."""
        return next(iter(self._open)) if len(self._open) == 1 and self._all_known else None

    def of(self, request_ids: Iterable[str]) -> list[str]:
        """Tenant of each of some requests; `NO_TENANT` for unknown ones."""
        return [self._of.get(request_id, records.NO_TENANT) for request_id in request_ids]
