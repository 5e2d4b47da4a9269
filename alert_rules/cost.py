"""Alerts about money: cold GPUs, idle spend, dear tokens, wasted GPU time, prices that lack or differ."""

from __future__ import annotations

from alert_rules.common import (
    DEVICE_VARIABLES,
    ENGINE_NAME,
    GPU_NAME,
    MODEL_VARIABLES,
    PRICE_OF_MODEL,
    both,
    longer_than,
    neither,
)
from gpuglass.families import prices
from gpuglass.promql import aggregate, first_of, one_of, over_time, select
from recording_rules import records
from recording_rules.model import Alert
from recording_rules.records import FLEET, MODEL
from recording_rules.settings import Settings

IDLE_PARTS = ("idle", "job_idle", "unallocated")
IDLE_POWER_RATIO = 0.3
"""Power as a share of the limit below which a card does nothing: an idle one draws up to a quarter."""


def alerts(settings: Settings) -> tuple[Alert, ...]:
    """Idle money first, then the price of tokens, then the price list itself."""
    t = settings.alerts.cost
    return (
        _cold(settings),
        _idle_spend(settings),
        *([_above_target(settings)] if t.target_per_1k_tokens else []),
        _above_other_card(settings),
        _wasted(settings),
        _prices_not_set(settings),
        _prices_disagree(settings),
    )


def cold(settings: Settings) -> str:
    """Busy ratio of GPUs that are cold by two independent signals: the driver's busy ratio, and the profiling
    counters or, where the card has none, the power sensor. Counters that stand still on a busy card (which
    happens) make no GPU cold, nor does an exporter that is down: both signals have to be there."""
    t = settings.alerts.cost
    counters = first_of(select(records.DEVICE_SM_ACTIVE), select(records.DEVICE_GRAPHICS_ACTIVE))
    power = f"{select(records.DEVICE_POWER)} / {select(records.DEVICE_POWER_LIMIT)}"
    second = first_of(
        f"({counters}) < {t.cold_ratio:g}", f"({power} < {IDLE_POWER_RATIO:g}) unless ({counters})"
    )
    # Memory held, or nobody tells how much.
    empty = f"{select(records.DEVICE_MEMORY_USED)} < {t.cold_memory_ratio:g}"
    # Weights that are read into memory: the GPU does nothing, and is about to.
    loading = (
        f"{over_time('max', records.DEVICE_MEMORY_USED, t.load_window)} - "
        f"{over_time('min', records.DEVICE_MEMORY_USED, t.load_window)} > {t.cold_memory_ratio:g}"
    )
    expression = both(f"{select(records.DEVICE_BUSY)} < {t.cold_ratio:g}", second)
    return neither(neither(expression, empty), loading)


def _cold(settings: Settings) -> Alert:
    t = settings.alerts.cost
    return Alert(
        "GPUCold",
        cold(settings),
        "warning",
        "cost",
        "A GPU is held and does nothing",
        f"{GPU_NAME} has been busy {{{{ $value | humanizePercentage }}}} of the time for "
        f"{longer_than(t.cold_for)}, by its driver and by a second signal.",
        "gpuglass-gpu",
        hold=t.cold_for,
        variables=DEVICE_VARIABLES,
        annotations={"saving": PRICE_OF_MODEL},
    )


def _idle_spend(settings: Settings) -> Alert:
    t = settings.alerts.cost
    idle = aggregate("sum", FLEET, select(records.FLEET_COST_PART, part=one_of(IDLE_PARTS)))
    if t.idle_spend_per_hour:
        over, budget = f"{idle} > {t.idle_spend_per_hour:g}", f"{t.idle_spend_per_hour:g} an hour"
    else:
        whole = select(records.FLEET_COST)
        over = both(idle, f"{idle} / ({whole} > 0) > {t.idle_spend_ratio:g}")
        budget = f"{t.idle_spend_ratio:.0%} of what all GPUs cost"
    return Alert(
        "GPUIdleSpendOverBudget",
        over,
        "warning",
        "cost",
        "Idle GPUs cost more than the budget for them",
        f'Idle GPUs cost {{{{ $value | printf "%.2f" }}}} an hour; the budget is {budget}.',
        "gpuglass-cost",
        hold=t.idle_spend_for,
        variables={"cluster": "cluster"},
        annotations={"saving": 'up to {{ $value | printf "%.2f" }} an hour'},
    )


def _per_1k(basis: str) -> str:
    return select(records.MODEL_COST_PER_1K, basis=basis, kind="all")


def _above_target(settings: Settings) -> Alert:
    t = settings.alerts.cost
    return Alert(
        "TokenCostAboveTarget",
        f"{aggregate('max', (*MODEL, 'model'), _per_1k('allocation'))} > {t.target_per_1k_tokens:g}",
        "warning",
        "cost",
        "A thousand tokens of a model cost more than the target",
        'A thousand tokens of {{ $labels.model_name }} cost {{ $value | printf "%.4f" }} on {{ '
        "$labels.model }}; "
        f"the target is {t.target_per_1k_tokens:g}.",
        "gpuglass-cost",
        hold=t.cost_for,
        variables=MODEL_VARIABLES,
    )


def _above_other_card(settings: Settings) -> Alert:
    t = settings.alerts.cost
    # Usage: how well each card is filled is another question.
    here = aggregate("max", (*MODEL, "model"), _per_1k("usage"))
    cheapest = aggregate("min", MODEL, _per_1k("usage"))
    return Alert(
        "TokenCostAboveOtherCard",
        f"{here} / on ({', '.join(MODEL)}) group_left () ({cheapest} > 0) > {t.other_card_ratio:g}",
        "warning",
        "cost",
        "The same tokens cost less on another card that is there",
        "A thousand tokens of {{ $labels.model_name }} on {{ $labels.model }} cost {{ $value | printf "
        '"%.1f" }} times '
        "what they cost on the cheapest card that serves it.",
        "gpuglass-cost",
        hold=t.cost_for,
        variables=MODEL_VARIABLES,
    )


def _wasted(settings: Settings) -> Alert:
    t = settings.alerts.cost
    return Alert(
        "GPUTimeWasted",
        f"{select(records.ENGINE_WASTED)} > {t.wasted_ratio:g}",
        "warning",
        "cost",
        "GPU time goes into results that nobody uses",
        f"{{{{ $value | humanizePercentage }}}} of the GPU time of {ENGINE_NAME}, were computed "
        "again, aborted or failed.",
        "gpuglass-cost",
        hold=t.wasted_for,
        variables=MODEL_VARIABLES,
    )


def _prices_not_set(settings: Settings) -> Alert:
    unpriced = neither(select(records.DEVICE_INFO), select(records.DEVICE_PRICE))
    real = aggregate("max", ("model",), select(prices.GPU_HOUR, example="false"))
    example = f"{aggregate('max', ('model',), select(prices.GPU_HOUR, example='true'))} unless {real}"
    placeholder = both(select(records.DEVICE_INFO), f"({example})", ("model",))
    counted = aggregate("count", ("cluster", "model"), first_of(unpriced, placeholder))
    return Alert(
        "GPUPricesNotSet",
        counted,
        "warning",
        "cost",
        "GPUs have no price, or a placeholder for one",
        '{{ $value | printf "%.0f" }} GPUs of model {{ $labels.model }} have no real price in the '
        "agents' configuration "
        "(prices.per_gpu_hour): what they cost is missing or an example.",
        "gpuglass-cost",
        hold=settings.alerts.cost.cost_for,
        variables={"cluster": "cluster"},
    )


def _prices_disagree(settings: Settings) -> Alert:
    series = select(prices.GPU_HOUR)
    spread = f"max by (model, currency) ({series}) - min by (model, currency) ({series}) > 0"
    currencies = f"count by (model) (count by (model, currency) ({series})) > 1"
    return Alert(
        "GPUPricesDisagree",
        aggregate("count", ("model",), first_of(spread, f"({currencies})", on=("model",))),
        "warning",
        "cost",
        "Agents are configured with different prices for one GPU model",
        'Agents disagree on the price of {{ $labels.model }} ({{ $value | printf "%.0f" }} '
        "difference): rules take the highest.",
        "gpuglass-cost",
        hold=settings.alerts.monitoring.down_for,
    )
