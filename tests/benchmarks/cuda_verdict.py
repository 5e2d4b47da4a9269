"""Verdicts on CUDA memory: how true they are, and what they cost the agent.

    python tests/benchmarks/cuda_verdict.py [--quick] [--seeds NAME]

Truth: every scripted behaviour (`tests/ebpf/verdict/behaviours.py`) is played in simulated time with 24 seeds
from each of two sets; `--seeds` names a set of its own instead, which nobody has looked at. Counted are leaks
that were not found, healthy processes that were accused, and the minutes until a leak of 1 GiB/h was found;
those of 1 GiB/h and more of all kinds as a distribution, because beneath a sawtooth or a swinging load it
takes as long as their periods. Cost: 500 processes report three kinds of memory each 15 s, for hours; a third
of them leaks, so that the judge has work. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from ebpf.verdict.process import Processes
from gpuglass_vllm.records import CudaMemory, CudaOwner, CudaProcess
from tests.ebpf.verdict import behaviours
from tests.support.bench import missed

MIB, GIB = 1 << 20, 1 << 30
INTERVAL = 15
SETS = ("", "second-")
"""Prefixes of the seeds: those of the tests, and others."""
SEEDS = 24
TARGETS = {
    "leaks_missed": "<= 0",
    "healthy_accused": "<= 0",
    "accused_before_they_leaked": "<= 0",
    "minutes_1_gib_per_hour_max": "<= 15",
    "core_share_500_processes": "<= 0.01",
    "kilobytes_per_process": "<= 96",
}
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


@dataclass(frozen=True, slots=True)
class Played:
    """One run of a behaviour."""

    name: str
    leak: float
    """Bytes per hour; 0: healthy."""
    early: bool
    """Accused before it leaked."""
    minutes: float | None
    """From its leak's beginning (of a healthy one: its own) to the first suspicion; None: never."""


def play(job: tuple[str, str]) -> Played:
    """Play a behaviour, named with its seed."""
    name, seed = job
    rng = random.Random(seed)
    behaviour: behaviours.Behaviour = getattr(behaviours, name)(rng)
    suspected = behaviours.watch(behaviour, rng).suspected
    found = [at for at in suspected if at > behaviour.leaks_from]
    minutes = (found[0] - behaviour.leaks_from) / 60 if found else None
    return Played(name, behaviour.leak, len(found) < len(suspected), minutes)


def truth(sets: Sequence[str], seeds: int) -> dict[str, float]:
    """Play all behaviours; says of each set what went wrong on standard error."""
    figures = {name: 0.0 for name in TARGETS if name in ("leaks_missed", "healthy_accused")}
    figures |= {"accused_before_they_leaked": 0.0, "runs_leaking": 0.0, "runs_healthy": 0.0}
    took: list[float] = []
    quick: list[float] = []
    with Pool() as pool:
        for prefix in sets:
            jobs = [
                (make.__name__, f"{prefix}{make.__name__}{variant}")
                for make in (*behaviours.HEALTHY, *behaviours.LEAKING)
                for variant in range(seeds)
            ]
            for (_, seed), one in zip(jobs, pool.imap(play, jobs, 4), strict=True):
                figures["runs_leaking" if one.leak else "runs_healthy"] += 1
                figures["accused_before_they_leaked"] += one.early
                wrong = (one.minutes is None) == bool(one.leak)
                figures["leaks_missed" if one.leak else "healthy_accused"] += wrong
                if wrong:
                    print(f"{seed}: {'missed' if one.leak else 'accused'}", file=sys.stderr, flush=True)
                if one.minutes is not None and one.leak >= GIB:
                    took.append(one.minutes)
                    if one.name == behaviours.leak_of_1_gib_per_hour.__name__:
                        quick.append(one.minutes)
            print(f"set {prefix or 'first'!r}: {len(jobs)} runs", file=sys.stderr, flush=True)
    took.sort()
    return {
        **figures,
        "minutes_1_gib_per_hour_median": statistics.median(quick),
        "minutes_1_gib_per_hour_max": max(quick),
        "minutes_1_gib_and_more_all_kinds_median": statistics.median(took),
        "share_of_1_gib_and_more_in_15_minutes": sum(minutes <= 15 for minutes in took) / len(took),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--seeds", metavar="NAME", help="play another set of seeds: any name")
    arguments = parser.parse_args()
    quick = arguments.quick
    sets = SETS if arguments.seeds is None else (f"{arguments.seeds}-",)
    figures = {
        **truth(sets[:1] if quick else sets, 3 if quick else SEEDS),
        "core_share_500_processes": spent(500, 0.75 if quick else 6.0),
        "kilobytes_per_process": memory(5, 24.0 if quick else 72.0),
    }
    not_met = missed(figures, TARGETS)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    result = {
        **{"benchmark": "cuda_verdict", "machine": machine},
        **{"figures": figures, "targets": TARGETS, "missed": not_met},
    }
    print(json.dumps(result))
    return int(bool(not_met))


if __name__ == "__main__":
    sys.exit(main())
