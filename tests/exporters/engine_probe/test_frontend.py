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
