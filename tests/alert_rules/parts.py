"""GPUs and engines for rule tests: what a healthy one exports, and what deviates."""

from __future__ import annotations

from gpuglass.families import engine, gpu, prices
from gpuglass.family import Family
from tests.alert_rules.world import Values, World, growing, steady

GIB = float(1 << 30)
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
NODES = {
    "node-a": {"instance": "10.0.0.1:9955", "node": "node-a"},
    "node-b": {"instance": "node-b:9955"},
}
"""Targets of two nodes: one is told its name by relabelling, the other's is the host of its address."""


def price(world: World, model: str = H100, per_hour: float = 3.0, **labels: str) -> None:
    """Both agents say what a card costs."""
    said = {"currency": "USD", "example": "false", **labels}
    for target in NODES.values():
        world.add(prices.GPU_HOUR, per_hour, target, model=model, **said)


def device(uuid: str, node: str = "node-a", model: str = H100) -> dict[str, str]:
    """Labels of a GPU's alerts."""
    return {"node": node, "gpu_uuid": uuid, "device": "nvidia0", "model": model}


def named(uuid: str, node: str = "node-a", model: str = H100) -> str:
    """How descriptions name a GPU."""
    return f"{node}/nvidia0 ({model}, {uuid})"


def add_gpu(
    world: World,
    uuid: str,
    node: str = "node-a",
    model: str = H100,
    *,
    info: Values | float = 1,
    up: Values | float = 1,
    busy: Values | float = 0.6,
    sm: Values | float | None = 0.5,
    graphics: Values | float | None = 0.6,
    used: Values | float = 60 * GIB,
    watts: Values | float = 400.0,
) -> None:
    """A GPU that works, or deviates from that; None for what a card does not tell."""

    def add(family: Family, values: Values | float | None, **labels: str) -> None:
        if values is not None:
            world.add(family, values, NODES[node], device="nvidia0", gpu_uuid=uuid, **labels)

    add(
        gpu.INFO,
        info,
        model=model,
        pci_bus_id="00000000:01:00.0",
        architecture="hopper",
        compute_capability="9.0",
        driver_version="580.65.06",
        cuda_version="13.0",
        mig_mode="disabled",
    )
    add(gpu.UP, up)
    add(gpu.BUSY, busy, source="samples")
    add(gpu.SM_ACTIVE, sm)
    add(gpu.GRAPHICS_ACTIVE, graphics)
    add(gpu.MEMORY_USED, used)
    add(gpu.MEMORY_TOTAL, 80 * GIB)
    add(gpu.POWER, watts)
    add(gpu.POWER_LIMIT, 700.0)


def of_gpu(
    world: World, family: Family, values: Values | float, uuid: str, node: str = "node-a", **labels: str
) -> None:
    """A further series of a GPU."""
    how = values if isinstance(values, Values) else steady(values)
    world.add(family, how, NODES[node], device="nvidia0", gpu_uuid=uuid, **labels)


BLOCKS = 1000


def of_engine(model: str, number: str = "0") -> dict[str, str]:
    """Labels of an engine, of its series and of its alerts."""
    return {
        "model_name": model,
        "engine": number,
        "workload_namespace": "prod",
        "workload_pod": f"{model}-{number}",
    }


def engine_named(model: str, number: str = "0") -> str:
    """How descriptions name an engine."""
    return f"{model}, engine {number}, pod {model}-{number}"


def add_engine(
    world: World,
    model: str,
    number: str = "0",
    node: str = "node-a",
    *,
    running: Values | float = 4,
    waiting: Values | float = 0,
    kv: Values | float = 0.5 * BLOCKS,
    tokens: Values | float | None = None,
) -> dict[str, str]:
    """An engine with the probe, at work unless told otherwise; gives its labels. `kv` are blocks of 1,000,
    `tokens` the output of tenant acme (None: a hundred a second)."""
    labels, target = of_engine(model, number), NODES[node]
    world.add(engine.INFO, 1, target, **labels, engine_name="vllm", engine_version="0.11.0")
    world.add(engine.UP, 1, target, **labels)
    world.add(engine.REQUESTS, running, target, **labels, state="running")
    world.add(engine.REQUESTS, waiting, target, **labels, state="waiting")
    world.add(engine.KV_POOL_BLOCKS, BLOCKS, target, **labels)
    world.add(engine.KV_USED_BLOCKS, kv, target, **labels)
    made = growing(100) if tokens is None else tokens
    for kind, values in (("prompt", growing(300)), ("cached", growing(100)), ("output", made)):
        how = values if tokens is None or kind == "output" else tokens
        world.add(engine.TENANT_TOKENS, how, target, **labels, tenant="acme", kind=kind)
    return labels


def add_gpu_time(
    world: World, labels: dict[str, str], uuid: str, node: str = "node-a", rank: str = "0", **parts: float
) -> None:
    """GPU-seconds a second of an engine's worker by part."""
    for part, per_second in parts.items():
        world.add(
            engine.GPU_SECONDS_BY_PART,
            growing(per_second),
            NODES[node],
            **labels,
            rank=rank,
            gpu_uuid=uuid,
            clock="cuda",
            part=part,
        )
