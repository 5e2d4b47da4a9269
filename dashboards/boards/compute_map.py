"""Compute map: where the fleet's compute goes, a row per GPU and a column per second; a click leads to the
GPU."""

from __future__ import annotations

from dashboards import links
from dashboards.board import Board, Options, section
from dashboards.links import at_moment, label, to
from dashboards.panels import Link, Query, Visual, heatmap, high_is_good, low_is_good, stat, text, timeseries
from dashboards.queries import by, quotient, rows, scoped, signal_map, signals
from dashboards.tables import Column, table
from dashboards.variables import Variable
from recording_rules import records

SECOND = "1s"
COLUMNS = 900
"""A quarter of an hour of seconds. Grafana asks for no more points than this."""


def board(_: Options) -> Board:
    """The dashboard."""
    here = {"gpu_uuid": label("gpu_uuid")}
    map_links = (
        at_moment(links.GPU, "This GPU, the minutes around this cell", **here),
        to(links.GPU, "This GPU, the whole time shown", **here),
        to(links.REQUESTS, "Requests and KV cache"),
    )
    active, info = records.DEVICE_ACTIVE, records.DEVICE_INFO
    gpus = by("count", "", scoped(info))
    idle = f"count ({scoped(active)} < 0.05) or 0 * {gpus}"
    tiles = (
        stat("GPUs", "GPUs that some exporter lists, on the chosen nodes.", Query(gpus), unit="short"),
        stat(
            "Not answering",
            "GPUs that are listed and do not answer; the table says which. Open Alerts for the reason.",
            Query(f"count ({scoped(records.DEVICE_UP)} == 0) or 0 * {gpus}"),
            unit="short",
            steps=low_is_good(1, 2),
        ),
        stat(
            "Mean activity",
            "Mean activity of the chosen GPUs (SM activity where the card tells it). Low beside a full queue"
            " means that something else is the brake: see Requests and KV cache.",
            Query(by("avg", "", scoped(active))),
            unit="percentunit",
            decimals=0,
            steps=high_is_good(0.1, 0.3),
        ),
        stat(
            "Idle GPUs",
            "GPUs below 5 % activity now. Cost says what they cost, Alerts which of them could be given"
            " back.",
            Query(idle),
            unit="short",
            steps=low_is_good(1, 4),
            links=[to(links.COST, "What idle GPUs cost")],
        ),
        stat(
            "Memory used",
            "Device memory that is allocated, of all chosen GPUs'. vLLM takes nearly all of it at its start,"
            " so a high value alone says nothing.",
            Query(
                quotient(
                    by("sum", "", scoped(records.DEVICE_MEMORY_USED_BYTES)),
                    by("sum", "", scoped(records.DEVICE_MEMORY_TOTAL_BYTES)),
                )
            ),
            unit="percentunit",
            decimals=0,
        ),
        stat(
            "Power",
            "Power that the chosen GPUs draw.",
            Query(by("sum", "", scoped(records.DEVICE_POWER))),
            unit="watt",
        ),
    )
    fleet = (
        map_panel(map_links),
        timeseries(
            "Activity by node",
            "Mean activity of each node's GPUs. A node that stays below the others is idle or stuck: open it"
            " in the map.",
            Query(f"topk (20, {scoped(records.NODE_ACTIVE)})", "{{node}}"),
            unit="percentunit",
            limits=(0, 1),
            links=[to(links.COMPUTE_MAP, "Only this node", node=label("node"))],
        ),
        timeseries(
            "Tokens",
            "Tokens that the chosen models compute (input), find in the prefix cache (cached) and make"
            " (output).",
            Query(by("sum", "kind", scoped(records.MODEL_TOKENS)), "{{kind}}"),
            unit="tokens/s",
        ),
        timeseries(
            "Requests running and waiting",
            "Requests of the chosen models. Waiting ones beside idle GPUs mean that the KV cache or the"
            " engine's CPU is the brake.",
            Query(by("sum", "", scoped(records.MODEL_RUNNING)), "running"),
            Query(by("sum", "", scoped(records.MODEL_WAITING)), "waiting"),
            unit="short",
        ),
    )
    long = heatmap(
        "The same over days",
        "Activity of each GPU, means of five minutes from the recording rules: for ranges of hours to weeks."
        " Days with the same dark hours are time that could be given back.",
        Query(rows(by("max", "gpu_uuid", scoped(records.DEVICE_ACTIVE_ROLLUP))), "{{at}}", step="5m"),
        unit="percentunit",
        links=map_links,
        points=600,
        step="5m",
    )
    return Board(
        links.COMPUTE_MAP,
        "Compute map",
        "Where the compute of the fleet goes, second by second. Click a cell to reach the GPU and its"
        " requests.",
        (
            section("Fleet now", *tiles),
            section("Map", *fleet),
            section("GPUs", gpu_table()),
            section("Long ranges: choose six hours or more", long, collapsed=True),
            section("How to read it", text("Reading the map", _READING, size=(24, 6)), collapsed=True),
        ),
        start="now-5m",
        refresh="5s",
        variables=(
            Variable(
                "signal",
                "Signal",
                choices=tuple((signal.title, signal.pattern) for signal in signals()),
                about="What the map's colour is",
            ),
        ),
    )


def map_panel(map_links: tuple[Link, ...]) -> Visual:
    """The map itself."""
    return heatmap(
        "GPU × time: ${signal:text}",
        "Each row is a GPU, each column a second (up to 15 minutes; longer ranges have wider columns), the"
        " colour is the chosen signal from 0 (dark) to 1 (bright). Rows are ordered by node, card and device."
        " A dark row is an idle GPU; a missing row is one that is not read. Click a cell for links to the GPU"
        " and what ran on it.",
        Query(rows(signal_map(), "@ end()"), "{{at}}", step=SECOND),
        unit="percentunit",
        size=(24, 14),
        links=map_links,
        points=COLUMNS,
        step=SECOND,
        decimals=0,
    )


def gpu_table() -> Visual:
    """All chosen GPUs with their state now."""
    tops = (links.to(links.GPU, "This GPU", gpu_uuid=links.cell("GPU")),)
    hottest = by("max", "cluster, node, gpu_uuid, device, model", scoped(records.DEVICE_TEMPERATURE))
    throttled = by("max", "cluster, node, gpu_uuid, device, model", scoped(records.DEVICE_THROTTLED))
    return table(
        "GPUs",
        "The chosen GPUs now, least active first. Empty cells are what the card does not tell. Throttled is"
        " the share of time in which clocks were held down for the worst reason.",
        Column(
            "Answers",
            scoped(records.DEVICE_UP),
            values=(("1", "yes", "#0072B2"), ("0", "no", "#D55E00")),
        ),
        Column("Activity", scoped(records.DEVICE_ACTIVE), "percentunit", 0, bar=True, top=1),
        Column("Busy", scoped(records.DEVICE_BUSY), "percentunit", 0, bar=True, top=1),
        Column("Tensor", scoped(records.DEVICE_TENSOR_ACTIVE), "percentunit", 0, bar=True, top=1),
        Column("Memory", scoped(records.DEVICE_MEMORY_USED), "percentunit", 0, bar=True, top=1),
        Column("Power", scoped(records.DEVICE_POWER), "watt", 0),
        Column("Hottest sensor", hottest, "celsius", 0, steps=low_is_good(80, 88)),
        Column("Throttled", throttled, "percentunit", 0, steps=low_is_good(0.05, 0.3)),
        Column("Idle hours of the range", _idle_hours(), "h", 1),
        labels={"node": "Node", "device": "Device", "model": "Card", "gpu_uuid": "GPU"},
        hidden=("cluster",),
        links={"GPU": tops, "Device": tops},
        sort="Activity",
        size=(24, 12),
    )


def _idle_hours() -> str:
    """Hours of the shown range in which a GPU was below 5 % activity, from means of five minutes."""
    idle = f"({scoped(records.DEVICE_ACTIVE_ROLLUP)} < bool 0.05)"
    return f"avg_over_time({idle}[$__range:5m]) * $__range_s / 3600"


_READING = """\
**Signals.** *Activity* is SM activity where the card tells it (Hopper and newer), else the busy ratio,
which is 1 as soon as one small kernel runs. *Tensor pipes* near 0 on a busy GPU: the work is not matrix
arithmetic, or starves. *Memory used* says what is allocated, not what is needed. *KV cache used* is that
of the engine on the GPU.

**Seconds.** The map asks for one column per second. The agent's fast tier has to be scraped each second,
and Grafana refreshes no faster than `min_refresh_interval` in its `[dashboards]` section allows: 5 s
unless it is set to `1s`.
"""
