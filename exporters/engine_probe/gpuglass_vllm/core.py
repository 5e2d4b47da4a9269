"""The engine core's side: who runs, who holds which part of the KV cache, who was pushed out, how requests
end.

Hooks stand around the scheduler's methods. Per step the engine's thread does little: it notes requests that
start, and looks at a few of the running ones, so that each is seen about four times a second. What is exact
(tokens, outcomes, preemptions) is noted when it happens; the integral of blocks over time is a trapezoid
through the moments at which a request was seen, with its start, preemptions and end among them.
"""

from __future__ import annotations

import logging
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from gpuglass_vllm import identity, kv, marks, records
from gpuglass_vllm.hooks import Hook, table, wrap
from gpuglass_vllm.link import Link, give_way
from gpuglass_vllm.tenants import TenantTable

logger = logging.getLogger("gpuglass_vllm")

SEE_EVERY_NS = 240_000_000
"""The pool is looked at so often; a round through the running requests starts as often, if they are few."""
_MANY = 16
"""Running requests above which a round starts half as often; above four times as many, a quarter as often."""
_SLICE = 4
"""Running requests looked at per step, or a part of them if they are many: no step shall be longer for it."""
_STEPS = 32
"""Steps that a round takes at most."""
MAX_OPEN = 20_000
"""Requests followed one by one; what is beyond still counts in the sums when it ends."""
_HOLDERS = 3
"""Holders that a preemption names."""
_SWEEP_NS = 5_000_000_000
"""How often free cached blocks are counted."""
_SWEEP_BLOCKS = 20_000
"""Blocks looked at per count; of larger pools, every n-th."""
_IDLE_NS = 1_000_000_000
"""How often the pool's state is told while nothing runs."""
_FREED = 8192
"""Freed cached blocks whose age is known."""

OUTCOMES = {
    "FINISHED_STOPPED": ("stop", ""),
    "FINISHED_REPETITION": ("stop", ""),
    "FINISHED_LENGTH_CAPPED": ("length", ""),
    "FINISHED_IGNORED": ("rejected", "validation"),
    "FINISHED_ABORTED": ("abort", ""),
    "FINISHED_ERROR": ("error", "engine"),
}


class Open:
    """A request in the scheduler."""

    __slots__ = (
        "arrival_ns",
        "blocks",
        "cached_tokens",
        "computed_tokens",
        "counted_output",
        "counted_prompt",
        "first_token_ns",
        "id",
        "kv_block_ns",
        "lost_tokens",
        "mark",
        "output_tokens",
        "peak_blocks",
        "preemptions",
        "request",
        "running",
        "scheduled_ns",
        "seen_ns",
    )

    def __init__(self, request: Any, arrival_ns: int) -> None:
        params = getattr(request, "sampling_params", None) or getattr(request, "pooling_params", None)
        self.request = request
        self.id = identity.short_id(request.request_id)
        self.mark = marks.get(params)
        self.arrival_ns = arrival_ns
        self.scheduled_ns = -1
        self.first_token_ns = -1
        self.seen_ns = 0
        self.running = False
        self.blocks = 0.0
        self.peak_blocks = 0.0
        self.kv_block_ns = 0.0
        self.computed_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.counted_prompt = False
        self.counted_output = 0
        self.lost_tokens = 0
        self.preemptions = 0


class CoreProbe:
    """What one scheduler lets itself be asked. Methods named `on_…` run on the engine's thread."""

    def __init__(self, scheduler: Any, vllm_config: Any, kv_cache_config: Any) -> None:
        self._config = vllm_config
        self._scheduler = scheduler
        self._open: dict[str, Open] = {}
        self._running: dict[str, Open] = {}
        self._changed: dict[str, Open] = {}
        """To be told to the agent."""
        self.awaiting: dict[str, Open] = {}
        """Scheduled, no token yet."""
        self._tenants = TenantTable()
        self._preemptions: dict[str, int] = {}
        self._evictions = [0] * (len(records.EVICT_SECONDS) + 1)
        self._eviction_seconds = 0.0
        self._freed: dict[int, int] = {}
        self._round: Iterator[None] | None = None
        self._next_round = 0
        self._next_pool = 0
        self.next_look = 0
        """When the pool or running requests are to be looked at; 0: in this step."""
        self._waste = -1
        """Unused places at the end of block lists, as of the last round; negative: cannot be told."""
        self._pool_state: records.PoolState | None = None
        self._pool_sent: records.PoolState | None = None
        self._cached = (0, 0)
        """When free cached blocks were counted last, and how many there were."""
        self.pool: kv.PoolReader | None = None
        hook = table.hook("core.kv")
        try:
            parallel = vllm_config.parallel_config
            ranks = int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)
            self.pool = kv.PoolReader(scheduler.kv_cache_manager, kv_cache_config, ranks)
            hook.activate()
        except (AttributeError, TypeError) as error:
            hook.unavailable(f"the KV cache manager is built otherwise: {error}")
        self._kv = hook
        self.link = Link("core", self)

    # On the engine's thread

    def on_add(self, request: Any) -> None:
        """A request enters the queue."""
        if request.request_id not in self._open and len(self._open) < MAX_OPEN:
            self._follow(request)

    def _follow(self, request: Any) -> Open:
        now = time.monotonic_ns()
        waited = max(0.0, time.time() - float(getattr(request, "arrival_time", 0.0) or time.time()))
        opened = Open(request, now - int(waited * 1e9))
        self._open[request.request_id] = self._changed[request.request_id] = opened
        return opened

    def on_schedule(self, output: Any) -> None:
        """A step was planned."""
        now = time.monotonic_ns()
        for new in output.scheduled_new_reqs:
            known = self._open.get(new.req_id)
            opened = known if known is not None else self._follow(self._scheduler.requests[new.req_id])
            opened.cached_tokens = int(new.num_computed_tokens)
            self._scheduled(opened, now)
        resumed = output.scheduled_cached_reqs.resumed_req_ids
        if resumed:
            cached = output.scheduled_cached_reqs
            for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
                back = self._open.get(request_id) if request_id in resumed else None
                if back is not None:
                    self._resumed(back, int(computed), now)
        if now >= self.next_look:
            self._look(now)

    def on_update(self) -> None:
        """A step's tokens are known: some requests may have waited for their first."""
        now = time.monotonic_ns()
        for request_id, opened in list(self.awaiting.items()):
            if len(opened.request.output_token_ids) > 0:
                opened.first_token_ns = now
                del self.awaiting[request_id]
                with self._tenants.lock:
                    self._count_prompt(opened, opened.request.num_prompt_tokens)

    def on_preempt(self, request: Any) -> None:
        """A running request is about to lose its blocks."""
        now = time.monotonic_ns()
        cause = "kv_full" if _called_by("schedule") else "cache_reset"
        opened = self._open.get(request.request_id)
        mark = opened.mark if opened is not None else marks.NONE
        with self._tenants.lock:
            self._tenants.of(mark.tenant).preemptions += 1
            self._preemptions[cause] = self._preemptions.get(cause, 0) + 1
        lost = int(request.num_computed_tokens)
        holders: list[tuple[float, str]] = []
        blocks = 0.0
        if opened is not None:
            if self._kv.on and self.pool is not None:
                holders = self._holders()
                self._last_look(opened, now)
                blocks = opened.blocks
            self._running.pop(request.request_id, None)
            self._changed[request.request_id] = opened
            opened.preemptions += 1
            opened.lost_tokens = lost
            opened.running = False
            opened.blocks = 0.0
        self.link.event(
            records.Preemption(
                at=now,
                cause=cause,
                victim=opened.id if opened is not None else identity.short_id(request.request_id),
                tenant=mark.tenant,
                victim_blocks=blocks,
                lost_tokens=lost,
                holders=[holder for _, holder in holders],
                holder_blocks=[held for held, _ in holders],
            )
        )

    def on_free(self, request: Any) -> None:
        """A request ends and is about to give its blocks back. Its status says how."""
        opened = self._open.pop(request.request_id, None)
        outcome, error_type = OUTCOMES.get(getattr(request.status, "name", ""), ("error", "engine"))
        now = time.monotonic_ns()
        if opened is None:
            opened = Open(request, now)
        self.awaiting.pop(request.request_id, None)
        self._running.pop(request.request_id, None)
        self._changed.pop(request.request_id, None)
        if self._kv.on and self.pool is not None:
            self._kv.guard(self._last_look, opened, now)
        opened.running = False
        output = len(request.output_token_ids)
        computed = int(request.num_computed_tokens)
        if output and opened.first_token_ns < 0:
            opened.first_token_ns = now
        with self._tenants.lock:
            if opened.scheduled_ns >= 0 or output:
                prompt = int(request.num_prompt_tokens)
                self._count_prompt(opened, prompt if output else min(computed, prompt))
            self._count_output(opened, output)
            if not opened.mark.counted:
                self._tenants.of(opened.mark.tenant).end(outcome, error_type)
        first, scheduled = opened.first_token_ns, opened.scheduled_ns
        self.link.event(
            records.RequestEnd(
                at=now,
                request_id=opened.id,
                outcome=outcome,
                error_type=error_type,
                tenant=opened.mark.tenant,
                arrival_ns=opened.arrival_ns,
                queue_ns=scheduled - opened.arrival_ns if scheduled >= 0 else -1,
                prefill_ns=first - scheduled if first >= 0 and scheduled >= 0 else -1,
                decode_ns=now - first if first >= 0 else -1,
                prompt_tokens=int(request.num_prompt_tokens),
                cached_tokens=opened.cached_tokens,
                output_tokens=output,
                preemptions=opened.preemptions,
                peak_blocks=opened.peak_blocks,
                kv_block_ns=opened.kv_block_ns,
            )
        )

    def on_evict(self, block_id: int) -> None:
        """A cached block is given to someone else."""
        freed = self._freed.pop(block_id, None)
        if freed is None:
            return
        seconds = (time.monotonic_ns() - freed) / 1e9
        with self._tenants.lock:
            self._evictions[bisect_left(records.EVICT_SECONDS, seconds)] += 1
            self._eviction_seconds += seconds

    def _scheduled(self, opened: Open, now: int) -> None:
        if opened.scheduled_ns < 0:
            opened.scheduled_ns = now
            self.awaiting[opened.request.request_id] = opened
            table.hook("core.tokens").wanted = True
        opened.running = True
        self._running[opened.request.request_id] = self._changed[opened.request.request_id] = opened
        opened.seen_ns = now
        if self._kv.on and self.pool is not None:
            opened.blocks = self.pool.held(opened.request.request_id, {})
            opened.peak_blocks = max(opened.peak_blocks, opened.blocks)

    def _resumed(self, opened: Open, computed: int, now: int) -> None:
        again = max(0, opened.lost_tokens - computed)
        opened.lost_tokens = 0
        with self._tenants.lock:
            self._tenants.of(opened.mark.tenant).recomputed_tokens += again
        self._scheduled(opened, now)

    def _look(self, now: int) -> None:
        """Look at the pool, or at some running requests."""
        if self._round is None and now >= self._next_round:
            many = len(self._running)
            self._next_round = now + SEE_EVERY_NS * (1 if many <= _MANY else 2 if many <= 4 * _MANY else 4)
            self._round = self._look_around()
        if self._round is not None and next(self._round, self) is self:
            self._round = None
        if now >= self._next_pool:
            self._next_pool = now + SEE_EVERY_NS
            self._note_pool()
        self.next_look = min(self._next_pool, self._next_round) if self._round is None else 0

    def _look_around(self) -> Iterator[None]:
        memo: kv.Memo = {}
        waste = 0
        running = list(self._running.values())
        width = max(_SLICE, -(-len(running) // _STEPS))
        for begin in range(0, len(running), width):
            now = time.monotonic_ns()
            with self._tenants.lock:
                for opened in running[begin : begin + width]:
                    if opened.running:
                        waste += self._look_at(opened, now, memo)
            if begin + width < len(running):
                yield
        pool = self.pool
        self._waste = waste if pool is not None and pool.one_group else -1

    def _look_at(self, opened: Open, now: int, memo: kv.Memo) -> int:
        """Bring a running request up to now; unused places in its blocks. The tenants' lock is held."""
        request, pool = opened.request, self.pool
        opened.computed_tokens = computed = int(request.num_computed_tokens)
        self._changed[request.request_id] = opened
        self._count_output(opened, len(request.output_token_ids))
        if pool is None or not self._kv.on:
            return 0
        self._see(opened, now, memo)
        return max(0, pool.count(request.request_id) * pool.block_tokens - computed) if pool.one_group else 0

    def _note_pool(self) -> None:
        scheduler = self._scheduler
        pool = self.pool
        if pool is None:
            return
        self._pool_state = records.PoolState(
            at=time.monotonic_ns(),
            used_blocks=pool.used(),
            cached_blocks=self._cached[1],
            waste_tokens=self._waste,
            running=len(scheduler.running),
            waiting=_waiting(scheduler),
        )

    def _see(self, opened: Open, now: int, memo: kv.Memo) -> None:
        """Bring a request's blocks up to now. The tenants' lock is held."""
        assert self.pool is not None
        blocks = self.pool.held(opened.request.request_id, memo)
        if opened.seen_ns:
            gain = (opened.blocks + blocks) / 2 * (now - opened.seen_ns)
            opened.kv_block_ns += gain
            self._tenants.of(opened.mark.tenant).kv_block_ns += gain
        opened.seen_ns = now
        opened.blocks = blocks
        if blocks > opened.peak_blocks:
            opened.peak_blocks = blocks

    def _last_look(self, opened: Open, now: int) -> None:
        if opened.running:
            with self._tenants.lock:
                self._see(opened, now, {})
        if table.hook("core.evictions").on:
            self._note_freed(opened.request.request_id, now)

    def _holders(self) -> list[tuple[float, str]]:
        """The requests that hold most blocks right now, most first."""
        assert self.pool is not None
        memo: kv.Memo = {}
        held = [(self.pool.held(request_id, memo), opened.id) for request_id, opened in self._running.items()]
        return sorted(held, reverse=True)[:_HOLDERS]

    def _note_freed(self, request_id: str, now: int) -> None:
        """Remember since when cached blocks are without a holder; of long lists, some."""
        assert self.pool is not None
        for blocks in self.pool.lists(request_id):
            for index in range(0, len(blocks), max(1, len(blocks) // 16)):
                block = blocks[index]
                if block.ref_cnt == 1 and getattr(block, "block_hash", None) is not None:
                    self._freed.pop(block.block_id, None)
                    if len(self._freed) >= _FREED:
                        del self._freed[next(iter(self._freed))]
                    self._freed[block.block_id] = now

    def _count_prompt(self, opened: Open, tokens: int) -> None:
        if not opened.counted_prompt:
            opened.counted_prompt = True
            sums = self._tenants.of(opened.mark.tenant)
            sums.prompt_tokens += int(tokens)
            sums.cached_tokens += min(opened.cached_tokens, int(tokens))

    def _count_output(self, opened: Open, tokens: int) -> None:
        opened.output_tokens = tokens
        if tokens > opened.counted_output:
            self._tenants.of(opened.mark.tenant).output_tokens += tokens - opened.counted_output
            opened.counted_output = tokens

    # On the link's thread

    def hello(self) -> dict[str, Any]:
        """Model, engine and the pool's geometry."""
        fields = identity.of(self._config)
        if self.pool is not None and self._kv.state == "active":
            fields["pool"] = records.Pool(
                blocks=self.pool.blocks,
                block_bytes=self.pool.block_bytes,
                block_tokens=self.pool.block_tokens,
            )
        return fields

    def states(self, everything: bool) -> Iterator[records.Record]:
        """The pool, and open requests that changed."""
        now = time.monotonic_ns()
        if self._kv.on and now - self._cached[0] > _SWEEP_NS:
            self._kv.guard(self._sweep, now)
        state = self._pool_state
        if not self._running and (state is None or state.running or now - state.at > _IDLE_NS):
            # No step comes that would say it.
            self._waste = min(self._waste, 0)
            self._kv.guard(self._note_pool)
            state = self._pool_state
        if state is not None and (everything or state is not self._pool_sent):
            self._pool_sent = state
            yield state
        if everything:
            self._changed.update(self._open.copy())
        for _ in range(len(self._changed)):
            try:
                _, opened = self._changed.popitem()
            except KeyError:
                return
            yield records.RequestProgress(
                at=opened.seen_ns or opened.arrival_ns,
                request_id=opened.id,
                tenant=opened.mark.tenant,
                running=opened.running,
                blocks=opened.blocks,
                peak_blocks=opened.peak_blocks,
                computed_tokens=opened.computed_tokens,
                output_tokens=opened.output_tokens,
                preemptions=opened.preemptions,
            )

    def sums(self) -> Iterator[records.Record]:
        """Tenants, preemptions and evictions."""
        with self._tenants.lock:
            preemptions, self._preemptions = self._preemptions, {}
            evictions, self._evictions = self._evictions, [0] * len(self._evictions)
            seconds, self._eviction_seconds = self._eviction_seconds, 0.0
        evicted = any(evictions)
        if preemptions or evicted:
            yield records.CoreSums(
                preemptions=preemptions,
                evictions=evictions if evicted else [],
                eviction_seconds=seconds,
            )
        yield from self._tenants.drain()

    def _sweep(self, now: int) -> None:
        """Count free blocks that still hold a prefix, giving way to the engine's thread in between."""
        assert self.pool is not None
        blocks = self.pool.pool.blocks
        stride = -(-len(blocks) // _SWEEP_BLOCKS)
        found = 0
        for begin in range(0, len(blocks), 512 * stride):
            for block in blocks[begin : begin + 512 * stride : stride]:
                if block.ref_cnt == 0 and not block.is_null and block.block_hash is not None:
                    found += 1
            give_way()
        self._cached = (now, min(found * stride, self.pool.blocks))


def _waiting(scheduler: Any) -> int:
    counts = getattr(scheduler, "get_request_counts", None)
    if counts is not None:
        return int(counts()[1])
    return len(scheduler.waiting)


# Hooks

_probes: dict[int, CoreProbe] = {}
"""By the id of their scheduler, which they keep alive until its `shutdown`."""


def after_fork() -> None:
    """A child made by fork has schedulers of its own."""
    _probes.clear()
    _pools.clear()


def install(scheduler_class: type) -> None:
    """Put the hooks around a scheduler class: vLLM's own or any other of the same interface."""
    life = table.hook("core.scheduler")
    if not wrap(scheduler_class, "__init__", life, after=_constructed):
        return
    life.activate()
    wrap(scheduler_class, "shutdown", life, after=_shut_down)

    def request(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _one(args, kwargs, "request")

    _around(scheduler_class, "core.requests", "add_request", lambda probe, a, k: probe.on_add(request(a, k)))
    _around(
        scheduler_class,
        "core.preemptions",
        "_preempt_request",
        lambda probe, a, k: probe.on_preempt(request(a, k)),
    )
    _around(
        scheduler_class, "core.outcomes", "_free_request", lambda probe, a, k: probe.on_free(request(a, k))
    )
    # Once per step: as few calls as can be.
    steps = table.hook("core.steps")
    if wrap(scheduler_class, "schedule", steps, after=_planned):
        steps.activate()
    tokens = table.hook("core.tokens")
    if wrap(scheduler_class, "update_from_output", tokens, after=_updated):
        tokens.activate()


def _planned(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, token: Any) -> None:
    # Most steps only go on with what runs, and there is nothing to note.
    probe = _probes.get(id(scheduler))
    if probe is not None and (
        result.scheduled_new_reqs
        or time.monotonic_ns() >= probe.next_look
        or result.scheduled_cached_reqs.resumed_req_ids
    ):
        probe.on_schedule(result)


def _updated(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, token: Any) -> None:
    probe = _probes.get(id(scheduler))
    if probe is not None:
        probe.on_update()
    table.hook("core.tokens").wanted = any(other.awaiting for other in _probes.values())


def _called_by(name: str) -> bool:
    """Whether a function of that name is among the callers nearby. Slow, for rare events."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(16):
        if frame is None:
            break
        if frame.f_code.co_name == name:
            return True
        frame = frame.f_back
    return False


def _one(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The first argument, by whatever way it was given."""
    return args[0] if args else kwargs[name]


def _around(owner: type, name: str, method: str, before: Callable[..., None]) -> None:
    hook = table.hook(name)

    def first(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        probe = _probes.get(id(scheduler))
        if probe is not None:
            before(probe, args, kwargs)

    if wrap(owner, method, hook, before=first):
        hook.activate()


def _constructed(
    scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, token: Any
) -> None:
    if id(scheduler) in _probes:
        return
    config = kwargs.get("vllm_config", args[0] if args else None)
    kv_config = kwargs.get("kv_cache_config", args[1] if len(args) > 1 else None)
    probe = CoreProbe(scheduler, config, kv_config)
    _probes[id(scheduler)] = probe
    _watch_evictions(probe)
    probe.link.start()


def _shut_down(
    scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, token: Any
) -> None:
    probe = _probes.pop(id(scheduler), None)
    if probe is not None:
        probe.link.stop()
        if probe.pool is not None:
            _pools.pop(id(probe.pool.pool), None)


_pools: dict[int, CoreProbe] = {}


def _watch_evictions(probe: CoreProbe) -> None:
    hook: Hook = table.hook("core.evictions")
    if probe.pool is None:
        hook.unavailable("the KV cache manager is built otherwise")
        return
    pool = probe.pool.pool
    if not getattr(pool, "enable_caching", False):
        hook.unavailable("prefix caching is off")
        return

    _pools[id(pool)] = probe

    def evicted(this: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, token: Any) -> None:
        if result and id(this) in _pools:
            _pools[id(this)].on_evict(_one(args, kwargs, "block").block_id)

    if wrap(type(pool), "_maybe_evict_cached_block", hook, after=evicted):
        hook.activate()
