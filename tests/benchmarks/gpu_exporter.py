"""Cost of the GPU exporter: the real agent on 1, 8 and 64 GPUs of the fake driver with 8 processes each.

Measured from outside, as Prometheus meets it: scrape latency (OpenMetrics, gzip, kept connection; fast tier
each second, slow tier each 15 s in the CPU phase), CPU time of the process, resident memory, series. The peer
of the latency is prometheus_client's own server with as many samples, in the same run. Ends with one JSON
line.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import start_http_server

from gpuglass.demo.scenario import H200, Scenario
from tests.fakes.nvml import build
from tests.support.node import FakeProc
from tests.support.ports import free_port

PROCESSES = 8
ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
TARGETS = {
    "scrape_fast_p99_ms_8": "<= 10",
    "scrape_slow_p99_ms_8": "<= 10",
    "resident_mb_8": "<= 60",
    "cpu_percent_of_core_8": "<= 1",
}


def scenario(gpus: int, seconds: int, proc: FakeProc) -> Scenario:
    """Busy GPUs whose values change each second, so that nothing is cheap because it stands still."""
    random.seed(7)
    busy = Scenario().gpus(gpus, H200)
    for gpu in range(gpus):
        for process in range(PROCESSES):
            pid = 1000 + gpu * PROCESSES + process
            proc.add(
                pid,
                f"worker-{process}",
                cgroup=f"/kubepods/pod{gpu:08x}-0000-4000-8000-{process:012x}/{pid:064x}",
            )
            busy.process(gpu, pid, mem_mib=15_000 + process, sm=10)
        for second in range(0, seconds):
            load = random.random()
            busy.at(second).gpu(
                gpu,
                used_mib=int(125_000 + 10_000 * load),
                util_gpu=int(100 * load),
                power_mw=int(200_000 + 450_000 * load),
            ).gpm(gpu, dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13), 90 * load))
    return busy


@contextmanager
def agent(gpus: int, seconds: int) -> Iterator[tuple[int, int]]:
    """The agent as its users run it; gives pid and port."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        proc = FakeProc(root / "proc")
        file = scenario(gpus, seconds, proc).write(root / "scenario.txt")
        port = free_port()
        environment = {
            **os.environ,
            "FAKE_NVML_SCENARIO": str(file),
            "GPUGLASS_GPU_NVML_LIBRARY": str(build()),
            "GPUGLASS_PROC": str(proc.root),
            "GPUGLASS_ENGINES_ENABLED": "false",
            "GPUGLASS_SERVER_LISTEN": f"127.0.0.1:{port}",
        }
        command = [sys.executable, "-m", "gpuglass", "agent"]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        try:
            wait_ready(port)
            yield process.pid, port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def wait_ready(port: int) -> None:
    """Until /readyz says yes."""
    for _ in range(300):
        try:
            if Scraper(port).get("/readyz")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit("the agent did not get ready within 30 s")


class Scraper:
    """One kept connection, as Prometheus holds it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def get(self, path: str) -> tuple[int, bytes, float]:
        """Status, body as sent, and seconds to the last byte."""
        started = time.perf_counter()
        self._connection.request("GET", path, headers={"Accept": ACCEPT, "Accept-Encoding": "gzip"})
        response = self._connection.getresponse()
        body = response.read()
        return response.status, body, time.perf_counter() - started


def samples_in(body: bytes) -> int:
    """Samples of a gzipped exposition."""
    return sum(1 for line in gzip.decompress(body).splitlines() if not line.startswith(b"#"))


def latencies(port: int, path: str, count: int, spacing: float) -> tuple[list[float], int]:
    """Seconds of `count` scrapes at random moments, mean `spacing` apart, and the number of samples."""
    scraper = Scraper(port)
    times, body = [], b""
    for _ in range(count):
        time.sleep(random.uniform(0.5, 1.5) * spacing)
        status, body, seconds = scraper.get(path)
        if status != 200:
            raise SystemExit(f"{path}: status {status}")
        times.append(seconds)
    return times, samples_in(body)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process to the nanosecond: /proc/PID/stat counts in ticks of 10 ms, which is too coarse
    here."""
    cpu_clock_of_process = (~pid << 3) | 2  # as clock_getcpuclockid(3) makes it
    return time.clock_gettime(cpu_clock_of_process)


def resident_mb(pid: int) -> float:
    """Resident memory of a process in 10^6 bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def scraped(port: int) -> Iterator[None]:
    """An agent that is scraped as in production."""
    closing = threading.Event()

    def scrape(path: str, interval: float) -> None:
        scraper = Scraper(port)
        while not closing.wait(interval):
            scraper.get(path)

    threads = [
        threading.Thread(target=scrape, args=arguments)
        for arguments in (("/metrics/fast", 1.0), ("/metrics/slow", 15.0))
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        closing.set()
        for thread in threads:
            thread.join()


def cpu_share(pid: int, port: int, seconds: float) -> float:
    """Share of one core that the process uses while it is scraped as in production."""
    with scraped(port):
        before, started = cpu_seconds(pid), time.monotonic()
        time.sleep(seconds)
        return (cpu_seconds(pid) - before) / (time.monotonic() - started)


def peer_latencies(samples: int, count: int, spacing: float) -> list[float]:
    """The same scrape of prometheus_client's own server with as many samples of the same shape."""
    registry = CollectorRegistry()
    gauge = Gauge("peer_value", "A value of the peer.", ["device", "gpu_uuid", "field"], registry=registry)
    for index in range(samples):
        gauge.labels(f"nvidia{index % 8}", f"GPU-5c0ffee0-0000-4000-8000-{index % 8:012x}", str(index)).set(
            index / 7
        )
    port = free_port()
    server, thread = start_http_server(port, "127.0.0.1", registry)
    try:
        return latencies(port, "/metrics", count, spacing)[0]
    finally:
        server.shutdown()
        thread.join()


def quantile(values: list[float], q: float) -> float:
    """Milliseconds at a quantile."""
    return round(1000 * sorted(values)[min(len(values) - 1, int(q * len(values)))], 2)


def measure(gpus: int, quick: bool) -> dict[str, float]:
    """Figures of one number of GPUs."""
    scrapes, cpu_time = (40, 8.0) if quick else (200, 60.0)
    figures: dict[str, float] = {}
    with agent(gpus, 40 if quick else 150) as (pid, port):
        time.sleep(2)
        share = cpu_share(pid, port, cpu_time)
        fast, fast_samples = latencies(port, "/metrics/fast", scrapes, 0.1)
        slow, slow_samples = latencies(port, "/metrics/slow", scrapes // 2, 0.2)
        figures |= {
            "scrape_fast_p50_ms": quantile(fast, 0.5),
            "scrape_fast_p99_ms": quantile(fast, 0.99),
            "scrape_slow_p50_ms": quantile(slow, 0.5),
            "scrape_slow_p99_ms": quantile(slow, 0.99),
            "series_fast": fast_samples,
            "series_slow": slow_samples,
            "cpu_percent_of_core": round(100 * share, 3),
            "cpu_seconds_per_gpu_hour": round(3600 * share / gpus, 2),
            "resident_mb": round(resident_mb(pid), 1),
        }
    peer = peer_latencies(slow_samples, scrapes // 4, 0.1)
    figures["peer_slow_p50_ms"] = quantile(peer, 0.5)
    figures["slow_p50_vs_peer"] = round(statistics.median(slow) / statistics.median(peer), 3)
    return {f"{name}_{gpus}": value for name, value in figures.items()}


def missed(figures: dict[str, float]) -> list[str]:
    """Targets that the figures do not meet."""
    return [
        name for name, target in TARGETS.items() if not figures[name] <= float(target.removeprefix("<= "))
    ]


def main() -> int:
    """Measure, report progress on standard error, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="under a minute, less exact")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], help="numbers of GPUs")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    for gpus in arguments.gpus:
        print(f"{gpus} GPUs …", file=sys.stderr)
        figures |= measure(gpus, arguments.quick)
    targets = {name: target for name, target in TARGETS.items() if name in figures}
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
    result = {
        "benchmark": "gpu_exporter",
        "machine": machine,
        "figures": figures,
        "targets": targets,
        "missed": [name for name in missed(figures) if name in targets] if targets else [],
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
