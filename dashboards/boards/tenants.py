"""Tenants and quotas: who uses GPU time, KV cache and tokens, what is left of quotas and when it ends."""

from __future__ import annotations

from dashboards import links
from dashboards.board import Board, Options, section
from dashboards.links import label, to
from dashboards.panels import Query, Visual, bargauge, low_is_good, stat, timeseries
from dashboards.queries import by, increase, quotient, rate, scoped
from dashboards.tables import Column, table
from gpuglass.families import anomaly, engine
from gpuglass.promql import not_equal, regex
from recording_rules import records

_QUOTA = low_is_good(0.8, 1)


def board(_: Options) -> Board:
    """The dashboard."""
    return Board(
        links.TENANTS,
        "Tenants and quotas",
        "Who uses what: GPU time, KV cache, tokens, requests, cost; and how much of their quotas is left.",
        (
            section("Now", *_now()),
            section("Use", *_use()),
            section("Quotas", *_quotas()),
            section("Requests and neighbours", *_requests()),
        ),
        start="now-6h",
    )


def _now() -> tuple[Visual, ...]:
    return (
        stat(
            "Tenants",
            "Tenants that used GPU time lately.",
            Query(f"count ({by('sum', 'tenant', scoped(records.TENANT_GPU_SECONDS))} > 0)"),
            unit="short",
            size=(5, 4),
        ),
        stat(
            "GPU time",
            "GPUs' worth of time that the chosen tenants use.",
            Query(by("sum", "", scoped(records.TENANT_GPU_SECONDS))),
            unit="short",
            decimals=2,
            size=(5, 4),
        ),
        stat(
            "Output tokens",
            "Tokens made for the chosen tenants.",
            Query(by("sum", "", scoped(records.TENANT_TOKENS, kind="output"))),
            unit="tokens/s",
            decimals=0,
            size=(5, 4),
        ),
        stat(
            "Fullest quota",
            "Largest share of a daily GPU quota that is used up.",
            Query(by("max", "", scoped(records.TENANT_GPU_QUOTA_USED))),
            unit="percentunit",
            decimals=0,
            steps=_QUOTA,
            size=(5, 4),
        ),
        stat(
            "Cost per hour",
            "Usage cost of the chosen tenants, in the currency of the configured prices.",
            Query(by("sum", "", scoped(records.TENANT_COST, basis="usage"))),
            unit="short",
            decimals=2,
            size=(4, 4),
        ),
    )


def _use() -> tuple[Visual, ...]:
    open_tenant = [to(links.TENANTS, "Only this tenant", tenant=label("tenant"))]
    kv = by("sum", "tenant", rate(engine.TENANT_KV))
    return (
        timeseries(
            "GPU time",
            "GPUs' worth of time by tenant: 2 means two GPUs all the time.",
            Query(by("sum", "tenant", scoped(records.TENANT_GPU_SECONDS)), "{{tenant}}"),
            unit="short",
            stacked=True,
            links=open_tenant,
        ),
        timeseries(
            "KV cache",
            "Bytes of KV cache that each tenant's requests hold (byte-seconds per second).",
            Query(kv, "{{tenant}}"),
            unit="bytes",
            stacked=True,
            links=open_tenant,
        ),
        timeseries(
            "Tokens",
            "Tokens of the chosen tenants by kind: input is computed, cached comes from the prefix cache.",
            Query(by("sum", "kind", scoped(records.TENANT_TOKENS)), "{{kind}}"),
            unit="tokens/s",
            stacked=True,
        ),
        table(
            "Tenants over the shown range",
            "What each tenant used in the shown time range.",
            Column("GPU-seconds", by("sum", "tenant", increase(engine.TENANT_GPU)), "s", 0, bar=True),
            Column("KV byte-seconds", by("sum", "tenant", increase(engine.TENANT_KV)), "short", 1),
            Column(
                "Prompt tokens",
                by("sum", "tenant", increase(engine.TENANT_TOKENS, kind="prompt")),
                "short",
                1,
            ),
            Column("Cached", by("sum", "tenant", increase(engine.TENANT_TOKENS, kind="cached")), "short", 1),
            Column(
                "Output tokens",
                by("sum", "tenant", increase(engine.TENANT_TOKENS, kind="output")),
                "short",
                1,
            ),
            Column("Requests", by("sum", "tenant", increase(engine.TENANT_REQUESTS)), "short", 0),
            Column("Preempted", by("sum", "tenant", increase(engine.TENANT_PREEMPTIONS)), "short", 0),
            Column(
                "Cost per hour (usage)",
                by("sum", "tenant", scoped(records.TENANT_COST, basis="usage")),
                "short",
                2,
            ),
            labels={"tenant": "Tenant"},
            sort="GPU-seconds",
            size=(24, 9),
            links={
                "Tenant": [
                    to(links.TENANTS, "Only this tenant", tenant=links.cell("Tenant")),
                    to(links.REQUESTS, "Its requests", tenant=links.cell("Tenant")),
                ]
            },
        ),
        timeseries(
            "Share of each model's GPU time",
            "Tenant's share of the model. One near 1 has the model for itself.",
            Query(scoped(records.TENANT_GPU_SHARE), "{{tenant}} {{model_name}}"),
            unit="percentunit",
            limits=(0, 1),
            size=(12, 8),
        ),
        timeseries(
            "Cost",
            "Cost per hour by tenant: usage is GPU time used; allocation its part of all that the engines"
            " hold.",
            Query(by("sum", "tenant", scoped(records.TENANT_COST, basis="usage")), "{{tenant}} usage"),
            Query(
                by("sum", "tenant", scoped(records.TENANT_COST, basis="allocation")), "{{tenant}} allocation"
            ),
            unit="short",
            size=(12, 8),
            links=[to(links.COST, "Cost")],
        ),
    )


def _quotas() -> tuple[Visual, ...]:
    quota = by("max", "tenant", scoped(engine.TENANT_GPU_QUOTA))
    day = by("sum", "tenant", scoped(records.TENANT_GPU_DAY))
    pace = by("sum", "tenant", increase(engine.TENANT_GPU, "1h"))
    left = f"clamp_min ({quota} - on (tenant) {day}, 0)"
    return (
        bargauge(
            "Daily GPU quota used",
            "GPU time of the last 24 hours ÷ the tenant's quota. At 1 the quota is used up.",
            Query(by("max", "tenant", scoped(records.TENANT_GPU_QUOTA_USED)), "{{tenant}}", instant=True),
            unit="percentunit",
            limits=(0, 1),
            steps=_QUOTA,
            decimals=0,
        ),
        bargauge(
            "KV quota used",
            "Share of KV cache held ÷ the tenant's quota, worst model.",
            Query(by("max", "tenant", scoped(records.TENANT_KV_QUOTA_USED)), "{{tenant}}", instant=True),
            unit="percentunit",
            limits=(0, 1),
            steps=_QUOTA,
            decimals=0,
        ),
        table(
            "Hours to the quota",
            "How long the rest of the daily quota lasts: at the pace of the last hour, and as the sidecar"
            " forecasts it (median).",
            Column("Left", left, "s", 0),
            Column("Lasts at this pace", quotient(left, f"{pace} / 3600", "tenant"), "s", 1),
            Column(
                "Lasts by forecast",
                by("min", "tenant", scoped(anomaly.EXHAUSTION, quantile="0.5", tenant=not_equal(""))),
                "s",
                1,
            ),
            labels={"tenant": "Tenant"},
            sort="Left",
            size=(8, 8),
        ),
        timeseries(
            "Quota used over time",
            "GPU time of the last 24 hours ÷ quota.",
            Query(by("max", "tenant", scoped(records.TENANT_GPU_QUOTA_USED)), "{{tenant}}"),
            unit="percentunit",
            steps=_QUOTA,
            size=(24, 7),
        ),
    )


def _requests() -> tuple[Visual, ...]:
    ended = by(
        "sum",
        "tenant, outcome, error_type",
        rate(engine.TENANT_REQUESTS, outcome=regex("error|rejected|abort")),
    )
    return (
        timeseries(
            "In flight",
            "Requests of each tenant that have not ended, by state.",
            Query(by("sum", "tenant, state", scoped(engine.TENANT_IN_FLIGHT)), "{{tenant}} {{state}}"),
            unit="short",
            stacked=True,
        ),
        timeseries(
            "Failed, rejected, aborted",
            "Requests that did not end well, by error type.",
            Query(ended, "{{tenant}} {{outcome}} {{error_type}}"),
            unit="reqps",
        ),
        timeseries(
            "Preempted",
            "Requests of a tenant that lost their KV blocks: victims of a neighbour or of themselves.",
            Query(by("sum", "tenant", rate(engine.TENANT_PREEMPTIONS)), "{{tenant}}"),
            unit="ops",
        ),
        timeseries(
            "Hogging beside preempted",
            "Seconds that a tenant's single requests held more than a quarter of a KV cache, per second, with"
            " dots for the requests. Who hogs while others are preempted is a noisy neighbour.",
            Query(by("sum", "tenant", rate(engine.KV_HOG_SECONDS)), "{{tenant}}", exemplar=True),
            unit="short",
            size=(24, 8),
        ),
    )
