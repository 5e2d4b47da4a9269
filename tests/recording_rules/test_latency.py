"""Latency quantiles and service levels, from classic and native histograms, of the probe and of engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuglass.families import engine
from recording_rules import foreign as f
from recording_rules import records as r
from recording_rules.options import Options
from recording_rules.settings import parse
from tests.recording_rules.promtool import (
    LAYOUTS,
    Bench,
    Case,
    Series,
    counter,
    histogram,
    nothing,
    series,
    values,
)
from tests.recording_rules.test_engines import probed, target

WANTED = ("engines", "models", "latency", "slo", "slo-long")
FAST = {0.05: 0.0, 0.1: 5.0, 1.0: 9.0, 2.5: 9.5}
"""Ten observations a second: half within 0.1 s, nine within 1 s."""


def cases(native: bool) -> list[Case]:
    """The same situations in one form of histograms."""

    def of_probe(number: int, minutes: float = 20) -> list[Series]:
        e = probed(number, outcome="stop", preempted="false")
        return histogram(engine.REQUEST_FIRST_TOKEN, FAST, 10, minutes, native, **e)

    def of_vllm(metric: f.Foreign, bounds: dict[float, float], **more: str) -> list[Series]:
        return histogram(metric, bounds, 10, 20, native, **target(1, engine="0", **more))

    return [
        Case(
            "two engines with the probe: quantiles of both together, and what misses a second",
            [*of_probe(1), *of_probe(2)],
            [
                values(r.MODEL_FIRST_TOKEN, ("quantile",), {"0.5": 0.1, "0.95": 2.5, "0.99": 2.5}),
                values(r.SLO_TOTAL, ("slo",), {"first_token": 20}),
                values(r.SLO_BAD, ("slo",), {"first_token": 2}),
                values(r.SLO_BAD_RATIO, ("window",), {"5m": 0.1}, window="5m"),
                values(r.SLO_BUDGET, ("slo",), {"first_token": 0.05}),
                values(
                    r.SLO_BURN,
                    ("window",),
                    dict.fromkeys(("5m", "30m", "1h", "2h", "6h", "1d", "3d"), 2.0),
                ),
            ],
            LAYOUTS,
        ),
        Case(
            "a probe's histogram wins over the engine's own of the same model",
            [*of_probe(1), *of_vllm(f.VLLM_FIRST_TOKEN, {1.0: 0.0}, model_name="deepseek")],
            [values(r.SLO_BAD, ("model_name", "slo"), {("deepseek", "first_token"): 1})],
        ),
        Case(
            "engines' own histograms: tokens, requests, and a bound that SGLang does not have",
            [
                *of_vllm(f.VLLM_INTER_TOKEN, {0.05: 5.0, 0.1: 8.0, 0.15: 10.0}),
                *of_vllm(f.VLLM_DURATION, {20.0: 4.0, 30.0: 6.0, 40.0: 10.0}),
                *histogram(
                    f.escaped(f.SGLANG_DURATION),
                    {20.0: 4.0, 40.0: 10.0},
                    10,
                    20,
                    native,
                    **target(2, "sglang", model_name="kimi"),
                ),
            ],
            [
                values(r.MODEL_INTER_TOKEN, ("quantile",), {"0.5": 0.05}, quantile="0.5"),
                values(
                    r.SLO_BAD,
                    ("model_name", "slo"),
                    {
                        ("qwen", "inter_token"): 2,
                        ("qwen", "request_duration"): 4,
                        # Half of those between 20 and 40 s, where the form allows to interpolate.
                        ("kimi", "request_duration"): 3 if native else 6,
                    },
                ),
            ],
        ),
        Case(
            "no request, no quantile and no ratio",
            histogram(engine.REQUEST_FIRST_TOKEN, dict.fromkeys(FAST, 0.0), 0, 20, native, **probed(1)),
            [
                nothing(r.MODEL_FIRST_TOKEN.name),
                nothing(r.SLO_BAD_RATIO.name),
                nothing(r.SLO_BURN.name),
            ],
        ),
        Case(
            "requests end: what is left of the windows still counts, the rate is 0",
            of_probe(1, minutes=8),
            [
                values(r.SLO_BAD_RATIO, ("window",), {"1h": 0.1}, window="1h", minute=18),
                nothing(f"{r.SLO_TOTAL.name} > 0", minute=18),
            ],
        ),
    ]


def test_classic_histograms(bench: Bench) -> None:
    bench.run(cases(native=False), WANTED)


@pytest.mark.needs("prometheus3")
def test_native_histograms(promtool3: Path, tmp_path: Path) -> None:
    bench = Bench(promtool3, tmp_path, Options(histograms="native"))
    bench.run(cases(native=True), WANTED)


@pytest.mark.needs("prometheus3")
def test_native_rules_find_nothing_in_classic_series(promtool3: Path, tmp_path: Path) -> None:
    bench = Bench(promtool3, tmp_path, Options(histograms="native"))
    blind = [
        Case(case.name, case.series, [nothing(r.MODEL_FIRST_TOKEN.name)]) for case in cases(native=False)[:1]
    ]
    bench.run(blind, WANTED)


def test_errors_and_overrides(bench: Bench) -> None:
    """Objectives, seconds and windows follow the settings; who gives up is no error."""
    settings = parse(
        {
            "slo": {
                "first_token": {"seconds": 0.1, "objective": 0.5},
                "errors": {"objective": 0.9},
                "page_fast": {"long": "20m", "short": "10m"},
            }
        },
        "test",
    )
    e = probed(1)
    case = Case(
        "overridden",
        [
            series(engine.INFO, 1, **e, engine_name="vllm", engine_version="0.33"),
            *histogram(engine.REQUEST_FIRST_TOKEN, FAST, 10, **e, outcome="stop", preempted="false"),
            counter(engine.TENANT_REQUESTS, 6, **e, tenant="a", outcome="stop"),
            counter(engine.TENANT_REQUESTS, 1, **e, tenant="a", outcome="error", error_type="x"),
            counter(engine.TENANT_REQUESTS, 1, **e, tenant="b", outcome="rejected"),
            counter(engine.TENANT_REQUESTS, 5, **e, tenant="b", outcome="abort"),
        ],
        [
            values(r.SLO_BAD, ("slo",), {"first_token": 5, "errors": 2}),
            values(r.SLO_TOTAL, ("slo",), {"first_token": 10, "errors": 8}),
            values(
                r.SLO_BURN,
                ("slo", "window"),
                {("first_token", "10m"): 1, ("errors", "10m"): 2.5},
                window="10m",
            ),
            values(
                r.SLO_BURN,
                ("slo", "window"),
                {("first_token", "20m"): 1, ("errors", "20m"): 2.5},
                window="20m",
            ),
            nothing(f"{r.SLO_BURN.name}{{window=~'5m|1h'}}"),
        ],
    )
    Bench(bench.promtool, bench.folder, settings=settings).run([case], WANTED)
