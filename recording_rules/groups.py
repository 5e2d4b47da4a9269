"""All groups of recording rules, in the order in which a series passes through them."""

from __future__ import annotations

from recording_rules import advice, cost, devices, engines, latency, rollups, tenants
from recording_rules.model import Group
from recording_rules.options import DEFAULT, Options
from recording_rules.settings import Settings

__all__ = ["DEFAULT", "Options", "groups"]


def groups(settings: Settings, options: Options = DEFAULT) -> list[Group]:
    """Groups of recording rules."""
    return [
        *devices.groups(settings, options),
        *engines.groups(settings, options),
        *latency.groups(settings, options),
        *tenants.groups(settings, options),
        *cost.groups(settings, options),
        *rollups.groups(settings),
        *advice.groups(settings, options),
    ]
