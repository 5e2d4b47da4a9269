"""Sends traces in batches, one at a time, and tries again until the collector takes them or time is up.

In: traces with what is to be called once their spans were accepted. Out: requests of a `Transport`, and
counts. It keeps nothing but the batch in hand: whoever feeds it waits meanwhile, with a bounded queue.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from gpuglass.logs import LOG
from otel_bridge.model import Trace
from otel_bridge.otlp import encode
from otel_bridge.transport import Reply, Transport

BATCH_SPANS = 512
"""Spans from which a batch is sent."""
MAX_BYTES = 3 << 20
"""Of a request: servers of gRPC take 4 MiB if not told otherwise."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds until the first and, doubled each time, the last attempt; each is varied by a fifth."""
LOG_SECONDS = 300.0


@dataclass(slots=True)
class Counts:
    """What became of traces, since the agent started."""

    exported: int = 0
    dropped: Counter[str] = field(
        default_factory=lambda: Counter({"queue_full": 0, "refused": 0, "failed": 0, "shutdown": 0})
    )
    spans: int = 0
    spans_refused: int = 0
    sent_bytes: int = 0
    attempts: Counter[str] = field(
        default_factory=lambda: Counter({"ok": 0, "partial": 0, "retry": 0, "refused": 0})
    )
    up: bool | None = None
    """Whether the latest attempt was answered; None: there was none."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A trace that waits in a batch."""

    trace: Trace
    accepted: Callable[[], None]
    """Called once the collector has taken it."""


class Exporter:
    """The batch in hand. For one thread; only `stop` and `counts` are for others."""

    def __init__(
        self,
        transport: Transport,
        timeout: float,
        closing: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = Counts()
        self._transport = transport
        self._timeout = timeout
        self._closing = closing
        """Set when the agent stops: then `deadline` says until when to try."""
        self._clock = clock
        self.deadline = float("inf")
        self._batch: list[Pending] = []
        self._spans = 0
        self._logged_at = float("-inf")
        self._was_down = False

    def add(self, pending: Pending) -> None:
        """A further trace; sends the batch if it is full."""
        self._batch.append(pending)
        self._spans += len(pending.trace.spans)
        if self._spans >= BATCH_SPANS:
            self.flush()

    def flush(self) -> None:
        """Send what there is."""
        batch, self._batch, self._spans = self._batch, [], 0
        if batch:
            self._send(batch)

    def _send(self, batch: list[Pending]) -> None:
        if self.is_over:
            self.counts.dropped["shutdown"] += len(batch)
            return
        try:
            body = encode(pending.trace for pending in batch)
        except (TypeError, ValueError):
            LOG.exception("%d traces could not be encoded", len(batch))
            self.counts.dropped["failed"] += len(batch)
            return
        if len(body) > MAX_BYTES and len(batch) > 1:
            half = len(batch) // 2
            self._send(batch[:half])
            self._send(batch[half:])
            return
        spans = sum(len(pending.trace.spans) for pending in batch)
        reply = self._deliver(body)
        counts = self.counts
        if reply is None:
            counts.dropped["shutdown"] += len(batch)
        elif reply.result == "ok":
            counts.exported += len(batch)
            counts.spans += spans
            for pending in batch:
                pending.accepted()
        else:
            # Of a batch that was taken in part nobody says which spans are missing: no trace of it is named.
            refused = min(reply.refused or spans, spans) if reply.result == "partial" else spans
            counts.spans += spans - refused
            counts.spans_refused += refused
            counts.dropped["refused"] += len(batch)

    def _deliver(self, body: bytes) -> Reply | None:
        """The collector's last word on a request; None if the agent's end came first."""
        wait = FIRST_WAIT
        while True:
            left = self.deadline - self._clock()
            if left <= 0:
                return None
            reply = self._transport.send(body, min(self._timeout, left))
            self.counts.attempts[reply.result] += 1
            self.counts.sent_bytes += len(body)
            self.counts.up = reply.result != "retry"
            self._log(reply)
            if reply.result != "retry":
                return reply
            pause = max(reply.after, wait * random.uniform(0.8, 1.2))
            wait = min(2 * wait, LONGEST_WAIT)
            pause = min(pause, LONGEST_WAIT, max(0.0, self.deadline - self._clock()))
            if self._closing.is_set():
                time.sleep(min(pause, 0.1))
            else:
                self._closing.wait(pause)

    def _log(self, reply: Reply) -> None:
        if reply.result == "ok":
            if self._was_down:
                LOG.info("traces: the collector takes them again")
            self._was_down = False
            return
        now = self._clock()
        if now - self._logged_at >= LOG_SECONDS or not self._was_down:
            self._logged_at = now
            what = {"retry": "cannot be reached, it is tried again", "partial": "took a part only"}
            LOG.warning("traces: the collector %s: %s", what.get(reply.result, "refused them"), reply.why)
        self._was_down = True

    @property
    def is_over(self) -> bool:
        """Whether nothing is sent any more."""
        return self._clock() >= self.deadline

    def stop(self, deadline: float) -> None:
        """From another thread: try no longer than until `deadline` (of the clock)."""
        self.deadline = deadline
