"""Thresholds of the alerts, each with its unit, its bounds and its reason; in `recording_rules.settings`.

Ratios are shares from 0 to 1. What is called `…_for` is how long a condition has to hold before it alerts.
"""

from __future__ import annotations

from typing import Annotated

from gpuglass.config import Seconds
from recording_rules.section import DAY, Section, between

MIB = float(1 << 20)


def _hold(why: str) -> object:
    return between(0, DAY, "s", why)


class MemoryAlerts(Section, frozen=True):
    """GPU memory and KV cache."""

    leak_window: Annotated[
        Seconds, between(10, DAY, "s", "an hour of five-minute floors tells a leak from a step")
    ] = Seconds(3600)
    leak_bytes_per_second: Annotated[
        float, between(1, 1e12, "bytes/s", "a quarter of a GiB an hour: 80 GB are full in two weeks")
    ] = 75_000.0
    leak_for: Annotated[Seconds, _hold("verdicts of tracer and sidecar have waited before")] = Seconds(300)
    out_of_memory_window: Annotated[
        Seconds, between(30, DAY, "s", "an event is shown so long that somebody sees it")
    ] = Seconds(900)
    kv_full_ratio: Annotated[
        float, between(0, 1, "ratio", "from here on the next long prompt preempts somebody")
    ] = 0.95
    kv_full_for: Annotated[Seconds, _hold("a burst fills the pool and drains within minutes")] = Seconds(600)
    hog_request_ratio: Annotated[
        float, between(0, 1, "ratio", "one request that holds half of the pool halves the batch")
    ] = 0.5
    hog_tenant_ratio: Annotated[
        float, between(0, 1, "ratio", "a tenant may use an idle engine; above this others wait for it")
    ] = 0.7
    hog_for: Annotated[Seconds, _hold("a single long prompt passes within a minute")] = Seconds(60)
    preemptions_per_second: Annotated[
        float, between(0, 1e6, "events/s", "six a minute: each computes its prompt again")
    ] = 0.1
    preemptions_for: Annotated[Seconds, _hold("one burst is no storm")] = Seconds(300)
    fragmentation_ratio: Annotated[
        float, between(0, 1, "ratio", "a third of the reserved memory of no use to larger tensors")
    ] = 0.3
    fragmentation_for: Annotated[Seconds, _hold("it comes and goes with batches")] = Seconds(1800)
    peak_strength: Annotated[
        float, between(0, 1, "ratio", "share of the variance that the daily peak explains; below is noise")
    ] = 0.3
    peak_repeats: Annotated[
        float, between(1, 7, "days", "the same hour on three days by chance: 2 in 1,000")
    ] = 3.0


class LatencyAlerts(Section, frozen=True):
    """Engines that do not move; burn rates are in `slo`."""

    burn_for: Annotated[Seconds, _hold("the short window has waited before")] = Seconds(120)
    stalled_for: Annotated[Seconds, _hold("a model that loads or compiles is quiet for a minute")] = Seconds(
        180
    )


class BalanceAlerts(Section, frozen=True):
    """Work that is spread unevenly."""

    expert_imbalance: Annotated[
        float, between(1, 1000, "×mean", "busiest expert ÷ mean: its rank works three times as long")
    ] = 3.0
    expert_hot_ratio: Annotated[
        float, between(0, 1, "ratio", "a quarter of a layer's choices on one expert: routing has collapsed")
    ] = 0.25
    expert_for: Annotated[Seconds, _hold("a batch of one topic is uneven for minutes")] = Seconds(900)
    straggler_ratio: Annotated[
        float, between(1, 100, "×mean", "a rank whose steps take a tenth longer makes all others wait")
    ] = 1.1
    straggler_for: Annotated[Seconds, _hold("a clock that steps down for a moment is no straggler")] = (
        Seconds(900)
    )
    queue_requests: Annotated[
        float, between(1, 1e6, "requests", "a queue worth a batch, while another engine has room")
    ] = 4.0
    queue_for: Annotated[Seconds, _hold("routers notice a queue within a minute or two")] = Seconds(300)


class TenantAlerts(Section, frozen=True):
    """Quotas and neighbours."""

    quota_near_ratio: Annotated[
        float, between(0, 1, "ratio", "time left to talk before the quota is used up")
    ] = 0.8
    quota_for: Annotated[Seconds, _hold("shares of the KV cache jump with single requests")] = Seconds(300)
    noisy_share_ratio: Annotated[
        float, between(0, 1, "ratio", "more than half of the GPU time of an engine that others use as well")
    ] = 0.6
    noisy_for: Annotated[Seconds, _hold("a batch job of some minutes is nobody's noise")] = Seconds(600)


class HealthAlerts(Section, frozen=True):
    """Cards, links and drivers."""

    lost_for: Annotated[Seconds, _hold("a driver that is loaded again answers within a minute")] = Seconds(60)
    event_window: Annotated[
        Seconds, between(30, DAY, "s", "errors are counted over it, and shown so long")
    ] = Seconds(3600)
    corrected_errors: Annotated[
        float, between(0, 1e9, "events", "corrected in that window; a healthy card has a handful a month")
    ] = 100.0
    thermal_ratio: Annotated[
        float, between(0, 1, "ratio", "a tenth of the time too hot: airflow or paste, not load")
    ] = 0.1
    thermal_for: Annotated[Seconds, _hold("fans need minutes to follow a new load")] = Seconds(600)
    power_ratio: Annotated[
        float,
        between(0, 1, "ratio", "full load meets the power limit; all of the time means that it is set low"),
    ] = 0.9
    power_for: Annotated[Seconds, _hold("a training step at the limit is normal")] = Seconds(3600)
    brake_ratio: Annotated[
        float, between(0, 1, "ratio", "the power brake is pulled by a failing supply, never by load")
    ] = 0.01
    nvlink_errors: Annotated[
        float, between(0, 1e9, "events", "in the window; single replays are mended by the link itself")
    ] = 100.0
    pcie_replays: Annotated[float, between(0, 1e9, "events", "in the window; a seated card has none")] = 100.0
    link_window: Annotated[
        Seconds, between(60, DAY, "s", "a link that has been down for longer was seen, or is not wired")
    ] = Seconds(6 * 3600)
    link_for: Annotated[Seconds, _hold("links train anew after a reset")] = Seconds(600)
    disagree_busy_ratio: Annotated[
        float, between(0, 1, "ratio", "the driver says so busy while the profiling counters say idle")
    ] = 0.5
    disagree_active_ratio: Annotated[
        float, between(0, 1, "ratio", "what the counters call idle: even a single kernel shows more")
    ] = 0.005
    disagree_for: Annotated[Seconds, _hold("the two are read at slightly different times")] = Seconds(900)


class CostAlerts(Section, frozen=True):
    """Money."""

    cold_ratio: Annotated[float, between(0, 1, "ratio", "below it both signals call a GPU cold")] = 0.05
    cold_for: Annotated[
        Seconds, _hold("shorter than a model's start and the autoscaler moves for nothing")
    ] = Seconds(600)
    cold_memory_ratio: Annotated[
        float,
        between(0, 1, "ratio", "memory held from here on: somebody occupies the card; a context is less"),
    ] = 0.05
    load_window: Annotated[
        Seconds, between(1, DAY, "s", "memory that still grows in it belongs to a model that loads")
    ] = Seconds(600)
    idle_spend_ratio: Annotated[
        float, between(0, 1, "ratio", "half of the money for nothing is more than nights explain")
    ] = 0.5
    idle_spend_per_hour: Annotated[
        float, between(0, 1e9, "price/h", "in your currency; where it is set, it stands instead of the ratio")
    ] = 0.0
    idle_spend_for: Annotated[Seconds, _hold("nights and deployments are cheaper than an alert")] = Seconds(
        4 * 3600
    )
    target_per_1k_tokens: Annotated[
        float, between(0, 1e9, "price/1k tokens", "in your currency, of a model; 0 asks nothing")
    ] = 0.0
    other_card_ratio: Annotated[
        float, between(1, 1000, "×", "so much dearer than the same model on the other card")
    ] = 1.3
    cost_for: Annotated[Seconds, _hold("cost per token swings with the load of an hour")] = Seconds(3600)
    wasted_ratio: Annotated[
        float, between(0, 1, "ratio", "share of the GPU time whose result nobody used")
    ] = 0.1
    wasted_for: Annotated[Seconds, _hold("a client that restarts aborts all of its requests once")] = Seconds(
        900
    )


class SelfAlerts(Section, frozen=True):
    """The pack itself."""

    remembered: Annotated[
        Seconds,
        between(
            60, 30 * DAY, "s", "so long is a part missed that was there; a node taken away is then forgotten"
        ),
    ] = Seconds(6 * 3600)
    down_for: Annotated[Seconds, _hold("a rolling update restarts each part once")] = Seconds(300)
    stale_seconds: Annotated[float, between(1, DAY, "s", "the slow tier is read each ten seconds")] = 60.0
    evaluation_seconds: Annotated[float, between(1, DAY, "s", "the sidecar evaluates each minute")] = 600.0
    dropped_window: Annotated[Seconds, between(60, DAY, "s", "losses are counted over it")] = Seconds(900)
    probe_cpu_ratio: Annotated[
        float, between(0, 1, "ratio", "the budget of the probe: one percent of a core on an engine's threads")
    ] = 0.01
    off_for: Annotated[Seconds, _hold("a hook that was switched off stays off")] = Seconds(600)


class Alerts(Section, frozen=True):
    """Thresholds of the alerts."""

    memory: MemoryAlerts = MemoryAlerts()
    latency: LatencyAlerts = LatencyAlerts()
    balance: BalanceAlerts = BalanceAlerts()
    tenants: TenantAlerts = TenantAlerts()
    health: HealthAlerts = HealthAlerts()
    cost: CostAlerts = CostAlerts()
    monitoring: SelfAlerts = SelfAlerts()
