"""Made requests, steps and speakers: what engines would have told, with times that a test chooses.

Times of requests are seconds after `BEGIN`, on the monotonic clock; `unix` gives the Unix nanoseconds that
the spans should have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpuglass.exemplar import Names
from gpuglass.record_hub import EndedRequest, Speaker
from gpuglass_vllm import records

SECOND = 1_000_000_000
BEGIN = 1000 * SECOND
OFFSET = 1_790_000_000 * SECOND
INSTANCE = "server-a"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

WORKER = Speaker(3, 77, 0, "worker", INSTANCE, OFFSET, 0, "0", "GPU-1", 8)
FRONTEND = Speaker(1, 75, 0, "frontend", INSTANCE, OFFSET)
CORE = Speaker(2, 76, 0, "core", INSTANCE, OFFSET)


def at(seconds: float) -> int:
    """That many seconds after `BEGIN`."""
    return BEGIN + round(seconds * SECOND)


def unix(seconds: float) -> int:
    """The same as Unix nanoseconds."""
    return at(seconds) + OFFSET


def start(
    name: str = "cmpl-r-0", trace: str = TRACE, sampled: bool = True, **more: Any
) -> records.RequestStart:
    """A request enters; without `trace` its caller sent no context."""
    span = CALLER if trace else ""
    return records.RequestStart(
        at=BEGIN, request_id=name, trace_id=trace, span_id=span, sampled=sampled and bool(trace), **more
    )


def ended(
    name: str = "cmpl-r-0",
    trace: str = TRACE,
    sampled: bool = True,
    exemplify: Callable[[Names], None] = lambda names: None,
    **more: Any,
) -> EndedRequest:
    """A request of four seconds: one in the queue, one of prefill, two of decode."""
    fields: dict[str, Any] = {
        "instance": INSTANCE,
        "request_id": name,
        "external_id": "r",
        "trace_id": trace,
        "span_id": CALLER if trace else "",
        "sampled": sampled and bool(trace),
        "outcome": "length",
        "error_type": "",
        "begin_ns": BEGIN,
        "end_ns": at(4),
        "clock_offset_ns": OFFSET,
        "tenant": "blue",
        "model_name": "tiny",
        "engine": "0",
        "server": "",
        "workload": ("", "", ""),
        "software": ("vllm", "0.32.0"),
        "gpu_uuids": ("GPU-1",),
        "exemplify": exemplify,
        "queue_ns": SECOND,
        "prefill_ns": SECOND,
        "decode_ns": 2 * SECOND,
        "first_token_ns": 2 * SECOND,
        "prompt_tokens": 1000,
        "cached_tokens": 16,
        "output_tokens": 100,
        "gpu_ns": 1.5e9,
    }
    return EndedRequest(**(fields | more))


def step(
    number: int,
    begin: float,
    end: float,
    names: Sequence[str] = ("cmpl-r-0",),
    phase: str = "decode",
    **more: Any,
) -> records.StepSample:
    """A step with one token for each request."""
    return records.StepSample(
        at=at(end),
        begin_ns=at(begin),
        step=number,
        tid=77,
        kind="graph",
        request_ids=list(names),
        tokens=[1] * len(names),
        phases=[phase] * len(names),
        gpu_ns=[1e6] * len(names),
        requests=len(names),
        scheduled_tokens=len(names),
        **more,
    )
