"""Leaks, failed allocations, full caches and what nearly is one. After 95 minutes."""

from __future__ import annotations

from gpuglass.families import anomaly, cuda, engine
from gpuglass.family import Family
from tests.alert_rules.parts import (
    GIB,
    NODES,
    add_engine,
    add_gpu,
    add_gpu_time,
    device,
    engine_named,
    named,
    of_engine,
    price,
)
from tests.alert_rules.world import Values, World, growing, missing, steady

MINUTES = 95
MIB = 2.0**20
OF_MODEL = "/d/gpuglass-requests?var-cluster=&var-model_name={}"
REQUESTS = "/d/gpuglass-requests?var-cluster=&var-model_name={}&var-tenant={}"


def build(world: World) -> None:
    """All cases."""
    price(world)
    _leaks(world)
    _leaks_by_metrics(world)
    _out_of_memory(world)
    _kv_full(world)
    _kv_hogged(world)
    _preemptions(world)
    _fragmentation(world)
    _fragmentation_daily(world)


def _traced(
    world: World, uuid: str, node: str, suspected: float, rate: float = 0, kind: str = "device"
) -> None:
    labels = {"process": "python3", "pid": "77", "gpu_uuid": uuid, "kind": kind, "workload_pod": "p"}
    world.add(cuda.LEAK_SUSPECTED, suspected, NODES[node], **labels)
    if rate:
        world.add(cuda.LEAK_RATE, rate, NODES[node], **labels)


def _by_sidecar(world: World, uuid: str, leaks: float, rate: float = 0) -> None:
    for replica in ("0", "1"):
        target = {"instance": f"sidecar-{replica}:9957"}
        world.add(anomaly.LEAK, leaks, target, query="gpu_memory_leak", gpu_uuid=uuid)
        if rate:
            world.add(anomaly.LEAK_RATE, rate, target, query="gpu_memory_leak", gpu_uuid=uuid)


def _leak_fires(world: World, uuid: str, rate: str, node: str = "node-a") -> None:
    world.fires(
        "GPUMemoryLeak", "warning", "memory", f"Memory on {named(uuid, node)} grows by {rate} a second.",
        device(uuid, node),
    )  # fmt: skip


def _leaks(world: World) -> None:
    for uuid in ("GPU-traced", "GPU-scored", "GPU-cleared", "GPU-slow", "GPU-host"):
        add_gpu(world, uuid, "node-b")
    # Tracer and sidecar see the same leak: one alert, with the tracer's figure.
    _traced(world, "GPU-traced", "node-b", 1, 2 * MIB)
    _by_sidecar(world, "GPU-traced", 1, 3 * MIB)
    _leak_fires(world, "GPU-traced", "2MiB", "node-b")
    _by_sidecar(world, "GPU-scored", 1, MIB)
    _leak_fires(world, "GPU-scored", "1MiB", "node-b")
    world.near("GPUMemoryLeak", "the sidecar suspects it, and the tracer knows better")
    _traced(world, "GPU-cleared", "node-b", 0)
    _by_sidecar(world, "GPU-cleared", 1, MIB)
    world.near("GPUMemoryLeak", "suspected, and slower than matters")
    _traced(world, "GPU-slow", "node-b", 1, 1000)
    world.near("GPUMemoryLeak", "memory of the host, which no GPU loses")
    _traced(world, "", "node-b", 1, MIB, kind="host")


def _leaks_by_metrics(world: World) -> None:
    def gpu(
        uuid: str, used: Values, prefill: float | None = 0.0, node: str = "node-a", **more: float
    ) -> None:
        add_gpu(world, uuid, node, used=used, **more)
        if prefill is not None:
            labels = add_engine(world, f"m-{uuid}", node=node)
            add_gpu_time(world, labels, uuid, node, prefill=prefill, decode=0.3)

    quarter = MIB / 4
    gpu("GPU-grows", growing(quarter, start=40 * GIB))
    _leak_fires(world, "GPU-grows", "256kiB")
    # Nobody tells of requests: it does nothing at all, and is cold besides.
    gpu("GPU-idle-grows", growing(quarter, start=40 * GIB), None, "node-b", busy=0.01, sm=0.01)
    _leak_fires(world, "GPU-idle-grows", "256kiB", "node-b")
    world.fires(
        "GPUCold", "warning", "cost",
        f"{named('GPU-idle-grows', 'node-b')} has been busy 1% of the time for more than 10m, by its driver "
        "and by a second signal.",
        device("GPU-idle-grows", "node-b"), saving="3.00 USD an hour for this GPU",
    )  # fmt: skip
    world.near("GPUMemoryLeak", "requests come: a cache may grow")
    gpu("GPU-serves", growing(quarter, start=40 * GIB), prefill=0.2)
    world.near("GPUMemoryLeak", "one step: a second model was loaded")
    gpu("GPU-step", steady(40 * GIB, 70).then(steady(60 * GIB)))
    world.near("GPUMemoryLeak", "restarted: memory fell before it grew")
    gpu("GPU-restarted", steady(40 * GIB, 50).then(growing(8 * MIB, start=GIB)))
    world.near("GPUMemoryLeak", "a model that loads into an empty card")
    gpu("GPU-loads", steady(0, 40).then(growing(8 * MIB)))
    world.near("GPUMemoryLeak", "a tenth of what matters")
    gpu("GPU-creeps", growing(7500, start=40 * GIB))
    world.near("GPUMemoryLeak", "the sidecar watches it and finds none")
    gpu("GPU-watched", growing(quarter, start=40 * GIB))
    _by_sidecar(world, "GPU-watched", 0)


def _out_of_memory(world: World) -> None:
    def failed(uuid: str, values: Values, node: str, code: str = "out_of_memory") -> None:
        world.add(
            cuda.EVENT_FAILURES, values, NODES[node], process="python3", gpu_uuid=uuid,
            function="cuMemCreate", code=code, workload_namespace="prod", workload_pod=f"job-{uuid}",
        )  # fmt: skip

    def of_worker(model: str, uuid: str, values: Values) -> None:
        labels = add_engine(world, model)
        world.add(engine.OUT_OF_MEMORY, values, NODES["node-a"], **labels, rank="0", gpu_uuid=uuid)

    for uuid in ("GPU-oom", "GPU-oom-old", "GPU-oom-reset"):
        add_gpu(world, uuid)
    # The engine and the tracer tell of the same: the engine names the model.
    of_worker("llama-oom", "GPU-oom", steady(0, 85).then(steady(2)))
    failed("GPU-oom", missing(85).then(steady(2)), "node-a")
    what = {**device("GPU-oom"), **of_engine("llama-oom")}
    world.fires(
        "GPUOutOfMemory", "warning", "memory",
        f"2 times in 15m memory ran out on {named('GPU-oom')}, for model llama-oom, engine 0 in pod "
        "llama-oom-0.",
        what, traces_url=OF_MODEL.format("llama-oom").removesuffix("&var-tenant="),
    )  # fmt: skip
    add_gpu(world, "GPU-oom-job", "node-b")
    failed("GPU-oom-job", missing(90).then(steady(1)), "node-b")
    world.fires(
        "GPUOutOfMemory", "warning", "memory",
        f"1 times in 15m memory ran out on {named('GPU-oom-job', 'node-b')}, for process python3 in pod "
        "job-GPU-oom-job.",
        {
            **device("GPU-oom-job", "node-b"), "process": "python3", "workload_namespace": "prod",
            "workload_pod": "job-GPU-oom-job",
        },
        traces_url=OF_MODEL.format("").removesuffix("&var-tenant="),
    )  # fmt: skip
    world.near("GPUOutOfMemory", "half an hour ago")
    of_worker("llama-oom-old", "GPU-oom-old", steady(0, 60).then(steady(2)))
    world.near("GPUOutOfMemory", "the agent was restarted, and counts from 0")
    of_worker("llama-oom-reset", "GPU-oom-reset", steady(5, 88).then(steady(0)))
    world.near("GPUOutOfMemory", "a call that failed for another reason")
    add_gpu(world, "GPU-oom-not", "node-b")
    failed("GPU-oom-not", missing(90).then(steady(3)), "node-b", "invalid_value")


def _kv_full(world: World) -> None:
    add_engine(world, "full", waiting=3, kv=970)
    add_engine(world, "full", "1", "node-b", waiting=0, kv=970)
    world.fires(
        "KVCacheSaturated", "warning", "memory",
        f"Requests of {engine_named('full')}, hold 97% of its KV cache, and others wait.", of_engine("full"),
    )  # fmt: skip
    world.near("KVCacheSaturated", "full, and nobody waits (engine 1)")
    world.near("KVCacheSaturated", "ninety percent")
    add_engine(world, "nearly-full", waiting=3, kv=900)
    world.near("KVCacheSaturated", "for eight minutes")
    add_engine(world, "full-now", waiting=3, kv=steady(500, 87).then(steady(970)))
    world.near("KVCacheSaturated", "cached prefixes fill it, which give way")
    labels = add_engine(world, "cached", waiting=3, kv=300)
    world.add(engine.KV_CACHED_BLOCKS, 690, NODES["node-a"], **labels)


def _kv_hogged(world: World) -> None:
    def holder(labels: dict[str, str], share: Values | float, tenant: str) -> None:
        world.add(engine.KV_HOLDER, share, NODES["node-a"], **labels, holder="1", tenant=tenant)
        world.add(engine.KV_HOLDER, 0.05, NODES["node-a"], **labels, holder="2", tenant="other-one")

    def tenant(labels: dict[str, str], name: str, share: float) -> None:
        world.add(engine.TENANT_KV_SHARE, share, NODES["node-a"], **labels, tenant=name)
        world.add(engine.TENANT_IN_FLIGHT, 2, NODES["node-a"], **labels, tenant=name, state="running")

    def fires(model: str, who: str, percent: str) -> None:
        world.fires(
            "KVCacheHogged", "warning", "memory",
            f"Tenant {who} holds {percent} of the KV cache of {engine_named(model)}, and requests wait.",
            {**of_engine(model), "tenant": who}, traces_url=REQUESTS.format(model, who),
        )  # fmt: skip

    labels = add_engine(world, "hogged", waiting=2, kv=800)
    holder(labels, 0.62, "acme")
    tenant(labels, "acme", 0.75)
    tenant(labels, "beta", 0.05)
    fires("hogged", "acme", "62%")
    labels = add_engine(world, "hogged-by-many", waiting=2, kv=800)
    holder(labels, 0.1, "acme")
    tenant(labels, "acme", 0.75)
    tenant(labels, "beta", 0.05)
    fires("hogged-by-many", "acme", "75%")
    world.near("KVCacheHogged", "a long request on an engine where nobody waits")
    holder(add_engine(world, "hogged-idle", kv=800), 0.62, "acme")
    world.near("KVCacheHogged", "one tenant has the engine for itself")
    labels = add_engine(world, "own", waiting=2, kv=900)
    holder(labels, 0.2, "acme")
    tenant(labels, "acme", 0.9)
    world.near("KVCacheHogged", "for half a minute")
    holder(add_engine(world, "hogged-now", waiting=2, kv=800), steady(0.1, 94.6).then(steady(0.7)), "acme")


def _preemptions(world: World) -> None:
    def preempted(model: str, values: Values) -> None:
        labels = add_engine(world, model)
        world.add(engine.PREEMPTIONS, values, NODES["node-a"], **labels, cause="kv_full")

    preempted("storm", growing(0.3))
    world.fires(
        "KVPreemptionStorm", "warning", "memory",
        f"0.30 requests a second of {engine_named('storm')}, are preempted and computed again.",
        of_engine("storm"),
    )  # fmt: skip
    world.near("KVPreemptionStorm", "three a minute")
    preempted("breeze", growing(0.05))
    world.near("KVPreemptionStorm", "one burst of ten")
    preempted("gust", steady(0, 88).then(steady(10)))
    world.near("KVPreemptionStorm", "the agent was restarted")
    preempted("storm-reset", growing(0.01, 80).then(growing(0.01)))


def _fragmentation(world: World) -> None:
    def fragmented(model: str, values: Values | float, node: str = "node-a") -> None:
        labels = add_engine(world, model, node=node)
        world.add(engine.FRAGMENTATION, values, NODES[node], **labels, rank="0", gpu_uuid=f"GPU-{model}")

    fragmented("fragmented", 0.45, "node-b")
    world.fires(
        "GPUMemoryFragmented", "warning", "memory",
        f"45% of what the allocator of {engine_named('fragmented')}, rank 0 has reserved are free pieces of "
        "split segments.",
        {**of_engine("fragmented"), "rank": "0", "gpu_uuid": "GPU-fragmented"},
    )  # fmt: skip
    world.near("GPUMemoryFragmented", "a fifth")
    fragmented("whole", 0.2)
    world.near("GPUMemoryFragmented", "for twenty minutes")
    fragmented("fragmented-now", steady(0.2, 75).then(steady(0.45)))
    world.near("GPUMemoryFragmented", "with breaks")
    fragmented("fragmented-off", steady(0.45, 70).then(steady(0.2, 5)).then(steady(0.45)))


def _fragmentation_daily(world: World) -> None:
    when = {"weekday": "every", "from_hour": "19", "to_hour": "21"}

    def peak(gpu_uuid: str, repeats: float, strength: float, query: str = "allocator_fragmentation") -> None:
        for replica in ("0", "1"):
            target = {"instance": f"sidecar-{replica}:9957"}
            labels = {"query": query, "gpu_uuid": gpu_uuid, "model_name": "m", **when}
            both: tuple[tuple[Family, float], ...] = (
                (anomaly.RECURRING_REPEATS, repeats),
                (anomaly.RECURRING_STRENGTH, strength),
            )
            for family, value in both:
                world.add(family, value, target, **labels)

    peak("GPU-evening", 4, 0.6)
    world.fires(
        "GPUMemoryFragmentedDaily", "warning", "memory",
        "Memory of m on GPU-evening is fragmented from 19 to 21 o'clock (every), 4 times so far.",
        {"query": "allocator_fragmentation", "gpu_uuid": "GPU-evening", "model_name": "m", **when},
    )  # fmt: skip
    world.near("GPUMemoryFragmentedDaily", "two days only")
    peak("GPU-twice", 2, 0.6)
    world.near("GPUMemoryFragmentedDaily", "it explains little")
    peak("GPU-weak", 5, 0.1)
    world.near("GPUMemoryFragmentedDaily", "a peak of the load")
    peak("GPU-load", 5, 0.8, "tokens")
