"""Cost of the record stream: the real agent hearing 16 engines with 256 running requests each.

Each engine is three senders (frontend, core, worker) that flush four times a second, as gpuglass-vllm does:
progress of every request, GPU time, steps, tenants, experts, and requests that come and go. Three phases:
memory with 10,000 open requests; 20,000 records per second while Prometheus' scrapes go on, with nothing
lost; and as fast as it goes. The peer is the bare decoding of the same packets in a loop, in the same run.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from gpuglass_vllm import records
from tests.benchmarks.gpu_exporter import cpu_seconds, resident_mb, scraped, wait_ready
from tests.support.ports import free_port

RATE = 20_000
ENGINES = 16
RUNNING = 256
OPEN = 10_000
FLUSH = 0.25
TENANTS = [f"tenant-{number:02d}" for number in range(20)]
TARGETS = {
    "open_requests_seen": f">= {OPEN}",
    "records_per_second": f">= {RATE}",
    "records_lost": "<= 0",
    "tokens_lost": "<= 0",
    "cpu_percent_of_core": "<= 100",
    "resident_mb_10000_open": "<= 150",
}
ENCODER = msgspec.msgpack.Encoder()


@contextmanager
def agent(folder: Path) -> Iterator[tuple[int, int, str]]:
    """The agent as its users run it, but without a GPU; gives pid, port and socket."""
    port, path = free_port(), str(folder / "agent.sock")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GPUGLASS_")},
        "GPUGLASS_GPU_ENABLED": "false",
        "GPUGLASS_ENGINES_SOCKET": path,
        "GPUGLASS_ENGINES_LIMITS_RECORDS_PER_SECOND": "100000",
        "GPUGLASS_ENGINES_LIMITS_KILOBYTES_PER_SECOND": "100000",
        "GPUGLASS_SERVER_LISTEN": f"127.0.0.1:{port}",
    }
    command = [sys.executable, "-m", "gpuglass", "agent"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_ready(port)
        yield process.pid, port, path
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@dataclass
class Connection:
    """One sender."""

    connected: socket.socket
    seq: int = 0
    acknowledged: int = 0
    sent: int = 0
    full: int = 0

    @classmethod
    def to(cls, path: str, role: str, engine: int, **more: Any) -> Connection:
        """Connect and say hello."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connected.connect(path)
        connection = cls(connected)
        connection.send(
            [
                records.Hello(
                    version=1,
                    sender=f"{role}-{engine}-{os.getpid()}",
                    instance=f"instance-{engine}",
                    role=role,
                    engine_name="vllm",
                    engine_version="0.32.0",
                    software="benchmark/1",
                    model_name=f"model-{engine}",
                    clock_offset_ns=time.time_ns() - time.monotonic_ns(),
                    **more,
                )
            ]
        )
        return connection

    def send(self, items: list[records.Record], sums: bool = False) -> None:
        """Send records in packets that fit; waits for room and counts that."""
        for first in range(0, len(items), 256):
            part = items[first : first + 256]
            if sums:
                self.seq += 1
            packet = ENCODER.encode({"seq": self.seq if sums else 0, "records": part})
            try:
                self.connected.send(packet, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self.full += 1
                self.connected.send(packet)
            self.sent += len(part)
        self.read_acks()

    def read_acks(self, flags: int = socket.MSG_DONTWAIT) -> None:
        """Take note of acknowledgements."""
        while self.acknowledged < self.seq:
            try:
                data = self.connected.recv(256, flags)
            except BlockingIOError:
                return
            self.acknowledged = msgspec.msgpack.decode(data, type=records.Ack).ack


@dataclass
class Engine:
    """Plays one engine."""

    number: int
    path: str
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    open: list[str] = field(default_factory=list)
    tokens: int = 0
    _next: int = 0

    def __post_init__(self) -> None:
        pool = records.Pool(blocks=20_000, block_bytes=1 << 21, block_tokens=16)
        experts = records.Experts(layers=list(range(1, 27)), experts=64, top_k=6, every=4)
        self.frontend = Connection.to(self.path, "frontend", self.number)
        self.core = Connection.to(self.path, "core", self.number, pool=pool)
        self.worker = Connection.to(self.path, "worker", self.number, rank=0, experts=experts)

    @property
    def senders(self) -> tuple[Connection, ...]:
        """Its three connections."""
        return self.frontend, self.core, self.worker

    def start(self, count: int) -> None:
        """Let requests come."""
        now = time.monotonic_ns()
        started: list[records.Record] = []
        for _ in range(count):
            self._next += 1
            name = f"cmpl-{self.number}-{self._next:08d}-{self.rng.randrange(16**8):08x}-0"
            self.open.append(name)
            started.append(
                records.RequestStart(
                    at=now,
                    request_id=name,
                    external_id=name[:-2],
                    tenant=self.tenant(name),
                    trace_id=f"{self.rng.randrange(16**32):032x}",
                    sampled=True,
                    prompt_tokens=1000,
                    max_tokens=500,
                )
            )
        self.frontend.send(started)

    def tenant(self, name: str) -> str:
        """A request's tenant."""
        return TENANTS[hash(name) % len(TENANTS)]

    def progress(self) -> list[records.Record]:
        """State of all open requests."""
        now = time.monotonic_ns()
        return [
            records.RequestProgress(
                at=now,
                request_id=name,
                tenant=self.tenant(name),
                running=True,
                blocks=70.5 + index % 7,
                peak_blocks=80.0,
                computed_tokens=1100 + index,
                output_tokens=100 + index,
            )
            for index, name in enumerate(self.open)
        ]

    def flush(self, ended: int) -> None:
        """One flush of all roles, with some requests that end and as many that come."""
        now = time.monotonic_ns()
        done, self.open = self.open[:ended], self.open[ended:]
        self.start(ended)
        self.core.send(
            [
                *self.progress(),
                *(
                    records.RequestEnd(
                        at=now,
                        request_id=name,
                        outcome="stop",
                        tenant=self.tenant(name),
                        arrival_ns=now - 10**10,
                        queue_ns=10**7,
                        prefill_ns=10**8,
                        decode_ns=9 * 10**9,
                        prompt_tokens=1000,
                        output_tokens=450,
                        peak_blocks=90.0,
                        kv_block_ns=8e11,
                    )
                    for name in done
                ),
                records.PoolState(at=now, used_blocks=18_000, running=RUNNING, waiting=10),
            ]
        )
        self.frontend.send(
            [
                records.RequestAnswered(
                    at=now, request_id=name, outcome="stop", duration_ns=10**10, first_token_ns=10**8
                )
                for name in done
            ]
        )
        self.core.send(
            [
                records.TenantSums(
                    tenant=tenant, kv_block_ns=1e9, prompt_tokens=100, output_tokens=7, requests={"stop": 1}
                )
                for tenant in TENANTS
            ],
            sums=True,
        )
        self.tokens += 7 * len(TENANTS)
        self.worker.send(
            [
                records.GpuProgress(
                    at=now,
                    request_ids=self.open,
                    gpu_ns=[1e6 * index for index in range(len(self.open))],
                    ended=done,
                ),
                records.AllocatorState(at=now, allocated=1, active=1, reserved=2, inactive_split=1),
            ]
        )
        self.worker.send(
            [
                *(records.TenantSums(tenant=tenant, gpu_ns=1e7) for tenant in TENANTS),
                records.StepSums(
                    clock="cuda",
                    steps=10,
                    attributed_ns=2e8,
                    seconds=[10] + [0] * 17,
                    requests=[0] * 11 + [10] + [0] * 4,
                    request_steps=10 * RUNNING,
                ),
                records.ExpertSums(first=0, counts=bytes(26 * 64 * 4), counted_tokens=0, seen_tokens=0),
            ],
            sums=True,
        )


def value(port: int, name: str, **labels: str) -> float:
    """Sum of the samples of one scrape that have these labels."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(
        sample.value
        for metric in text_string_to_metric_families(text)
        for sample in metric.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def settled(port: int, name: str, expected: float, seconds: float, **labels: str) -> float:
    """A value when it has come to what is expected, or after some seconds."""
    until = time.monotonic() + seconds
    while (found := value(port, name, **labels)) < expected and time.monotonic() < until:
        time.sleep(0.5)
    return found


def memory(folder: Path) -> dict[str, float]:
    """Resident memory before anything is heard and with 10,000 open requests of one engine."""
    with agent(folder) as (pid, port, path):
        time.sleep(2)
        idle = resident_mb(pid)
        engine = Engine(0, path)
        engine.start(OPEN)
        for _ in range(3):
            engine.core.send(engine.progress())
            time.sleep(1)
        names = engine.open
        for first in range(0, OPEN, 500):
            part = names[first : first + 500]
            engine.worker.send(
                [records.GpuProgress(at=time.monotonic_ns(), request_ids=part, gpu_ns=[1e9] * len(part))]
            )
        time.sleep(7)  # a slow round and some fast ones
        value(port, "gpuglass_receiver_up")
        seen = value(port, "gpuglass_requests_tracked")
        return {
            "resident_mb_idle": round(idle, 1),
            "resident_mb_10000_open": round(resident_mb(pid), 1),
            "open_requests_seen": seen,
        }


def throughput(folder: Path, seconds: float) -> dict[str, float]:
    """The given rate for some seconds, with scrapes; then as fast as it goes."""
    with agent(folder) as (pid, port, path):
        engines = [Engine(number, path) for number in range(ENGINES)]
        for engine in engines:
            engine.start(RUNNING)
        senders = [sender for engine in engines for sender in engine.senders]
        per_flush = RUNNING + 1 + 2 + 2 * len(TENANTS) + 2
        # Three records for each request that ends and is replaced, so that the rate is met exactly.
        ended = max(1, round((RATE * FLUSH / ENGINES - per_flush) / 3))
        figures = {"requests_ended_per_second": ended * ENGINES / FLUSH}
        figures |= _at_rate(pid, port, engines, senders, ended, seconds)
        figures |= _at_peak(pid, port, engines, senders, ended, seconds / 2)
        return figures


def _at_rate(
    pid: int, port: int, engines: list[Engine], senders: list[Connection], ended: int, seconds: float
) -> dict[str, float]:
    with scraped(port):
        before, cpu, start = sum(sender.sent for sender in senders), cpu_seconds(pid), time.monotonic()
        flushes = int(seconds / FLUSH)
        for number in range(flushes):
            for place, engine in enumerate(engines):
                # Engines flush at different moments.
                due = start + FLUSH * (number + place / len(engines))
                time.sleep(max(0.0, due - time.monotonic()))
                engine.flush(ended)
        elapsed = time.monotonic() - start
        sent = sum(sender.sent for sender in senders)
        used = cpu_seconds(pid) - cpu
    for sender in senders:
        sender.read_acks(0)
    tokens = sum(engine.tokens for engine in engines)
    taken = settled(port, "gpuglass_receiver_records_total", sent, 15)
    counted = settled(port, "gpuglass_tenant_tokens_total", tokens, 15, kind="output")
    count = value(port, "gpuglass_receiver_lag_seconds_count")
    return {
        "records_per_second": round((sent - before) / elapsed),
        "records_lost": sent - taken,
        "tokens_lost": tokens - counted,
        "times_a_socket_was_full": sum(sender.full for sender in senders),
        "cpu_percent_of_core": round(100 * used / elapsed, 1),
        "cpu_us_per_record": round(1e6 * used / (sent - before), 2),
        "lag_mean_ms": round(1e3 * value(port, "gpuglass_receiver_lag_seconds_sum") / count, 2),
        "resident_mb_16_engines": round(resident_mb(pid), 1),
    }


def _at_peak(
    pid: int, port: int, engines: list[Engine], senders: list[Connection], ended: int, seconds: float
) -> dict[str, float]:
    """As fast as sockets take it: a full one makes this process wait for the agent."""
    before, cpu, start = sum(sender.sent for sender in senders), cpu_seconds(pid), time.monotonic()
    while time.monotonic() < start + seconds:
        for engine in engines:
            engine.flush(ended)
    for sender in senders:
        sender.read_acks(0)
    elapsed, used = time.monotonic() - start, cpu_seconds(pid) - cpu
    sent = sum(sender.sent for sender in senders)
    lost = sent - settled(port, "gpuglass_receiver_records_total", sent, 15)
    return {
        "peak_records_per_second": round((sent - before) / elapsed),
        "peak_cpu_percent_of_core": round(100 * used / elapsed, 1),
        "peak_records_lost": lost,
    }


def bare_decode_us() -> float:
    """Microseconds that msgspec alone takes for a record of the most frequent kind."""
    item = records.RequestProgress(
        at=1, request_id="cmpl-1-00000001-abcdef01-0", tenant="tenant-01", blocks=70.5, peak_blocks=80.0
    )
    packet = ENCODER.encode({"seq": 0, "records": [item] * 256})
    packets = msgspec.msgpack.Decoder(records.Packet)
    decoder: msgspec.msgpack.Decoder[records.Record] = msgspec.msgpack.Decoder(records.Record)
    best = float("inf")
    for _ in range(200):
        start = time.perf_counter()
        for raw in packets.decode(packet).records:
            decoder.decode(raw)
        best = min(best, time.perf_counter() - start)
    return 1e6 * best / 256


def missed(figures: dict[str, float]) -> list[str]:
    """Targets that the figures do not meet."""
    found = []
    for name, target in TARGETS.items():
        sign, bound = target.split()
        # A rate of 20,000 that is kept up is a little under it for the last flush.
        if figures[name] > float(bound) if sign == "<=" else figures[name] < 0.99 * float(bound):
            found.append(name)
    return found


def main() -> int:
    """Measure, report progress on standard error, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="under a minute, less exact")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("memory …", file=sys.stderr)
        figures = memory(Path(folder))
        print("throughput …", file=sys.stderr)
        figures |= throughput(Path(folder), 10.0 if arguments.quick else 60.0)
    bare = bare_decode_us()
    figures["bare_decode_us_per_record"] = round(bare, 2)
    figures["cpu_vs_bare_decode"] = round(figures["cpu_us_per_record"] / bare, 1)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
    result = {
        "benchmark": "vllm_receiver",
        "machine": machine,
        "figures": figures,
        "targets": TARGETS,
        "missed": missed(figures),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
