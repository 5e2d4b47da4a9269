"""Makes the spans of a request that has ended, from what the ledger says of it and what was noted. Pure.

    request (server)            arrival to last output
      queue | prefill | decode  as the engine's core tells them; what never came is left out
        prefill.chunk           one per step that computed a piece of the prompt
        engine.step             some of its steps; links name the other requests in them
          gpu.execute           what the device took of it, where that is known
            gpu.kernel          where the step was profiled

A span lies below the innermost one that contains it, so children never leave their parents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gpuglass.record_hub import EndedRequest
from gpuglass_vllm import records
from otel_bridge import attributes as names
from otel_bridge.identity import Identity, child
from otel_bridge.journal import Note, Notes, Reading, SharedStep, StepOf
from otel_bridge.model import (
    Attributes,
    Context,
    Decision,
    Event,
    Kind,
    Link,
    Span,
    Trace,
    Value,
)

QUEUE, PREFILL, DECODE = "queue", "prefill", "decode"
CHUNK, STEP, EXECUTE, KERNEL = "prefill.chunk", "engine.step", "gpu.execute", "gpu.kernel"
SCOPE = "gpuglass.otel_bridge"

_OPERATIONS = {"chatcmpl": "chat", "cmpl": "text_completion", "embd": "embeddings"}
"""By the beginning of the ids that vLLM gives."""
_PHASES = {QUEUE: 1, PREFILL: 2, DECODE: 3}
_FIRST_FREE = 16
"""Number of the first child span that is none of the phases."""
_EDGE_NS = 1_000_000
"""By how much the device's times may leave the step that they belong to before they are taken as told."""


def present(*pairs: tuple[str, Value | None]) -> Attributes:
    """Those pairs whose value is known."""
    return tuple((name, value) for name, value in pairs if value is not None and value != "")


def resource(request: EndedRequest, service_name: str, common: Attributes) -> Attributes:
    """Attributes of what a request's spans are about: one engine on one node."""
    namespace, pod, container = request.workload
    found = dict(
        present(
            (names.SERVICE_NAME, request.server or service_name),
            (names.SERVICE_INSTANCE, request.instance),
            (names.SERVICE_VERSION, request.software[1]),
            (names.K8S_NAMESPACE, namespace),
            (names.K8S_POD, pod),
            (names.K8S_CONTAINER, container),
            (names.ENGINE, request.engine),
            (names.GPU_UUIDS, request.gpu_uuids or None),
        )
    )
    return tuple((found | dict(common)).items())  # what the operator says holds


def build(
    request: EndedRequest,
    identity: Identity,
    notes: Notes | None,
    experts: Reading | None,
    decision: Decision,
    of: Attributes,
) -> Trace:
    """All spans of a request; `of` is its resource."""
    return Trace(of, list(_Builder(request, identity, decision).spans(notes, experts)))


class _Builder:
    def __init__(self, request: EndedRequest, identity: Identity, decision: Decision) -> None:
        self.request = request
        self.identity = identity
        self.decision = decision
        self.context = identity.context
        self.offset = request.clock_offset_ns
        self.children = _FIRST_FREE
        self.begin = request.begin_ns
        self.end = max(request.end_ns, request.begin_ns)
        self.phases = phases(request)

    def spans(self, notes: Notes | None, experts: Reading | None) -> Iterable[Span]:
        """The request's own span first."""
        yield self._root(notes, experts)
        for name, begin, end in self.phases:
            yield Span(
                name,
                child(self.context, _PHASES[name]),
                self.context.span_id,
                begin + self.offset,
                end + self.offset,
            )
        if notes is None:
            return
        for chunk in notes.chunks:
            home = self._home(chunk.begin_ns, chunk.end_ns)
            if home is not None:
                yield Span(
                    CHUNK,
                    self._next(),
                    home,
                    chunk.begin_ns + self.offset,
                    chunk.end_ns + self.offset,
                    present(
                        (names.TOKENS, chunk.tokens),
                        (names.GPU_SECONDS, chunk.gpu_ns / 1e9 if chunk.gpu_ns else None),
                    ),
                )
        if notes.steps is not None:
            for seen in notes.steps.kept():
                yield from self._step(seen)

    def _next(self) -> Context:
        self.children += 1
        return child(self.context, self.children)

    def _home(self, begin: int, end: int) -> bytes | None:
        """Id of the innermost span that contains a time; None if it is not the request's."""
        for name, first, last in self.phases:
            if first <= begin and end <= last:
                return child(self.context, _PHASES[name]).span_id
        return self.context.span_id if self.begin <= begin and end <= self.end else None

    def _root(self, notes: Notes | None, experts: Reading | None) -> Span:
        request, identity = self.request, self.identity
        error = request.error_type or (request.outcome if request.outcome in ("error", "rejected") else None)
        if request.outcome == "abort" and error is None:
            error = "aborted"
        operation = _OPERATIONS.get((request.request_id or request.external_id).partition("-")[0])
        operation = operation or "generate_content"
        finish = (request.outcome,) if request.outcome in ("stop", "length") else None
        links: list[Link] = []
        parent = b""
        if identity.follows_caller and identity.caller is not None:
            parent = identity.caller.span_id
        elif identity.caller is not None and identity.caller.span_id:
            links.append(Link(identity.caller))
        if notes is not None and notes.engine_span is not None:
            links.append(Link(notes.engine_span))
        return Span(
            f"{operation} {request.model_name}",
            self.context,
            parent,
            self.begin + self.offset,
            self.end + self.offset,
            present(
                (names.OPERATION, operation),
                (names.PROVIDER, request.software[0]),
                (names.REQUEST_MODEL, request.model_name),
                (names.RESPONSE_MODEL, request.model_name),
                (names.MAX_TOKENS, request.max_tokens),
                (names.RESPONSE_ID, request.external_id),
                (names.FINISH_REASONS, finish),
                (names.FIRST_CHUNK, _seconds(request.first_token_ns)),
                (names.INPUT_TOKENS, request.prompt_tokens),
                (names.CACHED_TOKENS, request.cached_tokens),
                (names.OUTPUT_TOKENS, request.output_tokens),
                (names.ERROR_TYPE, error),
                (names.REQUEST_ID, request.request_id),
                (names.TENANT, request.tenant),
                (names.OUTCOME, request.outcome),
                (names.KEPT_BY, self.decision.value),
                (names.GPU_SECONDS, _seconds(request.gpu_ns)),
                (names.RECOMPUTE, _seconds(request.recompute_ns) if request.recompute_ns else None),
                (names.KV_PEAK, request.kv_share),
                (names.PREEMPTIONS, request.preemptions),
                (names.LORA, request.lora),
            ),
            tuple(self._event(note) for note in self._notes(notes, experts)),
            tuple(links),
            Kind.SERVER,
            error if request.outcome in ("error", "rejected", "abort") else None,
        )

    def _notes(self, notes: Notes | None, experts: Reading | None) -> list[Note]:
        request = self.request
        found = list(notes.events) if notes is not None else []
        if request.kv_share is not None:
            found.append(Note(names.E_KV_PEAK, request.kv_share_at, ((names.KV_PEAK, request.kv_share),)))
        if experts is not None:
            told: Attributes = ((names.IMBALANCE, experts.ratio), (names.LAYER, experts.layer))
            found.append(Note(names.E_EXPERTS, experts.at_ns, told))
        return sorted(found, key=lambda note: note.at_ns)

    def _event(self, note: Note) -> Event:
        # What is told of a request is told some moments after it was so: not after its end.
        at = min(max(note.at_ns, self.begin), self.end)
        return Event(note.name, at + self.offset, note.attributes)

    # Steps

    def _step(self, seen: StepOf) -> Iterable[Span]:
        shared, index = seen.step, seen.place
        sample = shared.sample
        begin, end = sample.begin_ns, max(sample.at, sample.gpu_end_ns)
        # The device may seem to end a little after the output was there: its times have an error.
        if self.end < end <= self.end + sample.gpu_error_ns + _EDGE_NS and sample.at <= self.end:
            end = self.end
        home = self._home(begin, end)
        if home is None:
            return
        context = self._next()
        phase = sample.phases[index] if sample.phases else None
        yield Span(
            STEP,
            context,
            home,
            begin + self.offset,
            end + self.offset,
            present(
                (names.STEP, sample.step),
                (names.STEP_RANK, max(0, shared.rank)),
                (names.STEP_KIND, sample.kind),
                (names.STEP_REQUESTS, sample.requests or len(sample.request_ids)),
                (names.STEP_TOKENS, sample.scheduled_tokens or sum(sample.tokens)),
                (names.TOKENS, sample.tokens[index]),
                (names.PHASE, phase),
                (names.GPU_SECONDS, sample.gpu_ns[index] / 1e9 if sample.gpu_ns else None),
            ),
            links=StepLinks(shared, index),
        )
        if sample.gpu_end_ns:
            yield from self._execute(shared, context, begin, end)

    def _execute(self, shared: SharedStep, step: Context, begin: int, end: int) -> Iterable[Span]:
        sample = shared.sample
        first, last = _inside(sample.gpu_begin_ns, sample.gpu_end_ns, begin, end)
        context = self._next()
        yield Span(
            EXECUTE,
            context,
            step.span_id,
            first + self.offset,
            last + self.offset,
            present(
                (names.HW_ID, shared.gpu_uuid),
                (names.HW_TYPE, "gpu"),
                (names.CLOCK_ERROR, sample.gpu_error_ns / 1e9),
            ),
        )
        if shared.kernels is not None:
            for at, until, told in kernels(shared.kernels):
                at, until = _inside(at, until, first, last)
                ids = self._next()
                yield Span(KERNEL, ids, context.span_id, at + self.offset, until + self.offset, told)


def phases(request: EndedRequest) -> list[tuple[str, int, int]]:
    """Queue, prefill and decode with begin and end (monotonic), as far as the request came.

    A request that ended in a phase ended it: the last phase that it reached goes on until then.
    """
    begin, end = request.begin_ns, max(request.end_ns, request.begin_ns)
    if not request.request_id:
        return []  # it was refused before it had a queue to wait in
    if request.queue_ns is None:
        ran = request.gpu_ns or request.first_token_ns is not None or request.outcome in ("stop", "length")
        return [] if ran else [(QUEUE, begin, end)]
    scheduled = min(begin + request.queue_ns, end)
    if request.prefill_ns is None:
        return [(QUEUE, begin, scheduled), (PREFILL, scheduled, end)]
    first = min(scheduled + request.prefill_ns, end)
    found = [(QUEUE, begin, scheduled), (PREFILL, scheduled, first)]
    if request.decode_ns is not None:
        found.append((DECODE, first, min(first + request.decode_ns, end)))
    return found


@dataclass(frozen=True, slots=True)
class StepLinks:
    """Links to the other requests of a step, each with what the step did for it.

    There are up to 63 for each span of a step, so they are made when they are asked for; `otlp` does not ask,
    it encodes the step itself.
    """

    shared: SharedStep
    index: int
    """Place of the request to which the span belongs."""

    def __iter__(self) -> Iterator[Link]:
        sample = self.shared.sample
        for other, place in enumerate(self.shared.places):
            context = place.context if place is not None else None
            if context is not None and other != self.index:
                told = present(
                    (names.REQUEST_ID, sample.request_ids[other]),
                    (names.TOKENS, sample.tokens[other]),
                    (names.PHASE, sample.phases[other] if sample.phases else None),
                    (names.GPU_SECONDS, sample.gpu_ns[other] / 1e9 if sample.gpu_ns else None),
                )
                yield Link(context, told)


def kernels(record: records.StepKernels) -> Iterable[tuple[int, int, Attributes]]:
    """Begin, end (monotonic) and attributes of each kernel, the sum of all others last."""
    error = record.error_ns / 1e9
    had = record.device_ns or record.duration_ns
    rows = zip(record.names, record.streams, record.begin_ns, record.duration_ns, had, strict=True)
    for name, stream, begin, took, device in rows:
        told: Attributes = (
            (names.KERNEL, name),
            (names.STREAM, stream),
            (names.KERNEL_SECONDS, device / 1e9),
            (names.CLOCK_ERROR, error),
        )
        yield begin, begin + took, told
    if record.others:
        told = (
            (names.KERNEL, "other"),
            (names.KERNELS, record.others),
            (names.KERNEL_SECONDS, record.other_ns / 1e9),
            (names.CLOCK_ERROR, error),
        )
        yield record.begun_ns, record.ended_ns, told


def _inside(begin: int, end: int, first: int, last: int) -> tuple[int, int]:
    """A time, cut to what lies within another."""
    begin = min(max(begin, first), last)
    return begin, max(begin, min(end, last))


def _seconds(ns: float | None) -> float | None:
    return ns / 1e9 if ns is not None else None
