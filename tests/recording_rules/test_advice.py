"""Advice: each id is given where its data is, and not in a near miss; no two contradict each other."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gpuglass.config import Seconds
from gpuglass.families import anomaly, engine
from recording_rules import advice
from recording_rules import records as r
from recording_rules.options import DEFAULT, Options
from recording_rules.settings import Settings
from tests.recording_rules.promtool import Bench, Case, Check, Series, counter, nothing, series

ROOT = Path(__file__).parents[2]
MINUTES = 12
WANTED = ("advice",)
SHORT = Settings(
    advice=msgspec.structs.replace(Settings().advice, window=Seconds(600), job_window=Seconds(600))
)
"""The same rules over ten minutes instead of a day."""
JOB = {"workload_namespace": "train", "workload_pod": "job", "process": "python3"}
MODEL = {"model_name": "deepseek"}
GPU = {"gpu_uuid": "GPU-0", "node": "a", "model": "H100"}


def world(
    kv: float = 0.5,
    waiting: float = 0,
    preemptions: float = 0,
    memory: float = 0.95,
    failures: float = 0,
    input_tokens: float = 100,
    prefix: float = 0.3,
    prefill: float = 0.2,
    inter_token: float = 0.03,
    expert: float = 1.5,
    expert_rank: float = 1.1,
    active: float = 0.6,
    gpus: float = 4,
    job_sm: float | str = 0.7,
    job_tensor: float = 0.4,
    job_memory: float = 0.8,
    peak: float = 0.1,
    minutes: float = MINUTES,
) -> list[Series]:
    """Records of a model and of a job; the defaults are nobody's to change."""

    def put(metric: object, value: float | str, **labels: str) -> Series:
        return series(metric, value, minutes, **labels)  # type: ignore[arg-type]

    return [
        put(r.MODEL_ENGINES, 1, **MODEL),
        put(r.MODEL_KV_USED, kv, **MODEL),
        put(r.MODEL_WAITING, waiting, **MODEL),
        put(r.MODEL_PREEMPTIONS, preemptions, **MODEL),
        put(r.MODEL_TOKENS, input_tokens, **MODEL, kind="input"),
        put(r.MODEL_PREFIX_HIT, prefix, **MODEL),
        put(r.MODEL_PREFILL_SHARE, prefill, **MODEL, model="H100"),
        put(r.MODEL_INTER_TOKEN, inter_token, **MODEL, quantile="0.99"),
        put(r.MODEL_ACTIVE, active, **MODEL),
        put(r.ENGINE_EXPERT_IMBALANCE, expert, **MODEL, workload_pod="a"),
        put(r.ENGINE_EXPERT_RANK_IMBALANCE, expert_rank, **MODEL, workload_pod="a"),
        put(r.ENGINE_GPUS, gpus, **MODEL, workload_pod="a", model="H100"),
        put(r.ENGINE_GPU_SECONDS, 0.5, **MODEL, workload_pod="a", gpu_uuid="GPU-0", part="decode"),
        put(r.DEVICE_MEMORY_ROLLUP, memory, **GPU),
        counter(engine.OUT_OF_MEMORY, failures, minutes, **MODEL, rank="0", gpu_uuid="GPU-0"),
        put(r.WORKLOAD_SM, job_sm, **JOB),
        put(r.WORKLOAD_TENSOR, job_tensor, **JOB),
        put(r.WORKLOAD_MEMORY, 2e10, **JOB),
        put(r.WORKLOAD_MEMORY_RATIO, job_memory, **JOB),
        put(r.WORKLOAD_GPUS, 1, **JOB, model="H100"),
        # Two replicas of the sidecar say the same.
        *(
            put(
                anomaly.RECURRING_STRENGTH,
                peak,
                **{"instance": f"sidecar-{n}:9966", "job": "anomaly", "query": "kv_used", **MODEL},
                weekday="any",
                from_hour="9",
                to_hour="11",
            )
            for n in (1, 2)
        ),
    ]


def given_advice(*ids: str) -> Check:
    """Exactly these advices are given, once each."""
    return Check(
        "count by (id) (gpuglass_advice)", [({"id": name}, 1.0) for name in sorted(ids)], minute=MINUTES - 1
    )


BURSTS = "0.05x8 0.9x4 " * 9
CASES = [
    Case("nothing to change", world(), [given_advice()]),
    Case(
        "a model that came just now",
        world(kv=0.99, waiting=9, minutes=0.4),
        [nothing("gpuglass_advice", 0.5)],
    ),
    Case("full and roomy", world(kv=0.97, memory=0.7), [given_advice("raise_gpu_memory_utilization")]),
    Case("full, no room", world(kv=0.97, memory=0.9), [given_advice("kv_cache_dtype_fp8")]),
    Case(
        "full, preempting, no room",
        world(kv=0.97, memory=0.9, preemptions=0.1),
        [given_advice("kv_cache_dtype_fp8", "lower_max_num_seqs")],
    ),
    Case(
        "full, preempting, room: more cache before fewer requests",
        world(kv=0.97, memory=0.7, preemptions=0.1),
        [given_advice("raise_gpu_memory_utilization")],
    ),
    Case("preempting without a full cache (resets)", world(preemptions=0.1), [given_advice()]),
    Case(
        "tight and failing", world(memory=0.99, failures=0.1), [given_advice("lower_gpu_memory_utilization")]
    ),
    Case("tight and well", world(memory=0.99), [given_advice()]),
    Case("failing with room: not the pool's doing", world(memory=0.8, failures=0.1), [given_advice()]),
    Case("a queue beside a free cache", world(waiting=5), [given_advice("raise_max_num_seqs")]),
    Case("a short queue", world(waiting=0.5), [given_advice()]),
    Case("prompts without hits", world(input_tokens=5000, prefix=0), [given_advice("enable_prefix_caching")]),
    Case("few prompts without hits", world(input_tokens=500, prefix=0), [given_advice()]),
    Case("many prompts with hits", world(input_tokens=5000, prefix=0.05), [given_advice()]),
    Case(
        "prefill delays tokens", world(prefill=0.7, inter_token=0.3), [given_advice("enable_chunked_prefill")]
    ),
    Case("much prefill, fast tokens", world(prefill=0.7), [given_advice()]),
    Case(
        "hot expert, uneven ranks",
        world(expert=5, expert_rank=1.6),
        [given_advice("expert_parallel_load_balancing")],
    ),
    Case("hot expert, even ranks", world(expert=5), [given_advice()]),
    Case("cold and empty", world(active=0.02, kv=0.1), [given_advice("consolidate_cold_gpus")]),
    Case("cold and empty, one GPU", world(active=0.02, kv=0.1, gpus=1), [given_advice()]),
    Case(
        "cold, and requests wait", world(active=0.02, kv=0.1, waiting=5), [given_advice("raise_max_num_seqs")]
    ),
    Case("forgotten job", world(job_sm=0), [given_advice("job_memory_unused")]),
    Case("forgotten small job", world(job_sm=0, job_memory=0.1), [given_advice("job_memory_unused")]),
    Case("job in bursts", world(job_sm=BURSTS), [given_advice("job_input_bound")]),
    Case("job without tensor pipes", world(job_tensor=0.02), [given_advice("job_low_tensor_activity")]),
    Case("idle job without tensor pipes", world(job_sm=0.2, job_tensor=0.02), [given_advice()]),
    Case("small job", world(job_sm=0.3, job_memory=0.1), [given_advice("job_smaller_card")]),
    Case("small job that uses the card", world(job_sm=0.9, job_memory=0.1), [given_advice()]),
    Case("daily peak", world(peak=0.8), [given_advice("move_batch_job")]),
]


def test_each_advice_where_its_data_is_and_not_in_a_near_miss(bench: Bench) -> None:
    cases = [Case(case.name, case.series, case.checks, ("union",)) for case in CASES]
    Bench(bench.promtool, bench.folder, settings=SHORT).run(cases, WANTED)


def test_the_cases_give_each_advice_once_at_least() -> None:
    told = {labels["id"] for case in CASES for check in case.checks for labels, _ in check.expected}
    assert told == {one.id for one in advice.advices(Settings(), DEFAULT)}


def test_contradictions_name_advices_that_there_are() -> None:
    ids = [one.id for one in advice.advices(Settings(), DEFAULT)]
    for first, second in advice.CONTRADICTIONS:
        assert ids.index(first) < ids.index(second), "the one that stays has to be evaluated before"
    for source in ("dcgm", "gpuglass"):
        some = advice.advices(Settings(), Options(source="dcgm" if source == "dcgm" else "gpuglass"))
        assert {other for one in some for other in one.gives_way_to} <= {one.id for one in some}


_HALF = st.sampled_from((0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.91, 0.99))
_WORLDS = st.builds(
    world,
    kv=_HALF,
    waiting=st.sampled_from((0, 0.9, 7)),
    preemptions=st.sampled_from((0, 1)),
    memory=_HALF,
    failures=st.sampled_from((0, 0.1)),
    active=_HALF,
    job_sm=st.one_of(_HALF, st.just(BURSTS)),
    job_tensor=_HALF,
    job_memory=_HALF,
)


def test_no_two_contradict_each_other_whatever_the_data(bench: Bench) -> None:
    both = 'gpuglass_advice{{id="{}"}} and on (model_name, workload_pod) gpuglass_advice{{id="{}"}}'
    pairs = [nothing(both.format(*pair), MINUTES - 1) for pair in advice.CONTRADICTIONS]

    @given(st.lists(_WORLDS, min_size=24, max_size=24))
    @settings(
        max_examples=1, phases=(Phase.generate,), suppress_health_check=list(HealthCheck), derandomize=True
    )
    def check(worlds: list[list[Series]]) -> None:
        cases = [Case(f"world {n}", made, pairs, ("union",)) for n, made in enumerate(worlds)]
        Bench(bench.promtool, bench.folder, settings=SHORT).run(cases, WANTED)

    check()


def test_every_advice_has_a_section_of_the_runbook_and_no_section_is_left_over() -> None:
    page = (ROOT / "alert_rules/runbooks/advice.md").read_text()
    sections = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    assert sections == [one.id for one in advice.advices(Settings(), DEFAULT)]
