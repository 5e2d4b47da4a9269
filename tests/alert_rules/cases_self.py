"""Parts of the pack that are down, stale, dropping or at a cap, and those that nearly are. After an hour."""

from __future__ import annotations

from gpuglass.families import agent, anomaly, bridge, engine, gpu, probe, tracer
from gpuglass.family import Family
from recording_rules import foreign
from tests.alert_rules.world import Values, World, gone, growing, missing, steady

MINUTES = 60
STARTED = 1_700_000_000
WHEN = "2023-11-14 22:13:20 +0000 UTC"
NODE_LEVEL = {"node": "node-x"}


def build(world: World) -> None:
    """All cases."""
    _agents(world)
    _receivers(world)
    _probes(world)
    _tracers(world)
    _sidecar(world)
    _traces(world)
    _caps(world)


def target(node: str) -> dict[str, str]:
    """An agent's target: the node is the host of its address."""
    return {"instance": f"{node}:9955"}


def _up_and_down(
    world: World, name: str, family: Family, description: str, *, reason: str | None = None
) -> None:
    """A gauge that is 1 while all is well. Down on one node, briefly down and up on others."""
    short = name.removeprefix("GPUGlass").lower()

    def add(node: str, values: Values | float, why: str = "") -> None:
        labels = {} if reason is None else {"reason": why}
        world.add(family, values, target(node), **labels)

    add(f"{short}-down", steady(1, 40).then(gone()) if reason else steady(1, 40).then(steady(0)))
    if reason:
        add(f"{short}-down", missing(40).then(steady(0)), reason)
    world.fires(name, "warning", "self", description.format(node=f"{short}-down"), {"node": f"{short}-down"})
    world.near(name, "for two minutes")
    add(f"{short}-blink", steady(1, 58).then(gone()) if reason else steady(1, 58).then(steady(0)))
    if reason:
        add(f"{short}-blink", missing(58).then(steady(0)), reason)
    world.near(name, "it is not there any more, and was well")
    add(f"{short}-gone", steady(1, 30).then(gone()))
    world.near(name, "a gap of ten minutes")
    add(f"{short}-gap", steady(1, 30).then(missing(10)).then(steady(1)))


def _process(world: World, name: str, family: Family, description: str) -> None:
    """A process that is gone, and some that are not."""
    short = name.removeprefix("GPUGlass").lower()
    world.add(family, steady(STARTED, 40).then(gone()), target(f"{short}-gone"))
    world.fires(name, "warning", "self", description.format(node=f"{short}-gone"), {"node": f"{short}-gone"})
    world.near(name, "restarted, on the same node")
    world.add(
        family,
        steady(STARTED, 50).then(missing(2)).then(steady(STARTED + 3000)),
        target(f"{short}-restarted"),
    )
    world.near(name, "replaced by one at another address of the same node")
    world.add(
        family,
        steady(STARTED, 40).then(gone()),
        {"instance": "10.0.0.7:9955", "node": f"{short}-moved"},
    )
    world.add(
        family,
        missing(41).then(steady(STARTED + 2500)),
        {"instance": "10.0.0.8:9955", "node": f"{short}-moved"},
    )
    world.near(name, "gone for three minutes")
    world.add(family, steady(STARTED, 57).then(gone()), target(f"{short}-rolling"))


def _agents(world: World) -> None:
    _process(
        world, "GPUGlassAgentDown", agent.START_TIME,
        f"The agent on {{node}} has not been scraped for more than 5m (it started at {WHEN}).",
    )  # fmt: skip
    _up_and_down(
        world, "GPUGlassDriverDown", gpu.DRIVER_UP,
        "NVML on {node} does not load (gpuglass_gpu_driver_up is 0); `gpuglass doctor` tells why.",
        reason="library_not_found",
    )  # fmt: skip
    _up_and_down(
        world, "GPUGlassConfigRefused", agent.CONFIG_RELOAD_OK,
        "The agent on {node} did not take its configuration (success is 0); its log names the key.",
    )  # fmt: skip

    def age(node: str, device: str, values: Values | float) -> None:
        world.add(gpu.SNAPSHOT_AGE, values, target(node), device=device, gpu_uuid=f"GPU-{node}-{device}")

    age("stale", "nvidia0", 0.4)
    age("stale", "nvidia1", steady(0.5, 40).then(steady(900)))
    world.fires(
        "GPUGlassAgentStale", "warning", "self",
        "GPU figures of stale are 15m 0s old: the driver does not answer.", {"node": "stale"},
    )  # fmt: skip
    world.near("GPUGlassAgentStale", "a slow driver: half a minute")
    age("slow", "nvidia0", 31)
    world.near("GPUGlassAgentStale", "it was stale, and answers again")
    age("mended", "nvidia0", growing(1.0, 40).then(steady(0.5)))


def _receivers(world: World) -> None:
    _up_and_down(
        world, "GPUGlassReceiverDown", probe.UP,
        "The receiver on {node} is down (gpuglass_receiver_up is 0): engines cannot be seen.",
        reason="no_permission",
    )  # fmt: skip

    def refused(node: str, values: Values | float, reason: str = "version") -> None:
        world.add(probe.REFUSED, values, target(node), reason=reason)

    # The first refusal makes the series.
    refused("refusing", missing(55).then(steady(2)), "not_allowed")
    world.fires(
        "GPUGlassReceiverRefusing", "warning", "self",
        "The receiver on refusing refused 2 connections, packets or records in 15m: not_allowed.",
        {"node": "refusing", "reason": "not_allowed"},
    )  # fmt: skip
    refused("refusing-more", steady(3, 52).then(steady(9)))
    world.fires(
        "GPUGlassReceiverRefusing", "warning", "self",
        "The receiver on refusing-more refused 6 connections, packets or records in 15m: version.",
        {"node": "refusing-more", "reason": "version"},
    )  # fmt: skip
    world.near("GPUGlassReceiverRefusing", "an hour ago")
    refused("refused-once", steady(7))
    world.near("GPUGlassReceiverRefusing", "the agent was restarted")
    refused("refused-before", steady(7, 50).then(steady(0)))
    world.near("GPUGlassReceiverRefusing", "a gap, then the same count")
    refused("refused-gap", steady(7, 48).then(missing(8)).then(steady(7)))


def _sender(model: str, **more: str) -> dict[str, str]:
    return {"model_name": model, "engine": "0", "role": "core", "rank": "", "sender": "a1", **more}


def _probes(world: World) -> None:
    host = target("node-a")

    def engine_labels(model: str) -> dict[str, str]:
        return {"model_name": model, "engine": "0"}

    _unprobed(world)
    world.add(probe.DROPPED, missing(50).then(steady(0, 5)).then(steady(4)), host, **_sender("dropping"))
    world.add(probe.DROPPED, steady(0), host, **_sender("dropping", role="worker", rank="0", sender="b2"))
    world.fires(
        "GPUGlassProbeDropping", "warning", "self",
        "The probe of dropping, engine 0 dropped 4 events in 15m; sums are complete, single events "
        "are missing.",
        engine_labels("dropping"),
    )  # fmt: skip
    world.near("GPUGlassProbeDropping", "half an hour ago")
    world.add(probe.DROPPED, steady(0, 20).then(steady(40)), host, **_sender("dropped"))
    world.near("GPUGlassProbeDropping", "a process that starts and drops nothing")
    world.add(probe.DROPPED, missing(55).then(steady(0)), host, **_sender("starting"))

    world.add(probe.HOOK_ERRORS, steady(0, 30).then(steady(3)), host, **_sender("broken"), hook="core.kv")
    world.fires(
        "GPUGlassProbeHookOff", "warning", "self",
        "Hook core.kv (core) of broken, engine 0 is off after 3 errors: what it measures is missing.",
        {**engine_labels("broken"), "role": "core", "hook": "core.kv"},
    )  # fmt: skip
    world.near("GPUGlassProbeHookOff", "two errors: it still works")
    world.add(probe.HOOK_ERRORS, 2, host, **_sender("limping"), hook="core.kv")
    world.near("GPUGlassProbeHookOff", "the process has ended")
    world.add(probe.HOOK_ERRORS, steady(3, 40).then(gone()), host, **_sender("ended"), hook="core.kv")

    world.add(probe.HOOK_SECONDS, growing(0.03), host, **_sender("dear"))
    world.fires(
        "GPUGlassProbeOverBudget", "warning", "self",
        "The probe takes 3% of a core in the core of dear, engine 0.",
        {**engine_labels("dear"), "role": "core"},
    )  # fmt: skip
    world.near("GPUGlassProbeOverBudget", "half of the budget")
    world.add(probe.HOOK_SECONDS, growing(0.005), host, **_sender("cheap"))
    world.near("GPUGlassProbeOverBudget", "two processes that are within it, each for itself")
    world.add(probe.HOOK_SECONDS, growing(0.007), host, **_sender("two"))
    world.add(probe.HOOK_SECONDS, growing(0.007), host, **_sender("two", rank="1", sender="b2"))
    world.near("GPUGlassProbeOverBudget", "while it warms up")
    world.add(probe.HOOK_SECONDS, growing(0.1, 8).then(steady(48)), host, **_sender("warm"))


def _unprobed(world: World) -> None:
    """Engines that are scraped themselves, beside their probe."""

    def served(model: str, plain: Values | float, up: Values | None, info: Values | None = None) -> None:
        pod = f"{model}-0"
        labels = {"model_name": model, "engine": "0"}
        vllm = {"job": "vllm", "instance": f"{pod}:8000", "namespace": "prod", "pod": pod}
        how = plain if isinstance(plain, Values) else steady(plain)
        world.raw(foreign.VLLM_RUNNING.name, {**vllm, **labels}, how)
        probed = {**labels, "workload_namespace": "prod", "workload_pod": pod}
        if up is not None:
            host = target("node-a")
            world.add(engine.UP, up, host, **probed)
            world.add(engine.INFO, info or up, host, **probed, engine_name="vllm", engine_version="0.11.0")

    down = steady(1, 40).then(steady(0, 10)).then(gone())
    served("unprobed", 2, down, steady(1, 40).then(gone()))
    world.fires(
        "GPUGlassProbeDown", "warning", "self",
        "unprobed, pod unprobed-0 had a probe and is read by its own metrics now (1 engine): GPU time, "
        "tenants and holders of its KV cache are missing.",
        {"model_name": "unprobed", "workload_namespace": "prod", "workload_pod": "unprobed-0"},
    )  # fmt: skip
    world.near("GPUGlassProbeDown", "the engine is gone with its probe")
    served("retired", steady(2, 40).then(gone()), down, steady(1, 40).then(gone()))
    world.near("GPUGlassProbeDown", "restarted within two minutes")
    served("restarted-probe", 2, steady(1, 50).then(steady(0, 2)).then(steady(1)))
    world.near("GPUGlassProbeDown", "it never had a probe")
    served("plain", 2, None)


def _tracers(world: World) -> None:
    _process(
        world, "GPUGlassTracerDown", tracer.START,
        f"The CUDA tracer on {{node}} has not been scraped for more than 5m (it started at {WHEN}).",
    )  # fmt: skip
    _up_and_down(
        world, "GPUGlassTracerNotHeard", tracer.AGENT_UP,
        "The CUDA tracer on {node} is not connected to the agent (0): nothing is judged or joined "
        "with requests.",
    )  # fmt: skip

    def state(node: str, name: str, values: Values | float) -> None:
        world.add(tracer.STATE, values, target(node), state=name)

    state("dear-tracer", "tracing", steady(1, 50).then(gone()))
    state("dear-tracer", "over_budget", missing(50).then(steady(1)))
    world.fires(
        "GPUGlassTracerOverBudget", "warning", "self",
        "The CUDA tracer on dear-tracer is over its budget (state over_budget is 1): CUDA memory is "
        "not traced.",
        {"node": "dear-tracer"},
    )  # fmt: skip
    world.near("GPUGlassTracerOverBudget", "it traces")
    state("cheap-tracer", "tracing", 1)
    world.near("GPUGlassTracerOverBudget", "it waits, and was over it before")
    state("calm-tracer", "over_budget", steady(1, 20).then(gone()))
    state("calm-tracer", "waiting", missing(20).then(steady(1)))

    def lost(node: str, values: Values | float) -> None:
        world.add(tracer.LOST, values, target(node), what="calls")

    lost("losing", steady(0, 52).then(steady(12)))
    world.fires(
        "GPUGlassTracerDropping", "warning", "self",
        "The CUDA tracer on losing lost 12 calls in 15m: its ledger is incomplete.",
        {"node": "losing", "what": "calls"},
    )  # fmt: skip
    world.near("GPUGlassTracerDropping", "half an hour ago")
    lost("lost", steady(0, 30).then(steady(12)))
    world.near("GPUGlassTracerDropping", "the tracer was restarted")
    lost("lost-before", steady(12, 50).then(steady(0)))


def _sidecar(world: World) -> None:
    """Two replicas that publish the same; of another set of series one replica is gone."""
    for number in ("0", "1"):
        replica = {"instance": f"sidecar-{number}:9957"}

        def evaluations(
            query: str, result: str, values: Values | float, replica: dict[str, str] = replica
        ) -> None:
            world.add(anomaly.EVALUATIONS, values, replica, query=query, result=result)

        # Times are Unix times, and a test begins at 0.
        world.add(anomaly.LAST_EVALUATION, steady(1200), replica, query="stuck")
        world.near("GPUGlassSidecarStale", "evaluated five minutes ago")
        world.add(anomaly.LAST_EVALUATION, steady(3300), replica, query="slow")
        late = growing(1.0) if number == "0" else steady(600)
        world.near("GPUGlassSidecarStale", "by one replica in time, by the other not")
        world.add(anomaly.LAST_EVALUATION, late, replica, query="fresh")
        evaluations("broken", "failed", growing(1 / 60))
        evaluations("broken", "ok", 400)
        evaluations("flaky", "failed", growing(1 / 120))
        evaluations("flaky", "ok", growing(1 / 120))
        evaluations("was-broken", "failed", growing(1 / 60, 30).then(steady(30)))
    world.near("GPUGlassSidecarFailing", "some of the evaluations fail")
    world.near("GPUGlassSidecarFailing", "half an hour ago")
    world.fires(
        "GPUGlassSidecarStale", "warning", "self", "Query stuck was last evaluated 40m 0s ago.",
        {"query": "stuck"},
    )  # fmt: skip
    world.fires(
        "GPUGlassSidecarFailing", "warning", "self",
        "Query broken failed 30 times in 15m and never succeeded.", {"query": "broken"},
    )  # fmt: skip
    world.near("GPUGlassSidecarDown", "one of two replicas is left")
    world.near("GPUGlassSidecarDown", "restarted")
    world.add(anomaly.START_TIME, steady(STARTED, 20).then(gone()), {"instance": "sidecar-0:9957"})
    world.add(
        anomaly.START_TIME,
        steady(STARTED, 50).then(missing(1)).then(steady(STARTED + 3100)),
        {"instance": "sidecar-1:9957"},
    )


def _traces(world: World) -> None:
    _up_and_down(
        world, "GPUGlassTracesNotAccepted", bridge.UP,
        "The collector does not answer the agent on {node} (gpuglass_traces_collector_up is 0).",
    )  # fmt: skip

    def dropped(node: str, values: Values | float) -> None:
        world.add(bridge.DROPPED, values, target(node), reason="queue_full")

    dropped("traces-lost", missing(50).then(steady(25)))
    world.fires(
        "GPUGlassTracesDropped", "warning", "self",
        "The agent on traces-lost dropped 25 traces in 15m: queue_full.",
        {"node": "traces-lost", "reason": "queue_full"},
    )  # fmt: skip
    world.near("GPUGlassTracesDropped", "half an hour ago")
    dropped("traces-were-lost", steady(0, 30).then(steady(25)))
    world.near("GPUGlassTracesDropped", "none since the agent started")
    dropped("traces-kept", 0)


def _caps(world: World) -> None:
    host = target("node-a")
    who = {"model_name": "crowded", "engine": "0"}

    def tenant(node: str, name: str, values: Values | float) -> None:
        world.add(engine.TENANT_GPU, values, target(node), model_name=f"m-{node}", engine="0", tenant=name)

    tenant("many-tenants", "other", growing(0.01))
    world.fires(
        "GPUGlassTenantsCapped", "warning", "self",
        'The agent on many-tenants sums further tenants into tenant="other" (36 GPU-seconds so far).',
        {"node": "many-tenants"},
    )  # fmt: skip
    world.near("GPUGlassTenantsCapped", "many tenants with series of their own")
    for number in range(3):
        tenant("few-tenants", f"t{number}", growing(0.01))
    world.near("GPUGlassTenantsCapped", "for five minutes")
    tenant("new-tenants", "other", missing(55).then(growing(0.01)))

    def process(node: str, name: str, values: Values | float) -> None:
        world.add(
            gpu.PROCESS_MEMORY, values, target(node), device="nvidia0", gpu_uuid=f"GPU-{node}", process=name
        )

    process("many-processes", "other", 3 * 2.0**30)
    world.fires(
        "GPUGlassProcessesCapped", "warning", "self",
        'The agent on many-processes sums further processes into process="other" (3GiB).',
        {"node": "many-processes"},
    )  # fmt: skip
    world.near("GPUGlassProcessesCapped", "one process")
    process("few-processes", "python3", 3 * 2.0**30)
    world.near("GPUGlassProcessesCapped", "for five minutes")
    process("new-processes", "other", missing(55).then(steady(3 * 2.0**30)))

    world.add(engine.UNTRACKED, steady(0, 50).then(steady(8)), host, **who, reason="limit")
    world.fires(
        "GPUGlassRequestsCapped", "warning", "self",
        "8 requests of crowded, engine 0 were not followed in 15m: more were open than "
        "engines.requests allows.",
        who,
    )  # fmt: skip
    world.near("GPUGlassRequestsCapped", "half an hour ago")
    calm = {**who, "model_name": "calm"}
    world.add(engine.UNTRACKED, steady(0, 30).then(steady(80)), host, **calm, reason="limit")
    world.near("GPUGlassRequestsCapped", "lost for another reason")
    world.add(engine.UNTRACKED, growing(0.1), host, **{**who, "model_name": "restarted"}, reason="expired")


def build_without_sidecar(world: World) -> None:
    """Both replicas are gone."""
    for number in ("0", "1"):
        world.add(
            anomaly.START_TIME, steady(STARTED, 20).then(gone()), {"instance": f"sidecar-{number}:9957"}
        )
    world.fires(
        "GPUGlassSidecarDown", "warning", "self",
        "No replica of the anomaly sidecar has been scraped for more than 5m (the last started at "
        f"{WHEN}): scores, leaks and forecasts are missing.",
        {},
    )  # fmt: skip
