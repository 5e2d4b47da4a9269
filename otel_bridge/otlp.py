"""Encodes spans as an OTLP request (opentelemetry-proto 1.x, ExportTraceServiceRequest).

The messages are made directly: the SDK's span objects and its encoder take several times as long, and what
they add (contexts, processors, samplers of a running program) has no use for spans of the past.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from gpuglass import __version__
from otel_bridge.build import SCOPE
from otel_bridge.model import Attributes, Kind, Link, Span, Trace, Value

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

_SAMPLED = 1
"""W3C trace flags in `Span.flags`."""
_HAS_IS_REMOTE = 0x100
_IS_REMOTE = 0x200
_KINDS = {
    Kind.INTERNAL: trace_pb2.Span.SPAN_KIND_INTERNAL,
    Kind.SERVER: trace_pb2.Span.SPAN_KIND_SERVER,
}
_TRACE_ID, _SPAN_ID = b"\x0a\x10", b"\x12\x08"
"""Tags and lengths of the first two fields of Span.Link."""
_ERROR = trace_pb2.Status.STATUS_CODE_ERROR


def encode(traces: Iterable[Trace]) -> bytes:
    """One request with all spans of some traces, those of one resource together."""
    request = ExportTraceServiceRequest()
    scopes: dict[Attributes, trace_pb2.ScopeSpans] = {}
    for trace in traces:
        scope = scopes.get(trace.resource)
        if scope is None:
            found = request.resource_spans.add()
            _fill(found.resource.attributes, trace.resource)
            scope = scopes[trace.resource] = found.scope_spans.add()
            scope.scope.name, scope.scope.version = SCOPE, __version__
        for span in trace.spans:
            _span(scope.spans.add(), span)
    return request.SerializeToString()


def _span(into: trace_pb2.Span, span: Span) -> None:
    # Fields are set in place: a message that is given to another one is copied.
    into.trace_id, into.span_id = span.context
    if span.parent:
        into.parent_span_id = span.parent
    into.flags = _SAMPLED
    if span.kind is Kind.SERVER:
        into.flags |= _HAS_IS_REMOTE | (_IS_REMOTE if span.parent else 0)
    into.name = span.name
    into.kind = _KINDS[span.kind]
    into.start_time_unix_nano = span.begin_ns
    into.end_time_unix_nano = span.end_ns
    _fill(into.attributes, span.attributes)
    for event in span.events:
        added = into.events.add()
        added.name, added.time_unix_nano = event.name, event.at_ns
        _fill(added.attributes, event.attributes)
    for link in span.links:
        into.links.add().MergeFromString(_link(link))
    if span.error is not None:
        into.status.code, into.status.message = _ERROR, span.error


def _fill(into: RepeatedCompositeFieldContainer[KeyValue], attributes: Attributes) -> None:
    for name, value in attributes:
        pair = into.add()
        pair.key = name
        if isinstance(value, str):
            pair.value.string_value = value
        elif isinstance(value, bool):  # before int, of which it is one
            pair.value.bool_value = value
        elif isinstance(value, int):
            pair.value.int_value = value
        elif isinstance(value, float):
            pair.value.double_value = value
        else:
            items = pair.value.array_value.values
            for item in value:
                items.add().string_value = item
            pair.value.array_value.SetInParent()  # an empty list is a value, too


def _link(link: Link) -> bytes:
    """A link as it is on the wire. A step has up to 63 of them, and most of what they say was said before, so
    attributes are encoded once: this is more than twice as fast as setting fields."""
    pairs = b"".join([_pair(name, value) for name, value in link.attributes])
    return _TRACE_ID + link.context.trace_id + _SPAN_ID + link.context.span_id + pairs


@lru_cache(maxsize=16_384, typed=True)  # typed: 1, 1.0 and True are one key otherwise
def _pair(name: str, value: Value) -> bytes:
    """One attribute of a link."""
    link = trace_pb2.Span.Link()
    _fill(link.attributes, ((name, value),))
    return link.SerializeToString()
