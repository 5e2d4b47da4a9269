"""Device records: two nodes, agent and dcgm-exporter, one endpoint or two, and what scrapes go through."""

from __future__ import annotations

from gpuglass.families import gpu
from recording_rules import foreign as f
from recording_rules import records as r
from recording_rules.options import Options
from tests.recording_rules.promtool import LAYOUTS, Bench, Case, Series, counter, nothing, series, values

WANTED = ("devices", "fleet")
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
GIB = 1 << 30


def agent(number: int, **more: str) -> dict[str, str]:
    """Labels of a GPU's series from the agent: GPUs 0 and 1 are on node a, 2 and 3 on b."""
    node = "ab"[number // 2]
    return {"instance": f"{node}:9955", "device": f"nvidia{number % 2}", "gpu_uuid": f"GPU-{number}", **more}


def info(number: int, values: str | float = 1, **more: str) -> Series:
    return series(gpu.INFO, values, **agent(number, model=H100 if number < 2 else A100, **more))


def dcgm(number: int, **more: str) -> dict[str, str]:
    """Labels as dcgm-exporter spells them."""
    return {
        **{"job": "dcgm", "instance": f"10.0.0.{number}:9400", "UUID": f"GPU-{number}", "device": "nvidia0"},
        **{"modelName": A100, "Hostname": "c", **more},
    }


CASES = [
    Case(
        "two nodes with two GPUs each",
        [
            *(info(n) for n in range(4)),
            *(series(gpu.UP, 1, **agent(n)) for n in range(4)),
            *(series(gpu.BUSY, 0.1 * n, **agent(n, source="gpm")) for n in range(4)),
            *(series(gpu.SM_ACTIVE, 0.06 * n, **agent(n)) for n in range(2)),  # an A100 has no GPM
            *(series(gpu.MEMORY_USED, (n + 1) * GIB, **agent(n)) for n in range(4)),
            *(series(gpu.MEMORY_TOTAL, 10 * GIB, **agent(n)) for n in range(4)),
            *(series(gpu.POWER, 100.0 * (n + 1), **agent(n)) for n in range(4)),
            *(counter(gpu.THROTTLE, 0.25, **agent(n, reason="power_cap")) for n in range(4)),
            *(counter(gpu.PCIE_RX, 1000, **agent(n, source="gpm")) for n in range(4)),
            *(counter(gpu.NVLINK_TX, 1000, **agent(1, link=str(link))) for link in range(3)),
        ],
        [
            values(
                r.DEVICE_BUSY,
                ("node", "gpu_uuid", "device", "model"),
                {
                    ("a", "GPU-0", "nvidia0", H100): 0,
                    ("a", "GPU-1", "nvidia1", H100): 0.1,
                    ("b", "GPU-2", "nvidia0", A100): 0.2,
                    ("b", "GPU-3", "nvidia1", A100): 0.3,
                },
            ),
            values(r.DEVICE_SM_ACTIVE, ("gpu_uuid",), {"GPU-0": 0, "GPU-1": 0.06}),
            values(r.DEVICE_ACTIVE, ("gpu_uuid",), {"GPU-0": 0, "GPU-1": 0.06, "GPU-2": 0.2, "GPU-3": 0.3}),
            values(
                r.DEVICE_MEMORY_USED,
                ("gpu_uuid",),
                {
                    "GPU-0": 0.1,
                    "GPU-1": 0.2,
                    "GPU-2": 0.3,
                    "GPU-3": 0.4,
                },
            ),
            values(
                r.DEVICE_THROTTLED,
                ("gpu_uuid", "reason"),
                {(f"GPU-{n}", "power_cap"): 0.25 for n in range(4)},
            ),
            values(r.DEVICE_PCIE_RECEIVE, ("gpu_uuid",), {f"GPU-{n}": 1000 for n in range(4)}),
            values(r.DEVICE_NVLINK_TRANSMIT, ("gpu_uuid",), {"GPU-1": 3000}),
            values(r.NODE_GPUS, ("node",), {"a": 2, "b": 2}),
            values(r.NODE_POWER, ("node",), {"a": 300, "b": 700}),
            values(r.NODE_MEMORY_USED, ("node",), {"a": 0.15, "b": 0.35}),
            values(r.CARD_GPUS, ("model",), {H100: 2, A100: 2}),
            values(r.FLEET_GPUS, ("cluster",), {"": 4}),
            values(r.FLEET_ACTIVE, ("cluster",), {"": 0.14}),
        ],
        LAYOUTS,
    ),
    Case(
        "a target's own labels node and cluster win over its address",
        [info(0, node="gpu-17", cluster="east"), series(gpu.UP, 1, **agent(0, cluster="east"))],
        [values(r.DEVICE_UP, ("cluster", "node"), {("east", "gpu-17"): 1})],
    ),
    Case(
        "an agent comes back under another address: one identity, the newest, and no join breaks",
        [
            series(gpu.INFO, "1x100 _x100", **agent(0, model=H100)),
            series(gpu.INFO, "_x99 1x100", **{**agent(0, model=H100), "instance": "10.1.2.3:9955"}),
            series(gpu.BUSY, "0.5x100 _x100", **agent(0, source="gpm")),
            series(gpu.BUSY, "_x99 0.5x100", **{**agent(0, source="gpm"), "instance": "10.1.2.3:9955"}),
        ],
        [
            values(r.DEVICE_BUSY, ("node",), {"a": 0.5}, minute=11),
            # Both are within lookback here, 1 min after the move, and 9 min after it only one.
            values(r.DEVICE_BUSY, ("node",), {"10.1.2.3": 0.5}, minute=13),
            values(r.DEVICE_BUSY, ("node",), {"10.1.2.3": 0.5}, minute=20),
        ],
    ),
    Case(
        "a stale exporter: no value after the lookback, and no zero",
        [info(0, "1x60"), series(gpu.BUSY, "0.5x60", **agent(0, source="gpm"))],
        [
            values(r.DEVICE_BUSY, ("gpu_uuid",), {"GPU-0": 0.5}, minute=7),
            nothing(r.DEVICE_BUSY.name, minute=18),
            nothing(r.FLEET_ACTIVE.name, minute=18),
        ],
    ),
    Case(
        "gaps of scrapes and a restarted counter do not show as negative or huge",
        [
            info(0),
            series(gpu.BUSY, " ".join(["0.5x5 _x3"] * 20), **agent(0, source="gpm")),
            series(gpu.ENERGY, "0+70x170", **agent(0)),
            series(gpu.PCIE_RX, "0+700x50 0+700x120", **agent(0, source="counter")),
        ],
        [
            values(r.DEVICE_BUSY, ("gpu_uuid",), {"GPU-0": 0.5}),
            nothing(f"{r.DEVICE_PCIE_RECEIVE.name} < 90 or {r.DEVICE_PCIE_RECEIVE.name} > 110", minute=8),
            values(r.DEVICE_PCIE_RECEIVE, ("gpu_uuid",), {"GPU-0": 100}, minute=18),
        ],
    ),
    Case(
        "profiling counters that stay at 0 do not make a busy card idle",
        [info(0), series(gpu.BUSY, 0.9, **agent(0, source="nvml")), series(gpu.SM_ACTIVE, 0, **agent(0))],
        [values(r.DEVICE_ACTIVE, ("gpu_uuid",), {"GPU-0": 0.9})],
    ),
    Case(
        "a card in MIG mode shows the mean of its instances",
        [
            info(0),
            series(gpu.MIG_BUSY, 0.2, **agent(0, mig_uuid="MIG-a")),
            series(gpu.MIG_BUSY, 0.6, **agent(0, mig_uuid="MIG-b")),
        ],
        [values(r.DEVICE_BUSY, ("gpu_uuid",), {"GPU-0": 0.4})],
    ),
    Case(
        "an XID whose counter begins with it is seen, one from before the rate window is not",
        [
            info(0),
            series(gpu.XID_ERRORS, "_x120 1x60", **{**agent(0, xid="79"), "class": "hardware"}),
            series(gpu.XID_ERRORS, "3x180", **{**agent(0, xid="31"), "class": "application"}),
        ],
        [
            values(r.DEVICE_XID, ("xid", "class"), {("79", "hardware"): 1}, minute=16),
            nothing(f"{r.DEVICE_XID.name}", minute=10),
        ],
    ),
    Case(
        "Prometheus has only just begun: old counters are no new XIDs",
        [
            series(gpu.INFO, "_x30 1x60", **agent(0, model=H100)),
            series(gpu.XID_ERRORS, "_x30 3x60", **{**agent(0, xid="31"), "class": "application"}),
        ],
        [nothing(r.DEVICE_XID.name, minute=6)],
    ),
    Case(
        "dcgm-exporter: units, both spellings of the host, and a GPU that pods share",
        [
            *(series(f.DCGM_MEMORY_USED, 1024, **dcgm(7, pod=pod, namespace="x")) for pod in ("a", "b")),
            series(f.DCGM_MEMORY_FREE, 3072, **dcgm(7)),
            series(f.DCGM_BUSY, 80, **dcgm(7)),
            series(f.DCGM_MEMORY_USED, 1024, **{**dcgm(8), "Hostname": "", "hostname": "d"}),
            series(f.DCGM_MEMORY_FREE, 2048, **dcgm(8)),
            series(f.DCGM_MEMORY_RESERVED, 1024, **dcgm(8)),
            series(f.DCGM_GRAPHICS_ACTIVE, 0.3, **dcgm(8)),
            series(f.DCGM_XID, "0x60 48x120", **dcgm(7)),
            series(f.DCGM_XID, "31x180", **dcgm(8)),
        ],
        [
            values(r.DEVICE_BUSY, ("node", "gpu_uuid", "model"), {("c", "GPU-7", A100): 0.8}),
            values(r.DEVICE_ACTIVE, ("node", "gpu_uuid"), {("c", "GPU-7"): 0.8, ("d", "GPU-8"): 0.3}),
            values(r.DEVICE_MEMORY_TOTAL_BYTES, ("gpu_uuid",), {"GPU-7": 4 * GIB, "GPU-8": 4 * GIB}),
            values(r.DEVICE_XID, ("gpu_uuid", "xid", "class"), {("GPU-7", "48", "unknown"): 1}, minute=9),
            nothing(r.DEVICE_XID.name, minute=14),
        ],
        layouts=("union",),
    ),
    Case(
        "agent and dcgm-exporter on one node: the agent is believed, nothing is there twice",
        [
            info(0),
            series(gpu.BUSY, 0.4, **agent(0, source="gpm")),
            series(f.DCGM_MEMORY_USED, 1024, **dcgm(0)),
            series(f.DCGM_MEMORY_FREE, 1024, **dcgm(0)),
            series(f.DCGM_BUSY, 99, **dcgm(0)),
            series(f.DCGM_XID, "0x60 48x120", **dcgm(0)),
        ],
        [
            values(r.DEVICE_BUSY, ("node", "model"), {("a", H100): 0.4}),
            values(r.FLEET_GPUS, ("cluster",), {"": 1}),
            # What the agent does not give is taken from the other.
            values(r.DEVICE_MEMORY_USED, ("node",), {"a": 0.5}),
            nothing(r.DEVICE_XID.name, minute=9),
        ],
    ),
]


def test_devices(bench: Bench) -> None:
    bench.run(CASES, WANTED)


def test_sources_alone_give_what_auto_gives(bench: Bench) -> None:
    ours = [case for case in CASES if "dcgm" not in case.name]
    theirs = [case for case in CASES if case.name.startswith("dcgm")]
    assert theirs and len(ours) + len(theirs) == len(CASES) - 1
    Bench(bench.promtool, bench.folder, Options(source="gpuglass")).run(ours, WANTED)
    Bench(bench.promtool, bench.folder, Options(source="dcgm")).run(theirs, WANTED)


def test_a_wrong_expectation_fails(bench: Bench) -> None:
    wrong = Case("wrong", [info(0)], [values(r.FLEET_GPUS, ("cluster",), {"": 2})])
    try:
        bench.run([wrong], WANTED)
    except AssertionError as error:
        assert "wrong (pair)" in str(error) or "FAILED" in str(error)
    else:
        raise AssertionError("promtool took a wrong value")
