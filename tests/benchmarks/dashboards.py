"""How long the dashboards' queries take on a real Prometheus: every query of every panel, as Grafana
asks it at first.

A simulated fleet of 8, 100 and 1,000 GPUs (4, 50 and 500 engines of up to 200 models) is written as
blocks: what the compute map shows at one second for its five minutes, all other families each 30 seconds
for the history that a size can afford (printed), the recording rules evaluated into it. Panels keep
their step and their range as far as the history goes. Times are those of the HTTP answers, client and
JSON parsing included. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from dashboards.board import Options, as_json
from dashboards.build import boards
from dashboards.evaluate import Client, Range, defaults_of, panels_of, requests, seconds
from gpuglass import catalog
from gpuglass.demo import distribution
from gpuglass.families import engine, gpu
from gpuglass.family import Tier
from recording_rules.groups import groups
from recording_rules.settings import Settings
from tests.support import bench, tools
from tests.support.backfill import Span, evaluate, write
from tests.support.fleet import Fleet, gpus
from tests.support.history import RETENTION
from tests.support.prometheus import running_prometheus

TARGETS = {"p99_seconds_1000": "<= 1"}
END = 1_764_158_400.0
MAP_SECONDS = 300.0
EACH_SECOND = (
    gpu.UP,
    gpu.SM_ACTIVE,
    gpu.BUSY,
    gpu.PIPE_ACTIVE,
    gpu.DRAM_ACTIVE,
    gpu.MEMORY_USED,
    gpu.POWER,
    engine.KV_USED_BLOCKS,
    engine.KV_POOL_BLOCKS,
)
HISTORY = {8: 3_600.0, 100: 1_800.0, 1_000: 600.0}
"""Seconds of history by number of GPUs: 1,000 GPUs are half a million series."""
QUICK = {8: 900.0, 100: 300.0}
LEFT_OUT = frozenset({engine.EXPERT_MATRIX.name})
"""The opt-in matrix of experts: on 500 engines nobody would have it."""


def fill(folder: Path, fleet: Fleet, program: Path, promtool: Path, history: float) -> int:
    """Writes samples and records; gives the number of samples."""
    fast = np.arange(END - min(MAP_SECONDS, history), END + 1, 1.0)
    slow = np.arange(END - history, END + 1, 30.0)
    map_names = [family.name for family in EACH_SECOND]
    rest = [name for name in catalog.BY_NAME if name not in LEFT_OUT and name not in map_names]
    before = slow[slow < fast[0]]
    count = write(folder, promtool, fast, fleet.blocks(fast, [Tier.FAST], map_names))
    count += write(folder, promtool, slow, [*fleet.blocks(slow, [*Tier], rest), *fleet.foreign(slow)])
    if len(before):
        count += write(folder, promtool, before, fleet.blocks(before, [Tier.FAST], map_names))
    print("evaluating the rules …", file=sys.stderr, flush=True)
    evaluate(folder, program, promtool, groups(Settings()), [Span(END - history, END, 30)])
    return count


def measure(url: str, history: float, repeats: int) -> list[tuple[float, str]]:
    """(seconds, which) of each query, `repeats` times each, in turns."""
    client, took = Client(url), []
    asked = []
    for board in boards(Options()):
        data = as_json(board, Options())
        span = seconds(board.start.removeprefix("now-"))
        for panel in panels_of(data):
            for request in requests(panel, Range(END - span, END), defaults_of(data)):
                asked.append((request, min(span, history), f"{board.uid}: {panel['title']} {request.ref}"))
    for _ in range(repeats):
        for request, length, which in asked:
            started = time.perf_counter()
            client.ask(request, Range(END - length, END))
            took.append((time.perf_counter() - started, which))
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 and 100 GPUs with a short history")
    arguments = parser.parse_args()
    newest = tools.PROMETHEUS.program("prometheus"), tools.PROMETHEUS.program("promtool")
    program, promtool = (
        newest if all(newest) else (distribution.find("prometheus"), distribution.find("promtool"))
    )
    assert program and promtool
    figures: dict[str, float] = {}
    for size, history in (QUICK if arguments.quick else HISTORY).items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            fleet = Fleet(gpus(size, 2 if size <= 8 else 200), END - history - 600)
            print(f"{size} GPUs: writing {history / 60:g} minutes …", file=sys.stderr, flush=True)
            figures[f"samples_{size}"] = fill(folder, fleet, program, promtool, history)
            with running_prometheus(program, [], folder, flags=(RETENTION,)) as server:
                measure(server.url, history, 1)  # opens the blocks
                took = measure(server.url, history, 2 if arguments.quick else 3)
        times = np.array([one for one, _ in took])
        figures[f"queries_{size}"] = len(took)
        for name, value in (("median", 50), ("p99", 99), ("worst", 100)):
            figures[f"{name}_seconds_{size}"] = round(float(np.percentile(times, value)), 4)
        for spent, which in sorted(took, reverse=True)[:5]:
            print(f"  {spent:6.3f} s  {which}", file=sys.stderr, flush=True)
    return bench.finish("dashboards", figures, TARGETS)


if __name__ == "__main__":
    raise SystemExit(main())
