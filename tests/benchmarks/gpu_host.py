"""Cost of the agent on a real GPU host: what a CUDA program loses beside it, and what the agent itself uses.

The program's rate is measured in turns with and without the agent, in one run; the figure is the ratio of the
medians. Needs an NVIDIA GPU and PyTorch with CUDA. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.gpu_exporter import Scraper, cpu_seconds, cpu_share, resident_mb, wait_ready
from tests.support.ports import free_port

PROGRAM = """
import sys, time, torch
a = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
small = torch.randn(256, 256, device="cuda")
for line in sys.stdin:
    until, done = time.perf_counter() + float(line), 0
    started = time.perf_counter()
    while time.perf_counter() < until:
        for _ in range(20):
            a @ a
            for _ in range(20):
                small = small * 1.0001
        torch.cuda.synchronize()
        done += 1
    print(done / (time.perf_counter() - started), flush=True)
"""
TARGETS = {"program_slowdown_percent": "<= 0.1", "agent_cpu_percent_of_core": "<= 1", "resident_mb": "<= 60"}


def start_agent(port: int) -> subprocess.Popen[bytes]:
    """The agent with its defaults."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GPUGLASS_", "FAKE_NVML"))}
    environment["GPUGLASS_SERVER_LISTEN"] = f"127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-m", "gpuglass", "agent"], env=environment)
    wait_ready(port)
    return process


def main() -> int:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute, less exact")
    arguments = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        print(
            json.dumps(
                {
                    "benchmark": "gpu_host",
                    "skipped": "no NVIDIA GPU",
                    "figures": {},
                    "targets": {},
                    "missed": [],
                }
            )
        )
        return 0
    turns, seconds = (4, 3.0) if arguments.quick else (20, 4.0)
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert program.stdin is not None and program.stdout is not None

    def rate(duration: float) -> float:
        print(duration, file=program.stdin, flush=True)
        return float(program.stdout.readline())

    rate(5.0)
    without, beside = [], []
    port = free_port()
    for _ in range(turns):
        without.append(rate(seconds))
        agent = start_agent(port)
        scraper = Scraper(port)
        scraper.get("/metrics/fast")
        beside.append(rate(seconds))
        agent.send_signal(signal.SIGTERM)
        agent.wait(20)
    agent = start_agent(port)
    time.sleep(2)
    idle_before, started = cpu_seconds(agent.pid), time.monotonic()
    time.sleep(10)
    idle = (cpu_seconds(agent.pid) - idle_before) / (time.monotonic() - started)
    share = cpu_share(agent.pid, port, 15.0 if arguments.quick else 60.0)
    resident = resident_mb(agent.pid)
    agent.send_signal(signal.SIGTERM)
    agent.wait(20)
    program.stdin.close()
    program.wait(20)
    figures = {
        "program_slowdown_percent": round(
            100 * (1 - statistics.median(beside) / statistics.median(without)), 3
        ),
        "spread_without_percent": round(100 * statistics.pstdev(without) / statistics.mean(without), 3),
        "agent_cpu_percent_of_core": round(100 * share, 3),
        "agent_cpu_percent_unscraped": round(100 * idle, 3),
        "resident_mb": round(resident, 1),
        "turns": turns,
    }
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
