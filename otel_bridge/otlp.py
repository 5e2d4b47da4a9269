"""Encodes spans as an OTLP request (opentelemetry-proto 1.x, ExportTraceServiceRequest).

The messages are made directly: the SDK's span objects and its encoder take several times as long, and what
they add (contexts, processors, samplers of a running program) has no use for spans of the past. Most of what
is sent are links of steps: those are put together from encoded pieces, as protobuf allows for the fields of
a message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from gpuglass import __version__
from otel_bridge import attributes as names
from otel_bridge.build import SCOPE, StepLinks
from otel_bridge.journal import Place, SharedStep
from otel_bridge.model import Attributes, Context, Kind, Link, Span, Trace, Value

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
_ERROR = trace_pb2.Status.STATUS_CODE_ERROR
_RESOURCE_SPANS = b"\x0a"  # tags of fields with a length: number x 8 + 2
_SCOPE_SPANS = b"\x12"
_SPANS = b"\x12"
_LINKS = b"\x6a"
_TRACE_ID, _SPAN_ID = b"\x0a\x10", b"\x12\x08"
"""Tags and lengths of the first two fields of Span.Link."""
_double = struct.Struct("<d").pack


def encode(traces: Iterable[Trace]) -> bytes:
    """One request with all spans of some traces, those of one resource together."""
    scopes: dict[Attributes, list[bytes]] = {}
    for trace in traces:
        spans = scopes.get(trace.resource)
        if spans is None:
            spans = scopes[trace.resource] = []
        for span in trace.spans:
            message = _span(span)
            spans += (_SPANS, _varint(len(message)), message)
    request: list[bytes] = []
    for resource, spans in scopes.items():
        found = trace_pb2.ResourceSpans()
        _fill(found.resource.attributes, resource)
        scope = trace_pb2.ScopeSpans()
        scope.scope.name, scope.scope.version = SCOPE, __version__
        inner = scope.SerializeToString() + b"".join(spans)
        outer = b"".join((found.SerializeToString(), _SCOPE_SPANS, _varint(len(inner)), inner))
        request += (_RESOURCE_SPANS, _varint(len(outer)), outer)
    return b"".join(request)


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _BYTES[number]
    if number < 0x4000:
        return _BYTES[number & 0x7F | 0x80] + _BYTES[number >> 7]
    return _BYTES[number & 0x7F | 0x80] + _varint(number >> 7)


_BYTES = [bytes([number]) for number in range(256)]


def _span(span: Span) -> bytes:
    message = trace_pb2.Span()
    message.trace_id, message.span_id = span.context
    if span.parent:
        message.parent_span_id = span.parent
    message.flags = _SAMPLED
    if span.kind is Kind.SERVER:
        message.flags |= _HAS_IS_REMOTE | (_IS_REMOTE if span.parent else 0)
    message.name = span.name
    message.kind = _KINDS[span.kind]
    message.start_time_unix_nano = span.begin_ns
    message.end_time_unix_nano = span.end_ns
    _fill(message.attributes, span.attributes)
    for event in span.events:
        added = message.events.add()
        added.name, added.time_unix_nano = event.name, event.at_ns
        _fill(added.attributes, event.attributes)
    if span.error is not None:
        message.status.code, message.status.message = _ERROR, span.error
    links = span.links
    encoded = _step_links(links) if isinstance(links, StepLinks) else b"".join(map(_link, links))
    return message.SerializeToString() + encoded


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


# Links. Each function gives whole fields, with tag and length.


def _link(link: Link) -> bytes:
    body = _ids(link.context) + b"".join([_pair(name, value) for name, value in link.attributes])
    return _LINKS + _varint(len(body)) + body


def _ids(context: Context) -> bytes:
    return b"".join((_TRACE_ID, context.trace_id, _SPAN_ID, context.span_id))


def _pair(name: str, value: Value) -> bytes:
    """One attribute of a link."""
    link = trace_pb2.Span.Link()
    _fill(link.attributes, ((name, value),))
    return link.SerializeToString()


def _step_links(links: StepLinks) -> bytes:
    """Links to the requests of a step but the span's own. Encoded once for all of them; those that were not
    known yet are looked for again."""
    shared = links.shared
    wire = shared.wire
    if not wire:
        wire = shared.wire = _of_step(shared)
    elif not all(wire):
        known = [place is not None and place.identity is not None for place in shared.places]
        if any(there and not said for there, said in zip(known, wire, strict=True)):
            wire = shared.wire = _of_step(shared)
    return b"".join((*wire[: links.index], *wire[links.index + 1 :]))


def _of_step(shared: SharedStep) -> list[bytes]:
    sample = shared.sample
    phases: Iterable[str] = sample.phases or [""] * len(sample.tokens)
    gpu = sample.gpu_ns
    found = []
    for place, name, tokens, phase in zip(
        shared.places, sample.request_ids, sample.tokens, phases, strict=True
    ):
        said = place and (place.wire or _place(place, name))
        if not said:
            found.append(b"")
            continue
        told = _tokens(tokens, phase)
        if gpu:
            share = _double(gpu[len(found)] / 1e9)
            found.append(
                b"".join((_LINKS, _varint(len(said) + len(told) + _GPU_LENGTH), said, told, _GPU, share))
            )
        else:
            found.append(b"".join((_LINKS, _varint(len(said) + len(told)), said, told)))
    return found


def _place(place: Place, name: str) -> bytes:
    """What all links to a request say; nothing while nobody has said where it is."""
    if place.context is not None:
        place.wire = _ids(place.context) + _pair(names.REQUEST_ID, name)
    return place.wire


@lru_cache(maxsize=16_384)
def _tokens(tokens: int, phase: str) -> bytes:
    return _pair(names.TOKENS, tokens) + (_pair(names.PHASE, phase) if phase else b"")


_GPU = _pair(names.GPU_SECONDS, 1.0)[:-8]
"""The attribute up to its value, which is the last field of it."""
_GPU_LENGTH = len(_GPU) + 8
