"""Writes groups as rule files: for Prometheus as it reads them, or wrapped for the Prometheus operator.

In: groups, settings, form. Out: the text of a file. The same groups give the same text, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import yaml

from gpuglass.promql import duration
from recording_rules.model import Alert, Group, Rule
from recording_rules.settings import Settings

Form = Literal["prometheus", "prometheusrule"]

HEADER = (
    "# Written by `gpuglass rules build`: changes here are lost; override settings by --config instead.\n"
)


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines stand as they are; lists are indented below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def render(name: str, groups: Iterable[Group], settings: Settings, form: Form = "prometheus") -> str:
    """One rule file. `name` is the object's for the operator."""
    spec: dict[str, Any] = {"groups": [_group(group, settings) for group in groups]}
    if form == "prometheusrule":
        labels = {"app.kubernetes.io/part-of": "gpuglass"}
        spec = {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": name, "labels": labels},
            "spec": spec,
        }
    return HEADER + yaml.dump(spec, Dumper=_Dumper, sort_keys=False, width=4096, allow_unicode=True)


def _group(group: Group, settings: Settings) -> dict[str, Any]:
    rules = [_rule(rule) if isinstance(rule, Rule) else _alert(rule, settings) for rule in group.rules]
    return {"name": group.name, "interval": duration(group.interval), "rules": rules}


def _rule(rule: Rule) -> dict[str, Any]:
    written: dict[str, Any] = {"record": rule.record.name, "expr": rule.expression}
    if rule.labels:
        written["labels"] = dict(rule.labels)
    return written


def _alert(alert: Alert, settings: Settings) -> dict[str, Any]:
    written: dict[str, Any] = {"alert": alert.name, "expr": alert.expression}
    if alert.hold:
        written["for"] = duration(alert.hold)
    if alert.keep_firing:
        written["keep_firing_for"] = duration(alert.keep_firing)
    written["labels"] = {"severity": alert.severity, "category": alert.category, **alert.labels}
    written["annotations"] = texts(alert, settings)
    return written


def texts(alert: Alert, settings: Settings) -> Mapping[str, str]:
    """What an alert tells besides its labels; templates are Prometheus's."""
    runbook, hash_, anchor = (alert.runbook or alert.name).partition("#")
    variables = "&".join(
        f"var-{variable}={{{{ $labels.{label} | urlquery }}}}" for variable, label in alert.variables.items()
    )
    return {
        "summary": alert.summary,
        "description": alert.description,
        "runbook_url": f"{settings.runbook_base}/{runbook}{settings.runbook_suffix}{hash_}{anchor}",
        "dashboard_url": f"{settings.dashboard_base}/{alert.dashboard}" + (variables and f"?{variables}"),
        **alert.annotations,
    }
