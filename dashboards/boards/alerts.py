"""Alerts and advice: what fires now, what fired, and which changes the data supports."""

from __future__ import annotations

from dashboards import links
from dashboards.board import Board, Options, section
from dashboards.links import to
from dashboards.panels import Query, Visual, low_is_good, stat, timeline, timeseries, value_mapping
from dashboards.queries import by, scoped
from dashboards.tables import Column, table
from dashboards.variables import ABOUT, alerts
from gpuglass.promql import regex
from recording_rules import records

_ABOUT = "alertname, severity, category"
_WHERE = f"{_ABOUT}, cluster, node, device, gpu_uuid, model_name, tenant, workload_pod"
_STATES = value_mapping((("1", "pending", "#E69F00"), ("2", "firing", "#D55E00")))


_ADVICE = scoped(records.ADVICE, **{name: regex(f"${name}|") for name in ("node", "gpu_uuid", "model_name")})
"""Advice about the chosen things, and about those that have no such label."""


def board(_: Options) -> Board:
    """The dashboard."""
    return Board(
        links.ALERTS,
        "Alerts and advice",
        "Alerts of the pack, firing and pending, and the changes that the data supports, each with its"
        " evidence.",
        (section("Now", *_now()), section("Alerts", *_alerts()), section("Advice", *_advice())),
        start="now-6h",
    )


def _count(**matchers: str) -> str:
    return f"count ({alerts(*ABOUT, alertstate='firing', **matchers)}) or vector(0)"


def _now() -> tuple[Visual, ...]:
    return (
        stat(
            "Critical",
            "Alerts that page: users notice, or money is lost.",
            Query(_count(severity="critical")),
            unit="short",
            steps=low_is_good(1, 1),
            size=(4, 4),
        ),
        stat(
            "Warning",
            "Alerts that are tickets.",
            Query(_count(severity="warning")),
            unit="short",
            steps=low_is_good(1, 10),
            size=(4, 4),
        ),
        *(
            stat(
                title,
                f"Firing alerts of category {category}.",
                Query(_count(category=category)),
                unit="short",
                steps=low_is_good(1, 5),
                size=(3, 4),
            )
            for title, category in (
                ("Latency", "latency"),
                ("Memory", "memory"),
                ("Cost", "cost"),
                ("Health", "health"),
            )
        ),
        stat(
            "Advice",
            "Changes that the data supports.",
            Query(f"count ({_ADVICE}) or vector(0)"),
            unit="short",
            size=(4, 4),
        ),
    )


def _alerts() -> tuple[Visual, ...]:
    firing = by("max", _WHERE, alerts(*ABOUT, alertstate="firing"))
    state = (
        f"max by ({_ABOUT}) ({alerts(*ABOUT, alertstate='firing')} * 2 or"
        f" {alerts(*ABOUT, alertstate='pending')})"
    )
    return (
        table(
            "Firing",
            "What fires now and about what. The alert's annotations (Alertmanager, or Grafana's alert list)"
            " have numbers and the runbook; the link opens the GPU, model or tenant.",
            Column("Firing", firing, values=(("1", "firing", "#D55E00"),)),
            labels={
                "alertname": "Alert",
                "severity": "Severity",
                "category": "Category",
                "node": "Node",
                "device": "Device",
                "gpu_uuid": "GPU",
                "model_name": "Model",
                "tenant": "Tenant",
                "workload_pod": "Pod",
            },
            hidden=("cluster",),
            links={
                "GPU": [to(links.GPU, "This GPU", gpu_uuid=links.cell("GPU"))],
                "Model": [to(links.REQUESTS, "Requests of this model", model_name=links.cell("Model"))],
                "Tenant": [to(links.TENANTS, "This tenant", tenant=links.cell("Tenant"))],
            },
            size=(24, 9),
        ),
        timeline(
            "Alerts over time",
            "Every alert that was pending or fired in the shown range.",
            Query(state, "{{alertname}} ({{severity}})"),
            mappings=_STATES,
            size=(16, 12),
        ),
        timeseries(
            "Firing by category",
            "How many fire at once.",
            Query(by("count", "category", alerts(*ABOUT, alertstate="firing")), "{{category}}"),
            unit="short",
            stacked=True,
            size=(8, 12),
        ),
    )


def _advice() -> tuple[Visual, ...]:
    about = "id, cluster, node, model_name, model, gpu_uuid, query, workload_namespace, workload_pod, process"
    return (
        table(
            "Advice",
            "Changes of configuration that the data supports. id names the section of the advice runbook, the"
            " value is the evidence that is explained there. Two of them never contradict each other.",
            Column("Evidence", by("max", about, _ADVICE), "short", 3),
            labels={
                "id": "Advice",
                "model_name": "Model",
                "model": "Card",
                "node": "Node",
                "gpu_uuid": "GPU",
                "workload_namespace": "Namespace",
                "workload_pod": "Pod",
                "process": "Process",
            },
            hidden=("cluster", "query"),
            links={
                "GPU": [to(links.GPU, "This GPU", gpu_uuid=links.cell("GPU"))],
                "Model": [to(links.REQUESTS, "Requests of this model", model_name=links.cell("Model"))],
            },
            size=(24, 8),
        ),
        timeline(
            "Advice over time",
            "Since when each advice holds.",
            Query(by("count", "id, model_name", _ADVICE) + " > bool 0", "{{id}} {{model_name}}"),
            mappings=value_mapping((("1", "advised", "#56B4E9"),)),
            size=(24, 8),
        ),
    )
