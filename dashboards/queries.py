"""PromQL of the dashboards: selectors within the chosen variables, rates, histograms, joins with the GPUs.

In: families and records. Out: query texts with Grafana's variables in them. Label scopes are typed here
and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuglass.families import engine, gpu
from gpuglass.family import Family
from gpuglass.promql import Histograms, Match, Metric, not_equal, parenthesize, regex, select
from recording_rules import records

_SCOPE = {name: regex(f"${name}") for name in ("cluster", "node", "gpu_uuid", "model_name", "tenant")}

RATE = "$__rate_interval"
ENGINE = ("model_name", "engine", "server", "workload_namespace", "workload_pod", "workload_container")
ENGINE_NAME = "{{model_name}} {{workload_pod}}{{server}} engine {{engine}}"
PLACE = "at"
"""The label that names a GPU's row. It stands first, is no number, and orders rows by node, then card,
then device: the heatmap takes its rows' names from the first label and keeps the order of the answer,
which is that of the labels."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """A name and labels that a selector may use: one of a histogram's samples, or a family with a further
    name."""

    name: str
    labels: tuple[str, ...]


def scoped(metric: Metric, /, **matchers: str | Match) -> str:
    """A selector within the chosen variables, as far as the metric has their labels."""
    scope = {
        name: match
        for name, match in _SCOPE.items()
        if name in metric.labels or (name == "cluster" and isinstance(metric, Family))
    }
    return select(metric, **(scope | matchers))


def rate(metric: Metric, /, **matchers: str | Match) -> str:
    """Growth of a counter per second."""
    return f"rate({scoped(metric, **matchers)}[{RATE}])"


def increase(metric: Metric, /, window: str = "$__range", **matchers: str | Match) -> str:
    """Growth of a counter over the shown time range, or another window."""
    return f"increase({scoped(metric, **matchers)}[{window}])"


def over(how: str, metric: Metric, /, window: str = "$__range", **matchers: str | Match) -> str:
    """`avg_over_time` and its like."""
    return f"{how}_over_time({scoped(metric, **matchers)}[{window}])"


def by(how: str, labels: str | Sequence[str], expr: str) -> str:
    """An aggregation; `labels` may be empty."""
    text = labels if isinstance(labels, str) else ", ".join(labels)
    return f"{how} by ({text}) ({expr})" if text else f"{how} ({expr})"


def quotient(numerator: str, denominator: str, on: str | None = None, many: bool = False) -> str:
    """Left out where the denominator is 0. `many` numerators share a denominator by the labels `on`."""
    joined = f" on ({on})" + (" group_left ()" if many else "") if on is not None else ""
    return f"{parenthesize(numerator)} /{joined} ({denominator} > 0)"


def either(*expressions: str) -> str:
    """The first, and of the others what it has no sample for."""
    return " or ".join(map(parenthesize, expressions))


def device(metric: Family, how: str = "max", /, **matchers: str | Match) -> str:
    """A GPU family by GPU alone, whoever scraped it and however often."""
    return by(how, "gpu_uuid", scoped(metric, **matchers))


def on_gpus(expr: str, labels: str = "cluster, node, device, model") -> str:
    """Expression by gpu_uuid, with where the GPU is, on the chosen nodes only."""
    return f"{parenthesize(expr)} * on (gpu_uuid) group_left ({labels}) {scoped(records.DEVICE_INFO)}"


def rows(expr: str, place: str = "") -> str:
    """Expression by gpu_uuid as rows of a map: named and ordered by node, card and device. With `place`
    "@ end()" the names are those at the end of the range, found once and not for each column."""
    info = f"{scoped(records.DEVICE_INFO)} {place}".rstrip()
    card = f'label_replace({info}, "card", "$1", "model", "(?:NVIDIA )?([^ -]+).*")'
    named = f'label_join({card}, "{PLACE}", " ", "node", "card", "device")'
    return f"{parenthesize(expr)} * on (gpu_uuid) group_left ({PLACE}, node, device, model) {named}"


def zero_padded(expr: str, label: str) -> str:
    """Label's numbers as three digits, so that 10 comes after 2."""
    two = f'label_replace({expr}, "{label}", "0$1", "{label}", "(..?)")'
    return f'label_replace({two}, "{label}", "0$1", "{label}", "(..)")'


def named_row(expr: str, label: str) -> str:
    """Expression with rows of a map named by a label, such as `layer 007`."""
    return f'label_replace({expr}, "{PLACE}", "{label} $1", "{label}", "(.+)")'


def engines_on_gpus(expr: str) -> str:
    """Expression by engine, only of engines that run on the chosen GPUs."""
    here = by("group", ENGINE, scoped(records.ENGINE_GPU_SECONDS))
    return f"{parenthesize(expr)} and on ({', '.join(ENGINE)}) {here}"


# Histograms


def bucket_rate(form: Histograms, family: Family, labels: str = "", /, **matchers: str | Match) -> str:
    """Observations per second by bucket: what quantiles and histogram panels start from."""
    if form == "native":
        return by("sum", labels, f"rate({_histogram(family, family.name, matchers)}[{RATE}])")
    grouping = f"{labels}, le" if labels else "le"
    return by("sum", grouping, f"rate({_histogram(family, f'{family.name}_bucket', matchers)}[{RATE}])")


def quantile(form: Histograms, q: float, family: Family, labels: str = "", /, **matchers: str | Match) -> str:
    """Quantile of what was observed lately."""
    return f"histogram_quantile({q:g}, {bucket_rate(form, family, labels, **matchers)})"


def mean(form: Histograms, family: Family, labels: str = "", /, **matchers: str | Match) -> str:
    """Mean of what was observed lately."""
    if form == "native":
        rates = f"rate({_histogram(family, family.name, matchers)}[{RATE}])"
        return quotient(
            by("sum", labels, f"histogram_sum({rates})"), by("sum", labels, f"histogram_count({rates})")
        )
    total, count = (
        f"rate({_histogram(family, family.name + end, matchers)}[{RATE}])" for end in ("_sum", "_count")
    )
    return quotient(by("sum", labels, total), by("sum", labels, count))


def count_rate(form: Histograms, family: Family, labels: str = "", /, **matchers: str | Match) -> str:
    """Observations per second."""
    if form == "native":
        return by(
            "sum", labels, f"histogram_count(rate({_histogram(family, family.name, matchers)}[{RATE}]))"
        )
    return by("sum", labels, f"rate({_histogram(family, family.name + '_count', matchers)}[{RATE}])")


def _histogram(family: Family, name: str, matchers: dict[str, str | Match]) -> str:
    labels = (*family.labels, "le", "cluster")
    return scoped(_Sample(name, labels), **matchers)


# The compute map's signals


@dataclass(frozen=True, slots=True)
class Signal:
    """What the map can show: `pattern` is the variable's value, a pattern of the names of the metrics that
    are read."""

    title: str
    pattern: str


def _named(metric: Metric, /, **matchers: str | Match) -> str:
    """A selector that finds nothing, at no cost, unless the variable `signal` names the metric."""
    inner = scoped(metric, **matchers).removeprefix(metric.name).strip("{}")
    return f'{{__name__="{metric.name}", __name__=~"$signal", {inner}}}'


def signals() -> tuple[Signal, ...]:
    """All signals; the first is shown at first."""
    sm, busy = gpu.SM_ACTIVE.name, gpu.BUSY.name
    return (
        Signal("Activity: SM activity, or busy where the card does not tell", f"{sm}|{busy}"),
        Signal("SM activity", sm),
        Signal("Busy: some kernel ran", busy),
        Signal("Tensor pipes", gpu.PIPE_ACTIVE.name),
        Signal("Memory bandwidth", gpu.DRAM_ACTIVE.name),
        Signal("Memory used", f"{gpu.MEMORY_USED.name}|{gpu.MEMORY_TOTAL.name}"),
        Signal("Power of its limit", f"{gpu.POWER.name}|{gpu.POWER_LIMIT.name}"),
        Signal(
            "KV cache used",
            f"{engine.KV_USED_BLOCKS.name}|{engine.KV_POOL_BLOCKS.name}|{records.ENGINE_GPU_SECONDS.name}",
        ),
        Signal("Activity as recorded, from any exporter", records.DEVICE_ACTIVE.name),
    )


def signal_map() -> str:
    """The chosen signal of each GPU, 0 to 1, by gpu_uuid. Only what is chosen is read."""

    def of(metric: Metric, /, **matchers: str | Match) -> str:
        return by("max", "gpu_uuid", _named(metric, **matchers))

    pool = quotient(
        by("max", ENGINE, _named(engine.KV_USED_BLOCKS)), by("max", ENGINE, _named(engine.KV_POOL_BLOCKS))
    )
    on_gpu = by("group", (*ENGINE, "gpu_uuid"), _named(records.ENGINE_GPU_SECONDS))
    held = f"({pool}) * on ({', '.join(ENGINE)}) group_right () {on_gpu}"
    activity = either(of(gpu.SM_ACTIVE), of(gpu.BUSY))
    plain = either(either(of(gpu.PIPE_ACTIVE, pipe="tensor"), of(gpu.DRAM_ACTIVE)), of(records.DEVICE_ACTIVE))
    shares = either(
        quotient(of(gpu.MEMORY_USED), of(gpu.MEMORY_TOTAL), "gpu_uuid"),
        quotient(of(gpu.POWER), of(gpu.POWER_LIMIT), "gpu_uuid"),
    )
    # A tree and not a chain: each `or` costs time on the side that has series, even beside nothing.
    return either(activity, either(plain, either(shares, by("max", "gpu_uuid", held))))


__all__ = [
    "ENGINE",
    "ENGINE_NAME",
    "RATE",
    "Signal",
    "bucket_rate",
    "by",
    "count_rate",
    "device",
    "either",
    "engines_on_gpus",
    "increase",
    "mean",
    "not_equal",
    "on_gpus",
    "over",
    "quantile",
    "quotient",
    "rate",
    "rows",
    "scoped",
    "signal_map",
    "signals",
    "zero_padded",
]
