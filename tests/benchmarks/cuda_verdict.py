"""What verdicts cost the agent: 500 processes that report three kinds of memory each 15 s, for hours.

    python tests/benchmarks/cuda_verdict.py [--quick]

A third of the processes leaks, so that the judge has work. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from ebpf.verdict.process import Processes
from gpuglass_vllm.records import CudaMemory, CudaOwner, CudaProcess

MIB, GIB = 1 << 20, 1 << 30
INTERVAL = 15
TARGETS = {"core_share_500_processes": "<= 0.01", "kilobytes_per_process": "<= 96"}
KINDS = ("device", "host", "virtual")


def report(pid: int, at: int) -> CudaProcess:
    """One process's report at a time in seconds."""
    grown = at * GIB // 3600 if pid % 3 == 0 else (at * 7919 * pid) % (32 * MIB)
    return CudaProcess(
        at=at * 1_000_000_000,
        pid=pid,
        start_ticks=1,
        memory=[CudaMemory(kind=kind, live_bytes=20 * GIB + grown) for kind in KINDS],
        stacks=[CudaOwner(stack=k + 1, kind="device", live_bytes=GIB + grown) for k in range(10)],
        tracking_since_ns=0,
        untracked_bytes=500 * MIB,
    )


def spent(count: int, hours: float) -> float:
    """Share of a core for `count` processes, mean over simulated hours. Making the reports is not counted."""
    processes, seconds = Processes(), 0.0
    for at in range(0, int(hours * 3600), INTERVAL):
        reports = [report(pid, at) for pid in range(1, count + 1)]
        begin = time.process_time()
        for one in reports:
            processes.take(one)
        seconds += time.process_time() - begin
    return seconds / (hours * 3600)


def memory(count: int, hours: float) -> float:
    """Kilobytes per process after simulated hours: all histories are full."""
    tracemalloc.start()
    processes = Processes()
    for at in range(0, int(hours * 3600), 60):
        for pid in range(1, count + 1):
            processes.take(report(pid, at))
    kilobytes = tracemalloc.get_traced_memory()[0] / count / 1024
    tracemalloc.stop()
    return kilobytes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute")
    quick = parser.parse_args().quick
    figures = {
        "core_share_500_processes": spent(500, 0.75 if quick else 6.0),
        "kilobytes_per_process": memory(5, 24.0 if quick else 72.0),
    }
    missed = [name for name, target in TARGETS.items() if figures[name] > float(target.split()[-1])]
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    result = {
        **{"benchmark": "cuda_verdict", "machine": machine},
        **{"figures": figures, "targets": TARGETS, "missed": missed},
    }
    print(json.dumps(result))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
