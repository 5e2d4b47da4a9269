"""Links: from dashboard to dashboard, from a cell to the GPU, request or alert behind it.

In: a uid of ours and what to set there. Out: URLs with Grafana's own variables in them; all keep the
choice of variables and the time. Every uid is one of `UIDS`, which the check holds against the dashboards
that there are.
"""

from __future__ import annotations

import re

from grafanalib import core

from dashboards.panels import Link

COMPUTE_MAP = "gpuglass-compute-map"
GPU = "gpuglass-gpu"
REQUESTS = "gpuglass-requests"
EXPERTS = "gpuglass-experts"
TENANTS = "gpuglass-tenants"
COST = "gpuglass-cost"
CUDA_MEMORY = "gpuglass-cuda-memory"
ANOMALIES = "gpuglass-anomalies"
JOBS = "gpuglass-jobs"
ALERTS = "gpuglass-alerts"
HEALTH = "gpuglass-health"
UIDS = (
    COMPUTE_MAP,
    GPU,
    REQUESTS,
    EXPERTS,
    TENANTS,
    COST,
    CUDA_MEMORY,
    ANOMALIES,
    JOBS,
    ALERTS,
    HEALTH,
)
MOMENT = "300000"
"""Milliseconds around a clicked moment that the linked dashboard shows."""
_KEPT = ("datasource", "cluster", "node", "gpu_uuid", "model_name", "tenant")


def url(uid: str, time: str = "${__url_time_range}", **sets: str) -> str:
    """Address of a dashboard, the variables in `sets` set to these texts and all others kept."""
    kept = [f"${{{name}:queryparam}}" for name in _KEPT if name not in sets]
    return f"/d/{uid}?" + "&".join([time, *(f"var-{name}={value}" for name, value in sets.items()), *kept])


def label(name: str) -> str:
    """The clicked series' label, safe in an address."""
    return f"${{__field.labels.{name}:percentencode}}"


def cell(name: str) -> str:
    """Text of a column in the clicked row of a table, safe in an address."""
    return f'${{__data.fields["{name}"]:percentencode}}'


def to(uid: str, title: str, **sets: str) -> Link:
    """Opens a dashboard for the time range that is shown now."""
    return Link(title, url(uid, **sets))


def at_moment(uid: str, title: str, **sets: str) -> Link:
    """Opens a dashboard for the minutes around the clicked value (Grafana 11.3 and later; earlier ones
    show their default range)."""
    return Link(title, url(uid, f"time=${{__value.time}}&time.window={MOMENT}", **sets))


def menu(tag: str) -> core.DashboardLink:
    """The drop-down with all dashboards of the pack, on top of each."""
    return core.DashboardLink(
        title="GPUGlass", tags=[tag], type="dashboards", asDropdown=True, includeVars=True, keepTime=True
    )


def targets_of(text: str) -> frozenset[str]:
    """uids that a dashboard's JSON text links to."""
    return frozenset(re.findall(r"/d/([\w-]+)", text))
