"""Cost of the anomaly sidecar, from the HTTP answer of a real Prometheus to the exposed score, on one core.

Blocks with 7 days of 10,000 series at 5 minutes are made with promtool and served by Prometheus. A
process of its own reads them as the sidecar does at its first start, then evaluates cycle after cycle and
renders the exposition; its CPU time and resident memory are taken. 100,000 series are ten expressions'
worth of the same. Prophet, in an environment of its own, fits and predicts some of the same series in the
same run. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import numpy as np

from anomaly_sidecar.config import PrometheusConfig
from anomaly_sidecar.interface import Query
from anomaly_sidecar.reader import Reader
from anomaly_sidecar.replay import spec_of
from anomaly_sidecar.scores import Scores
from anomaly_sidecar.unit import Instant, Probe, Range, Unit
from gpuglass import catalog
from gpuglass.demo import distribution
from gpuglass.family import Batch, Owner, Tier
from gpuglass.self_metrics import resident_bytes
from gpuglass.store import Store, negotiate
from tests.support import bench, history, tools
from tests.support.prometheus import running_prometheus

TARGETS = {
    "cycle_cpu_seconds_10000": "<= 0.5",
    "resident_mb_10000": "<= 300",
    "cold_start_cpu_seconds_10000": "<= 60",
    "cycle_cpu_seconds_100000": "<= 5",
    "scored_share_10000": ">= 0.99",
}
NAME = "bench_load"
STEP = 300.0
OPENMETRICS = negotiate("application/openmetrics-text;version=1.0.0")


def cpu() -> float:
    """CPU seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mb() -> float:
    """Highest resident memory since this program began; ru_maxrss knows that of who started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def child(url: str, end: float, days: float, cycles: int, copies: int) -> dict[str, float]:
    """What the sidecar does, in this process: cold start, cycles, and with `copies` as many series."""
    reader = Reader(PrometheusConfig(url=url))
    query = Query(
        "load",
        NAME,
        history=days * 86_400,
        history_step=STEP,
        offset=0.0,
        min_relative_deviation=0.02,
        limit=20_000,
    )
    store = Store(catalog.owned_by(Owner.ANOMALY))
    unit = Unit(spec_of(query, 86_400.0), Scores(query))
    first = end - cycles * query.interval
    started, at = cpu(), time.perf_counter()
    wait = unit_run(reader, unit, first)
    figures = {
        "cold_start_cpu_seconds": cpu() - started,
        "cold_start_seconds": time.perf_counter() - at,
        "cold_start_waiting_seconds": wait,
        "cold_start_peak_mb": peak_mb(),
        "series": len(unit.table),
    }
    costs = []
    for number in range(1, cycles + 1):
        started = cpu()
        unit.take(Instant(first + number * 60), {"value": reader.instant(NAME, first + number * 60)})
        expose(store, unit)
        costs.append(cpu() - started)
    figures["cycle_cpu_seconds"] = float(np.median(costs))
    figures["cycle_cpu_seconds_worst"] = max(costs)
    figures["resident_mb"] = (resident_bytes() or 0) / 2**20
    figures["scored_share"] = len(unit.lines[_score()].heads) / max(1, len(unit.table))
    if copies > 1:
        figures |= {f"{name}_all": value for name, value in many(reader, unit, end, copies).items()}
    return figures


def unit_run(reader: Reader, unit: Unit, until: float) -> float:
    """Read history and the present; gives the seconds spent waiting for the server."""
    waited = 0.0
    while (request := unit.plan(until, 11_000, 500_000)) is not None:
        at, busy = time.perf_counter(), cpu()
        answer: Any
        if isinstance(request, Range):
            answer = reader.range(NAME, request.start, request.end, request.step)
        else:
            answer = reader.instant(NAME, request.at)
        waited += max(0.0, time.perf_counter() - at - (cpu() - busy))
        unit.take(request, {"value": answer})
        if isinstance(request, Probe):
            continue
    return waited


def _score() -> Any:
    from gpuglass.families import anomaly

    return anomaly.SCORE


def expose(store: Store, unit: Unit) -> bytes:
    """Publish and render, as a scrape gets it."""
    store.publish("anomaly", Batch(), unit.lines)
    return store.exposition(frozenset(Tier), OPENMETRICS)


def many(reader: Reader, small: Unit, end: float, copies: int) -> dict[str, float]:
    """Cycles of `copies` times the series: the server labels them apart, and what was learned is repeated."""
    one = 'label_replace({0}, "copy", "{1}", "", "")'
    expression = " or ".join(one.format(NAME, number) for number in range(copies))
    query = Query("load", expression, offset=0.0, min_relative_deviation=0.02, limit=200_000)
    unit = Unit(spec_of(query, 86_400.0), Scores(query))
    store = Store(catalog.owned_by(Owner.ANOMALY))
    unit.take(Instant(end), {"value": reader.instant(expression, end)})
    learned = small.analyzer.save().arrays
    used = small.table.rows()
    order = np.tile(used, copies)
    state = unit.analyzer.save()
    for name, array in state.arrays.items():
        array[..., : len(order)] = learned[name][..., order]
    del learned
    costs = []
    for number in range(1, 4):
        started = cpu()
        at = end + number
        unit.take(Instant(at), {"value": reader.instant(expression, at)})
        expose(store, unit)
        costs.append(cpu() - started)
    return {
        "series": len(unit.table),
        "cycle_cpu_seconds": float(np.median(costs)),
        "resident_mb": (resident_bytes() or 0) / 2**20,
        "scored_share": len(unit.lines[_score()].heads) / len(unit.table),
    }


PROPHET = """
import json, sys, time, logging, resource
logging.disable(logging.CRITICAL)
import pandas as pd
from prophet import Prophet
def cpu():  # the fit itself runs in a process of its own
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
times, series = json.load(open(sys.argv[1]))
fit = predict = 0.0
for values in series:
    frame = pd.DataFrame({"ds": pd.to_datetime(times, unit="s"), "y": values})
    at = cpu()
    model = Prophet().fit(frame)
    fit += cpu() - at
    at = cpu()
    model.predict(pd.DataFrame({"ds": [frame.ds.iloc[-1] + pd.Timedelta(minutes=5)]}))
    predict += cpu() - at
print(json.dumps([fit / len(series), predict / len(series)]))
"""


def prophet(
    folder: Path, times: np.ndarray[Any, Any], values: np.ndarray[Any, Any]
) -> tuple[float, float] | None:
    """CPU seconds per series to fit and to predict; None where it cannot be installed."""
    environment = distribution.cache_folder() / "prophet"
    python = environment / "bin/python"
    if not (environment / "ready").is_file():
        venv.create(environment, with_pip=True, clear=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", "prophet"], capture_output=True, text=True
        )
        if done.returncode:
            print(f"no Prophet: {done.stderr.strip()[-200:]}", file=sys.stderr)
            return None
        (environment / "ready").touch()
    data = folder / "prophet.json"
    data.write_text(json.dumps([times.tolist(), values.T.tolist()]))
    command = [python, "-c", PROPHET, data]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"Prophet failed: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return None
    fit, predict = json.loads(done.stdout.strip().splitlines()[-1])
    return fit, predict


def main() -> int:
    """Measure, report on standard error, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="1,000 series of 2 days, and no 100,000")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        url, end, days, cycles, copies = arguments.child
        print(json.dumps(child(url, float(end), float(days), int(cycles), int(copies))))
        return 0
    series, days = (1_000, 2.0) if arguments.quick else (10_000, 7.0)
    program = tools.PROMETHEUS.program("prometheus") or distribution.find("prometheus")
    promtool = tools.PROMETHEUS.program("promtool") or distribution.find("promtool")
    end = time.time() // 3600 * 3600
    times = np.arange(end - (days + 0.25) * 86_400, end + 1, STEP)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = history.daily(series, times)
        labels = [
            {
                "instance": f"10.0.{number // 250}.{number % 250}:9955",
                "gpu_uuid": f"GPU-{number:08x}",
                "pod": f"engine-{number}",
            }
            for number in range(series)
        ]
        print(f"writing {values.size / 1e6:.1f} M samples …", file=sys.stderr)
        history.write(folder, promtool, NAME, labels, times, values)
        flags = (history.RETENTION, "--query.max-samples=200000000")
        print("measuring …", file=sys.stderr)
        with running_prometheus(program, [], folder, flags=flags) as server:
            command = [sys.executable, __file__, "--child", server.url, str(end), str(days), "10"]
            command.append("1" if arguments.quick else "10")
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures = json.loads(done.stdout)
        size = f"_{series}"
        result = {
            f"{key.removesuffix('_all')}{'_100000' if key.endswith('_all') else size}": value
            for key, value in figures.items()
        }
        peer = prophet(folder, times, values[:, : 3 if arguments.quick else 10])
    if peer is not None:
        fit, predict = peer
        result["prophet_fit_seconds"], result["prophet_predict_seconds"] = fit, predict
        result["prophet_fit_factor"] = fit * series / figures["cold_start_cpu_seconds"]
        result["prophet_predict_factor"] = predict * series / figures["cycle_cpu_seconds"]
        print(
            f"Prophet would fit these {series} series in {fit * series:.0f} s; the sidecar has read and "
            f"learned them in {figures['cold_start_cpu_seconds']:.1f} s, "
            f"{result['prophet_fit_factor']:.0f} times faster",
            file=sys.stderr,
        )
    return bench.finish("anomaly_speed", {key: round(value, 4) for key, value in result.items()}, TARGETS)


if __name__ == "__main__":
    raise SystemExit(main())
