"""Cold GPUs, dear tokens, wasted time, price lists, and what nearly is one. After 95 minutes."""

from __future__ import annotations

from gpuglass.families import engine, prices
from gpuglass.promql import Metric
from recording_rules import foreign
from tests.alert_rules.parts import (
    A100,
    GIB,
    H100,
    NODES,
    add_engine,
    add_gpu,
    add_gpu_time,
    device,
    engine_named,
    named,
    of_engine,
    price,
)
from tests.alert_rules.world import Values, World, gone, growing, steady

MINUTES = 95


def build(world: World) -> None:
    """All cases."""
    price(world)
    price(world, A100, 1.8)
    _cold(world)
    _other_card(world)
    _wasted(world)
    _prices(world)


def _cold(world: World) -> None:
    def fires(uuid: str, node: str, model: str, saving: str) -> None:
        world.fires(
            "GPUCold", "warning", "cost",
            f"{named(uuid, node, model)} has been busy 2% of the time for more than 10m, by its "
            "driver and by "
            "a second signal.",
            device(uuid, node, model), saving=f"{saving} USD an hour for this GPU",
        )  # fmt: skip

    add_gpu(world, "GPU-cold", "node-b", busy=0.02, sm=0.01, watts=120)
    fires("GPU-cold", "node-b", H100, "3.00")
    # A card without profiling counters: the power sensor is the second signal.
    add_gpu(world, "GPU-cold-a100", model=A100, busy=0.02, sm=None, graphics=None, watts=60)
    fires("GPU-cold-a100", "node-a", A100, "1.80")
    world.near("GPUCold", "the counters see work where the driver's samples see none")
    add_gpu(world, "GPU-sampled", busy=0.02, sm=0.3)
    world.near("GPUCold", "the counters stand still on a busy card")
    add_gpu(world, "GPU-frozen", busy=0.95, sm=0, graphics=None)
    world.near("GPUCold", "no counters, and it draws power")
    add_gpu(world, "GPU-a100-works", model=A100, busy=0.02, sm=None, graphics=None, watts=350)
    world.near("GPUCold", "nobody holds it: it can be given to others")
    add_gpu(world, "GPU-empty", busy=0, sm=0, used=GIB)
    world.near("GPUCold", "a model is being loaded")
    add_gpu(world, "GPU-loading", busy=0.02, sm=0.01, used=steady(0, 85).then(growing(30e6)))
    world.near("GPUCold", "for eight minutes")
    idle = steady(0.6, 85).then(steady(0.02))
    add_gpu(world, "GPU-pause", busy=idle, sm=idle)
    world.near("GPUCold", "the exporter is gone: nothing is known")
    silent = steady(0.02, 89).then(gone())
    add_gpu(
        world, "GPU-silent", info=steady(1, 89).then(gone()), up=steady(1, 89).then(gone()), busy=silent,
        sm=silent, graphics=silent, used=steady(6e10, 89).then(gone()), watts=steady(90, 89).then(gone()),
    )  # fmt: skip
    world.near("GPUCold", "one signal only")
    add_gpu(world, "GPU-half-blind", busy=0.02, sm=None, graphics=None)


def _served(world: World, model: str, number: str, card: str, tokens: float, node: str = "node-a") -> None:
    """An engine on one card that makes so many tokens a second of half of its time."""
    uuid = f"GPU-{model}-{number}"
    add_gpu(world, uuid, node, card, sm=None if card == A100 else 0.5, graphics=None if card == A100 else 0.6)
    labels = add_engine(world, model, number, node, tokens=growing(tokens / 3))
    add_gpu_time(world, labels, uuid, node, prefill=0.2, decode=0.3)


def _other_card(world: World) -> None:
    # prompt and output: two thirds of `tokens`; cached ones are part of the prompt.
    _served(world, "dear", "0", H100, 150)
    _served(world, "dear", "1", A100, 300, "node-b")
    world.fires(
        "TokenCostAboveOtherCard", "warning", "cost",
        f"A thousand tokens of dear on {H100} cost 3.3 times what they cost on the cheapest card that "
        "serves it.",
        {"model_name": "dear", "model": H100},
    )  # fmt: skip
    world.near("TokenCostAboveOtherCard", "dearer an hour, and so much faster")
    _served(world, "fair", "0", H100, 500)
    _served(world, "fair", "1", A100, 300, "node-b")
    world.near("TokenCostAboveOtherCard", "there is no other card")
    _served(world, "alone", "0", H100, 3)
    world.near("TokenCostAboveOtherCard", "the other card has no traffic to compare")
    _served(world, "idle-other", "0", H100, 150)
    _served(world, "idle-other", "1", A100, 0.3, "node-b")


def _wasted(world: World) -> None:
    def wasted(model: str, values: Values) -> None:
        uuid = f"GPU-{model}"
        add_gpu(world, uuid)
        labels = add_engine(world, model)
        add_gpu_time(world, labels, uuid, prefill=0.2, decode=0.3)
        world.add(engine.WASTED, values, NODES["node-a"], **labels, reason="abort", tenant="acme")

    wasted("wasteful", growing(0.1))
    world.fires(
        "GPUTimeWasted", "warning", "cost",
        f"20% of the GPU time of {engine_named('wasteful')}, were computed again, aborted or failed.",
        of_engine("wasteful"),
    )  # fmt: skip
    world.near("GPUTimeWasted", "four percent")
    wasted("thrifty", growing(0.02))
    world.near("GPUTimeWasted", "one client restarted and aborted all")
    wasted("once", steady(0, 80).then(steady(30)))


def _prices(world: World) -> None:
    def not_set(model: str, count: int) -> None:
        world.fires(
            "GPUPricesNotSet", "warning", "cost",
            f"{count} GPUs of model {model} have no real price in the agents' configuration "
            "(prices.per_gpu_hour): "
            "what they cost is missing or an example.",
            {"model": model},
        )  # fmt: skip

    add_gpu(world, "GPU-unpriced", model="NVIDIA L40S")
    add_gpu(world, "GPU-unpriced-b", "node-b", model="NVIDIA L40S")
    not_set("NVIDIA L40S", 2)
    add_gpu(world, "GPU-example", model="NVIDIA H200")
    price(world, "NVIDIA H200", 4.0, example="true")
    not_set("NVIDIA H200", 1)
    world.near("GPUPricesNotSet", "one agent has still the example, the other the real price")
    add_gpu(world, "GPU-priced", model="NVIDIA B200")
    for target, example, values in (
        (NODES["node-a"], "true", 5.0),
        (NODES["node-b"], "false", 5.0),
    ):
        world.add(prices.GPU_HOUR, values, target, model="NVIDIA B200", currency="USD", example=example)
    world.near("GPUPricesNotSet", "a new card, since half an hour")
    new = Values(f"_x{65 * 60 // 13} 1x200")
    add_gpu(
        world, "GPU-new", model="NVIDIA GB200", info=new, up=new, busy=new, sm=new, graphics=new,
        used=Values(f"_x{65 * 60 // 13} 6e10x200"), watts=Values(f"_x{65 * 60 // 13} 400x200"),
    )  # fmt: skip
    world.near("GPUPricesNotSet", "a price of 0 is a price")
    add_gpu(world, "GPU-free", model="NVIDIA T4")
    price(world, "NVIDIA T4", 0)

    def listed(model: str, *said: tuple[str, Values | float, str]) -> None:
        for node, values, currency in said:
            world.add(prices.GPU_HOUR, values, NODES[node], model=model, currency=currency, example="false")

    def disagree(model: str, differences: int) -> None:
        world.fires(
            "GPUPricesDisagree", "warning", "cost",
            f"Agents disagree on the price of {model} ({differences} difference): rules take the highest.",
            {"model": model},
        )  # fmt: skip

    listed("NVIDIA L4", ("node-a", 0.7, "USD"), ("node-b", 0.8, "USD"))
    disagree("NVIDIA L4", 1)
    listed("NVIDIA L40", ("node-a", 0.9, "USD"), ("node-b", 0.9, "EUR"))
    disagree("NVIDIA L40", 1)
    world.near("GPUPricesDisagree", "the same price on all")
    world.near("GPUPricesDisagree", "for two minutes, while a new price is rolled out")
    listed("NVIDIA A10", ("node-a", steady(0.5, 93).then(steady(0.6)), "USD"), ("node-b", 0.5, "USD"))
    world.near("GPUPricesDisagree", "only one agent knows the card")
    listed("NVIDIA H20", ("node-a", 1.5, "USD"))


IDLE_MINUTES = 290


def build_idle(world: World) -> None:
    """Three of four GPUs of one cluster have had no holder for hours; in the other half of them."""
    price(world)
    for number in range(4):
        uuid = f"GPU-{number}"
        add_gpu(world, uuid, used=GIB if number else 60 * GIB)
    add_gpu_time(world, add_engine(world, "busy"), "GPU-0", prefill=0.4, decode=0.6)
    world.fires(
        "GPUIdleSpendOverBudget", "warning", "cost",
        "Idle GPUs cost 9.00 an hour; the budget is 50% of what all GPUs cost.", {},
        saving="up to 9.00 an hour",
    )  # fmt: skip


def build_used(world: World) -> None:
    """Three of four GPUs work; and for two hours none does."""
    world.near("GPUIdleSpendOverBudget", "a quarter of the money")
    price(world)
    for number in range(4):
        add_gpu(world, f"GPU-{number}", used=60 * GIB if number else GIB)
        if number:
            labels = add_engine(world, "busy", str(number))
            add_gpu_time(world, labels, f"GPU-{number}", prefill=0.4, decode=0.6)


def build_used_until_now(world: World) -> None:
    """Idle for three hours only."""
    world.near("GPUIdleSpendOverBudget", "since three hours")
    price(world)
    add_gpu(world, "GPU-0", used=GIB)
    labels = add_engine(world, "busy")
    for part in ("prefill", "decode"):
        world.add(
            engine.GPU_SECONDS_BY_PART, growing(0.5, 110).then(gone()), NODES["node-a"], **labels, rank="0",
            gpu_uuid="GPU-0", clock="cuda", part=part,
        )  # fmt: skip


TARGET = {"alerts": {"cost": {"target_per_1k_tokens": 0.01, "idle_spend_per_hour": 2.0}}}
"""Settings that ask for a price of tokens, and for a budget in money."""


def build_target(world: World) -> None:
    """Judged by a target per thousand tokens and a budget for idle GPUs in money."""
    price(world)
    _served(world, "dear", "0", H100, 60)
    world.fires(
        "TokenCostAboveTarget", "warning", "cost",
        f"A thousand tokens of dear cost 0.0208 on {H100}; the target is 0.01.",
        {"model_name": "dear", "model": H100},
    )  # fmt: skip
    world.near("TokenCostAboveTarget", "half of the target")
    _served(world, "cheap", "0", H100, 300, "node-b")
    world.near("TokenCostAboveTarget", "no tokens: no cost per token")
    _served(world, "quiet", "0", H100, 0.3)
    world.near("TokenCostAboveTarget", "no price: no cost")
    _served(world, "unpriced", "0", "NVIDIA L40S", 60)
    world.fires(
        "GPUPricesNotSet", "warning", "cost",
        "1 GPUs of model NVIDIA L40S have no real price in the agents' configuration (prices.per_gpu_hour): "
        "what they cost is missing or an example.",
        {"model": "NVIDIA L40S"},
    )  # fmt: skip


def build_dcgm(world: World) -> None:
    """Two nodes with dcgm-exporter and no agent, in the old and the new spelling of its labels."""
    for node, hostname in (("node-c", "Hostname"), ("node-d", "hostname")):
        target = {"job": "dcgm", "instance": f"{node}:9400", hostname: node}

        def card(
            number: str,
            busy: Values | float,
            active: Values | float | None,
            used_mib: float = 60_000,
            xid: Values | float = 0,
            node: str = node,
            target: dict[str, str] = target,
        ) -> None:
            labels = {**target, "UUID": f"GPU-{node}-{number}", "device": "nvidia0", "modelName": H100}
            fields: tuple[tuple[Metric, Values | float | None], ...] = (
                (foreign.DCGM_BUSY, busy),  # percent
                (foreign.DCGM_GRAPHICS_ACTIVE, active),
                (foreign.DCGM_MEMORY_USED, used_mib),
                (foreign.DCGM_MEMORY_FREE, 80_000 - used_mib),
                (foreign.DCGM_POWER, 300.0),
                (foreign.DCGM_XID, xid),
            )
            for metric, values in fields:
                if values is not None:
                    how = values if isinstance(values, Values) else steady(values)
                    world.raw(metric.name, labels, how)

        card("cold", 2, 0.01)
        world.fires(
            "GPUCold", "warning", "cost",
            f"{named(f'GPU-{node}-cold', node)} has been busy 2% of the time for more than 10m, by "
            "its driver and by "
            "a second signal.",
            device(f"GPU-{node}-cold", node), saving="",
        )  # fmt: skip
        world.near("GPUCold", "busy by percent, which is not a ratio")
        card("busy", 3.0 * 20, 0.6)
        world.near("GPUCold", "without the profiling module there is one signal only")
        card("unprofiled", 2, None)
        card("frozen", 95, 0)
        world.fires(
            "GPUCountersDisagree", "warning", "health",
            f"The driver calls {named(f'GPU-{node}-frozen', node)} busy 95% of the time; the "
            "profiling counters stand "
            "still.",
            device(f"GPU-{node}-frozen", node),
        )  # fmt: skip
        # The exporter keeps the last code for ever: only a change tells of an error.
        card("xid", 60, 0.6, xid=steady(0, 92).then(steady(31)))
        world.fires(
            "GPUXidUnknown", "warning", "health",
            f"XID 31 on {named(f'GPU-{node}-xid', node)}, 1 times lately.",
            {**device(f"GPU-{node}-xid", node), "xid": "31"},
        )  # fmt: skip
        world.near("GPUXidUnknown", "the last code, of long ago")
        card("old-xid", 60, 0.6, xid=79)
    world.fires(
        "GPUPricesNotSet", "warning", "cost",
        f"12 GPUs of model {H100} have no real price in the agents' configuration "
        "(prices.per_gpu_hour): what they "
        "cost is missing or an example.",
        {"model": H100},
    )  # fmt: skip
