"""The frontend's side: an end is counted once, by the frontend while it can see ends, else by the core."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gpuglass_vllm import context, frontend, hooks, marks, records, settings


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> frontend.FrontendProbe:
    monkeypatch.setattr(settings, "_current", settings.Settings(socket="/nowhere", instance="abc"))
    monkeypatch.setattr(hooks.table, "_hooks", {})
    hooks.table.hook("frontend.answers").activate()
    return frontend.FrontendProbe()


def request(name: str) -> Any:
    return SimpleNamespace(
        request_id=name,
        external_req_id=f"client-{name}",
        sampling_params=SimpleNamespace(extra_args=None, max_tokens=5),
        pooling_params=None,
        prompt_token_ids=[1, 2, 3],
        arrival_time=0.0,
        trace_headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"},
    )


def ends(probe: frontend.FrontendProbe) -> dict[str, dict[str, int]]:
    return {
        record.tenant: record.requests for record in probe.sums() if isinstance(record, records.TenantSums)
    }


def test_a_request_is_told_and_its_end_counted_once(probe: frontend.FrontendProbe) -> None:
    asked = request("r1")
    probe.on_enter(asked)
    assert marks.get(asked.sampling_params) == marks.Mark("", True)
    (start,) = probe.states(everything=True)
    assert isinstance(start, records.RequestStart)
    assert (start.external_id, start.trace_id, start.prompt_tokens) == ("client-r1", "a" * 32, 3)
    for _ in range(2):
        probe.on_answered("r1", "stop", "", 0.25)
    assert ends(probe) == {"": {"stop": 1}}
    assert list(probe.states(everything=True)) == []
    answer = probe.link._events[-1]
    assert isinstance(answer, records.RequestAnswered)
    assert answer.first_token_ns == 250_000_000
    # An agent that was started in between has not heard the start.
    assert (answer.external_id, answer.trace_id, answer.span_id) == ("client-r1", "a" * 32, "b" * 16)
    assert answer.sampled


def test_when_ends_are_not_seen_any_more_the_core_counts(probe: frontend.FrontendProbe) -> None:
    before, after = request("r1"), request("r2")
    probe.on_enter(before)
    for _ in range(hooks.STRIKES):
        hooks.table.hook("frontend.answers").failed(RuntimeError("ours"))
    probe.on_enter(after)
    assert marks.get(before.sampling_params).counted
    assert not marks.get(after.sampling_params).counted
    for name in ("r1", "r2"):
        probe.on_answered(name, "length", "", 0.0)  # as the stat logger tells it
    assert ends(probe) == {"": {"length": 1}}, "the core counts the other one"


def test_a_dead_engine_fails_what_is_open(probe: frontend.FrontendProbe) -> None:
    probe.on_enter(request("r1"))
    probe.on_engine_error()
    assert ends(probe) == {"": {"error/engine": 1}}


def test_a_refusal_is_counted_by_tenant_and_marked(probe: frontend.FrontendProbe) -> None:
    call = context.Call(tenant="acme")
    probe.on_refused(call, "admission", call.begin_ns + 5)
    assert call.refused
    assert ends(probe) == {"acme": {"rejected/admission": 1}}


def test_requests_beyond_the_bound_are_left_to_the_core(
    probe: frontend.FrontendProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend, "MAX_OPEN", 1)
    asked = [request("r1"), request("r2")]
    for one in asked:
        probe.on_enter(one)
    assert [marks.get(one.sampling_params).counted for one in asked] == [True, False]


def test_a_refusal_tells_the_callers_context(probe: frontend.FrontendProbe) -> None:
    call = context.Call(trace=context.Trace("a" * 32, "b" * 16, True), external_id="x")
    probe.on_refused(call, "admission", call.begin_ns + 5)
    told = probe.link._events[-1]
    assert isinstance(told, records.RequestRefused)
    assert (told.trace_id, told.span_id, told.sampled, told.external_id) == ("a" * 32, "b" * 16, True, "x")


@pytest.fixture
def spans(probe: frontend.FrontendProbe, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes spans as vLLM does, with OpenTelemetry's own provider, under our hook."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(frontend, "_spans", frontend._SpanWatch())
    monkeypatch.setattr(frontend, "_probe", probe)
    tracer = provider.get_tracer("vllm")

    class Processor:
        def do_tracing(self, output: Any, state: Any, stats: Any) -> None:
            for name in state.spans:
                tracer.start_span(name).end()

    hook = hooks.table.hook("frontend.engine_spans")
    hook.activate()
    assert hooks.wrap(Processor, "do_tracing", hook, before=frontend._tracing, after=frontend._traced)
    return lambda name, *made: Processor().do_tracing(
        None, SimpleNamespace(request_id=name, spans=made), None
    )


def test_a_span_that_the_engine_makes_is_told(probe: frontend.FrontendProbe, spans: Any) -> None:
    spans("r1-aaaaaaaa", "other", "llm_request")
    spans("r2-bbbbbbbb", "llm_request")
    first, second = probe.link._events
    assert isinstance(first, records.RequestTraced) and isinstance(second, records.RequestTraced)
    assert (first.request_id, second.request_id) == ("r1-aaaaaaaa", "r2-bbbbbbbb")
    assert len({first.trace_id, second.trace_id}) == 2
    assert len(first.trace_id) == 32 and len(first.span_id) == 16 and int(first.span_id, 16)


def test_where_the_engine_makes_no_span_nothing_is_told(probe: frontend.FrontendProbe, spans: Any) -> None:
    spans("r1")
    spans("r2", "other")
    assert not probe.link._events
