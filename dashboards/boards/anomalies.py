"""Anomalies and forecast: what is unusual now, what is expected, how good the forecasts are, which peaks
come back."""

from __future__ import annotations

from dashboards import links
from dashboards.board import Board, Options, section
from dashboards.links import to
from dashboards.panels import BAD_IF_ANY, Query, Visual, high_is_good, low_is_good, stat, timeseries
from dashboards.queries import by, rate, scoped
from dashboards.tables import Column, table
from dashboards.variables import Variable
from gpuglass.families import anomaly
from gpuglass.promql import regex
from recording_rules import records

_SERIES = "query, model_name, gpu_uuid, tenant, workload_pod"
_NAME = "{{query}} {{model_name}} {{tenant}} {{gpu_uuid}} {{workload_pod}}"
_QUERY = regex("$query")


def board(_: Options) -> Board:
    """The dashboard."""
    return Board(
        links.ANOMALIES,
        "Anomalies and forecast",
        "What the anomaly sidecar says: scores with bands, forecasts against what came, peaks that come back,"
        " leaks and stragglers.",
        (
            section("Now", *_now()),
            section("Scores", *_scores()),
            section("Forecast", *_forecast()),
            section("Detectors", *_detectors()),
            section("The sidecar", *_sidecar()),
        ),
        start="now-6h",
        variables=(
            Variable(
                "query", "Series", f"label_values({anomaly.READY.name}, query)", about="The sidecar's queries"
            ),
        ),
    )


def _now() -> tuple[Visual, ...]:
    ready = scoped(anomaly.READY, query=_QUERY)
    return (
        stat(
            "Unusual series",
            "Series whose score is above 1: they deviate more than nearly ever before.",
            Query(
                f"count ({by('max', _SERIES, scoped(anomaly.SCORE, query=_QUERY))} > 1) or 0 * count"
                f" ({ready})"
            ),
            unit="short",
            steps=low_is_good(1, 5),
            size=(5, 4),
        ),
        stat(
            "Series scored",
            "Series that were seen long enough to be judged.",
            Query(f"sum ({by('max', _SERIES, ready)})"),
            unit="short",
            size=(5, 4),
        ),
        stat(
            "Silent engines",
            "Engines that are up, have requests, and produce nothing.",
            Query(by("sum", "", by("max", _SERIES, scoped(anomaly.SILENT)))),
            unit="short",
            steps=BAD_IF_ANY,
            size=(5, 4),
        ),
        stat(
            "Stragglers",
            "Members that lag behind their group.",
            Query(by("sum", "", by("max", f"{_SERIES}, rank", scoped(anomaly.STRAGGLER)))),
            unit="short",
            steps=BAD_IF_ANY,
            size=(5, 4),
        ),
        stat(
            "Replicas needed",
            "Replicas that the load needs, now or by forecast.",
            Query(by("sum", "", by("max", "query, model_name", scoped(anomaly.REPLICAS, basis="all")))),
            unit="short",
            decimals=0,
            size=(4, 4),
        ),
    )


def _scores() -> tuple[Visual, ...]:
    return (
        timeseries(
            "Scores",
            "Above 1 the latest value is more unusual than nearly ever before, on any series. `gpuglass"
            " anomaly explain` says why.",
            Query(f"topk (15, {by('max', _SERIES, scoped(anomaly.SCORE, query=_QUERY))})", _NAME),
            unit="short",
            steps=low_is_good(1, 1),
            size=(12, 9),
        ),
        table(
            "Most unusual now",
            "The series with the highest scores, what was expected and the band.",
            Column(
                "Score",
                f"topk (20, {by('max', _SERIES, scoped(anomaly.SCORE, query=_QUERY))})",
                "short",
                2,
                steps=low_is_good(1, 1),
            ),
            Column("Expected", by("max", _SERIES, scoped(anomaly.EXPECTED, query=_QUERY)), "short", 2),
            Column("Lower", by("max", _SERIES, scoped(anomaly.LOWER, query=_QUERY)), "short", 2),
            Column("Upper", by("max", _SERIES, scoped(anomaly.UPPER, query=_QUERY)), "short", 2),
            labels={
                "query": "Series",
                "model_name": "Model",
                "tenant": "Tenant",
                "gpu_uuid": "GPU",
                "workload_pod": "Pod",
            },
            links={"GPU": [to(links.GPU, "This GPU", gpu_uuid=links.cell("GPU"))]},
            sort="Score",
            size=(12, 9),
        ),
        timeseries(
            "Expected bands",
            "The seasonal profile's expectation with its band, mean over the chosen series: outside of it the"
            " seasonal part of the score is above 1. Choose one series above.",
            Query(by("avg", "", by("max", _SERIES, scoped(anomaly.UPPER, query=_QUERY))), "upper"),
            Query(by("avg", "", by("max", _SERIES, scoped(anomaly.EXPECTED, query=_QUERY))), "expected"),
            Query(by("avg", "", by("max", _SERIES, scoped(anomaly.LOWER, query=_QUERY))), "lower"),
            unit="short",
            limits=(None, None),
            size=(24, 8),
        ),
    )


def _forecast() -> tuple[Visual, ...]:
    ahead = by(
        "sum",
        "horizon, quantile",
        by("max", "query, horizon, quantile, model_name", scoped(anomaly.FORECAST, query=_QUERY)),
    )
    before = f"{scoped(anomaly.FORECAST, query=_QUERY, horizon='30m', quantile='0.5')} offset 30m"
    was = by("sum", "", by("max", "query, model_name", before))
    return (
        timeseries(
            "Forecasts",
            "What is forecast for each horizon from now, by quantile, sum over the chosen series.",
            Query(ahead, "in {{horizon}} p{{quantile}}"),
            unit="short",
        ),
        timeseries(
            "Forecast against actual",
            "Tokens made, and what was forecast for this time half an hour before (median).",
            Query(by("sum", "", scoped(records.MODEL_TOKENS, kind="output")), "actual"),
            Query(was, "forecast 30 minutes before"),
            unit="tokens/s",
        ),
        timeseries(
            "Skill",
            "How much smaller the error is than that of expecting no change: 0 is as good, negative is worse"
            " and falls back to persistence.",
            Query(
                by("avg", "query, horizon", scoped(anomaly.FORECAST_SKILL, query=_QUERY)),
                "{{query}} {{horizon}}",
            ),
            unit="percentunit",
            limits=(None, 1),
        ),
        table(
            "Quality by horizon",
            "Error as a share of the value, skill, and whether the forecast or persistence is published, over"
            " about the last day.",
            Column(
                "Error",
                by("avg", "query, horizon", scoped(anomaly.FORECAST_WAPE, query=_QUERY)),
                "percentunit",
                1,
            ),
            Column(
                "Skill",
                by("avg", "query, horizon", scoped(anomaly.FORECAST_SKILL, query=_QUERY)),
                "percentunit",
                1,
                steps=high_is_good(0, 0.1),
            ),
            Column(
                "Published",
                by("min", "query, horizon", scoped(anomaly.FORECAST_USABLE, query=_QUERY)),
                values=(("1", "forecast", "#0072B2"), ("0", "persistence", "#E69F00")),
            ),
            labels={"query": "Series", "horizon": "Horizon"},
            size=(8, 8),
        ),
        timeseries(
            "Coverage",
            "Share of values at or below the forecast quantile: p90 should be near 0.9.",
            Query(
                by("avg", "horizon, quantile", scoped(anomaly.FORECAST_COVERAGE, query=_QUERY)),
                "{{horizon}} p{{quantile}}",
            ),
            unit="percentunit",
            limits=(0, 1),
        ),
        timeseries(
            "Parts of the load",
            "Trend, course of the day and remainder of the latest fit.",
            Query(
                by(
                    "sum",
                    "part",
                    by("max", "query, model_name, part", scoped(anomaly.DECOMPOSITION, query=_QUERY)),
                ),
                "{{part}}",
            ),
            unit="short",
            limits=(None, None),
        ),
        timeseries(
            "Time to exhaustion",
            "Time until the forecast reaches a limit or uses up a quota.",
            Query(
                by("min", "query, model_name, tenant, quantile", scoped(anomaly.EXHAUSTION)),
                "{{query}} {{model_name}} {{tenant}} p{{quantile}}",
            ),
            unit="s",
            size=(12, 8),
        ),
        timeseries(
            "Replicas",
            "Replicas needed by basis; autoscalers read basis all.",
            Query(
                by(
                    "sum",
                    "model_name, basis",
                    by("max", "query, model_name, basis", scoped(anomaly.REPLICAS)),
                ),
                "{{model_name}} {{basis}}",
            ),
            unit="short",
            size=(12, 8),
        ),
    )


def _detectors() -> tuple[Visual, ...]:
    hours = "query, weekday, from_hour, to_hour"
    return (
        table(
            "Calendar of recurring peaks",
            "Peaks that come back at the same hours: move batch work away from them, or scale before them.",
            Column(
                "Explains",
                by("max", hours, scoped(anomaly.RECURRING_STRENGTH)),
                "percentunit",
                0,
                bar=True,
                top=1,
            ),
            Column("Repeats", by("max", hours, scoped(anomaly.RECURRING_REPEATS)), "short", 0),
            labels={"query": "Series", "weekday": "Weekday", "from_hour": "From", "to_hour": "To"},
            sort="Explains",
            size=(12, 8),
        ),
        table(
            "Stranded memory",
            "Memory that GPUs have held idle for long, and for how long.",
            Column(
                "Held",
                by("max", "gpu_uuid, workload_pod, process", scoped(anomaly.STRANDED)) + " > 0",
                "bytes",
                1,
            ),
            Column(
                "Idle for",
                by("max", "gpu_uuid, workload_pod, process", scoped(anomaly.STRANDED_SECONDS)) + " > 0",
                "s",
                0,
            ),
            labels={"gpu_uuid": "GPU", "workload_pod": "Pod", "process": "Process"},
            links={"GPU": [to(links.GPU, "This GPU", gpu_uuid=links.cell("GPU"))]},
            sort="Held",
            size=(12, 8),
        ),
        timeseries(
            "Level shifts after deployments",
            "Change of the level with the latest deployment, as a share of the level before.",
            Query(by("max", "query, model_name", scoped(anomaly.SHIFT_RELATIVE)), "{{query}} {{model_name}}"),
            unit="percentunit",
            limits=(None, None),
        ),
        timeseries(
            "Leaks by metrics",
            "1 while memory grows as a leak does, from metrics alone (no tracer needed).",
            Query(
                by("max", "query, gpu_uuid, workload_pod, process", scoped(anomaly.LEAK)),
                "{{workload_pod}} {{process}}",
            ),
            unit="short",
        ),
        timeseries(
            "Stragglers",
            "Value of each member as a share of its group's median.",
            Query(
                by("max", "query, model_name, rank, gpu_uuid", scoped(anomaly.STRAGGLER_RATIO)),
                "{{query}} {{model_name}} rank {{rank}}",
            ),
            unit="percentunit",
        ),
    )


def _sidecar() -> tuple[Visual, ...]:
    return (
        timeseries(
            "Age of what is published",
            "Time since each query was evaluated. It grows when Prometheus does not answer.",
            Query(f"max by (query) (time() - {scoped(anomaly.LAST_EVALUATION, query=_QUERY)})", "{{query}}"),
            unit="s",
            steps=low_is_good(180, 600),
        ),
        timeseries(
            "Evaluations",
            "Evaluations by result. partial: Prometheus left something out; failed: no answer.",
            Query(by("sum", "result", rate(anomaly.EVALUATIONS, query=_QUERY)), "{{result}}"),
            unit="ops",
        ),
        timeseries(
            "Up since",
            "Time since each replica of the sidecar started. No line: no sidecar.",
            Query(f"time() - {by('max', 'instance', scoped(anomaly.START_TIME))}", "{{instance}}"),
            unit="s",
        ),
    )
