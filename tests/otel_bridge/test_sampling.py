"""Which requests are kept, and why."""

from __future__ import annotations

from typing import Any

import pytest

from gpuglass.config import TailConfig, TracesConfig
from otel_bridge.identity import Identity, identify
from otel_bridge.model import Decision
from otel_bridge.sampling import MINUTE_NS, Sampler
from tests.otel_bridge.made import CALLER, INSTANCE, TRACE, at, ended

ALONE = identify(INSTANCE, "cmpl-r-0")
SAMPLED = identify(INSTANCE, "cmpl-r-0", TRACE, CALLER, True)
UNSAMPLED = identify(INSTANCE, "cmpl-r-0", TRACE, CALLER, False)
NO_SLOWEST = TailConfig(slowest=0)


def decide(identity: Identity, config: TracesConfig, **request: Any) -> Decision | tuple[str | None]:
    return Sampler[str](config).decide(ended(**request), identity, "it")


def none(**more: Any) -> TracesConfig:
    """Nothing is kept by ratio."""
    return TracesConfig(ratio=0.0, **{"tail": NO_SLOWEST, **more})


@pytest.mark.parametrize("config", [TracesConfig(ratio=1.0), none(tail=TailConfig(slowest=5))])
def test_a_request_whose_caller_was_never_heard_has_no_trace(config: TracesConfig) -> None:
    assert decide(ALONE, config, caller_known=False, outcome="error") is Decision.UNKNOWN
    assert decide(ALONE, config, outcome="error") in (Decision.RATIO, Decision.FAILED)
    assert not Decision.UNKNOWN.keeps


@pytest.mark.parametrize(
    "outcome, preemptions, decision",
    [
        ("error", 0, Decision.FAILED),
        ("rejected", 0, Decision.FAILED),
        ("abort", 0, Decision.ABORTED),
        ("length", 1, Decision.PREEMPTED),
        ("stop", 0, Decision.UNSAMPLED),
    ],
)
def test_tail_rules_look_at_how_it_went(outcome: str, preemptions: int, decision: Decision) -> None:
    assert decide(ALONE, none(), outcome=outcome, preemptions=preemptions) is decision


@pytest.mark.parametrize("rule, outcome", [("failed", "error"), ("aborted", "abort")])
def test_each_tail_rule_can_be_switched_off(rule: str, outcome: str) -> None:
    tail = TailConfig(slowest=0, **{rule: False})  # type: ignore[arg-type]
    assert decide(ALONE, none(tail=tail), outcome=outcome) is Decision.UNSAMPLED


def test_a_callers_word_comes_first() -> None:
    assert decide(SAMPLED, none()) is Decision.CALLER
    assert decide(UNSAMPLED, TracesConfig(ratio=1.0), outcome="error") is Decision.UNSAMPLED


def test_the_configuration_may_overrule_a_caller_that_does_not_sample() -> None:
    assert decide(UNSAMPLED, TracesConfig(ratio=1.0, ignore_unsampled=True)) is Decision.RATIO
    assert decide(UNSAMPLED, none(ignore_unsampled=True), outcome="error") is Decision.FAILED


def test_the_ratio_needs_no_budget() -> None:
    config = TracesConfig(ratio=1.0, tail=TailConfig(per_minute=0))
    assert decide(ALONE, config, outcome="error") is Decision.RATIO


def test_tail_rules_have_a_budget_a_minute() -> None:
    sampler = Sampler[int](none(tail=TailConfig(per_minute=2, slowest=0)))
    failed = ended(outcome="error")
    list(sampler.minute(at(0)))
    assert [sampler.decide(failed, ALONE, n) for n in range(3)] == [
        Decision.FAILED,
        Decision.FAILED,
        Decision.BUDGET,
    ]
    list(sampler.minute(at(0) + MINUTE_NS - 1))
    assert sampler.decide(failed, ALONE, 3) is Decision.BUDGET
    list(sampler.minute(at(0) + MINUTE_NS))
    assert sampler.decide(failed, ALONE, 4) is Decision.FAILED


def test_the_slowest_of_a_minute_are_kept_when_it_is_over() -> None:
    sampler = Sampler[float](none(tail=TailConfig(slowest=2)))
    assert list(sampler.minute(at(0))) == []
    gave_way = []
    for seconds in (3.0, 1.0, 5.0, 2.0, 4.0):
        found = sampler.decide(ended(end_ns=at(seconds)), ALONE, seconds)
        assert isinstance(found, tuple)
        gave_way += [item for item in found if item is not None]
    assert sorted(gave_way) == [1.0, 2.0, 3.0]
    assert list(sampler.minute(at(59))) == []
    assert list(sampler.minute(at(60))) == [(5.0, Decision.SLOWEST), (4.0, Decision.SLOWEST)]
    assert list(sampler.minute(at(200))) == []


def test_the_slowest_share_the_budget() -> None:
    sampler = Sampler[float](none(tail=TailConfig(per_minute=1, slowest=2)))
    list(sampler.minute(at(0)))
    for seconds in (1.0, 2.0):
        sampler.decide(ended(end_ns=at(seconds)), ALONE, seconds)
    assert list(sampler.minute(at(5), over=True)) == [(2.0, Decision.SLOWEST), (1.0, Decision.BUDGET)]
