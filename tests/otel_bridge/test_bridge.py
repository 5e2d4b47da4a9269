"""The part at work: queue, retries, shutdown, exemplars, and what is counted of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from gpuglass import catalog
from gpuglass.config import Config, TailConfig, TracesConfig
from gpuglass.exemplar import Names, RequestRef
from gpuglass.families import bridge as families
from gpuglass.family import Batch, Family, Owner
from gpuglass.record_hub import NOBODY, RecordHub
from gpuglass_vllm import records
from otel_bridge import exporter as exporter_module
from otel_bridge.bridge import TracesPart
from otel_bridge.transport import Reply, make
from tests.otel_bridge.made import CORE, FRONTEND, TRACE, WORKER, at, ended, start, step, unix
from tests.otel_bridge.sink import grpc_sink

SECONDS = 60.0
OK = Reply("ok")


@dataclass
class Scripted:
    """A transport that answers as told: the replies in their order, the last one again and again."""

    replies: list[Reply] = field(default_factory=lambda: [OK])
    bodies: list[bytes] = field(default_factory=list)
    """Of what was taken."""
    attempts: int = 0
    gate: threading.Event | None = None
    """Attempts wait for it, at most until they are aborted."""
    aborted: threading.Event = field(default_factory=threading.Event)

    def send(self, body: bytes, timeout: float) -> Reply:
        self.attempts += 1
        while self.gate is not None and not self.gate.wait(0.01):
            if self.aborted.is_set():
                return Reply("retry", why="aborted")
        reply = self.replies[min(self.attempts, len(self.replies)) - 1]
        if reply.result in ("ok", "partial"):
            self.bodies.append(body)
        return reply

    def abort(self) -> None:
        self.aborted.set()

    def spans(self) -> list[Any]:
        requests = map(ExportTraceServiceRequest.FromString, self.bodies)
        return [
            s for r in requests for of in r.resource_spans for scope in of.scope_spans for s in scope.spans
        ]

    def request_ids(self) -> list[str]:
        told = [{p.key: p.value.string_value for p in s.attributes} for s in self.spans() if s.kind == 2]
        return [attributes.get("gpuglass.request.id", "") for attributes in told]


def part(transport: Any, **config: Any) -> tuple[RecordHub, TracesPart]:
    """A part that keeps nothing for later, not started."""
    hub = RecordHub()
    given = {"endpoint": "http://localhost:1", "ratio": 1.0} | config
    return hub, TracesPart(TracesConfig(**given), hub, transport, linger_ns=0)


def value(bridge: TracesPart, family: Family, *labels: str) -> float:
    batch = Batch()
    bridge.fill(batch)
    return float(batch.samples[family][labels].value)


def wait(condition: Callable[[], Any], what: str) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def name(number: int) -> str:
    return f"cmpl-{number}-0"


# What is exported


def test_a_request_with_its_steps_is_exported() -> None:
    transport = Scripted()
    hub, bridge = part(transport)
    now = time.monotonic_ns()
    hub.told(FRONTEND, start(), now)
    hub.told(WORKER, step(1, 2.5, 2.6), now)
    hub.told(CORE, records.Preemption(at=at(3), cause="kv_full", victim="cmpl-r-0"), now)
    hub.ended(ended())
    bridge.round()
    assert [span.name for span in transport.spans()] == [
        "text_completion tiny",
        "queue",
        "prefill",
        "decode",
        "engine.step",
    ]
    assert [event.name for event in transport.spans()[0].events] == ["gpuglass.preempted"]
    assert value(bridge, families.EXPORTED) == 1 and value(bridge, families.SPANS) == 5
    assert value(bridge, families.UP) == 1
    assert len(bridge.journal) == 0


def test_a_word_that_comes_after_the_end_is_waited_for() -> None:
    transport = Scripted()
    hub = RecordHub()
    now = 0
    bridge = TracesPart(
        TracesConfig(endpoint="http://localhost:1"), hub, transport, clock_ns=lambda: now, linger_ns=1000
    )
    hub.told(FRONTEND, start(), now)
    hub.ended(ended())
    bridge.round()
    assert transport.bodies == []
    traced = records.RequestTraced(at=at(4), request_id="cmpl-r-0", trace_id=TRACE, span_id="12" * 8)
    hub.told(FRONTEND, traced, now)
    now = 1000
    bridge.round()
    assert [link.span_id.hex() for link in transport.spans()[0].links] == ["12" * 8]


def test_an_unsampled_request_is_not_exported() -> None:
    transport = Scripted()
    hub, bridge = part(transport)
    hub.ended(ended(sampled=False))
    bridge.round()
    assert transport.attempts == 0 and value(bridge, families.DECIDED, "unsampled") == 1


def test_the_decisions_add_up_to_the_requests() -> None:
    hub, bridge = part(Scripted(), ratio=0.3, tail=TailConfig(per_minute=5, slowest=3))
    for number in range(200):
        outcome = "error" if number % 10 == 0 else "abort" if number % 10 == 1 else "stop"
        hub.ended(ended(name(number), "", outcome=outcome, end_ns=at(4 + number)))
    bridge.round()
    bridge.round(everything=True)
    batch = Batch()
    bridge.fill(batch)
    assert sum(sample.value for sample in batch.samples[families.DECIDED].values()) == 200
    assert value(bridge, families.DECIDED, "slowest") + value(bridge, families.DECIDED, "failed") <= 10
    kept = sum(
        value(bridge, families.DECIDED, d) for d in ("ratio", "failed", "aborted", "preempted", "slowest")
    )
    assert kept == value(bridge, families.EXPORTED) > 30


def test_other_rules_are_taken_while_it_runs() -> None:
    transport = Scripted()
    hub, bridge = part(transport, ratio=0.0, tail=TailConfig(per_minute=0))
    hub.ended(ended(name(1), ""))
    bridge.round()
    bridge.reload(Config(traces=TracesConfig(endpoint="http://localhost:1", ratio=1.0, steps=0)))
    hub.told(FRONTEND, start(name(2), ""), time.monotonic_ns())
    hub.told(WORKER, step(1, 2.5, 2.6, (name(2),)), time.monotonic_ns())
    hub.ended(ended(name(2), ""))
    bridge.round()
    assert transport.request_ids() == [name(2)]
    assert not [span for span in transport.spans() if span.name == "engine.step"]


def test_a_clock_that_is_set_bends_no_trace() -> None:
    transport = Scripted()
    hub, bridge = part(transport)
    hub.told(FRONTEND, start(), time.monotonic_ns())
    hub.told(WORKER, step(1, 2.5, 2.6), time.monotonic_ns())
    hour = 3600 * 10**9
    hub.ended(ended(clock_offset_ns=ended().clock_offset_ns - hour))
    bridge.round()
    root, *children = transport.spans()
    assert root.start_time_unix_nano == unix(0) - hour
    for child in children:
        assert root.start_time_unix_nano <= child.start_time_unix_nano
        assert child.end_time_unix_nano <= root.end_time_unix_nano


def test_one_request_that_cannot_be_built_spoils_no_other(caplog: pytest.LogCaptureFixture) -> None:
    transport = Scripted()
    hub, bridge = part(transport)
    hub.ended(ended(name(1), begin_ns=None))
    hub.ended(ended(name(2)))
    bridge.round()
    assert transport.request_ids() == [name(2)]
    assert value(bridge, families.DROPPED, "failed") == 1 and "could not be made" in caplog.text


def test_one_batch_that_cannot_be_encoded_spoils_no_other(caplog: pytest.LogCaptureFixture) -> None:
    transport = Scripted()
    hub, bridge = part(transport)
    hub.ended(ended(name(1), begin_ns=-(1 << 70)))
    bridge.round()
    hub.ended(ended(name(2)))
    bridge.round()
    assert transport.request_ids() == [name(2)] and value(bridge, families.DROPPED, "failed") == 1


def test_batches_stay_below_what_a_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter_module, "MAX_BYTES", 4000)
    transport = Scripted()
    hub, bridge = part(transport)
    for number in range(40):
        hub.ended(ended(name(number), ""))
    bridge.round()
    assert sorted(transport.request_ids()) == sorted(name(number) for number in range(40))
    assert max(map(len, transport.bodies)) <= 4000 and len(transport.bodies) > 5


# Exemplars


def test_a_trace_is_named_once_it_was_accepted_and_not_before() -> None:
    named: list[Names] = []
    transport = Scripted([Reply("retry"), OK], gate=threading.Event())
    hub, bridge = part(transport)
    ref = RequestRef("cmpl-r-0", "r", TRACE, True)
    assert hub.policy is bridge.policy and bridge.policy.waits
    hub.ended(ended(exemplify=named.append))
    bridge.start()
    wait(lambda: transport.attempts, "no attempt")
    assert named == [] and dict(hub.policy.names(ref)) == {"request_id": "cmpl-r-0", "external_id": "r"}
    assert transport.gate is not None
    transport.gate.set()
    wait(lambda: named, "not named")
    assert dict(named[0]) == {"trace_id": TRACE, "request_id": "cmpl-r-0", "external_id": "r"}
    assert hub.policy.names(ref) == named[0]
    assert bridge.stop(5)


@pytest.mark.parametrize("reply", [Reply("refused", why="no"), Reply("partial", 2)])
def test_what_was_refused_even_in_part_is_not_named(reply: Reply) -> None:
    named: list[Names] = []
    hub, bridge = part(Scripted([reply]))
    hub.ended(ended(exemplify=named.append))
    bridge.round()
    assert named == [] and value(bridge, families.DROPPED, "refused") == 1
    assert value(bridge, families.EXPORTED) == 0
    assert value(bridge, families.SPANS) + value(bridge, families.SPANS_REFUSED) == 4
    assert value(bridge, families.SPANS_REFUSED) == (reply.refused or 4)


def test_an_exemplar_of_a_trace_of_its_own_has_that_traces_id() -> None:
    named: list[Names] = []
    transport = Scripted()
    hub, bridge = part(transport)
    hub.ended(ended(trace="", exemplify=named.append))
    bridge.round()
    assert dict(named[0])["trace_id"] == transport.spans()[0].trace_id.hex() != TRACE


# Faults


def test_a_collector_that_comes_back_gets_everything() -> None:
    transport = Scripted([Reply("retry", why="UNAVAILABLE"), Reply("retry", after=0.01), OK])
    hub, bridge = part(transport)
    bridge.start()
    for number in range(10):
        hub.ended(ended(name(number)))
    wait(lambda: value(bridge, families.EXPORTED) == 10, "not all arrived")
    assert sorted(transport.request_ids()) == sorted(name(number) for number in range(10)), "and none twice"
    assert value(bridge, families.ATTEMPTS, "retry") == 2
    assert value(bridge, families.UP) == 1
    assert bridge.stop(5)


def test_a_dead_collector_costs_a_bounded_queue() -> None:
    transport = Scripted([Reply("retry", why="UNAVAILABLE")])
    hub, bridge = part(transport, queue=16)
    bridge.start()
    wait(lambda: transport.attempts or hub.ended(ended("cmpl-first-0")), "no attempt")
    sent = 500
    for number in range(sent):
        hub.told(FRONTEND, start(name(number)), time.monotonic_ns())
        hub.ended(ended(name(number)))
    assert value(bridge, families.QUEUED) == 16
    assert value(bridge, families.DROPPED, "queue_full") >= sent - 16
    assert len(bridge.journal) == 16, "the notes of what was dropped are gone, too"
    assert value(bridge, families.UP) == 0
    transport.replies = [OK]
    wait(lambda: value(bridge, families.QUEUED) == 0, "the newest are sent")
    assert bridge.stop(5)
    assert {name(number) for number in range(sent - 16, sent)} <= set(transport.request_ids())


def test_a_slow_collector_holds_up_nobody() -> None:
    gate = threading.Event()
    with grpc_sink() as sink:
        sink.answer = lambda: gate.wait(SECONDS) and None
        config = TracesConfig(endpoint=sink.url, queue=8, timeout=60)  # type: ignore[arg-type]
        hub = RecordHub()
        bridge = TracesPart(config, hub, make(config), linger_ns=0)
        bridge.start()
        hub.ended(ended(name(0)))
        wait(lambda: value(bridge, families.QUEUED) == 0, "taken in hand")
        for number in range(1, 101):
            hub.ended(ended(name(number)))  # returns, though nothing moves
        assert value(bridge, families.QUEUED) == 8 and value(bridge, families.DROPPED, "queue_full") == 92
        gate.set()
        wait(lambda: value(bridge, families.EXPORTED) == 9, "the rest")
        assert bridge.stop(5)


def test_what_has_ended_is_sent_when_the_agent_ends() -> None:
    transport = Scripted()
    hub, bridge = part(transport, ratio=0.0, tail=TailConfig(slowest=1))
    bridge._linger_ns = 10**12
    bridge.start()
    hub.ended(ended(name(1)))
    hub.ended(ended(name(2), ""))
    assert bridge.stop(10)
    assert sorted(transport.request_ids()) == [name(1), name(2)], (
        "also the slowest of a minute that is not over"
    )


def test_with_a_dead_collector_the_agent_ends_in_time_and_counts_what_it_lost() -> None:
    transport = Scripted([Reply("retry")])
    hub, bridge = part(transport)
    bridge.start()
    for number in range(700):
        hub.ended(ended(name(number)))
    wait(lambda: transport.attempts, "no attempt")
    assert bridge.stop(2.0)
    assert value(bridge, families.DROPPED, "shutdown") == 700


def test_a_collector_that_hangs_is_left_when_the_agent_ends() -> None:
    transport = Scripted(gate=threading.Event())
    hub, bridge = part(transport)
    bridge.start()
    hub.ended(ended())
    wait(lambda: transport.attempts, "no attempt")
    bridge.stop(2.0)
    assert transport.aborted.is_set()
    wait(lambda: not bridge._thread.is_alive(), "the call that was aborted holds the thread")


def test_a_part_that_was_never_started_stops() -> None:
    _, bridge = part(Scripted())
    assert bridge.stop(1)


def test_nothing_that_is_told_breaks_the_teller(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, bridge = part(Scripted())
    heard: list[Any] = []

    class Other:
        def heard(self, speaker: Any, record: Any, now_ns: int) -> None:
            heard.append(record)

    hub.listen((type(ended()),), Other())  # type: ignore[arg-type]
    monkeypatch.setattr(bridge, "_enqueue", lambda request: 1 / 0)
    hub.told(NOBODY, ended(), 0)
    assert len(heard) == 1


# Metrics


def test_every_family_of_the_bridge_is_filled() -> None:
    hub, bridge = part(Scripted())
    hub.ended(ended())
    bridge.round()
    batch = Batch()
    bridge.fill(batch)
    declared = {f for f in catalog.owned_by(Owner.AGENT) if f.name.startswith("gpuglass_traces_")}
    assert set(batch.samples) == declared


def test_before_the_first_attempt_nothing_is_said_of_the_collector() -> None:
    _, bridge = part(Scripted())
    batch = Batch()
    bridge.fill(batch)
    assert families.UP not in batch.samples
