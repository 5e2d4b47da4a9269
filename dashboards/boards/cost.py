"""Cost: what a thousand tokens cost on each card, what is paid and not used, what another card would cost."""

from __future__ import annotations

from dashboards import links
from dashboards.board import Board, Options, section
from dashboards.links import label, to
from dashboards.panels import Query, Visual, bargauge, low_is_good, stat, text, timeseries
from dashboards.queries import by, quotient, scoped
from dashboards.tables import Column, table
from gpuglass.families import prices
from gpuglass.promql import regex
from recording_rules import records

MONEY = "short"
"""Prices are in the currency of the user's configuration, which no series names."""
_UNUSED = regex("idle|job_idle|unallocated")


def board(_: Options) -> Board:
    """The dashboard."""
    return Board(
        links.COST,
        "Cost",
        "What tokens cost by card, allocation against usage, idle and waste, what-if. Prices are those of the"
        " agents' configuration (currency as there).",
        (
            section("Now", *_now()),
            section("A thousand tokens, card by card", *_tokens()),
            section("Where the money goes", *_parts()),
            section("What could be saved", *_savings()),
            section("Over days", *_long(), collapsed=True),
            section("How to read it", text("Reading the cost", _READING, size=(24, 6)), collapsed=True),
        ),
        start="now-6h",
    )


def _now() -> tuple[Visual, ...]:
    parts = records.FLEET_COST_PART
    total = by("sum", "", scoped(records.FLEET_COST))
    return (
        stat(
            "Per hour", "What an hour of all GPUs with a price costs.", Query(total), unit=MONEY, decimals=2
        ),
        stat("Per month", "The same for 30 days.", Query(f"{total} * 720"), unit=MONEY, decimals=0),
        stat(
            "Idle and unallocated",
            "Share of the cost for GPUs, or parts of them, that did nothing.",
            Query(quotient(by("sum", "", scoped(parts, part=_UNUSED)), by("sum", "", scoped(parts)))),
            unit="percentunit",
            decimals=0,
            steps=low_is_good(0.3, 0.6),
        ),
        stat(
            "Waste and overhead",
            "Share of the cost for work that nobody used, and for padding, dummy steps and gaps.",
            Query(
                quotient(
                    by("sum", "", scoped(parts, part=regex("waste|overhead"))), by("sum", "", scoped(parts))
                )
            ),
            unit="percentunit",
            decimals=1,
            steps=low_is_good(0.1, 0.25),
        ),
        stat(
            "Jobs",
            "Cost per hour of training, fine-tuning and other processes that are no known engine.",
            Query(by("sum", "", scoped(parts, part=regex("job_.*")))),
            unit=MONEY,
            decimals=2,
            links=[to(links.JOBS, "Jobs")],
        ),
        stat(
            "GPUs without a price",
            "GPUs whose model no configured price fits: they are missing in every sum here. Add them to "
            "the agents' prices.",
            Query(
                f"count ({scoped(records.DEVICE_INFO)} unless on (gpu_uuid) {scoped(records.DEVICE_PRICE)})"
                f" or 0 * count ({scoped(records.DEVICE_INFO)})"
            ),
            unit="short",
            steps=low_is_good(1, 1),
        ),
    )


def _tokens() -> tuple[Visual, ...]:
    per = records.MODEL_COST_PER_1K

    def cost(basis: str, kind: str) -> str:
        return by("max", "model_name, model", scoped(per, basis=basis, kind=kind))

    return (
        bargauge(
            "Cost of 1,000 tokens by card (usage)",
            "All tokens together, only the GPU time that requests used: compares cards.",
            Query(cost("usage", "all"), "{{model_name}} on {{model}}", instant=True),
            unit=MONEY,
            decimals=5,
            size=(12, 8),
        ),
        bargauge(
            "Cost of 1,000 tokens by card (allocation)",
            "The same with all that the engines hold, idle included: what the bill "
            "says. Far above usage: too few requests for so many GPUs.",
            Query(cost("allocation", "all"), "{{model_name}} on {{model}}", instant=True),
            unit=MONEY,
            decimals=5,
            size=(12, 8),
        ),
        table(
            "Cards side by side",
            "Cost of 1,000 tokens by model and card: input (computed), cached (from the prefix cache),"
            " output; and the cost of the present tokens if all ran on that card (what-if).",
            Column("Input", cost("usage", "input"), MONEY, 5),
            Column("Cached", cost("usage", "cached"), MONEY, 5),
            Column("Output", cost("usage", "output"), MONEY, 5),
            Column("All, usage", cost("usage", "all"), MONEY, 5),
            Column("All, allocation", cost("allocation", "all"), MONEY, 5),
            Column("Tokens/s", by("sum", "model_name, model", scoped(records.MODEL_CARD_TOKENS)), "short", 0),
            Column(
                "Per hour if all ran here",
                by("max", "model_name, model", scoped(records.MODEL_WHAT_IF)),
                MONEY,
                2,
            ),
            labels={"model_name": "Model", "model": "Card"},
            sort="All, usage",
            size=(24, 7),
        ),
        timeseries(
            "Cost of 1,000 tokens over time",
            "Usage basis, all tokens. A step up without a deployment: fewer requests per step, "
            "or less prefix reuse.",
            Query(cost("usage", "all"), "{{model_name}} on {{model}}"),
            unit=MONEY,
            decimals=5,
            size=(12, 8),
        ),
        timeseries(
            "What if: present tokens on each card",
            "Cost per hour of each model's present tokens on each card that it runs on, at the "
            "efficiency measured there.",
            Query(
                by("max", "model_name, model", scoped(records.MODEL_WHAT_IF)), "{{model_name}} on {{model}}"
            ),
            unit=MONEY,
            decimals=2,
            size=(12, 8),
        ),
    )


def _parts() -> tuple[Visual, ...]:
    return (
        timeseries(
            "Cost per hour by part",
            "prefill and decode: used. waste: result not used. overhead: padding, dummy steps, gaps. idle:"
            " held by an engine, not used. job_*: jobs. unallocated: nobody holds it. unmeasured: engines"
            " without a probe.",
            Query(by("sum", "part", scoped(records.FLEET_COST_PART)), "{{part}}"),
            unit=MONEY,
            stacked=True,
            size=(12, 9),
        ),
        timeseries(
            "Cost per hour by card",
            "All GPUs of a card.",
            Query(by("sum", "model", scoped(records.CARD_COST)), "{{model}}"),
            unit=MONEY,
            stacked=True,
            size=(12, 9),
        ),
        table(
            "Allocation against usage",
            "Cost per hour of each model by card: what its engines hold, what its requests used, and the"
            " share used.",
            Column(
                "Allocation",
                by("sum", "model_name, model", scoped(records.MODEL_COST, basis="allocation")),
                MONEY,
                2,
            ),
            Column(
                "Usage", by("sum", "model_name, model", scoped(records.MODEL_COST, basis="usage")), MONEY, 2
            ),
            Column(
                "Used",
                quotient(
                    by("sum", "model_name, model", scoped(records.MODEL_COST, basis="usage")),
                    by("sum", "model_name, model", scoped(records.MODEL_COST, basis="allocation")),
                ),
                "percentunit",
                0,
                bar=True,
                top=1,
            ),
            labels={"model_name": "Model", "model": "Card"},
            sort="Allocation",
            size=(12, 9),
        ),
        timeseries(
            "Cost per hour by model",
            "Usage basis.",
            Query(by("sum", "model_name", scoped(records.MODEL_COST, basis="usage")), "{{model_name}}"),
            unit=MONEY,
            stacked=True,
            size=(12, 9),
            links=[to(links.REQUESTS, "Requests of this model", model_name=label("model_name"))],
        ),
    )


def _savings() -> tuple[Visual, ...]:
    idle = (
        f"(1 - {scoped(records.DEVICE_ACTIVE_ROLLUP)}) * on (cluster, node, gpu_uuid, device, model)"
        f" {scoped(records.DEVICE_PRICE)}"
    )
    cold = (
        f"(max_over_time ({scoped(records.DEVICE_ACTIVE_ROLLUP)}[1h]) < 0.05) * 0 + on (cluster, node,"
        f" gpu_uuid, device, model) {scoped(records.DEVICE_PRICE)}"
    )
    cheapest = by("min", "model_name", scoped(records.MODEL_WHAT_IF))
    now = by("sum", "model_name", scoped(records.MODEL_COST, basis="usage"))
    wasted = by("sum", "model_name, reason", scoped(records.FLEET_WASTED_GPU_SECONDS))
    return (
        table(
            "Savings list: GPUs that were cold for an hour",
            "GPUs below 5 % activity for the last hour, with what a month of each costs. See the alert"
            " GPUCold's runbook before taking one away.",
            Column("Per hour", cold, MONEY, 2),
            Column("Per month", f"({cold}) * 720", MONEY, 0, bar=True),
            labels={"node": "Node", "device": "Device", "model": "Card", "gpu_uuid": "GPU"},
            hidden=("cluster",),
            links={"GPU": [to(links.GPU, "This GPU", gpu_uuid=links.cell("GPU"))]},
            sort="Per month",
            size=(12, 9),
        ),
        table(
            "Savings list: cheaper card",
            "What each model's present tokens would save per month on the cheapest card that it already runs"
            " on. Assumes that the card has room; usage basis.",
            Column("Per hour now", now, MONEY, 2),
            Column("Per hour on the cheapest", cheapest, MONEY, 2),
            Column("Saves per month", f"({now} - on (model_name) {cheapest}) * 720", MONEY, 0),
            labels={"model_name": "Model"},
            sort="Saves per month",
            size=(12, 9),
        ),
        timeseries(
            "Idle cost by node",
            "Cost per hour of the inactive part of each node's GPUs.",
            Query(f"topk (15, {by('sum', 'node', idle)})", "{{node}}"),
            unit=MONEY,
            stacked=True,
            size=(12, 8),
            links=[to(links.COMPUTE_MAP, "This node in the map", node=label("node"))],
        ),
        timeseries(
            "Wasted share by model",
            "Share of the requests' GPU time whose result nobody used. Above a tenth: look at preemptions,"
            " timeouts of clients, and errors.",
            Query(by("max", "model_name", scoped(records.ENGINE_WASTED)), "{{model_name}}"),
            unit="percentunit",
            steps=low_is_good(0.1, 0.25),
            size=(12, 8),
        ),
        table(
            "Prices",
            "Prices of an hour as the agents' configurations say; example prices are placeholders. Two rows"
            " for a card with one currency: agents disagree.",
            Column("Per hour", by("max", "model, currency, example", scoped(prices.GPU_HOUR)), MONEY, 2),
            labels={"model": "Card", "currency": "Currency", "example": "Example"},
            size=(12, 8),
        ),
        timeseries(
            "Wasted GPU time",
            "GPUs' worth of time whose result nobody used: recompute after preemptions, abort, error.",
            Query(wasted, "{{model_name}} {{reason}}"),
            unit="short",
            stacked=True,
            size=(12, 8),
        ),
    )


def _long() -> tuple[Visual, ...]:
    return (
        timeseries(
            "Cost per hour by part",
            "Means of five minutes, for ranges of days.",
            Query(by("sum", "part", scoped(records.FLEET_COST_ROLLUP)), "{{part}}", step="5m"),
            unit=MONEY,
            stacked=True,
            size=(12, 9),
        ),
        timeseries(
            "Cost per hour by model and basis",
            "Means of five minutes, for ranges of days.",
            Query(
                by("sum", "model_name, basis", scoped(records.MODEL_COST_ROLLUP)),
                "{{model_name}} {{basis}}",
                step="5m",
            ),
            unit=MONEY,
            size=(12, 9),
        ),
    )


_READING = """\
**Two bases.** *usage*: GPU time that the tokens' requests used × the card's price. *allocation*: all that
the engines hold, idle included; what the bill says. Parts of *Where the money goes* add up to GPU-hours ×
price.

**Prices** come from the agents' configuration (`prices`), by patterns of the card's name. Nothing here
knows a list price.

**What-if** takes the present mix of tokens and the efficiency *measured* on each card that the model runs
on. A card that the model never ran on is not guessed.
"""
