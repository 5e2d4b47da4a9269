"""Requests and KV cache: who holds it, who was pushed out, how long requests take, what long prompts do to
others."""

from __future__ import annotations

from dashboards import links
from dashboards.board import Board, Options, section
from dashboards.links import at_moment, label, to
from dashboards.panels import Query, Visual, bargauge, buckets, low_is_good, stat, timeseries
from dashboards.queries import (
    ENGINE_NAME,
    bucket_rate,
    by,
    count_rate,
    increase,
    mean,
    quantile,
    quotient,
    rate,
    scoped,
)
from dashboards.tables import Column, table, traces
from gpuglass.families import engine
from gpuglass.family import Family
from gpuglass.promql import regex
from recording_rules import records

SECOND = "1s"
POINTS = 600
"""Columns of panels that ask for seconds: ten minutes of them, longer ranges are coarser."""


def board(options: Options) -> Board:
    """The dashboard."""
    return Board(
        links.REQUESTS,
        "Requests and KV cache",
        "Which requests hold the KV cache, whom they push out, and how long requests take; dots on panels are"
        " requests with their traces.",
        (
            section("Now", *_now()),
            section("KV cache", *_cache(options)),
            section("Engines", *_engines()),
            section("Latency", *_latency(options)),
            section("Long prompts and their effect", *_long(options)),
            section("Traces", *_traces(options)),
        ),
        refresh="10s",
    )


def _now() -> tuple[Visual, ...]:
    return (
        stat(
            "Running", "Requests that run.", Query(by("sum", "", scoped(records.MODEL_RUNNING))), unit="short"
        ),
        stat(
            "Waiting",
            "Requests that wait to be scheduled. Steadily more than run: more replicas, or a larger KV"
            " cache.",
            Query(by("sum", "", scoped(records.MODEL_WAITING))),
            unit="short",
            steps=low_is_good(10, 100),
        ),
        stat(
            "Fullest KV cache",
            "Share held in the fullest engine. Above 0.95 requests get preempted.",
            Query(by("max", "", scoped(records.MODEL_KV_USED))),
            unit="percentunit",
            decimals=0,
            steps=low_is_good(0.9, 0.97),
        ),
        stat(
            "Largest request",
            "Share of an engine's KV cache that one request holds.",
            Query(by("max", "", scoped(records.ENGINE_KV_HOLDER))),
            unit="percentunit",
            decimals=0,
            steps=low_is_good(0.25, 0.5),
        ),
        stat(
            "Preemptions",
            "Running requests that lose their blocks, per second. Their work is done again.",
            Query(by("sum", "", scoped(records.MODEL_PREEMPTIONS))),
            unit="ops",
            decimals=2,
            steps=low_is_good(0.05, 0.5),
        ),
        stat(
            "Prefix reuse",
            "Share of prompt tokens that the prefix cache had. Low with a shared system prompt: is prefix "
            "caching on, does the router keep sessions together?",
            Query(by("avg", "", scoped(records.MODEL_PREFIX_HIT))),
            unit="percentunit",
            decimals=0,
        ),
    )


def _cache(options: Options) -> tuple[Visual, ...]:
    holders = by("max", "model_name, engine, workload_pod, holder, tenant", scoped(engine.KV_HOLDER))
    used = f"{scoped(engine.KV_USED_BLOCKS)} / {scoped(engine.KV_POOL_BLOCKS)}"
    return (
        timeseries(
            "KV cache used",
            "Share of each engine's blocks that requests hold, each second.",
            Query(used, ENGINE_NAME, step=SECOND),
            unit="percentunit",
            limits=(0, 1),
            steps=low_is_good(0.9, 0.97),
            size=(12, 8),
            step=SECOND,
            points=POINTS,
        ),
        timeseries(
            "What the cache is made of",
            "Held: by requests. Cached: prefixes that no request holds, can be taken. Waste: empty places in"
            " last blocks. Much waste: a smaller block size.",
            Query(by("avg", "", scoped(records.ENGINE_KV_USED)), "held"),
            Query(by("avg", "", scoped(records.ENGINE_KV_CACHED)), "cached prefixes"),
            Query(by("avg", "", scoped(records.ENGINE_KV_WASTE)), "waste in held blocks"),
            unit="percentunit",
            limits=(0, 1),
            size=(12, 8),
        ),
        bargauge(
            "Top holders now",
            "The five requests with the largest shares of an engine's cache, with their tenants. One above a"
            " quarter slows all others: its request id or trace is the exemplar in the panel beside.",
            Query(f"topk (10, {holders})", "{{tenant}} {{model_name}} #{{holder}}", instant=True),
            unit="percentunit",
            limits=(0, 1),
            steps=low_is_good(0.25, 0.5),
            decimals=1,
            links=[to(links.TENANTS, "This tenant", tenant=label("tenant"))],
            size=(8, 9),
        ),
        timeseries(
            "Hogging",
            "Requests at once that hold more than a quarter of a KV cache, by tenant. Dots name the request"
            " while it still runs.",
            Query(
                by("sum", "tenant, model_name", rate(engine.KV_HOG_SECONDS)),
                "{{tenant}} {{model_name}}",
                exemplar=True,
            ),
            unit="short",
            size=(8, 9),
            links=[at_moment(links.TENANTS, "This tenant then", tenant=label("tenant"))],
        ),
        timeseries(
            "Preemptions",
            "Requests that lost their blocks, by cause. kv_full: the cache is too small for what is admitted:"
            " lower max_num_seqs or raise gpu_memory_utilization. Dots name the victim and the holder.",
            Query(
                by("sum", "cause, model_name", rate(engine.PREEMPTIONS)),
                "{{cause}} {{model_name}}",
                exemplar=True,
            ),
            unit="ops",
            size=(8, 9),
        ),
        buckets(
            "Peak share of the KV cache per request",
            "Requests by the largest share that they ever held. A few dots far up are the hogs: click one.",
            Query(bucket_rate(options.histograms, engine.KV_PEAK), "{{le}}", exemplar=True, format="heatmap"),
            unit="percentunit",
        ),
        timeseries(
            "Prefix reuse",
            "Share of prompt tokens that the prefix cache had, by model.",
            Query(scoped(records.MODEL_PREFIX_HIT), "{{model_name}}"),
            unit="percentunit",
            limits=(0, 1),
            size=(6, 9),
        ),
        timeseries(
            "How long free blocks keep their prefix",
            "Time from when the last request let go of a cached block until it was taken. Shorter than the"
            " pause between two turns of a chat: prefixes are lost before they are used again.",
            Query(quantile(options.histograms, 0.5, engine.KV_EVICT), "half"),
            Query(quantile(options.histograms, 0.1, engine.KV_EVICT), "shortest tenth"),
            unit="s",
            size=(6, 9),
        ),
    )


def _engines() -> tuple[Visual, ...]:
    name = "{{model_name}} {{workload_pod}} {{engine}}"
    return (
        timeseries(
            "Waiting by engine",
            "Requests that wait in each engine. One engine queues while another is idle: the router does not"
            " spread.",
            Query(f"topk (12, {scoped(records.ENGINE_WAITING)})", name),
            unit="short",
        ),
        timeseries(
            "Running by engine",
            "Requests that run in each engine. At max_num_seqs further ones wait.",
            Query(f"topk (12, {scoped(records.ENGINE_RUNNING)})", name),
            unit="short",
        ),
        timeseries(
            "Output by engine",
            "Tokens that each engine makes. 0 beside waiting requests: it is stuck; see the alerts'"
            " runbooks.",
            Query(f"bottomk (12, {scoped(records.ENGINE_TOKENS, kind='output')})", name),
            unit="tokens/s",
        ),
        table(
            "Engines",
            "Each engine's dialect (whose series are read), preemptions and wasted share of GPU time.",
            Column(
                "Connected",
                by("max", "model_name, engine, workload_pod", scoped(records.ENGINE_UP)),
                values=(("1", "yes", "#0072B2"), ("0", "no", "#D55E00")),
            ),
            Column(
                "KV cache",
                by("max", "model_name, engine, workload_pod", scoped(records.ENGINE_KV_USED)),
                "percentunit",
                0,
                bar=True,
                top=1,
            ),
            Column(
                "Preemptions/s",
                by("max", "model_name, engine, workload_pod", scoped(records.ENGINE_PREEMPTIONS)),
                "short",
                2,
                steps=low_is_good(0.05, 0.5),
            ),
            Column(
                "Wasted",
                by("max", "model_name, engine, workload_pod", scoped(records.ENGINE_WASTED)),
                "percentunit",
                1,
                steps=low_is_good(0.05, 0.2),
            ),
            Column(
                "Prefix reuse",
                by("max", "model_name, engine, workload_pod", scoped(records.ENGINE_PREFIX_HIT)),
                "percentunit",
                0,
            ),
            labels={"model_name": "Model", "engine": "Engine", "workload_pod": "Pod"},
            sort="KV cache",
            size=(24, 8),
        ),
    )


def _latency(options: Options) -> tuple[Visual, ...]:
    form = options.histograms

    def percentiles(family: Family, title: str, says: str) -> Visual:
        return timeseries(
            title,
            f"{says} Dots are requests: click one for its trace.",
            Query(quantile(form, 0.5, family), "p50"),
            Query(quantile(form, 0.95, family), "p95"),
            Query(quantile(form, 0.99, family), "p99", exemplar=True),
            unit="s",
        )

    return (
        percentiles(
            engine.REQUEST_FIRST_TOKEN,
            "Time to first token",
            "From arrival to the first token. Queue and prefill beside tell which of the two it is.",
        ),
        percentiles(engine.REQUEST_DURATION, "Duration", "From arrival to the last output."),
        percentiles(
            engine.REQUEST_QUEUE,
            "Queue",
            "From arrival to the first scheduling. Grows when the KV cache is full or "
            "max_num_seqs is reached.",
        ),
        percentiles(
            engine.REQUEST_PREFILL, "Prefill", "From first scheduling to the first token: grows with prompts."
        ),
        timeseries(
            "Time between tokens",
            "From the engines' own histograms, by model and quantile. Rises when long prompts share steps"
            " with decoding.",
            Query(scoped(records.MODEL_INTER_TOKEN), "{{model_name}} p{{quantile}}"),
            unit="s",
        ),
        buckets(
            "Durations",
            "Requests by duration. Two bands are two kinds of requests; a band that rises is load.",
            Query(bucket_rate(form, engine.REQUEST_DURATION), "{{le}}", exemplar=True, format="heatmap"),
            unit="s",
            size=(8, 8),
        ),
        timeseries(
            "Requests by outcome",
            "Requests that ended, by outcome. abort: clients gave up; error and rejected: see the error types"
            " of Tenants.",
            Query(by("sum", "outcome", scoped(records.MODEL_REQUESTS)), "{{outcome}}"),
            unit="reqps",
            stacked=True,
            size=(12, 8),
        ),
        timeseries(
            "Budget burnt",
            "Burn rate of each objective over an hour: 1 uses the budget up exactly in its time, 14 in two"
            " days.",
            Query(scoped(records.SLO_BURN, window="1h"), "{{model_name}} {{slo}}"),
            unit="short",
            size=(12, 8),
            steps=low_is_good(1, 14.4),
        ),
    )


def _long(options: Options) -> tuple[Visual, ...]:
    form = options.histograms
    preempted = count_rate(form, engine.REQUEST_DURATION, preempted="true")
    affected = Query(quotient(preempted, count_rate(form, engine.REQUEST_DURATION)), "preempted requests")
    return (
        buckets(
            "Prompt lengths",
            "Requests by prompt tokens. Long prompts take prefill steps from everybody: the panels beside"
            " show what that costs.",
            Query(bucket_rate(form, engine.REQUEST_PROMPT_TOKENS), "{{le}}", exemplar=True, format="heatmap"),
            unit="short",
            size=(8, 8),
        ),
        timeseries(
            "Prefill tokens beside step time",
            "Tokens per second that steps spent on prompts, and the mean time of a step. Steps that grow with"
            " prompts make all running requests wait: chunked prefill with a smaller chunk evens it out.",
            Query(by("sum", "", rate(engine.STEP_TOKENS, phase="prefill")), "prefill tokens/s"),
            Query(by("avg", "", scoped(records.ENGINE_STEP_SECONDS)), "mean step (right axis)"),
            unit="short",
            size=(8, 8),
            overrides=[_right("B", "s")],
        ),
        timeseries(
            "Prefill share and time between tokens",
            "Share of the GPU time that went to prompts, and the 95th percentile of the time between tokens."
            " Both rise together: long prompts slow down everybody's decoding.",
            Query(
                quotient(
                    by("sum", "", rate(engine.GPU_SECONDS_BY_PART, part="prefill")),
                    by("sum", "", rate(engine.GPU_SECONDS_BY_PART, part=regex("prefill|decode"))),
                ),
                "prefill share",
            ),
            Query(
                by("max", "", scoped(records.MODEL_INTER_TOKEN, quantile="0.95")),
                "between tokens p95 (right axis)",
            ),
            unit="percentunit",
            size=(8, 8),
            overrides=[_right("B", "s")],
        ),
        timeseries(
            "Requests that were preempted",
            "Share of the ended requests that had lost their blocks at least once. They took longer than they"
            " had to.",
            affected,
            unit="percentunit",
            size=(8, 8),
        ),
        timeseries(
            "Mean prompt and output",
            "Mean tokens per request. A jump of the mean prompt is a new kind of client.",
            Query(mean(form, engine.REQUEST_PROMPT_TOKENS), "prompt"),
            Query(mean(form, engine.REQUEST_CACHED_TOKENS), "cached of it"),
            Query(mean(form, engine.REQUEST_OUTPUT_TOKENS), "output"),
            unit="short",
            size=(8, 8),
        ),
        table(
            "Wasted GPU time",
            "GPU-seconds of the range whose result nobody used: recompute (after preemption), abort, error.",
            Column("GPU-seconds", by("sum", "model_name, tenant, reason", increase(engine.WASTED)), "s", 1),
            labels={"model_name": "Model", "tenant": "Tenant", "reason": "Reason"},
            links={"Tenant": [to(links.TENANTS, "This tenant", tenant=links.cell("Tenant"))]},
            sort="GPU-seconds",
            size=(8, 8),
        ),
    )


def _traces(options: Options) -> tuple[Visual, ...]:
    return (
        traces(
            "Slow requests",
            "Traces of requests of the chosen models that took more than ten seconds or held more than a"
            " quarter of the cache.",
            options.traces,
            '{ span.gen_ai.request.model =~ "${model_name:regex}" && '
            "(trace:duration > 10s || span.gpuglass.kv.peak_ratio > 0.25) }",
            {"gen_ai.request.model": "${model_name:raw}"},
        ),
    )


def _right(ref: str, unit: str) -> dict[str, object]:
    """An override: a query on an axis of its own, on the right."""
    properties = [{"id": "custom.axisPlacement", "value": "right"}, {"id": "unit", "value": unit}]
    return {"matcher": {"id": "byFrameRefID", "options": ref}, "properties": properties}
