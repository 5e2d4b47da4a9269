"""Time that a real Prometheus spends on the recording and alerting rules of a large fleet.

    python tests/benchmarks/rules.py [--quick]

1,000 GPUs on 125 nodes, 250 engines of 200 models, 500 tenants (`--quick`: a twelfth). Ten minutes of what
agents and engines export are written as blocks, the fast tier at one second and the slow tier at fifteen.
Groups that look over days read records: three days of these are written for a tenth of the models and
tenants, and what these groups take is counted tenfold. Each group is evaluated every few seconds, by a
Prometheus that has nothing else to do; its time is corrected for what else the machine does, by the CPU time
of Prometheus ÷ the time of all its evaluations. A group's share is its time ÷ the interval that it has in
production, and the shares add up. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parents[2]))

from alert_rules import files
from gpuglass.demo import distribution
from gpuglass.families import engine, gpu, prices
from gpuglass.family import Family
from recording_rules import records as r
from recording_rules.model import Group, Record
from recording_rules.settings import DAY, Settings
from recording_rules.writer import render
from tests.support import tools
from tests.support.bench import finish
from tests.support.prometheus import running_prometheus

TARGETS = {"share_of_interval_percent": "<= 25", "failed_rules": "<= 0"}
LONG = ("gpuglass-slo.rules", "gpuglass-slo-long.rules", "gpuglass-quotas.rules", "gpuglass-advice.rules")
"""Groups that look over hours and days."""
DEPTH = 10
"""The fleet with days of records is this much smaller."""
EVALUATIONS = 3
"""As many of each group are waited for, of which the first finds none of the records that it reads."""
CARD = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True, slots=True)
class Size:
    """How many of each."""

    gpus: int
    models: int
    tenants: int

    @property
    def engines(self) -> int:
        return self.gpus // 4


class Writer:
    """Writes series as OpenMetrics text, family by family."""

    def __init__(self, file: IO[str], now: int) -> None:
        self.file, self.now, self.series = file, now, 0

    def put(
        self,
        name: str,
        labels: Mapping[str, str],
        value: Callable[[int], float],
        seconds: int,
        step: int,
        phase: int = 0,
    ) -> None:
        """One series: `value` of seconds since its beginning, up to now."""
        self.series += 1
        head = name + "{" + ",".join(f'{k}="{v}"' for k, v in labels.items() if v) + "} "
        begin = self.now - seconds + phase
        self.file.writelines(f"{head}{value(at - begin):.6g} {at}\n" for at in range(begin, self.now, step))


def flat(value: float) -> Callable[[int], float]:
    """A gauge that moves a little."""
    return lambda at: value * (1 + 0.01 * (at % 7))


def rising(rate: float) -> Callable[[int], float]:
    """A counter."""
    return lambda at: rate * at


def exported(out: Writer, size: Size) -> None:
    """What the agents export: the fast tier for the last minutes, the slow tier for ten."""

    def gauge(family: Family, labels: Mapping[str, str], value: float, phase: int, seconds: int = 0) -> None:
        fast = family.tier.value == "fast"
        out.put(family.name, labels, flat(value), seconds or (180 if fast else 600), 1 if fast else 15, phase)

    def counter(family: Family, labels: Mapping[str, str], rate: float, phase: int, suffix: str = "") -> None:
        out.put(family.name + suffix, labels, rising(rate), 600, 15, phase)

    for n in range(size.gpus):
        node, phase = n // 8, n % 13
        g = {
            "instance": f"node{node}:9955",
            "job": "gpuglass",
            "device": f"nvidia{n % 8}",
            "gpu_uuid": f"GPU-{n}",
        }
        gauge(gpu.INFO, {**g, "model": CARD}, 1, phase)
        for family, extra in (
            (gpu.UP, {}),
            (gpu.BUSY, {"source": "gpm"}),
            (gpu.GRAPHICS_ACTIVE, {}),
            (gpu.SM_ACTIVE, {}),
            (gpu.SM_OCCUPANCY, {}),
            (gpu.PIPE_ACTIVE, {"pipe": "tensor"}),
            (gpu.DRAM_ACTIVE, {}),
            (gpu.MEMORY_USED, {}),
            (gpu.POWER, {}),
            (gpu.MEMORY_TOTAL, {}),
            (gpu.POWER_LIMIT, {}),
            (gpu.TEMPERATURE, {"sensor": "gpu"}),
            (gpu.TEMPERATURE, {"sensor": "memory"}),
            (gpu.REMAPPED_ROWS, {"cause": "corrected"}),
            (gpu.REMAPPED_ROWS, {"cause": "uncorrected"}),
            (gpu.ROW_REMAP_PENDING, {}),
            (gpu.ROW_REMAP_FAILED, {}),
        ):
            gauge(family, {**g, **extra}, 0.5, phase)
        for reason in ("power_cap", "thermal_software", "thermal_hardware", "power_brake", "sync_boost"):
            counter(gpu.THROTTLE, {**g, "reason": reason}, 0.01, phase)
        for family in (gpu.PCIE_RX, gpu.PCIE_TX):
            counter(family, {**g, "source": "counter"}, 1e6, phase)
        counter(gpu.PCIE_REPLAYS, g, 0, phase)
        for link in range(18):
            for family in (gpu.NVLINK_RX, gpu.NVLINK_TX):
                counter(family, {**g, "link": str(link)}, 1e6, phase)
            counter(gpu.NVLINK_ERRORS, {**g, "link": str(link), "type": "replay"}, 0, phase)
        for kind in ("corrected", "uncorrected"):
            counter(gpu.ECC_ERRORS, {**g, "type": kind}, 0, phase)
        # Every tenth GPU is a job's, the others are engines'.
        pod = {"workload_namespace": "x", "workload_pod": f"job-{n}" if n % 10 == 9 else f"vllm-{n // 4}"}
        for family in (gpu.PROCESS_MEMORY, gpu.PROCESS_SM):
            gauge(family, {**g, **pod, "process": "python3"}, 0.5, phase)
    for node in range(size.gpus // 8):
        gauge(prices.GPU_HOUR, {"instance": f"node{node}:9955", "model": CARD, "currency": "USD"}, 4, 0)
        for tenant in range(size.tenants):
            if node < 4:  # every agent says the same; a few stand for all
                labels = {"instance": f"node{node}:9955", "tenant": f"t{tenant}"}
                gauge(engine.TENANT_GPU_QUOTA, labels, 1e5, 0)
    for n in range(size.engines):
        _engine(n, size, gauge, counter)


def _engine(n: int, size: Size, gauge: Callable[..., None], counter: Callable[..., None]) -> None:
    e = {
        **{"instance": f"node{n // 2}:9955", "job": "gpuglass", "model_name": f"model-{n % size.models}"},
        **{"engine": "0", "workload_namespace": "x", "workload_pod": f"vllm-{n}", "workload_container": "c"},
    }
    phase = n % 13
    gauge(engine.INFO, {**e, "engine_name": "vllm"}, 1, phase)
    for family, extra in (
        (engine.UP, {}),
        (engine.REQUESTS, {"state": "running"}),
        (engine.REQUESTS, {"state": "waiting"}),
        (engine.KV_POOL_BLOCKS, {}),
        (engine.KV_USED_BLOCKS, {}),
        (engine.KV_CACHED_BLOCKS, {}),
        (engine.KV_POOL_BYTES, {}),
        (engine.KV_WASTE_BYTES, {}),
        *((engine.KV_HOLDER, {"holder": str(h), "tenant": f"t{h}"}) for h in range(1, 6)),
        *((engine.EXPERT_IMBALANCE, {"layer": str(layer)}) for layer in range(60)),
        *((engine.EXPERT_RANK, {"expert_rank": str(rank)}) for rank in range(4)),
    ):
        gauge(family, {**e, **extra}, 0.5, phase)
    for family in (engine.REQUEST_FIRST_TOKEN, engine.REQUEST_DURATION, engine.REQUEST_QUEUE):
        for outcome in ("stop", "length"):
            labels = {**e, "outcome": outcome, "preempted": "false"}
            for rank, bound in enumerate((*family.buckets, float("inf"))):
                le = "+Inf" if bound == float("inf") else repr(float(bound))
                counter(family, {**labels, "le": le}, 0.1 * rank, phase, "_bucket")
            counter(family, labels, 2, phase, "_count")
            counter(family, labels, 2, phase, "_sum")
    for rank in range(4):
        worker = {**e, "rank": str(rank), "gpu_uuid": f"GPU-{4 * n + rank}", "clock": "cuda"}
        for part in ("prefill", "decode", "padding", "dummy", "unattributed"):
            counter(engine.GPU_SECONDS_BY_PART, {**worker, "part": part}, 0.15, phase)
        counter(engine.IDLE, worker, 0.05, phase)
        counter(engine.STEP, worker, 20, phase, "_count")
        counter(engine.STEP, worker, 0.8, phase, "_sum")
        gauge(engine.FRAGMENTATION, worker, 0.1, phase)
    # A tenant uses four engines.
    here = (t for t in range(size.tenants) if n in {(t + 17 * k) % size.engines for k in range(4)})
    for tenant in here:
        t = {**e, "tenant": f"t{tenant}"}
        for kind in ("prompt", "cached", "output", "recomputed"):
            counter(engine.TENANT_TOKENS, {**t, "kind": kind}, 100, phase)
        counter(engine.TENANT_GPU, t, 0.2, phase)
        gauge(engine.TENANT_KV_SHARE, t, 0.1, phase)
        for outcome in ("stop", "error"):
            counter(engine.TENANT_REQUESTS, {**t, "outcome": outcome}, 1, phase)
        counter(engine.WASTED, {**t, "reason": "abort"}, 0.01, phase)


def recorded(out: Writer, size: Size, settings: Settings) -> None:
    """Days of the records that long windows read."""
    base, slow, long = (
        int(settings.windows.interval),
        int(settings.windows.slow_interval),
        int(settings.windows.long_interval),
    )
    day, three = int(DAY), int(3 * DAY)

    def put(record: Record, labels: Mapping[str, str], seconds: int, step: int) -> None:
        out.put(record.name, labels, flat(0.5), seconds, step)

    for n in range(size.models):
        m = {"model_name": f"model-{n}"}
        for slo in ("first_token", "inter_token", "request_duration", "errors"):
            for record in (r.SLO_TOTAL, r.SLO_BAD):
                put(record, {**m, "slo": slo}, three, base)
        for record in (r.MODEL_KV_USED, r.MODEL_WAITING, r.MODEL_PREEMPTIONS, r.MODEL_PREFIX_HIT):
            put(record, m, day, base)
        put(r.MODEL_ENGINES, m, day, base)
        put(r.MODEL_TOKENS, {**m, "kind": "input"}, day, base)
        put(r.MODEL_INTER_TOKEN, {**m, "quantile": "0.99"}, day, base)
        put(r.MODEL_ACTIVE, m, day, slow)
        put(r.MODEL_PREFILL_SHARE, {**m, "model": CARD}, day, slow)
    for n in range(size.engines):
        for record in (r.ENGINE_EXPERT_IMBALANCE, r.ENGINE_EXPERT_RANK_IMBALANCE):
            put(record, {"model_name": f"model-{n % size.models}", "workload_pod": f"vllm-{n}"}, day, base)
    for n in range(size.gpus):
        put(r.DEVICE_MEMORY_ROLLUP, {"gpu_uuid": f"GPU-{n}", "model": CARD}, day, long)
        labels = {"model_name": f"model-{n // 4 % size.models}", "gpu_uuid": f"GPU-{n}", "part": "decode"}
        put(r.ENGINE_GPU_SECONDS, labels, 600, slow)
    for n in range(size.gpus // 10):
        job = {"workload_pod": f"job-{n}", "process": "python3"}
        for record in (r.WORKLOAD_SM, r.WORKLOAD_TENSOR, r.WORKLOAD_MEMORY_RATIO, r.WORKLOAD_MEMORY):
            put(record, job, 4 * 3600, slow)
    for tenant in range(size.tenants):
        for model in range(4):
            labels = {"tenant": f"t{tenant}", "model_name": f"model-{model}"}
            put(r.TENANT_GPU_SECONDS, labels, day, base)


def written(name: str, folder: Path, fill: Callable[[Writer], None], ahead: float) -> None:
    """Blocks that end now: Prometheus takes no results that are older than its blocks. `ahead` is how many
    seconds it should take to write them; if it is too little, they are written again."""
    while True:
        begun = time.time()
        text = folder / "data.om"
        with text.open("w") as file:
            out = Writer(file, int(begun + ahead))
            fill(out)
            file.write("# EOF\n")
        command = ["tsdb", "create-blocks-from", "openmetrics", str(text), str(folder / "data")]
        subprocess.run([promtool(), *command], check=True, stdout=subprocess.DEVNULL)
        took = time.time() - begun
        print(f"{name}: {out.series} series in {took:.0f} s", file=sys.stderr, flush=True)
        text.unlink()
        if took < ahead + 5:
            time.sleep(max(0.0, begun + ahead - time.time()))
            return
        shutil.rmtree(folder / "data")
        ahead = 1.2 * took


def measured(
    name: str,
    folder: Path,
    groups: Sequence[Group],
    fill: Callable[[Writer], None],
    settings: Settings,
    ahead: float,
    every: float,
) -> tuple[dict[str, float], int]:
    """Median seconds of an evaluation of each group over what `fill` writes, and how many rules failed."""
    folder.mkdir()
    rules = folder / "rules.yaml"
    rules.write_text(render("rules", [dataclasses.replace(g, interval=every) for g in groups], settings))
    written(name, folder, fill, ahead)
    seen: dict[str, dict[str, float]] = {group.name: {} for group in groups}
    failed: set[str] = set()
    config = {"rule_files": [str(rules)], "global": {"scrape_interval": "1m"}}
    flags = ("--storage.tsdb.retention.time=30d",)
    with running_prometheus(prometheus(), [], folder, config=config, flags=flags) as server:
        before, end = _spent(server.url), time.monotonic() + 90
        while time.monotonic() < end and min(map(len, seen.values())) < EVALUATIONS:
            time.sleep(0.5)
            for group in server.api("rules")["groups"]:
                if group["evaluationTime"]:
                    seen[group["name"]][group["lastEvaluation"]] = group["evaluationTime"]
                for rule in group["rules"]:
                    if rule["health"] == "err":
                        failed.add(f"{rule['name']}: {rule['lastError']}")
        cpu, wall = (after - first for after, first in zip(_spent(server.url), before, strict=True))
        results = server.query('count({__name__=~"[a-z]+:.+"})')
    print(
        f"{name}: {results[0].value:.0f} series recorded, {cpu:.1f} s of CPU in {wall:.1f} s of evaluations",
        file=sys.stderr,
    )
    for line in sorted(failed):
        print(line, file=sys.stderr)
    if short := [name for name, times in seen.items() if len(times) < 2]:
        raise SystemExit(f"{short[0]} was not evaluated twice in 90 s")
    scale = min(1.0, cpu / wall)
    return {name: scale * statistics.median([*times.values()][1:]) for name, times in seen.items()}, len(
        failed
    )


def _spent(url: str) -> tuple[float, float]:
    """Seconds of CPU that Prometheus has used, and seconds that its evaluations took."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = [
        re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        for name in ("process_cpu_seconds_total", "prometheus_rule_group_duration_seconds_sum")
    ]
    cpu, wall = (float(match[1]) if match else 0.0 for match in found)
    return cpu, wall


def prometheus() -> Path:
    """Prometheus 3 if it is built, else the distribution's."""
    return tools.PROMETHEUS.program("prometheus") or distribution.find("prometheus")


def promtool() -> Path:
    """The promtool beside it."""
    return tools.PROMETHEUS.program("promtool") or distribution.find("promtool")


def rows(groups: Iterable[Group], seconds: Mapping[str, float]) -> Iterator[tuple[str, float, float]]:
    """Group, seconds, and percent of its interval."""
    for group in groups:
        yield group.name, seconds[group.name], 100 * seconds[group.name] / group.interval


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a twelfth of the fleet, under a minute")
    quick = parser.parse_args().quick
    size = Size(80, 16, 40) if quick else Size(1000, 200, 500)
    small = Size(max(4, size.gpus // DEPTH), max(1, size.models // DEPTH), size.tenants // DEPTH)
    ahead, every = (8.0, 4.0) if quick else (100.0, 8.0)
    settings = Settings()
    groups = files.all_groups(settings)
    with tempfile.TemporaryDirectory() as folder:
        broad, failed = measured(
            "ten minutes",
            Path(folder, "broad"),
            groups,
            lambda out: exported(out, size),
            settings,
            ahead,
            every,
        )
        long = [group for group in groups if group.name in LONG]
        deep, failed_too = measured(
            "three days",
            Path(folder, "deep"),
            long,
            lambda out: recorded(out, small, settings),
            settings,
            ahead,
            every,
        )
    seconds = {**broad, **{name: max(broad[name], DEPTH * time_) for name, time_ in deep.items()}}
    figures: dict[str, float] = {}
    for name, took, percent in rows(groups, seconds):
        figures[f"{name.removeprefix('gpuglass-')}_ms"] = round(1000 * took, 1)
        print(f"{name:<32} {1000 * took:9.1f} ms {percent:6.2f} % of its interval", file=sys.stderr)
    figures["share_of_interval_percent"] = round(sum(percent for _, _, percent in rows(groups, seconds)), 2)
    figures["failed_rules"] = failed + failed_too
    return finish("rules", figures, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
