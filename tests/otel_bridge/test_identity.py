"""Which trace and span a request is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_bridge.identity import child, identify
from tests.otel_bridge.made import CALLER, TRACE

SAMPLED = ("server-a", "cmpl-r-0", TRACE, CALLER, True)


def test_a_sampled_caller_gives_trace_and_parent() -> None:
    found = identify(*SAMPLED)
    assert found.follows_caller
    assert found.context.trace_id.hex() == TRACE
    assert found.caller is not None and found.caller.span_id.hex() == CALLER
    assert found.context.span_id.hex() != CALLER


def test_a_caller_that_does_not_sample_gives_neither() -> None:
    found = identify("server-a", "cmpl-r-0", TRACE, CALLER, False)
    assert not found.follows_caller and found.context == found.own
    assert found.context.trace_id.hex() != TRACE


def test_ids_depend_on_the_request_only() -> None:
    assert identify(*SAMPLED) == identify(*SAMPLED)
    other_request = identify("server-a", "cmpl-r-1", TRACE, CALLER, True)
    other_server = identify("server-b", "cmpl-r-0", TRACE, CALLER, True)
    assert len({identify(*SAMPLED).own, other_request.own, other_server.own}) == 3


@pytest.mark.parametrize("trace", ["", "0" * 32, TRACE.upper(), TRACE[:-1], "x" * 32])
def test_what_is_no_trace_id_is_no_caller(trace: str) -> None:
    found = identify("server-a", "cmpl-r-0", trace, CALLER, True)
    assert found.caller is None and not found.follows_caller


@pytest.mark.parametrize("span", ["", "0" * 16, "z" * 16, "12"])
def test_a_caller_without_a_usable_span_is_the_trace_without_a_parent(span: str) -> None:
    found = identify("server-a", "cmpl-r-0", TRACE, span, True)
    assert found.caller is not None and found.caller.span_id == b""
    assert found.context.trace_id.hex() == TRACE


def test_the_ratio_keeps_that_share_of_requests() -> None:
    names = [f"cmpl-{number}-0" for number in range(4000)]
    kept = sum(identify("server-a", name).is_in_ratio(0.25) for name in names)
    assert 850 < kept < 1150  # six standard deviations
    assert all(identify("server-a", name).is_in_ratio(1.0) for name in names)
    assert not any(identify("server-a", name).is_in_ratio(0.0) for name in names)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_children_have_ids_of_their_own(one: int, other: int) -> None:
    parent = identify(*SAMPLED).context
    first, second = child(parent, one), child(parent, other)
    assert (first == second) == (one == other)
    assert first.trace_id == parent.trace_id and first.span_id != parent.span_id and any(first.span_id)
