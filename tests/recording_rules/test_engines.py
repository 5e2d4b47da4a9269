"""Engine and model records: the probe first, each engine's own metrics else, never both."""

from __future__ import annotations

from gpuglass.families import engine
from recording_rules import foreign as f
from recording_rules import records as r
from recording_rules.options import Options
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

WANTED = ("engines", "models")


def probed(number: int, pod: bool = True, **more: str) -> dict[str, str]:
    """Labels of the engine `number` of the model deepseek, as the agent gives them."""
    named = {"workload_namespace": "serving", "workload_pod": f"vllm-{number}", "workload_container": "vllm"}
    return {
        **{"instance": f"node-{number}:9955", "model_name": "deepseek", "engine": "0"},
        **(named if pod else {"server": f"s{number}"}),
        **more,
    }


def target(number: int, job: str = "vllm", **more: str) -> dict[str, str]:
    """Labels of an engine's own endpoint."""
    return {"job": job, "instance": f"10.0.0.{number}:8000", "model_name": "qwen", **more}


def own(number: int, **more: str) -> list[Series]:
    """A vLLM's own metrics: 100 prompt tokens a second, 40 of them cached, and 20 generated."""
    labels = target(number, **{"engine": "0", **more})
    return [
        series(f.VLLM_RUNNING, 3, **labels),
        series(f.VLLM_WAITING, 1, **labels),
        series(f.VLLM_KV_USED, 0.5, **labels),
        counter(f.VLLM_PROMPT, 100, **labels),
        counter(f.VLLM_CACHED, 40, **labels),
        counter(f.VLLM_OUTPUT, 20, **labels),
        counter(f.VLLM_SUCCESS, 2, **labels, finished_reason="stop"),
        counter(f.VLLM_SUCCESS, 1, **labels, finished_reason="length"),
        counter(f.VLLM_PREEMPTIONS, 0.5, **labels),
    ]


def probe(number: int, pod: bool = True, **more: str) -> list[Series]:
    """What the agent tells of an engine: two tenants, 100 prompt tokens a second, 40 cached, 20 generated."""
    e = probed(number, pod, **more)
    return [
        series(engine.INFO, 1, **e, engine_name="vllm", engine_version="0.33"),
        series(engine.UP, 1, **e),
        series(engine.REQUESTS, 3, **e, state="running"),
        series(engine.REQUESTS, 1, **e, state="waiting"),
        series(engine.KV_POOL_BLOCKS, 1000, **e),
        series(engine.KV_USED_BLOCKS, 500, **e),
        series(engine.KV_CACHED_BLOCKS, 250, **e),
        series(engine.KV_HOLDER, 0.25, **e, holder="1", tenant="a"),
        series(engine.KV_HOLDER, 0.125, **e, holder="2", tenant="b"),
        *(
            counter(engine.TENANT_TOKENS, rate / 2, **e, tenant=tenant, kind=kind)
            for tenant in "ab"
            for kind, rate in (("prompt", 100), ("cached", 40), ("output", 20), ("recomputed", 5))
        ),
        counter(engine.TENANT_REQUESTS, 2, **e, tenant="a", outcome="stop"),
        counter(engine.TENANT_REQUESTS, 0.5, **e, tenant="b", outcome="error", error_type="OOM"),
        counter(engine.PREEMPTIONS, 0.5, **e, cause="kv_full"),
    ]


TOKENS = {"input": 60.0, "cached": 40.0, "output": 20.0}

CASES = [
    Case(
        "two engines of one model with the probe",
        [*probe(1), *probe(2)],
        [
            values(
                r.ENGINE_INFO, ("workload_pod", "dialect"), {("vllm-1", "probe"): 1, ("vllm-2", "probe"): 1}
            ),
            values(r.ENGINE_RUNNING, ("workload_pod",), {"vllm-1": 3, "vllm-2": 3}),
            values(r.ENGINE_KV_USED, ("workload_pod",), {"vllm-1": 0.5, "vllm-2": 0.5}),
            values(r.ENGINE_KV_CACHED, ("workload_pod",), {"vllm-1": 0.25, "vllm-2": 0.25}),
            values(
                r.ENGINE_KV_HOLDER, ("workload_pod", "tenant"), {("vllm-1", "a"): 0.25, ("vllm-2", "a"): 0.25}
            ),
            values(r.ENGINE_TOKENS, ("kind",), TOKENS, workload_pod="vllm-1"),
            values(r.ENGINE_PREFIX_HIT, ("workload_pod",), {"vllm-1": 0.4, "vllm-2": 0.4}),
            values(r.MODEL_ENGINES, ("model_name",), {"deepseek": 2}),
            values(r.MODEL_TOKENS, ("kind",), {kind: 2 * rate for kind, rate in TOKENS.items()}),
            values(r.MODEL_REQUESTS, ("outcome",), {"stop": 4, "error": 1}),
            values(r.MODEL_PREEMPTIONS, ("model_name",), {"deepseek": 1}),
            values(r.FLEET_WAITING, ("cluster",), {"": 2}),
        ],
        LAYOUTS,
    ),
    Case(
        "an engine with the probe is not counted again by its own metrics, one without it is",
        [
            *probe(1),
            *own(1, model_name="deepseek", pod="vllm-1", namespace="serving"),
            *own(2, model_name="deepseek", pod="vllm-2", namespace="serving"),
            *own(3, pod="qwen-1", namespace="serving"),
        ],
        [
            values(
                r.ENGINE_INFO,
                ("workload_pod", "dialect"),
                {
                    ("vllm-1", "probe"): 1,
                    ("vllm-2", "vllm"): 1,
                    ("qwen-1", "vllm"): 1,
                },
            ),
            values(r.MODEL_TOKENS, ("model_name",), {"deepseek": 240, "qwen": 120}),
            values(r.MODEL_RUNNING, ("model_name",), {"deepseek": 6, "qwen": 3}),
        ],
    ),
    Case(
        "where target or probe name no pod, a model with the probe is read from it only",
        [
            *probe(1, pod=False),
            *own(1, model_name="deepseek", pod="vllm-1", namespace="serving"),
            *probe(2, model_name="llama"),
            *own(2, model_name="llama"),
            *own(3),
        ],
        [values(r.MODEL_RUNNING, ("model_name",), {"deepseek": 3, "llama": 3, "qwen": 3})],
    ),
    Case(
        "the probe goes: its engine is read by its own metrics",
        [
            series(engine.INFO, "1x60 stale", **probed(1), engine_name="vllm", engine_version="0.33"),
            *own(1, model_name="deepseek", pod="vllm-1", namespace="serving"),
        ],
        [
            values(r.ENGINE_INFO, ("dialect",), {"probe": 1}, minute=5),
            values(r.ENGINE_INFO, ("dialect",), {"vllm": 1}, minute=12),
            values(r.MODEL_TOKENS, ("kind",), TOKENS, minute=18),
        ],
    ),
    Case(
        "vLLM alone, an older one that does not tell what was cached, and a restart",
        [
            *own(1),
            *(
                Series(s.metric, "0+700x70 0+700x100" if s.metric is f.VLLM_PROMPT else s.values, s.labels)
                for s in own(2, model_name="old")
                if s.metric is not f.VLLM_CACHED
            ),
        ],
        [
            values(r.MODEL_TOKENS, ("kind",), TOKENS, model_name="qwen"),
            values(r.MODEL_TOKENS, ("kind",), {"input": 100, "output": 20}, model_name="old", minute=19),
            nothing(f"{r.MODEL_TOKENS.name}{{model_name='old', kind='input'}} > 105", minute=9),
            values(r.MODEL_REQUESTS, ("outcome",), {"stop": 2, "length": 1}, model_name="qwen"),
            nothing(f"{r.MODEL_PREFIX_HIT.name}{{model_name='old'}}"),
            nothing(r.ENGINE_KV_HOLDER.name),
        ],
    ),
    *(
        Case(
            f"SGLang ({spelling}): ranks that repeat each other, data-parallel ranks that do not",
            [
                *(
                    series(
                        of(f.SGLANG_RUNNING),
                        2 + dp,
                        **target(1, "sglang"),
                        engine_type="unified",
                        dp_rank=str(dp),
                        tp_rank=str(tp),
                        pp_rank=str(pp),
                    )
                    for dp in (0, 1)
                    for tp in (0, 1)
                    for pp in (0, 1)
                ),
                series(of(f.SGLANG_WAITING), 4, **target(1, "sglang"), dp_rank="0", tp_rank="0", pp_rank="0"),
                series(
                    of(f.SGLANG_WAITING),
                    9,
                    **target(1, "sglang"),
                    dp_rank="0",
                    tp_rank="0",
                    pp_rank="0",
                    priority="1",
                ),
                series(
                    of(f.SGLANG_KV_USED), 0.75, **target(1, "sglang"), dp_rank="0", tp_rank="0", pp_rank="0"
                ),
                counter(of(f.SGLANG_PROMPT), 100, **target(1, "sglang")),
                counter(of(f.SGLANG_CACHED), 30, **target(1, "sglang"), cache_source="device"),
                counter(of(f.SGLANG_CACHED), 10, **target(1, "sglang"), cache_source="host"),
                counter(of(f.SGLANG_OUTPUT), 20, **target(1, "sglang")),
                counter(of(f.SGLANG_REQUESTS), 2, **target(1, "sglang")),
            ],
            [
                values(r.ENGINE_INFO, ("server", "dialect"), {("10.0.0.1:8000", "sglang"): 1}),
                values(r.ENGINE_RUNNING, ("server",), {"10.0.0.1:8000": 5}),
                values(r.ENGINE_WAITING, ("server",), {"10.0.0.1:8000": 4}),
                values(r.ENGINE_KV_USED, ("server",), {"10.0.0.1:8000": 0.75}),
                values(r.MODEL_TOKENS, ("kind",), TOKENS),
                values(r.MODEL_REQUESTS, ("outcome",), {"ok": 2}),
            ],
            layouts=("union",),
        )
        for spelling, of in (("colon", lambda metric: metric), ("underscore", f.escaped))
    ),
    Case(
        "trtllm-serve: gauges of several processes say the same",
        [
            *(series(f.TRTLLM_RUNNING, 3, **target(1, "trt"), pid=pid) for pid in ("10", "11")),
            *(series(f.TRTLLM_WAITING, 2, **target(1, "trt"), pid=pid) for pid in ("10", "11")),
            series(f.TRTLLM_KV_USED, 0.5, **target(1, "trt"), pid="10"),
            counter(f.TRTLLM_PROMPT, 100, **target(1, "trt")),
            counter(f.TRTLLM_CACHED, 40, **target(1, "trt")),
            counter(f.TRTLLM_OUTPUT, 20, **target(1, "trt")),
            counter(f.TRTLLM_SUCCESS, 2, **target(1, "trt"), finished_reason="stop"),
            counter(f.TRTLLM_SUCCESS, 1, **target(1, "trt"), finished_reason="cancelled"),
            counter(f.TRTLLM_ERRORS, 0.5, **target(1, "trt"), http_code="500"),
        ],
        [
            values(r.ENGINE_RUNNING, ("server",), {"10.0.0.1:8000": 3}),
            values(r.ENGINE_WAITING, ("server",), {"10.0.0.1:8000": 2}),
            values(r.MODEL_TOKENS, ("kind",), TOKENS),
            values(r.MODEL_REQUESTS, ("outcome",), {"stop": 2, "abort": 1, "error": 0.5}),
        ],
        layouts=("union",),
    ),
    Case(
        "Triton with vLLM's backend, and with the former one of TensorRT-LLM",
        [
            counter(f.VLLM_PROMPT, 100, **target(1, "triton", model_name="", model="qwen", version="1")),
            counter(f.VLLM_OUTPUT, 20, **target(1, "triton", model_name="", model="qwen", version="1")),
            series(f.TRITON_PENDING, 4, **target(1, "triton", model_name="", model="qwen", version="1")),
            counter(f.TRITON_SUCCESS, 2, **target(1, "triton", model_name="", model="qwen", version="1")),
            counter(
                f.TRITON_FAILURE,
                1,
                **target(1, "triton", model_name="", model="qwen", version="1"),
                reason="BACKEND",
            ),
            counter(
                f.TRITON_FAILURE,
                0.5,
                **target(1, "triton", model_name="", model="qwen", version="1"),
                reason="CANCELED",
            ),
            *(
                series(
                    f.TRITON_TRTLLM_REQUESTS,
                    value,
                    **target(2, "triton", model_name="", model="llama"),
                    request_type=kind,
                )
                for kind, value in (("max", 64.0), ("active", 9.0), ("scheduled", 7.0), ("waiting", 2.0))
            ),
            series(
                f.TRITON_TRTLLM_KV,
                0.25,
                **target(2, "triton", model_name="", model="llama"),
                kv_cache_block_type="fraction",
            ),
            *histogram(
                f.TRITON_TRTLLM_OUTPUT, {10.0: 2.0}, 2, **target(2, "triton", model_name="", model="llama")
            ),
        ],
        [
            values(
                r.ENGINE_INFO,
                ("model_name", "dialect"),
                {
                    ("qwen", "triton_vllm"): 1,
                    ("llama", "triton_trtllm"): 1,
                },
            ),
            values(r.MODEL_WAITING, ("model_name",), {"qwen": 4, "llama": 2}),
            values(r.MODEL_RUNNING, ("model_name",), {"llama": 7}),
            values(
                r.MODEL_TOKENS,
                ("model_name", "kind"),
                {
                    ("qwen", "input"): 100,
                    ("qwen", "output"): 20,
                    ("llama", "output"): 20,
                },
            ),
            values(r.MODEL_REQUESTS, ("outcome",), {"ok": 2, "error": 1, "abort": 0.5}),
            values(r.ENGINE_KV_USED, ("model_name",), {"llama": 0.25}),
        ],
        layouts=("union",),
    ),
    Case(
        "experts and workers",
        [
            *probe(1),
            *(
                series(engine.EXPERT_IMBALANCE, value, **probed(1), layer=layer)
                for layer, value in (("1", 2), ("2", 5))
            ),
            *(
                series(engine.EXPERT_RANK, value, **probed(1), expert_rank=rank)
                for rank, value in (("0", 0.25), ("1", 0.75))
            ),
            series(engine.FRAGMENTATION, 0.2, **probed(1), rank="0", gpu_uuid="GPU-0"),
            *histogram(
                engine.STEP,
                {0.01: 5.0, 0.02: 10.0},
                10,
                **probed(1),
                rank="0",
                gpu_uuid="GPU-0",
                clock="cuda",
            ),
        ],
        [
            values(r.ENGINE_EXPERT_IMBALANCE, ("model_name",), {"deepseek": 5}),
            values(r.ENGINE_EXPERT_RANK_IMBALANCE, ("model_name",), {"deepseek": 1.5}),
            values(r.ENGINE_FRAGMENTATION, ("gpu_uuid",), {"GPU-0": 0.2}),
            values(r.ENGINE_STEP_SECONDS, ("gpu_uuid",), {"GPU-0": 0.025}),
        ],
    ),
]


def test_engines(bench: Bench) -> None:
    bench.run(CASES, WANTED)


def test_source_dcgm_reads_engines_own_metrics_only(bench: Bench) -> None:
    case = Case(
        "both are there",
        [*probe(1), *own(1, model_name="deepseek", pod="vllm-1", namespace="serving")],
        [
            values(r.ENGINE_INFO, ("dialect",), {"vllm": 1}),
            values(r.MODEL_TOKENS, ("kind",), TOKENS),
            nothing(r.ENGINE_KV_CACHED.name),
        ],
    )
    Bench(bench.promtool, bench.folder, Options(source="dcgm")).run([case], WANTED)
