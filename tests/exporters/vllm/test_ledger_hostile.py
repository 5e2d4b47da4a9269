"""Whatever checked records come in whatever order: no error but a refusal, a valid exposition, no counter
that sinks, no share above one, bounded state."""

from __future__ import annotations

import contextlib
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporters.vllm.checks import check
from exporters.vllm.ledger import LedgerSettings
from exporters.vllm.sink import Refused
from gpuglass import catalog
from gpuglass.families import engine as families
from gpuglass.family import Family, Kind
from gpuglass_vllm import records
from tests.exporters.vllm.engine_world import World, end, progress, start
from tests.support.prometheus import promtool_check_metrics

NASTY = ["", "r1", "r2", 'a"\\b', "ü" * 64, "other", "none", "x" * 64]
text = st.sampled_from(NASTY)
whole = st.sampled_from([0, 1, 7, 2**31, 2**53])
times = st.sampled_from([0, 1, 999 * 10**9, 1000 * 10**9, 1001 * 10**9])
quantity = st.sampled_from([0.0, 0.5, 1.0, 40.0, 1e9, 1e24])
outcome = st.sampled_from(records.OUTCOMES)
error_type = st.sampled_from(records.ERROR_TYPES)
ENDINGS = [*records.OUTCOMES, "error/engine", "rejected/validation"]
buckets = {
    "seconds": len(records.STEP_SECONDS) + 1,
    "requests": len(records.BATCH_REQUESTS) + 1,
    "evictions": len(records.EVICT_SECONDS) + 1,
}
SPECIAL = {
    "outcome": outcome,
    "error_type": error_type,
    "cause": st.sampled_from(records.PREEMPTION_CAUSES),
    "clock": st.sampled_from(["cuda", "wall"]),
    "counts": st.sampled_from([b"\1\0\0\0" * 4, b"\xff" * 32, b"", b"\0" * 15]),
    "trace_id": st.sampled_from(["", "0af7651916cd43dd8448eb211c80319c", "0" * 32]),
    "first": st.sampled_from([0, 1, 2, 9]),
    "blocks": st.sampled_from([0.0, 1.0, 26.0, 101.0]),
    "peak_blocks": st.sampled_from([0.0, 1.0, 101.0]),
    "preemptions": whole,
}
COUNTERS = [f for f in vars(families).values() if getattr(f, "kind", None) in (Kind.COUNTER, Kind.HISTOGRAM)]


def field_of(kind: type, name: str, annotation: object) -> st.SearchStrategy[object]:
    """Values of a field that the checks may or may not let through."""
    if kind is records.TenantSums and name == "requests":
        return st.dictionaries(st.sampled_from(ENDINGS), st.integers(0, 5), max_size=3)
    if kind is records.CoreSums and name == "preemptions":
        return st.dictionaries(st.sampled_from(records.PREEMPTION_CAUSES), st.integers(0, 5), max_size=3)
    if kind is records.HotExperts and name == "counts":
        return st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=2)
    if name in buckets and annotation == list[int]:
        return st.lists(st.integers(0, 3), min_size=buckets[name], max_size=buckets[name]) | st.just([])
    if name in SPECIAL:
        return SPECIAL[name]
    if name == "at" or (annotation is int and name.endswith("_ns")):
        return times
    if annotation is bool:
        return st.booleans()
    simple = {str: text, int: whole, float: quantity, list[str]: st.lists(text, max_size=3)}
    simple[list[int]] = st.lists(st.integers(0, 3), max_size=3)
    simple[list[float]] = st.lists(quantity, max_size=3)
    if annotation not in simple:  # a list or a dictionary of parts
        whole_type, parts = typing.get_origin(annotation), typing.get_args(annotation)
        inner = [any_of(part) if hasattr(part, "__struct_fields__") else simple[part] for part in parts]
        return st.lists(inner[0], max_size=2) if whole_type is list else st.dictionaries(*inner, max_size=2)
    return simple[annotation]


def any_of(kind: typing.Any) -> st.SearchStrategy[records.Record]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{name: field_of(kind, name, hints[name]) for name in kind.__struct_fields__})


KINDS = [k for k in typing.get_args(records.Record) if k not in (records.Hello, records.ProbeState)]
EXPERTS = records.Experts(layers=[0, 3], experts=4, top_k=1, every=2, ranks=2)
action = st.one_of(
    *(st.tuples(st.just("tell"), any_of(kind)) for kind in KINDS),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, 40.0, 700.0])),
    st.tuples(st.just("restart"), st.sampled_from(["frontend", "core", "worker", "tracer"])),
)
ROLE_OF = {
    records.RequestStart: "frontend",
    records.RequestAnswered: "frontend",
    records.RequestRefused: "frontend",
}
for kind in (
    records.RequestProgress,
    records.RequestEnd,
    records.Preemption,
    records.PoolState,
    records.CoreSums,
):
    ROLE_OF[kind] = "core"
for kind in (records.CudaProcess, records.CudaStack, records.CudaEvent):
    ROLE_OF[kind] = "tracer"


def totals(world: World) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Everything that must not sink."""
    names = {f.name for f in COUNTERS if f.kind is Kind.COUNTER}
    names |= {f"{f.name}_{part}" for f in COUNTERS for part in ("count", "sum", "bucket")}
    return {(s.name, frozenset(s.labels.items())): s.value for s in world.samples() if s.name in names}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(action, max_size=25))
def test_any_row_of_records_leaves_a_valid_exposition_whose_counters_only_grow(
    actions: list[tuple[str, object]],
) -> None:
    world = World(LedgerSettings(requests=3, tenants=2, expert_matrix=True))

    def connect(role: str) -> None:
        more = {"experts": EXPERTS, "peak_flops": 1e12} if role == "worker" else {}
        senders[role] = world.connect(role, sender=f"the-{role}", **more)

    senders: dict[str, typing.Any] = {}
    for role in ("frontend", "core", "worker", "tracer"):
        connect(role)
    before: dict[typing.Any, float] = {}
    for number, (what, argument) in enumerate(actions):
        match what:
            case "tell":
                sender = senders[ROLE_OF.get(type(argument), "worker")]
                with contextlib.suppress(Refused):
                    check(argument, sender.hello, world.now)
                    world.tell(sender, argument)
            case "wait":
                world.wait(argument)
                if argument > 600:
                    before = {}  # what has gone for ten minutes may be forgotten
            case "restart":
                world.kill(senders[argument])
                connect(argument)
        if number % 8 != 7 and number + 1 != len(actions):
            continue  # reading all of it takes longer than the rest
        now = totals(world)
        assert all(now.get(key, value) >= value for key, value in before.items())
        before = before | now
    assert sum(s.value for s in world.find(families.KV_HOLDER)) <= 1
    assert sum(s.value for s in world.find(families.TENANT_KV_SHARE)) <= 1
    assert {s.labels["tenant"] for s in world.samples() if "tenant" in s.labels} <= set(NASTY) | {
        "unverified"
    }
    assert all(len(server.requests) <= 3 for server in world.ledger.servers.values())
    assert {s.name for s in world.samples()} <= known_names()


def known_names() -> set[str]:
    names = set()
    for family in catalog.BY_NAME.values():
        names |= {family.name, f"{family.name}_sum", f"{family.name}_count", f"{family.name}_bucket"}
    return names


def told_all() -> World:
    """A world in which every family of engines has a sample, and exemplars stand wherever they can."""
    world = World(LedgerSettings(expert_matrix=True))
    frontend, core = world.connect("frontend", server="blue"), world.connect("core", server="blue")
    worker = world.connect("worker", server="blue", experts=EXPERTS, peak_flops=1e12)
    worker.gpu_uuid = "GPU-0"
    trace = "0af7651916cd43dd8448eb211c80319c"
    for number in range(3):
        name = f'cmpl-"{number}\\ü-0a1b2c3d'
        world.tell(frontend, start(name, world.now, tenant="acme", trace_id=trace))
        world.tell(core, progress(name, world.now, 30.0))
        world.tell(worker, records.GpuProgress(at=world.now, request_ids=[name], gpu_ns=[1e9], ended=[name]))
    world.wait(2)
    counts = [1] * (len(records.EVICT_SECONDS) + 1)
    world.tell(
        core,
        records.PoolState(at=world.now, used_blocks=90, running=3),
        records.Preemption(at=world.now, cause="kv_full", victim=name, holders=["x"], holder_blocks=[1.0]),
        records.CoreSums(preemptions={"kv_full": 1}, evictions=counts, eviction_seconds=1.0),
        records.TenantSums(tenant="acme", output_tokens=1, requests={"stop": 1}),
        end(name, world.now, outcome="abort", preemptions=1),
    )
    world.tell(
        worker,
        records.TenantSums(tenant="acme", gpu_ns=1e9, recompute_ns=1e8),
        records.StepSums(
            clock="cuda",
            steps=1,
            flops=1e9,
            seconds=[1] * (len(records.STEP_SECONDS) + 1),
            requests=[1] * (len(records.BATCH_REQUESTS) + 1),
        ),
        records.ExpertSums(first=0, counts=b"\1\0\0\0" * 8, counted_tokens=4, seen_tokens=8),
        records.HotExperts(at=world.now, tenants=["acme"], layers=[0], experts=[1], counts=[[1]]),
        records.AllocatorState(at=1, allocated=1, active=1, reserved=2, inactive_split=1),
        records.MemoryState(at=1, weights=1, activation_peak=1),
        records.OutOfMemory(at=world.now, request_ids=[name]),
    )
    world.tell(
        frontend, records.RequestAnswered(at=world.now, request_id=name, outcome="abort", duration_ns=10**9)
    )
    world.wait(1)
    return world


def test_every_family_of_an_engine_is_published_with_exemplars_where_they_can_stand() -> None:
    world = told_all()
    seen = {s.name.removesuffix("_bucket") for s in world.samples()}
    expected = {f.name for f in vars(families).values() if isinstance(f, Family)}
    quotas = {families.TENANT_GPU_QUOTA.name, families.TENANT_KV_QUOTA.name}
    assert expected - seen == quotas
    with_exemplars = {s.name for s in world.samples() if s.exemplar is not None}
    assert with_exemplars >= {
        families.PREEMPTIONS.name,
        families.KV_HOG_SECONDS.name,
        families.OUT_OF_MEMORY.name,
        f"{families.KV_PEAK.name}_bucket",
        f"{families.REQUEST_GPU.name}_bucket",
        f"{families.REQUEST_DURATION.name}_bucket",
    }
    assert not any(name.endswith("_created") for name in seen)


@pytest.mark.needs("debian-prometheus")
def test_promtool_finds_nothing_wrong_with_it() -> None:
    assert promtool_check_metrics(told_all().exposition(accept="")) == []


def test_samples_that_did_not_change_are_the_same_ones() -> None:
    world = told_all()
    first = world.exposition()
    assert world.exposition() == first
    before = dict(world.published().samples)
    again = world.published().samples
    same = [
        again[family][key] is sample
        for family, samples in before.items()
        for key, sample in samples.items()
        if family.kind is not Kind.HISTOGRAM and sample.exemplar is None
    ]
    assert same and all(same)
