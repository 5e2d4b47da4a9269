"""What tenants used and what steps cost: sums are taken in exactly, parts add up to the whole."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.vllm.ledger import LedgerSettings
from exporters.vllm.sink import GpuClaim, Refusal, Refused
from exporters.vllm.tenants import TenantNames
from gpuglass.config import TenantQuota
from gpuglass.families import engine as families
from gpuglass_vllm import records
from tests.exporters.vllm.engine_world import SECOND, TRACE, World, end, gpu, progress, start

# Tenants


def test_all_that_a_tenant_used_is_told() -> None:
    world = World()
    core, workers = world.connect("core"), [world.connect("worker", rank=rank) for rank in (0, 1)]
    for _ in range(2):
        world.tell(
            core,
            records.TenantSums(
                tenant="acme",
                kv_block_ns=10.0 * SECOND,
                prompt_tokens=100,
                cached_tokens=32,
                output_tokens=20,
                recomputed_tokens=5,
                preemptions=1,
                requests={"stop": 2, "error/timeout": 1},
            ),
        )
        for worker in workers:
            world.tell(
                worker, records.TenantSums(tenant="acme", gpu_ns=1.5 * SECOND, recompute_ns=0.5 * SECOND)
            )
    of = {"tenant": "acme"}
    assert world.value(families.TENANT_GPU, **of) == 6, "of all ranks together"
    assert world.value(families.TENANT_KV, **of) == 20 * 4096
    tokens = {s.labels["kind"]: s.value for s in world.find(families.TENANT_TOKENS, **of)}
    assert tokens == {"prompt": 200, "cached": 64, "output": 40, "recomputed": 10}
    assert world.value(families.TENANT_PREEMPTIONS, **of) == 2
    assert world.value(families.TENANT_REQUESTS, outcome="stop", **of) == 4
    assert world.value(families.TENANT_REQUESTS, outcome="error", error_type="timeout", **of) == 2
    assert world.value(families.WASTED, reason="recompute", **of) == 2


def test_what_no_process_can_tell_is_absent() -> None:
    world = World()
    frontend = world.connect("frontend")
    world.tell(frontend, records.TenantSums(tenant="acme", requests={"rejected/validation": 1}))
    assert world.value(families.TENANT_REQUESTS, outcome="rejected", error_type="validation") == 1
    for family in (families.TENANT_GPU, families.TENANT_KV, families.TENANT_TOKENS):
        assert world.find(family) == []


def test_what_a_probe_cannot_count_is_absent_and_not_zero() -> None:
    def lacking(*hooks: str) -> list[records.Capability]:
        return [records.Capability(hook=hook, state="unavailable", reason="changed") for hook in hooks]

    world = World()
    core = world.connect("core", capabilities=lacking("core.steps", "core.preemptions"))
    worker = world.connect("worker", capabilities=lacking("worker.padding", "worker.out_of_memory"))
    world.tell(core, records.TenantSums(tenant="acme", requests={"stop": 1}))
    world.tell(worker, steps(steps=1, attributed_ns=1e9))
    for family in (
        families.TENANT_TOKENS,
        families.TENANT_PREEMPTIONS,
        families.PREEMPTIONS,
        families.OUT_OF_MEMORY,
    ):
        assert world.find(family) == []
    assert {s.labels["phase"] for s in world.find(families.STEP_TOKENS)} == {"prefill", "decode"}
    assert "padding" not in {s.labels["part"] for s in world.find(families.GPU_SECONDS_BY_PART)}
    world.tell(core, records.TenantSums(tenant="acme", output_tokens=3))
    assert world.value(families.TENANT_TOKENS) == 3, "what was counted all the same is told"


def test_blocks_wait_for_the_size_of_a_block() -> None:
    world = World()
    core = world.connect("core", pool=None)
    world.tell(core, records.TenantSums(tenant="acme", kv_block_ns=10.0 * SECOND))
    assert world.find(families.TENANT_KV) == []
    world.connect("core", sender="again")
    assert world.value(families.TENANT_KV) == 10 * 4096


def test_a_request_without_tenant_belongs_to_none_and_one_that_lies_to_unverified() -> None:
    world = World(LedgerSettings(tenants=1))
    core = world.connect("core")
    for name in ("", records.UNVERIFIED, "acme", "late"):
        world.tell(core, records.TenantSums(tenant=name, output_tokens=1))
    found = {s.labels["tenant"] for s in world.find(families.TENANT_TOKENS, kind="output")}
    assert found == {"none", "unverified", "acme", "other"}
    assert world.value(families.TENANTS) == 1


def test_in_flight_requests_are_running_waiting_or_unknown_and_an_idle_tenant_has_zero() -> None:
    world = World()
    frontend = world.connect("frontend")
    world.tell(frontend, start("r1", world.now, tenant="acme"), start("r2", world.now, tenant="acme"))
    assert world.value(families.TENANT_IN_FLIGHT, tenant="acme", state="unknown") == 2
    core = world.connect("core")
    world.tell(core, progress("r1", world.now, 3.0), records.TenantSums(tenant="idle"))
    assert world.value(families.TENANT_IN_FLIGHT, tenant="acme", state="running") == 1
    assert world.value(families.TENANT_IN_FLIGHT, tenant="acme", state="waiting") == 1
    assert world.value(families.TENANT_IN_FLIGHT, tenant="idle", state="running") == 0
    world.tell(core, end("r1", world.now))
    assert world.value(families.TENANT_IN_FLIGHT, tenant="acme", state="running") is None


def test_quotas_stand_beside_and_their_tenants_are_never_other() -> None:
    quotas = {
        "late": TenantQuota(gpu_seconds_per_day=3600.0, kv_share=0.5),
        "small": TenantQuota(kv_share=0.1),
    }
    world = World(LedgerSettings(tenants=2, quotas=quotas))
    core = world.connect("core")
    for name in ("early", "late"):
        world.tell(core, records.TenantSums(tenant=name, output_tokens=1))
    assert world.value(families.TENANT_TOKENS, tenant="late", kind="output") == 1
    assert world.value(families.TENANT_TOKENS, tenant="other", kind="output") == 1
    assert world.value(families.TENANT_GPU_QUOTA, tenant="late") == 3600
    assert world.value(families.TENANT_GPU_QUOTA, tenant="small") is None
    assert world.value(families.TENANT_KV_QUOTA, tenant="small") == 0.1


@given(st.lists(st.text(max_size=3), max_size=40), st.integers(1, 5))
def test_who_has_a_series_keeps_it_and_others_never_get_one(names: list[str], limit: int) -> None:
    tenants = TenantNames(limit)
    first = [tenants.label(name) for name in names]
    assert [tenants.label(name) for name in names] == first
    assert len(set(first) - {"other", "none", "unverified"}) == len(tenants) <= limit


# Waste


@pytest.mark.parametrize(("outcome", "wasted"), [("abort", 2.0), ("error", 2.0), ("stop", None)])
def test_gpu_time_of_what_nobody_got_is_wasted_once(outcome: str, wasted: float | None) -> None:
    world = World()
    core, worker = world.connect("core"), world.connect("worker")
    told = records.GpuProgress(
        at=world.now,
        request_ids=["r1"],
        gpu_ns=[2.5 * SECOND],
        recompute_ns=[0.5 * SECOND],  # comes in the tenant's sums as well
        ended=["r1"],
    )
    world.tell(worker, told)
    world.tell(core, end("r1", world.now, outcome=outcome, tenant="acme"))
    assert world.value(families.WASTED, tenant="acme", reason=outcome) == wasted
    assert world.sum(families.REQUEST_GPU) == 2.5
    named = [(e.labels, e.value) for e in world.exemplars(families.WASTED)]
    assert named == ([({"request_id": "r1"}, 2.0)] if wasted else [])


# Conservation

OUTCOMES = ("stop", "length", "abort", "error/engine")
one_request = st.tuples(
    st.sampled_from(["acme", "globex", "initech", ""]),
    st.sampled_from(OUTCOMES),
    st.integers(0, 5_000),
    st.integers(0, 500),
    st.lists(st.integers(0, 10**10), min_size=2, max_size=2),
)


@given(st.lists(one_request, max_size=20), st.integers(1, 4), st.randoms(use_true_random=False))
def test_tenants_are_the_sum_of_their_requests_when_nothing_is_dropped(
    told: list[tuple[str, str, int, int, list[int]]], limit: int, random: object
) -> None:
    world = World(LedgerSettings(tenants=limit))
    core, workers = world.connect("core"), [world.connect("worker", rank=rank) for rank in (0, 1)]
    for number, (tenant, outcome, prompt, output, gpu_ns) in enumerate(told):
        name = f"r{number}"
        word, _, error_type = outcome.partition("/")
        for rank, worker in enumerate(workers):
            world.tell(worker, gpu(name, world.now, gpu_ns[rank] / SECOND, ended=True))
            world.tell(worker, records.TenantSums(tenant=tenant, gpu_ns=float(gpu_ns[rank])))
        world.tell(
            core,
            end(
                name,
                world.now,
                tenant=tenant,
                outcome=word,
                error_type=error_type,
                prompt_tokens=prompt,
                output_tokens=output,
            ),
            records.TenantSums(
                tenant=tenant, prompt_tokens=prompt, output_tokens=output, requests={outcome: 1}
            ),
        )

    def total(family: families.Family, **labels: str) -> float:
        return sum(s.value for s in world.find(family, **labels))

    assert total(families.TENANT_GPU) == pytest.approx(world.sum(families.REQUEST_GPU), abs=1e-4)
    assert total(families.TENANT_TOKENS, kind="prompt") == world.sum(families.REQUEST_PROMPT_TOKENS)
    assert total(families.TENANT_TOKENS, kind="output") == world.sum(families.REQUEST_OUTPUT_TOKENS)
    by_outcome = Counter(outcome.partition("/")[0] for _, outcome, *_ in told)
    for word, count in by_outcome.items():
        assert total(families.TENANT_REQUESTS, outcome=word) == count
        assert total(families.REQUEST_DURATION, outcome=word) == count
    wasted = sum(sum(ns) for _, outcome, _, _, ns in told if outcome in ("abort", "error/engine"))
    assert total(families.WASTED) == pytest.approx(wasted / SECOND, abs=1e-4)


some_ns = st.integers(0, 10**12).map(float)


@given(st.lists(st.tuples(some_ns, some_ns, some_ns, some_ns, some_ns), min_size=1, max_size=10))
def test_parts_of_gpu_time_add_up_to_the_time_of_all_steps(
    told: list[tuple[float, float, float, float, float]],
) -> None:
    world = World()
    worker = world.connect("worker")
    for attributed, prefill, padding, dummy, unattributed in told:
        world.tell(
            worker,
            records.StepSums(
                clock="cuda",
                steps=1,
                attributed_ns=attributed,
                prefill_ns=prefill,
                padding_ns=padding,
                dummy_ns=dummy,
                unattributed_ns=unattributed,
                seconds=[1] + [0] * len(records.STEP_SECONDS),
            ),
        )
    parts = {s.labels["part"]: s.value for s in world.find(families.GPU_SECONDS_BY_PART)}
    assert set(parts) == {"prefill", "decode", "padding", "dummy", "unattributed"}
    assert sum(parts.values()) == pytest.approx(world.sum(families.STEP), abs=1e-5)
    whole = sum(a + p + d + u for a, _, p, d, u in told)
    assert sum(parts.values()) == pytest.approx(whole / SECOND, abs=1e-5)
    assert world.value(families.STEP) == len(told)


# Steps and allocator


def steps(**more: object) -> records.StepSums:
    return records.StepSums(clock="cuda", **more)  # type: ignore[arg-type]


def test_steps_are_told_by_rank_and_card() -> None:
    world = World()
    for rank in (0, 1):
        worker = world.connect("worker", rank=rank)
        worker.claim, worker.gpu_uuid = GpuClaim.VERIFIED, f"GPU-{rank}"
        requests = [0] * (len(records.BATCH_REQUESTS) + 1)
        requests[2] = 3
        world.tell(
            worker,
            steps(
                steps=3,
                idle_ns=2.0 * SECOND,
                prefill_tokens=100,
                decode_tokens=7,
                padded_tokens=5,
                requests=requests,
                request_steps=11,
            ),
        )
    assert world.value(families.IDLE, rank="1", gpu_uuid="GPU-1", clock="cuda") == 2
    tokens = {s.labels["phase"]: s.value for s in world.find(families.STEP_TOKENS, rank="0")}
    assert tokens == {"prefill": 100, "decode": 7, "padding": 5}
    assert world.value(families.BATCH, rank="0") == 3
    assert world.sum(families.BATCH, rank="0") == 11


def test_a_worker_without_a_card_has_no_label_of_one_and_a_gone_one_keeps_it() -> None:
    world = World()
    cpu = world.connect("worker", instance="cpu", model_name="cpu")
    world.tell(cpu, records.StepSums(clock="wall", steps=1))
    assert "gpu_uuid" not in world.find(families.IDLE)[0].labels
    worker = world.connect("worker")
    worker.gpu_uuid = "GPU-0"
    world.tell(
        worker,
        steps(steps=1),
        records.AllocatorState(at=1, allocated=1, active=1, reserved=1, inactive_split=0),
    )
    world.kill(worker)
    assert world.value(families.IDLE, gpu_uuid="GPU-0") == 0
    assert world.find(families.ALLOCATOR_RESERVED) == [], "what it holds is not known any more"


def test_use_of_operations_is_over_the_last_seconds_and_sinks_to_nothing() -> None:
    world = World()
    worker = world.connect("worker", peak_flops=1e12)
    for _ in range(30):
        world.tell(worker, steps(flops=0.25e12))
        world.wait(1)
    assert world.value(families.FLOPS_RATIO) == pytest.approx(0.25, rel=0.08)
    assert world.value(families.FLOPS) == 7.5e12
    world.wait(0.5)
    world.tell(worker, steps(flops=1e9))
    world.wait(16)
    world.value(families.FLOPS_RATIO)
    world.wait(16)
    assert world.value(families.FLOPS_RATIO) == 0


def test_without_a_peak_or_a_model_there_is_no_use_of_operations() -> None:
    world = World()
    world.tell(world.connect("worker", rank=0), steps(flops=1e12))
    world.tell(world.connect("worker", rank=1, peak_flops=1e12), steps(steps=1))
    world.wait(2)
    assert world.find(families.FLOPS_RATIO) == []
    assert [s.labels["rank"] for s in world.find(families.FLOPS)] == ["0"]


def allocator(at: int, retries: int, **more: int) -> records.AllocatorState:
    told = {"allocated": 50, "active": 60, "reserved": 100, "inactive_split": 25} | more
    return records.AllocatorState(at=at, retries=retries, **told)


def test_the_allocator_is_told_and_its_counters_outlive_the_process() -> None:
    world = World()
    worker = world.connect("worker", sender="first")
    world.tell(worker, allocator(2, 3, ooms=1), allocator(1, 2))
    assert world.value(families.ALLOCATOR_ALLOCATED) == 50
    assert world.value(families.ALLOCATOR_ACTIVE) == 60
    assert world.value(families.ALLOCATOR_RESERVED) == 100
    assert world.value(families.ALLOCATOR_INACTIVE_SPLIT) == 25
    assert world.value(families.FRAGMENTATION) == 0.25
    assert world.value(families.ALLOCATOR_RETRIES) == 3
    world.kill(worker)
    again = world.connect("worker", sender="first")
    world.tell(again, allocator(3, 4))
    assert world.value(families.ALLOCATOR_RETRIES) == 4, "the same process"
    world.kill(again)
    world.tell(world.connect("worker", sender="second"), allocator(4, 2))
    assert world.value(families.ALLOCATOR_RETRIES) == 6


def test_counts_of_the_allocator_that_are_reset_go_on_from_there() -> None:
    world = World()
    worker = world.connect("worker")
    for at, retries, ooms in ((1, 5, 2), (2, 1, 3), (3, 2, 0)):
        world.tell(worker, allocator(at, retries, ooms=ooms))
    assert world.value(families.ALLOCATOR_RETRIES) == 7
    assert world.value(families.ALLOCATOR_OOMS) == 3


def test_nothing_reserved_is_not_fragmented() -> None:
    world = World()
    world.tell(world.connect("worker"), allocator(1, 0, reserved=0, inactive_split=0))
    assert world.find(families.FRAGMENTATION) == []


def test_running_out_of_memory_names_the_request_with_most_tokens() -> None:
    world = World()
    frontend, worker = world.connect("frontend"), world.connect("worker")
    world.tell(frontend, start("big", world.now, trace_id=TRACE))
    world.tell(worker, steps(steps=1))
    assert world.value(families.OUT_OF_MEMORY) == 0
    world.tell(worker, records.OutOfMemory(at=world.now, request_ids=["big", "small"], tokens=[900, 3]))
    assert world.value(families.OUT_OF_MEMORY) == 1
    (exemplar,) = world.exemplars(families.OUT_OF_MEMORY)
    assert exemplar.labels == {"trace_id": TRACE, "request_id": "big"}


@pytest.mark.parametrize("wrong", [{"seconds": [1]}, {"requests": [1, 2]}])
def test_steps_in_other_buckets_are_refused_whole(wrong: dict[str, list[int]]) -> None:
    world = World()
    worker = world.connect("worker")
    with pytest.raises(Refused) as refused:
        world.tell(worker, steps(attributed_ns=1.0, prefill_tokens=5, **wrong))
    assert refused.value.reason is Refusal.OUT_OF_RANGE
    assert world.value(families.STEP_TOKENS, phase="prefill") in (None, 0)
