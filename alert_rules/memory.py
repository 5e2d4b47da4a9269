"""Alerts about GPU memory and the KV cache: leaks, failed allocations, a full or hogged cache, preemptions,
fragmentation."""

from __future__ import annotations

from alert_rules.common import (
    DEVICE_VARIABLES,
    ENGINE_NAME,
    GPU_NAME,
    MODEL_VARIABLES,
    REQUEST_VARIABLES,
    both,
    grown,
    neither,
    on_device,
    per_engine,
    requests_url,
)
from gpuglass.families import anomaly, cuda, engine
from gpuglass.promql import aggregate, duration, first_of, not_equal, over_time, regex, select
from recording_rules import records
from recording_rules.model import Alert
from recording_rules.records import ENGINE
from recording_rules.settings import Settings


def alerts(settings: Settings) -> tuple[Alert, ...]:
    """The alerts, in the order in which one looks at them."""
    return (
        _leak(settings),
        _out_of_memory(settings),
        _kv_saturated(settings),
        _kv_hogged(settings),
        _preemptions(settings),
        _fragmented(settings),
        _fragmented_daily(settings),
    )


def leak_verdict(settings: Settings) -> str:
    """Growth in bytes per second of GPUs on which memory leaks, by the best verdict that is there: the
    tracer's, else the sidecar's, else the metrics'. A GPU is judged by one of them: one leak is one alert."""
    t = settings.alerts.memory
    traced = {"gpu_uuid": not_equal("")}
    tracer = aggregate(
        "sum",
        ("gpu_uuid",),
        aggregate("max", (*cuda.LEAK,), select(cuda.LEAK_RATE, **traced)),
    )
    tracer_knows = aggregate("max", ("gpu_uuid",), select(cuda.LEAK_SUSPECTED, **traced))
    sidecar = aggregate("max", ("gpu_uuid",), select(anomaly.LEAK_RATE, gpu_uuid=not_equal("")))
    sidecar_knows = aggregate("max", ("gpu_uuid",), select(anomaly.LEAK, gpu_uuid=not_equal("")))
    by_metrics = aggregate("max", ("gpu_uuid",), _grows_without_work(settings))
    return (
        on_device(
            first_of(
                tracer,
                neither(sidecar, tracer_knows, ("gpu_uuid",)),
                neither(by_metrics, f"{tracer_knows} or {sidecar_knows}", ("gpu_uuid",)),
                on=("gpu_uuid",),
            )
        )
        + f" >= {t.leak_bytes_per_second:g}"
    )


def _grows_without_work(settings: Settings) -> str:
    """Memory that grew in both halves of the window (a model that loads is one step), never fell below where
    it began (a restart does), on a GPU that got no new request or, where nobody tells, did nothing."""
    t, cost = settings.alerts.memory, settings.alerts.cost
    window, half = t.leak_window, duration(t.leak_window / 2)
    used = select(records.DEVICE_MEMORY_USED_BYTES)
    least = f"{t.leak_bytes_per_second * t.leak_window / 4:g}"
    before = f"{used} offset {duration(window)}"
    held = f"{over_time('min', records.DEVICE_MEMORY_USED, window)} > {cost.cold_memory_ratio:g}"
    conditions = (
        f"{used} - {used} offset {half} > {least}",
        f"{used} offset {half} - {before} > {least}",
        f"{over_time('min', records.DEVICE_MEMORY_USED_BYTES, window)} >= {before}",
        held,
    )
    growth = f"deriv({select(records.DEVICE_MEMORY_USED_BYTES, window)})"
    for condition in conditions:
        growth = both(growth, condition)
    prefill = aggregate(
        "max", ("gpu_uuid",), over_time("max", records.ENGINE_GPU_SECONDS, window, part="prefill")
    )
    active = aggregate("max", ("gpu_uuid",), over_time("max", records.DEVICE_ACTIVE, window))
    quiet = first_of(f"{prefill} == 0", f"({active} < {cost.cold_ratio:g}) unless on (gpu_uuid) {prefill}")
    return both(growth, quiet, ("gpu_uuid",))


def _leak(settings: Settings) -> Alert:
    return Alert(
        "GPUMemoryLeak",
        leak_verdict(settings),
        "warning",
        "memory",
        "GPU memory grows as only a leak does",
        f"Memory on {GPU_NAME} grows by {{{{ $value | humanize1024 }}}}B a second.",
        "gpuglass-cuda-memory",
        hold=settings.alerts.memory.leak_for,
        variables=DEVICE_VARIABLES,
    )


def _out_of_memory(settings: Settings) -> Alert:
    window = settings.alerts.memory.out_of_memory_window
    # Who: the engine's worker, else the process that the tracer saw fail.
    of_engine = aggregate(
        "sum",
        ("gpu_uuid", "model_name", "engine", "workload_namespace", "workload_pod"),
        grown(engine.OUT_OF_MEMORY, window),
    )
    of_process = aggregate(
        "sum",
        ("gpu_uuid", "workload_namespace", "workload_pod", "process"),
        grown(cuda.EVENT_FAILURES, window, code="out_of_memory"),
    )
    return Alert(
        "GPUOutOfMemory",
        first_of(on_device(of_engine), on_device(of_process), on=("gpu_uuid",)),
        "warning",
        "memory",
        "An allocation of GPU memory failed",
        '{{ $value | printf "%.0f" }} times in '
        f"{duration(window)} memory ran out on {GPU_NAME}, for "
        "{{ with $labels.model_name }}model {{ . }}, engine {{ $labels.engine }}{{ else }}process {{ "
        "$labels.process }}{{ end }}"
        "{{ with $labels.workload_pod }} in pod {{ . }}{{ end }}.",
        "gpuglass-cuda-memory",
        variables=DEVICE_VARIABLES,
        annotations={"traces_url": requests_url(settings.dashboard_base, MODEL_VARIABLES)},
    )


def _kv_saturated(settings: Settings) -> Alert:
    t = settings.alerts.memory
    return Alert(
        "KVCacheSaturated",
        both(
            f"{select(records.ENGINE_KV_USED)} > {t.kv_full_ratio:g}",
            f"{select(records.ENGINE_WAITING)} > 0",
        ),
        "warning",
        "memory",
        "The KV cache is full while requests wait",
        f"Requests of {ENGINE_NAME}, hold {{{{ $value | humanizePercentage }}}} of its KV cache, and "
        "others wait.",
        "gpuglass-requests",
        hold=t.kv_full_for,
        variables=MODEL_VARIABLES,
    )


def _kv_hogged(settings: Settings) -> Alert:
    t = settings.alerts.memory
    labels = (*ENGINE, "tenant")
    by_request = f"{select(records.ENGINE_KV_HOLDER)} > {t.hog_request_ratio:g}"
    # One tenant alone may have it all.
    active = f"{per_engine('sum', select(engine.TENANT_IN_FLIGHT), 'tenant')} > 0"
    tenants = f"{aggregate('count', ENGINE, active)} > 1"
    by_tenant = both(
        f"{per_engine('max', select(engine.TENANT_KV_SHARE), 'tenant')} > {t.hog_tenant_ratio:g}",
        tenants,
        ENGINE,
    )
    return Alert(
        "KVCacheHogged",
        both(
            first_of(by_request, by_tenant, on=labels),
            f"{select(records.ENGINE_WAITING)} > 0",
            ENGINE,
        ),
        "warning",
        "memory",
        "One request or tenant holds most of the KV cache while others wait",
        "{{ with $labels.tenant }}Tenant {{ . }} holds{{ else }}One request holds{{ end }} "
        f"{{{{ $value | humanizePercentage }}}} of the KV cache of {ENGINE_NAME}, and requests wait.",
        "gpuglass-requests",
        hold=t.hog_for,
        variables=REQUEST_VARIABLES,
        annotations={"traces_url": requests_url(settings.dashboard_base)},
    )


def _preemptions(settings: Settings) -> Alert:
    t = settings.alerts.memory
    return Alert(
        "KVPreemptionStorm",
        f"{select(records.ENGINE_PREEMPTIONS)} > {t.preemptions_per_second:g}",
        "warning",
        "memory",
        "Running requests lose their KV cache over and over",
        f'{{{{ $value | printf "%.2f" }}}} requests a second of {ENGINE_NAME}, are preempted and '
        "computed again.",
        "gpuglass-requests",
        hold=t.preemptions_for,
        variables=MODEL_VARIABLES,
    )


def _fragmented(settings: Settings) -> Alert:
    t = settings.alerts.memory
    return Alert(
        "GPUMemoryFragmented",
        f"{select(records.ENGINE_FRAGMENTATION)} > {t.fragmentation_ratio:g}",
        "warning",
        "memory",
        "Reserved GPU memory lies in pieces that larger tensors cannot use",
        f"{{{{ $value | humanizePercentage }}}} of what the allocator of {ENGINE_NAME}, rank {{{{ "
        f"$labels.rank }}}} has reserved "
        "are free pieces of split segments.",
        "gpuglass-cuda-memory",
        hold=t.fragmentation_for,
        variables={"cluster": "cluster", "gpu_uuid": "gpu_uuid", "model_name": "model_name"},
    )


def _fragmented_daily(settings: Settings) -> Alert:
    t = settings.alerts.memory
    what = ("cluster", "query", "model_name", "engine", "rank", "gpu_uuid", "weekday", "from_hour", "to_hour")
    fragmentation = {"query": regex(".*fragmentation.*")}
    strength = aggregate("max", what, select(anomaly.RECURRING_STRENGTH, **fragmentation))
    repeats = aggregate("max", what, select(anomaly.RECURRING_REPEATS, **fragmentation))
    return Alert(
        "GPUMemoryFragmentedDaily",
        both(f"{repeats} >= {t.peak_repeats:g}", f"{strength} > {t.peak_strength:g}"),
        "warning",
        "memory",
        "Fragmentation of GPU memory peaks at the same hours again and again",
        "Memory of {{ with $labels.model_name }}{{ . }} on {{ end }}{{ $labels.gpu_uuid }} is "
        "fragmented from "
        "{{ $labels.from_hour }} to {{ $labels.to_hour }} o'clock ({{ $labels.weekday }}), {{ $value "
        '| printf "%.0f" }} times so far.',
        "gpuglass-anomalies",
        variables={"cluster": "cluster", "gpu_uuid": "gpu_uuid", "model_name": "model_name"},
    )
