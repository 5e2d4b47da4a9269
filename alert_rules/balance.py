"""Alerts about work that is spread unevenly: experts, ranks, engines of a model, tenants and their quotas."""

from __future__ import annotations

from alert_rules.common import (
    ENGINE_NAME,
    MODEL_VARIABLES,
    TENANT_VARIABLES,
    both,
    per_engine,
    requests_url,
)
from gpuglass.families import anomaly, engine
from gpuglass.promql import aggregate, first_of, labelled, not_equal, select
from recording_rules import records
from recording_rules.model import Alert
from recording_rules.records import ENGINE, MODEL, TENANT
from recording_rules.settings import Settings


def alerts(settings: Settings) -> tuple[Alert, ...]:
    """Experts, ranks, engines, tenants."""
    return (
        _expert_imbalance(settings),
        _expert_hot(settings),
        _straggler(settings),
        _idle_beside_queue(settings),
        _quota_near(settings),
        _quota_exceeded(settings),
        _noisy(settings),
    )


def _expert_imbalance(settings: Settings) -> Alert:
    t = settings.alerts.balance
    return Alert(
        "ExpertImbalance",
        f"{select(records.ENGINE_EXPERT_IMBALANCE)} > {t.expert_imbalance:g}",
        "warning",
        "latency",
        "Experts of a model are loaded unevenly",
        f'The busiest expert of {ENGINE_NAME}, has {{{{ $value | printf "%.1f" }}}} times the mean '
        "load of its layer.",
        "gpuglass-experts",
        hold=t.expert_for,
        variables=MODEL_VARIABLES,
    )


def _expert_hot(settings: Settings) -> Alert:
    t = settings.alerts.balance
    return Alert(
        "ExpertHot",
        f"{per_engine('max', select(engine.EXPERT_HOTTEST_SHARE), 'layer')} > {t.expert_hot_ratio:g}",
        "warning",
        "latency",
        "One expert takes most of a layer's tokens",
        f"One expert of layer {{{{ $labels.layer }}}} of {ENGINE_NAME}, takes {{{{ $value | "
        f"humanizePercentage }}}} of its choices.",
        "gpuglass-experts",
        hold=t.expert_for,
        variables=MODEL_VARIABLES,
    )


def _straggler(settings: Settings) -> Alert:
    t = settings.alerts.balance
    labels = (*ENGINE, "rank", "gpu_uuid")
    seconds = select(records.ENGINE_STEP_SECONDS)
    mean = aggregate("avg", ENGINE, seconds)
    slow = f"{seconds} / on ({', '.join(ENGINE)}) group_left () {mean} > {t.straggler_ratio:g}"
    ranks = aggregate("max", labels, select(anomaly.STRAGGLER, rank=not_equal("")))
    ratio = aggregate("max", labels, select(anomaly.STRAGGLER_RATIO, rank=not_equal("")))
    by_sidecar = both(ratio, f"{ranks} == 1", labels)
    return Alert(
        "TensorParallelStraggler",
        first_of(slow, by_sidecar, on=labels),
        "warning",
        "latency",
        "One rank of an engine is slower than the others, which wait for it",
        f"Rank {{{{ $labels.rank }}}} of {ENGINE_NAME}, on {{{{ $labels.gpu_uuid }}}} takes "
        '{{ $value | printf "%.2f" }} times as long as the ranks do on average.',
        "gpuglass-requests",
        hold=t.straggler_for,
        variables={**MODEL_VARIABLES, "gpu_uuid": "gpu_uuid"},
    )


def _idle_beside_queue(settings: Settings) -> Alert:
    t = settings.alerts.balance
    queued = aggregate("max", MODEL, f"{select(records.ENGINE_WAITING)} > {t.queue_requests:g}")
    idle = both(f"{select(records.ENGINE_RUNNING)} == 0", f"{select(records.ENGINE_WAITING)} == 0")
    return Alert(
        "EngineIdleBesideQueue",
        both(queued, aggregate("count", MODEL, idle), MODEL),
        "warning",
        "latency",
        "One engine of a model idles while requests queue at another",
        '{{ $value | printf "%.0f" }} requests wait at one engine of {{ $labels.model_name }} while '
        "another one has nothing to do.",
        "gpuglass-requests",
        hold=t.queue_for,
        variables=MODEL_VARIABLES,
    )


def _quota_used() -> str:
    """Share of a quota that is used up, by tenant and quota (gpu of the last day, kv now)."""
    gpu = labelled(select(records.TENANT_GPU_QUOTA_USED), "quota", "gpu")
    kv = labelled(aggregate("max", TENANT, select(records.TENANT_KV_QUOTA_USED)), "quota", "kv")
    return f"({first_of(gpu, kv)})"


_QUOTA = (
    "Tenant {{ $labels.tenant }} has used {{ $value | humanizePercentage }} of its "
    '{{ if eq $labels.quota "gpu" }}GPU time of 24 hours{{ else }}share of the KV cache{{ end }}.'
)


def _quota_near(settings: Settings) -> Alert:
    t = settings.alerts.tenants
    used = _quota_used()
    return Alert(
        "TenantQuotaNear",
        both(f"{used} >= {t.quota_near_ratio:g}", f"{used} < 1"),
        "warning",
        "cost",
        "A tenant has used most of its quota",
        _QUOTA,
        "gpuglass-tenants",
        hold=t.quota_for,
        variables=TENANT_VARIABLES,
    )


def _quota_exceeded(settings: Settings) -> Alert:
    return Alert(
        "TenantQuotaExceeded",
        f"{_quota_used()} >= 1",
        "warning",
        "cost",
        "A tenant has used up its quota",
        _QUOTA,
        "gpuglass-tenants",
        hold=settings.alerts.tenants.quota_for,
        variables=TENANT_VARIABLES,
    )


def _noisy(settings: Settings) -> Alert:
    t = settings.alerts.tenants
    share = f"{select(records.TENANT_GPU_SHARE, tenant=not_equal('none'))} > {t.noisy_share_ratio:g}"
    others = f"count by ({', '.join(MODEL)}) ({select(records.TENANT_GPU_SECONDS)} > 0) > 1"
    queue = f"{select(records.MODEL_WAITING)} > 0"
    return Alert(
        "TenantNoisyNeighbour",
        both(both(share, others, MODEL), queue, MODEL),
        "warning",
        "latency",
        "One tenant takes most of a model's GPU time while others queue",
        "Tenant {{ $labels.tenant }} takes {{ $value | humanizePercentage }} of the GPU time of {{ "
        "$labels.model_name }}, "
        "and requests wait.",
        "gpuglass-tenants",
        hold=t.noisy_for,
        variables={**MODEL_VARIABLES, "tenant": "tenant"},
        annotations={"traces_url": requests_url(settings.dashboard_base)},
    )
