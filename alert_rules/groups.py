"""All groups of alerting rules, one per category of cause."""

from __future__ import annotations

from alert_rules import balance, cost, health, latency, memory, monitoring
from recording_rules.model import Alert, Group
from recording_rules.settings import Settings


def groups(settings: Settings) -> list[Group]:
    """Groups of alerting rules; those about money and about the pack itself can wait."""
    fast, slow = settings.windows.interval, settings.windows.slow_interval
    return [
        Group("gpuglass-health", fast, health.alerts(settings)),
        Group("gpuglass-latency", fast, latency.alerts(settings)),
        Group("gpuglass-memory", fast, memory.alerts(settings)),
        Group("gpuglass-balance", fast, balance.alerts(settings)),
        Group("gpuglass-cost", slow, cost.alerts(settings)),
        Group("gpuglass-self", slow, monitoring.alerts(settings)),
    ]


def alerts(settings: Settings) -> list[Alert]:
    """All alerts, in the order of their groups."""
    return [rule for group in groups(settings) for rule in group.rules if isinstance(rule, Alert)]
