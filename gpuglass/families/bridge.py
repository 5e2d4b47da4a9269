"""Families of the trace bridge (`otel_bridge`) about itself: what became of traces and spans, and why.

A trace is counted once by what became of it; traces that nobody sampled are counted, too, so that the sum is
all requests that ended.
"""

from __future__ import annotations

from gpuglass.family import Family, Kind

_OFF = "No endpoint is configured (traces.endpoint)."


def _own(name: str, kind: Kind, unit: str, help: str, *labels: str, absent: str = _OFF) -> Family:
    return Family(f"gpuglass_traces_{name}", kind, help, labels, unit, absent=absent)


DECIDED = _own(
    "requests_total",
    Kind.COUNTER,
    "",
    "Ended requests by decision: kept because of the caller, ratio, failed, aborted, preempted or slowest; "
    "not kept because of unsampled (by the caller, by ratio and rules), budget (of the tail rules) or "
    "unknown (what was told of its caller was lost).",
    "decision",
)
EXPORTED = _own("exported_total", Kind.COUNTER, "", "Traces whose spans the collector accepted.")
DROPPED = _own(
    "dropped_total",
    Kind.COUNTER,
    "",
    "Traces that were kept and did not reach the collector, by reason: queue_full, refused (by the "
    "collector), failed (could not be made or sent), shutdown.",
    "reason",
)
SPANS = _own("spans_exported_total", Kind.COUNTER, "", "Spans that the collector accepted.")
SPANS_REFUSED = _own("spans_refused_total", Kind.COUNTER, "", "Spans that the collector refused.")
SENT = _own("sent_bytes_total", Kind.COUNTER, "bytes", "Bytes sent to the collector, before compression.")
ATTEMPTS = _own(
    "export_attempts_total",
    Kind.COUNTER,
    "",
    "Requests to the collector by result: ok, partial, retry (it failed and is tried again), refused.",
    "result",
)
UP = _own(
    "collector_up",
    Kind.GAUGE,
    "",
    "1 if the latest request to the collector was answered, 0 if not.",
    absent="No endpoint is configured (traces.endpoint), or nothing was sent yet.",
)
QUEUED = _own("queued", Kind.GAUGE, "", "Ended requests that wait for the collector.")
OPEN = _own("open_requests", Kind.GAUGE, "", "Open requests of which steps and events are noted.")
NOTES_DROPPED = _own(
    "notes_dropped_total",
    Kind.COUNTER,
    "",
    "Open requests whose steps and events were forgotten because there were too many or nothing was heard.",
)
EXEMPLARS = _own("exemplars_total", Kind.COUNTER, "", "Requests that exemplars name by an accepted trace.")
WORK = _own(
    "work_seconds_total", Kind.COUNTER, "seconds", "CPU time of the thread that makes and sends spans."
)
