"""Advice: changes of configuration that the data of a day supports, each with its evidence as the value.

In: records, and recurring peaks that the anomaly sidecar found. Out: `gpuglass_advice{id, …}`. Never two that
contradict each other: of such a pair the one that comes later here gives way (`gives_way_to`), and as rules
of a group are evaluated in order, that holds at every moment. The runbook `advice` has a section for each id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpuglass.families import anomaly, engine
from gpuglass.promql import aggregate, increase, over_time, parenthesize, quantile_over_time, select, times
from recording_rules import records as r
from recording_rules.devices import GPU
from recording_rules.model import Group, Rule
from recording_rules.options import Options
from recording_rules.settings import Settings


@dataclass(frozen=True, slots=True)
class Advice:
    """An advice: what it is about (labels), when it is given, and the advices that it gives way to."""

    id: str
    about: tuple[str, ...]
    expression: str
    gives_way_to: tuple[str, ...] = ()


CONTRADICTIONS = (
    ("lower_gpu_memory_utilization", "raise_gpu_memory_utilization"),
    ("raise_gpu_memory_utilization", "lower_max_num_seqs"),
    ("raise_gpu_memory_utilization", "consolidate_cold_gpus"),
    ("lower_max_num_seqs", "raise_max_num_seqs"),
    ("lower_max_num_seqs", "consolidate_cold_gpus"),
    ("kv_cache_dtype_fp8", "consolidate_cold_gpus"),
    ("raise_max_num_seqs", "consolidate_cold_gpus"),
    ("job_memory_unused", "job_input_bound"),
    ("job_memory_unused", "job_smaller_card"),
    ("job_input_bound", "job_smaller_card"),
)
"""Pairs that would ask for opposite changes, or for two cures of one ill; the first one stays."""


def groups(settings: Settings, options: Options) -> list[Group]:
    """The one group of advice."""
    rules = (Rule(r.ADVICE, _expression(advice), {"id": advice.id}) for advice in advices(settings, options))
    return [Group("gpuglass-advice.rules", float(settings.windows.long_interval), tuple(rules))]


def _expression(advice: Advice) -> str:
    expression = advice.expression
    for other in advice.gives_way_to:
        on = f"on ({', '.join(advice.about)})"
        expression += f"\nunless {on} {select(r.ADVICE, id=other)}"
    return expression


def advices(settings: Settings, options: Options) -> list[Advice]:
    """All advices, in the order of their evaluation."""
    made = [*_models(settings, options), *_jobs(settings, options)]
    order = [advice.id for advice in made]
    return [
        Advice(
            advice.id,
            advice.about,
            advice.expression,
            tuple(first for first, second in CONTRADICTIONS if second == advice.id and first in order),
        )
        for advice in made
    ]


def _all(*conditions: str, on: Sequence[str]) -> str:
    """The first expression where all others hold."""
    return f"\nand on ({', '.join(on)})\n".join(parenthesize(condition) for condition in conditions)


def _models(settings: Settings, options: Options) -> Iterator[Advice]:
    a, window, by = settings.advice, float(settings.advice.window), r.MODEL
    # A quarter of the window has to be there: a model that came this morning has no day's course yet.
    least = 0.25 * window / settings.windows.interval
    known = f"count_over_time({select(r.MODEL_ENGINES, window)}) >= {least:g}"
    kv = quantile_over_time(0.95, r.MODEL_KV_USED, window)
    full, empty = f"{kv} > {a.kv_full_ratio:g}", f"{kv} < {a.kv_empty_ratio:g}"
    waiting = over_time("avg", r.MODEL_WAITING, window)
    queued = f"{waiting} > {a.waiting_requests:g}"
    # Memory that no GPU of the model has used at any time.
    gpus = aggregate("group", (*by, "gpu_uuid"), select(r.ENGINE_GPU_SECONDS))
    peak = aggregate("max", GPU, over_time("max", r.DEVICE_MEMORY_ROLLUP, window))
    free = f"1 - {aggregate('max', by, times(gpus, peak, GPU))}"
    roomy, tight = f"{free} > {a.memory_headroom_ratio:g}", f"{free} < {a.memory_tight_ratio:g}"
    preempted = f"{over_time('avg', r.MODEL_PREEMPTIONS, window)} > {a.preemptions_per_second:g}"
    if options.source != "dcgm":
        failed = aggregate("sum", by, increase(engine.OUT_OF_MEMORY, window))
        yield Advice("lower_gpu_memory_utilization", by, _all(tight, f"{failed} > 0", known, on=by))
    yield Advice("raise_gpu_memory_utilization", by, _all(roomy, full, known, on=by))
    yield Advice("lower_max_num_seqs", by, _all(preempted, full, known, on=by))
    yield Advice("kv_cache_dtype_fp8", by, _all(full, f"{free} <= {a.memory_headroom_ratio:g}", known, on=by))
    yield Advice("raise_max_num_seqs", by, _all(queued, f"{kv} <= {a.kv_full_ratio:g}", known, on=by))
    computed = f"{over_time('avg', r.MODEL_TOKENS, window, kind='input')} > {a.prefix_repeat_tokens:g}"
    missed = f"{over_time('avg', r.MODEL_PREFIX_HIT, window)} < {a.prefix_hit_ratio:g}"
    yield Advice("enable_prefix_caching", by, _all(aggregate("sum", by, computed), missed, known, on=by))
    prefill = aggregate("max", by, over_time("avg", r.MODEL_PREFILL_SHARE, window))
    tail = over_time("avg", r.MODEL_INTER_TOKEN, window, quantile="0.99")
    slow = f"{aggregate('max', by, tail)} > {settings.slo.inter_token.seconds:g}"
    yield Advice("enable_chunked_prefill", by, _all(f"{prefill} > {a.prefill_share:g}", slow, known, on=by))
    if options.source != "dcgm":
        uneven = aggregate("max", by, over_time("avg", r.ENGINE_EXPERT_RANK_IMBALANCE, window))
        layers = aggregate("max", by, over_time("avg", r.ENGINE_EXPERT_IMBALANCE, window))
        # One layer's hot expert is the rule; several ranks have to wait for the same one.
        imbalance = f"{layers} > {a.expert_imbalance:g}"
        yield Advice(
            "expert_parallel_load_balancing",
            by,
            _all(imbalance, f"{uneven} > {a.expert_rank_imbalance:g}", known, on=by),
        )
    cold = f"{over_time('avg', r.MODEL_ACTIVE, window)} < {a.cold_ratio:g}"
    several = f"{aggregate('sum', by, select(r.ENGINE_GPUS))} > 1"
    calm = f"{waiting} <= {a.waiting_requests:g}"
    yield Advice("consolidate_cold_gpus", by, _all(several, cold, empty, calm, known, on=by))


def _jobs(settings: Settings, options: Options) -> Iterator[Advice]:
    if options.source == "dcgm":
        return
    a, window, by = settings.advice, float(settings.advice.job_window), r.WORKLOAD
    least = 0.5 * window / settings.windows.slow_interval
    known = aggregate("max", by, f"count_over_time({select(r.WORKLOAD_SM, window)})") + f" >= {least:g}"
    mean, peak = over_time("avg", r.WORKLOAD_SM, window), over_time("max", r.WORKLOAD_SM, window)
    memory = over_time("max", r.WORKLOAD_MEMORY_RATIO, window)
    held = select(r.WORKLOAD_MEMORY)
    unused = f"{peak} < {a.job_unused_ratio:g}"
    yield Advice("job_memory_unused", by, _all(f"{held} > 0", unused, known, on=by))
    bursts = f"{peak} > {a.job_burst_ratio:g}"
    yield Advice("job_input_bound", by, _all(f"{mean} < {a.job_idle_ratio:g}", bursts, known, on=by))
    tensor = f"{over_time('avg', r.WORKLOAD_TENSOR, window)} < {a.job_tensor_ratio:g}"
    yield Advice("job_low_tensor_activity", by, _all(tensor, f"{mean} > {a.job_busy_ratio:g}", known, on=by))
    small = f"{memory} < {a.job_memory_ratio:g}"
    yield Advice("job_smaller_card", by, _all(small, f"{peak} < {a.job_burst_ratio:g}", known, on=by))
    # Two replicas of the sidecar say the same.
    about = ("cluster", "query", "model_name", "gpu_uuid", *r.WORKLOAD[1:])
    peaks = aggregate("max", about, select(anomaly.RECURRING_STRENGTH))
    there = f"count by (cluster) ({select(r.WORKLOAD_GPUS)}) > 0"
    strong = f"{peaks} > {a.peak_strength:g}"
    yield Advice("move_batch_job", about, _all(strong, there, on=("cluster",)))
