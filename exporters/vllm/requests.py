"""One request: what the processes of an engine have told of it, and what that adds up to when it has ended.

A frontend tells who asked and what the user felt, a core which blocks it held and how it ended, each worker
how much GPU time it took. Their records come in any order. `verdict` and `Summary.of` are pure and decide
what is observed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporters.vllm.account import Account, Kind
from exporters.vllm.sink import Sender
from gpuglass import exemplar as exemplars
from gpuglass.exemplar import RequestRef
from gpuglass.families import engine as families
from gpuglass.family import Family
from gpuglass_vllm.records import NO_TENANT, RequestAnswered, RequestEnd

if TYPE_CHECKING:
    from exporters.vllm.engines import Engine

_DIED = ("error", "engine")


class OpenRequest:
    """What is known of a request that has not been observed yet."""

    __slots__ = (
        "answer",
        "at",
        "blocks",
        "core_seen",
        "died_at",
        "due",
        "end",
        "engine",
        "external_id",
        "first_at",
        "frontend",
        "gpu_ended",
        "gpu_ns",
        "hog_ns",
        "hog_since",
        "lora",
        "max_tokens",
        "news_at",
        "peak_at",
        "peak_blocks",
        "preemptions",
        "recompute_ns",
        "request_id",
        "running",
        "sampled",
        "span_id",
        "tenant",
        "trace_id",
    )

    def __init__(self, request_id: str, engine: Engine, now_ns: int) -> None:
        self.request_id = request_id
        self.engine = engine
        """Whose it is; a frontend's own engine until core or worker have told."""
        self.tenant = NO_TENANT
        self.external_id = ""
        self.trace_id = ""
        self.span_id = ""
        self.sampled = False
        self.max_tokens = 0
        self.lora = ""
        self.frontend: Sender | None = None
        """Sender that told of its start."""
        self.core_seen = False
        self.running = False
        self.first_at = now_ns
        """When it was first heard of; its arrival lies a little before."""
        self.at = 0
        """Time of the core's latest word on it."""
        self.blocks = 0.0
        self.peak_blocks = 0.0
        self.peak_at = 0
        """When it was first told of `peak_blocks`."""
        self.preemptions = 0
        self.gpu_ns: dict[int, float] = {}
        """By rank."""
        self.recompute_ns: dict[int, float] | None = None
        self.gpu_ended: set[int] | None = None
        """Ranks that will not change `gpu_ns` any more."""
        self.end: RequestEnd | None = None
        self.answer: RequestAnswered | None = None
        self.died_at: int | None = None
        """When its engine went away under it."""
        self.due: int | None = None
        """When to stop waiting for what the other processes know; None while it is open."""
        self.news_at = now_ns
        self.hog_since: int | None = None
        """Since when its time with a large part of the pool is not accounted; None while it holds less."""
        self.hog_ns = 0

    @property
    def ref(self) -> RequestRef:
        """For exemplars."""
        return RequestRef(self.request_id, self.external_id, self.trace_id, self.sampled)

    @property
    def is_known(self) -> bool:
        """Whether its core or a frontend has told of it; workers know neither tenant nor state."""
        return self.core_seen or self.frontend is not None

    @property
    def was_closed(self) -> bool:
        """Whether an agent before this one was told of its end, by all that told this one."""
        told = [part.again for part in (self.end, self.answer) if part is not None]
        return bool(told) and all(told)

    @property
    def in_flight(self) -> bool:
        """Not ended, as far as anybody told."""
        return self.end is None and self.answer is None and self.died_at is None


def begin_ns(request: OpenRequest) -> int:
    """When a request arrived, on the senders' monotonic clock: the earlier of what core and frontend saw."""
    begins = []
    if request.end is not None:
        begins.append(request.end.arrival_ns)
    if request.answer is not None:
        begins.append(request.answer.at - request.answer.duration_ns)
    return min(begins, default=request.first_at)


def verdict(end: RequestEnd | None, answer: RequestAnswered | None, died: bool) -> tuple[str, str]:
    """Outcome and error type of a request, given what core and frontend said and whether the engine went
    away.

    The core knows how a request left the scheduler. But an abort is what a frontend asks for, and only the
    frontend knows why: the client left, time was up, or a stop word was found in the text.
    """
    if end is not None and (end.outcome != "abort" or answer is None):
        return end.outcome, end.error_type
    if answer is not None:
        return answer.outcome, answer.error_type
    return _DIED if died else ("abort", "")


@dataclass(frozen=True, slots=True)
class Summary:
    """A request that has ended. Times in nanoseconds; None means unknown, or that there was no such phase."""

    outcome: str
    error_type: str
    preemptions: int
    at: int
    """When it ended, on the sender's monotonic clock; 0 if nobody said."""
    duration_ns: int | None
    first_token_ns: int | None
    queue_ns: int | None
    prefill_ns: int | None
    decode_ns: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    peak_blocks: float | None
    gpu_ns: float | None
    recompute_ns: float

    @classmethod
    def of(cls, request: OpenRequest) -> Summary:
        """Put together what was told. What the user felt is taken from the frontend where it spoke."""
        end, answer = request.end, request.answer
        outcome, error_type = verdict(end, answer, request.died_at is not None)
        preemptions = max(request.preemptions, end.preemptions if end is not None else 0)
        peak = max(request.peak_blocks, end.peak_blocks if end is not None else 0.0)
        duration = first = queue = prefill = decode = None
        if end is not None:
            duration = max(0, end.at - end.arrival_ns)
            queue, prefill, decode = map(_known, (end.queue_ns, end.prefill_ns, end.decode_ns))
            if queue is not None and prefill is not None:
                first = queue + prefill
        if answer is not None:
            duration = answer.duration_ns
            first = _known(answer.first_token_ns) if answer.first_token_ns >= 0 else first
        if end is None and answer is None and request.died_at is not None:
            duration = max(0, request.died_at - request.first_at)
        last = end if end is not None else answer
        return cls(
            outcome,
            error_type,
            preemptions,
            last.at if last is not None else request.died_at or 0,
            duration,
            first,
            queue,
            prefill,
            decode,
            end.prompt_tokens if end is not None else None,
            end.cached_tokens if end is not None else None,
            end.output_tokens if end is not None else None,
            peak if peak > 0 else None,
            sum(request.gpu_ns.values()) if request.gpu_ns else None,
            sum(request.recompute_ns.values()) if request.recompute_ns else 0.0,
        )


@dataclass(frozen=True, slots=True)
class Counted:
    """Where a request that has ended was counted, so that it can be named there later, too."""

    account: Account
    kind: Kind
    tenant: str
    """As metrics name it."""
    values: tuple[tuple[Family, float], ...]
    """Observations in the histograms of requests."""
    peak: float | None = None
    """Observation in the histogram of shares of the KV cache."""
    wasted: float = 0.0
    """GPU time in seconds that nobody used."""
    hogged: float = 0.0
    """Seconds with a large part of the pool."""

    def count(self) -> None:
        """Add it to the account; but for time of hogging, which is counted as it passes."""
        for family, value in self.values:
            self.account.observe(family, self.kind, value)
        if self.wasted:
            self.account.waste(self.kind.outcome, self.tenant, self.wasted * 1e9)
        if self.peak is not None:
            self.account.peaks.observe(self.peak)

    def name(self, labels: dict[str, str], unix: float) -> None:
        """Let exemplars name it, with its end's Unix time. No labels: nothing is done."""
        account = self.account
        for family, value in self.values:
            if (found := exemplars.exemplar(labels, value, unix)) is not None:
                account.exemplify(family, self.kind, value, found)
        wasted, hogged = round(self.wasted, 6), round(self.hogged, 6)
        if self.wasted and (found := exemplars.exemplar(labels, wasted, unix)) is not None:
            account.name(account.wasted, (self.kind.outcome, self.tenant), found)
        if self.hogged and (found := exemplars.exemplar(labels, hogged, unix)) is not None:
            account.name(account.hogging, self.tenant, found)
        if self.peak is not None and (found := exemplars.exemplar(labels, self.peak, unix)) is not None:
            account.peaks.exemplify(self.peak, found)


def counted(request: OpenRequest, summary: Summary, tenant: str) -> Counted:
    """Where a request with that summary is counted."""
    found = (
        (families.REQUEST_DURATION, summary.duration_ns, 1e9),
        (families.REQUEST_FIRST_TOKEN, summary.first_token_ns, 1e9),
        (families.REQUEST_QUEUE, summary.queue_ns, 1e9),
        (families.REQUEST_PREFILL, summary.prefill_ns, 1e9),
        (families.REQUEST_DECODE, summary.decode_ns, 1e9),
        (families.REQUEST_PROMPT_TOKENS, summary.prompt_tokens, 1.0),
        (families.REQUEST_CACHED_TOKENS, summary.cached_tokens, 1.0),
        (families.REQUEST_OUTPUT_TOKENS, summary.output_tokens, 1.0),
        (families.REQUEST_GPU, summary.gpu_ns, 1e9),
    )
    wasted = 0.0
    if summary.gpu_ns is not None and summary.outcome in ("abort", "error"):
        wasted = max(0.0, summary.gpu_ns - summary.recompute_ns) / 1e9
    engine = request.engine
    return Counted(
        engine.account,
        Kind(summary.outcome, summary.error_type, summary.preemptions > 0),
        tenant,
        tuple((family, value / scale) for family, value, scale in found if value is not None),
        engine.share(summary.peak_blocks) if summary.peak_blocks is not None else None,
        wasted,
        request.hog_ns / 1e9,
    )


def _known(ns: int) -> int | None:
    return ns if ns >= 0 else None
