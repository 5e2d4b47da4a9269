"""The trace bridge in the agent: hears what engines tell, makes spans of requests that have ended, exports.

The receiver's thread notes (`Journal`) and queues ended requests; a thread of its own decides, builds,
encodes and sends. While the collector is slow or away, that thread waits and the queue fills up to its bound,
then loses its oldest requests, which are counted. Nobody else waits.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from gpuglass.config import Config, TracesConfig
from gpuglass.families import bridge as families
from gpuglass.family import Batch
from gpuglass.logs import LOG
from gpuglass.part import Part
from gpuglass.record_hub import Allocation, EndedRequest, RecordHub, Speaker
from gpuglass_vllm import records
from otel_bridge import attributes as names
from otel_bridge.build import build, resource
from otel_bridge.exporter import Exporter, Pending
from otel_bridge.identity import Identity, identify
from otel_bridge.journal import Journal, Notes
from otel_bridge.model import Attributes, Decision
from otel_bridge.policy import NameByAcceptedTrace
from otel_bridge.sampling import Sampler
from otel_bridge.transport import Transport

ROUND_SECONDS = 0.5
LINGER_NS = 500_000_000
"""How long an ended request waits for what others may still tell of its last steps; they speak four times a
second."""
AT_ONCE = 256
"""Ended requests taken from the queue in one go."""
STOP_SHARE = 0.8
"""Share of the time for stopping in which the collector is still tried."""
KINDS = (
    *(records.RequestStart, records.RequestTraced, records.StepSample, records.PrefillChunks),
    *(records.StepKernels, records.Preemption, records.OutOfMemory, records.ExpertSums),
    *(Allocation, EndedRequest),
)

Item = tuple[EndedRequest, Notes | None]


class TracesPart(Part):
    """Exports traces. Listens to the hub (`gpuglass.record_hub`)."""

    def __init__(
        self,
        config: TracesConfig,
        hub: RecordHub,
        transport: Transport,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        linger_ns: int = LINGER_NS,
    ) -> None:
        self.config = config
        self.policy = NameByAcceptedTrace()
        self._clock_ns, self._linger_ns = clock_ns, linger_ns
        self._transport = transport
        self._closing, self._wake = threading.Event(), threading.Event()
        self.exporter = Exporter(transport, float(config.timeout), self._closing)
        self._sampler: Sampler[Item] = Sampler(config)
        common = {names.HOST_NAME: socket.gethostname()} | config.resource
        self._common: Attributes = tuple(sorted(common.items()))
        self._lock = threading.Lock()
        """Guards the journal, the queue and `_pids`."""
        self.journal = Journal(config.steps)
        self._queue: deque[tuple[int, EndedRequest]] = deque()
        self._pids: dict[int, Speaker] = {}
        """Engines' processes, by connection."""
        self._decided: Counter[Decision] = Counter(dict.fromkeys(Decision, 0))
        self._named = 0
        self._work_ns = 0
        self._thread = threading.Thread(target=self._run, name="trace-export", daemon=True)
        hub.policy = self.policy
        hub.listen(KINDS, self)

    # Part

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def reload(self, config: Config) -> None:
        """Take other rules of sampling."""
        self.config = config.traces
        self._sampler.config = config.traces
        with self._lock:
            self.journal.steps_per_request = config.traces.steps

    def stop(self, timeout: float) -> bool:
        """Send what has ended, as long as that takes no longer than most of `timeout` seconds; stop."""
        until = time.monotonic() + timeout
        self.exporter.stop(time.monotonic() + timeout * STOP_SHARE)
        self._closing.set()
        self._wake.set()
        if self._thread.ident is None:
            return True
        self._thread.join(timeout * STOP_SHARE)
        self._transport.abort()
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    def not_ready(self) -> str | None:
        """A node whose collector is away is ready."""
        return None

    # Listener

    def arrived(self, speaker: Speaker) -> None:
        """A process of an engine, or a tracer."""
        with self._lock:
            self._pids[speaker.number] = speaker

    def gone(self, speaker: Speaker) -> None:
        """Its connection ended."""
        with self._lock:
            self._pids.pop(speaker.number, None)

    def heard(self, speaker: Speaker, record: Any, now_ns: int) -> None:
        """One record of `KINDS`."""
        instance = speaker.instance
        with self._lock:
            match record:
                case EndedRequest():
                    self._enqueue(record)
                case records.RequestStart():
                    self.journal.start(instance, record, now_ns)
                case records.StepSample():
                    self.journal.step(speaker, record, now_ns)
                case records.PrefillChunks():
                    self.journal.prefill(speaker, record, now_ns)
                case records.StepKernels():
                    self.journal.kernels(speaker, record, now_ns)
                case records.RequestTraced():
                    self.journal.traced(instance, record, now_ns)
                case records.Preemption():
                    self.journal.preempted(instance, record, now_ns)
                case records.OutOfMemory():
                    self.journal.out_of_memory(instance, record, now_ns)
                case records.ExpertSums():
                    self.journal.experts(speaker, record, now_ns)
                case Allocation() if record.batch:
                    of = {s.instance for s in self._pids.values() if s.pid == record.pid and s.rank >= 0}
                    self.journal.allocated(sorted(of), record, now_ns)

    def _enqueue(self, request: EndedRequest) -> None:
        if len(self._queue) >= self.config.queue:
            _, oldest = self._queue.popleft()
            self.journal.take(oldest.instance, oldest.request_id)
            self.exporter.counts.dropped["queue_full"] += 1
        self._queue.append((self._clock_ns(), request))

    # The thread

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(ROUND_SECONDS)
            self._safely(self.round)
        self._safely(self._last_round)

    @staticmethod
    def _safely(function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:
            LOG.exception("exporting traces failed")

    def round(self, everything: bool = False) -> None:
        """Export requests that ended a while ago; `everything` leaves none for later."""
        begun = time.thread_time_ns()
        while not self.exporter.is_over and (taken := self._take(everything)):
            for item in taken:
                self._judge(item)
            self._work_ns += time.thread_time_ns() - begun
            begun = time.thread_time_ns()
        for item, decision in self._sampler.minute(self._clock_ns(), everything):
            self._decide(item, decision)
        self.exporter.flush()
        with self._lock:
            self.journal.sweep(self._clock_ns())
        self._work_ns += time.thread_time_ns() - begun

    def _last_round(self) -> None:
        self.round(everything=True)
        with self._lock:
            self.exporter.counts.dropped["shutdown"] += len(self._queue)
            self._queue.clear()

    def _take(self, everything: bool) -> list[Item]:
        until = self._clock_ns() - self._linger_ns
        found: list[Item] = []
        with self._lock:
            queue = self._queue
            while queue and len(found) < AT_ONCE and (everything or queue[0][0] <= until):
                _, request = queue.popleft()
                found.append((request, self.journal.take(request.instance, request.request_id)))
        return found

    def _judge(self, item: Item) -> None:
        request, notes = item
        identity = _identity(request, notes)
        found = self._sampler.decide(request, identity, item)
        if isinstance(found, Decision):
            self._decide(item, found)
        elif found[0] is not None:
            self._decide(found[0], Decision.UNSAMPLED)

    def _decide(self, item: Item, decision: Decision) -> None:
        self._decided[decision] += 1
        if not decision.keeps:
            return
        request, notes = item
        identity = _identity(request, notes)
        with self._lock:
            experts = self.journal.worst_experts(
                request.instance, request.engine, request.begin_ns, request.end_ns
            )
        try:
            of = resource(request, self.config.service_name, self._common)
            trace = build(request, identity, notes, experts, decision, of)
        except Exception:
            LOG.exception("the spans of a request could not be made")
            self.exporter.counts.dropped["failed"] += 1
            return

        def accepted() -> None:
            labels = self.policy.accept(request.request_id, request.external_id, identity.context.trace_id)
            request.exemplify(labels)
            self._named += 1

        self.exporter.add(Pending(trace, accepted))

    # Metrics

    def fill(self, batch: Batch) -> None:
        """Samples about the bridge itself."""
        counts = self.exporter.counts
        for decision in Decision:
            batch.add(families.DECIDED, self._decided[decision], decision.value)
        batch.add(families.EXPORTED, counts.exported)
        for reason, number in sorted(counts.dropped.items()):
            batch.add(families.DROPPED, number, reason)
        batch.add(families.SPANS, counts.spans)
        batch.add(families.SPANS_REFUSED, counts.spans_refused)
        batch.add(families.SENT, counts.sent_bytes)
        for result, number in sorted(counts.attempts.items()):
            batch.add(families.ATTEMPTS, number, result)
        if counts.up is not None:
            batch.add(families.UP, int(counts.up))
        with self._lock:
            queued, opened, forgotten = len(self._queue), len(self.journal), self.journal.forgotten
        batch.add(families.QUEUED, queued)
        batch.add(families.OPEN, opened)
        batch.add(families.NOTES_DROPPED, forgotten)
        batch.add(families.EXEMPLARS, self._named)
        batch.add(families.WORK, round(self._work_ns / 1e9, 3))


def _identity(request: EndedRequest, notes: Notes | None) -> Identity:
    if notes is not None and notes.place.identity is not None:
        return notes.place.identity
    name = request.request_id or f"refused {request.end_ns} {request.external_id}"
    found = identify(request.instance, name, request.trace_id, request.span_id, request.sampled)
    if notes is not None:
        notes.place.identity = found  # steps that it shared with others can link to it
    return found
