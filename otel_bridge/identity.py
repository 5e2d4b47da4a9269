"""Which trace and span a request is: the caller's, or one of its own that only depends on the request.

Ids are derived, not drawn: an agent that is restarted in the middle of a request, or a span that is sent
twice, comes to the same ones, and a step can link to requests that are still running.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from gpuglass.exemplar import is_trace_id
from otel_bridge.model import Context

_MASK = (1 << 64) - 1
_STRIDE = 0x9E3779B97F4A7C15
"""Odd, so that no two numbers give one id (the fractional part of the golden ratio)."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A request's place among traces."""

    own: Context
    """Its span in a trace of its own."""
    caller: Context | None
    """The caller's span; None: it sent no trace context."""
    sampled: bool
    """The caller's flag."""

    @property
    def follows_caller(self) -> bool:
        """Whether its spans stand in the caller's trace."""
        return self.caller is not None and self.sampled

    @property
    def context(self) -> Context:
        """Its span, if it is exported."""
        return Context(self.caller.trace_id, self.own.span_id) if self.caller and self.sampled else self.own

    def is_in_ratio(self, ratio: float) -> bool:
        """Whether a share of all requests includes it (as TraceIdRatioBased: by the trace id's last half)."""
        return int.from_bytes(self.own.trace_id[8:]) < int(ratio * (_MASK + 1))


def identify(
    instance: str, request: str, trace_id: str = "", span_id: str = "", sampled: bool = False
) -> Identity:
    """Identity of a request of a server; `trace_id` and `span_id` are the caller's, in hex."""
    digest = blake2b(f"{instance}\0{request}".encode(), digest_size=24).digest()
    own = Context(digest[:16], digest[16:])
    caller = None
    if is_trace_id(trace_id):
        try:
            span = bytes.fromhex(span_id) if len(span_id) == 16 else b""
        except ValueError:
            span = b""
        caller = Context(bytes.fromhex(trace_id), span if any(span) else b"")
    return Identity(own, caller, sampled and caller is not None)


def child(context: Context, number: int) -> Context:
    """The `number`th (from 1) span below a request's."""
    span = (int.from_bytes(context.span_id) + number * _STRIDE) & _MASK
    return Context(context.trace_id, (span or 1).to_bytes(8))
