"""The exporter on a real NVIDIA GPU under a real CUDA load, compared with nvidia-smi and with what the load
did.

Needs a GPU, nvidia-smi and PyTorch with CUDA. `GPUGLASS_CAPTURE=FILE` writes the exposition with identifiers
replaced.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.node import Sample
from tests.support.ports import free_port

pytestmark = [pytest.mark.needs("gpu"), pytest.mark.timeout(300)]

LOAD = """
import json, sys, time, torch
kind, seconds = sys.argv[1], float(sys.argv[2])
held = torch.empty(20 * 2**30, dtype=torch.uint8, device="cuda")
done, started = 0, time.time()
if kind == "matmul":
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    while time.time() - started < seconds:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()
        done += 20
elif kind in ("to_device", "to_host"):
    to_device = kind == "to_device"
    host = torch.empty(256 * 2**20, dtype=torch.uint8).pin_memory()
    device = torch.empty_like(host, device="cuda")
    while time.time() - started < seconds:
        for _ in range(8):
            device.copy_(host, non_blocking=True) if to_device else host.copy_(device, non_blocking=True)
        torch.cuda.synchronize()
        done += 1
        print(json.dumps([time.time(), done * 8 * host.numel()]), flush=True)
else:
    torch.cuda.synchronize()
    time.sleep(seconds)
print(json.dumps({"iterations": done, "seconds": time.time() - started}), flush=True)
"""


@dataclass
class RealAgent:
    """A running agent on the machine's GPU."""

    port: int
    process: subprocess.Popen[bytes]

    def text(self, path: str = "/metrics") -> str:
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            body: bytes = answer.read()
        return body.decode()

    def samples(self, name: str, **labels: str) -> list[Sample]:
        from prometheus_client.parser import text_string_to_metric_families

        return [
            Sample(sample.name, sample.labels, sample.value)
            for metric in text_string_to_metric_families(self.text())
            for sample in metric.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def value(self, name: str, **labels: str) -> float:
        found = self.samples(name, device="nvidia0", **labels)
        assert len(found) == 1, (name, labels, found)
        return found[0].value


@pytest.fixture(scope="module")
def agent() -> Iterator[RealAgent]:
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GPUGLASS_", "FAKE_NVML"))}
    environment |= {"GPUGLASS_SERVER_LISTEN": f"127.0.0.1:{port}", "GPUGLASS_GPU_SLOW_INTERVAL": "1s"}
    environment["GPUGLASS_ENGINES_ENABLED"] = "false"
    process = subprocess.Popen([sys.executable, "-m", "gpuglass", "agent"], env=environment)
    running = RealAgent(port, process)
    try:
        until = time.monotonic() + 30
        while True:
            try:
                running.text("/readyz")
                break
            except OSError:
                assert time.monotonic() < until, "the agent did not get ready"
                time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        assert process.wait(20) == 0


@contextmanager
def load(kind: str, seconds: float, tmp_path: Path) -> Iterator[Path]:
    """A CUDA program in the background; gives the file of its output."""
    out = tmp_path / f"{kind}.txt"
    with out.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", LOAD, kind, str(seconds)], stdout=file)
        try:
            yield out
        finally:
            process.terminate()
            process.wait()


def smi(fields: str) -> list[float]:
    """What nvidia-smi says now of the first GPU."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return [float(value) for value in subprocess.check_output(command, text=True).split(",")]


def test_memory_power_and_clocks_agree_with_nvidia_smi_in_the_same_second(
    agent: RealAgent, tmp_path: Path
) -> None:
    with load("matmul", 40, tmp_path):
        time.sleep(14)
        pairs = []
        for _ in range(10):
            used, power, total, temperature, limit, sm = smi(
                "memory.used,power.draw,memory.total,temperature.gpu,power.limit,clocks.sm"
            )
            ours = [
                agent.value("gpuglass_gpu_memory_used_bytes") / 2**20,
                agent.value("gpuglass_gpu_power_watts"),
                agent.value("gpuglass_gpu_memory_total_bytes") / 2**20,
                agent.value("gpuglass_gpu_temperature_celsius", sensor="gpu"),
                agent.value("gpuglass_gpu_power_limit_watts"),
                agent.value("gpuglass_gpu_clock_hertz", clock="sm") / 1e6,
            ]
            pairs.append((ours, [used, power, total, temperature, limit, sm]))
            time.sleep(1)
        print(json.dumps({"ours_vs_nvidia_smi": pairs}))
        for ours, theirs in pairs:
            assert ours[0] == pytest.approx(theirs[0], rel=0.01)
            assert ours[2] == pytest.approx(theirs[2], rel=0.001)
            assert ours[3] == pytest.approx(theirs[3], abs=3)
            assert ours[4] == pytest.approx(theirs[4], rel=0.001)
        power = [abs(ours[1] - theirs[1]) / theirs[1] for ours, theirs in pairs]
        assert statistics.median(power) <= 0.05, power

        busy = agent.value("gpuglass_gpu_busy_ratio")
        assert busy > 0.9
        assert agent.value("gpuglass_gpu_sm_active_ratio") > 0.8
        assert agent.value("gpuglass_gpu_graphics_active_ratio") > 0.8
        assert agent.value("gpuglass_gpu_pipe_active_ratio", pipe="tensor") > 0.3
        assert agent.value("gpuglass_gpu_pipe_active_ratio", pipe="fp64") < 0.05

        processes = agent.samples("gpuglass_process_memory_used_bytes")
        unattributed = agent.value("gpuglass_gpu_memory_unattributed_bytes")
        total_of_parts = sum(sample.value for sample in processes) + unattributed
        print(
            json.dumps({"processes": [(p.labels, p.value) for p in processes], "unattributed": unattributed})
        )
        assert total_of_parts == pytest.approx(agent.value("gpuglass_gpu_memory_used_bytes"), rel=0.01)
        assert max(sample.value for sample in processes) > 20 * 2**30
        shares = [sample.value for sample in agent.samples("gpuglass_process_sm_ratio")]
        print(json.dumps({"process_sm_ratio": shares}))
        assert 0.5 < sum(shares) <= 1

        before = agent.value("gpuglass_gpu_energy_joules_total"), time.monotonic()
        powers = []
        for _ in range(8):
            powers.append(agent.value("gpuglass_gpu_power_watts"))
            time.sleep(1)
        joules = agent.value("gpuglass_gpu_energy_joules_total") - before[0]
        watts = joules / (time.monotonic() - before[1])
        print(json.dumps({"watts_by_energy": watts, "watts_by_power": statistics.mean(powers)}))
        assert watts == pytest.approx(statistics.mean(powers), rel=0.15)
        if os.environ.get("GPUGLASS_CAPTURE"):
            Path(os.environ["GPUGLASS_CAPTURE"]).write_text(anonymous(agent.text()))


@pytest.mark.parametrize(
    ("kind", "direction", "column"), [("to_device", "receive", 1), ("to_host", "transmit", 2)]
)
def test_pcie_bytes_are_those_that_the_program_copied(
    agent: RealAgent, tmp_path: Path, kind: str, direction: str, column: int
) -> None:
    name = f"gpuglass_gpu_pcie_{direction}_bytes_total"
    with load(kind, 40, tmp_path) as out:
        time.sleep(14)
        counted = [(time.time(), agent.value(name))]
        dmon = subprocess.run(
            ["nvidia-smi", "dmon", "-i", "0", "-s", "t", "-c", "10"], capture_output=True, text=True
        ).stdout
        counted.append((time.time(), agent.value(name)))
        progress = [json.loads(line) for line in out.read_text().splitlines() if line.startswith("[")]
    seconds = counted[1][0] - counted[0][0]
    ours = (counted[1][1] - counted[0][1]) / seconds
    window = [entry for entry in progress if counted[0][0] - 1 <= entry[0] <= counted[1][0] - 1]
    program = (window[-1][1] - window[0][1]) / (window[-1][0] - window[0][0])
    rows = [line.split() for line in dmon.splitlines() if re.match(r"\s*\d", line)]
    theirs = statistics.mean(float(row[column]) for row in rows) * 1e6
    (sample,) = agent.samples(name, device="nvidia0")
    figures = {"ours": ours / 1e9, "program": program / 1e9, "nvidia_smi": theirs / 1e9}
    print(
        json.dumps(
            {f"pcie_{direction}_gb_per_s": figures, "source": sample.labels["source"], "seconds": seconds}
        )
    )
    # What the card counts holds packet headers as well, so it is never below what the program moved.
    assert 0.97 * program <= ours <= 1.2 * program
    assert ours == pytest.approx(theirs, rel=0.05)


def test_an_idle_gpu_that_holds_memory_is_idle(agent: RealAgent, tmp_path: Path) -> None:
    with load("idle", 20, tmp_path):
        time.sleep(14)
        assert agent.value("gpuglass_gpu_memory_used_bytes") > 20 * 2**30
        assert agent.value("gpuglass_gpu_busy_ratio") < 0.05
        assert agent.value("gpuglass_gpu_sm_active_ratio") < 0.02
        shares = [sample.value for sample in agent.samples("gpuglass_process_sm_ratio")]
        assert shares and sum(shares) < 0.05


def test_an_illegal_access_is_counted_as_an_application_xid(agent: RealAgent) -> None:
    before = {
        s.labels["xid"]: s.value for s in agent.samples("gpuglass_gpu_xid_errors_total", device="nvidia0")
    }
    assert before and set(before.values()) == {0}
    program = (
        "import cupy; k = cupy.RawKernel('extern \"C\" __global__ void f(){ *(volatile int*)0x10 = 1; }', "
        "'f');"
        "k((1,), (1,), ()); cupy.cuda.Device().synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if "No module named 'cupy'" in done.stderr:
        pytest.skip("needs cupy to make a kernel that faults")
    assert done.returncode != 0
    time.sleep(5)
    counted = {
        (s.labels["xid"], s.labels["class"]): s.value
        for s in agent.samples("gpuglass_gpu_xid_errors_total", device="nvidia0")
        if s.value
    }
    print(json.dumps({"xids": [[*list(key), value] for key, value in counted.items()]}))
    assert counted == {("31", "application"): 1.0}


def test_what_this_gpu_cannot_give_is_said(agent: RealAgent) -> None:
    capabilities = {
        s.labels["field"]: s.labels["state"]
        for s in agent.samples("gpuglass_gpu_capability", device="nvidia0")
    }
    print(json.dumps({"capabilities": capabilities}))
    assert capabilities["power"] == capabilities["memory"] == "supported"
    assert "error" not in capabilities.values()
    failed = [
        s.labels for s in agent.samples("gpuglass_gpu_collector_success", device="nvidia0") if s.value != 1
    ]
    durations = {
        s.labels["collector"]: s.value
        for s in agent.samples("gpuglass_gpu_collector_duration_seconds", device="nvidia0")
    }
    print(json.dumps({"collector_seconds": durations}))
    assert failed == []


def anonymous(text: str) -> str:
    """The exposition without what identifies a machine."""
    text = re.sub(r"GPU-[0-9a-f-]{36}", "GPU-5c0ffee0-0000-4000-8000-000000000000", text)
    return re.sub(r"[0-9a-f]{8}:[0-9a-f]{2}:[0-9a-f]{2}\.0", "00000000:01:00.0", text)
