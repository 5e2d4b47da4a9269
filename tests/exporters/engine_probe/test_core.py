"""The core's side on a small scheduler with vLLM's interface: what is summed is what happened."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gpuglass_vllm import core, hooks, link, marks, records, settings

BLOCK = 16
BLOCKS = 40


@dataclass
class Block:
    block_id: int
    ref_cnt: int = 1
    is_null: bool = False
    block_hash: int | None = None


@dataclass
class Request:
    request_id: str
    num_prompt_tokens: int
    sampling_params: Any
    arrival_time: float = field(default_factory=time.time)
    num_computed_tokens: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    status: Any = None


class Pool:
    def __init__(self) -> None:
        self.num_gpu_blocks = BLOCKS + 1
        self.blocks = [Block(number, 0) for number in range(BLOCKS + 1)]
        self.free = list(self.blocks[1:])
        self.enable_caching = True

    def get_num_free_blocks(self) -> int:
        return len(self.free)

    def _maybe_evict_cached_block(self, block: Block) -> bool:
        evicted = block.block_hash is not None
        block.block_hash = None
        return evicted


class Scheduler:
    """Plans like vLLM's: running requests first, the last of them is pushed out when the pool is full."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self.pool = Pool()
        self.table: dict[str, list[Block]] = {}
        self.kv_cache_manager = SimpleNamespace(
            block_pool=self.pool,
            coordinator=SimpleNamespace(
                single_type_managers=[SimpleNamespace(req_to_blocks=self.table, block_size=BLOCK)]
            ),
        )
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.seen: set[str] = set()

    def add_request(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def _take(self, request: Request, tokens: int) -> bool:
        held = self.table.setdefault(request.request_id, [])
        while len(held) * BLOCK < tokens:
            if not self.pool.free:
                return False
            block = self.pool.free.pop()
            self.pool._maybe_evict_cached_block(block)
            block.ref_cnt = 1
            held.append(block)
        return True

    def _give_back(self, request: Request) -> None:
        for block in self.table.pop(request.request_id, []):
            block.ref_cnt = 0
            block.block_hash = 1
            self.pool.free.insert(0, block)

    def _preempt_request(self, request: Request, timestamp: float) -> None:
        self._give_back(request)
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)

    def schedule(self) -> Any:
        new, resumed, cached, scheduled = [], set(), [], {}
        for request in list(self.running):
            total = request.num_prompt_tokens + len(request.output_token_ids)
            while request in self.running and not self._take(request, total):
                self._preempt_request(self.running.pop(), 0.0)
            if request in self.running:
                cached.append((request.request_id, request.num_computed_tokens))
                scheduled[request.request_id] = max(1, total - request.num_computed_tokens)
                request.num_computed_tokens = total
        while self.waiting:
            request = self.waiting[0]
            total = request.num_prompt_tokens + len(request.output_token_ids)
            if not self._take(request, total):
                self._give_back(request)
                break
            self.running.append(self.waiting.pop(0))
            if request.request_id in self.seen:
                resumed.add(request.request_id)
                cached.append((request.request_id, 0))
            else:
                self.seen.add(request.request_id)
                new.append(SimpleNamespace(req_id=request.request_id, num_computed_tokens=0))
            scheduled[request.request_id] = total
            request.num_computed_tokens = total
        return SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[name for name, _ in cached],
                num_computed_tokens=[computed for _, computed in cached],
                resumed_req_ids=resumed,
            ),
            num_scheduled_tokens=scheduled,
        )

    def update_from_output(self, output: Any) -> None:
        for name in output.num_scheduled_tokens:
            if name in self.requests:
                self.requests[name].output_token_ids.append(1)

    def _free_request(self, request: Request) -> None:
        self._give_back(request)
        del self.requests[request.request_id]

    def finish(self, request: Request, status: str) -> None:
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        request.status = SimpleNamespace(name=status)
        self._free_request(request)

    def shutdown(self) -> None:
        pass


CONFIG = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1))
KV_CONFIG = SimpleNamespace(kv_cache_tensors=[SimpleNamespace(size=41 * 1000)], num_blocks=41)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(settings, "_current", settings.Settings(socket="/nowhere/agent.sock", instance="abc"))
    monkeypatch.setattr(hooks.table, "_hooks", {})
    monkeypatch.setattr(link.Link, "start", lambda self: None)
    monkeypatch.setattr(core, "SEE_EVERY_NS", 0)
    yield
    core.after_fork()


def engine() -> tuple[Scheduler, core.CoreProbe]:
    """A scheduler with hooks on a class of its own, and its probe."""
    hooked = type("Hooked", (Scheduler,), {})
    core.install(hooked)
    scheduler = hooked(CONFIG, KV_CONFIG)
    return scheduler, core._probes[id(scheduler)]


def request(name: str, prompt: int, tenant: str = "a", counted: bool = False) -> Request:
    params = SimpleNamespace(extra_args={marks.KEY: ["abc", tenant, counted]})
    return Request(name, prompt, params)


def events(probe: core.CoreProbe, kind: type) -> list[Any]:
    return [event for event in probe.link._events if isinstance(event, kind)]


def step(scheduler: Scheduler) -> None:
    scheduler.update_from_output(scheduler.schedule())


def totals(probe: core.CoreProbe) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for record in probe.sums():
        if isinstance(record, records.TenantSums):
            into = found.setdefault(record.tenant, Counter())
            for name in ("prompt_tokens", "output_tokens", "recomputed_tokens", "preemptions", "kv_block_ns"):
                into[name] += getattr(record, name)
            into.update(record.requests)
    return found


@pytest.mark.usefixtures("environment")
def test_a_request_from_queue_to_end() -> None:
    scheduler, probe = engine()
    asked = request("r1", 40)
    scheduler.add_request(asked)
    for _ in range(3):
        step(scheduler)
    progress = {r.request_id: r for r in probe.states(False) if isinstance(r, records.RequestProgress)}
    assert (progress["r1"].running, progress["r1"].blocks) == (True, 3.0)
    scheduler.finish(asked, "FINISHED_LENGTH_CAPPED")
    (end,) = events(probe, records.RequestEnd)
    assert (end.outcome, end.prompt_tokens, end.output_tokens, end.peak_blocks) == ("length", 40, 3, 3.0)
    assert end.queue_ns >= 0 and end.prefill_ns >= 0 and end.decode_ns >= 0
    assert totals(probe) == {
        "a": Counter(prompt_tokens=40, output_tokens=3, kv_block_ns=end.kv_block_ns, length=1)
    }
    assert totals(probe) == {}, "sums are handed out once"


@pytest.mark.usefixtures("environment")
def test_a_preemption_names_victim_and_holders() -> None:
    scheduler, probe = engine()
    hog, small = request("hog", 36 * BLOCK, "big"), request("small", 4 * BLOCK, "little")
    scheduler.add_request(hog)
    scheduler.add_request(small)
    step(scheduler)
    step(scheduler)
    (event,) = events(probe, records.Preemption)
    assert (event.cause, event.victim, event.tenant) == ("kv_full", "small", "little")
    assert event.holders[0] == "hog"
    assert event.holder_blocks[0] == 37.0 or event.holder_blocks[0] == 36.0
    assert event.lost_tokens == 4 * BLOCK
    scheduler.finish(hog, "FINISHED_ABORTED")
    step(scheduler)
    sums = totals(probe)
    assert sums["little"]["recomputed_tokens"] == 4 * BLOCK
    assert sums["little"]["preemptions"] == 1
    assert sums["big"]["preemptions"] == 0


@pytest.mark.usefixtures("environment")
def test_a_reset_is_not_called_a_full_pool() -> None:
    scheduler, probe = engine()
    scheduler.add_request(request("r1", 10))
    step(scheduler)
    scheduler._preempt_request(scheduler.running.pop(), 0.0)
    (event,) = events(probe, records.Preemption)
    assert event.cause == "cache_reset"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("FINISHED_STOPPED", "stop"),
        ("FINISHED_ABORTED", "abort"),
        ("FINISHED_ERROR", "error/engine"),
        ("FINISHED_SOMETHING_NEW", "error/engine"),
    ],
)
def test_outcomes_are_counted_unless_the_frontend_counts_them(status: str, outcome: str) -> None:
    scheduler, probe = engine()
    for name, counted in (("r1", False), ("r2", True)):
        asked = request(name, 10, counted=counted)
        scheduler.add_request(asked)
        scheduler.finish(asked, status)
    assert totals(probe) == {"a": Counter({outcome: 1})}
    assert len(events(probe, records.RequestEnd)) == 2


@pytest.mark.usefixtures("environment")
def test_the_pool_is_told_in_blocks_of_all_ranks() -> None:
    scheduler, probe = engine()
    scheduler.add_request(request("r1", 20))
    step(scheduler)
    step(scheduler)
    (pool,) = [record for record in probe.states(True) if isinstance(record, records.PoolState)]
    assert (pool.used_blocks, pool.running, pool.waiting) == (2, 1, 0)
    assert pool.waste_tokens == 2 * BLOCK - 21


@pytest.mark.usefixtures("environment")
def test_an_evicted_blocks_age_is_counted() -> None:
    scheduler, probe = engine()
    first = request("r1", BLOCKS * BLOCK)
    scheduler.add_request(first)
    step(scheduler)
    scheduler.finish(first, "FINISHED_STOPPED")
    scheduler.pool.free[0].block_hash = 1
    for block in scheduler.pool.blocks:
        probe._freed[block.block_id] = time.monotonic_ns() - 3_000_000_000
    scheduler.add_request(request("r2", BLOCK))
    step(scheduler)
    (sums,) = [record for record in probe.sums() if isinstance(record, records.CoreSums)]
    assert sum(sums.evictions) == 1
    assert sums.evictions[records.EVICT_SECONDS.index(5.0)] == 1
    assert sums.eviction_seconds == pytest.approx(3, abs=1)


@pytest.mark.usefixtures("environment")
def test_requests_beyond_the_bound_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "MAX_OPEN", 1)
    scheduler, probe = engine()
    asked = [request(f"r{number}", 10) for number in range(3)]
    for one in asked:
        scheduler.add_request(one)
    assert len(probe._open) == 1
    step(scheduler)
    for one in asked:
        scheduler.finish(one, "FINISHED_STOPPED")
    sums = totals(probe)["a"]
    assert (sums["stop"], sums["prompt_tokens"], sums["output_tokens"]) == (3, 30, 3)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    plan=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 20 * BLOCK), st.sampled_from(["a", "b", "c"])),
            st.tuples(st.just("step")),
            st.tuples(st.just("end"), st.integers(0, 20), st.sampled_from(sorted(core.OUTCOMES))),
        ),
        max_size=60,
    )
)
def test_whatever_happens_tenants_are_the_sum_of_their_requests(plan: list[tuple[Any, ...]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(settings, "_current", settings.Settings(socket="/nowhere", instance="abc"))
        monkeypatch.setattr(hooks.table, "_hooks", {})
        monkeypatch.setattr(link.Link, "start", lambda self: None)
        monkeypatch.setattr(core, "SEE_EVERY_NS", 0)
        scheduler, probe = engine()
        asked: list[Request] = []
        found: dict[str, Counter[str]] = {}

        def drain() -> None:
            for tenant, counts in totals(probe).items():
                found.setdefault(tenant, Counter()).update(counts)

        for number, action in enumerate(plan):
            if action[0] == "add":
                asked.append(request(f"r{number}", action[1], action[2]))
                scheduler.add_request(asked[-1])
            elif action[0] == "step":
                step(scheduler)
                held = sum(
                    record.blocks
                    for record in probe.states(True)
                    if isinstance(record, records.RequestProgress)
                )
                assert held <= BLOCKS
            elif asked:
                scheduler.finish(asked.pop(action[1] % len(asked)), action[2])
            if number % 7 == 0:
                drain()
        for one in list(asked):
            scheduler.finish(one, "FINISHED_ABORTED")
        drain()
        assert probe._open == probe._running == probe.awaiting == {}
        expected: dict[str, Counter[str]] = {}
        for end in events(probe, records.RequestEnd):
            into = expected.setdefault(end.tenant, Counter())
            into["output_tokens"] += end.output_tokens
            into["kv_block_ns"] += end.kv_block_ns
            into["preemptions"] += end.preemptions
            into[f"{end.outcome}/{end.error_type}".rstrip("/")] += 1
            assert 0 <= end.peak_blocks <= BLOCKS
        for tenant, counts in expected.items():
            for name, value in counts.items():
                assert found[tenant][name] == pytest.approx(value), (tenant, name)
        assert all(hook.errors == 0 for hook in hooks.table._hooks.values())
        core.after_fork()
