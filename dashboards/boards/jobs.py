"""Jobs: training, fine-tuning, notebooks and batch processes: what they use of what they hold, and what it
costs."""

from __future__ import annotations

from dashboards import links
from dashboards.board import Board, Options, section
from dashboards.links import to
from dashboards.panels import Query, Visual, bargauge, high_is_good, low_is_good, stat, timeseries
from dashboards.queries import by, quotient, scoped
from dashboards.tables import Column, table
from recording_rules import records

JOB = "workload_namespace, workload_pod, process"
NAME = "{{workload_namespace}}/{{workload_pod}} {{process}}"


def board(_: Options) -> Board:
    """The dashboard."""
    return Board(
        links.JOBS,
        "Jobs",
        "GPU processes that are no known engine: how well they use what they hold, idle hours, cost by"
        " owner.",
        (section("Now", *_now()), section("Jobs", *_jobs()), section("Over time", *_time())),
        start="now-6h",
        refresh="1m",
    )


def _now() -> tuple[Visual, ...]:
    gpus, idle = (
        by("sum", "", scoped(records.WORKLOAD_GPUS)),
        by("sum", "", scoped(records.WORKLOAD_GPUS_IDLE)),
    )
    return (
        stat(
            "Jobs",
            "Jobs that are on a GPU.",
            Query(f"count ({by('sum', JOB, scoped(records.WORKLOAD_GPUS))})"),
            unit="short",
            size=(5, 4),
        ),
        stat("GPUs held", "GPUs that jobs answer for.", Query(gpus), unit="short", decimals=1, size=(5, 4)),
        stat(
            "Not used",
            "Share of what jobs hold that they do not use. Above a half: input-bound, waiting, or forgotten.",
            Query(quotient(idle, gpus)),
            unit="percentunit",
            decimals=0,
            steps=low_is_good(0.3, 0.6),
            size=(5, 4),
        ),
        stat(
            "Tensor activity",
            "Mean tensor activity of jobs that have their GPUs for themselves. Low in training: input-bound, "
            "or not in half precision.",
            Query(by("avg", "", scoped(records.WORKLOAD_TENSOR))),
            unit="percentunit",
            decimals=0,
            steps=high_is_good(0.05, 0.15),
            size=(5, 4),
        ),
        stat(
            "Cost per hour",
            "Allocation basis.",
            Query(by("sum", "", scoped(records.WORKLOAD_COST, basis="allocation"))),
            unit="short",
            decimals=2,
            size=(4, 4),
        ),
    )


def _jobs() -> tuple[Visual, ...]:
    hours = f"sum by ({JOB}) (sum_over_time ({scoped(records.WORKLOAD_GPUS_ROLLUP)}[$__range:5m])) / 12"
    idle = f"sum by ({JOB}) (sum_over_time ({scoped(records.WORKLOAD_GPUS_IDLE)}[$__range:5m])) / 12"
    owner = "workload_namespace"
    return (
        table(
            "Jobs",
            "Each job's GPUs, activity, memory, hours in the shown range and cost. SM activity low and memory"
            " high: a smaller card, or the data loader.",
            Column("GPUs", by("sum", JOB, scoped(records.WORKLOAD_GPUS)), "short", 2),
            Column("SM", by("avg", JOB, scoped(records.WORKLOAD_SM)), "percentunit", 0, bar=True, top=1),
            Column(
                "Tensor", by("avg", JOB, scoped(records.WORKLOAD_TENSOR)), "percentunit", 0, bar=True, top=1
            ),
            Column("Memory", by("sum", JOB, scoped(records.WORKLOAD_MEMORY)), "bytes", 1),
            Column("Of its GPUs", by("max", JOB, scoped(records.WORKLOAD_MEMORY_RATIO)), "percentunit", 0),
            Column("GPU-hours", hours, "h", 1),
            Column("Idle GPU-hours", idle, "h", 1, steps=low_is_good(2, 12)),
            Column(
                "Cost per hour", by("sum", JOB, scoped(records.WORKLOAD_COST, basis="allocation")), "short", 2
            ),
            Column("Used of it", by("sum", JOB, scoped(records.WORKLOAD_COST, basis="usage")), "short", 2),
            labels={"workload_namespace": "Namespace", "workload_pod": "Pod", "process": "Process"},
            sort="Cost per hour",
            size=(24, 10),
        ),
        bargauge(
            "Cost per hour by owner",
            "Allocation basis, by namespace.",
            Query(
                f"sort_desc ({by('sum', owner, scoped(records.WORKLOAD_COST, basis='allocation'))})",
                "{{workload_namespace}}",
                instant=True,
            ),
            unit="short",
            decimals=2,
            size=(8, 8),
        ),
        bargauge(
            "Idle GPU-hours by owner",
            "GPU-hours of the shown range that were held and not used.",
            Query(
                f"sum by ({owner}) (sum_over_time ({scoped(records.WORKLOAD_GPUS_IDLE)}[$__range:5m])) / 12",
                "{{workload_namespace}}",
                instant=True,
            ),
            unit="h",
            decimals=1,
            size=(8, 8),
        ),
        bargauge(
            "Memory held",
            "Device memory of each job.",
            Query(by("sum", JOB, scoped(records.WORKLOAD_MEMORY)), NAME, instant=True),
            unit="bytes",
            size=(8, 8),
            links=[to(links.CUDA_MEMORY, "CUDA memory")],
        ),
    )


def _time() -> tuple[Visual, ...]:
    return (
        timeseries(
            "SM activity",
            "SM time that each job used, mean over its GPUs.",
            Query(by("avg", JOB, scoped(records.WORKLOAD_SM)), NAME),
            unit="percentunit",
            limits=(0, 1),
        ),
        timeseries(
            "Tensor activity",
            "Tensor activity of jobs that have their GPUs for themselves.",
            Query(by("avg", JOB, scoped(records.WORKLOAD_TENSOR)), NAME),
            unit="percentunit",
            limits=(0, 1),
        ),
        timeseries(
            "GPUs held and not used",
            "Each job's idle part. Regular dark hours can be given to batch work.",
            Query(by("sum", JOB, scoped(records.WORKLOAD_GPUS_IDLE)), NAME),
            unit="short",
            stacked=True,
        ),
        timeseries(
            "GPUs by job over days",
            "Means of five minutes, for ranges of days.",
            Query(by("sum", JOB, scoped(records.WORKLOAD_GPUS_ROLLUP)), NAME, step="5m"),
            unit="short",
            stacked=True,
            size=(24, 8),
        ),
    )
