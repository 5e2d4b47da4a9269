"""Real vLLM, agent, Jaeger, Prometheus: from the client's span to the engine's steps; an exemplar back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuglass.demo.scenario import Scenario
from tests.otel_bridge.conftest import Traced
from tests.support.agent import RunningAgent, running_agent
from tests.support.jaeger import JaegerSpan
from tests.support.load import complete, tokens, trace_id, traceparent
from tests.support.prometheus import running_prometheus

pytestmark = [pytest.mark.needs("vllm", "jaeger", "cc"), pytest.mark.timeout(400)]

WAIT = 60
PHASES = ["queue", "prefill", "decode"]


def config(traced: Traced, **traces: Any) -> dict[str, Any]:
    endpoint = {"endpoint": traced.jaeger.grpc, "ratio": 0.0, "tail": {"slowest": 0}}
    return {"engines": {"socket": str(traced.socket)}, "traces": endpoint | traces}


def wait_for_engine(agent: RunningAgent) -> None:
    """All three processes are connected."""
    roles = ("frontend", "core", "worker")
    agent.wait(
        lambda: all(agent.value("gpuglass_receiver_senders", role=role) for role in roles), "the engine", WAIT
    )


@pytest.fixture(scope="module")
def agent(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """An agent that hears the server, for all tests here."""
    with running_agent(tmp_path_factory.mktemp("agent"), Scenario().gpus(1), config(traced)) as running:
        wait_for_engine(running)
        yield running


def ask(traced: Traced, number: int, prompt: int, output: int, **more: Any) -> Any:
    headers = {"traceparent": traceparent(number), "X-Request-Id": f"r{number}"}
    return complete(traced.server.address, tokens(prompt, number), output, headers=headers, **more)


def ours(spans: list[JaegerSpan]) -> list[JaegerSpan]:
    return [span for span in spans if span.resource["service.name"] == "vllm"]


def roots(spans: list[JaegerSpan]) -> list[JaegerSpan]:
    return [span for span in ours(spans) if span.name == "text_completion tiny"]


def named(spans: list[JaegerSpan], name: str) -> list[JaegerSpan]:
    return [span for span in ours(spans) if span.name == name]


def fetch(traced: Traced, number: int, itself: bool = True) -> list[JaegerSpan]:
    """The trace of a request: our spans, and vLLM's own if it makes one."""

    def complete(spans: list[JaegerSpan]) -> bool:
        return bool(ours(spans)) and (not itself or any(span.name == "llm_request" for span in spans))

    return traced.jaeger.wait_for(trace_id(number), complete, WAIT)


def check_tree(spans: list[JaegerSpan]) -> JaegerSpan:
    """One root of ours, below the client's span; no span twice; children within their parents."""
    (root,) = [span for span in ours(spans) if span.kind in ("2", "SPAN_KIND_SERVER")]
    by_id = {span.span_id: span for span in ours(spans)}
    assert len(by_id) == len(ours(spans))
    for span in by_id.values():
        if span is not root:
            parent = by_id[span.parent]
            assert parent.begin_ns <= span.begin_ns <= span.end_ns <= parent.end_ns, (parent, span)
    return root


def length(span: JaegerSpan) -> int:
    return span.end_ns - span.begin_ns


def test_a_request_is_one_trace_from_the_client_to_the_engines_steps(
    traced: Traced, agent: RunningAgent
) -> None:
    before = time.time_ns()
    reply = ask(traced, 1, 1200, 400)
    after = time.time_ns()
    assert reply.ok
    spans = fetch(traced, 1)
    root = check_tree(spans)
    assert root.name == "text_completion tiny" and root.parent == f"{2:016x}", "the span that the client sent"
    assert before <= root.begin_ns <= root.end_ns <= after
    phases = {name: named(spans, name) for name in PHASES}
    assert all(len(found) == 1 and found[0].parent == root.span_id for found in phases.values())
    total = sum(length(found[0]) for found in phases.values())
    assert total == pytest.approx(length(root), rel=0.02)
    told = root.attributes
    assert told["gen_ai.usage.input_tokens"] == 1200 and told["gen_ai.usage.output_tokens"] == 400
    assert told["gen_ai.response.finish_reasons"] == ["length"] and told["gpuglass.kept_by"] == "caller"
    assert 0 < told["gpuglass.gpu.seconds"] <= length(root) / 1e9
    # 1199 or 1200 tokens of the prompt, 512 at a time.
    chunks = named(spans, "prefill.chunk")
    assert [chunk.attributes["gpuglass.tokens"] for chunk in chunks] == [512, 512, 176]
    assert {chunk.parent for chunk in chunks} == {phases["prefill"][0].span_id}
    steps = named(spans, "engine.step")
    assert 3 <= len(steps) <= 8
    assert steps[0].attributes["gpuglass.phase"] == "prefill"
    assert {step.attributes["gpuglass.phase"] for step in steps} == {"prefill", "decode"}
    # 400 decode steps and three of the prompt: those that are shown lie far apart.
    numbers = [step.attributes["gpuglass.step.number"] for step in steps]
    assert max(numbers) - min(numbers) > 200


def test_vllms_own_span_is_a_sibling_with_a_link(traced: Traced, agent: RunningAgent) -> None:
    assert ask(traced, 2, 100, 20).ok
    spans = fetch(traced, 2)
    root = check_tree(spans)
    (itself,) = [span for span in spans if span.resource["service.name"] == "vllm-itself"]
    assert itself.name == "llm_request" and itself.parent == root.parent
    assert [link[:2] for link in root.links] == [(itself.trace_id, itself.span_id)]
    assert len(roots(spans)) == 1


def test_steps_link_the_requests_that_shared_them(traced: Traced, agent: RunningAgent) -> None:
    numbers = (10, 11, 12)
    threads = [threading.Thread(target=ask, args=(traced, number, 60, 200)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    traces = {number: fetch(traced, number) for number in numbers}
    found = {number: check_tree(spans) for number, spans in traces.items()}
    spans_of = {(root.trace_id, root.span_id): number for number, root in found.items()}
    linked: dict[int, set[int]] = {number: set() for number in numbers}
    for number, spans in traces.items():
        for step in named(spans, "engine.step"):
            assert step.attributes["gpuglass.step.requests"] == len(step.links) + 1
            shares = [told["gpuglass.gpu.seconds"] for _, _, told in step.links]
            whole = sum(shares) + step.attributes["gpuglass.gpu.seconds"]
            assert 0 < whole <= length(step) / 1e9 * 1.001, "shares are parts of the step"
            linked[number] |= {spans_of[link[:2]] for link in step.links}
    for number in numbers:
        assert linked[number] <= set(numbers) - {number}
    assert sum(map(len, linked.values())) >= 2, "they ran together"


def test_an_aborted_request_has_a_complete_trace(traced: Traced, agent: RunningAgent) -> None:
    # Long before its end, though a loaded server sends several tokens in one piece.
    ask(traced, 20, 100, 1500, hang_up_after=2)
    spans = fetch(traced, 20, itself=False)
    root = check_tree(spans)
    assert root.error and root.attributes["error.type"] == "aborted"
    assert root.attributes["gpuglass.outcome"] == "abort"
    assert [span.name for span in spans if span.name in PHASES] == PHASES
    assert named(spans, "engine.step") and named(spans, "prefill.chunk")
    queue, prefill, decode = (named(spans, name)[0] for name in PHASES)
    assert root.begin_ns <= queue.begin_ns and decode.end_ns <= root.end_ns
    assert (queue.end_ns, prefill.end_ns) == (prefill.begin_ns, decode.begin_ns)
    assert not [span for span in spans if span.name == "llm_request"], "vLLM itself shows nothing of it"


def test_a_rejected_request_has_a_trace(traced: Traced, agent: RunningAgent) -> None:
    reply = ask(traced, 30, 3000, 10)
    assert reply.status == 400
    (root,) = fetch(traced, 30, itself=False)
    assert root.parent == f"{31:016x}" and root.error
    assert root.attributes["gpuglass.outcome"] == "rejected"
    assert root.attributes["error.type"] == "validation"
    assert root.attributes["gen_ai.response.id"] == "r30"


def test_a_request_whose_caller_does_not_sample_has_none(traced: Traced, agent: RunningAgent) -> None:
    def decided(decision: str) -> float:
        return agent.value("gpuglass_traces_requests_total", decision=decision) or 0.0

    before = decided("unsampled")
    headers = {"traceparent": f"00-{trace_id(40)}-{41:016x}-00"}
    assert complete(traced.server.address, tokens(50, 40), 5, headers=headers).ok
    agent.wait(lambda: decided("unsampled") == before + 1, "the decision", WAIT)
    assert ask(traced, 41, 50, 5).ok
    fetch(traced, 41)
    assert ours(traced.jaeger.trace(trace_id(40))) == []


def test_a_preempted_request_says_by_whom(traced: Traced, agent: RunningAgent) -> None:
    # Two sequences of one request, so they run together: each needs 44 blocks in the end, and there are 79.
    headers = {"traceparent": traceparent(50)}
    prompts = [tokens(900, 50), tokens(900, 51)]
    assert complete(traced.server.address, prompts, 500, headers=headers).ok
    spans = traced.jaeger.wait_for(trace_id(50), lambda spans: len(roots(spans)) == 2, WAIT)
    found = {root.attributes["gpuglass.request.id"]: root for root in roots(spans)}
    assert {root.parent for root in found.values()} == {f"{51:016x}"}
    victims = {name: root for name, root in found.items() if root.attributes["gpuglass.preemptions"]}
    assert victims
    for name, root in victims.items():
        told = [attributes for event, _, attributes in root.events if event == "gpuglass.preempted"]
        assert told and told[0]["gpuglass.preemption.cause"] == "kv_full"
        assert told[0]["gpuglass.preemption.holders"] == sorted(set(found) - {name})
        assert told[0]["gpuglass.preemption.lost_tokens"] >= 0
    assert all(any(event == "gpuglass.kv_peak" for event, _, _ in root.events) for root in found.values())


@pytest.mark.needs("debian-prometheus")
def test_an_exemplar_in_prometheus_leads_to_the_trace(
    traced: Traced, agent: RunningAgent, debian_prometheus: Path, tmp_path: Path
) -> None:
    scrape = [{"job_name": "gpuglass", "static_configs": [{"targets": [agent.address]}]}]
    with running_prometheus(debian_prometheus, scrape, tmp_path) as prometheus:
        prometheus.wait_for('up{job="gpuglass"} == 1')
        assert ask(traced, 60, 300, 300).ok

        def exemplars() -> list[Any]:
            now = time.time()
            found = prometheus.exemplars("gpuglass_request_duration_seconds_bucket", now - 120, now + 60)
            return [e for e in found if e.labels.get("trace_id") == trace_id(60)]

        agent.wait(exemplars, "the exemplar", WAIT)
        everything = prometheus.exemplars(
            '{__name__=~"gpuglass_.+_bucket"}', time.time() - 600, time.time() + 60
        )
        named_traces = {e.labels["trace_id"] for e in everything if "trace_id" in e.labels}
    exemplar = exemplars_of(everything, 60)
    root = check_tree(traced.jaeger.trace(trace_id(60)))
    assert exemplar.labels["request_id"] == root.attributes["gpuglass.request.id"]
    assert exemplar.value == pytest.approx(length(root) / 1e9, rel=0.05)
    assert named_traces and all(ours(traced.jaeger.trace(found)) for found in named_traces), (
        "none ends nowhere"
    )


def exemplars_of(found: list[Any], number: int) -> Any:
    """The one of a request's duration."""
    of_trace = [
        e
        for e in found
        if e.labels.get("trace_id") == trace_id(number)
        and e.series["__name__"] == "gpuglass_request_duration_seconds_bucket"
    ]
    return of_trace[0]
