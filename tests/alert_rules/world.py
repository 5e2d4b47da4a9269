"""A small cluster as Prometheus would see it, for rule tests: targets, and series and how they go on.

In: families of the catalog with values in promtool's notation. Out: the input series of a `promtool test
rules` file, in either layout of endpoints and either form of histograms. Samples come each 13 seconds, so
that none lies on the grid of evaluations, where Prometheus 2 and 3 select differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote_plus

from alert_rules import groups
from gpuglass.family import Family, Kind, Owner, Tier
from gpuglass.promql import Histograms, Metric, quote
from recording_rules.settings import parse

Layout = Literal["pair", "union"]
RULES = groups.alerts(parse({"alerts": {"cost": {"target_per_1k_tokens": 1}}}, "all alerts"))
"""All alerts, also those that have to be asked for."""
STEP = 13
"""Seconds between samples."""


def samples(minutes: float) -> int:
    """Samples in so many minutes."""
    return int(minutes * 60 / STEP)


@dataclass(frozen=True, slots=True)
class Values:
    """How a series goes on, as promtool writes it."""

    text: str

    def then(self, other: Values) -> Values:
        """This and afterwards the other."""
        return Values(f"{self.text} {other.text}")


def steady(value: float, minutes: float = 0) -> Values:
    """The same value, for some minutes (0: to the end of the world)."""
    return Values(f"{value:.10g}x{samples(minutes) - 1 if minutes else LONGEST}")


def growing(per_second: float, minutes: float = 0, start: float = 0) -> Values:
    """A value that grows, as counters do."""
    return Values(f"{start:.10g}+{per_second * STEP:.10g}x{samples(minutes) - 1 if minutes else LONGEST}")


def missing(minutes: float) -> Values:
    """No samples for some minutes: a gap of the scrape, without a staleness marker."""
    return Values(f"_x{samples(minutes)}")


def gone() -> Values:
    """The target is down or the series was withdrawn: Prometheus marks it stale."""
    return Values("stale")


LONGEST = 1400
"""Samples of a series that goes on to the end: five hours."""

Labels = Mapping[str, str]


@dataclass
class World:
    """Series of a test, by what exports them."""

    layout: Layout = "pair"
    histograms: Histograms = "classic"
    series: list[dict[str, str]] = field(default_factory=list)
    expected: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Alerts that fire at the end, by name, as promtool reads them."""
    near_misses: list[tuple[str, str]] = field(default_factory=list)
    """Alerts that must not fire about something in this world, and why."""
    _seen: set[str] = field(default_factory=set)

    def raw(self, name: str, labels: Labels, values: Values | str) -> None:
        """A series as it stands."""
        inner = ", ".join(f"{label}={quote(value)}" for label, value in sorted(labels.items()) if value)
        series = f"{name}{{{inner}}}"
        assert series not in self._seen, f"{series} is there already"
        self._seen.add(series)
        self.series.append(
            {"series": series, "values": values.text if isinstance(values, Values) else values}
        )

    def add(self, family: Family, values: Values | float, target: Labels, **labels: str) -> None:
        """A sample of a family of the catalog, whose labels must be the family's."""
        known = set(family.labels)
        extra = set(labels) - known
        assert family.source_labels or not extra, f"{family.name} has no label {sorted(extra)}"
        lacking = known - set(labels) - family.optional
        assert not lacking, f"{family.name} lacks {sorted(lacking)}"
        assert family.kind is not Kind.HISTOGRAM
        how = values if isinstance(values, Values) else steady(values)
        self.raw(family.name, {**self._target(family, target), **labels}, how)

    def histogram(
        self,
        family: Family,
        per_second: Mapping[float, float],
        target: Labels,
        minutes: float = 0,
        **labels: str,
    ) -> None:
        """Observations per second by value, as a histogram of the family."""
        self.histogram_of(
            family, family.buckets, per_second, {**self._target(family, target), **labels}, minutes
        )

    def histogram_of(
        self,
        metric: Metric,
        bounds: Sequence[float],
        per_second: Mapping[float, float],
        labels: Labels,
        minutes: float = 0,
    ) -> None:
        """As `histogram`, of another exporter's metric with its own bounds and all labels."""
        counts = [0.0] * (len(bounds) + 1)
        for value, rate in per_second.items():
            index = next((i for i, bound in enumerate(bounds) if value <= bound), len(bounds))
            counts[index] += rate
        total = sum(value * rate for value, rate in per_second.items())
        if self.histograms == "native":
            self.raw(metric.name, labels, _native(bounds, counts, total, minutes))
            return
        cumulated = 0.0
        for bound, rate in zip([*map(str, map(float, bounds)), "+Inf"], counts, strict=True):
            cumulated += rate
            self.raw(f"{metric.name}_bucket", {**labels, "le": bound}, growing(cumulated, minutes))
        self.raw(f"{metric.name}_count", labels, growing(cumulated, minutes))
        self.raw(f"{metric.name}_sum", labels, growing(total, minutes))

    def fires(
        self, name: str, severity: str, category: str, description: str, labels: Labels, **more: str
    ) -> None:
        """Expect an alert with exactly these labels and annotations. `more` are annotations besides those
        that all alerts have; their text and the description's are as people read them."""
        rule = next(a for a in RULES if (a.name, a.severity) == (name, severity))
        variables = "&".join(f"var-{v}={quote_plus(labels.get(n, ''))}" for v, n in rule.variables.items())
        found = {label: value for label, value in labels.items() if value}
        annotations = {
            "summary": rule.summary,
            "description": description,
            "runbook_url": f"https://gpuglass.example/runbooks/{name}",
            "dashboard_url": f"/d/{rule.dashboard}" + (f"?{variables}" if variables else ""),
            **more,
        }
        self.expected.setdefault(name, []).append(
            {
                "exp_labels": {"severity": severity, "category": category, **rule.labels, **found},
                "exp_annotations": annotations,
            }
        )

    def near(self, alert: str, why: str) -> None:
        """Note that something in this world nearly makes an alert fire. That it does not is tested as all
        else: what fires has to be exactly what is expected."""
        assert alert in {rule.name for rule in RULES}, alert
        self.near_misses.append((alert, why))

    def test(self, minutes: int) -> dict[str, Any]:
        """The test of all alerts after so many minutes, as promtool reads it."""
        return {
            "interval": f"{STEP}s",
            "input_series": self.series,
            "alert_rule_test": [
                {"eval_time": f"{minutes}m", "alertname": name, "exp_alerts": self.expected.get(name, [])}
                for name in sorted({rule.name for rule in RULES})
            ],
        }

    def _target(self, family: Family, target: Labels) -> dict[str, str]:
        if family.owner is not Owner.AGENT:
            return {"job": f"gpuglass-{family.owner}", **target}
        tier = "" if self.layout == "union" else "-fast" if family.tier is Tier.FAST else "-slow"
        return {"job": f"gpuglass{tier}", **target}


def _native(all_bounds: Sequence[float], counts: Sequence[float], total: float, minutes: float) -> Values:
    """A native histogram with custom bounds, as Prometheus 3 makes it of a classic one."""
    bounds = " ".join(f"{bound:g}" for bound in all_bounds)

    def at(scale: float) -> str:
        filled = " ".join(f"{count * scale:.10g}" for count in counts)
        return (
            f"{{{{schema:-53 count:{sum(counts) * scale:.10g} sum:{total * scale:.10g} "
            f"custom_values:[{bounds}] buckets:[{filled}]}}}}"
        )

    return Values(f"{at(0)}+{at(STEP)}x{samples(minutes) - 1 if minutes else LONGEST}")
