"""Cost of the CUDA memory tracer, against a fake libcuda whose functions do next to nothing.

What a traced call costs is measured by turns with the same calls untraced, and compared with an empty pair of
probes on a function that does nothing, in the same run. Then the real command: what gets lost at 100,000
calls a second from four processes, memory with either loader, CPU at 1,000 calls a second. Needs root. Ends
with one JSON line."""

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
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from ebpf import elf, kernel, symbols
from ebpf.attach import Attacher, close_probes
from ebpf.gate import kernel_version
from ebpf.layout import Layer, map_specs
from ebpf.loaders import load
from ebpf.maps import Maps
from ebpf.tracer import RING_BYTES, default_object
from tests.benchmarks.gpu_exporter import cpu_seconds, resident_mb
from tests.ebpf.conftest import Player
from tests.ebpf.test_command import Running
from tests.fakes.cuda import LIBRARY, build

RATE = 100_000
PROCESSES = 4
TARGETS = {
    "traced_call_to_empty_pair_ratio": "<= 1.5",
    "calls_lost": "<= 0",
    "calls_per_second": f">= {0.9 * RATE:g}",
    "resident_mb_core": "<= 35",
    "load_and_attach_ms_core": "<= 100",
    "cpu_percent_at_1000_calls": "<= 1",
}
GROUPS = frozenset({symbols.MEMORY, symbols.CONTEXTS})
MULTI = kernel.has_uprobe_multi(kernel_version(os.uname().release))


class Bench:
    """Programs in the kernel and a process to try them on."""

    def __init__(self) -> None:
        self.maps = Maps(map_specs(1 << 18, RING_BYTES), kernel_version(os.uname().release))
        self.maps.configure(64 << 20, (100, 100, 10, 20), False, True)
        wanted = symbols.programs(GROUPS, [Layer.DRIVER])
        self.loaded = load("core", default_object(), self.maps.fds, wanted, MULTI)
        self.library = str(build() / LIBRARY)
        self.player = Player(self.library)

    def attach(self) -> Attacher:
        """Probe the library."""
        attacher = Attacher(self.loaded.programs, GROUPS, frozenset({Layer.DRIVER}), MULTI)
        assert attacher.probe(self.library, Layer.DRIVER, self.library)
        return attacher

    def empty_pair(self) -> Callable[[], None]:
        """Probe the function that does nothing with programs that do nothing; gives what takes that off."""
        fd = os.open(self.library, os.O_RDONLY)
        offset = elf.read(fd, (b"fakeCudaNothing",)).functions["fakeCudaNothing"]
        os.close(fd)
        program = self.loaded.programs["empty"]
        if MULTI:
            fds = [kernel.attach_uprobes(program, self.library, [offset], both) for both in (True, False)]
        else:
            kind = kernel.uprobe_type()
            fds = [kernel.attach_uprobe(program, self.library, offset, both, kind) for both in (True, False)]
        return lambda: close_probes({"": fds})


def costs(rounds: int, calls: int) -> dict[str, float]:
    """Nanoseconds of a traced call and of an empty pair, beyond what the same calls take untraced."""
    bench = Bench()
    traced, empty = [], []

    def least_disturbed(*words: object) -> float:
        """The shortest of three, once the probes have been hit: what else runs here only adds."""
        bench.player.do(*words)
        return min(float(bench.player.do(*words)) for _ in range(3))

    for _ in range(rounds):
        bare = least_disturbed("loop", calls // 2, 0)
        attacher = bench.attach()
        probed = least_disturbed("loop", calls // 2, 0)
        attacher.close()
        traced.append((probed - bare) / calls * 1e9)
        bare = least_disturbed("nothing", calls)
        take_off = bench.empty_pair()
        probed = least_disturbed("nothing", calls)
        take_off()
        empty.append((probed - bare) / calls * 1e9)
    bench.player.end()
    return {
        "traced_call_ns": statistics.median(traced),
        "empty_pair_ns": statistics.median(empty),
        "traced_call_to_empty_pair_ratio": statistics.median(
            one / other for one, other in zip(traced, empty, strict=True)
        ),
    }


def load_and_attach() -> float:
    """Milliseconds from nothing to all probes on, without Python's start; the median of five."""
    taken = []
    library = str(build() / LIBRARY)
    for _ in range(5):
        start = time.perf_counter()
        maps = Maps(map_specs(1 << 18, RING_BYTES), kernel_version(os.uname().release))
        wanted = symbols.programs(GROUPS, [Layer.DRIVER])
        loaded = load("core", default_object(), maps.fds, wanted, MULTI)
        attacher = Attacher(loaded.programs, GROUPS, frozenset({Layer.DRIVER}), MULTI)
        assert attacher.probe(library, Layer.DRIVER, library)
        taken.append(1000 * (time.perf_counter() - start))
        attacher.close()
        for fd in loaded.programs.values():
            os.close(fd)
        maps.close()
    return statistics.median(taken)


def under_load(seconds: float) -> dict[str, float]:
    """The command while four processes make 100,000 calls a second, then one 1,000."""
    folder = Path(tempfile.mkdtemp(prefix="gg-bench-"))
    environment = {
        "GPUGLASS_TRACER_SOCKET": "",
        "GPUGLASS_TRACER_BUDGET": "0",
        "GPUGLASS_TRACER_INTERVAL": "5s",
        "GPUGLASS_TRACER_RECONCILE_INTERVAL": "15s",
    }
    players = [Player(str(build() / LIBRARY)) for _ in range(PROCESSES)]
    tracer = Running(default_object(), folder, **environment)
    tracer.wait(lambda: tracer.value("gpuglass_tracer_libraries", library="libcuda"), "probed")
    pairs = int(RATE / 2 / PROCESSES * seconds)
    start = time.perf_counter()
    for player in players:
        player.tell("loop", pairs, RATE / 2 / PROCESSES)
    for player in players:
        player.answer()
    elapsed = time.perf_counter() - start
    made = 2 * pairs * PROCESSES
    tracer.wait(lambda: settled(tracer), "all is read")
    booked = tracer.value("gpuglass_tracer_calls_total") or 0
    lost = sum(value for labels, value in tracer.samples("gpuglass_tracer_lost_total"))
    live = sum(value for labels, value in tracer.samples("gpuglass_cuda_live_bytes"))
    figures = {
        "calls_per_second": made / elapsed,
        "calls_lost": made - booked + lost,
        "live_bytes_left": live,
        "resident_mb_core": resident_mb(tracer.process.pid),
    }
    before, start = cpu_seconds(tracer.process.pid), time.perf_counter()
    probes = cost_of_probes(tracer)
    players[0].do("loop", int(500 * 2 * seconds), 500)
    elapsed = time.perf_counter() - start
    figures["cpu_percent_at_1000_calls"] = 100 * (cpu_seconds(tracer.process.pid) - before) / elapsed
    time.sleep(6)
    figures["probes_percent_at_1000_calls"] = 100 * (cost_of_probes(tracer) - probes) / elapsed
    tracer.process.terminate()
    tracer.process.wait(60)
    for player in players:
        player.end()
    return figures


def settled(tracer: Running) -> bool:
    """Whether two looks, longer apart than the tracer's, agree."""
    first = tracer.value("gpuglass_tracer_calls_total")
    time.sleep(6)
    return tracer.value("gpuglass_tracer_calls_total") == first


def cost_of_probes(tracer: Running) -> float:
    """Seconds on the traced threads so far, as the tracer says it."""
    return sum(
        tracer.value("gpuglass_tracer_cost_seconds_total", part=part) or 0 for part in ("traps", "programs")
    )


def with_bcc() -> dict[str, float]:
    """Memory with the other loader, and the time until it traces."""
    folder = Path(tempfile.mkdtemp(prefix="gg-bench-"))
    player = Player(str(build() / LIBRARY))
    start = time.perf_counter()
    tracer = Running(default_object(), folder, "--loader", "bcc", GPUGLASS_TRACER_SOCKET="")
    tracer.wait(lambda: tracer.value("gpuglass_tracer_libraries", library="libcuda"), "probed", 60)
    elapsed = time.perf_counter() - start
    memory = resident_mb(tracer.process.pid)
    tracer.process.terminate()
    tracer.process.wait(60)
    player.end()
    return {"resident_mb_bcc": memory, "start_to_traced_s_bcc": elapsed}


def missed(figures: dict[str, float]) -> list[str]:
    """Names of the targets that were not met."""
    found = []
    for name, target in TARGETS.items():
        relation, bound = target.split()
        value = figures[name]
        if not (value <= float(bound) if relation == "<=" else value >= float(bound)):
            found.append(name)
    return found


def main() -> int:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    quick = parser.parse_args().quick
    subprocess.run(["make", "-s", "bpf"], cwd=Path(__file__).parents[2], check=True)
    figures = {
        **costs(5 if quick else 15, 10_000 if quick else 40_000),
        "load_and_attach_ms_core": load_and_attach(),
        **under_load(3 if quick else 15),
        **with_bcc(),
    }
    print(
        json.dumps(
            {
                "benchmark": "ebpf",
                "machine": {
                    "cpus": os.cpu_count(),
                    "kernel": os.uname().release,
                    "python": platform.python_version(),
                },
                "figures": {name: round(value, 4) for name, value in figures.items()},
                "targets": TARGETS,
                "missed": missed(figures),
            }
        )
    )
    return int(bool(missed(figures)))


if __name__ == "__main__":
    sys.exit(main())
