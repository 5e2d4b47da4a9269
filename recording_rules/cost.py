"""Cost: who answers for which part of each GPU, times the price of the GPU.

In: GPU time of engines by part, SM time of jobs, prices (configuration that every agent exports: read through
`max by` only). Out: parts of GPUs that add up to 1 for every GPU, and cost that adds up to the sum of prices,
by engine, model, card, job and tenant; cost per thousand tokens; what the same tokens would cost on other
cards.

A GPU is divided like this. Each holder (an engine or a job) answers for what it used; if holders overlap, so
that they used more than all of it, each for its share of that. What nobody used is idle, and divided evenly
among the holders. A GPU without a holder is unallocated.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpuglass.families import engine, gpu, prices
from gpuglass.promql import (
    Match,
    aggregate,
    divide,
    first_of,
    not_equal,
    one_of,
    over_time,
    parenthesize,
    rate,
    select,
    times,
)
from recording_rules import foreign as f
from recording_rules import records as r
from recording_rules.devices import GPU, first_label, on_gpu, renamed
from recording_rules.model import Group, Rule
from recording_rules.options import Options
from recording_rules.settings import Settings

TOKEN_PARTS = ("prefill", "decode")
USAGE_PARTS = (*TOKEN_PARTS, "waste")
KINDS = ("input", "cached", "output")
CARD = (*r.MODEL, "model")
_ENGINE_GPU = (*r.ENGINE, "gpu_uuid")
_WORKLOAD_GPU = (*r.WORKLOAD, "gpu_uuid")
_POD = ("cluster", "workload_namespace", "workload_pod")


def groups(settings: Settings, options: Options) -> list[Group]:
    """The group of cost. Each rule sees what those before it recorded at the same moment: that is why the
    parts add up."""
    rules = [
        *_use(settings, options),
        *_shares(),
        *_engine_cost(settings, options),
        *_model_cost(settings),
        *_job_cost(),
        *_sums(),
        *(_tenant_cost(settings) if options.source != "dcgm" else ()),
    ]
    return [Group("gpuglass-cost.rules", float(settings.windows.slow_interval), tuple(rules))]


# Who uses what


def _use(settings: Settings, options: Options) -> Iterator[Rule]:
    w, long = float(settings.windows.rate), float(settings.windows.jobs)
    if options.source != "dcgm":
        on_card = {"gpu_uuid": not_equal("")}
        for part in TOKEN_PARTS:
            time = aggregate("sum", _ENGINE_GPU, rate(engine.GPU_SECONDS_BY_PART, w, part=part, **on_card))
            yield Rule(r.ENGINE_GPU_SECONDS, time, {"part": part})
        rest = rate(
            engine.GPU_SECONDS_BY_PART, w, part=one_of(("padding", "dummy", "unattributed")), **on_card
        )
        gap = rate(engine.IDLE, w, **on_card)
        overhead = aggregate("sum", _ENGINE_GPU, first_of(rest, gap))
        yield Rule(r.ENGINE_GPU_SECONDS, overhead, {"part": "overhead"})
        wasted = aggregate("sum", r.ENGINE, rate(engine.WASTED, w))
        used = aggregate("sum", r.ENGINE, select(r.ENGINE_GPU_SECONDS, part=one_of(TOKEN_PARTS)))
        # A request's whole time is told as wasted when it ends: in a short window that can be more than ran.
        yield Rule(r.ENGINE_WASTED, f"clamp_max(\n  {divide(wasted, used)},\n  1\n)")
    if options.source != "gpuglass":
        yield Rule(
            r.ENGINE_GPU_SECONDS, _by_pod(float(settings.windows.average), options), {"part": "unmeasured"}
        )
    cards = times(
        aggregate("group", _ENGINE_GPU, select(r.ENGINE_GPU_SECONDS)),
        select(r.DEVICE_INFO),
        GPU,
        "group_left (model)",
    )
    yield Rule(r.ENGINE_GPUS, aggregate("count", (*r.ENGINE, "model"), cards))
    active = times(
        aggregate("group", (*r.MODEL, "gpu_uuid"), select(r.ENGINE_GPU_SECONDS)), select(r.DEVICE_ACTIVE), GPU
    )
    yield Rule(r.MODEL_ACTIVE, aggregate("avg", r.MODEL, active))
    if options.source != "dcgm":
        real = {"process": Match("!~", settings.jobs.ignored_processes)}
        sm = aggregate("sum", _WORKLOAD_GPU, over_time("avg", gpu.PROCESS_SM, long, **real))
        held = aggregate("sum", _WORKLOAD_GPU, select(gpu.PROCESS_MEMORY, **real)) + " * 0"
        engines = f"unless on ({', '.join((*_POD, 'gpu_uuid'))}) {select(r.ENGINE_GPU_SECONDS)}"
        # A process that has gone is no holder any more, though its mean is still there.
        present = f"({parenthesize(sm)} and {parenthesize(held)}) or {parenthesize(held)}"
        yield Rule(r.WORKLOAD_GPU_USED, f"{parenthesize(present)}\n{engines}")


def _by_pod(window: float, options: Options) -> str:
    """GPU time of engines without a probe, by their pod: the SM time of its processes or, with dcgm-exporter
    only, the activity of the GPUs that it was given. Of several engines in a pod one stands for all."""
    named = {"workload_pod": not_equal("")}
    processes = aggregate("sum", (*_POD, "gpu_uuid"), over_time("avg", gpu.PROCESS_SM, window, **named))
    given = first_label(
        first_label(
            renamed(select(f.DCGM_MEMORY_USED), gpu_uuid="UUID"), "workload_pod", ("exported_pod", "pod")
        ),
        "workload_namespace",
        ("exported_namespace", "namespace"),
    )
    active = times(aggregate("group", (*_POD, "gpu_uuid"), given), select(r.DEVICE_ACTIVE), GPU)
    use = first_of(*options.chosen([processes], [active]), on=(*_POD, "gpu_uuid"))
    info = select(r.ENGINE_INFO, dialect=not_equal("probe"), workload_pod=not_equal(""))
    of_pod = f"topk by ({', '.join(_POD)}) (1, {info})"
    joined = times(use, of_pod, _POD, "group_left (model_name, engine, server, workload_container)")
    return aggregate("sum", _ENGINE_GPU, joined)


# Who answers for what


def _shares() -> Iterator[Rule]:
    users = first_of(select(r.ENGINE_GPU_SECONDS), select(r.WORKLOAD_GPU_USED))
    yield Rule(r.DEVICE_HELD, aggregate("sum", GPU, users))
    holders = first_of(
        aggregate("group", _ENGINE_GPU, select(r.ENGINE_GPU_SECONDS)), select(r.WORKLOAD_GPU_USED)
    )
    yield Rule(r.DEVICE_HOLDERS, aggregate("count", GPU, holders))
    whole = f"(clamp_min({select(r.DEVICE_HELD)}, 1) > 0)"
    idle = f"clamp_min(1 - {select(r.DEVICE_HELD)}, 0) / ({select(r.DEVICE_HOLDERS)} > 0)"
    on = f"on ({', '.join(GPU)}) group_left ()"
    yield Rule(r.ENGINE_GPU_SHARE, f"{select(r.ENGINE_GPU_SECONDS)}\n/ {on}\n{whole}")
    yield Rule(
        r.ENGINE_GPU_SHARE,
        f"{aggregate('group', _ENGINE_GPU, select(r.ENGINE_GPU_SECONDS))}\n* {on}\n({idle})",
        {"part": "idle"},
    )
    yield Rule(r.WORKLOAD_GPU_SHARE, f"{select(r.WORKLOAD_GPU_USED)}\n/ {on}\n{whole}", {"part": "used"})
    yield Rule(
        r.WORKLOAD_GPU_SHARE,
        f"({select(r.WORKLOAD_GPU_USED)} * 0 + 1)\n* {on}\n({idle})",
        {"part": "idle"},
    )
    price = aggregate("max", r.CARD, select(prices.GPU_HOUR))
    yield Rule(r.DEVICE_PRICE, times(select(r.DEVICE_INFO), price, r.CARD))


def priced(shares: str) -> str:
    """Parts of GPUs as cost per hour, with the card."""
    return times(shares, select(r.DEVICE_PRICE), GPU, "group_left (model)")


# Engines and models


def _engine_cost(settings: Settings, options: Options) -> Iterator[Rule]:
    by = (*r.ENGINE, "model", "part")
    on = f"on ({', '.join(r.ENGINE)}) group_left ()"
    tokens = aggregate("sum", by, priced(select(r.ENGINE_GPU_SHARE, part=one_of(TOKEN_PARTS))))
    others = aggregate("sum", by, priced(select(r.ENGINE_GPU_SHARE, part=Match("!~", "|".join(TOKEN_PARTS)))))
    if options.source == "dcgm":
        yield Rule(r.ENGINE_COST, others)
        return
    useful = f"{tokens}\n* {on}\n(1 - {select(r.ENGINE_WASTED)})"
    yield Rule(r.ENGINE_COST, first_of(useful, tokens, others))
    whole = aggregate(
        "sum", (*r.ENGINE, "model"), priced(select(r.ENGINE_GPU_SHARE, part=one_of(TOKEN_PARTS)))
    )
    yield Rule(r.ENGINE_COST, f"{whole}\n* {on}\n{select(r.ENGINE_WASTED)}", {"part": "waste"})


def _model_cost(settings: Settings) -> Iterator[Rule]:
    parts = aggregate("sum", (*CARD, "part"), select(r.ENGINE_COST))
    yield Rule(r.MODEL_COST_PART, parts)
    yield Rule(r.MODEL_COST, aggregate("sum", CARD, select(r.MODEL_COST_PART)), {"basis": "allocation"})
    used = select(r.MODEL_COST_PART, part=one_of(USAGE_PARTS))
    yield Rule(r.MODEL_COST, aggregate("sum", CARD, used), {"basis": "usage"})
    # Tokens of an engine belong to its card; of one that spans cards, by number of GPUs.
    card_share = divide(
        select(r.ENGINE_GPUS),
        aggregate("sum", r.ENGINE, select(r.ENGINE_GPUS)),
        on=r.ENGINE,
        group="group_left ()",
    )
    for kind in KINDS:
        tokens = aggregate("sum", r.ENGINE, select(r.ENGINE_TOKENS, kind=kind))
        yield Rule(
            r.MODEL_CARD_TOKENS,
            aggregate("sum", CARD, times(f"({card_share})", tokens, r.ENGINE)),
            {"kind": kind},
        )
    yield from _per_token(settings)


def _per_token(settings: Settings) -> Iterator[Rule]:
    cost = settings.cost
    tokens = {kind: select(r.MODEL_CARD_TOKENS, kind=kind) for kind in KINDS}
    bare = {kind: aggregate("sum", CARD, text) for kind, text in tokens.items()}
    # Prompt tokens weighted by what they cost to take in; cached ones may be missing.
    taken_in = f"({bare['input']} + ({cost.cached_token_weight:g} * {bare['cached']} or {bare['input']} * 0))"
    measured = divide(
        aggregate("sum", CARD, select(r.MODEL_COST_PART, part="prefill")),
        aggregate("sum", CARD, select(r.MODEL_COST_PART, part=one_of(TOKEN_PARTS))),
    )
    weighted = (
        f"({taken_in} / ({taken_in} + {cost.output_token_weight:g} * {bare['output']} > 0))\n"
        f"and on ({', '.join(CARD)}) {select(r.MODEL_COST)}"
    )
    yield Rule(r.MODEL_PREFILL_SHARE, first_of(measured, weighted))
    everything = aggregate("sum", CARD, select(r.MODEL_CARD_TOKENS))
    enough = f"{everything} > {cost.min_tokens_per_second:g}"
    per_1k = "/ 3.6"  # per hour and per second: 3600 s ÷ 1000 tokens
    on = f"on ({', '.join(CARD)})"
    share = select(r.MODEL_PREFILL_SHARE)
    for basis in ("allocation", "usage"):
        total = aggregate("sum", CARD, select(r.MODEL_COST, basis=basis))
        for kind, expression in (
            ("all", f"{total} {per_1k} / {on} ({enough})"),
            ("input", f"{total} * {on} {share} {per_1k} / {on} ({taken_in} > 0) and {on} ({enough})"),
            (
                "cached",
                f"{cost.cached_token_weight:g} * {total} * {on} {share} {per_1k} / {on} ({taken_in} > 0) "
                f"and {on} ({enough})",
            ),
            (
                "output",
                f"{total} * {on} (1 - {share}) {per_1k} / {on} ({bare['output']} > 0) and {on} ({enough})",
            ),
        ):
            yield Rule(r.MODEL_COST_PER_1K, expression, {"basis": basis, "kind": kind})
    by_kind = (*r.MODEL, "kind")
    mix = aggregate("sum", by_kind, select(r.MODEL_TOKENS))
    efficiency = select(r.MODEL_COST_PER_1K, basis="usage", kind=not_equal("all"))
    yield Rule(r.MODEL_WHAT_IF, aggregate("sum", CARD, times(efficiency, mix, by_kind)) + " * 3.6")


# Jobs


def _job_cost() -> Iterator[Rule]:
    by = (*r.WORKLOAD, "model")
    shares = select(r.WORKLOAD_GPU_SHARE)
    idle = select(r.WORKLOAD_GPU_SHARE, part="idle")
    yield Rule(r.WORKLOAD_GPUS, aggregate("sum", by, on_gpu(shares, ("model",))))
    yield Rule(r.WORKLOAD_GPUS_IDLE, aggregate("sum", by, on_gpu(idle, ("model",))))
    yield Rule(r.WORKLOAD_SM, aggregate("avg", r.WORKLOAD, select(r.WORKLOAD_GPU_USED)))
    alone = f"{select(r.DEVICE_TENSOR_ACTIVE)} and on ({', '.join(GPU)}) ({select(r.DEVICE_HOLDERS)} == 1)"
    used = f"({select(r.WORKLOAD_GPU_USED)} * 0 + 1)"
    yield Rule(r.WORKLOAD_TENSOR, aggregate("avg", r.WORKLOAD, times(used, alone, GPU)))
    memory = aggregate("sum", _WORKLOAD_GPU, select(gpu.PROCESS_MEMORY))
    of_jobs = f"{memory}\nand on ({', '.join(_WORKLOAD_GPU)})\n{select(r.WORKLOAD_GPU_USED)}"
    yield Rule(r.WORKLOAD_MEMORY, aggregate("sum", r.WORKLOAD, of_jobs))
    total = aggregate("sum", r.WORKLOAD, times(used, select(r.DEVICE_MEMORY_TOTAL_BYTES), GPU))
    yield Rule(r.WORKLOAD_MEMORY_RATIO, divide(select(r.WORKLOAD_MEMORY), total))
    yield Rule(r.WORKLOAD_COST, aggregate("sum", by, priced(shares)), {"basis": "allocation"})
    used_share = select(r.WORKLOAD_GPU_SHARE, part="used")
    yield Rule(r.WORKLOAD_COST, aggregate("sum", by, priced(used_share)), {"basis": "usage"})


# Sums


def _sums() -> Iterator[Rule]:
    yield Rule(r.CARD_COST, aggregate("sum", (*r.CARD, "part"), select(r.ENGINE_COST)))
    for part in ("used", "idle"):
        cost = priced(select(r.WORKLOAD_GPU_SHARE, part=part))
        yield Rule(r.CARD_COST, aggregate("sum", r.CARD, cost), {"part": f"job_{part}"})
    free = f"unless on ({', '.join(GPU)}) {select(r.DEVICE_HOLDERS)}"
    yield Rule(
        r.CARD_COST, aggregate("sum", r.CARD, f"{select(r.DEVICE_PRICE)} {free}"), {"part": "unallocated"}
    )
    yield Rule(r.FLEET_COST_PART, aggregate("sum", (*r.FLEET, "part"), select(r.CARD_COST)))
    yield Rule(r.FLEET_COST, aggregate("sum", r.FLEET, select(r.DEVICE_PRICE)))
    idle = first_of(
        on_gpu(select(r.ENGINE_GPU_SHARE, part="idle"), ("model",)),
        on_gpu(select(r.WORKLOAD_GPU_SHARE, part="idle"), ("model",)),
        f"{select(r.DEVICE_INFO)} {free}",
    )
    yield Rule(r.FLEET_IDLE_GPUS, aggregate("sum", ("cluster", "model"), idle))


# Tenants


def _tenant_cost(settings: Settings) -> Iterator[Rule]:
    """An engine's cost by its tenants' GPU time. What an engine costs that nobody used is no tenant's."""
    time = aggregate("sum", (*r.ENGINE, "tenant"), rate(engine.TENANT_GPU, float(settings.windows.rate)))
    all_time = aggregate("sum", r.ENGINE, rate(engine.TENANT_GPU, float(settings.windows.rate)))
    share = divide(time, all_time, on=r.ENGINE, group="group_left ()")
    by = (*r.TENANT, "model_name")
    for basis, cost in (
        ("allocation", select(r.ENGINE_COST)),
        ("usage", select(r.ENGINE_COST, part=one_of(USAGE_PARTS))),
    ):
        of_engine = aggregate("sum", r.ENGINE, cost)
        yield Rule(
            r.TENANT_COST, aggregate("sum", by, times(f"({share})", of_engine, r.ENGINE)), {"basis": basis}
        )
