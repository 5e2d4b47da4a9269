"""Spans of a request: nesting, sums, attributes, links, events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuglass.record_hub import EndedRequest
from gpuglass_vllm import records
from otel_bridge import attributes as names
from otel_bridge.build import build, phases, resource
from otel_bridge.identity import identify
from otel_bridge.journal import Chunk, Journal, Note, Notes, Reading
from otel_bridge.model import Context, Decision, Kind, Span
from tests.otel_bridge.made import CALLER, INSTANCE, SECOND, TRACE, WORKER, at, ended, start, step, unix

NAME = "cmpl-r-0"
OTHERS = ("cmpl-b-0", "cmpl-c-0")


def spans(
    request: EndedRequest | None = None, notes: Notes | None = None, experts: Reading | None = None
) -> list[Span]:
    request = request or ended()
    name = request.request_id or "refused"
    identity = identify(request.instance, name, request.trace_id, request.span_id, request.sampled)
    return build(request, identity, notes, experts, Decision.CALLER, ()).spans


def noted(*steps: records.StepSample, limit: int = 8) -> tuple[Journal, Notes]:
    journal = Journal(limit)
    for name in (NAME, *OTHERS):
        journal.start(INSTANCE, start(name), at(0))
    for sample in steps:
        journal.step(WORKER, sample, sample.at)
    notes = journal.take(INSTANCE, NAME)
    assert notes is not None
    return journal, notes


def named(found: list[Span], name: str) -> list[Span]:
    return [span for span in found if span.name == name]


def times(span: Span) -> tuple[float, float]:
    """Begin and end in seconds after the request's begin."""
    return (span.begin_ns - unix(0)) / SECOND, (span.end_ns - unix(0)) / SECOND


def check_tree(found: list[Span]) -> None:
    """One root; children lie within their parents; no id twice."""
    by_id = {span.context.span_id: span for span in found}
    assert len(by_id) == len(found)
    for span in found[1:]:
        parent = by_id[span.parent]
        assert parent.begin_ns <= span.begin_ns <= span.end_ns <= parent.end_ns, (parent.name, span.name)
        assert span.context.trace_id == found[0].context.trace_id


def test_a_request_hangs_below_its_caller_and_has_its_phases() -> None:
    root, queue, prefill, decode = found = spans()
    assert root.context.trace_id.hex() == TRACE and root.parent.hex() == CALLER and root.kind is Kind.SERVER
    assert root.name == "text_completion tiny" and root.error is None
    assert [span.name for span in found[1:]] == ["queue", "prefill", "decode"]
    assert [times(span) for span in found] == [(0, 4), (0, 1), (1, 2), (2, 4)]
    assert {span.parent for span in (queue, prefill, decode)} == {root.context.span_id}
    check_tree(found)


def test_its_attributes_follow_the_conventions() -> None:
    told = dict(
        spans(ended(max_tokens=100, preemptions=2, recompute_ns=5e8, kv_share=0.78, lora="l"))[0].attributes
    )
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.max_tokens": 100,
        "gen_ai.response.id": "r",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.response.time_to_first_chunk": 2.0,
        "gen_ai.usage.input_tokens": 1000,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "gen_ai.usage.output_tokens": 100,
        "gpuglass.request.id": NAME,
        "gpuglass.tenant": "blue",
        "gpuglass.outcome": "length",
        "gpuglass.kept_by": "caller",
        "gpuglass.gpu.seconds": 1.5,
        "gpuglass.gpu.recompute_seconds": 0.5,
        "gpuglass.kv.peak_ratio": 0.78,
        "gpuglass.preemptions": 2,
        "gpuglass.lora": "l",
    }


@pytest.mark.parametrize(
    "name, operation",
    [
        ("chatcmpl-x", "chat"),
        ("cmpl-x-0", "text_completion"),
        ("embd-x", "embeddings"),
        ("x", "generate_content"),
    ],
)
def test_the_operation_is_told_by_the_id(name: str, operation: str) -> None:
    assert spans(ended(name))[0].name == f"{operation} tiny"


def test_without_a_caller_it_is_a_root_in_a_trace_of_its_own() -> None:
    root = spans(ended(trace=""))[0]
    assert root.parent == b"" and root.links == () and root.context.trace_id.hex() != TRACE


def test_an_unsampled_caller_is_a_link() -> None:
    root = spans(ended(sampled=False))[0]
    assert root.parent == b"" and root.context.trace_id.hex() != TRACE
    assert [link.context for link in root.links] == [Context(bytes.fromhex(TRACE), bytes.fromhex(CALLER))]


def test_the_engines_own_span_is_a_link() -> None:
    _, notes = noted()
    notes.engine_span = Context(b"t" * 16, b"s" * 8)
    assert [link.context for link in spans(notes=notes)[0].links] == [notes.engine_span]


@pytest.mark.parametrize(
    "request_, expected",
    [
        (
            ended(
                queue_ns=None,
                prefill_ns=None,
                decode_ns=None,
                first_token_ns=None,
                gpu_ns=None,
                outcome="abort",
            ),
            [("queue", 0, 4)],
        ),
        (ended(prefill_ns=None, decode_ns=None, outcome="abort"), [("queue", 0, 1), ("prefill", 1, 4)]),
        (ended(outcome="abort"), [("queue", 0, 1), ("prefill", 1, 2), ("decode", 2, 4)]),
        (ended(request_id="", outcome="rejected", queue_ns=None, prefill_ns=None, decode_ns=None), []),
        # Its core died and told nothing of when it was scheduled; it did run.
        (ended(queue_ns=None, prefill_ns=None, decode_ns=None, outcome="error"), []),
        # What its core told was lost: it was answered, so it ran.
        (ended(queue_ns=None, prefill_ns=None, decode_ns=None, gpu_ns=None, first_token_ns=None), []),
        (ended(queue_ns=None, prefill_ns=None, decode_ns=None, gpu_ns=None, outcome="abort"), []),
    ],
    ids=[
        *("never scheduled", "in its prompt", "in decode", "rejected", "unknown"),
        *("no word of the core", "aborted without it"),
    ],
)
def test_phases_go_as_far_as_the_request_came(
    request_: EndedRequest, expected: list[tuple[str, float, float]]
) -> None:
    assert phases(request_) == [(name, at(begin), at(end)) for name, begin, end in expected]


@pytest.mark.parametrize(
    "outcome, error_type, error",
    [
        ("abort", "", "aborted"),
        ("abort", "timeout", "timeout"),
        ("error", "engine", "engine"),
        ("error", "", "error"),
        ("rejected", "admission", "admission"),
        ("stop", "", None),
    ],
)
def test_what_went_wrong_is_the_spans_status(outcome: str, error_type: str, error: str | None) -> None:
    root = spans(ended(outcome=outcome, error_type=error_type))[0]
    assert root.error == error and dict(root.attributes).get("error.type") == error


def test_a_rejected_request_is_one_span() -> None:
    request = ended(
        "",
        request_id="",
        outcome="rejected",
        error_type="admission",
        external_id="chatcmpl-7",
        tenant="blue",
        queue_ns=None,
        prefill_ns=None,
        decode_ns=None,
        gpu_ns=None,
        first_token_ns=None,
        prompt_tokens=None,
    )
    (root,) = spans(request)
    assert root.name == "chat tiny" and root.parent.hex() == CALLER and root.error == "admission"
    assert dict(root.attributes)["gen_ai.response.id"] == "chatcmpl-7"
    assert "gpuglass.request.id" not in dict(root.attributes)


def test_steps_lie_below_the_phase_that_contains_them() -> None:
    _, notes = noted(
        step(1, 1.2, 1.6, phase="prefill"), step(2, 1.9, 2.1), step(3, 2.5, 2.6), step(4, 3.9, 4.1)
    )
    found = spans(notes=notes)
    ids = {span.context.span_id: span.name for span in found}
    where = {dict(span.attributes)[names.STEP]: ids[span.parent] for span in named(found, "engine.step")}
    assert where == {1: "prefill", 2: "text_completion tiny", 3: "decode"}, (
        "the last one is not the request's"
    )
    check_tree(found)


def test_a_step_tells_its_share_and_links_to_the_others_in_it() -> None:
    journal, notes = noted(
        records.StepSample(
            at=at(3),
            begin_ns=at(2.5),
            step=7,
            tid=1,
            kind="graph",
            request_ids=["cmpl-b-0", NAME, "cmpl-gone-0"],
            tokens=[512, 1, 1],
            phases=["prefill", "decode", "decode"],
            gpu_ns=[3e8, 1e8, 5e7],
            requests=5,
            scheduled_tokens=516,
        )
    )
    (found,) = named(spans(notes=notes), "engine.step")
    assert dict(found.attributes) == {
        names.STEP: 7,
        names.STEP_RANK: 0,
        names.STEP_KIND: "graph",
        names.STEP_REQUESTS: 5,
        names.STEP_TOKENS: 516,
        names.TOKENS: 1,
        names.PHASE: "decode",
        names.GPU_SECONDS: 0.1,
    }
    (link,) = found.links
    other = journal.take(INSTANCE, "cmpl-b-0")
    assert other is not None and link.context == other.place.context
    assert dict(link.attributes) == {
        names.REQUEST_ID: "cmpl-b-0",
        names.TOKENS: 512,
        names.PHASE: "prefill",
        names.GPU_SECONDS: 0.3,
    }


def on_device(begin: float, end: float, error: int = 1000) -> dict[str, Any]:
    return {"gpu_begin_ns": at(begin), "gpu_end_ns": at(end), "gpu_error_ns": error}


def test_the_devices_time_is_a_child_of_the_step() -> None:
    _, notes = noted(step(1, 2.5, 2.6, **on_device(2.55, 2.8)))
    found = spans(notes=notes)
    (step_span,), (execute,) = named(found, "engine.step"), named(found, "gpu.execute")
    assert times(step_span) == (2.5, 2.8), "the step lasts until the device is done"
    assert times(execute) == (2.55, 2.8) and execute.parent == step_span.context.span_id
    assert dict(execute.attributes) == {names.HW_ID: "GPU-1", names.HW_TYPE: "gpu", names.CLOCK_ERROR: 1e-6}
    check_tree(found)


def test_without_the_devices_time_there_is_no_such_child() -> None:
    _, notes = noted(step(1, 2.5, 2.6))
    assert named(spans(notes=notes), "gpu.execute") == []


def test_an_error_of_the_devices_clock_puts_no_child_outside() -> None:
    _, notes = noted(
        step(1, 3.9, 3.95, **on_device(3.89, 4.0005, 500_000)), step(2, 3.0, 3.1, **on_device(2.99, 3.05))
    )
    found = spans(notes=notes)
    assert len(named(found, "gpu.execute")) == 2
    check_tree(found)


def kernels(count: int) -> records.StepKernels:
    return records.StepKernels(
        at=at(3),
        step=1,
        names=[f"gemm{n}" for n in range(count)],
        streams=[7] * count,
        begin_ns=[at(2.6 + n / 100) for n in range(count)],
        duration_ns=[10_000_000] * count,
        error_ns=2000,
        other_ns=5_000_000,
        others=20,
        begun_ns=at(2.55),
        ended_ns=at(2.79),
    )


def test_kernels_of_a_profiled_step_and_the_sum_of_the_others() -> None:
    journal = Journal()
    journal.start(INSTANCE, start(NAME), at(0))
    journal.step(WORKER, step(1, 2.5, 2.6, **on_device(2.55, 2.8)), at(3))
    journal.kernels(WORKER, kernels(3), at(3))
    found = spans(notes=journal.take(INSTANCE, NAME))
    shown = named(found, "gpu.kernel")
    (execute,) = named(found, "gpu.execute")
    assert {span.parent for span in shown} == {execute.context.span_id}
    told = [dict(span.attributes) for span in shown]
    assert [t[names.KERNEL] for t in told] == ["gemm0", "gemm1", "gemm2", "other"]
    assert told[0][names.STREAM] == 7 and told[0][names.KERNEL_SECONDS] == 0.01
    assert (told[3][names.KERNELS], told[3][names.KERNEL_SECONDS]) == (20, 0.005)
    assert sum(float(str(t[names.KERNEL_SECONDS])) for t in told) == pytest.approx(0.035)
    check_tree(found)


def test_pieces_of_the_prompt_are_children_of_prefill() -> None:
    _, notes = noted()
    notes.chunk(Chunk(at(1.1), at(1.4), 512, 2e8))
    notes.chunk(Chunk(at(1.5), at(1.9), 488, 0.0))
    notes.chunk(Chunk(at(2.5), at(2.7), 300, 1e8))  # computed anew after a preemption
    found = spans(notes=notes)
    ids = {span.context.span_id: span.name for span in found}
    chunks = named(found, "prefill.chunk")
    assert [ids[span.parent] for span in chunks] == ["prefill", "prefill", "decode"]
    assert dict(chunks[0].attributes) == {names.TOKENS: 512, names.GPU_SECONDS: 0.2}
    assert dict(chunks[1].attributes) == {names.TOKENS: 488}, "an unknown time is left out"
    check_tree(found)


def test_events_lie_on_the_request_in_their_order() -> None:
    _, notes = noted()
    notes.add(Note(names.E_PREEMPTED, at(3), ((names.CAUSE, "kv_full"),)))
    root = spans(ended(kv_share=0.9, kv_share_at=at(2)), notes, Reading(at(1), at(9), 4.0, 2))[0]
    assert [(e.name, (e.at_ns - unix(0)) / SECOND) for e in root.events] == [
        (names.E_KV_PEAK, 2),
        (names.E_PREEMPTED, 3),
        (names.E_EXPERTS, 4),
    ]


def test_all_times_use_the_clock_as_it_was_at_the_end() -> None:
    _, notes = noted(step(1, 2.5, 2.6))
    hour = 3600 * SECOND
    before, after = spans(notes=notes), spans(ended(clock_offset_ns=ended().clock_offset_ns + hour), notes)
    assert [span.begin_ns + hour for span in before] == [span.begin_ns for span in after]
    check_tree(after)


def test_the_resource_is_the_engine() -> None:
    request = ended(server="chat", workload=("prod", "vllm-0", "vllm"), gpu_uuids=("GPU-1", "GPU-2"))
    assert dict(resource(request, "vllm", (("host.name", "node-1"),))) == {
        "service.name": "chat",
        "service.instance.id": INSTANCE,
        "service.version": "0.32.0",
        "k8s.namespace.name": "prod",
        "k8s.pod.name": "vllm-0",
        "k8s.container.name": "vllm",
        "gpuglass.engine": "0",
        "gpuglass.gpu.uuids": ("GPU-1", "GPU-2"),
        "host.name": "node-1",
    }
    mine = dict(resource(request, "vllm", (("service.name", "mine"),)))
    assert mine["service.name"] == "mine", "what the operator says holds"
    bare = dict(resource(ended(gpu_uuids=()), "vllm", ()))
    assert bare["service.name"] == "vllm" and "k8s.pod.name" not in bare and "gpuglass.gpu.uuids" not in bare


_MOMENT = st.integers(-SECOND, 6 * SECOND)


@given(
    st.lists(st.tuples(_MOMENT, _MOMENT, st.tuples(_MOMENT, _MOMENT) | st.none()), max_size=12),
    st.lists(st.tuples(_MOMENT, _MOMENT), max_size=6),
    *([st.integers(0, 5 * SECOND) | st.none()] * 3),
)
def test_whatever_is_told_children_lie_within_their_parents(
    steps: list[tuple[int, int, tuple[int, int] | None]],
    chunks: list[tuple[int, int]],
    queue: int | None,
    prefill: int | None,
    decode: int | None,
) -> None:
    samples = []
    for number, (one, other, device) in enumerate(steps):
        begin, end = sorted((one, other))
        gpu = sorted(device) if device else [0, 0]
        told = {"gpu_begin_ns": at(0) + gpu[0], "gpu_end_ns": at(0) + gpu[1]} if device else {}
        samples.append(step(number, begin / SECOND, end / SECOND, **told))
    _, notes = noted(*samples, limit=12)
    for one, other in chunks:
        notes.chunk(Chunk(at(0) + min(one, other), at(0) + max(one, other), 1, 1.0))
    check_tree(spans(ended(queue_ns=queue, prefill_ns=prefill, decode_ns=decode), notes))
