"""CUDA memory: the ledger by process, failures, leaks with the stacks that leak, fragmentation by hour and
weekday."""

from __future__ import annotations

from dashboards import links
from dashboards.board import Board, Options, section
from dashboards.links import cell, to
from dashboards.panels import (
    BAD_IF_ANY,
    Query,
    Visual,
    buckets,
    heatmap,
    low_is_good,
    stat,
    timeline,
    timeseries,
    value_mapping,
)
from dashboards.queries import bucket_rate, by, increase, rate, scoped
from dashboards.tables import Column, table
from gpuglass.families import anomaly, cuda, engine, tracer
from gpuglass.promql import not_equal
from recording_rules import records

PROCESS = "workload_namespace, workload_pod, process"
NAME = "{{workload_pod}} {{process}}"
_STATES = (
    ("0", "healthy", "#0072B2"),
    ("1", "suspected", "#D55E00"),
)


def board(options: Options) -> Board:
    """The dashboard."""
    return Board(
        links.CUDA_MEMORY,
        "CUDA memory",
        "Allocations of CUDA processes as the tracer's ledger has them: who allocates, what fails, what"
        " leaks, what is fragmented.",
        (
            section("Now", *_now()),
            section("Ledger", *_ledger(options)),
            section("Leaks", *_leaks()),
            section("Failures and single allocations", *_events(options)),
            section("Fragmentation", *_fragmentation()),
        ),
        start="now-3h",
    )


def _now() -> tuple[Visual, ...]:
    return (
        stat(
            "In the ledger",
            "CUDA memory that traced processes have allocated (device and virtual kinds).",
            Query(
                by("sum", "", scoped(tracer.LIVE, kind="device"))
                + " + "
                + by("sum", "", scoped(tracer.LIVE, kind="virtual"))
            ),
            unit="bytes",
            size=(5, 4),
        ),
        stat(
            "Leaks suspected",
            "Kinds of memory of a process that grow as only a leak does. The table below names stacks.",
            Query(by("sum", "", scoped(cuda.LEAK_SUSPECTED))),
            unit="short",
            steps=BAD_IF_ANY,
            size=(5, 4),
        ),
        stat(
            "Failed calls in the range",
            "Allocations that failed; by result below.",
            Query(by("sum", "", increase(tracer.FAILURES))),
            unit="short",
            decimals=0,
            steps=low_is_good(1, 10),
            size=(5, 4),
        ),
        stat(
            "Untracked",
            "Memory that the driver lists beyond the ledger: contexts, modules, what was there before"
            " tracing.",
            Query(by("sum", "", scoped(tracer.UNTRACKED))),
            unit="bytes",
            size=(5, 4),
        ),
        stat(
            "Out of memory",
            "Steps of engines that ended because an allocation failed, in the shown range.",
            Query(by("sum", "", increase(engine.OUT_OF_MEMORY))),
            unit="short",
            decimals=0,
            steps=BAD_IF_ANY,
            size=(4, 4),
        ),
    )


def _ledger(options: Options) -> tuple[Visual, ...]:
    return (
        timeseries(
            "Live memory by process",
            "What each process has allocated and not freed, all kinds but mapped addresses.",
            Query(by("sum", PROCESS, scoped(tracer.LIVE, kind=not_equal("mapped"))), NAME),
            unit="bytes",
            stacked=True,
        ),
        timeseries(
            "Allocation and freeing",
            "Bytes per second. Steady high rates in a serving process: the caching allocator is bypassed or"
            " thrashing.",
            Query(by("sum", "", rate(tracer.ALLOCATED)), "allocated"),
            Query(by("sum", "", rate(tracer.FREED)), "freed"),
            unit="Bps",
        ),
        timeseries(
            "Untracked by process",
            "Driver's figure minus ledger. Growth here is memory that no traced call made: contexts, NCCL,"
            " JIT modules.",
            Query(by("sum", PROCESS, scoped(tracer.UNTRACKED)), NAME),
            unit="bytes",
            limits=(None, None),
        ),
        table(
            "Ledger by process and kind",
            "Live bytes and allocations now; exact is 0 from a loss on until the ledger was brought together"
            " with the driver's figure.",
            Column("Live", by("sum", f"{PROCESS}, kind", scoped(tracer.LIVE)), "bytes", 1, bar=True),
            Column("Allocations", by("sum", f"{PROCESS}, kind", scoped(tracer.LIVE_COUNT)), "short", 0),
            labels={
                "workload_namespace": "Namespace",
                "workload_pod": "Pod",
                "process": "Process",
                "kind": "Kind",
            },
            sort="Live",
            size=(12, 9),
        ),
        buckets(
            "Sizes of allocations",
            "Successful allocations by size. Many small ones: the process does not pool.",
            Query(bucket_rate(options.histograms, tracer.SIZE), "{{le}}", format="heatmap"),
            unit="bytes",
            size=(6, 9),
        ),
        timeline(
            "Exact ledgers",
            "1 while a process's ledger misses nothing.",
            Query(by("min", PROCESS, scoped(tracer.EXACT)), NAME),
            size=(6, 9),
            mappings=value_mapping((("1", "exact", "#0072B2"), ("0", "resyncing", "#E69F00"))),
        ),
    )


def _leaks() -> tuple[Visual, ...]:
    leak = f"{PROCESS}, gpu_uuid, kind"
    return (
        table(
            "Suspected leaks",
            "Growth, how fast, since when, and the strength of the evidence. Per request: growth ÷ requests"
            " served meanwhile.",
            Column("Grows per hour", by("max", leak, scoped(cuda.LEAK_RATE)) + " * 3600", "bytes", 1),
            Column("Grew by", by("max", leak, scoped(cuda.LEAK_GROWTH)), "bytes", 1),
            Column(
                "Confidence", by("max", leak, scoped(cuda.LEAK_CONFIDENCE)), "percentunit", 0, bar=True, top=1
            ),
            Column("Since", by("max", leak, scoped(cuda.LEAK_SINCE)) + " * 1000", "dateTimeAsIso"),
            Column("Per request", by("max", leak, scoped(cuda.LEAK_PER_REQUEST)), "bytes", 1),
            labels={"workload_pod": "Pod", "process": "Process", "kind": "Kind", "gpu_uuid": "GPU"},
            hidden=("workload_namespace",),
            links={"GPU": [to(links.GPU, "This GPU", gpu_uuid=cell("GPU"))]},
            sort="Grows per hour",
            size=(12, 9),
        ),
        table(
            "Stacks that grew",
            "Memory that a stack has allocated and not freed since the growth began, largest first; innermost"
            " function first.",
            Column(
                "Grew by",
                f"topk (15, {by('max', f'{PROCESS}, place, stack', scoped(cuda.LEAK_STACK))})",
                "bytes",
                1,
            ),
            labels={"process": "Process", "place": "Place", "stack": "Stack"},
            hidden=("workload_namespace", "workload_pod"),
            sort="Grew by",
            size=(12, 9),
        ),
        timeline(
            "Verdict over time",
            "What is thought of each kind of memory: 1 is a suspected leak. Gaps: it cannot be told"
            " (learning, undecided).",
            Query(by("max", f"{PROCESS}, kind", scoped(cuda.LEAK_SUSPECTED)), NAME + " {{kind}}"),
            size=(12, 7),
            mappings=value_mapping(_STATES),
        ),
        table(
            "State of the verdicts",
            "What is thought of each process and why: learning, healthy, unknown, blind or suspected.",
            Column("Now", by("max", f"{PROCESS}, kind, state, why", scoped(cuda.LEAK_STATE)), "short"),
            labels={
                "workload_pod": "Pod",
                "process": "Process",
                "kind": "Kind",
                "state": "State",
                "why": "Why",
            },
            hidden=("workload_namespace",),
            size=(12, 7),
        ),
    )


def _events(options: Options) -> tuple[Visual, ...]:
    return (
        timeseries(
            "Failed calls",
            "Calls that failed per second, by the driver's result. out_of_memory: the panel beside names the"
            " request.",
            Query(by("sum", "result, kind", rate(tracer.FAILURES)), "{{result}} {{kind}}"),
            unit="ops",
        ),
        timeseries(
            "Failures with their requests",
            "Failed calls that were told one by one. Dots are the requests that ran then (exact or temporal"
            " link).",
            Query(
                by("sum", "process, code", rate(cuda.EVENT_FAILURES)), "{{process}} {{code}}", exemplar=True
            ),
            unit="ops",
        ),
        timeseries(
            "Engines out of memory",
            "Steps that ended so. Dots name the request with most tokens in the step.",
            Query(by("sum", "model_name", rate(engine.OUT_OF_MEMORY)), "{{model_name}}", exemplar=True),
            unit="ops",
        ),
        buckets(
            "Sizes of what was told",
            "Failures, large allocations and a sample, by size, with the requests that ran then.",
            Query(
                bucket_rate(options.histograms, cuda.EVENT_BYTES), "{{le}}", exemplar=True, format="heatmap"
            ),
            unit="bytes",
            size=(24, 8),
        ),
    )


def _fragmentation() -> tuple[Visual, ...]:
    share = scoped(records.ENGINE_FRAGMENTATION)
    worst = f"max by (model_name) (max_over_time ({share}[1h]))"
    peaks = by("max", "query, weekday, from_hour, to_hour", scoped(anomaly.RECURRING_STRENGTH))
    repeats = by("max", "query, weekday, from_hour, to_hour", scoped(anomaly.RECURRING_REPEATS))
    rows = f'label_replace({worst}, "at", "$1", "model_name", "(.+)")'
    # One query for each hour of the day: the maximum over the days of the range at that hour.
    return (
        timeseries(
            "Fragmentation by worker",
            "Inactive split memory ÷ reserved. Peaks at the same hours each day: see the calendar.",
            Query(share, "{{model_name}} {{workload_pod}} rank {{rank}}"),
            unit="percentunit",
            steps=low_is_good(0.2, 0.4),
            size=(12, 8),
        ),
        heatmap(
            "Fragmentation, hour by hour",
            "Worst worker of each model in each hour: choose a range of days and look for columns that"
            " repeat.",
            Query(rows, "{{at}}", step="1h"),
            unit="percentunit",
            limits=(0, 0.6),
            size=(12, 8),
            step="1h",
            points=200,
        ),
        timeseries(
            "By hour of the day",
            "Mean fragmentation at each hour of the day (UTC) over the last seven days, and on this weekday"
            " of the last four weeks; the line's time is today's.",
            Query(_same_hour(share, days=7, step=1), "same hour, last 7 days", step="1h"),
            Query(_same_hour(share, days=28, step=7), "same hour and weekday, last 4 weeks", step="1h"),
            Query(f"avg ({share})", "now"),
            unit="percentunit",
            size=(12, 8),
        ),
        table(
            "Peaks that come back",
            "Hours at which a peak repeats, by weekday or every day, as the sidecar's detector found them.",
            Column("Explains", peaks, "percentunit", 0, bar=True, top=1),
            Column("Repeats", repeats, "short", 0),
            labels={"query": "Series", "weekday": "Weekday", "from_hour": "From", "to_hour": "To"},
            sort="Explains",
            size=(12, 8),
        ),
    )


def _same_hour(expr: str, days: int, step: int) -> str:
    """Mean over the same hour of earlier days; days that are not stored are left out."""
    selector = expr
    terms = [f"avg (avg_over_time ({selector}[1h] offset {day}d))" for day in range(step, days + 1, step)]
    marked = [f'label_replace({term}, "day", "{index}", "", "")' for index, term in enumerate(terms)]
    return f"avg ({' or '.join(marked)})"
