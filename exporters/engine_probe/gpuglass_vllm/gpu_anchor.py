"""Where the device's events lie on the host's monotonic clock, without ever waiting for the engine's stream.

An anchor is an event on a stream of our own that is always empty, recorded between two looks at the host's
clock: it happened between them, and half their distance is the error. One is taken during warm-up and one
each minute, on the link's thread. Any event is placed by its distance to the latest anchor; how fast the
device's clock runs against the host's is learnt from one anchor to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from gpuglass_vllm.gpu_clock import Event

INTERVAL_NS = 60_000_000_000
TRIES = 5
"""Of these the anchor with the least error is taken."""
UNKNOWN_RATE = 50e-6
"""By how much a crystal's rate may differ from another's (quartz is good to 20 to 50 parts in a million)."""
_RESOLUTION = 2.0**-23
"""Of `elapsed_time`, which is a float of 32 bits."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """An event and when it happened, in nanoseconds of the host's monotonic clock."""

    event: Event
    host_ns: float
    error_ns: float


class Anchors:
    """The latest anchor. For one thread."""

    def __init__(
        self,
        new_event: Callable[[], Event],
        pass_event: Callable[[Event], None],
        now: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`pass_event` records an event on an empty stream and waits until the device has passed it."""
        self._new_event = new_event
        self._pass_event = pass_event
        self._now = now
        self._latest: Anchor | None = None
        self._rate = 1.0
        """Host's nanoseconds per device's."""
        self._rate_error = UNKNOWN_RATE
        self._due = 0

    def refresh(self) -> None:
        """Take a new anchor if it is time for one."""
        if self._now() < self._due:
            return
        self._due = self._now() + INTERVAL_NS
        found = min((self._take() for _ in range(TRIES)), key=lambda anchor: anchor.error_ns)
        before, self._latest = self._latest, found
        if before is None:
            return
        device_ns = before.event.elapsed_time(found.event) * 1e6
        if device_ns < INTERVAL_NS / 2:
            return
        rate = (found.host_ns - before.host_ns) / device_ns
        error = (found.error_ns + before.error_ns) / device_ns + _RESOLUTION
        if abs(rate - 1.0) <= 10 * UNKNOWN_RATE:  # else the host's clock stood still meanwhile
            self._rate, self._rate_error = rate, error

    def _take(self) -> Anchor:
        event = self._new_event()
        before = self._now()
        self._pass_event(event)
        after = self._now()
        return Anchor(event, (before + after) / 2, (after - before) / 2)

    def place(self, begin: Event, end: Event, late_ns: float = 0.0) -> tuple[int, int, int]:
        """When the first of two events (or so much later) and the second happened, and the error of that, in
        nanoseconds; zeros before the first anchor."""
        anchor = self._latest
        if anchor is None:
            return 0, 0, 0
        to_end = anchor.event.elapsed_time(end) * 1e6
        took = max(0.0, begin.elapsed_time(end) * 1e6 - late_ns)
        end_ns = anchor.host_ns + to_end * self._rate
        error = anchor.error_ns + abs(to_end) * (self._rate_error + _RESOLUTION)
        return int(end_ns - took), int(end_ns), max(1, int(error))
