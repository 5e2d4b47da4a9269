"""The API server's side: who asked, what the user felt, and what was refused.

Hooks stand around vLLM's output processor, which sees each sequence on its way into the engine and out of it,
and around the places where requests are turned away. A request's end is counted here, because only here a
stop string and a client that hung up can be told apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from gpuglass_vllm import context, identity, marks, records, settings
from gpuglass_vllm.hooks import table, wrap
from gpuglass_vllm.link import Link
from gpuglass_vllm.tenants import TenantTable

MAX_OPEN = 20_000
"""Requests followed one by one; those beyond are served as ever and counted by the core alone."""
REASONS = {
    "stop": ("stop", ""),
    "repetition": ("stop", ""),
    "length": ("length", ""),
    "abort": ("abort", ""),
    "error": ("error", "engine"),
}


class Open:
    """A sequence between this server and the engine."""

    __slots__ = ("arrival_ns", "counted", "start")

    def __init__(self, start: records.RequestStart, arrival_ns: int, counted: bool) -> None:
        self.start = start
        self.arrival_ns = arrival_ns
        self.counted = counted
        """Its end is counted here: the core was told so when it entered."""


class FrontendProbe:
    """What this API server knows. One per process; methods run on the server's event loop."""

    def __init__(self) -> None:
        self._open: dict[str, Open] = {}
        self._tenants = TenantTable()
        self._config: Any = None
        self._answers = table.hook("frontend.answers")
        """While it is on, ends are seen here, and the core need not count them."""
        self.link = Link("frontend", self)
        self._started = False

    def configured(self, vllm_config: Any) -> None:
        """The configuration of the engine is known: start to speak."""
        self._config = vllm_config
        if not self._started:
            self._started = True
            self.link.start()

    def on_enter(self, request: Any) -> None:
        """A sequence is about to be sent to the engine."""
        request_id = request.request_id
        if request_id in self._open:
            return
        call = context.current.get()
        now = time.monotonic_ns()
        params = request.sampling_params if request.sampling_params is not None else request.pooling_params
        tenant = records.NO_TENANT
        if call is not None:
            call.started = True
            tenant = call.tenant
        elif settings.current().names_tenants:
            tenant = records.UNVERIFIED
        followed = len(self._open) < MAX_OPEN
        counted = followed and self._answers.on
        marks.put(params, marks.Mark(tenant, counted))
        if not followed:
            return
        trace = call.trace if call is not None else _trace_of(request)
        waited = max(0.0, time.time() - float(request.arrival_time or time.time()))
        lora = getattr(request, "lora_request", None)
        start = records.RequestStart(
            at=now,
            request_id=identity.short_id(request_id),
            external_id=_external(request, call),
            tenant=tenant,
            trace_id=trace.trace_id,
            span_id=trace.span_id,
            sampled=trace.sampled,
            prompt_tokens=_prompt_tokens(request),
            max_tokens=int(getattr(params, "max_tokens", None) or 0),
            lora=str(getattr(lora, "lora_name", "") or "")[: records.MAX_ID],
        )
        self._open[request_id] = Open(start, now - int(waited * 1e9), counted)
        self.link.event(start)

    def on_answered(self, request_id: str, outcome: str, error_type: str, first_token_s: float) -> None:
        """A sequence is done; `first_token_s` is the time from arrival to the first token, 0 if unknown."""
        opened = self._open.pop(request_id, None)
        if opened is None:
            return
        now = time.monotonic_ns()
        self.link.event(
            records.RequestAnswered(
                at=now,
                request_id=opened.start.request_id,
                outcome=outcome,
                error_type=error_type,
                duration_ns=max(0, now - opened.arrival_ns),
                first_token_ns=int(first_token_s * 1e9) if first_token_s > 0 else -1,
                external_id=opened.start.external_id,
                trace_id=opened.start.trace_id,
                span_id=opened.start.span_id,
                sampled=opened.start.sampled,
                max_tokens=opened.start.max_tokens,
                lora=opened.start.lora,
            )
        )
        if opened.counted:
            with self._tenants.lock:
                self._tenants.of(opened.start.tenant).end(outcome, error_type)

    def on_finished_by_external_id(self, external_id: str, reason: str) -> None:
        """A sequence is done, told by the stat logger: the oldest open one of that external id."""
        for request_id, opened in self._open.items():
            if opened.start.external_id == external_id:
                self.on_answered(request_id, *REASONS.get(reason, ("error", "engine")), 0.0)
                return

    def on_refused(self, call: context.Call, error_type: str, now: int) -> None:
        """A request was turned away before it entered the engine."""
        call.refused = True
        with self._tenants.lock:
            self._tenants.of(call.tenant).end("rejected", error_type)
        self.link.event(
            records.RequestRefused(
                at=now,
                error_type=error_type,
                tenant=call.tenant,
                external_id=call.external_id,
                trace_id=call.trace.trace_id,
                span_id=call.trace.span_id,
                sampled=call.trace.sampled,
                duration_ns=max(0, now - call.begin_ns),
            )
        )

    def on_traced(self, request_id: str, trace_id: int, span_id: int) -> None:
        """vLLM itself exports a span of a sequence (with --otlp-traces-endpoint)."""
        self.link.event(
            records.RequestTraced(
                at=time.monotonic_ns(),
                request_id=identity.short_id(request_id),
                trace_id=f"{trace_id:032x}",
                span_id=f"{span_id:016x}",
            )
        )

    def on_engine_error(self) -> None:
        """The engine is dead: every open request fails."""
        for request_id in list(self._open):
            self.on_answered(request_id, "error", "engine", 0.0)

    def open_ids(self, ids: Iterable[str]) -> list[str]:
        """Those of some ids that are open here."""
        return [request_id for request_id in ids if request_id in self._open]

    # On the link's thread

    def hello(self) -> dict[str, Any]:
        """Model and engine."""
        return {**identity.of(self._config), "engine": "0"}

    def states(self, everything: bool) -> Iterator[records.Record]:
        """On a new connection: the requests that are open, which a restarted agent has not heard of."""
        if everything:
            for opened in list(self._open.values()):
                yield opened.start

    def sums(self) -> Iterator[records.Record]:
        """How requests ended, by tenant."""
        yield from self._tenants.drain()


def _trace_of(request: Any) -> context.Trace:
    """Trace context that vLLM itself took from the request (with --otlp-traces-endpoint)."""
    headers = getattr(request, "trace_headers", None) or {}
    return context.parse_traceparent(str(headers.get("traceparent", "")))


def _external(request: Any, call: context.Call | None) -> str:
    if call is not None and call.external_id:
        return call.external_id
    return identity.short_id(str(getattr(request, "external_req_id", None) or ""))


def _prompt_tokens(request: Any) -> int:
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    embeds = getattr(request, "prompt_embeds", None)
    return int(embeds.shape[0]) if embeds is not None else 0


_probe: FrontendProbe | None = None


def probe() -> FrontendProbe:
    """The probe of this process."""
    global _probe
    if _probe is None:
        _probe = FrontendProbe()
    return _probe


def after_fork() -> None:
    """A child made by fork has requests of its own."""
    global _probe
    _probe = None


def refused(call: context.Call, error_type: str, now: int) -> None:
    """Count a request that the server turned away (from the middleware)."""
    probe().on_refused(call, error_type, now)


# Hooks


def install() -> None:
    """Put the hooks around vLLM's frontend classes."""
    from vllm.v1.engine.output_processor import OutputProcessor

    enter = table.hook("frontend.requests")
    if wrap(OutputProcessor, "add_request", enter, before=_entering):
        enter.activate()
    answers = table.hook("frontend.answers")
    found = wrap(OutputProcessor, "_update_stats_from_finished", answers, before=_finished)
    found = found and wrap(OutputProcessor, "abort_requests", answers, before=_aborting, after=_aborted)
    if found and answers.activate():
        wrap(OutputProcessor, "propagate_error", answers, before=_engine_died)
    spans = table.hook("frontend.engine_spans")
    if wrap(OutputProcessor, "do_tracing", spans, before=_tracing, after=_traced):
        spans.activate()
    _install_refusals()
    _install_configuration()


def _install_configuration() -> None:
    hook = table.hook("frontend.server")
    try:
        from vllm.v1.engine.async_llm import AsyncLLM

        found = wrap(AsyncLLM, "__init__", hook, before=_constructing)
        from vllm.v1.engine.llm_engine import LLMEngine

        if wrap(LLMEngine, "__init__", hook, before=_constructing) or found:
            hook.activate()
    except ImportError as error:
        hook.unavailable(f"this version has no {error.name}")


def _install_refusals() -> None:
    hook = table.hook("frontend.refusals")
    try:
        from vllm.v1.engine.input_processor import InputProcessor
    except ImportError as error:
        hook.unavailable(f"this version has no {error.name}")
        return
    if wrap(InputProcessor, "process_inputs", hook, on_error=_invalid):
        hook.activate()
    try:
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError:
        return
    if hasattr(AsyncLLM, "check_admission"):
        wrap(AsyncLLM, "check_admission", hook, on_error=_not_admitted)


def _constructing(engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    config = kwargs.get("vllm_config", args[0] if args else None)
    if config is not None:
        probe().configured(config)


def _entering(processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    request = args[0] if args else kwargs["request"]
    if request.request_id not in processor.request_states:
        probe().on_enter(request)


def _finished(processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    state = args[0] if args else kwargs["req_state"]
    reason = args[1] if len(args) > 1 else kwargs["finish_reason"]
    name = str(getattr(reason, "name", reason)).lower()
    outcome, error_type = REASONS.get(name, ("error", "engine"))
    stats = getattr(state, "stats", None)
    first = float(getattr(stats, "first_token_latency", 0.0) or 0.0)
    probe().on_answered(state.request_id, outcome, error_type, first)


def _aborting(processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, float]]:
    """Open sequences that this abort may be about, with their time to the first token."""
    given = args[0] if args else kwargs["request_ids"]
    if not isinstance(given, (list, tuple, set, frozenset)):
        return []  # an iterator must not be used up here; its sequences are counted by the core
    ids: list[str] = []
    for request_id in given:
        ids.append(request_id)
        ids.extend(processor.external_req_ids.get(request_id, ()))
        parent = processor.parent_requests.get(request_id)
        if parent is not None:
            ids.extend(parent.child_requests)
    found = []
    for request_id in probe().open_ids(dict.fromkeys(ids)):
        state = processor.request_states.get(request_id)
        stats = getattr(state, "stats", None)
        found.append((request_id, float(getattr(stats, "first_token_latency", 0.0) or 0.0)))
    return found


def _aborted(processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, token: Any) -> None:
    for request_id, first in token or ():
        if request_id not in processor.request_states:
            probe().on_answered(request_id, "abort", "", first)


class _SpanWatch:
    """Learns the ids of the spans that vLLM makes: a span processor beside vLLM's own."""

    def __init__(self) -> None:
        self.ended: list[tuple[int, int]] = []
        """Trace and span of the spans that ended since it was cleared."""
        self._provider: Any = None

    def watch(self) -> None:
        """Be told of the spans that the process ends from now on."""
        from opentelemetry import trace
        from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

        provider = trace.get_tracer_provider()
        if provider is self._provider or not hasattr(provider, "add_span_processor"):
            return
        ended = self.ended

        class Processor(SpanProcessor):
            def on_end(self, span: ReadableSpan) -> None:
                context = span.get_span_context()
                if span.name == "llm_request" and context is not None and len(ended) < 2:
                    ended.append((context.trace_id, context.span_id))

        provider.add_span_processor(Processor())
        self._provider = provider


_spans = _SpanWatch()


def _tracing(processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _spans.ended.clear()
    _spans.watch()


def _traced(processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, token: Any) -> None:
    state = args[1] if len(args) > 1 else kwargs["req_state"]
    for trace_id, span_id in _spans.ended[:1]:
        probe().on_traced(state.request_id, trace_id, span_id)


def _engine_died(processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    probe().on_engine_error()


def _invalid(
    processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException, token: Any
) -> None:
    if isinstance(error, Exception):
        _refuse("validation" if isinstance(error, (ValueError, TypeError)) else "engine")


def _not_admitted(
    engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException, token: Any
) -> None:
    if isinstance(error, Exception):
        _refuse("admission")


def _refuse(error_type: str) -> None:
    call = context.current.get()
    if call is None:
        call = context.Call(
            tenant=records.UNVERIFIED if settings.current().names_tenants else records.NO_TENANT
        )
    if not call.refused and not call.started:
        probe().on_refused(call, error_type, time.monotonic_ns())
