"""The CUDA memory tracer on a real GPU: is the ledger right, and what does it cost.

To be run as root on a GPU host with torch and nothing else of the network; the repository beside it with the
object that `make bpf` made (ebpf/program/trace.x86_64.o) and gpuglass' own dependencies. What is missing
there can be carried: libbpf.so.1 and libelf.so.1 in a folder that LD_LIBRARY_PATH names, packages in one that
PYTHONPATH names.

Each part runs torch in a process of its own, told line by line, with the tracer running beside it, and
compares at each step what the ledger holds, plus what the driver listed beyond it when only the context was
there, with what NVML lists for the process: within 2 %. Parts: the plain allocator, expandable segments, an
induced out-of-memory, a real leak. Then a loop of allocations and frees by turns with and without the tracer.
Ends with one JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MIB = 1 << 20
PORT = 19956
TARGETS = {
    "off_percent_plain": "<= 2",
    "off_percent_expandable": "<= 2",
    "off_percent_after_oom": "<= 2",
    "leak_seen_ratio": ">= 0.98",
    "oom_failures_seen": ">= 1",
    "lost": "<= 0",
    "allocation_slower_percent": "<= 5",
}

_PLAYER = """
import json, sys, time
import torch
held, leaked = [], []
device = sys.argv[1]
def context():
    if device == "cuda":
        torch.cuda.init(); torch.empty(1, device=device); torch.cuda.synchronize()
def grow(mib, pieces):
    for _ in range(pieces): held.append(torch.empty(mib << 20, dtype=torch.uint8, device=device))
def shrink():
    held.clear()
    if device == "cuda": torch.cuda.empty_cache()
def oom(mib):
    try: torch.empty(mib << 20, dtype=torch.uint8, device=device)
    except RuntimeError as error: return type(error).__name__
    return "none"
def leak(mib, times):
    for _ in range(times): leaked.append(torch.empty(mib << 20, dtype=torch.uint8, device=device))
def loop(mib, times):
    start = time.perf_counter()
    for _ in range(times):
        x = torch.empty(mib << 20, dtype=torch.uint8, device=device); del x
        if device == "cuda": torch.cuda.empty_cache()
    return (time.perf_counter() - start) / times
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    name, *rest = json.loads(line)
    print(json.dumps(globals()[name](*rest)), flush=True)
"""


class Torch:
    """One process that uses torch as it is told."""

    def __init__(self, device: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PLAYER, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.pid = self.process.pid
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def do(self, *words: Any) -> Any:
        """Call one of its functions."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


class Tracer:
    """The command."""

    def __init__(self) -> None:
        self.log = Path(tempfile.mkdtemp()) / "tracer.log"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "GPUGLASS_TRACER_LISTEN": f"127.0.0.1:{PORT}",
            "GPUGLASS_TRACER_SOCKET": "",
            "GPUGLASS_TRACER_LOADER": "core",
            "GPUGLASS_TRACER_INTERVAL": "1s",
            "GPUGLASS_TRACER_RECONCILE_INTERVAL": "1s",
        }
        # Not by `gpuglass`, whose entry points are not installed where the repository was only copied.
        code = (
            "import sys, argparse\nfrom ebpf.command import COMMAND\np = argparse.ArgumentParser()\n"
            "COMMAND.configure(p)\nsys.exit(COMMAND.run(p.parse_args([])))"
        )
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=log)
        self.wait(self._is_up, "the tracer serves")

    def _is_up(self) -> bool:
        if self.process.poll() is not None:
            raise SystemExit(f"the tracer ended: {self.log.read_text()}")
        try:
            return bool(self.samples("gpuglass_tracer_state"))
        except OSError:
            return False

    def samples(self, name: str, **labels: str) -> list[float]:
        """Values of the samples with these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return [
            sample.value
            for metric in text_string_to_metric_families(text)
            for sample in metric.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        """Wait until something holds."""
        until = time.monotonic() + seconds
        while not (result := condition()):
            if time.monotonic() > until:
                raise SystemExit(f"{what}: did not happen; {self.log.read_text()[-2000:]}")
            time.sleep(0.1)
        return result

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(60)


def listed(pid: int) -> int:
    """Bytes that NVML lists for a process on all GPUs."""
    import pynvml

    pynvml.nvmlInit()
    return sum(
        int(process.usedGpuMemory or 0)
        for index in range(pynvml.nvmlDeviceGetCount())
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index))
        if process.pid == pid
    )


def ledger(tracer: Tracer, pid: int) -> float:
    """Live bytes of GPU memory by the ledger, two readings later."""
    time.sleep(2.5)
    return sum(
        sum(tracer.samples("gpuglass_cuda_live_bytes", pid=str(pid), kind=kind))
        for kind in ("device", "virtual")
    )


def compare(tracer: Tracer, worker: Torch, baseline: float) -> float:
    """By how many per cent ledger + baseline are off what NVML lists."""
    tracked = ledger(tracer, worker.pid)
    actual = listed(worker.pid)
    print(
        f"  ledger {tracked / MIB:.1f} MiB + context {baseline / MIB:.1f} MiB, NVML {actual / MIB:.1f} MiB",
        file=sys.stderr,
    )
    return 100 * abs(tracked + baseline - actual) / actual if actual else 100.0


def steps(tracer: Tracer, name: str, quick: bool, **environment: str) -> tuple[float, Torch, float]:
    """Grow, shrink and grow again; the worst difference in per cent."""
    print(name, file=sys.stderr)
    worker = Torch("cuda", **environment)
    worker.do("context")
    baseline = listed(worker.pid) - ledger(tracer, worker.pid)
    off = []
    for mib, pieces in ((64, 20), (3, 100)) if quick else ((64, 20), (3, 100), (700, 5), (20, 50)):
        worker.do("grow", mib, pieces)
        off.append(compare(tracer, worker, baseline))
    worker.do("shrink")
    off.append(compare(tracer, worker, baseline))
    return max(off), worker, baseline


def main() -> int:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="under 90 seconds")
    parser.add_argument(
        "--cpu", action="store_true", help="only try that torch and the tracer start; no figures"
    )
    arguments = parser.parse_args()
    if arguments.cpu:
        return on_cpu()
    quick = arguments.quick
    figures: dict[str, float] = {}
    tracer = Tracer()
    figures["off_percent_plain"], worker, _ = steps(tracer, "plain allocator", quick)
    worker.end()
    figures["off_percent_expandable"], worker, baseline = steps(
        tracer, "expandable segments", quick, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"
    )
    worker.do("oom", 1 << 20)
    figures["off_percent_after_oom"] = compare(tracer, worker, baseline)
    failures = tracer.samples(
        "gpuglass_cuda_call_failures_total", pid=str(worker.pid), result="out_of_memory"
    )
    figures["oom_failures_seen"] = sum(failures)
    before = ledger(tracer, worker.pid)
    worker.do("leak", 32, 16)
    figures["leak_seen_ratio"] = (ledger(tracer, worker.pid) - before) / (32 * 16 * MIB)
    worker.end()
    figures["lost"] = sum(
        sum(tracer.samples("gpuglass_tracer_lost_total", what=what))
        for what in ("call", "live", "totals", "result")
    )
    figures["probe_pair_us"] = 1e6 * sum(tracer.samples("gpuglass_tracer_probe_pair_seconds"))
    worker = Torch("cuda")
    worker.do("context")
    worker.do("loop", 64, 50)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(3 if quick else 10):
        for traced in (True, False):
            if traced and tracer.process.poll() is not None:
                tracer = Tracer()
                library = lambda: sum(tracer.samples("gpuglass_tracer_libraries", library="libcuda"))  # noqa: E731, B023
                tracer.wait(library, "libcuda is traced")
            elif not traced:
                tracer.stop()
            times[traced].append(worker.do("loop", 64, 100 if quick else 400))
    worker.end()
    with_probes, without = statistics.median(times[True]), statistics.median(times[False])
    figures["allocation_us_traced"] = 1e6 * with_probes
    figures["allocation_us_untraced"] = 1e6 * without
    figures["allocation_slower_percent"] = 100 * (with_probes / without - 1)
    missed = [
        name
        for name, target in TARGETS.items()
        if not (
            figures[name] <= float(target[3:])
            if target.startswith("<=")
            else figures[name] >= float(target[3:])
        )
    ]
    machine = {"kernel": os.uname().release, "python": platform.python_version(), "cpus": os.cpu_count()}
    print(
        json.dumps(
            {
                "benchmark": "ebpf_gpu",
                "machine": machine,
                "figures": {name: round(value, 4) for name, value in figures.items()},
                "targets": TARGETS,
                "missed": missed,
            }
        )
    )
    return int(bool(missed))


def on_cpu() -> int:
    """What can be tried without a GPU: the tracer starts as it does there, torch answers."""
    tracer = Tracer()
    worker = Torch("cpu")
    for words in (("context",), ("grow", 1, 2), ("shrink",), ("leak", 1, 2), ("loop", 1, 10)):
        worker.do(*words)
    print(f"torch answers, tracer {tracer.samples('gpuglass_tracer_state')}", file=sys.stderr)
    worker.end()
    tracer.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
