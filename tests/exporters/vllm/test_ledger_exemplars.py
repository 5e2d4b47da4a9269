"""From an engine's records to a real Prometheus: exemplars arrive with the trace ids that were sent."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpuglass.demo.scenario import H200, Scenario
from gpuglass.families import engine as families
from gpuglass.family import Family, Kind
from gpuglass_vllm import records
from tests.support.agent import running_agent
from tests.support.prometheus import Prometheus, running_prometheus

BIG_TRACE = "0af7651916cd43dd8448eb211c80319c"
SMALL_TRACE = "1bf7651916cd43dd8448eb211c80319c"


class Engine:
    """One role of a made engine: says hello, then what it is told to, over the agent's real socket."""

    def __init__(self, path: Path, role: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(5)
        self._socket.connect(str(path))
        self._seq = 0
        hello = records.Hello(
            version=records.VERSION,
            sender=f"made-{role}",
            instance="made",
            role=role,
            engine_name="made",
            engine_version="1",
            software="test",
            model_name="tiny",
            clock_offset_ns=time.time_ns() - time.monotonic_ns(),
            pool=records.Pool(blocks=130, block_bytes=4096, block_tokens=16) if role == "core" else None,
        )
        self.tell(hello)

    def tell(self, *told: records.Record) -> None:
        """Events and states."""
        self._socket.send(msgspec.msgpack.encode({"seq": 0, "records": told}))

    def add(self, *told: records.Record) -> None:
        """Sums; waits until they are acknowledged."""
        self._seq += 1
        self._socket.send(msgspec.msgpack.encode({"seq": self._seq, "records": told}))
        while msgspec.msgpack.decode(self._socket.recv(1 << 16), type=records.Ack).ack < self._seq:
            pass

    def close(self) -> None:
        self._socket.close()


@contextmanager
def engine(path: Path) -> Iterator[dict[str, Engine]]:
    """Frontend and core."""
    processes = {role: Engine(path, role) for role in ("frontend", "core")}
    try:
        yield processes
    finally:
        for process in processes.values():
            process.close()


def traces(prometheus: Prometheus, family: Family) -> set[tuple[str, str]]:
    """Trace ids of the victim and of the holder in a family's stored exemplars."""
    name = f"{family.name}_bucket" if family.kind is Kind.HISTOGRAM else family.name
    found = prometheus.exemplars(name, time.time() - 300, time.time() + 60)
    return {(e.labels.get("trace_id", ""), e.labels.get("holder_trace_id", "")) for e in found}


def wait(condition: Callable[[], Any], meanwhile: Callable[[], None], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        meanwhile()
        time.sleep(0.25)


@pytest.mark.needs("cc")
@pytest.mark.timeout(180)
def test_a_hog_its_victim_and_their_times_are_found_by_trace(tmp_path: Path, prometheus: Path) -> None:
    now = time.monotonic_ns
    with (
        running_agent(tmp_path, Scenario().gpus(1, H200)) as agent,
        engine(tmp_path / "agent.sock") as processes,
    ):
        scrape = {
            "job_name": "agent",
            "metrics_path": "/metrics",
            "static_configs": [{"targets": [agent.address]}],
        }
        with running_prometheus(prometheus, [scrape], tmp_path) as server:
            frontend, core = processes["frontend"], processes["core"]
            began = now()
            frontend.tell(
                records.RequestStart(at=began, request_id="big", tenant="acme", trace_id=BIG_TRACE),
                records.RequestStart(at=began, request_id="small", tenant="globex", trace_id=SMALL_TRACE),
            )

            def running() -> None:
                core.tell(
                    records.RequestProgress(
                        at=now(),
                        request_id="big",
                        tenant="acme",
                        running=True,
                        blocks=113.9,
                        peak_blocks=113.9,
                    ),
                    records.PoolState(at=now(), used_blocks=114, running=1, waiting=1),
                )

            # While it runs
            wait(lambda: (BIG_TRACE, "") in traces(server, families.KV_HOG_SECONDS), running)
            (held,) = server.query(f'{families.KV_HOLDER.name}{{holder="1",tenant="acme"}}')
            assert held.value == pytest.approx(113.9 / 130, abs=1e-5)
            assert traces(server, families.KV_PEAK) == set()

            core.tell(
                records.Preemption(
                    at=now(), cause="kv_full", victim="small", holders=["big"], holder_blocks=[113.9]
                )
            )
            core.add(records.CoreSums(preemptions={"kv_full": 1}))
            wait(lambda: (SMALL_TRACE, BIG_TRACE) in traces(server, families.PREEMPTIONS), running)

            # When it has ended
            end: dict[str, Any] = {"at": now(), "request_id": "big", "outcome": "length", "arrival_ns": began}
            core.tell(
                records.RequestEnd(**end, peak_blocks=113.9, queue_ns=0, prefill_ns=1000, output_tokens=200)
            )
            frontend.tell(
                records.RequestAnswered(
                    at=now(), request_id="big", outcome="length", duration_ns=now() - began
                )
            )
            for family in (families.KV_PEAK, families.REQUEST_DURATION, families.REQUEST_OUTPUT_TOKENS):
                wait(lambda family=family: traces(server, family) == {(BIG_TRACE, "")}, lambda: None)
            said = [line for line in server.log.read_text().splitlines() if "exemplar" in line.lower()]
            assert [line for line in said if "level=info" not in line.lower()] == []
