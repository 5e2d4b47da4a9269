"""Cost of the agent on a real GPU host: what a CUDA program loses beside it, and what the agent itself uses.

The program's rate is measured in turns with and without the agent, in one run; the figure is the ratio of the
medians. Needs an NVIDIA GPU and PyTorch with CUDA. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.gpu_exporter import cpu_seconds, cpu_share, resident_mb, wait_ready
from tests.support.ports import free_port

# "gpu" is bound by the card's memory, as decoding is; "launch" by the CPU thread that launches kernels.
PROGRAM = """
import sys, time, torch
kind = sys.argv[1]
a = torch.randn(2**29, dtype=torch.bfloat16, device="cuda")
b = torch.empty_like(a)
small = torch.randn(256, 256, device="cuda")
for line in sys.stdin:
    until, done = time.perf_counter() + float(line), 0
    started = time.perf_counter()
    while time.perf_counter() < until:
        if kind == "gpu":
            for _ in range(20):
                b.copy_(a)
        else:
            for _ in range(2000):
                small = small * 1.0001
        torch.cuda.synchronize()
        done += 1
    print(done / (time.perf_counter() - started), flush=True)
"""

TARGETS = {"gpu_slowdown_percent": "<= 0.1", "agent_cpu_percent_of_core": "<= 1", "resident_mb": "<= 60"}


def start_agent(port: int) -> subprocess.Popen[bytes]:
    """The agent with its defaults."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GPUGLASS_", "FAKE_NVML"))}
    environment["GPUGLASS_SERVER_LISTEN"] = f"127.0.0.1:{port}"
    environment["GPUGLASS_ENGINES_ENABLED"] = "false"
    process = subprocess.Popen([sys.executable, "-m", "gpuglass", "agent"], env=environment)
    wait_ready(port)
    return process


def slowdown(kind: str, agent: subprocess.Popen[bytes], pairs: int, seconds: float) -> dict[str, float]:
    """Percent of its rate that a program loses beside the agent: median over pairs of turns, and standard
    error.

    In one turn of a pair the agent is stopped, in the other it works; which comes first is drawn.
    """
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert program.stdin is not None and program.stdout is not None

    def rate(duration: float) -> float:
        print(duration, file=program.stdin, flush=True)
        return float(program.stdout.readline())  # type: ignore[union-attr]

    rate(8.0)
    losses, noise = [], []
    for _ in range(pairs):
        rates = {}
        for working in random.sample((True, False), 2):
            agent.send_signal(signal.SIGCONT if working else signal.SIGSTOP)
            time.sleep(0.05)
            rates[working] = rate(seconds)
        losses.append(100 * (1 - rates[True] / rates[False]))
    agent.send_signal(signal.SIGSTOP)
    for _ in range(pairs // 2):
        noise.append(100 * (1 - rate(seconds) / rate(seconds)))
    agent.send_signal(signal.SIGCONT)
    program.stdin.close()
    program.wait(20)
    return {
        f"{kind}_slowdown_percent": round(statistics.median(losses), 3),
        f"{kind}_standard_error_percent": round(1.25 * statistics.stdev(losses) / len(losses) ** 0.5, 3),
        f"{kind}_slowdown_without_agent_percent": round(statistics.median(noise), 3),
    }


def measure(agent: subprocess.Popen[bytes], port: int, quick: bool) -> dict[str, float]:
    """All figures of a running agent."""
    time.sleep(2)
    before, started = cpu_seconds(agent.pid), time.monotonic()
    time.sleep(10)
    idle = (cpu_seconds(agent.pid) - before) / (time.monotonic() - started)
    share = cpu_share(agent.pid, port, 10.0 if quick else 45.0)
    figures: dict[str, float] = {
        "agent_cpu_percent_of_core": round(100 * share, 3),
        "agent_cpu_percent_unscraped": round(100 * idle, 3),
        "resident_mb": round(resident_mb(agent.pid), 1),
    }
    for kind in ("gpu", "launch"):
        figures |= slowdown(kind, agent, *((8, 1.0) if quick else (20, 1.5)))
    return figures


def main() -> int:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute, less exact")
    arguments = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        nothing = {"skipped": "no NVIDIA GPU", "figures": {}, "targets": {}, "missed": []}
        print(json.dumps({"benchmark": "gpu_host", **nothing}))
        return 0
    port = free_port()
    agent = start_agent(port)
    try:
        figures = measure(agent, port, arguments.quick)
    finally:
        agent.send_signal(signal.SIGCONT)
        agent.terminate()
        agent.wait(20)
    missed = [
        name for name, target in TARGETS.items() if not figures[name] <= float(target.removeprefix("<= "))
    ]
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
    print(
        json.dumps(
            {
                "benchmark": "gpu_host",
                "machine": machine,
                "figures": figures,
                "targets": TARGETS,
                "missed": missed,
            }
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
