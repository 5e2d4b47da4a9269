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
    histogram_rates,
    not_equal,
    one_of,
    over_time,
    parenthesize,
    regex,
    select,
)
from recording_rules import foreign as f
from recording_rules import records as r
from recording_rules.devices import renamed
from recording_rules.engines import TRITON, VLLM
from recording_rules.foreign import Foreign
from recording_rules.model import Group, Record, Rule
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
class _Source:
    """Where a latency is read: a metric, how to match it, and its bounds where they are known."""

    metric: Family | Foreign
    bounds: tuple[float, ...] = ()
    triton: bool = False

    def rates(self, window: float, options: Options) -> list[str]:
        """Histograms per second by model, one expression for each spelling."""
        made = []
        for metric in self._spellings():
            rates = histogram_rates(options.histograms, metric, window, **self._matchers())
            made.append(
                aggregate("sum", _by(options), renamed(rates, model_name="model") if self.triton else rates)
            )
        return made

    def _spellings(self) -> list[Family | Foreign]:
        if isinstance(self.metric, Foreign) and self.metric.exporter == "sglang":
            return [self.metric, f.escaped(self.metric)]
        return [self.metric]

    def _matchers(self) -> dict[str, str | Match]:
        if isinstance(self.metric, Family) or self.metric.exporter == "trtllm":
            return {}
        return {"priority": ""} if self.metric.exporter == "sglang" else TRITON if self.triton else VLLM


@dataclass(frozen=True, slots=True)
class _Latency:
    """A latency: where it is read, the best source first, and what is recorded of it."""

    sources: tuple[_Source, ...]
    buckets: Record
    quantiles: Record
    slo: str = ""

    def read(self, options: Options) -> list[_Source]:
        """The sources that the options leave."""
        ours = [one for one in self.sources if isinstance(one.metric, Family)]
        theirs = [one for one in self.sources if one not in ours]
        return [
            *(ours if options.source != "dcgm" else ()),
            *(theirs if options.source != "gpuglass" else ()),
        ]


def _by(options: Options) -> tuple[str, ...]:
    return r.MODEL if options.histograms == "native" else (*r.MODEL, "le")


def _probe(family: Family) -> _Source:
    return _Source(family, family.buckets)


LATENCIES = (
    _Latency(
        (
            _probe(engine.REQUEST_FIRST_TOKEN),
            _Source(f.VLLM_FIRST_TOKEN, _VLLM_FIRST_TOKEN),
            _Source(f.SGLANG_FIRST_TOKEN, _SGLANG_FIRST_TOKEN),
            _Source(f.TRTLLM_FIRST_TOKEN, _VLLM_FIRST_TOKEN),
            _Source(f.VLLM_FIRST_TOKEN, triton=True),
        ),
        r.MODEL_FIRST_TOKEN_BUCKETS,
        r.MODEL_FIRST_TOKEN,
        "first_token",
    ),
    _Latency(  # the probe does not see single tokens
        (
            _Source(f.VLLM_INTER_TOKEN, _VLLM_INTER_TOKEN),
            _Source(f.SGLANG_INTER_TOKEN),
            _Source(f.TRITON_VLLM_INTER_TOKEN, triton=True),
        ),
        r.MODEL_INTER_TOKEN_BUCKETS,
        r.MODEL_INTER_TOKEN,
        "inter_token",
    ),
    _Latency(
        (
            _probe(engine.REQUEST_DURATION),
            _Source(f.VLLM_DURATION, _VLLM_DURATION),
            _Source(f.SGLANG_DURATION, _SGLANG_DURATION),
            _Source(f.TRTLLM_DURATION, _VLLM_DURATION),
            _Source(f.VLLM_DURATION, triton=True),
        ),
        r.MODEL_DURATION_BUCKETS,
        r.MODEL_DURATION,
        "request_duration",
    ),
    _Latency(
        (
            _probe(engine.REQUEST_QUEUE),
            _Source(f.VLLM_QUEUE),
            _Source(f.SGLANG_QUEUE),
            _Source(f.TRTLLM_QUEUE),
        ),
        r.MODEL_QUEUE_BUCKETS,
        r.MODEL_QUEUE,
    ),
)


def groups(settings: Settings, options: Options) -> list[Group]:
    """The groups of quantiles and of service levels. Windows of a day and more are evaluated less often."""
    windows = settings.slo.windows()
    short = [w for w in windows if w <= 6 * 3600]
    base = [*_histograms(settings, options), *_objectives(settings, options)]
    return [
        Group("gpuglass-latency.rules", float(settings.windows.interval), tuple(base)),
        Group("gpuglass-slo.rules", float(settings.windows.slow_interval), tuple(_over(short))),
        Group(
            "gpuglass-slo-long.rules",
            float(settings.windows.long_interval),
            tuple(_over([w for w in windows if w not in short])),
        ),
    ]


def _histograms(settings: Settings, options: Options) -> Iterator[Rule]:
    """Raw histograms are read once, and everything else from what is recorded of them by model."""
    window = float(settings.windows.rate)
    for latency in LATENCIES:
        found = [rates for source in latency.read(options) for rates in source.rates(window, options)]
        if not found:
            continue
        yield Rule(latency.buckets, first_of(*found, on=r.MODEL))
        for quantile in QUANTILES:
            # Without requests a quantile is NaN, which compares false.
            value = f"histogram_quantile({quantile:g}, {select(latency.buckets)}) >= 0"
            yield Rule(latency.quantiles, value, {"quantile": f"{quantile:g}"})


def _objectives(settings: Settings, options: Options) -> Iterator[Rule]:
    slo = settings.slo
    seconds = {
        "first_token": slo.first_token.seconds,
        "inter_token": slo.inter_token.seconds,
        "request_duration": slo.request_duration.seconds,
    }
    for latency in LATENCIES:
        if latency.slo and latency.read(options):
            yield from _latency_objective(latency, seconds[latency.slo], options)
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


def _latency_objective(latency: _Latency, seconds: float, options: Options) -> Iterator[Rule]:
    """What misses an objective. Of an engine without that very bound the next lower one counts: the objective
    is stricter for it then."""
    sources = latency.read(options)
    bounds = {b for b in (_largest(source.bounds, seconds) for source in sources) if b is not None}
    if not bounds:
        return
    if options.histograms == "native":
        total = f"histogram_count({select(latency.buckets)})"
        # Without observations the fraction is NaN, which compares false: nothing missed the objective then.
        share = f"histogram_fraction(0, {max(bounds):g}, {select(latency.buckets)})"
        bad = first_of(f"clamp_min(1 - ({share} >= 0), 0) * {total}", f"{total} * 0")
    else:
        total = aggregate("sum", r.MODEL, select(latency.buckets, le="+Inf"))
        fast = first_of(
            *(aggregate("sum", r.MODEL, _bucket(latency.buckets, b)) for b in sorted(bounds, reverse=True)),
            on=r.MODEL,
        )
        bad = f"clamp_min({total} - {parenthesize(fast)}, 0)"
    yield Rule(r.SLO_TOTAL, total, {"slo": latency.slo})
    yield Rule(r.SLO_BAD, bad, {"slo": latency.slo})


def _largest(bounds: Sequence[float], seconds: float) -> float | None:
    return max((bound for bound in bounds if bound <= seconds), default=None)


def _bucket(buckets: Record, bound: float) -> str:
    """A bucket by its bound: a whole number is written with `.0` or without."""
    return select(buckets, le=regex(rf"{bound:g}(\.0)?") if bound == int(bound) else f"{bound:g}")


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
