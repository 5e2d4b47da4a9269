"""Cards, links and drivers that are at fault, and those that nearly are. All judged after 95 minutes."""

from __future__ import annotations

from gpuglass.families import agent, gpu
from tests.alert_rules.parts import add_gpu, device, named, of_gpu, price
from tests.alert_rules.world import Values, World, gone, growing, missing, steady

MINUTES = 95


def build(world: World) -> None:
    """All cases."""
    price(world)
    _lost(world)
    _xid(world)
    _memory_errors(world)
    _throttling(world)
    _links(world)
    _counters(world)
    _driver(world)


def _after(minutes: float, then: Values) -> Values:
    return missing(minutes).then(then)


def _lost(world: World) -> None:
    for uuid, node in (("GPU-lost", "node-a"), ("GPU-lost-b", "node-b")):
        until = steady(1, 90).then(gone())
        add_gpu(world, uuid, node, up=until, busy=steady(0.6, 90).then(gone()), sm=None, graphics=None)
        of_gpu(world, gpu.UP, _after(90, steady(0)), uuid, node, reason="lost")
        world.fires(
            "GPULost",
            "critical",
            "health",
            f"{named(uuid, node)} has not answered for more than 1m (gpuglass_gpu_up is 0); what ran "
            "on it has failed.",
            device(uuid, node),
        )
    world.near("GPULost", "for half a minute only")
    add_gpu(world, "GPU-blink", up=steady(1, 94.6).then(gone()))
    of_gpu(world, gpu.UP, _after(94.6, steady(0)), "GPU-blink", reason="hung")
    world.near("GPULost", "the exporter is gone with all that it said")
    end = gone()
    silent = steady(1, 60).then(end)
    add_gpu(
        world, "GPU-unseen", info=silent, up=silent, busy=silent, sm=silent, graphics=silent,
        used=silent, watts=silent,
    )  # fmt: skip
    world.near("GPULost", "a scrape gap of ten minutes")
    gap = steady(1, 70).then(missing(10)).then(steady(1))
    add_gpu(world, "GPU-gap", info=gap, up=gap, busy=gap)


def _xid(world: World) -> None:
    def told(uuid: str, xid: str, class_: str, values: Values, node: str = "node-a") -> None:
        of_gpu(world, gpu.XID_ERRORS, values, uuid, node, xid=xid, **{"class": class_})

    def fires(name: str, severity: str, uuid: str, xid: str, node: str = "node-a") -> None:
        world.fires(
            name, severity, "health", f"XID {xid} on {named(uuid, node)}, 1 times lately.",
            {**device(uuid, node), "xid": xid},
        )  # fmt: skip

    cases = (
        ("GPUXidHardware", "critical", "hardware", "79"),
        ("GPUXidDriver", "warning", "driver", "119"),
        ("GPUXidApplication", "warning", "application", "31"),
        ("GPUXidUnknown", "warning", "unknown", "other"),
    )
    for name, severity, class_, xid in cases:
        # The first error of a code makes its series.
        add_gpu(world, f"GPU-first-{xid}", "node-b")
        told(f"GPU-first-{xid}", xid, class_, _after(92, steady(1)), "node-b")
        fires(name, severity, f"GPU-first-{xid}", xid, "node-b")
        # A further one, forty minutes ago: shown for an hour.
        add_gpu(world, f"GPU-again-{xid}")
        told(f"GPU-again-{xid}", xid, class_, steady(4, 55).then(steady(5)))
        fires(name, severity, f"GPU-again-{xid}", xid)
        world.near(name, "the last error is longer ago than the window")
        add_gpu(world, f"GPU-old-{xid}")
        told(f"GPU-old-{xid}", xid, class_, steady(4, 10).then(steady(5)))
        world.near(name, "the agent was restarted and counts from 0")
        add_gpu(world, f"GPU-reset-{xid}")
        told(f"GPU-reset-{xid}", xid, class_, steady(4, 80).then(steady(0)))
        world.near(name, "the count is there from the first scrape on")
        late = _after(92, steady(1))
        add_gpu(
            world, f"GPU-late-{xid}", info=late, up=late, busy=_after(92, steady(0.6)), sm=None,
            graphics=None,
            used=_after(92, steady(6e10)), watts=_after(92, steady(400)),
        )  # fmt: skip
        told(f"GPU-late-{xid}", xid, class_, _after(92, steady(3)))
        world.near(name, "a scrape gap, and then the same count")
        gap = steady(1, 70).then(missing(10)).then(steady(1))
        add_gpu(world, f"GPU-gap-{xid}", info=gap, up=gap, busy=gap)
        told(f"GPU-gap-{xid}", xid, class_, steady(2, 70).then(missing(10)).then(steady(2)))


def _memory_errors(world: World) -> None:
    def ecc(uuid: str, uncorrected: Values, corrected: Values, node: str = "node-a") -> None:
        add_gpu(world, uuid, node)
        of_gpu(world, gpu.ECC_ERRORS, uncorrected, uuid, node, type="uncorrected")
        of_gpu(world, gpu.ECC_ERRORS, corrected, uuid, node, type="corrected")

    ecc("GPU-ecc", steady(0, 93).then(steady(2)), steady(0))
    world.fires(
        "GPUECCUncorrected", "critical", "health",
        f"2 uncorrected memory errors on {named('GPU-ecc')}: results since then are suspect.",
        device("GPU-ecc"),
    )  # fmt: skip
    world.near("GPUECCUncorrected", "errors of the card's life before")
    ecc("GPU-ecc-old", steady(7), growing(0.01))
    world.near("GPUECCUncorrected", "corrected ones only")
    world.near("GPUECCCorrected", "36 an hour")
    ecc("GPU-ecc-many", steady(0), growing(0.1), "node-b")
    world.fires(
        "GPUECCCorrected", "warning", "health",
        f"360 corrected memory errors in 1h on {named('GPU-ecc-many', 'node-b')}.",
        device("GPU-ecc-many", "node-b"),
    )  # fmt: skip
    world.near("GPUECCCorrected", "a burst that is over")
    ecc("GPU-ecc-burst", steady(0), growing(0.2, 20).then(steady(234)))

    for name, family, severity, description in (
        (
            "GPURowRemapPending", gpu.ROW_REMAP_PENDING, "warning",
            "{} has a bad row (1) that is replaced at the next reset of the GPU.",
        ),
        (
            "GPURowRemapFailed", gpu.ROW_REMAP_FAILED, "critical",
            "{} has no spare row left where one is needed (1): the card is to be replaced.",
        ),
    ):  # fmt: skip
        uuid = f"GPU-{name}"
        add_gpu(world, uuid, "node-b")
        of_gpu(world, family, steady(0, 80).then(steady(1)), uuid, "node-b")
        world.fires(
            name, severity, "health", description.format(named(uuid, "node-b")), device(uuid, "node-b")
        )
        world.near(name, "not needed any more after a reset")
        add_gpu(world, f"{uuid}-mended")
        of_gpu(world, family, steady(1, 80).then(steady(0)), f"{uuid}-mended")
        world.near(name, "the card was taken out")
        out = steady(1, 80).then(gone())
        add_gpu(world, f"{uuid}-out", info=out, up=out, busy=out, sm=out, graphics=out, used=out, watts=out)
        of_gpu(world, family, out, f"{uuid}-out")


def _throttling(world: World) -> None:
    def throttled(uuid: str, reason: str, values: Values, node: str = "node-a") -> None:
        add_gpu(world, uuid, node)
        of_gpu(world, gpu.THROTTLE, values, uuid, node, reason=reason)

    def fires(name: str, uuid: str, percent: str, node: str) -> None:
        world.fires(
            name, "warning", "health",
            f"The clocks of {named(uuid, node)} are held down {percent} of the time.", device(uuid, node),
        )  # fmt: skip

    throttled("GPU-hot", "thermal_software", growing(0.3), "node-b")
    of_gpu(world, gpu.THROTTLE, growing(0.2), "GPU-hot", "node-b", reason="thermal_hardware")
    fires("GPUThrottledThermal", "GPU-hot", "30%", "node-b")
    world.near("GPUThrottledThermal", "a twentieth of the time")
    throttled("GPU-warm", "thermal_software", growing(0.05))
    world.near("GPUThrottledThermal", "for five minutes only")
    throttled("GPU-hot-now", "thermal_hardware", steady(0, 90).then(growing(0.9)))

    throttled("GPU-capped", "power_cap", growing(0.97), "node-b")
    fires("GPUThrottledPowerCap", "GPU-capped", "97%", "node-b")
    world.near("GPUThrottledPowerCap", "half of the time: the limit is what it should be")
    throttled("GPU-loaded", "power_cap", growing(0.5))
    world.near("GPUThrottledPowerCap", "for half an hour only")
    throttled("GPU-capped-now", "power_cap", steady(0, 65).then(growing(0.97)))

    throttled("GPU-braked", "power_brake", growing(0.05), "node-b")
    fires("GPUThrottledPowerBrake", "GPU-braked", "5%", "node-b")
    world.near("GPUThrottledPowerBrake", "a moment in an hour")
    throttled("GPU-twitch", "power_brake", growing(0.005))
    world.near("GPUThrottledPowerBrake", "for five minutes only")
    throttled("GPU-braked-now", "power_brake", steady(0, 90).then(growing(0.5)))


def _links(world: World) -> None:
    add_gpu(world, "GPU-nvlink", "node-b")
    of_gpu(world, gpu.NVLINK_ERRORS, growing(0.06), "GPU-nvlink", "node-b", link="0", type="replay")
    of_gpu(world, gpu.NVLINK_ERRORS, growing(0.04), "GPU-nvlink", "node-b", link="1", type="crc")
    world.fires(
        "GPUNVLinkErrors", "warning", "health",
        f"360 NVLink errors in 1h on {named('GPU-nvlink', 'node-b')}.", device("GPU-nvlink", "node-b"),
    )  # fmt: skip
    world.near("GPUNVLinkErrors", "36 an hour: the link mends them")
    add_gpu(world, "GPU-nvlink-few")
    of_gpu(world, gpu.NVLINK_ERRORS, growing(0.01), "GPU-nvlink-few", link="0", type="replay")
    world.near("GPUNVLinkErrors", "many long ago, in the counter only")
    add_gpu(world, "GPU-nvlink-old")
    of_gpu(world, gpu.NVLINK_ERRORS, steady(90_000), "GPU-nvlink-old", link="0", type="replay")

    add_gpu(world, "GPU-unlinked")
    for link in ("2", "3"):
        of_gpu(world, gpu.NVLINK_UP, steady(1, 60).then(steady(0)), "GPU-unlinked", link=link)
    of_gpu(world, gpu.NVLINK_UP, steady(1), "GPU-unlinked", link="4")
    world.fires(
        "GPUNVLinkDown", "warning", "health",
        f"2 NVLinks of {named('GPU-unlinked')} are down that were up within 6h.", device("GPU-unlinked"),
    )  # fmt: skip
    world.near("GPUNVLinkDown", "links that are not wired")
    add_gpu(world, "GPU-unwired")
    of_gpu(world, gpu.NVLINK_UP, steady(0), "GPU-unwired", link="0")
    world.near("GPUNVLinkDown", "trained anew after five minutes")
    add_gpu(world, "GPU-trained")
    of_gpu(world, gpu.NVLINK_UP, steady(1, 60).then(steady(0, 5)).then(steady(1)), "GPU-trained", link="0")

    add_gpu(world, "GPU-pcie")
    of_gpu(world, gpu.PCIE_REPLAYS, growing(0.1), "GPU-pcie")
    world.fires(
        "GPUPCIeReplays", "warning", "health", f"360 PCIe replays in 1h on {named('GPU-pcie')}.",
        device("GPU-pcie"),
    )  # fmt: skip
    world.near("GPUPCIeReplays", "36 an hour")
    add_gpu(world, "GPU-pcie-few")
    of_gpu(world, gpu.PCIE_REPLAYS, growing(0.01), "GPU-pcie-few")
    world.near("GPUPCIeReplays", "the counter was reset with the driver")
    add_gpu(world, "GPU-pcie-reset")
    of_gpu(world, gpu.PCIE_REPLAYS, steady(50_000, 80).then(steady(0)), "GPU-pcie-reset")

    def lanes(uuid: str, current: Values | float, node: str = "node-a") -> None:
        add_gpu(world, uuid, node)
        of_gpu(world, gpu.PCIE_LINK_WIDTH, current, uuid, node, kind="current")
        of_gpu(world, gpu.PCIE_LINK_WIDTH, 16, uuid, node, kind="max")

    lanes("GPU-x8", 8, "node-b")
    world.fires(
        "GPUPCIeDegraded", "warning", "health",
        f"{named('GPU-x8', 'node-b')} is linked by 8 PCIe lanes, fewer than card and slot can do.",
        device("GPU-x8", "node-b"),
    )  # fmt: skip
    world.near("GPUPCIeDegraded", "an idle card's generation is lower, its lanes are not")
    lanes("GPU-slow", 16)
    of_gpu(world, gpu.PCIE_LINK_GENERATION, 1, "GPU-slow", kind="current")
    of_gpu(world, gpu.PCIE_LINK_GENERATION, 5, "GPU-slow", kind="max")
    world.near("GPUPCIeDegraded", "for five minutes after a reset")
    lanes("GPU-x8-now", steady(16, 90).then(steady(8)))


def _counters(world: World) -> None:
    add_gpu(world, "GPU-frozen", "node-b", busy=0.93, sm=0, graphics=0)
    world.fires(
        "GPUCountersDisagree", "warning", "health",
        f"The driver calls {named('GPU-frozen', 'node-b')} busy 93% of the time; the profiling "
        "counters stand still.",
        device("GPU-frozen", "node-b"),
    )  # fmt: skip
    world.near("GPUCountersDisagree", "one small kernel: busy, and hardly active")
    add_gpu(world, "GPU-small-kernel", busy=0.93, sm=0.01, graphics=0.9)
    world.near("GPUCountersDisagree", "no profiling counters at all")
    add_gpu(world, "GPU-no-counters", busy=0.93, sm=None, graphics=None)
    world.near("GPUCountersDisagree", "for ten minutes only")
    frozen = steady(0.6, 85).then(steady(0))
    add_gpu(world, "GPU-frozen-now", busy=0.93, sm=frozen, graphics=frozen)


def _driver(world: World) -> None:
    def node(name: str, loads: Values, started: Values | float = 1e9) -> dict[str, str]:
        target = {"instance": f"{name}:9955"}
        world.add(gpu.DRIVER_LOADS, loads, target)
        world.add(agent.START_TIME, started, target)
        return target

    node("node-driver", steady(1, 70).then(steady(2)))
    world.fires(
        "GPUDriverReloaded", "warning", "health",
        "The driver on node-driver was loaded 1 times again within 1h: it or a GPU was lost meanwhile.",
        {"node": "node-driver"},
    )  # fmt: skip
    world.near("GPUDriverReloaded", "the agent was restarted, and loads it for the first time")
    node(
        "node-restarted",
        steady(3, 70).then(steady(0, 1)).then(steady(1)),
        steady(1e9, 70).then(steady(1e9 + 4200)),
    )
    world.near("GPUDriverReloaded", "loaded often, long ago")
    node("node-calm", steady(5))
    world.near("GPUDriverReloaded", "not scraped for ten minutes")
    node("node-gap", steady(2, 60).then(missing(10)).then(steady(2)))
