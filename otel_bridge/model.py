"""Spans as plain values: what `build` makes of a request and `otlp` encodes. Times are Unix nanoseconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple

Value = str | bool | int | float | tuple[str, ...]
Attributes = tuple[tuple[str, Value], ...]


class Kind(Enum):
    """Kind of a span."""

    INTERNAL = "internal"
    SERVER = "server"


class Context(NamedTuple):
    """Where a span stands: 16 bytes of trace, 8 of span."""

    trace_id: bytes
    span_id: bytes


class Event(NamedTuple):
    """Something that happened in a span."""

    name: str
    at_ns: int
    attributes: Attributes = ()


class Link(NamedTuple):
    """A span in this or another trace that belongs to this one."""

    context: Context
    attributes: Attributes = ()


class Span(NamedTuple):
    """One span."""

    name: str
    context: Context
    parent: bytes
    """Id of the parent span; empty: a root."""
    begin_ns: int
    end_ns: int
    attributes: Attributes = ()
    events: tuple[Event, ...] = ()
    links: Iterable[Link] = ()
    kind: Kind = Kind.INTERNAL
    error: str | None = None
    """What went wrong; None: nothing did."""


class Decision(StrEnum):
    """Why a request's trace is kept, or why not."""

    CALLER = "caller"
    RATIO = "ratio"
    FAILED = "failed"
    ABORTED = "aborted"
    PREEMPTED = "preempted"
    SLOWEST = "slowest"
    UNSAMPLED = "unsampled"
    BUDGET = "budget"
    """A tail rule wanted it, and its budget was spent."""
    UNKNOWN = "unknown"
    """Whether its caller samples it, and in which trace, was never heard."""

    @property
    def keeps(self) -> bool:
        """Whether it is exported."""
        return self not in (Decision.UNSAMPLED, Decision.BUDGET, Decision.UNKNOWN)


@dataclass(frozen=True, slots=True)
class Trace:
    """All spans of a request, the request's own first."""

    resource: Attributes
    spans: list[Span]
