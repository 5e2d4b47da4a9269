"""Latency quantiles and service levels, by model.

In: histograms of the probe, else of the engines themselves (buckets of two exporters are never added), and
the engines' requests by outcome. Out: quantiles; what an objective counts and what misses it, as rates, over
windows, and as burn rates. Raw histograms are read here only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpuglass.families import engine
from gpuglass.family import Family
from gpuglass.promql import (
    Match,
    aggregate,
    divide,
    duration,
    first_of,
    histogram_at_most,
    histogram_count,
    histogram_rates,
    not_equal,
    one_of,
    over_time,
    quantile_of,
    select,
)
from recording_rules import foreign as f
from recording_rules import records as r
from recording_rules.devices import renamed
from recording_rules.engines import TRITON, VLLM
from recording_rules.foreign import Foreign
from recording_rules.model import Group, Rule
from recording_rules.options import Options
from recording_rules.settings import Settings

QUANTILES = (0.5, 0.95, 0.99)

# Bounds of the engines' own histograms, as they come by default, in seconds.
_VLLM_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
    640, 2560,
)  # fmt: skip
_VLLM_INTER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_VLLM_DURATION = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_SGLANG_FIRST_TOKEN = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
_SGLANG_DURATION = (*_SGLANG_FIRST_TOKEN, 600, 1200, 1800, 2400)


@dataclass(frozen=True, slots=True)
class _Histogram:
    """Where a latency is read: a metric, how to match it, and its bounds where they are known."""

    metric: Family | Foreign
    bounds: tuple[float, ...] = ()
    triton: bool = False

    @property
    def is_sglang(self) -> bool:
        return isinstance(self.metric, Foreign) and self.metric.exporter == "sglang"

    def matchers(self) -> dict[str, str | Match]:
        if isinstance(self.metric, Family) or self.metric.exporter == "trtllm":
            return {}
        return dict(TRITON if self.triton else {"priority": ""} if self.is_sglang else VLLM)

    def bound(self, seconds: float) -> float | None:
        """The largest bound of at most `seconds`: an engine without that very bound has a stricter
        objective."""
        return max((bound for bound in self.bounds if bound <= seconds), default=None)


def _probe(family: Family) -> _Histogram:
    return _Histogram(family, family.buckets)


_FIRST_TOKEN = (
    _probe(engine.REQUEST_FIRST_TOKEN),
    _Histogram(f.VLLM_FIRST_TOKEN, _VLLM_FIRST_TOKEN),
    _Histogram(f.SGLANG_FIRST_TOKEN, _SGLANG_FIRST_TOKEN),
    _Histogram(f.TRTLLM_FIRST_TOKEN, _VLLM_FIRST_TOKEN),
    _Histogram(f.VLLM_FIRST_TOKEN, triton=True),
)
_INTER_TOKEN = (  # the probe does not see single tokens
    _Histogram(f.VLLM_INTER_TOKEN, _VLLM_INTER_TOKEN),
    _Histogram(f.SGLANG_INTER_TOKEN),
    _Histogram(f.TRITON_VLLM_INTER_TOKEN, triton=True),
)
_DURATION = (
    _probe(engine.REQUEST_DURATION),
    _Histogram(f.VLLM_DURATION, _VLLM_DURATION),
    _Histogram(f.SGLANG_DURATION, _SGLANG_DURATION),
    _Histogram(f.TRTLLM_DURATION, _VLLM_DURATION),
    _Histogram(f.VLLM_DURATION, triton=True),
)
_QUEUE = (
    _probe(engine.REQUEST_QUEUE),
    _Histogram(f.VLLM_QUEUE),
    _Histogram(f.SGLANG_QUEUE),
    _Histogram(f.TRTLLM_QUEUE),
)


def groups(settings: Settings, options: Options) -> list[Group]:
    """The groups of quantiles and of service levels. Windows of a day and more are evaluated less often."""
    windows = settings.slo.windows()
    short = [w for w in windows if w <= 6 * 3600]
    interval, slow = float(settings.windows.interval), float(settings.windows.long_interval)
    base = [*_quantiles(settings, options), *_objectives(settings, options)]
    return [
        Group("gpuglass-latency.rules", interval, tuple(base)),
        Group("gpuglass-slo.rules", float(settings.windows.slow_interval), tuple(_over(short))),
        Group("gpuglass-slo-long.rules", slow, tuple(_over([w for w in windows if w not in short]))),
    ]


def _sources(all_of: Sequence[_Histogram], options: Options) -> list[_Histogram]:
    ours = [one for one in all_of if isinstance(one.metric, Family)]
    return [
        *(ours if options.source != "dcgm" else ()),
        *(one for one in all_of if one not in ours and options.source != "gpuglass"),
    ]


def _spellings(one: _Histogram) -> list[Family | Foreign]:
    return (
        [one.metric, f.escaped(one.metric)]
        if isinstance(one.metric, Foreign) and one.is_sglang
        else [one.metric]
    )


def _by_model(one: _Histogram, rates: str) -> str:
    return renamed(rates, model_name="model") if one.triton else rates


def _quantiles(settings: Settings, options: Options) -> Iterator[Rule]:
    window = float(settings.windows.rate)
    for record, histograms in (
        (r.MODEL_FIRST_TOKEN, _FIRST_TOKEN),
        (r.MODEL_INTER_TOKEN, _INTER_TOKEN),
        (r.MODEL_DURATION, _DURATION),
        (r.MODEL_QUEUE, _QUEUE),
    ):
        found = [
            (one, _by_model(one, histogram_rates(options.histograms, metric, window, **one.matchers())))
            for one in _sources(histograms, options)
            for metric in _spellings(one)
        ]
        for quantile in QUANTILES if found else ():
            # Without requests a quantile is NaN, which compares false.
            parts = [
                f"{quantile_of(options.histograms, quantile, rates, r.MODEL)} >= 0" for _, rates in found
            ]
            yield Rule(record, first_of(*parts, on=r.MODEL), {"quantile": f"{quantile:g}"})


def _objectives(settings: Settings, options: Options) -> Iterator[Rule]:
    slo = settings.slo
    for name, histograms, seconds in (
        ("first_token", _FIRST_TOKEN, slo.first_token.seconds),
        ("inter_token", _INTER_TOKEN, slo.inter_token.seconds),
        ("request_duration", _DURATION, slo.request_duration.seconds),
    ):
        yield from _latency_objective(name, histograms, seconds, settings, options)
    ended = aggregate("sum", r.MODEL, select(r.MODEL_REQUESTS, outcome=not_equal("abort")))
    failed = aggregate("sum", r.MODEL, select(r.MODEL_REQUESTS, outcome=one_of(("error", "rejected"))))
    yield Rule(r.SLO_TOTAL, ended, {"slo": "errors"})
    yield Rule(r.SLO_BAD, first_of(failed, f"{ended} * 0"), {"slo": "errors"})
    for name, objective in (
        ("first_token", slo.first_token.objective),
        ("inter_token", slo.inter_token.objective),
        ("request_duration", slo.request_duration.objective),
        ("errors", slo.errors.objective),
    ):
        models = aggregate("group", r.MODEL, select(r.SLO_TOTAL, slo=name))
        yield Rule(r.SLO_BUDGET, f"{models} * {1 - objective:.10g}", {"slo": name})


def _latency_objective(
    name: str, histograms: Sequence[_Histogram], seconds: float, settings: Settings, options: Options
) -> Iterator[Rule]:
    window, form = float(settings.windows.rate), options.histograms
    totals, bads = [], []
    for one in _sources(histograms, options):
        bound = one.bound(seconds)
        if bound is None:
            continue
        for metric in _spellings(one):
            matchers = one.matchers()
            total, fast = (
                aggregate("sum", r.MODEL, rates)
                for rates in (
                    histogram_count(form, metric, window, **matchers),
                    histogram_at_most(form, bound, metric, window, **matchers),
                )
            )
            totals.append(total)
            bads.append(f"clamp_min({total} - {fast}, 0)")
    if totals:
        yield Rule(r.SLO_TOTAL, first_of(*totals, on=r.MODEL), {"slo": name})
        yield Rule(r.SLO_BAD, first_of(*bads, on=r.MODEL), {"slo": name})


def _over(windows: Sequence[float]) -> Iterator[Rule]:
    """Shares over windows: sums of rates, so that both sides have the same gaps."""
    on = ("cluster", "model_name", "slo")
    for window in windows:
        label = duration(window)
        ratio = divide(over_time("sum", r.SLO_BAD, window), over_time("sum", r.SLO_TOTAL, window))
        yield Rule(r.SLO_BAD_RATIO, ratio, {"window": label})
        ratios = select(r.SLO_BAD_RATIO, window=label)
        burn = f"{ratios}\n/ on ({', '.join(on)}) group_left ()\n{select(r.SLO_BUDGET)}"
        yield Rule(r.SLO_BURN, burn, {"window": label})
