"""Alerts about the pack itself: parts that are down, stale, dropping, over their budget or at a cap."""

from __future__ import annotations

from alert_rules.common import (
    MODEL_VARIABLES,
    NODE_VARIABLES,
    both,
    grown,
    longer_than,
    neither,
    per_engine,
    per_node,
)
from gpuglass.families import agent, anomaly, bridge, engine, gpu, probe, tracer
from gpuglass.promql import aggregate, duration, not_equal, over_time, rate, select
from recording_rules import records
from recording_rules.model import Alert
from recording_rules.settings import Settings

NODE = ("cluster", "node")


def alerts(settings: Settings) -> tuple[Alert, ...]:
    """Agent, receiver and probes, tracer, sidecar, trace bridge, caps."""
    return (
        *_agent(settings),
        *_receiver(settings),
        *_tracer(settings),
        *_sidecar(settings),
        *_bridge(settings),
        *_caps(settings),
    )


def _alert(name: str, expression: str, summary: str, description: str, hold: float = 0) -> Alert:
    return Alert(
        name,
        expression,
        "warning",
        "self",
        summary,
        description,
        "gpuglass-health",
        hold=hold,
        variables=NODE_VARIABLES,
    )


def _gone(settings: Settings, seen: str, *labels: str) -> str:
    """Series by node that were there of late and are not now: also where the target has vanished, of which
    `up` says nothing."""
    window = duration(settings.alerts.monitoring.remembered)
    return neither(
        per_node("max", f"max_over_time({seen}[{window}])", *labels), per_node("max", seen, *labels)
    )


def _agent(settings: Settings) -> tuple[Alert, ...]:
    t = settings.alerts.monitoring
    start = select(agent.START_TIME)
    return (
        _alert(
            "GPUGlassAgentDown",
            _gone(settings, start),
            "An agent is gone",
            "The agent on {{ $labels.node }} has not been scraped for "
            f"{longer_than(t.down_for)} (it started at {{{{ $value | "
            f"humanizeTimestamp }}}}).",
            t.down_for,
        ),
        _alert(
            "GPUGlassAgentStale",
            f"{per_node('max', select(gpu.SNAPSHOT_AGE))} > {t.stale_seconds:g}",
            "An agent's GPU figures are old",
            "GPU figures of {{ $labels.node }} are {{ $value | humanizeDuration }} old: the driver "
            "does not answer.",
        ),
        _alert(
            "GPUGlassDriverDown",
            f"{per_node('min', select(gpu.DRIVER_UP))} == 0",
            "An agent cannot load the driver's library",
            f"NVML on {{{{ $labels.node }}}} does not load ({gpu.DRIVER_UP.name} is {{{{ $value }}}}); "
            "`gpuglass doctor` tells why.",
            t.down_for,
        ),
        _alert(
            "GPUGlassConfigRefused",
            f"{per_node('min', select(agent.CONFIG_RELOAD_OK))} == 0",
            "An agent runs with an old configuration because it refused the new one",
            "The agent on {{ $labels.node }} did not take its configuration (success is {{ $value "
            "}}); its log names the key.",
            t.down_for,
        ),
    )


def _receiver(settings: Settings) -> tuple[Alert, ...]:
    t = settings.alerts.monitoring
    window = t.dropped_window
    sender = ("cluster", *probe.SENDER)
    hook_seconds = aggregate("max", sender, rate(probe.HOOK_SECONDS, settings.windows.rate))
    errors = per_engine("max", select(probe.HOOK_ERRORS), "role", "hook")
    return (
        _alert(
            "GPUGlassReceiverDown",
            f"{per_node('min', select(probe.UP))} == 0",
            "An agent cannot open the socket that engines send to",
            f"The receiver on {{{{ $labels.node }}}} is down ({probe.UP.name} is {{{{ $value }}}}): "
            "engines cannot be seen.",
            t.down_for,
        ),
        _alert(
            "GPUGlassReceiverRefusing",
            per_node("sum", f"({grown(probe.REFUSED, window)})", "reason"),
            "An agent refuses what engines send",
            'The receiver on {{ $labels.node }} refused {{ $value | printf "%.0f" }} connections, '
            "packets or records in "
            f"{duration(window)}: {{{{ $labels.reason }}}}.",
        ),
        _of_engine(
            "GPUGlassProbeDown",
            _unprobed(settings),
            "An engine goes on without its probe",
            "{{ $labels.model_name }}{{ with $labels.workload_pod }}, pod {{ . }}{{ end }} had a "
            "probe and is read by its own metrics now ({{ $value }} engine): GPU time, tenants and "
            "holders of its KV cache are missing.",
            t.down_for,
            "gpuglass-requests",
        ),
        _of_engine(
            "GPUGlassProbeDropping",
            per_engine("sum", f"({grown(probe.DROPPED, window)})"),
            "A probe inside an engine drops events",
            "The probe of {{ $labels.model_name }}, engine {{ $labels.engine }} dropped {{ $value | "
            'printf "%.0f" }} events in '
            f"{duration(window)}; sums are complete, single events are missing.",
        ),
        _of_engine(
            "GPUGlassProbeHookOff",
            f"{errors} >= 3",
            "A hook of the probe switched itself off after errors",
            "Hook {{ $labels.hook }} ({{ $labels.role }}) of {{ $labels.model_name }}, engine {{ "
            "$labels.engine }} is off after "
            '{{ $value | printf "%.0f" }} errors: what it measures is missing.',
        ),
        _of_engine(
            "GPUGlassProbeOverBudget",
            f"{per_engine('max', f'({hook_seconds})', 'role')} > {t.probe_cpu_ratio:g}",
            "The probe takes more of an engine's time than its budget",
            "The probe takes {{ $value | humanizePercentage }} of a core in the {{ $labels.role }} of "
            "{{ $labels.model_name }}, engine {{ $labels.engine }}.",
            t.off_for,
        ),
    )


def _unprobed(settings: Settings) -> str:
    """Engines of which a probe told of late, and now only their own metrics do. One that is gone altogether
    is no matter of the probe."""
    by = ("cluster", "model_name", "workload_namespace", "workload_pod")
    window = settings.alerts.monitoring.remembered
    before = aggregate("max", by, over_time("max", records.ENGINE_UP, window))
    now = aggregate("max", by, f"{select(records.ENGINE_UP)} == 1")
    alive = aggregate("group", by, select(records.ENGINE_INFO, dialect=not_equal("probe")))
    return both(neither(before, now), alive)


def _of_engine(
    name: str,
    expression: str,
    summary: str,
    description: str,
    hold: float = 0,
    dashboard: str = "gpuglass-health",
) -> Alert:
    return Alert(
        name,
        expression,
        "warning",
        "self",
        summary,
        description,
        dashboard,
        hold=hold,
        variables=MODEL_VARIABLES,
    )


def _tracer(settings: Settings) -> tuple[Alert, ...]:
    t = settings.alerts.monitoring
    lost = per_node("sum", f"({grown(tracer.LOST, t.dropped_window)})", "what")
    return (
        _alert(
            "GPUGlassTracerDown",
            _gone(settings, select(tracer.START)),
            "A CUDA tracer is gone",
            "The CUDA tracer on {{ $labels.node }} has not been scraped for "
            f"{longer_than(t.down_for)} (it started at {{{{ $value | "
            f"humanizeTimestamp }}}}).",
            t.down_for,
        ),
        _alert(
            "GPUGlassTracerOverBudget",
            per_node("max", select(tracer.STATE, state="over_budget")),
            "A CUDA tracer took its probes off because they cost too much",
            "The CUDA tracer on {{ $labels.node }} is over its budget (state over_budget is {{ $value "
            "}}): CUDA memory is not traced.",
        ),
        _alert(
            "GPUGlassTracerDropping",
            lost,
            "A CUDA tracer loses what it should keep",
            'The CUDA tracer on {{ $labels.node }} lost {{ $value | printf "%.0f" }} {{ $labels.what }} in '
            f"{duration(t.dropped_window)}: its ledger is incomplete.",
        ),
        _alert(
            "GPUGlassTracerNotHeard",
            f"{per_node('max', select(tracer.AGENT_UP))} == 0",
            "A CUDA tracer does not reach the agent",
            "The CUDA tracer on {{ $labels.node }} is not connected to the agent ({{ $value }}): "
            "nothing is judged or joined with requests.",
            t.down_for,
        ),
    )


def _sidecar(settings: Settings) -> tuple[Alert, ...]:
    t = settings.alerts.monitoring
    window = duration(t.remembered)
    # Two replicas publish the same: one that is left is enough. Times are compared with this server's.
    age = f"time() - max by (query) ({select(anomaly.LAST_EVALUATION)})"
    seen = f"max by (query) (max_over_time({select(anomaly.LAST_EVALUATION)}[{window}]))"
    failed = aggregate(
        "sum", ("query",), f"({grown(anomaly.EVALUATIONS, t.dropped_window, result='failed')})"
    )
    good = aggregate("sum", ("query",), f"({grown(anomaly.EVALUATIONS, t.dropped_window, result='ok')})")
    start = select(anomaly.START_TIME)
    return (
        _sidecar_alert(
            "GPUGlassSidecarDown",
            f"(max (max_over_time({start}[{window}])))\nunless\n(max ({start}))",
            "No anomaly sidecar is left",
            "No replica of the anomaly sidecar has been scraped for "
            f"{longer_than(t.down_for)} (the last started at {{{{ $value | "
            f"humanizeTimestamp }}}}): "
            "scores, leaks and forecasts are missing.",
            t.down_for,
        ),
        _sidecar_alert(
            "GPUGlassSidecarStale",
            f"({age} > {t.evaluation_seconds:g})\nand\n({seen})",
            "The anomaly sidecar has not evaluated a query for long",
            "Query {{ $labels.query }} was last evaluated {{ $value | humanizeDuration }} ago.",
        ),
        _sidecar_alert(
            "GPUGlassSidecarFailing",
            neither(failed, good, ("query",)),
            "The anomaly sidecar cannot read a query",
            'Query {{ $labels.query }} failed {{ $value | printf "%.0f" }} times in '
            f"{duration(t.dropped_window)} and never succeeded.",
        ),
    )


def _sidecar_alert(name: str, expression: str, summary: str, description: str, hold: float = 0) -> Alert:
    return Alert(name, expression, "warning", "self", summary, description, "gpuglass-anomalies", hold=hold)


def _bridge(settings: Settings) -> tuple[Alert, ...]:
    t = settings.alerts.monitoring
    return (
        _alert(
            "GPUGlassTracesNotAccepted",
            f"{per_node('min', select(bridge.UP))} == 0",
            "The collector of traces does not answer an agent",
            "The collector does not answer the agent on {{ $labels.node }} "
            f"({bridge.UP.name} is {{{{ $value }}}}).",
            t.down_for,
        ),
        _alert(
            "GPUGlassTracesDropped",
            per_node("sum", f"({grown(bridge.DROPPED, t.dropped_window)})", "reason"),
            "Traces are dropped before the collector has them",
            'The agent on {{ $labels.node }} dropped {{ $value | printf "%.0f" }} traces in '
            f"{duration(t.dropped_window)}: {{{{ $labels.reason }}}}.",
        ),
    )


def _caps(settings: Settings) -> tuple[Alert, ...]:
    t = settings.alerts.monitoring
    tenants = per_node("max", select(engine.TENANT_GPU, tenant="other"))
    processes = per_node("max", select(gpu.PROCESS_MEMORY, process="other"))
    untracked = grown(engine.UNTRACKED, t.dropped_window, reason="limit")
    return (
        _alert(
            "GPUGlassTenantsCapped",
            tenants,
            "Tenants share one series because there are too many",
            'The agent on {{ $labels.node }} sums further tenants into tenant="other" ({{ $value | '
            'printf "%.0f" }} GPU-seconds so far).',
            t.off_for,
        ),
        _alert(
            "GPUGlassProcessesCapped",
            processes,
            "Processes of a GPU share one series because there are too many",
            'The agent on {{ $labels.node }} sums further processes into process="other" ({{ $value | '
            "humanize1024 }}B).",
            t.off_for,
        ),
        _of_engine(
            "GPUGlassRequestsCapped",
            per_engine("sum", f"({untracked})"),
            "Requests are missing in the histograms because too many are open",
            '{{ $value | printf "%.0f" }} requests of {{ $labels.model_name }}, engine {{ '
            "$labels.engine }} were not followed in "
            f"{duration(t.dropped_window)}: more were open than engines.requests allows.",
        ),
    )
