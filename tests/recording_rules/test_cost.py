"""Cost: parts that add up to the bill for any fleet, and worked examples of what a number means."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gpuglass.families import engine, gpu
from recording_rules import foreign as f
from recording_rules import records as r
from recording_rules.options import Options
from tests.recording_rules.fleets import MINUTES, EngineLoad, Fleet, Job, fleets
from tests.recording_rules.promtool import LAYOUTS, Bench, Case, Check, Series, nothing, series, values
from tests.recording_rules.test_devices import A100, H100, dcgm
from tests.recording_rules.test_engines import own, probed

WANTED = ("devices", "engines", "models", "cost")
END = MINUTES - 1
CARD = "cluster, model_name, model"
ALLOCATION = "model:cost_per_hour:sum{basis='allocation'}"
USAGE = "model:cost_per_hour:sum{basis='usage'}"
ALL_KINDS = (
    f"on ({CARD}) (model:card_tokens:rate{{kind='output'}} > 0) "
    f"and on ({CARD}) (sum by ({CARD}) (model:card_tokens:rate{{kind=~'input|cached'}}) > 0)"
)
"""To be joined to what is divided over tokens: there are some of each kind."""
ONE_CARD = "(count by (model_name) (group by (model_name, model) (model:card_tokens:rate)) == 1)"
USED = "(sum by (model_name, workload_pod) (rate(gpuglass_tenant_gpu_seconds_total[5m])) > 0)"


def differ(left: str, right: str) -> Check:
    """Nothing, if two expressions agree to a part in ten thousand wherever both are."""
    return nothing(f"abs(({left}) - ({right})) > 0.0001 * abs({right}) + 1e-9", END)


def compares(check: Check) -> Check:
    """Nothing, if a check of `differ` has something to compare."""
    return nothing(f"absent({check.expression.partition(' > 0.0001')[0]})", END)


def identities(fleet: Fleet) -> list[Check]:
    """What holds for every fleet."""
    priced = any(map(fleet.prices.get, fleet.cards))
    per_kind = "model:cost_per_1k_tokens:ratio{kind!='all'}"
    checks = [
        Check("count(fleet:cost_per_hour:sum) or vector(0)", [({}, float(priced))], END),
        differ("sum(fleet:cost_per_hour:sum)", f"vector({fleet.total():.12g})"),
        differ("sum by (cluster) (fleet:cost_part_per_hour:sum)", "fleet:cost_per_hour:sum"),
        # The parts of each GPU that somebody holds are a whole.
        differ(
            "sum by (gpu_uuid) (engine:gpu_share:ratio or workload:gpu_share:ratio)",
            "group by (gpu_uuid) (device:holders:count)",
        ),
        differ(f"sum by ({CARD}) (model:cost_part_per_hour:sum)", f"sum by ({CARD}) ({ALLOCATION})"),
        nothing(f"sum by ({CARD}) ({USAGE}) > 1.0001 * sum by ({CARD}) ({ALLOCATION})", END),
        nothing("{__name__=~'.+:cost_.+'} < 0", END),
        # What tokens of all kinds cost is what the model costs.
        differ(
            f"3.6 * sum by ({CARD}, basis) ({per_kind} * on ({CARD}, kind) group_left () "
            f"model:card_tokens:rate) and {ALL_KINDS}",
            "model:cost_per_hour:sum",
        ),
        # A model on one card: what if it ran there? It does.
        differ(
            f"sum by ({CARD}) (model:what_if_cost_per_hour:sum) "
            f"and on (model_name) {ONE_CARD} and {ALL_KINDS}",
            f"sum by ({CARD}) ({USAGE})",
        ),
        # Tenants pay for the engines that anybody used.
        differ(
            "sum by (cluster, model_name) (tenant:cost_per_hour:sum{basis='allocation'})",
            "sum by (cluster, model_name) "
            f"(engine:cost_per_hour:sum and on (model_name, workload_pod) {USED})",
        ),
    ]
    for name, cost in fleet.model_cost().items():
        checks.append(
            differ(
                f"sum(model:cost_per_hour:sum{{model_name='{name}', basis='allocation'}})",
                f"vector({cost:.12g})",
            )
        )
    for number in range(len(fleet.jobs)):
        cost = fleet.cost_of(f"job{number}")
        checks.append(
            differ(
                f"sum(workload:cost_per_hour:sum{{workload_pod='job-{number}', basis='allocation'}})",
                f"vector({cost:.12g})",
            )
        )
    return checks


SHARED = Fleet(
    (H100, A100),
    {H100: 4.0, A100: 1.0},
    (EngineLoad("deepseek", {0: (0.2, 0.3, 0.1, 0.0)}, (80, 20, 50), (3, 1), 0.5),),
    (Job({0: 0.2}),),
)


def test_identities_hold_for_any_fleet(bench: Bench) -> None:
    # Several fleets at once, since promtool takes long to start; shrinking would start it hundreds of times.
    @given(st.lists(fleets(), min_size=6, max_size=6))
    @settings(
        max_examples=2, phases=(Phase.generate,), suppress_health_check=list(HealthCheck), derandomize=True
    )
    def check(some: list[Fleet]) -> None:
        bench.run([Case(repr(one), one.series(), identities(one), ("pair",)) for one in some], WANTED)

    check()


def test_the_identities_find_a_wrong_bill(bench: Bench) -> None:
    """A fleet whose price is another than the calculation's fails."""
    other = Fleet(SHARED.cards, {H100: 4.1, A100: 1.0}, SHARED.engines, SHARED.jobs)
    try:
        bench.run([Case("wrong", SHARED.series(), identities(other), ("pair",))], WANTED)
    except AssertionError as error:
        assert "cost_per_hour" in str(error)
    else:
        raise AssertionError("a wrong bill was not found")


def test_each_identity_compares_something(bench: Bench) -> None:
    """Two expressions whose labels do not meet would agree for ever."""
    checks = [compares(check) for check in identities(SHARED) if " > 0.0001 * abs(" in check.expression]
    assert len(checks) >= 8
    bench.run([Case("shared", SHARED.series(), checks, ("pair",))], WANTED)


def test_a_gpu_that_an_engine_and_a_job_share(bench: Bench) -> None:
    """0.6 of the H100 is the engine's, 0.2 the job's, and of the idle 0.2 half each; the A100 is nobody's."""
    checks = [
        values(
            r.ENGINE_GPU_SHARE, ("part",), {"prefill": 0.2, "decode": 0.3, "overhead": 0.1, "idle": 0.1}, END
        ),
        values(r.WORKLOAD_GPU_SHARE, ("part",), {"used": 0.2, "idle": 0.1}, END),
        # Half of what requests used was for nothing.
        values(
            r.MODEL_COST_PART,
            ("part",),
            {"prefill": 0.4, "decode": 0.6, "waste": 1.0, "overhead": 0.4, "idle": 0.4},
            END,
        ),
        values(r.MODEL_COST, ("model", "basis"), {(H100, "allocation"): 2.8, (H100, "usage"): 2.0}, END),
        values(
            r.FLEET_COST_PART,
            ("part",),
            {
                **{"prefill": 0.4, "decode": 0.6, "waste": 1.0, "overhead": 0.4, "idle": 0.4},
                **{"job_used": 0.8, "job_idle": 0.4, "unallocated": 1.0},
            },
            END,
        ),
        values(
            r.TENANT_COST,
            ("tenant", "basis"),
            {
                ("t0", "allocation"): 2.1,
                ("t1", "allocation"): 0.7,
                ("t0", "usage"): 1.5,
                ("t1", "usage"): 0.5,
            },
            END,
        ),
        # 2 an hour for 150 tokens a second; prefill is 0.4 of it: 0.8 for 80 + 0.1 × 20 tokens.
        values(
            r.MODEL_COST_PER_1K,
            ("kind",),
            {"all": 0.004, "input": 0.003, "cached": 0.0, "output": 0.007},
            END,
            basis="usage",
        ),
        values(r.WORKLOAD_GPUS, ("workload_pod", "model"), {("job-0", H100): 0.3}, END),
        values(r.WORKLOAD_GPUS_IDLE, ("workload_pod",), {"job-0": 0.1}, END),
        values(r.WORKLOAD_SM, ("workload_pod", "process"), {("job-0", "python3"): 0.2}, END),
        values(r.WORKLOAD_MEMORY_RATIO, ("workload_pod",), {"job-0": 0.25}, END),
        values(r.FLEET_IDLE_GPUS, ("model",), {H100: 0.2, A100: 1.0}, END),
        values(r.ENGINE_GPUS, ("model_name", "model"), {("deepseek", H100): 1}, END),
    ]
    bench.run([Case("shared", SHARED.series(), checks, LAYOUTS)], WANTED)


def test_what_if_compares_cards_at_the_efficiency_that_is_measured(bench: Bench) -> None:
    """The A100 makes the same tokens in four times the time at half of the price: twice as dear."""
    fleet = Fleet(
        (H100, A100),
        {H100: 4.0, A100: 2.0},
        (
            EngineLoad("deepseek", {0: (0.1, 0.1, 0.0, 0.0)}, (100, 0, 100), (1,), 0.0),
            EngineLoad("deepseek", {1: (0.4, 0.4, 0.0, 0.0)}, (100, 0, 100), (1,), 0.0),
        ),
        (),
    )
    per_1k = "model:cost_per_1k_tokens:ratio{basis='usage', kind='all', model=~'.*%s.*'}"
    told = {"basis": "usage", "kind": "all", "model_name": "deepseek"}
    checks = [
        values(r.MODEL_COST, ("model",), {H100: 0.8, A100: 1.6}, END, basis="usage"),
        values(r.MODEL_WHAT_IF, ("model",), {H100: 1.6, A100: 3.2}, END),
        Check(f"round({per_1k % 'A100'} / ignoring (model) {per_1k % 'H100'}, 0.001)", [(told, 2.0)], END),
    ]
    bench.run([Case("cards", fleet.series(), checks)], WANTED)


def test_without_price_or_tokens_there_is_no_cost_and_no_zero(bench: Bench) -> None:
    unpriced = Fleet(SHARED.cards, {}, SHARED.engines, SHARED.jobs)
    idle = Fleet((H100,), {H100: 4.0}, (EngineLoad("deepseek", {0: (0.0,) * 4}, (0, 0, 0), (1,), 0.0),), ())
    bench.run(
        [
            Case("no price", unpriced.series(), [nothing("{__name__=~'.*cost.*'}", END)]),
            Case(
                "no tokens",
                idle.series(),
                [
                    nothing(r.MODEL_COST_PER_1K.name, END),
                    nothing(r.TENANT_COST.name, END),
                    values(r.MODEL_COST, ("basis",), {"allocation": 4.0, "usage": 0.0}, END),
                    values(
                        r.MODEL_COST_PART,
                        ("part",),
                        {"idle": 4.0, "prefill": 0, "decode": 0, "overhead": 0},
                        END,
                    ),
                ],
            ),
        ],
        WANTED,
    )


def test_engines_without_a_probe_are_found_by_their_pod(bench: Bench) -> None:
    """By the SM time of the pod's processes; their cost is there, undivided, and they are no job."""
    pod = {"workload_namespace": "serving", "workload_pod": "qwen-1", "workload_container": "vllm"}
    device = {"instance": "a:9955", "device": "nvidia0", "gpu_uuid": "GPU-0"}
    fleet = Fleet((H100, A100), {H100: 4.0, A100: 1.0}, (), (Job({1: 0.5}),))
    extra: list[Series] = [
        *own(1, pod="qwen-1", namespace="serving"),
        series(gpu.PROCESS_SM, 0.25, MINUTES, **device, **pod, process="VLLM::Worker"),
        series(gpu.PROCESS_MEMORY, 2e10, MINUTES, **device, **pod, process="VLLM::Worker"),
        # Nobody's work, and no job either.
        series(gpu.PROCESS_MEMORY, 1e6, MINUTES, **device, process="nvidia-persistenced"),
    ]
    checks = [
        values(
            r.MODEL_COST_PART, ("model_name", "part"), {("qwen", "unmeasured"): 1, ("qwen", "idle"): 3}, END
        ),
        values(r.MODEL_COST, ("basis",), {"allocation": 4.0}, END, basis="allocation"),
        values(r.WORKLOAD_COST, ("workload_pod",), {"job-0": 1.0}, END, basis="allocation"),
        Check("count(workload:gpu_used:avg)", [({}, 1)], END),
        # Weighted tokens: 60 + 0.1 × 40 of 64 + 4 × 20.
        values(r.MODEL_PREFILL_SHARE, ("model_name",), {"qwen": 0.444}, END),
    ]
    bench.run([Case("plain", [*fleet.series(), *extra], checks)], WANTED)


def test_with_dcgm_exporter_only_the_pod_that_it_names_pays(bench: Bench) -> None:
    """`exported_pod` where labels are not honoured: `pod` is dcgm-exporter's own then."""
    labels = {"exported_pod": "qwen-1", "exported_namespace": "serving", "pod": "dcgm-x", "namespace": "gpu"}
    case = Case(
        "dcgm",
        [
            *own(1, pod="qwen-1", namespace="serving"),
            series(f.DCGM_MEMORY_USED, 1024, **dcgm(1, **labels)),
            series(f.DCGM_MEMORY_FREE, 1024, **dcgm(1, **labels)),
            series(f.DCGM_BUSY, 40, **dcgm(1, **labels)),
        ],
        [
            values(
                r.ENGINE_GPU_SHARE,
                ("model_name", "part"),
                {("qwen", "unmeasured"): 0.4, ("qwen", "idle"): 0.6},
            ),
            values(r.ENGINE_GPUS, ("model_name", "model"), {("qwen", A100): 1}),
        ],
        ("union",),
    )
    for source in ("auto", "dcgm"):
        Bench(bench.promtool, bench.folder, Options(source="dcgm" if source == "dcgm" else "auto")).run(
            [case], WANTED
        )


def test_a_job_that_ends_is_no_holder_any_more(bench: Bench) -> None:
    labels = {"instance": "a:9955", "device": "nvidia0", "gpu_uuid": "GPU-0", "process": "python3"}
    fleet = Fleet((H100,), {H100: 4.0}, (), ())
    case = Case(
        "ended",
        [
            *fleet.series(),
            series(gpu.PROCESS_MEMORY, "1e9x40 stale", **labels),
            series(gpu.PROCESS_SM, "0.5x40 stale", **labels),
        ],
        [
            values(r.FLEET_COST_PART, ("part",), {"job_used": 2.0, "job_idle": 2.0}, 4),
            values(r.FLEET_COST_PART, ("part",), {"unallocated": 4.0}, 6),
        ],
    )
    bench.run([case], WANTED)


def test_a_restart_of_agent_and_engine_costs_nothing_twice(bench: Bench) -> None:
    """Counters begin anew: the rate in the window stays what it was, within what extrapolation can know."""
    worker = {**probed(0), "rank": "0", "gpu_uuid": "GPU-0", "clock": "cuda"}
    fleet = Fleet((H100,), {H100: 4.0}, (), ())
    case = Case(
        "restart",
        [
            *fleet.series(),
            series(engine.INFO, 1, MINUTES, **probed(0), engine_name="vllm", engine_version="1"),
            series(engine.GPU_SECONDS_BY_PART, "0+3.5x40 0+3.5x40", **worker, part="decode"),
            series(engine.GPU_SECONDS_BY_PART, "0+0x120", **worker, part="prefill"),
        ],
        [
            nothing("abs(engine:gpu_seconds:rate{part='decode'} - 0.5) > 0.02", END),
            differ("sum(fleet:cost_part_per_hour:sum)", "sum(fleet:cost_per_hour:sum)"),
            Check("count(engine:gpu_seconds:rate{part='decode'})", [({}, 1)], END),
        ],
    )
    bench.run([case], WANTED)
