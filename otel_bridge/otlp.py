"""Encodes spans as an OTLP request (opentelemetry-proto 1.x, ExportTraceServiceRequest).

The messages are made directly: the SDK's span objects and its encoder take several times as long, and what
they add (contexts, processors, samplers of a running program) has no use for spans of the past.
"""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from gpuglass import __version__
from otel_bridge.build import SCOPE
from otel_bridge.model import Attributes, Kind, Span, Trace, Value

_SAMPLED = 1
"""W3C trace flags in `Span.flags`."""
_HAS_IS_REMOTE = 0x100
_IS_REMOTE = 0x200
_KINDS = {
    Kind.INTERNAL: trace_pb2.Span.SPAN_KIND_INTERNAL,
    Kind.SERVER: trace_pb2.Span.SPAN_KIND_SERVER,
}
_ERROR = trace_pb2.Status.STATUS_CODE_ERROR


def encode(traces: Iterable[Trace]) -> bytes:
    """One request with all spans of some traces, those of one resource together."""
    request = ExportTraceServiceRequest()
    scopes: dict[Attributes, trace_pb2.ScopeSpans] = {}
    for trace in traces:
        scope = scopes.get(trace.resource)
        if scope is None:
            found = request.resource_spans.add()
            found.resource.attributes.extend(_pairs(trace.resource))
            scope = scopes[trace.resource] = found.scope_spans.add()
            scope.scope.name, scope.scope.version = SCOPE, __version__
        scope.spans.extend(map(_span, trace.spans))
    return request.SerializeToString()


def _span(span: Span) -> trace_pb2.Span:
    flags = _SAMPLED
    if span.kind is Kind.SERVER:
        flags |= _HAS_IS_REMOTE | (_IS_REMOTE if span.parent else 0)
    return trace_pb2.Span(
        trace_id=span.context.trace_id,
        span_id=span.context.span_id,
        parent_span_id=span.parent,
        flags=flags,
        name=span.name,
        kind=_KINDS[span.kind],
        start_time_unix_nano=span.begin_ns,
        end_time_unix_nano=span.end_ns,
        attributes=_pairs(span.attributes),
        events=[
            trace_pb2.Span.Event(name=e.name, time_unix_nano=e.at_ns, attributes=_pairs(e.attributes))
            for e in span.events
        ],
        links=[
            trace_pb2.Span.Link(
                trace_id=link.context.trace_id,
                span_id=link.context.span_id,
                attributes=_pairs(link.attributes),
            )
            for link in span.links
        ],
        status=trace_pb2.Status(code=_ERROR, message=span.error) if span.error is not None else None,
    )


def _pairs(attributes: Attributes) -> list[KeyValue]:
    return [KeyValue(key=name, value=_any(value)) for name, value in attributes]


def _any(value: Value) -> AnyValue:
    if isinstance(value, str):
        return AnyValue(string_value=value)
    if isinstance(value, bool):  # before int, of which it is one
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(array_value=ArrayValue(values=[AnyValue(string_value=item) for item in value]))
