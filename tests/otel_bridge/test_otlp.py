"""Spans on the wire, read back by OpenTelemetry's own classes, and the table of attributes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Proto
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from gpuglass_vllm import records
from otel_bridge import attributes, page
from otel_bridge.build import StepLinks
from otel_bridge.identity import identify
from otel_bridge.journal import Place, SharedStep
from otel_bridge.model import Context, Event, Kind, Link, Span, Trace
from otel_bridge.otlp import encode
from tests.otel_bridge.made import CALLER, INSTANCE, TRACE, WORKER, at

ROOM = Path(attributes.__file__).parent
TRACE_ID, SPAN_ID = b"t" * 16, b"s" * 8
RESOURCE = (("service.name", "vllm"),)


def decoded(*traces: Trace) -> ExportTraceServiceRequest:
    return ExportTraceServiceRequest.FromString(encode(traces))


def value(pair: KeyValue) -> Any:
    kind = pair.value.WhichOneof("value")
    assert kind is not None, pair.key
    if kind == "array_value":
        return tuple(item.string_value for item in pair.value.array_value.values)
    return getattr(pair.value, kind)


def test_a_span_arrives_with_all_it_says() -> None:
    told = (
        ("text", "ü"),
        ("yes", True),
        ("no", False),
        ("one", 1),
        ("half", 0.5),
        ("many", ("a", "b")),
        ("none", ()),
    )
    span = Span(
        "chat tiny",
        Context(TRACE_ID, SPAN_ID),
        b"p" * 8,
        10,
        20,
        told,
        (Event("preempted", 15, (("cause", "kv_full"),)),),
        (Link(Context(b"o" * 16, b"l" * 8), (("tokens", 1), ("share", 1.0), ("flag", True))),),
        Kind.SERVER,
        "timeout",
    )
    (of_resource,) = decoded(Trace(RESOURCE, [span])).resource_spans
    assert {p.key: value(p) for p in of_resource.resource.attributes} == {"service.name": "vllm"}
    (scope,) = of_resource.scope_spans
    assert scope.scope.name == "gpuglass.otel_bridge" and scope.scope.version
    (found,) = scope.spans
    assert (found.name, found.trace_id, found.span_id, found.parent_span_id) == (
        "chat tiny",
        TRACE_ID,
        SPAN_ID,
        b"p" * 8,
    )
    assert (found.start_time_unix_nano, found.end_time_unix_nano) == (10, 20)
    assert found.kind == Proto.SPAN_KIND_SERVER and found.flags & 0x301 == 0x301
    read = {p.key: value(p) for p in found.attributes}
    assert read == dict(told) and {k: type(v) for k, v in read.items()} == {k: type(v) for k, v in told}
    (event,) = found.events
    assert (event.name, event.time_unix_nano, event.attributes[0].key) == ("preempted", 15, "cause")
    (link,) = found.links
    assert (link.trace_id, link.span_id) == (b"o" * 16, b"l" * 8)
    # 1, 1.0 and True are equal in Python, and are not in OTLP.
    assert [(p.key, p.value.WhichOneof("value")) for p in link.attributes] == [
        ("tokens", "int_value"),
        ("share", "double_value"),
        ("flag", "bool_value"),
    ]
    assert (found.status.code, found.status.message) == (Status.STATUS_CODE_ERROR, "timeout")


def test_links_that_say_the_same_by_other_types_stay_apart() -> None:
    context = Context(TRACE_ID, SPAN_ID)
    links = tuple(Link(context, (("n", n),)) for n in (1, True, 1.0, 1))
    (span,) = (
        decoded(Trace(RESOURCE, [Span("s", context, b"", 1, 2, links=links)]))
        .resource_spans[0]
        .scope_spans[0]
        .spans
    )
    kinds = [link.attributes[0].value.WhichOneof("value") for link in span.links]
    assert kinds == ["int_value", "bool_value", "double_value", "int_value"]


def test_a_root_without_error_has_neither_parent_nor_status() -> None:
    span = Span("queue", Context(TRACE_ID, SPAN_ID), b"", 10, 20)
    (found,) = decoded(Trace(RESOURCE, [span])).resource_spans[0].scope_spans[0].spans
    assert found.parent_span_id == b"" and not found.HasField("status")
    assert found.kind == Proto.SPAN_KIND_INTERNAL and found.flags == 1


def test_spans_of_one_engine_stand_together() -> None:
    span = Span("s", Context(TRACE_ID, SPAN_ID), b"", 1, 2)
    other = (("service.name", "other"),)
    request = decoded(Trace(RESOURCE, [span, span]), Trace(other, [span]), Trace(RESOURCE, [span]))
    assert [len(r.scope_spans[0].spans) for r in request.resource_spans] == [3, 1]


def test_more_links_than_the_sdks_limit_arrive() -> None:
    links = tuple(Link(Context(TRACE_ID, bytes([n // 256, n % 256] * 4)), ()) for n in range(1, 513))
    span = Span("engine.step", Context(TRACE_ID, SPAN_ID), b"", 1, 2, links=links)
    (found,) = decoded(Trace(RESOURCE, [span])).resource_spans[0].scope_spans[0].spans
    assert len({link.span_id for link in found.links}) == 512


def links_of(span: Proto) -> list[tuple[bytes, bytes, dict[str, Any]]]:
    return [(link.trace_id, link.span_id, {p.key: value(p) for p in link.attributes}) for link in span.links]


@pytest.mark.parametrize("told", ["all", "no phases", "no GPU time"])
def test_links_of_a_step_are_what_it_says_to_each_of_its_requests(told: str) -> None:
    ids = ["cmpl-a-0", "cmpl-b-0", "cmpl-over-0", "cmpl-late-0", "cmpl-c-0"]
    sample = records.StepSample(
        at=at(3),
        begin_ns=at(2),
        step=7,
        tid=1,
        kind="graph",
        request_ids=ids,
        tokens=[300, 1, 1, 1, 20_000],
        phases=["prefill", "decode", "decode", "decode", "prefill"] if told != "no phases" else [],
        gpu_ns=[3e8, 1e8, 0.0, 1e7, 123456789.25] if told != "no GPU time" else [],
    )
    places = tuple(Place() if name != "cmpl-over-0" else None for name in ids)
    shared = SharedStep.of(WORKER, sample, places)

    def check() -> None:
        for index in (0, 1, 4):
            links = StepLinks(shared, index)
            span = Span("engine.step", Context(TRACE_ID, SPAN_ID), b"", 1, 2, (("n", 1),), links=links)
            (found,) = decoded(Trace(RESOURCE, [span])).resource_spans[0].scope_spans[0].spans
            assert (found.name, found.end_time_unix_nano, found.attributes[0].key) == ("engine.step", 2, "n")
            plain = [(*link.context, dict(link.attributes)) for link in links]
            assert links_of(found) == plain
            assert [told[attributes.REQUEST_ID] for _, _, told in plain] == [
                name
                for other, name in enumerate(ids)
                if other != index and places[other] is not None and places[other].identity is not None  # type: ignore[union-attr]
            ]

    for name, place in zip(ids, places, strict=True):
        if place is not None and name != "cmpl-late-0":
            place.identity = identify(INSTANCE, name)
    check()
    late = places[3]
    assert late is not None
    late.identity = identify(INSTANCE, "cmpl-late-0", TRACE, CALLER, True)
    check()


@pytest.mark.parametrize("length", [0, 1, 100, 127, 128, 16_383, 16_384, 3_000_000])
def test_spans_of_any_length_arrive(length: int) -> None:
    span = Span("s", Context(TRACE_ID, SPAN_ID), b"", 1, 2, (("text", "x" * length),))
    found = decoded(Trace(RESOURCE, [span, span])).resource_spans[0].scope_spans[0].spans
    assert [len(one.attributes[0].value.string_value) for one in found] == [length, length]


def test_names_of_conventions_are_those_of_opentelemetry() -> None:
    from opentelemetry.semconv._incubating.attributes import (
        gen_ai_attributes,
        host_attributes,
        hw_attributes,
        k8s_attributes,
        service_attributes,
    )
    from opentelemetry.semconv.attributes import error_attributes
    from opentelemetry.semconv.attributes import service_attributes as stable

    modules = (
        gen_ai_attributes,
        hw_attributes,
        k8s_attributes,
        host_attributes,
        service_attributes,
        error_attributes,
        stable,
    )
    known = {v for module in modules for k, v in vars(module).items() if k.isupper() and isinstance(v, str)}
    ours = {row.name for row in attributes.TABLE if not row.name.startswith("gpuglass.")}
    # Newer than the package: GenAI's conventions moved to a repository of their own.
    assert ours - known <= {"gen_ai.response.time_to_first_chunk"}
    assert not any("prompt_tokens" in name or "completion_tokens" in name for name in ours)


def test_each_name_stands_in_the_table_once() -> None:
    rows = [row.name for row in attributes.TABLE]
    assert len(rows) == len(set(rows))
    constants = {k: v for k, v in vars(attributes).items() if k.isupper() and not k.startswith("_")}
    used = {v for v in constants.values() if isinstance(v, str)}
    assert used == set(rows)


def test_the_page_has_the_table_of_today() -> None:
    text = (ROOM / "README.md").read_text()
    assert page.updated(text) == text, "make generated"
    stale = text.replace("`gpuglass.tenant`", "`gpuglass.tenants`")
    assert stale != text and page.updated(stale) == text
