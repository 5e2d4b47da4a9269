"""GPUs and engines for rule tests: what a healthy one exports, and what deviates."""

from __future__ import annotations

from gpuglass.families import gpu, prices
from gpuglass.family import Family
from tests.alert_rules.world import Values, World, steady

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
