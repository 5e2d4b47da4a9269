"""Who else hears what comes over the record stream: the receiver's room and others need not know each other.

The receiver tells each record that it has checked and taken in; rooms that want some kinds of them listen.
What a request is called in exemplars is asked the other way: whoever keeps the requests answers. Both sides
are filled in through the `PartContext` when the agent makes its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from gpuglass.exemplar import ExemplarPolicy, NameByRequest, Names, RequestRef
from gpuglass.logs import LOG


@dataclass(frozen=True, slots=True)
class Speaker:
    """A connected sender, as the kernel and its hello tell. A new one is made when any of it changes."""

    number: int
    """Of the connection; no two in the agent's life are equal."""
    pid: int
    """As the kernel says, in the agent's pid namespace; 0 if it cannot be seen from there."""
    uid: int
    role: str
    instance: str
    """What all processes of one server share."""
    clock_offset_ns: int
    """Added to a record's time it gives Unix time."""
    rank: int = -1
    """Of a worker in its engine."""
    engine: str = ""
    """Data-parallel index as the engine spells it."""
    gpu_uuid: str = ""
    """The GPU that it works on, as far as it is believed."""
    experts: int = 0
    """Experts of each layer; 0: none, or not told."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """An allocation of CUDA memory, joined with what ran then. Told to listeners like a record, but on the
    thread of whoever joined it. Times are CLOCK_MONOTONIC nanoseconds."""

    begin_ns: int
    at: int
    pid: int
    tid: int
    function: str
    kind: str
    bytes: int
    code: int
    """CUresult; 0 is success."""
    frames: tuple[str, ...]
    """The stack, innermost first; empty: unknown."""
    link: str
    """exact, temporal or none."""
    step: int
    """Number of the step in the worker; -1: unknown."""
    batch: tuple[tuple[str, int], ...]
    """Requests of the step and their scheduled tokens, most first."""


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """A request of which all is told. Told to listeners like a record, once for each request that is counted.

    Times are CLOCK_MONOTONIC nanoseconds, durations nanoseconds; None means unknown, or no such phase.
    """

    instance: str
    request_id: str
    """Empty where it never entered the engine."""
    external_id: str
    trace_id: str
    """The caller's trace context; empty: it sent none."""
    span_id: str
    sampled: bool
    outcome: str
    error_type: str
    begin_ns: int
    end_ns: int
    clock_offset_ns: int
    """Added to these times it gives Unix time, by the clock as it is at the end."""
    tenant: str
    """As metrics name it."""
    model_name: str
    engine: str
    server: str
    workload: tuple[str, str, str]
    """Namespace, pod and container of the engine; empty on a host."""
    software: tuple[str, str]
    """Name and version of the engine."""
    gpu_uuids: tuple[str, ...]
    """Of its engine's workers, by rank."""
    exemplify: Callable[[Names], None]
    """Names it in the exemplars of the samples in which it was counted. Takes the ledger's lock."""
    queue_ns: int | None = None
    prefill_ns: int | None = None
    """None with a queue: it was scheduled and no token came."""
    decode_ns: int | None = None
    first_token_ns: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    max_tokens: int | None = None
    preemptions: int = 0
    kv_share: float | None = None
    """Largest share of the KV cache that it held, and when."""
    kv_share_at: int = 0
    gpu_ns: float | None = None
    recompute_ns: float = 0.0
    lora: str = ""
    caller_known: bool = True
    """False: a frontend should have told who asked, and its word was lost."""


class Listener(Protocol):
    """Hears records. Called on the receiver's thread with its lock held: note things down, and be quick."""

    def arrived(self, speaker: Speaker) -> None:
        """Somebody connected, or said something else of itself."""

    def heard(self, speaker: Speaker, record: Any, now_ns: int) -> None:
        """One record of a kind that was asked for; `now_ns` is CLOCK_MONOTONIC, as are the record's times."""

    def gone(self, speaker: Speaker) -> None:
        """Its connection ended; the same process may come back."""


NOBODY = Speaker(0, 0, 0, "agent", "", 0)
"""Speaks where the agent itself tells what it has found out."""


class RecordHub:
    """Passes records on. An error of a listener is logged once and kept from the receiver."""

    def __init__(self) -> None:
        self.policy: ExemplarPolicy = NameByRequest()
        """How exemplars name a request."""
        self._find: Callable[[str, str], RequestRef | None] = lambda instance, request_id: None
        self._listeners: list[Listener] = []
        self._of_kind: dict[type, list[Listener]] = {}
        self._failed: set[tuple[str, str]] = set()

    def listen(self, kinds: Iterable[type], listener: Listener) -> None:
        """Let a listener hear these kinds of records. To be called before the parts start."""
        self._listeners.append(listener)
        for kind in kinds:
            self._of_kind.setdefault(kind, []).append(listener)

    def is_heard(self, kind: type) -> bool:
        """Whether anybody listens to a kind."""
        return kind in self._of_kind

    def keeps_requests(self, find: Callable[[str, str], RequestRef | None]) -> None:
        """Name who knows the open requests: a function of the server's instance and the request's id."""
        self._find = find

    def request(self, instance: str, request_id: str) -> RequestRef:
        """What is known of a request; at least its id."""
        return self._find(instance, request_id) or RequestRef(request_id)

    # For the receiver

    def arrived(self, speaker: Speaker) -> None:
        """Tell of a sender."""
        for listener in self._listeners:
            try:
                listener.arrived(speaker)
            except Exception:
                self._fault(listener, "a sender's arrival")

    def told(self, speaker: Speaker, record: Any, now_ns: int) -> None:
        """Tell of a record that was taken in."""
        for listener in self._of_kind.get(type(record), ()):
            try:
                listener.heard(speaker, record, now_ns)
            except Exception:
                self._fault(listener, type(record).__name__)

    def ended(self, request: EndedRequest) -> None:
        """Tell of a request's end."""
        self.told(NOBODY, request, request.end_ns)

    def gone(self, speaker: Speaker) -> None:
        """Tell of a sender's end."""
        for listener in self._listeners:
            try:
                listener.gone(speaker)
            except Exception:
                self._fault(listener, "a sender's end")

    def _fault(self, listener: Listener, what: str) -> None:
        key = (type(listener).__name__, what)
        if key not in self._failed:
            self._failed.add(key)
            LOG.exception("%s failed over %s; said once", *key)
