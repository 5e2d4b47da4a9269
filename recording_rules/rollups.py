"""Compact series for long ranges: a fifth of the samples of what they average, for dashboards over weeks."""

from __future__ import annotations

from gpuglass.promql import over_time
from recording_rules import records as r
from recording_rules.model import Group, Rule
from recording_rules.settings import Settings

ROLLUPS = (
    (r.DEVICE_ACTIVE_ROLLUP, r.DEVICE_ACTIVE),
    (r.DEVICE_MEMORY_ROLLUP, r.DEVICE_MEMORY_USED),
    (r.DEVICE_POWER_ROLLUP, r.DEVICE_POWER),
    (r.ENGINE_KV_ROLLUP, r.ENGINE_KV_USED),
    (r.MODEL_TOKENS_ROLLUP, r.MODEL_TOKENS),
    (r.MODEL_COST_ROLLUP, r.MODEL_COST),
    (r.FLEET_COST_ROLLUP, r.FLEET_COST_PART),
    (r.WORKLOAD_GPUS_ROLLUP, r.WORKLOAD_GPUS),
)


def groups(settings: Settings) -> list[Group]:
    """The one group of rollups."""
    interval = float(settings.windows.long_interval)
    rules = (Rule(rollup, over_time("avg", record, interval)) for rollup, record in ROLLUPS)
    return [Group("gpuglass-rollups.rules", interval, tuple(rules))]
