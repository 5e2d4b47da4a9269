"""The CUDA memory tracer on a real GPU: is the ledger right, is a leak found, what does it cost.

    python tests/benchmarks/ebpf_gpu.py [--quick] [--parts plain,cost] [--preflight]

To be run as root on a GPU host with torch and nothing else of the network; the repository beside it with the
object that `make bpf` made (ebpf/program/trace.x86_64.o). What is missing there can be carried: libbpf.so.1
and libelf.so.1 in a folder that LD_LIBRARY_PATH names, packages in one that PYTHONPATH names. `--preflight`
says in a second what is missing.

Each part runs torch in a process of its own, with the tracer beside it and the agent's receiver in this
process; what the ledger holds, plus what the driver listed beyond it when only the context was there, is
compared with what NVML lists for the process. Parts: expandable segments and an out-of-memory in them, which
takes the whole GPU, so that nothing runs beside it; the plain allocator; a real leak beside a healthy
process, of which each second is told to the verdict as twelve; PyTorch's static probes; allocations and a
training step by turns with and without the tracer; a vLLM from its start to the end of its load. A part that
fails or takes too long is named with its reason, and the others go on. Progress goes to standard error; ends
with one JSON line."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "exporters" / "engine_probe"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks._ebpf_gpu_host import SETTLED, STRETCH, Agent, Child, NotSeenError, Tracer, say
from tests.support.bench import finish, missed

MIB = 1 << 20
LEAK_SECONDS = 100.0
TARGETS = {
    "plain": {"off_percent_plain": "<= 2", "leak_seen_ratio": ">= 0.98"},
    "expandable": {
        "off_percent_expandable": "<= 2",
        "off_percent_after_oom": "<= 2",
        "oom_failures_seen": ">= 1",
        "oom_failures_told": ">= 1",
        "lost": "<= 0",
    },
    "end_leak": {"leak_verdict_minutes": "<= 15", "healthy_accused": "<= 0"},
    "tensors": {"tensors_off_percent": "<= 0.1"},
    "cost": {"allocation_slower_percent": "<= 5", "training_slower_percent": "<= 1"},
    "vllm": {"vllm_off_percent_started": "<= 2", "vllm_off_percent_loaded": "<= 2", "vllm_lost": "<= 0"},
}
"""By part."""


class TooLongError(Exception):
    """A part has used up its time."""


@dataclass(slots=True)
class Bench:
    """What the parts share."""

    quick: bool
    device: str
    agent: Agent
    socket: str
    tracer: Tracer | None = None
    children: list[Child] = field(default_factory=list)
    """Ended after each part."""
    background: tuple[Child, Child] | None = None
    """The leaking process and the healthy one."""

    def child(self, kind: str = "torch", **environment: str) -> Child:
        """A process that lives until the end of the part."""
        child = Child(self.device, kind, **environment)
        self.children.append(child)
        return child

    def trace(self, **settings: str) -> Tracer:
        """A tracer that has probed the driver, with other settings than before if there are any."""
        running = self.tracer
        if running is not None and running.settings == settings and running.process.poll() is None:
            return running
        self.untrace()
        self.tracer = tracer = Tracer(self.socket, **settings)
        try:
            tracer.wait(
                lambda: sum(tracer.samples("gpuglass_tracer_libraries", library="libcuda")), "libcuda", 10
            )
        except NotSeenError:
            say("libcuda.so.1 is in none of the usual places: it is found a moment after a process uses it")
        return tracer

    def untrace(self) -> None:
        """No tracer."""
        if self.tracer is not None:
            self.tracer.stop()
        self.tracer = None

    def end_children(self) -> None:
        """End what a part left."""
        while self.children:
            self.children.pop().end()


def listed(pid: int) -> int:
    """Bytes that NVML lists for a process on all GPUs; 0 without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    return sum(
        int(process.usedGpuMemory or 0)
        for index in range(pynvml.nvmlDeviceGetCount())
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index))
        if process.pid == pid
    )


def off_percent(tracer: Tracer, pid: int, baseline: float) -> float:
    """By how many per cent ledger + baseline are off what NVML lists."""
    tracked, actual = tracer.live(pid), listed(pid)
    say(f"ledger {tracked / MIB:.1f} + context {baseline / MIB:.1f}, NVML {actual / MIB:.1f} MiB")
    return 100 * abs(tracked + baseline - actual) / actual if actual else 100.0


def steps(bench: Bench, child: Child) -> tuple[float, float]:
    """Grow, shrink and grow again: the worst difference in per cent; what only the context takes."""
    tracer = bench.trace()
    child.do("context")
    baseline = listed(child.pid) - tracer.live(child.pid)
    off = []
    for mib, pieces in ((64, 20), (3, 100)) if bench.quick else ((64, 20), (3, 100), (700, 5), (20, 50)):
        child.do("grow", *((mib, pieces) if bench.device == "cuda" else (1, 1)))
        off.append(off_percent(tracer, child.pid, baseline))
    child.do("shrink")
    off.append(off_percent(tracer, child.pid, baseline))
    return max(off), baseline


# Parts: each gives figures


def begin_leak(bench: Bench) -> dict[str, float]:
    """Start a process that leaks and a healthy one; they go on beside the next parts.

    4 MiB each 0.6 s are 2 GiB in a stretched hour, in pieces of the 20 MiB that PyTorch takes at a time."""
    bench.trace()
    bench.background = Child(bench.device), Child(bench.device)
    for child, leaked in zip(bench.background, (4.0, 0.0), strict=True):
        child.do("context")
        child.tell("live", LEAK_SECONDS, leaked, 0.6)
    return {}


def end_leak(bench: Bench) -> dict[str, float]:
    """What the verdict said of the two."""
    assert bench.background is not None, "the two processes did not start"
    leaking, healthy = bench.background
    until = time.monotonic() + LEAK_SECONDS + 5
    while leaking.pid not in bench.agent.suspected and time.monotonic() < until:
        if leaking.process.poll() is not None or (bench.device != "cuda" and bench.quick):
            break
        time.sleep(0.5)
    figures = {"healthy_accused": float(healthy.pid in bench.agent.suspected)}
    if (at := bench.agent.suspected.get(leaking.pid)) is not None:
        figures["leak_verdict_minutes"] = STRETCH * (at - bench.agent.first[leaking.pid]) / 60e9
    for child in bench.background:
        child.end()
    return figures


def plain(bench: Bench) -> dict[str, float]:
    """PyTorch's allocator as it is, and memory that is kept."""
    child = bench.child()
    off, _ = steps(bench, child)
    tracer = bench.trace()
    before = tracer.live(child.pid)
    child.do("grow", *((32, 16) if bench.device == "cuda" else (1, 1)))
    seen = (tracer.live(child.pid) - before) / (32 * 16 * MIB)
    return {"off_percent_plain": off, "leak_seen_ratio": seen}


def expandable(bench: Bench) -> dict[str, float]:
    """Expandable segments, then an induced out-of-memory in them."""
    expand = "expandable_segments:True"  # named anew in PyTorch 2.9
    child = bench.child(PYTORCH_CUDA_ALLOC_CONF=expand, PYTORCH_ALLOC_CONF=expand)
    off, baseline = steps(bench, child)
    tracer = bench.trace()
    child.do("grow", *((64, 20) if bench.device == "cuda" else (1, 1)))
    told = bench.agent.failures
    say("asked for a TiB:", child.do("oom"))
    after = off_percent(tracer, child.pid, baseline)
    failed = tracer.samples("gpuglass_cuda_call_failures_total", pid=str(child.pid), result="out_of_memory")
    return {
        "off_percent_expandable": off,
        "off_percent_after_oom": after,
        "oom_failures_seen": sum(failed),
        "oom_failures_told": bench.agent.failures - told,
        "lost": tracer.lost(),
        "probe_pair_us": 1e6 * sum(tracer.samples("gpuglass_tracer_probe_pair_seconds")),
    }


def tensors(bench: Bench) -> dict[str, float]:
    """PyTorch's static probes against what PyTorch says, and what they cost per tensor."""
    seen = bench.child()  # the first process that uses a PyTorch is found a moment after it has loaded it
    seen.do("context")
    tracer = bench.trace(TENSORS="true")
    if bench.device == "cuda":
        library = lambda: sum(tracer.samples("gpuglass_tracer_libraries", library="libc10_cuda"))  # noqa: E731
        tracer.wait(library, "libc10_cuda probed", 20)
    child = bench.child()
    child.do("context")
    off = []
    for mib, pieces in ((5, 30), (0.25, 400)):
        child.do("grow", mib, pieces)
        time.sleep(SETTLED)
        if bench.device == "cuda":  # its libraries are looked at every two seconds
            tracer.wait(
                lambda: tracer.samples("gpuglass_cuda_tensor_bytes", pid=str(child.pid)), "tensors told", 15
            )
        told = sum(tracer.samples("gpuglass_cuda_tensor_bytes", pid=str(child.pid)))
        actual = child.do("tensors")
        say(f"tensors: probes {told / MIB:.2f}, PyTorch {actual / MIB:.2f} MiB")
        off.append(100 * abs(told - actual) / actual if actual else 100.0)
    figures = {"tensors_off_percent": max(off)}
    times = 2_000 if bench.quick else 20_000
    child.do("loop", 0.25, 1000, False)
    with_probes = child.do("loop", 0.25, times, False)
    bench.untrace()
    without = child.do("loop", 0.25, times, False)
    return {**figures, "tensor_us_traced": 1e6 * with_probes, "tensor_us_untraced": 1e6 * without}


def cost(bench: Bench) -> dict[str, float]:
    """Allocations that reach the driver, and training steps, by turns with and without the tracer."""
    child = bench.child()
    child.do("context")
    child.do("loop", 64, 50, True)
    child.do("train", 20)
    allocations: dict[bool, list[float]] = {True: [], False: []}
    training: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(3 if bench.quick else 8):
        for traced in (True, False) if turn % 2 else (False, True):
            if traced:
                bench.trace()
            else:
                bench.untrace()
            allocations[traced].append(child.do("loop", 64, 300, True))
            training[traced].append(child.do("train", 200 if bench.device == "cuda" else 5))
    slower = {
        name: 100 * (statistics.median(found[True]) / statistics.median(found[False]) - 1)
        for name, found in (("allocation", allocations), ("training", training))
    }
    return {
        "allocation_us_traced": 1e6 * statistics.median(allocations[True]),
        "allocation_us_untraced": 1e6 * statistics.median(allocations[False]),
        "allocation_slower_percent": slower["allocation"],
        "training_us_traced": 1e6 * statistics.median(training[True]),
        "training_us_untraced": 1e6 * statistics.median(training[False]),
        "training_slower_percent": slower["training"],
    }


def vllm(bench: Bench) -> dict[str, float]:
    """An engine from its context over its start to the end of its load."""
    from tests.benchmarks.engine_probe_gpu import CONFIG, TINY

    tracer = bench.trace()
    lost = tracer.lost()
    # One process, so that its memory is all of the engine's; nothing is fetched.
    child = bench.child(
        "vllm",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_FLASHINFER_SAMPLER="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        VLLM_PLUGINS="",
    )
    child.do("context")
    pid = str(child.pid)
    baseline = listed(child.pid) - tracer.live(child.pid)

    def calls() -> float:
        return sum(tracer.samples("gpuglass_tracer_calls_total"))

    before = calls()
    child.do("start", CONFIG if bench.device == "cuda" else TINY)
    figures = {"vllm_off_percent_started": off_percent(tracer, child.pid, baseline)}
    say("vLLM has started")
    started, held = calls(), tracer.live(child.pid)
    figures |= {"vllm_calls_of_start": started - before, "vllm_ledger_gib": held / (1 << 30)}
    seconds = 20.0 if bench.quick else 45.0
    requests = child.do("serve", seconds if bench.device == "cuda" else 3.0)
    figures["vllm_off_percent_loaded"] = off_percent(tracer, child.pid, baseline)
    untracked = sum(tracer.samples("gpuglass_cuda_untracked_bytes", pid=pid))
    return {
        **figures,
        "vllm_requests": requests,
        "vllm_calls_under_load_per_second": (calls() - started) / seconds,
        "vllm_growth_under_load_mib": (tracer.live(child.pid) - held) / MIB,
        "vllm_untracked_mib": untracked / MIB,
        "vllm_context_mib": baseline / MIB,
        "vllm_lost": tracer.lost() - lost,
        "vllm_tracer_cost_ratio": sum(tracer.samples("gpuglass_tracer_cost_ratio")),
    }


PARTS: dict[str, tuple[Callable[[Bench], dict[str, float]], float]] = {
    "expandable": (expandable, 60),
    "begin_leak": (begin_leak, 45),
    "plain": (plain, 45),
    "end_leak": (end_leak, 105),
    "tensors": (tensors, 60),
    "cost": (cost, 75),
    "vllm": (vllm, 280),
}
"""By name: what it does, and the most seconds that it may take."""


def missing() -> list[str]:
    """What this machine lacks, in words."""
    found = []
    for package in ("torch", "msgspec", "yaml", "prometheus_client", "pynvml", "gpuglass_vllm", "vllm"):
        if importlib.util.find_spec(package) is None:
            found.append(f"package {package}")
    from ebpf import gate
    from ebpf.loaders.core import LIBRARY
    from ebpf.tracer import default_object
    from gpuglass.config import load
    from gpuglass.procfs import PidView, ProcFs

    if not default_object().is_file():
        found.append(f"{default_object()}: run `make bpf`, or carry it")
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        found.append(f"{LIBRARY}: {error}")
    try:
        gate.check(load(None).tracer.allow)
    except gate.Refused as error:
        found.append(str(error))
    namespace = ProcFs(Path("/proc")).pid_namespace()
    if namespace.view is PidView.PRIVATE:
        found.append(f"pids: {namespace.reason}")
    return found


def _too_long(_signal: int, _frame: FrameType | None) -> None:
    raise TooLongError


def run(bench: Bench, names: list[str], seconds: float) -> tuple[dict[str, float], dict[str, str]]:
    """Figures of the parts, and why some have none. All but vLLM's together take at most `seconds`."""
    figures: dict[str, float] = {}
    failed: dict[str, str] = {}
    signal.signal(signal.SIGALRM, _too_long)
    until = time.monotonic() + seconds
    for name in names:
        part, limit = PARTS[name]
        if name != "vllm":
            limit = min(limit, until - time.monotonic())
        if limit < 1:
            failed[name] = "no time was left"
            continue
        say(f"{name}: at most {limit:.0f} s")
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            found = part(bench)
            figures |= found
            say(f"{name}:", json.dumps({key: round(value, 3) for key, value in found.items()}))
        except TooLongError:
            failed[name] = f"took more than {limit:.0f} s"
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[-800:]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            bench.end_children()
        if name in failed:
            say(f"{name} FAILED: {failed[name]}")
    return figures, failed


def main() -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the parts, in order")
    parser.add_argument("--seconds", type=float, default=240, help="for all parts but vllm (default: 240)")
    parser.add_argument("--preflight", action="store_true", help="only say what is missing here")
    parser.add_argument("--cpu", action="store_true", help="try the script without a GPU; no figure counts")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts: {unknown[0]!r} is none of {', '.join(PARTS)}")
    lacking = missing()
    for line in lacking:
        say("missing here:", line)
    if arguments.preflight:
        say("nothing is missing" if not lacking else f"{len(lacking)} things are missing")
        return int(bool(lacking))
    if not (arguments.cpu or os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi")):
        say("no NVIDIA GPU: nothing is measured")
        return finish("ebpf_gpu", {}, {})
    folder = tempfile.mkdtemp()
    socket = f"{folder}/agent.sock"
    figures: dict[str, float] = {}
    failed: dict[str, str] = {}
    bench: Bench | None = None
    try:
        bench = Bench(arguments.quick, "cpu" if arguments.cpu else "cuda", Agent(socket), socket)
        figures, failed = run(bench, names, arguments.seconds)
    except Exception as error:
        failed["all"] = f"{type(error).__name__}: {error}"
    finally:
        if bench is not None:
            for child in bench.background or ():
                child.end()
            bench.untrace()
            bench.agent.stop()
    parts = () if arguments.cpu else names
    targets = {name: target for part in parts for name, target in TARGETS.get(part, {}).items()}
    not_met = missed(figures, targets) + [name for name in targets if name not in figures]
    machine = {"kernel": os.uname().release, "python": platform.python_version(), "cpus": os.cpu_count()}
    rounded = {name: round(float(value), 4) for name, value in figures.items()}
    for name, value in rounded.items():
        mark = "" if name not in targets else "missed" if name in not_met else "met"
        say(f"{name:36} {value:14.4f}  {targets.get(name, ''):8} {mark}")
    print(
        json.dumps(
            {
                "benchmark": "ebpf_gpu",
                "machine": machine,
                "figures": rounded,
                "targets": targets,
                "missed": not_met,
                "failed": failed,
                "lacking": lacking,
            }
        ),
        flush=True,
    )
    return int(bool(not_met or failed))


if __name__ == "__main__":
    sys.exit(main())
