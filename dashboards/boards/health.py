"""Pack health: is everything of the pack there, current and within its budget, and what cannot be observed
here."""

from __future__ import annotations

from dashboards import links
from dashboards.board import Board, Options, section
from dashboards.links import to
from dashboards.panels import BAD_IF_ANY, GOOD_IF_ONE, Query, Visual, low_is_good, stat, timeseries
from dashboards.queries import by, on_gpus, quantile, quotient, rate, scoped
from dashboards.tables import Column, table
from gpuglass.families import agent, anomaly, bridge, cuda, engine, gpu, probe, tracer
from gpuglass.promql import not_equal

_SENDER = "model_name, engine, role"


def board(options: Options) -> Board:
    """The dashboard."""
    return Board(
        links.HEALTH,
        "Pack health",
        "The pack itself: agents, probes, tracers, sidecar; and what this fleet's cards, drivers and engines"
        " do not let it see.",
        (
            section("Now", *_now()),
            section("Not observable here", *_capabilities()),
            section("Agents", *_agents(options)),
            section("Probes and receivers", *_probes()),
            section("Traces", *_traces()),
            section("Tracers and sidecar", *_others()),
        ),
    )


def _now() -> tuple[Visual, ...]:
    return (
        stat(
            "Agents",
            "Agents that are scraped.",
            Query(f"count ({by('max', 'cluster, instance', scoped(agent.START_TIME))})"),
            unit="short",
        ),
        stat(
            "Drivers down",
            "Agents whose driver library does not answer.",
            Query(f"count ({scoped(gpu.DRIVER_UP)} == 0) or vector(0)"),
            unit="short",
            steps=BAD_IF_ANY,
        ),
        stat(
            "Oldest GPU values",
            "Age of the oldest GPU snapshot. Above some seconds a driver call hangs.",
            Query(by("max", "", device_age())),
            unit="s",
            decimals=1,
            steps=low_is_good(5, 30),
        ),
        stat(
            "Engines' processes",
            "Processes of engines that are connected to agents.",
            Query(by("sum", "", scoped(probe.SENDERS))),
            unit="short",
        ),
        stat(
            "Dropped events",
            "Events per second that probes dropped because the agent was away or slow. Sums are never"
            " dropped.",
            Query(by("sum", "", rate(probe.DROPPED))),
            unit="ops",
            decimals=2,
            steps=low_is_good(0.1, 10),
        ),
        stat(
            "Configurations",
            "0 if an agent refused its latest configuration and goes on with the one before.",
            Query(by("min", "", scoped(agent.CONFIG_RELOAD_OK))),
            unit="short",
            steps=GOOD_IF_ONE,
        ),
    )


def device_age() -> str:
    """Age of the GPUs' values."""
    return by("max", "gpu_uuid", scoped(gpu.SNAPSHOT_AGE))


def _capabilities() -> tuple[Visual, ...]:
    fields = by(
        "count",
        "field, state",
        by("max", "gpu_uuid, field, state", scoped(gpu.CAPABILITY, state=not_equal("supported"))),
    )
    hooks = by(
        "sum", "model_name, role, hook, state, reason", scoped(probe.CAPABILITY, state=not_equal("active"))
    )
    features = by("count", "feature, state", scoped(agent.CAPABILITY, state=not_equal("supported")))
    return (
        table(
            "GPU values that are not there",
            "Fields that a card, driver or permission does not give, with the number of GPUs. A panel "
            "that is empty elsewhere is explained here.",
            Column("GPUs", fields, "short", 0),
            labels={"field": "Field", "state": "Why"},
            sort="GPUs",
            size=(8, 10),
        ),
        table(
            "Hooks of the probe that are off",
            "What the probe cannot see in this version of the engine, with the reason.",
            Column("Processes", hooks, "short", 0),
            labels={
                "model_name": "Model",
                "role": "Process",
                "hook": "Hook",
                "state": "State",
                "reason": "Reason",
            },
            size=(8, 10),
        ),
        table(
            "Features of nodes",
            "What nodes let the agent see: pod names, the engines' socket, other processes.",
            Column("Agents", features, "short", 0),
            labels={"feature": "Feature", "state": "State"},
            size=(8, 10),
        ),
    )


def _agents(options: Options) -> tuple[Visual, ...]:
    where = "{{node}} {{instance}}"
    return (
        timeseries(
            "CPU of agents",
            "Share of a core. The agent of a node with eight GPUs needs about one percent.",
            Query(f"topk (10, {by('max', 'node, instance', rate(agent.CPU))})", where),
            unit="percentunit",
            steps=low_is_good(0.05, 0.2),
        ),
        timeseries(
            "Memory of agents",
            "Resident memory.",
            Query(f"topk (10, {by('max', 'node, instance', scoped(agent.MEMORY))})", where),
            unit="bytes",
        ),
        timeseries(
            "Series of agents",
            "Series that agents published at the last scrape. It is bounded by caps with a bucket other.",
            Query(
                "topk (10,"
                f" {by('sum', 'node, instance', by('max', 'node, instance, tier', scoped(agent.SERIES)))})",
                where,
            ),
            unit="short",
        ),
        timeseries(
            "Age of GPU values",
            "Time since a GPU's values were read. A GPU that goes up alone hangs.",
            Query(f"topk (10, {on_gpus(device_age(), 'node, device')})", "{{node}} {{device}}"),
            unit="s",
            steps=low_is_good(5, 30),
            links=[to(links.GPU, "This GPU", gpu_uuid=links.label("gpu_uuid"))],
        ),
        timeseries(
            "Rendering a scrape",
            "Mean time to render one, by handler.",
            Query(
                quotient(
                    by("sum", "handler", rate(agent.SCRAPE_SECONDS)),
                    by("sum", "handler", rate(agent.SCRAPES)),
                    "handler",
                ),
                "{{handler}}",
            ),
            unit="s",
        ),
        timeseries(
            "Refused requests",
            "Connections and requests that agents refused or cut off, by reason.",
            Query(by("sum", "reason", rate(agent.HTTP_REJECTED)), "{{reason}}"),
            unit="ops",
        ),
        timeseries(
            "Collectors",
            "Slowest run of each collector. NVML calls that take seconds block a GPU's values.",
            Query(
                by("max", "collector", by("max", "gpu_uuid, collector", scoped(gpu.COLLECTOR_DURATION))),
                "{{collector}}",
            ),
            unit="s",
        ),
        timeseries(
            "Failing collectors",
            "GPUs on which a collector's last run had an error.",
            Query(
                by(
                    "count",
                    "collector",
                    f"{by('max', 'gpu_uuid, collector', scoped(gpu.COLLECTOR_SUCCESS))} == 0",
                )
                + " or 0 * "
                + by("count", "collector", by("max", "gpu_uuid, collector", scoped(gpu.COLLECTOR_SUCCESS))),
                "{{collector}}",
            ),
            unit="short",
            steps=BAD_IF_ANY,
        ),
        timeseries(
            "Lag of records",
            "Age of records when agents received them.",
            Query(quantile(options.histograms, 0.5, probe.LAG), "p50"),
            Query(quantile(options.histograms, 0.99, probe.LAG), "p99"),
            unit="s",
        ),
    )


def _probes() -> tuple[Visual, ...]:
    return (
        timeseries(
            "Cost inside of engines",
            "Share of a core that the probe takes on the engine's own threads.",
            Query(by("sum", _SENDER, rate(probe.HOOK_SECONDS)), "{{model_name}} {{role}} {{engine}}"),
            unit="percentunit",
            decimals=2,
            steps=low_is_good(0.01, 0.05),
        ),
        timeseries(
            "Errors of hooks",
            "Errors inside the probe, which the engine did not notice; after three a hook is off.",
            Query(by("sum", "model_name, hook", rate(probe.HOOK_ERRORS)), "{{model_name}} {{hook}}"),
            unit="ops",
        ),
        timeseries(
            "Dropped events",
            "Events that senders dropped.",
            Query(by("sum", _SENDER, rate(probe.DROPPED)), "{{model_name}} {{role}}"),
            unit="ops",
        ),
        timeseries(
            "Receivers",
            "1 while the socket that engines connect to is there.",
            Query(by("min", "node, instance", scoped(probe.UP)), "{{node}} {{instance}}"),
            unit="short",
            limits=(0, 1),
        ),
        timeseries(
            "Caps reached",
            "What went into the bucket other: GPU time of further tenants, memory of further processes (GiB),"
            " requests that are missing in histograms. Raise the caps if it matters.",
            Query(
                by("sum", "", rate(engine.TENANT_GPU, tenant="other"))
                + " or 0 * "
                + by("sum", "", rate(engine.TENANT_GPU)),
                "tenants: GPU time",
            ),
            Query(
                by("sum", "", scoped(gpu.PROCESS_MEMORY, process="other"))
                + " / 2 ^ 30 or 0 * "
                + by("sum", "", scoped(gpu.PROCESS_MEMORY)),
                "processes: GiB",
            ),
            Query(by("sum", "", rate(engine.UNTRACKED)), "requests/s"),
            unit="short",
        ),
        timeseries(
            "Records",
            "Records taken in by type.",
            Query(by("sum", "type", rate(probe.RECORDS)), "{{type}}"),
            unit="ops",
            stacked=True,
        ),
        timeseries(
            "Refused",
            "Connections, packets and records that were not taken in, by reason.",
            Query(by("sum", "reason", rate(probe.REFUSED)), "{{reason}}"),
            unit="ops",
            steps=low_is_good(0.1, 10),
        ),
        table(
            "Connected processes",
            "Which processes of engines are connected, and what is thought of the GPU that they claim.",
            Column(
                "Processes",
                by("count", "model_name, engine, role, rank, engine_version, gpu_claim", scoped(probe.INFO)),
                "short",
                0,
            ),
            labels={
                "model_name": "Model",
                "engine": "Engine",
                "role": "Role",
                "rank": "Rank",
                "engine_version": "Version",
                "gpu_claim": "GPU claim",
            },
            size=(16, 8),
        ),
    )


def _others() -> tuple[Visual, ...]:
    return (
        timeseries(
            "Cost of tracers",
            "Share of a core that tracing takes of each traced process; above the budget a tracer detaches"
            " itself.",
            Query(by("max", "node, instance", scoped(tracer.COST_RATIO)), "{{node}} {{instance}}"),
            unit="percentunit",
            decimals=2,
            steps=low_is_good(0.01, 0.02),
        ),
        timeseries(
            "Lost by tracers",
            "Calls, allocations and events that could not be kept.",
            Query(by("sum", "what", rate(tracer.LOST)), "{{what}}"),
            unit="ops",
            steps=low_is_good(0.1, 1),
        ),
        timeseries(
            "Tracers",
            "Time since each tracer started, and 0 or 1 for whether its records reach the agent.",
            Query(
                f"time() - {by('max', 'node, instance', scoped(tracer.START))}", "up {{node}} {{instance}}"
            ),
            unit="s",
        ),
        timeseries(
            "Tracers heard",
            "1 while a tracer's records reach its agent; 0: leak verdicts and events are missing.",
            Query(by("min", "node, instance", scoped(tracer.AGENT_UP)), "{{node}} {{instance}}"),
            unit="short",
            limits=(0, 1),
        ),
        table(
            "State of tracers",
            "waiting: no CUDA library was found yet. over_budget: it took its probes off.",
            Column("Tracers", by("count", "state", scoped(tracer.STATE)), "short", 0),
            labels={"state": "State"},
            size=(8, 8),
        ),
        timeseries(
            "Sidecar: evaluations",
            "Evaluations by result. partial or failed: Prometheus left something out or did not answer.",
            Query(by("sum", "result", rate(anomaly.EVALUATIONS)), "{{result}}"),
            unit="ops",
        ),
        timeseries(
            "Sidecar: age of what is published",
            "Time since the oldest query was evaluated.",
            Query(f"max by (query) (time() - {scoped(anomaly.LAST_EVALUATION)})", "{{query}}"),
            unit="s",
            steps=low_is_good(180, 600),
        ),
        timeseries(
            "Judged processes",
            "Processes whose CUDA memory the agents judge, and tracers connected to them.",
            Query(by("sum", "", scoped(cuda.PROCESSES)), "processes"),
            Query(by("sum", "", scoped(cuda.TRACERS)), "tracers"),
            unit="short",
        ),
        timeseries(
            "Allocations joined with requests",
            "Single allocations that were told, by how they were joined with a request.",
            Query(by("sum", "link", rate(cuda.EVENT_LINKS)), "{{link}}"),
            unit="ops",
        ),
        timeseries(
            "Sidecar: series",
            "Series that the sidecar knows .",
            Query(by("sum", "", scoped(anomaly.SERIES)), "series"),
            unit="short",
        ),
    )


def _traces() -> tuple[Visual, ...]:
    return (
        timeseries(
            "Requests by decision",
            "Ended requests by what the bridge decided: kept (caller, ratio, failed, …) or not (unsampled,"
            " budget).",
            Query(by("sum", "decision", rate(bridge.DECIDED)), "{{decision}}"),
            unit="reqps",
            stacked=True,
        ),
        timeseries(
            "Traces exported and dropped",
            "Traces whose spans the collector accepted, and those that did not reach it, by reason.",
            Query(by("sum", "", rate(bridge.EXPORTED)), "exported"),
            Query(by("sum", "reason", rate(bridge.DROPPED)), "dropped: {{reason}}"),
            unit="ops",
        ),
        timeseries(
            "Collector answers",
            "1 if the latest request to the trace collector was answered. 0: see traces.endpoint and the"
            " collector.",
            Query(by("min", "node, instance", scoped(bridge.UP)), "{{node}} {{instance}}"),
            unit="short",
            limits=(0, 1),
        ),
    )
