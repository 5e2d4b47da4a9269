"""Turns the ledger into the batches that a scrape sees. Reads only; call with the ledger's lock held.

The fast tier is what an operator watches while it happens: the KV pool, who holds it, who is in flight. The
slow tier is all else. What is unknown is left out: a core that has gone takes its gauges along, and counters
stay until the account is forgotten.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator

from exporters.vllm.account import Account
from exporters.vllm.engines import Engine, Server
from exporters.vllm.experts import HOT_TENANTS, imbalance, jain
from exporters.vllm.ledger import Ledger
from exporters.vllm.memory import parts
from exporters.vllm.requests import OpenRequest
from exporters.vllm.steps import WorkerTotals, fragmentation
from gpuglass.families import engine as families
from gpuglass.family import Batch, Family

HOLDERS = 5
"""Requests with the largest shares of the pool that have series."""
STEPS, PREEMPTIONS = "core.steps", "core.preemptions"
PADDING, OUT_OF_MEMORY = "worker.padding", "worker.out_of_memory"
"""Hooks of gpuglass_vllm without which a count of zero would be none. Other senders need not name them."""


def fast_batch(ledger: Ledger, previous: Batch) -> Batch:
    """Samples of the fast tier."""
    batch = Batch(previous=previous.samples)
    live = dict(_live_engines(ledger))
    for account in ledger.accounts.values():
        scope = batch.scoped(*account.labels)
        place = live.get(id(account))
        if account.had_core:
            scope.add(families.UP, int(place is not None and bool(place[1].cores)))
        for tenant, hogging in account.hogging.items():
            scope.add(families.KV_HOG_SECONDS, _seconds(hogging.ns), tenant, exemplar=hogging.exemplar)
        if place is not None:
            server, engine = place
            if engine.cores:
                _pool(scope, engine)
            _in_flight(scope, ledger, server, engine)
    return batch


def slow_batch(ledger: Ledger, previous: Batch, now_ns: int) -> Batch:
    """Samples of the slow tier."""
    batch = Batch(previous=previous.samples)
    live = dict(_live_engines(ledger))
    batch.add(families.TENANTS, len(ledger.tenants))
    for tenant, quota in ledger.settings.quotas.items():
        if quota.gpu_seconds_per_day is not None:
            batch.add(families.TENANT_GPU_QUOTA, quota.gpu_seconds_per_day, tenant)
        if quota.kv_share is not None:
            batch.add(families.TENANT_KV_QUOTA, quota.kv_share, tenant)
    for account in ledger.accounts.values():
        scope = batch.scoped(*account.labels)
        place = live.get(id(account))
        if place is not None:
            server, engine = place
            speaker = engine.speaker
            if speaker is not None:
                scope.add(families.INFO, 1, speaker.hello.engine_name, speaker.hello.engine_version)
            tracked = sum(request.engine is engine for request in server.requests.values())
            scope.add(families.TRACKED, tracked)
        _requests(scope, account)
        _tenants(scope, account)
        _experts(scope, ledger, account)
        for rank, worker in sorted(account.workers.items()):
            _worker(scope.scoped(str(rank), worker.gpu_uuid), worker, now_ns)
    return batch


def _live_engines(ledger: Ledger) -> Iterator[tuple[int, tuple[Server, Engine]]]:
    """Server and engine by identity of the account."""
    for server in ledger.servers.values():
        for engine in server.engines.values():
            if engine.is_live:
                yield id(engine.account), (server, engine)


def _seconds(ns: float) -> float:
    return round(ns / 1e9, 6)


def _share(value: float) -> float:
    """Rounded down, so that rounded shares never add up to more than the whole."""
    return math.floor(value * 1e6) / 1e6


# KV cache


def _pool(scope: Batch, engine: Engine) -> None:
    pool, state = engine.pool, engine.state
    block_bytes = engine.block_bytes
    if pool is not None and pool.blocks > 0:
        scope.add(families.KV_POOL_BLOCKS, pool.blocks)
        if block_bytes > 0:
            scope.add(families.KV_POOL_BYTES, pool.blocks * block_bytes)
    if state is None:
        return
    scope.add(families.REQUESTS, state.running, "running")
    scope.add(families.REQUESTS, state.waiting, "waiting")
    scope.add(families.KV_USED_BLOCKS, state.used_blocks)
    scope.add(families.KV_CACHED_BLOCKS, state.cached_blocks)
    if state.waste_tokens >= 0:  # below 0: unknown to the sender
        scope.add(families.KV_WASTE_TOKENS, state.waste_tokens)
    if pool is None or block_bytes <= 0:
        return
    scope.add(families.KV_USED_BYTES, state.used_blocks * block_bytes)
    scope.add(families.KV_CACHED_BYTES, state.cached_blocks * block_bytes)
    if pool.block_tokens > 0 and state.waste_tokens >= 0:
        scope.add(families.KV_WASTE_BYTES, state.waste_tokens * block_bytes // pool.block_tokens)


def _in_flight(scope: Batch, ledger: Ledger, server: Server, engine: Engine) -> None:
    """Who runs, who waits, and who holds which share of the pool."""
    account, label = engine.account, ledger.tenants.label
    has_core = bool(engine.cores)
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    held: defaultdict[str, float] = defaultdict(float)
    holders: list[OpenRequest] = []
    for request in server.requests.values():
        if request.engine is not engine:
            continue
        tenant = label(request.tenant)
        if request.in_flight and request.is_known:
            state = "unknown" if not has_core else "running" if request.running else "waiting"
            counts[tenant, state] += 1
        if request.blocks > 0:
            held[tenant] += request.blocks
            holders.append(request)
    if has_core:
        for tenant in account.tenants:
            counts[tenant, "running"] += 0
            counts[tenant, "waiting"] += 0
            held[tenant] += 0.0
    for (tenant, state), count in counts.items():
        scope.add(families.TENANT_IN_FLIGHT, count, tenant, state)
    pool = engine.pool
    if not has_core or pool is None or pool.blocks <= 0:
        return
    # What was told at different moments may add up to more than there is; shares are of one whole.
    whole = max(float(pool.blocks), sum(held.values()))
    for tenant, blocks in held.items():
        scope.add(families.TENANT_KV_SHARE, _share(blocks / whole), tenant)
    largest = heapq.nlargest(HOLDERS, holders, key=lambda request: (request.blocks, request.request_id))
    for place, request in enumerate(largest, 1):
        share = _share(request.blocks / whole)
        scope.add(families.KV_HOLDER, share, str(place), label(request.tenant))


# Requests and tenants


def _requests(scope: Batch, account: Account) -> None:
    for family, by_kind in account.requests.items():
        for kind, observed in by_kind.items():
            labels = (kind.outcome, kind.error_type, "true" if kind.preempted else "false")
            scope.add_histogram(family, observed.published(), *labels)
    for reason, count in account.untracked.items():
        scope.add(families.UNTRACKED, count, reason)
    for (reason, tenant), wasted in account.wasted.items():
        scope.add(families.WASTED, _seconds(wasted.ns), reason, tenant, exemplar=wasted.exemplar)
    if not account.had_core:
        return
    if account.peaks.count:
        scope.add_histogram(families.KV_PEAK, account.peaks.published())
    if account.evictions.count:
        scope.add_histogram(families.KV_EVICT, account.evictions.published())
    for cause, count in account.preemptions.items():
        if not count and PREEMPTIONS in account.lacking:
            continue
        found = account.preemption_exemplars.get(cause) if count else None
        scope.add(families.PREEMPTIONS, count, cause, exemplar=found)


def _tenants(scope: Batch, account: Account) -> None:
    is_timed = any(worker.clocks for worker in account.workers.values())
    counts_tokens = account.had_core and STEPS not in account.lacking
    counts_preemptions = account.had_core and PREEMPTIONS not in account.lacking
    for tenant, totals in account.tenants.items():
        if is_timed or totals.gpu_ns > 0:
            scope.add(families.TENANT_GPU, _seconds(totals.gpu_ns), tenant)
        if totals.kv_byte_ns is not None:
            scope.add(families.TENANT_KV, round(totals.kv_byte_ns / 1e9, 3), tenant)
        tokens = {
            "prompt": totals.prompt_tokens,
            "cached": totals.cached_tokens,
            "output": totals.output_tokens,
        }
        for kind, count in tokens.items():
            if counts_tokens or count:
                scope.add(families.TENANT_TOKENS, count, tenant, kind)
        if counts_preemptions or totals.preemptions:
            scope.add(families.TENANT_TOKENS, totals.recomputed_tokens, tenant, "recomputed")
            scope.add(families.TENANT_PREEMPTIONS, totals.preemptions, tenant)
        for (outcome, error_type), count in totals.requests.items():
            scope.add(families.TENANT_REQUESTS, count, tenant, outcome, error_type)


# Experts


def _experts(scope: Batch, ledger: Ledger, account: Account) -> None:
    load = account.experts
    for number, layer in load.layers.items():
        scope.add(families.EXPERT_SELECTIONS, round(layer.total), str(number), layer.counting)
        for expert, total in enumerate(layer.matrix if layer.matrix is not None else ()):
            labels = (str(number), str(expert), layer.counting)
            scope.add(families.EXPERT_MATRIX, round(total), *labels)
    scope.add(families.EXPERT_COUNTED, round(load.counted_share(), 4))
    for number, layer in load.in_window():
        window, name = layer.window, str(number)
        most = max(window)
        scope.add(families.EXPERT_IMBALANCE, round(imbalance(window), 4), name)
        scope.add(families.EXPERT_JAIN, round(jain(window), 4), name)
        scope.add(families.EXPERT_HOTTEST, window.index(most), name)
        scope.add(families.EXPERT_HOTTEST_SHARE, round(most / sum(window), 4), name)
    loads = load.loads_of_ranks()
    for rank, choices in enumerate(loads or ()):
        scope.add(families.EXPERT_RANK, round(choices / sum(loads or ()), 4), str(rank))
    for number, (_, by_tenant) in load.hot.items():
        shares: defaultdict[str, int] = defaultdict(int)
        for tenant, choices in by_tenant:
            shares[ledger.tenants.label(tenant)] += choices
        whole = sum(shares.values())
        for tenant in heapq.nlargest(HOT_TENANTS, shares, key=lambda name: (shares[name], name)):
            if whole:
                share = round(shares[tenant] / whole, 4)
                scope.add(families.EXPERT_TENANT, share, str(number), tenant)


# Workers


def _worker(scope: Batch, worker: WorkerTotals, now_ns: int) -> None:
    for clock, totals in worker.clocks.items():
        for part, ns in totals.parts().items():
            if part == "padding" and not ns and PADDING in worker.lacking:
                continue
            scope.add(families.GPU_SECONDS_BY_PART, _seconds(ns), clock, part)
        scope.add(families.IDLE, _seconds(totals.idle_ns), clock)
        if clock == "cuda":
            scope.add(families.HOST_FED, _seconds(totals.host_fed_ns))
        scope.add_histogram(families.STEP, totals.seconds.published(), clock)
    if worker.clocks:
        scope.add_histogram(families.BATCH, worker.batches.published())
        scope.add(families.STEP_TOKENS, worker.prefill_tokens, "prefill")
        scope.add(families.STEP_TOKENS, worker.decode_tokens, "decode")
        if worker.padded_tokens or PADDING not in worker.lacking:
            scope.add(families.STEP_TOKENS, worker.padded_tokens, "padding")
    if worker.out_of_memory or (worker.clocks and OUT_OF_MEMORY not in worker.lacking):
        scope.add(families.OUT_OF_MEMORY, worker.out_of_memory, exemplar=worker.out_of_memory_exemplar)
    if worker.flops > 0:
        scope.add(families.FLOPS, worker.flops)
        scope.add(families.FLOPS_RATIO, round(worker.flops_ratio(now_ns), 4))
    _allocator(scope, worker)
    _memory(scope, worker)


_ALLOCATOR: tuple[tuple[Family, str], ...] = (
    (families.ALLOCATOR_ALLOCATED, "allocated"),
    (families.ALLOCATOR_ACTIVE, "active"),
    (families.ALLOCATOR_RESERVED, "reserved"),
    (families.ALLOCATOR_INACTIVE_SPLIT, "inactive_split"),
)


def _allocator(scope: Batch, worker: WorkerTotals) -> None:
    state = worker.allocator
    if state is None:
        return
    scope.add(families.ALLOCATOR_RETRIES, worker.retries)
    scope.add(families.ALLOCATOR_OOMS, worker.ooms)
    if worker.sender is None:
        return
    for family, name in _ALLOCATOR:
        scope.add(family, getattr(state, name))
    scope.add(families.FRAGMENTATION, round(fragmentation(state), 4))


def _memory(scope: Batch, worker: WorkerTotals) -> None:
    state = worker.memory
    if state is None or worker.sender is None:
        return
    for part, size in parts(state, worker.allocator).items():
        scope.add(families.MEMORY, size, part)
    if state.activation_peak >= 0:
        scope.add(families.ACTIVATION_PEAK, state.activation_peak)
