"""The variables and annotations that the dashboards share.

In: families and records whose series know the values. Out: entries of a dashboard's `templating` and
`annotations`. "All" is the pattern `.*`, which also fits series that lack the label: a fleet without a
`cluster` label works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from dashboards.panels import DATASOURCE
from gpuglass.families import agent, engine
from recording_rules import records
from recording_rules.model import Category

ALERTS = "ALERTS"
"""Prometheus' own series about alerts."""
CATEGORIES = get_args(Category)
_HIDE_ALL = 2
_ON_TIME_CHANGE = 2
_ALPHABETICAL = 1


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable whose values are those of a label, or fixed ones (`choices`: text and value)."""

    name: str
    label: str
    query: str = ""
    choices: tuple[tuple[str, str], ...] = ()
    multi: bool = True
    hidden: bool = False
    about: str = ""

    def as_json(self) -> dict[str, Any]:
        """The entry in `templating`."""
        entry: dict[str, Any] = {
            "name": self.name,
            "label": self.label,
            "hide": _HIDE_ALL if self.hidden else 0,
        }
        entry |= {"description": self.about, "skipUrlSync": False}
        if self.choices:
            options = [
                {"text": text, "value": value, "selected": not index}
                for index, (text, value) in enumerate(self.choices)
            ]
            return entry | {
                "type": "custom",
                "query": ",".join(f"{text} : {value}" for text, value in self.choices),
                "current": options[0],
                "options": options,
                "multi": False,
                "includeAll": False,
            }
        everything = (
            {"text": ["All"], "value": ["$__all"]} if self.multi else {"text": "All", "value": "$__all"}
        )
        return entry | {
            "type": "query",
            "datasource": DATASOURCE,
            "definition": self.query,
            "query": {"query": self.query, "refId": f"variable-{self.name}", "qryType": 1},
            "refresh": _ON_TIME_CHANGE,
            "sort": _ALPHABETICAL,
            "regex": "",
            "multi": self.multi,
            "includeAll": True,
            "allValue": ".*",
            "current": everything,
            "options": [],
        }


def shared() -> tuple[Variable, ...]:
    """The variables of every dashboard, each chosen from within those before it."""
    up, engines, tenants = records.DEVICE_INFO.name, records.ENGINE_INFO.name, records.TENANT_TOKENS.name
    here = 'cluster=~"$cluster"'
    return (
        Variable("cluster", "Cluster", f"label_values({up}, cluster)"),
        Variable("node", "Node", f"label_values({up}{{{here}}}, node)"),
        Variable("gpu_uuid", "GPU", f'label_values({up}{{{here}, node=~"$node"}}, gpu_uuid)'),
        Variable("model_name", "Model", f"label_values({engines}{{{here}}}, model_name)"),
        Variable("tenant", "Tenant", f'label_values({tenants}{{{here}, model_name=~"$model_name"}}, tenant)'),
    )


def datasource(uid: str) -> dict[str, Any]:
    """The choice of a Prometheus."""
    return {
        "name": "datasource",
        "label": "Data source",
        "description": "Prometheus with the pack's series",
        "type": "datasource",
        "query": "prometheus",
        "regex": "",
        "hide": 0,
        "multi": False,
        "includeAll": False,
        "refresh": 1,
        "options": [],
        "current": {"text": uid, "value": uid} if uid else {},
        "skipUrlSync": False,
    }


def traces(kind: str) -> dict[str, Any]:
    """The choice of a Tempo or Jaeger."""
    return datasource("") | {
        "name": "traces",
        "label": "Traces",
        "description": "where the agent's spans are stored",
        "query": kind,
    }


ABOUT = ("node", "gpu_uuid", "model_name", "tenant")


def alerts(*about: str, **matchers: str) -> str:
    """A selector of the pack's own alerts: they all have one of our categories. An alert that lacks a
    label of
    `about` is shown whatever is chosen for it: one about a model is about no GPU."""
    matchers = {"category": ""} | matchers
    parts = [f'{name}="{value}"' for name, value in matchers.items() if value]
    if not matchers["category"]:
        parts.append(f'category=~"{"|".join(CATEGORIES)}"')
    parts += [f'{name}=~"${name}|"' for name in about]
    return f'{ALERTS}{{{", ".join(parts)}, cluster=~"$cluster"}}'


def marks() -> list[dict[str, Any]]:
    """Marks on all panels over time: alerts that fire, restarts, deployments."""
    started, info = agent.START_TIME.name, engine.INFO.name
    scope = 'cluster=~"$cluster"'
    by = "cluster, model_name, engine_version"
    return [
        _annotation(
            "Alerts",
            f"max by (alertname, severity, node, model_name) ({alerts(alertstate='firing')})",
            "#D55E00",
            "{{alertname}}",
            "{{severity}} {{node}} {{model_name}}",
        ),
        _annotation(
            "Restarts of agents",
            f"changes(max by (cluster, node, instance) ({started}{{{scope}}})[5m:30s]) > 0",
            "#999999",
            "agent restarted",
            "{{node}} {{instance}}",
        ),
        _annotation(
            "Deployments",
            f"count by ({by}) ({info}{{{scope}}}) unless count by ({by}) ({info}{{{scope}}} offset 5m)",
            "#56B4E9",
            "{{model_name}} {{engine_version}}",
            "an engine with this version came up",
        ),
    ]


def _annotation(name: str, expr: str, colour: str, title: str, text: str) -> dict[str, Any]:
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": colour,
        "expr": expr,
        "step": "60s",
        "titleFormat": title,
        "textFormat": text,
        "tagKeys": "",
        "useValueForTime": False,
    }
