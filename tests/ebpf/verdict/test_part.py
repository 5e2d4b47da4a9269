"""The part in the agent: what a tracer and a worker say becomes samples; hosts' threads; errors stay here."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from ebpf.verdict.part import PUBLISH_EVERY, CudaPart
from ebpf.verdict.threads import HostThreads
from exporters.vllm.ledger import Ledger
from exporters.vllm.relay import Relay
from exporters.vllm.sink import Sender
from gpuglass import catalog
from gpuglass.config import Config
from gpuglass.family import Owner, Tier
from gpuglass.procfs import ProcFs
from gpuglass.record_hub import Allocation, RecordHub, Speaker
from gpuglass.store import Store, negotiate
from gpuglass_vllm import records
from tests.support.node import FakeProc

GIB, SECOND = 1 << 30, 1_000_000_000
UNIX = 1_790_000_000
TRACE = "0af7651916cd43dd8448eb211c80319c"


class World:
    """A part with a real ledger before it, and senders without sockets."""

    def __init__(self, tmp_path: Path) -> None:
        self.now = 1000 * SECOND
        self.proc = FakeProc(tmp_path / "proc")
        self.hub, self.store = RecordHub(), Store(catalog.owned_by(Owner.AGENT))
        config = Config(proc=str(self.proc.root))
        self.part = CudaPart(config, self.store, self.hub, lambda: self.now, lambda: UNIX + self.now / SECOND)
        self.relay = Relay(Ledger(clock=lambda: self.now), self.hub)
        self._number = 0

    def connect(self, role: str, pid: int) -> Sender:
        """A process that has said hello."""
        self._number += 1
        hello = records.Hello(
            **{"version": 1, "sender": f"s{self._number}", "instance": "one", "role": role},
            **{"engine_name": "vllm", "engine_version": "1", "software": "test", "model_name": "m"},
            rank=0 if role == "worker" else -1,
            clock_offset_ns=UNIX * SECOND,
        )  # type: ignore[arg-type]
        sender = Sender(self._number, hello, pid, 0, 0, self.now)
        self.relay.hello(sender)
        return sender

    def tell(self, sender: Sender, *told: records.Record) -> None:
        """Records, now."""
        for record in told:
            self.relay.take(sender, record, self.now)

    def scrape(self, seconds: int = 5) -> str:
        """The exposition after some seconds."""
        for _ in range(max(seconds, PUBLISH_EVERY)):
            self.now += SECOND
            self.part.round()
        accept = "application/openmetrics-text;version=1.0.0"
        return self.store.exposition(frozenset(Tier), negotiate(accept)).decode()


def process(at: int, live: float, pid: int = 50, **more: Any) -> records.CudaProcess:
    return records.CudaProcess(
        at=at,
        pid=pid,
        start_ticks=100,
        name="python3",
        memory=[records.CudaMemory(kind="device", live_bytes=int(live))],
        stacks=[records.CudaOwner(stack=7, kind="device", live_bytes=int(live))],
        tracking_since_ns=0,
        **more,
    )


def test_a_leak_is_in_the_metrics_with_its_stack(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.proc.add(50, "engine")
    tracer = world.connect(records.TRACER, 9)
    world.tell(tracer, records.CudaStack(stack=7, frames=["cuMemAlloc_v2 (libcuda.so.1)", "grow (leaky.so)"]))
    for n in range(80):
        world.now = (1000 + 15 * n) * SECOND
        world.tell(tracer, process(world.now, 20 * GIB + n * 15 * GIB / 3600))
    text = world.scrape()
    labels = 'kind="device",pid="50",process="engine"'
    assert f"gpuglass_cuda_leak_suspected{{{labels}}} 1.0" in text
    assert 'stack="cuMemAlloc_v2 (libcuda.so.1) < grow (leaky.so)"' in text
    rate = next(line for line in text.splitlines() if line.startswith("gpuglass_cuda_leak_bytes_per_second{"))
    assert abs(float(rate.split()[-1]) * 3600 / GIB - 1) < 0.05
    assert "gpuglass_cuda_tracers 1.0" in text


def test_learning_says_neither_yes_nor_no(tmp_path: Path) -> None:
    world = World(tmp_path)
    tracer = world.connect(records.TRACER, 9)
    world.tell(tracer, process(world.now, GIB))
    text = world.scrape()
    assert "gpuglass_cuda_leak_suspected{" not in text
    assert 'state="learning"' in text and 'process="python3"' in text


def test_who_ran_when_memory_ran_out_is_an_exemplar_and_the_batch_is_told(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.proc.add(50, "engine")
    (world.proc.root / "50" / "status").write_text("NSpid:\t50\n")
    heard: list[Allocation] = []

    class Bridge:
        def arrived(self, speaker: Speaker) -> None: ...
        def gone(self, speaker: Speaker) -> None: ...
        def heard(self, speaker: Speaker, record: Any, now_ns: int) -> None:
            heard.append(record)

    world.hub.listen((Allocation,), Bridge())
    frontend, worker = world.connect("frontend", 40), world.connect("worker", 50)
    tracer = world.connect(records.TRACER, 9)
    at = world.now
    world.tell(frontend, records.RequestStart(at=at, request_id="big", trace_id=TRACE))
    world.tell(
        tracer,
        records.CudaEvent(
            **{"at": at + 50, "begin_ns": at + 40, "pid": 50, "tid": 50, "function": "cuMemAlloc"},
            **{"kind": "device", "bytes": GIB, "code": 2, "reason": "failure"},
        ),  # type: ignore[arg-type]
    )
    world.tell(
        worker,
        records.StepSample(
            **{"at": at + 100, "begin_ns": at, "step": 3, "tid": 50, "kind": "eager"},
            request_ids=["big", "small"],
            tokens=[512, 1],
        ),  # type: ignore[arg-type]
    )
    text = world.scrape()
    line = next(line for line in text.splitlines() if line.startswith("gpuglass_cuda_event_failures_total{"))
    assert 'code="out_of_memory"' in line and 'process="engine"' in line
    assert f'{{link="exact",request_id="big",trace_id="{TRACE}"}}' in line
    (told,) = heard
    assert (told.link, told.step, told.batch) == ("exact", 3, (("big", 512), ("small", 1)))


def test_growth_in_step_with_requests_is_per_request(tmp_path: Path) -> None:
    world = World(tmp_path)
    tracer, core = world.connect(records.TRACER, 9), world.connect("core", 50)
    for n in range(90):
        world.now = (1000 + 15 * n) * SECOND
        for k in range(15):
            world.tell(
                core,
                records.RequestEnd(at=world.now, request_id=f"{n}-{k}", outcome="stop", arrival_ns=world.now),
            )
        world.tell(tracer, process(world.now, 20 * GIB + n * 15 * GIB / 3600))
    line = next(x for x in world.scrape().splitlines() if x.startswith("gpuglass_cuda_leak_request_bytes{"))
    assert abs(float(line.split()[-1]) / (GIB / 3600) - 1) < 0.1


def test_a_tracer_is_no_engine(tmp_path: Path) -> None:
    world = World(tmp_path)
    tracer = world.connect(records.TRACER, 9)
    world.tell(tracer, process(world.now, GIB))
    world.relay.gone(tracer)
    assert not world.relay._ledger.servers
    assert "gpuglass_cuda_tracers 0.0" in world.scrape()


def test_an_error_of_a_listener_does_not_reach_the_receiver(tmp_path: Path) -> None:
    world = World(tmp_path)

    class Broken:
        def arrived(self, speaker: Speaker) -> None:
            raise RuntimeError

        def gone(self, speaker: Speaker) -> None:
            raise RuntimeError

        def heard(self, speaker: Speaker, record: Any, now_ns: int) -> None:
            raise RuntimeError

    world.hub.listen((records.CudaProcess,), Broken())
    tracer = world.connect(records.TRACER, 9)
    world.tell(tracer, process(world.now, GIB))
    world.relay.gone(tracer)


def test_threads_are_translated_from_a_containers_numbers(tmp_path: Path) -> None:
    proc = FakeProc(tmp_path / "proc")
    proc.add(500)
    (proc.root / "500" / "status").write_text("NSpid:\t500\t7\n")
    for tid, inner in ((500, 7), (501, 8)):
        (proc.root / "500" / "task" / str(tid)).mkdir(parents=True)
        (proc.root / "500" / "task" / str(tid) / "status").write_text(f"NSpid:\t{tid}\t{inner}\n")
    threads = HostThreads(ProcFs(proc.root))
    assert [threads.find(500, tid) for tid in (7, 8, 9)] == [500, 501, 0]
    assert threads.find(0, 7) == 0 and threads.find(600, 7) == 0


def test_real_threads_of_this_process_keep_their_numbers() -> None:
    found: list[tuple[int, int]] = []
    threads = HostThreads(ProcFs())

    def look() -> None:
        tid = threading.get_native_id()
        found.append((tid, threads.find(os.getpid(), tid)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found[0][0] == found[0][1] != os.getpid()
