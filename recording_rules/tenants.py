"""Tenant records: GPU time, tokens, requests and KV cache of each tenant, and how much of its quota is used.

In: the probe's families by tenant, quotas (configuration that every agent exports: read through `max by`
only). Out: one series per tenant and model. Engines without the probe do not tell tenants apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpuglass.families import engine
from gpuglass.promql import aggregate, divide, over_time, rate, select
from recording_rules import records as r
from recording_rules.engines import minus
from recording_rules.model import Group, Rule
from recording_rules.options import Options
from recording_rules.settings import Settings

DAY = 86400.0
BY = (*r.TENANT, "model_name")


def groups(settings: Settings, options: Options) -> list[Group]:
    """The groups of tenants and of quotas."""
    if options.source == "dcgm":
        return []
    interval = float(settings.windows.interval)
    return [
        Group("gpuglass-tenants.rules", interval, tuple(_tenants(settings))),
        Group("gpuglass-quotas.rules", float(settings.windows.slow_interval), tuple(_quotas(interval))),
    ]


def _tenants(settings: Settings) -> Iterator[Rule]:
    w = float(settings.windows.rate)
    yield Rule(r.TENANT_GPU_SECONDS, aggregate("sum", BY, rate(engine.TENANT_GPU, w)))
    prompt, cached, output = (
        aggregate("sum", BY, rate(engine.TENANT_TOKENS, w, kind=kind))
        for kind in ("prompt", "cached", "output")
    )
    yield Rule(r.TENANT_TOKENS, minus(prompt, cached), {"kind": "input"})
    yield Rule(r.TENANT_TOKENS, cached, {"kind": "cached"})
    yield Rule(r.TENANT_TOKENS, output, {"kind": "output"})
    yield Rule(r.TENANT_REQUESTS, aggregate("sum", (*BY, "outcome"), rate(engine.TENANT_REQUESTS, w)))
    yield Rule(r.TENANT_KV, aggregate("max", BY, select(engine.TENANT_KV_SHARE)))
    of_model = aggregate("sum", r.MODEL, select(r.TENANT_GPU_SECONDS))
    yield Rule(
        r.TENANT_GPU_SHARE,
        divide(select(r.TENANT_GPU_SECONDS), of_model, on=r.MODEL, group="group_left ()"),
    )
    yield Rule(
        r.FLEET_WASTED_GPU_SECONDS,
        aggregate("sum", ("cluster", "model_name", "tenant", "reason"), rate(engine.WASTED, w)),
    )


def _quotas(interval: float) -> Iterator[Rule]:
    # A sum over samples, not a mean over time: a tenant that was there for an hour used an hour.
    day = aggregate("sum", r.TENANT, over_time("sum", r.TENANT_GPU_SECONDS, DAY))
    yield Rule(r.TENANT_GPU_DAY, f"{day} * {interval:g}")
    quota = aggregate("max", r.TENANT, select(engine.TENANT_GPU_QUOTA))
    yield Rule(r.TENANT_GPU_QUOTA_USED, divide(select(r.TENANT_GPU_DAY), quota, on=r.TENANT))
    share = aggregate("max", r.TENANT, select(engine.TENANT_KV_QUOTA))
    yield Rule(r.TENANT_KV_QUOTA_USED, divide(select(r.TENANT_KV), share, on=r.TENANT, group="group_left ()"))
