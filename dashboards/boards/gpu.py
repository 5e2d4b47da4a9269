"""GPU drill-down: what ran on a GPU, who holds its memory, which requests had its time."""

from __future__ import annotations

from dashboards import links
from dashboards.board import Board, Options, section
from dashboards.links import label, to
from dashboards.panels import (
    BAD_IF_ANY,
    Query,
    Visual,
    buckets,
    coloured,
    low_is_good,
    stat,
    timeline,
    timeseries,
    value_mapping,
)
from dashboards.queries import (
    ENGINE,
    ENGINE_NAME,
    bucket_rate,
    by,
    device,
    engines_on_gpus,
    on_gpus,
    quotient,
    rate,
    scoped,
)
from dashboards.tables import Column, table, traces
from gpuglass.families import engine, gpu
from gpuglass.promql import regex
from recording_rules import records

SECOND = "1s"
POINTS = 600
"""Columns of panels that ask for seconds: ten minutes of them, longer ranges are coarser."""
MEMORY_COLOURS = {
    "weights": "#0072B2",
    "kv_cache": "#E69F00",
    "graphs": "#009E73",
    "activations": "#CC79A7",
    "in_flight": "#F0E442",
    "allocator_cache": "#56B4E9",
    "unknown": "#999999",
    "context and others": "#D55E00",
    "untracked": "#555555",
}
"""The same part has the same colour on every GPU, whichever parts there are."""
PROCESS = "gpu_uuid, workload_namespace, workload_pod, process"
PROCESS_NAME = "{{workload_pod}} {{process}}"
_UP = (("1", "answers", "#0072B2"), ("0", "does not answer", "#D55E00"))


def board(options: Options) -> Board:
    """The dashboard."""
    return Board(
        links.GPU,
        "GPU drill-down",
        "One GPU (choose it above, or click it in the compute map): its work, its memory, its processes and"
        " requests.",
        (
            section("This GPU", *_identity()),
            section("Work", *_work()),
            section("Processes and memory", *_memory()),
            section("Engines on it", *_engines()),
            section("Requests that ran", *_requests(options)),
            section("Links, clocks, errors", *_hardware(), collapsed=True),
        ),
        start="now-30m",
        refresh="10s",
    )


def _identity() -> tuple[Visual, ...]:
    temperature = by("max", "", device(gpu.TEMPERATURE))
    return (
        table(
            "Identity",
            "Which cards these are. The uuid is what all series are joined by; the bus id is what the"
            " kernel's log names.",
            Column("Answers", on_gpus(device(gpu.UP, "min"), "cluster, node, device"), values=_UP),
            Column("Memory", on_gpus(device(gpu.MEMORY_TOTAL), "cluster, node, device"), "bytes"),
            Column("Power limit", on_gpus(device(gpu.POWER_LIMIT), "cluster, node, device"), "watt"),
            Column(
                "Processes",
                on_gpus(by("sum", "gpu_uuid", scoped(gpu.PROCESSES)), "cluster, node, device"),
                "short",
            ),
            labels={"node": "Node", "device": "Device", "gpu_uuid": "GPU"},
            hidden=("cluster",),
            size=(12, 6),
        ),
        stat(
            "Activity",
            "SM activity where the card tells it, mean of the chosen GPUs.",
            Query(by("avg", "", scoped(records.DEVICE_ACTIVE))),
            unit="percentunit",
            decimals=0,
            size=(3, 6),
        ),
        stat(
            "Memory used",
            "Share of the memory that is allocated.",
            Query(by("avg", "", scoped(records.DEVICE_MEMORY_USED))),
            unit="percentunit",
            decimals=0,
            size=(3, 6),
        ),
        stat(
            "Power",
            "Power drawn.",
            Query(by("sum", "", device(gpu.POWER))),
            unit="watt",
            decimals=0,
            size=(3, 6),
        ),
        stat(
            "Hottest",
            "Hottest sensor of the chosen GPUs. Above 85 °C look at Throttling below, then at the node's"
            " fans.",
            Query(temperature),
            unit="celsius",
            decimals=0,
            steps=low_is_good(80, 88),
            size=(3, 6),
        ),
    )


def _work() -> tuple[Visual, ...]:
    def mean(expr: str) -> str:
        return by("avg", "", expr)

    pipes = by("max", "gpu_uuid", scoped(gpu.PIPE_ACTIVE, pipe="tensor"))
    return (
        timeseries(
            "What the GPU did",
            "Busy: some kernel ran. SM activity: share of SMs that worked. Occupancy: warps of the most that"
            " fit. Tensor: the pipes for matrices. DRAM: memory bandwidth. Busy at 1 with low SM activity:"
            " small kernels or waiting. DRAM high and tensor low is what decoding looks like.",
            Query(mean(device(gpu.BUSY)), "busy", step=SECOND),
            Query(mean(device(gpu.SM_ACTIVE)), "SM activity", step=SECOND),
            Query(mean(device(gpu.SM_OCCUPANCY)), "occupancy", step=SECOND),
            Query(mean(pipes), "tensor", step=SECOND),
            Query(mean(device(gpu.DRAM_ACTIVE)), "DRAM", step=SECOND),
            unit="percentunit",
            limits=(0, 1),
            size=(16, 9),
            step=SECOND,
            points=POINTS,
        ),
        timeseries(
            "GPU time by phase",
            "Mean share of the chosen GPUs' time that engines with a probe used, by part: prefill, decode,"
            " overhead (padding, steps without requests, gaps in which the GPU waited for the engine's CPU)."
            " A large overhead is the engine's, not the requests'.",
            Query(
                f"{by('sum', 'part', scoped(records.ENGINE_GPU_SECONDS))} / on () group_left () "
                f"{by('count', '', scoped(records.DEVICE_INFO))}",
                "{{part}}",
            ),
            unit="percentunit",
            stacked=True,
            size=(8, 9),
        ),
        timeseries(
            "Power",
            "Power drawn and the limit in force. At the limit the clocks go down: see Throttling.",
            Query(by("sum", "", device(gpu.POWER)), "drawn", step=SECOND),
            Query(by("sum", "", device(gpu.POWER_LIMIT)), "limit"),
            unit="watt",
            step=SECOND,
            points=POINTS,
        ),
        timeseries(
            "Throttling",
            "Share of time in which clocks were held down, by reason. power_cap is normal under full load;"
            " thermal reasons and power_brake are not.",
            Query(by("max", "reason", scoped(records.DEVICE_THROTTLED)), "{{reason}}"),
            unit="percentunit",
            limits=(0, 1),
        ),
        timeline(
            "Answers",
            "Whether the driver could read the GPU. If not, the alert GPULost says why and its runbook what"
            " to do.",
            Query(scoped(records.DEVICE_UP), "{{node}} {{device}}"),
            mappings=value_mapping(_UP),
            size=(8, 8),
        ),
    )


def _memory() -> tuple[Visual, ...]:
    return (
        timeseries(
            "Memory by process",
            "Device memory of each process, with the rest that no listed process holds. What grows here"
            " without new requests is a leak's suspect: see CUDA memory.",
            Query(by("sum", PROCESS, scoped(gpu.PROCESS_MEMORY)), PROCESS_NAME),
            Query(by("sum", "", device(gpu.MEMORY_UNATTRIBUTED)), "no listed process"),
            unit="bytes",
            stacked=True,
            links=[to(links.CUDA_MEMORY, "CUDA memory of this GPU")],
        ),
        timeseries(
            "Memory broken down",
            "Weights, kv_cache. Graphs: the pools of captured CUDA graphs. Activations: live tensors that are"
            " none of these, the engine's buffers too. In_flight: freed, still used by the stream."
            " Allocator_cache: reserved and not in use; large: the allocator holds what it may never need."
            " Unknown: live tensors that a probe cannot tell apart. Context and others: what processes hold"
            " beyond the allocator (contexts, modules, NCCL, processes without a probe). Untracked: used,"
            " held by no listed process. They add up to the memory used.",
            Query(by("sum", "part", _parts_by_gpu()), "{{part}}"),
            Query(by("sum", "", _beyond_allocators()), "context and others"),
            Query(by("sum", "", device(gpu.MEMORY_UNATTRIBUTED)), "untracked"),
            unit="bytes",
            stacked=True,
            size=(16, 8),
            overrides=[coloured(*part) for part in MEMORY_COLOURS.items()],
        ),
        timeseries(
            "SM time by process",
            "Share of SM time of each process, as the driver samples it. A process with memory and no time"
            " holds the GPU idle.",
            Query(by("sum", PROCESS, scoped(gpu.PROCESS_SM)), PROCESS_NAME),
            unit="percentunit",
            stacked=True,
        ),
        table(
            "Processes and pods",
            "Processes on the chosen GPUs now, largest first. No SM time with much memory: ask the owner.",
            Column(
                "Memory", by("sum", f"{PROCESS}, workload_container", scoped(gpu.PROCESS_MEMORY)), "bytes", 1
            ),
            Column(
                "SM time",
                by("sum", f"{PROCESS}, workload_container", scoped(gpu.PROCESS_SM)),
                "percentunit",
                0,
                bar=True,
                top=1,
            ),
            labels={
                "workload_namespace": "Namespace",
                "workload_pod": "Pod",
                "workload_container": "Container",
                "process": "Process",
                "gpu_uuid": "GPU",
            },
            sort="Memory",
            size=(16, 8),
        ),
        timeseries(
            "Activations and their peak",
            "Live tensors of each worker that are neither weights nor KV cache nor graphs, and what the"
            " engine found its largest batch to need when it started. Growing for hours, or far above the"
            " peak: something in the engine keeps tensors; see CUDA memory.",
            Query(scoped(engine.MEMORY, part="activations"), "{{model_name}} rank {{rank}}"),
            Query(scoped(engine.ACTIVATION_PEAK), "{{model_name}} rank {{rank}}, peak"),
            unit="bytes",
            links=[to(links.CUDA_MEMORY, "CUDA memory of this GPU")],
        ),
        timeseries(
            "Fragmentation",
            "Inactive split memory of each worker's allocator as a share of what it reserved. High and"
            " growing: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or fewer batch shapes.",
            Query(scoped(records.ENGINE_FRAGMENTATION), "{{model_name}} rank {{rank}}"),
            unit="percentunit",
            steps=low_is_good(0.2, 0.4),
        ),
    )


def _parts_by_gpu() -> str:
    """Bytes of the allocators on each chosen GPU by part. Where a probe does not tell what its tensors are,
    only the KV cache is known among them, from the engine's pool."""
    told = by("sum", "gpu_uuid, part", scoped(engine.MEMORY))
    pool = _pool_by_gpu()
    allocated, active, reserved = (
        by("sum", "gpu_uuid", scoped(family))
        for family in (engine.ALLOCATOR_ALLOCATED, engine.ALLOCATOR_ACTIVE, engine.ALLOCATOR_RESERVED)
    )
    others = {
        "kv_cache": pool,
        "unknown": f"{allocated} - on (gpu_uuid) {pool}",
        "in_flight": f"{active} - on (gpu_uuid) {allocated}",
        "allocator_cache": f"{reserved} - on (gpu_uuid) {active}",
    }
    named = (f'label_replace({expr}, "part", "{part}", "", "")' for part, expr in others.items())
    return f"{told} or ({' or '.join(named)}) unless on (gpu_uuid) {told}"


def _beyond_allocators() -> str:
    """Bytes on each chosen GPU that its processes hold and no probe's allocator has."""
    processes = by("sum", "gpu_uuid", scoped(gpu.PROCESS_MEMORY))
    told, reserved = (
        by("sum", "gpu_uuid", scoped(family)) for family in (engine.MEMORY, engine.ALLOCATOR_RESERVED)
    )
    held = f"({told} or {reserved})"
    # The driver's figure and the allocator's are not of the same moment.
    beyond = f"clamp_min({processes} - on (gpu_uuid) {held}, 0)"
    return f"{beyond} or {processes} unless on (gpu_uuid) {held}"


def _pool_by_gpu() -> str:
    """Bytes of KV cache on each chosen GPU: an engine's pool is spread evenly over its ranks, chosen or
    not."""
    labels = ", ".join(ENGINE)
    ranks = by("max", (*ENGINE, "gpu_uuid"), scoped(engine.ALLOCATOR_RESERVED, gpu_uuid=regex(".+")))
    of_rank = (
        f"{by('max', ENGINE, scoped(engine.KV_POOL_BYTES))} / on ({labels}) {by('count', ENGINE, ranks)}"
    )
    here = by("group", (*ENGINE, "gpu_uuid"), scoped(engine.ALLOCATOR_RESERVED))
    return by("sum", "gpu_uuid", f"({of_rank}) * on ({labels}) group_right () {here}")


def _engines() -> tuple[Visual, ...]:
    return (
        table(
            "Engines on the chosen GPUs",
            "Engines whose workers run here. GPU time is the share of this GPU that they used; KV cache and"
            " queue are the whole engine's.",
            Column(
                "GPU time",
                by("sum", ENGINE, scoped(records.ENGINE_GPU_SECONDS)),
                "percentunit",
                0,
                bar=True,
                top=1,
            ),
            Column(
                "KV cache",
                by("max", ENGINE, engines_on_gpus(scoped(records.ENGINE_KV_USED))),
                "percentunit",
                0,
                bar=True,
                top=1,
            ),
            Column("Running", by("max", ENGINE, engines_on_gpus(scoped(records.ENGINE_RUNNING))), "short"),
            Column(
                "Waiting",
                by("max", ENGINE, engines_on_gpus(scoped(records.ENGINE_WAITING))),
                "short",
                steps=low_is_good(10, 50),
            ),
            Column(
                "Preemptions/s",
                by("max", ENGINE, engines_on_gpus(scoped(records.ENGINE_PREEMPTIONS))),
                "short",
                2,
            ),
            labels={"model_name": "Model", "engine": "Engine", "workload_pod": "Pod"},
            hidden=("server", "workload_namespace", "workload_container"),
            links={"Model": [to(links.REQUESTS, "Requests of this model", model_name=links.cell("Model"))]},
            size=(24, 7),
        ),
        timeseries(
            "KV cache of the engines here",
            "Share of the KV cache that requests hold. Near 1: new requests wait or push others out.",
            Query(
                engines_on_gpus(scoped(engine.KV_USED_BLOCKS) + " / " + scoped(engine.KV_POOL_BLOCKS)),
                ENGINE_NAME,
                step=SECOND,
            ),
            unit="percentunit",
            limits=(0, 1),
            steps=low_is_good(0.9, 0.98),
            step=SECOND,
            points=POINTS,
            size=(12, 8),
        ),
        timeseries(
            "Mean time of a step",
            "How long the workers' steps take. Ranks of one engine should lie on each other: one above the"
            " others slows all.",
            Query(scoped(records.ENGINE_STEP_SECONDS), "{{model_name}} rank {{rank}}"),
            unit="s",
            size=(12, 8),
        ),
    )


def _requests(options: Options) -> tuple[Visual, ...]:
    models = by("group", "model_name", scoped(records.ENGINE_GPU_SECONDS))
    tenants = by("sum", "tenant, model_name", rate(engine.TENANT_GPU))
    share = quotient(tenants, by("sum", "model_name", rate(engine.TENANT_GPU)), "model_name", many=True)
    held = by("max", "tenant, model_name", scoped(engine.TENANT_KV_SHARE))
    return (
        buckets(
            "GPU time per request",
            "Requests of the chosen models by the GPU time that they took. Each dot is a request with its id"
            " or trace: click it.",
            Query(
                bucket_rate(options.histograms, engine.REQUEST_GPU), "{{le}}", exemplar=True, format="heatmap"
            ),
            unit="s",
        ),
        timeseries(
            "Share of GPU time by tenant",
            "Who had the GPU time of the models that run here.",
            Query(f"({share}) and on (model_name) {models}", "{{tenant}} {{model_name}}"),
            unit="percentunit",
            stacked=True,
            size=(6, 9),
            links=[to(links.TENANTS, "This tenant", tenant=label("tenant"))],
        ),
        timeseries(
            "Share of KV cache by tenant",
            "Who holds the KV cache of the models that run here.",
            Query(f"({held}) and on (model_name) {models}", "{{tenant}} {{model_name}}"),
            unit="percentunit",
            stacked=True,
            size=(6, 9),
        ),
        traces(
            "Traces of requests on the chosen GPUs",
            "Requests of the time range that ran here, newest first; click one for its way from the HTTP"
            " request to the GPU.",
            options.traces,
            '{ span.hw.id =~ "${gpu_uuid:regex}" || resource.gpuglass.gpu.uuids =~ "${gpu_uuid:regex}" }',
            {"hw.id": "${gpu_uuid:raw}"},
        ),
    )


def _hardware() -> tuple[Visual, ...]:
    return (
        timeseries(
            "PCIe",
            "Bytes over PCIe, headers included. Steady traffic during decoding: weights or KV are swapped to"
            " the host.",
            Query(by("sum", "", scoped(records.DEVICE_PCIE_RECEIVE)), "received"),
            Query(by("sum", "", scoped(records.DEVICE_PCIE_TRANSMIT)), "sent"),
            unit="Bps",
        ),
        timeseries(
            "NVLink",
            "Payload over all NVLinks of the chosen GPUs.",
            Query(by("sum", "", scoped(records.DEVICE_NVLINK_RECEIVE)), "received"),
            Query(by("sum", "", scoped(records.DEVICE_NVLINK_TRANSMIT)), "sent"),
            unit="Bps",
        ),
        timeseries(
            "SM clock",
            "Present clock of the SMs. It goes down when idle, hot or at the power limit.",
            Query(on_gpus(device(gpu.CLOCK, "max", clock="sm"), "node, device"), "{{node}} {{device}}"),
            unit="hertz",
        ),
        timeseries(
            "XID errors",
            "Errors that the driver reported, by code. Class hardware: drain the node; application: look at"
            " the process.",
            Query(by("sum", "xid, class", scoped(records.DEVICE_XID)), "XID {{xid}} ({{class}})"),
            unit="short",
            bars=True,
        ),
        timeseries(
            "Memory errors",
            "ECC errors in the rate window. Uncorrected ones end processes; remapped rows wait for a reset.",
            Query(by("sum", "type", scoped(records.DEVICE_ECC)), "{{type}}"),
            Query(by("sum", "", scoped(records.DEVICE_REMAPPED_ROWS)), "remapped rows, ever"),
            unit="short",
        ),
        timeseries(
            "Rows to be remapped",
            "1 if a memory row waits for the next reset (pending), or could not be replaced (failed): the"
            " card has to go.",
            Query(by("max", "", scoped(records.DEVICE_REMAP_PENDING)), "pending"),
            Query(by("max", "", scoped(records.DEVICE_REMAP_FAILED)), "failed"),
            unit="short",
            steps=BAD_IF_ANY,
        ),
        timeseries(
            "Counters against each other",
            "The busy ratio and the profiling counters' engine activity measure the same in two ways. Apart"
            " for long: one of them is stuck; reload the driver.",
            Query(by("avg", "", scoped(records.DEVICE_BUSY)), "busy"),
            Query(by("avg", "", scoped(records.DEVICE_GRAPHICS_ACTIVE)), "engine activity"),
            unit="percentunit",
            limits=(0, 1),
        ),
        timeseries(
            "Loads of the driver",
            "How often each node's agent initialised the driver's library. It grows when the driver or a GPU"
            " was lost.",
            Query(by("max", "node, instance", scoped(gpu.DRIVER_LOADS)), "{{node}} {{instance}}"),
            unit="short",
        ),
        timeseries(
            "NVLinks that are up",
            "Active NVLinks of each chosen GPU. Fewer than before: a link is down, and tensor parallelism"
            " over it is slow.",
            Query(scoped(records.DEVICE_NVLINKS_UP), "{{node}} {{device}}"),
            unit="short",
        ),
        timeseries(
            "NVLink and PCIe errors",
            "Errors and repeats on the links. A few after a start are normal; steady ones are a cable or a"
            " slot.",
            Query(by("sum", "type", scoped(records.DEVICE_NVLINK_ERRORS)), "NVLink {{type}}"),
            Query(by("sum", "", scoped(records.DEVICE_PCIE_REPLAYS)), "PCIe replays"),
            unit="short",
        ),
    )
