"""What the middleware knows about the HTTP request that the current task serves."""

from __future__ import annotations

import re
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from gpuglass_vllm import records

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")


class Trace(NamedTuple):
    """W3C trace context of the caller."""

    trace_id: str = ""
    span_id: str = ""
    sampled: bool = False


NO_TRACE = Trace()


def parse_traceparent(header: str) -> Trace:
    """Trace context of a `traceparent` header (W3C Trace Context, 3.2); `NO_TRACE` if it is invalid."""
    match = _TRACEPARENT.match(header.strip())
    if match is None:
        return NO_TRACE
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return NO_TRACE
    return Trace(trace_id, span_id, bool(int(flags, 16) & 1))


@dataclass
class Call:
    """One HTTP request on its way through the server."""

    tenant: str = records.NO_TENANT
    trace: Trace = NO_TRACE
    external_id: str = ""
    begin_ns: int = field(default_factory=time.monotonic_ns)
    started: bool = False
    """It entered the engine: how it ends is seen there."""
    refused: bool = False
    """Its refusal was counted."""


current: ContextVar[Call | None] = ContextVar("gpuglass_call", default=None)
