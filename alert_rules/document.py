"""The table of alerts in README.md.

In: the alerts with default settings, and those that have to be asked for. Out: a Markdown table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from alert_rules import groups
from gpuglass.promql import duration
from recording_rules.document import markdown
from recording_rules.model import Alert
from recording_rules.settings import Settings, parse

_ALL = {"alerts": {"cost": {"target_per_1k_tokens": 1}}}
"""Settings with which every alert exists."""


def alert_table() -> str:
    """All alerts in the order of their groups."""
    default = {(alert.name, alert.severity) for alert in groups.alerts(Settings())}
    rows = (
        (
            f"`{alert.name}`",
            alert.severity,
            alert.category,
            _when(alert, (alert.name, alert.severity) in default),
            f"[{alert.name}](runbooks/{alert.name}.md)",
        )
        for alert in groups.alerts(parse(_ALL, "all alerts"))
    )
    return markdown(("alert", "severity", "category", "when", "runbook"), rows)


def _when(alert: Alert, by_default: bool) -> str:
    held = f", for {duration(alert.hold)}" if alert.hold else ""
    shown = f"; shown for {duration(alert.keep_firing)}" if alert.keep_firing else ""
    asked = "" if by_default else " (only where a target is set)"
    return f"{alert.summary}{held}{shown}{asked}"


TABLES: Mapping[str, Callable[[], str]] = {"alerts": alert_table}
