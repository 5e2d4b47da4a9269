"""What a rule file is made of, as plain values: records and their rules, alerts, groups.

A `Record` is declared once, at module level in `recording_rules/records.py`, so that rules, alerts and
dashboards name it by an object and a typo is an import error. Its expression depends on settings, so it
stands in a `Rule`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gpuglass.family import UNITS

ADVICE = "gpuglass_advice"
"""The one record without a level: an advice is read by people, beside the families of the catalog."""

LEVELS = ("fleet", "node", "card", "device", "model", "tenant", "engine", "workload")
RECORD_NAME = rf"(({'|'.join(LEVELS)}):[a-z][a-z0-9_]*:[a-z][a-z0-9_]*|{ADVICE})"
"""`level:metric:operation`, as a pattern."""

Severity = Literal["critical", "warning"]
Category = Literal["latency", "memory", "cost", "health", "self"]

_NAME = re.compile(RECORD_NAME + r"\Z")
_LABEL = re.compile(r"[a-z][a-z0-9_]*\Z")
_ALERT = re.compile(r"[A-Z][A-Za-z0-9]{2,63}\Z")


class RuleError(ValueError):
    """A programmer's error: a record or alert declared wrongly."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """Declaration of a recorded series: `unit` is a base unit or a sentence's word such as "GPUs"; labels in
    `optional` may be empty."""

    name: str
    labels: tuple[str, ...]
    unit: str
    help: str

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise RuleError(f"{self.name}: a record's name is level:metric:operation, levels {LEVELS}")
        if bad := [label for label in self.labels if not _LABEL.match(label)]:
            raise RuleError(f"{self.name}: bad label name {bad[0]!r}")
        if len(set(self.labels)) != len(self.labels):
            raise RuleError(f"{self.name}: a label is named twice")
        if not self.help.endswith("."):
            raise RuleError(f"{self.name}: help texts are sentences")
        if self.unit not in UNITS | EXTRA_UNITS:
            raise RuleError(f"{self.name}: unknown unit {self.unit!r}")


EXTRA_UNITS = frozenset(
    {
        "GPUs",
        "requests",
        "requests/s",
        "tokens/s",
        "bytes/s",
        "events",
        "events/s",
        "GPU-seconds/s",
        "GPU-seconds",
        "price/h",
        "price/1k tokens",
    }
)
"""Units that rates and prices have beside the catalog's base units. A price is in the configured currency."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A recording rule. `labels` are constant ones that the rule sets."""

    record: Record
    expression: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alert:
    """An alerting rule; times in seconds, 0 for none.

    `summary` is a sentence without label or value; `description` is a template with numbers. `labels` are
    constant labels besides severity and category. `dashboard` is a dashboard's uid, `variables` its variables
    by the label that fills each (`{"node": "node"}`).
    """

    name: str
    expression: str
    severity: Severity
    category: Category
    summary: str
    description: str
    dashboard: str
    hold: float = 0
    """`for` in the rule file."""
    keep_firing: float = 0
    """`keep_firing_for` in the rule file."""
    variables: Mapping[str, str] = field(default_factory=dict)
    runbook: str = ""
    """File name without `.md` below runbooks/, and maybe an anchor; the alert's own name if empty."""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Templates besides summary and description, such as `saving`."""

    def __post_init__(self) -> None:
        if not _ALERT.match(self.name):
            raise RuleError(f"{self.name}: an alert's name is CamelCase with its component first")
        if "{{" in self.summary or not self.summary or self.summary.endswith("."):
            raise RuleError(f"{self.name}: the summary is a short static sentence without a full stop")
        if "{{" not in self.description:
            raise RuleError(f"{self.name}: the description names labels and numbers")
        if reserved := sorted({"severity", "category", "alertname"} & self.labels.keys()):
            raise RuleError(f"{self.name}: {reserved[0]} is a field, not one of the labels")


@dataclass(frozen=True, slots=True)
class Group:
    """Rules that are evaluated one after the other, each `interval` seconds; a rule sees what those before it
    recorded."""

    name: str
    interval: float
    rules: tuple[Rule | Alert, ...]
