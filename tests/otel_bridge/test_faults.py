"""The real agent, engines that are made, collectors that are away, slow, refusing or gone: what is lost, and
that it is said."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpuglass.demo.scenario import Scenario
from gpuglass_vllm import records
from tests.exporters.vllm.test_ledger_exemplars import Engine, engine
from tests.otel_bridge.sink import grpc_sink, http_sink
from tests.support.agent import RunningAgent, refused_agent, running_agent
from tests.support.jaeger import running_jaeger
from tests.support.load import trace_id
from tests.support.ports import free_port

pytestmark = [pytest.mark.needs("cc"), pytest.mark.timeout(300)]

WAIT = 60
SECOND = 1_000_000_000


@contextmanager
def agent_and_engine(
    folder: Path, short: Path, endpoint: str, **traces: Any
) -> Iterator[tuple[RunningAgent, dict[str, Engine]]]:
    """An agent that exports to `endpoint`, and frontend and core of an engine."""
    config = {
        "engines": {"socket": str(short / "agent.sock")},
        "gpu": {"enabled": False},
        "traces": {"endpoint": endpoint, **traces},
    }
    with (
        running_agent(folder, Scenario().gpus(1), config) as agent,
        engine(short / "agent.sock") as processes,
    ):
        yield agent, processes


def start(number: int, begun: int) -> records.RequestStart:
    return records.RequestStart(
        at=begun, request_id=f"cmpl-{number}-0", trace_id=trace_id(number), span_id="12" * 8, sampled=True
    )


def end(number: int, begun: int) -> records.RequestEnd:
    now = time.monotonic_ns()
    took = now - begun
    return records.RequestEnd(
        at=now,
        request_id=f"cmpl-{number}-0",
        outcome="stop",
        arrival_ns=begun,
        queue_ns=took // 4,
        prefill_ns=took // 4,
        decode_ns=took // 2,
        prompt_tokens=10,
        output_tokens=10,
    )


def answer(number: int, begun: int) -> records.RequestAnswered:
    now = time.monotonic_ns()
    return records.RequestAnswered(
        at=now, request_id=f"cmpl-{number}-0", outcome="stop", duration_ns=now - begun
    )


def run(processes: dict[str, Engine], numbers: range, pause: float = 0.0) -> None:
    """Whole requests, one after the other."""
    for number in numbers:
        begun = time.monotonic_ns()
        processes["frontend"].tell(start(number, begun))
        processes["core"].tell(end(number, begun))
        processes["frontend"].tell(answer(number, begun))
        if pause:
            time.sleep(pause)


def value(agent: RunningAgent, name: str, **labels: str) -> float:
    return agent.value(f"gpuglass_traces_{name}", **labels) or 0.0


def counted(agent: RunningAgent) -> float:
    """Requests in the agent's histograms."""
    return sum(sample.value for sample in agent.samples("gpuglass_request_duration_seconds_count"))


def dropped(agent: RunningAgent) -> float:
    return sum(sample.value for sample in agent.samples("gpuglass_traces_dropped_total"))


@pytest.mark.needs("jaeger")
def test_a_collector_that_comes_late_gets_every_trace(
    jaeger_program: Path, tmp_path: Path, short_path: Path
) -> None:
    port = free_port()
    with agent_and_engine(tmp_path, short_path, f"http://127.0.0.1:{port}") as (agent, processes):
        run(processes, range(100, 130))
        agent.wait(lambda: value(agent, "export_attempts_total", result="retry") >= 2, "attempts", WAIT)
        assert value(agent, "collector_up") == 0
        assert agent.fetch("/readyz").status == 200, "the agent is well without it"
        with running_jaeger(jaeger_program, tmp_path / "jaeger", port) as jaeger:
            agent.wait(lambda: value(agent, "exported_total") == 30, "all traces", WAIT)
            assert value(agent, "collector_up") == 1 and dropped(agent) == 0
            for number in (100, 129):
                spans = jaeger.wait_for(trace_id(number))
                assert sorted(span.name for span in spans) == [
                    "decode",
                    "prefill",
                    "queue",
                    "text_completion tiny",
                ]
        assert "cannot be reached" in agent.log and "takes them again" in agent.log
        assert agent.log.count("cannot be reached") == 1, "said once"


def test_ten_thousand_requests_a_minute_lose_nothing(tmp_path: Path, short_path: Path) -> None:
    with grpc_sink() as sink, agent_and_engine(tmp_path, short_path, sink.url) as (agent, processes):
        run(processes, range(1000), pause=60 / 10_000)
        agent.wait(lambda: value(agent, "exported_total") == 1000, "all traces", WAIT)
        assert dropped(agent) == 0
        roots = [span for span in sink.spans if span.kind == 2]
        assert len({span.trace_id for span in roots}) == len(roots) == 1000
        assert len(sink.spans) == 4000


def test_requests_that_never_end_leave_the_agent_alone(tmp_path: Path, short_path: Path) -> None:
    with grpc_sink() as sink, agent_and_engine(tmp_path, short_path, sink.url) as (agent, processes):
        begun = time.monotonic_ns()
        for number in range(2000):
            processes["frontend"].tell(start(number, begun))
        agent.wait(lambda: value(agent, "open_requests") == 2000, "open requests", WAIT)
        run(processes, range(5000, 5010))
        agent.wait(lambda: value(agent, "exported_total") == 10, "those that end", WAIT)
        assert value(agent, "open_requests") == 2000 and len(sink.spans) == 40


def test_a_slow_collector_costs_a_bounded_queue_and_nothing_else(tmp_path: Path, short_path: Path) -> None:
    with grpc_sink() as sink:
        slow = {"seconds": 1.0}
        sink.answer = lambda: time.sleep(slow["seconds"])
        with agent_and_engine(tmp_path, short_path, sink.url, queue=20) as (agent, processes):
            run(processes, range(300), pause=0.01)
            agent.wait(lambda: value(agent, "dropped_total", reason="queue_full") > 0, "a full queue", WAIT)
            assert value(agent, "queued") <= 20
            agent.wait(lambda: counted(agent) == 300, "all of them in the metrics", WAIT)
            slow["seconds"] = 0.0
            agent.wait(lambda: value(agent, "exported_total") + dropped(agent) == 300, "the rest", WAIT)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_tls_error_is_said_and_harms_nothing(tmp_path: Path, short_path: Path, protocol: str) -> None:
    with (grpc_sink if protocol == "grpc" else http_sink)() as sink:
        url = sink.url.replace("http://", "https://")
        with agent_and_engine(tmp_path, short_path, url, protocol=protocol) as (agent, processes):
            run(processes, range(3))
            agent.wait(lambda: value(agent, "export_attempts_total", result="retry"), "an attempt", WAIT)
            assert value(agent, "collector_up") == 0 and value(agent, "exported_total") == 0
            assert "traces: the collector cannot be reached" in agent.log
        assert sink.requests == []


def test_a_collector_that_refuses_is_said(tmp_path: Path, short_path: Path) -> None:
    with http_sink() as sink:
        sink.answer = lambda: (401, {})
        with agent_and_engine(tmp_path, short_path, sink.url, protocol="http") as (agent, processes):
            run(processes, range(3))
            agent.wait(lambda: value(agent, "dropped_total", reason="refused") == 3, "the refusal", WAIT)
            assert "status 401" in agent.log
            assert not agent.fetch(accept="application/openmetrics-text; version=1.0.0").text.count(
                "trace_id="
            )


def test_what_has_ended_is_sent_when_the_agent_ends(tmp_path: Path, short_path: Path) -> None:
    with grpc_sink() as sink, agent_and_engine(tmp_path, short_path, sink.url) as (agent, processes):
        run(processes, range(50))

        agent.wait(lambda: counted(agent) == 50, "50 ended requests", WAIT)
        code, _ = agent.stop()
        assert code == 0
        assert len([span for span in sink.spans if span.kind == 2]) == 50


def test_an_agent_that_is_started_again_makes_the_same_trace(tmp_path: Path, short_path: Path) -> None:
    begun = time.monotonic_ns()
    with grpc_sink() as sink:
        (tmp_path / "one").mkdir()
        (tmp_path / "two").mkdir()
        with agent_and_engine(tmp_path / "one", short_path, sink.url) as (agent, processes):
            processes["frontend"].tell(start(1, begun))
            run(processes, range(10, 11))
            agent.wait(lambda: value(agent, "exported_total") == 1, "another request", WAIT)
        with agent_and_engine(tmp_path / "two", short_path, sink.url) as (agent, processes):
            processes["frontend"].tell(start(1, begun))  # as a probe tells a new connection of what is open
            processes["core"].tell(end(1, begun))
            processes["frontend"].tell(answer(1, begun))
            agent.wait(lambda: value(agent, "exported_total") == 1, "the request", WAIT)
        (root,) = [s for s in sink.spans if s.kind == 2 and s.trace_id.hex() == trace_id(1)]
        assert root.parent_span_id.hex() == "12" * 8
        length = root.end_time_unix_nano - root.start_time_unix_nano
        phases = [s for s in sink.spans if s.trace_id == root.trace_id and s is not root]
        assert sum(s.end_time_unix_nano - s.start_time_unix_nano for s in phases) == pytest.approx(
            length, rel=0.02
        )


def test_a_clock_that_is_set_while_it_runs_bends_no_trace(tmp_path: Path, short_path: Path) -> None:
    with grpc_sink() as sink, agent_and_engine(tmp_path, short_path, sink.url) as (agent, processes):
        begun = time.monotonic_ns()
        processes["frontend"].tell(start(1, begun))
        offset = time.time_ns() - time.monotonic_ns() - 100 * SECOND
        for role in ("frontend", "core"):
            hello = records.Hello(
                version=records.VERSION,
                sender=f"made-{role}",
                instance="made",
                role=role,
                engine_name="made",
                engine_version="1",
                software="test",
                model_name="tiny",
                clock_offset_ns=offset,
            )
            processes[role].tell(hello)
        run_end = end(1, begun)
        processes["core"].tell(run_end)
        processes["frontend"].tell(answer(1, begun))
        agent.wait(lambda: value(agent, "exported_total") == 1, "the request", WAIT)
        (root,) = [span for span in sink.spans if span.kind == 2]
        assert root.start_time_unix_nano == begun + offset
        for span in sink.spans:
            assert root.start_time_unix_nano <= span.start_time_unix_nano
            assert span.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano


@pytest.mark.parametrize(
    "traces, said",
    [
        ({"endpoint": "localhost:4317"}, "traces.endpoint: expected a URL such as http://127.0.0.1:4317"),
        ({"endpoint": "http://x", "protocol": "udp"}, "traces.protocol: must be one of grpc, http"),
        (
            {"endpoint": "http://x", "headers_file": "/no/such"},
            "traces.headers_file: /no/such: cannot read it",
        ),
        (
            {"endpoint": "https://x", "tls": {"ca_file": "/no/such"}},
            "traces.tls.ca_file: /no/such: cannot read it",
        ),
        ({"endpoint": "https://x", "tls": {"key_file": "/k"}}, "key_file: cert_file has to be given, too"),
        ({"ratio": 2}, "traces.ratio"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(tmp_path: Path, traces: dict[str, Any], said: str) -> None:
    done = refused_agent(tmp_path, {"traces": traces})
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_without_an_endpoint_there_are_no_traces_and_exemplars_stay_as_they_were(
    tmp_path: Path, short_path: Path
) -> None:
    with agent_and_engine(tmp_path, short_path, "") as (agent, processes):
        run(processes, range(3))
        agent.wait(lambda: counted(agent) == 3, "requests", WAIT)
        assert agent.samples("gpuglass_traces_requests_total") == []
        text = agent.fetch(accept="application/openmetrics-text; version=1.0.0").text
        assert any(trace_id(number) in text for number in range(3))
