"""How long each step took, measured on the device without ever waiting for it.

`EventClock` records CUDA events on the engine's stream where a step begins, where its forward pass begins (if
a captured graph tells) and where it ends, and reads them later, in order, once the device has passed them.
`WallClock` is for engines on a CPU. Both give, per step, the busy time and the idle time before it.

Between begin and end the stream can run dry: the host prepares the batch while nothing is queued. If the
device had already passed the begin event when the forward pass was launched, it waited for the host, and the
time up to the forward pass counts as idle; the few copies of the preparation that ran then are counted as
idle with it. If it had not, the device was behind the host, and the whole step was busy. What the host could
not feed inside an eager forward pass cannot be told and counts as busy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

Tag = TypeVar("Tag")

MAX_OUTSTANDING = 512
"""Steps whose end the device has not passed; more are not timed (their time goes to unattributed)."""


class Event(Protocol):
    """What is used of `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds."""
        ...


Deliver = Callable[[Tag, float, float, float], None]
"""Gets a step's tag, its busy time, the idle time before it, and time that cannot be given to any step (all
ns)."""


class _Entry(Generic[Tag]):
    __slots__ = ("begin", "drained", "end", "forward", "gap", "tag")

    def __init__(self, tag: Tag, begin: Event, gap: bool) -> None:
        self.tag = tag
        self.begin = begin
        self.forward: Event | None = None
        self.end: Event | None = None
        self.drained = False
        self.gap = gap
        """Steps before this one were not timed."""


class EventClock(Generic[Tag]):
    """Steps on a CUDA stream. One thread records; polling may be done by any one thread at a time."""

    kind = "cuda"

    def __init__(self, new_event: Callable[[], Event], limit: int = MAX_OUTSTANDING) -> None:
        """Raises what `new_event` raises, if events cannot be had."""
        self._new_event = new_event
        self._limit = limit
        self._pool: list[Event] = [new_event() for _ in range(8)]
        self._queue: deque[_Entry[Tag]] = deque()
        self._open: _Entry[Tag] | None = None
        self._last_end: Event | None = None
        self._missed = False
        self.untimed = 0
        """Steps that were not timed because the device was too far behind."""

    def __len__(self) -> int:
        return len(self._queue)

    def begin(self, tag: Tag) -> bool:
        """A step begins on the current stream. False: it is not timed."""
        if self._open is not None and self._open.end is not None:
            self._queue.append(self._open)  # its sampling never came: it ended with the forward pass
            self._open = None
        self.cancel()
        if len(self._queue) >= self._limit:
            self._missed = True
            self.untimed += 1
            return False
        event = self._take()
        event.record()
        self._open = _Entry(tag, event, self._missed)
        self._missed = False
        return True

    def forward(self) -> None:
        """The step's forward pass is about to be launched."""
        entry = self._open
        if entry is None or entry.forward is not None:
            return
        entry.drained = entry.begin.query()
        event = self._take()
        event.record()
        entry.forward = event

    def pause(self) -> None:
        """The forward pass is queued. If no sampling follows, the step has ended here."""
        entry = self._open
        if entry is not None:
            entry.end = self._take()
            entry.end.record()

    def resume(self) -> None:
        """The host comes back to the step."""

    def end(self) -> None:
        """All of the step is queued."""
        entry, self._open = self._open, None
        if entry is None:
            return
        if entry.end is None:
            entry.end = self._take()
        entry.end.record()
        self._queue.append(entry)

    def cancel(self) -> None:
        """The step failed: it is not timed."""
        entry, self._open = self._open, None
        if entry is not None:
            self._pool += [event for event in (entry.begin, entry.forward, entry.end) if event is not None]
            self._missed = True

    def poll(self, deliver: Deliver[Tag], limit: int = 4) -> int:
        """Deliver at most `limit` steps that the device has passed, oldest first; how many there were."""
        done = 0
        queue = self._queue
        while done < limit and queue:
            entry = queue[0]
            end = entry.end
            if end is None or not end.query():
                break
            queue.popleft()
            done += 1
            idle = unknown = 0.0
            if self._last_end is not None:
                before = max(0.0, self._last_end.elapsed_time(entry.begin)) * 1e6
                if entry.gap:
                    unknown = before
                else:
                    idle = before
                self._pool.append(self._last_end)
            busy = max(0.0, entry.begin.elapsed_time(end)) * 1e6
            if entry.forward is not None:
                if entry.drained:
                    waited = min(busy, max(0.0, entry.begin.elapsed_time(entry.forward)) * 1e6)
                    busy -= waited
                    idle += waited
                self._pool.append(entry.forward)
            self._pool.append(entry.begin)
            self._last_end = end
            deliver(entry.tag, busy, idle, unknown)
        return done

    def _take(self) -> Event:
        return self._pool.pop() if self._pool else self._new_event()


class WallClock(Generic[Tag]):
    """Steps by the host's clock: the time that the engine's thread spends in them."""

    kind = "wall"

    def __init__(self, now: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now = now
        self._queue: deque[tuple[Tag, float, float]] = deque(maxlen=MAX_OUTSTANDING)
        self._tag: Tag | None = None
        self._busy = 0
        self._since = 0
        self._begun = 0
        self._last_end = 0
        self.untimed = 0

    def __len__(self) -> int:
        return len(self._queue)

    def begin(self, tag: Tag) -> bool:
        """A step begins."""
        if len(self._queue) >= MAX_OUTSTANDING:
            self.untimed += 1
            self._tag = None
            return False
        self._tag = tag
        self._busy = 0
        self._begun = self._since = self._now()
        return True

    def forward(self) -> None:
        """Has no meaning here: the host itself computes."""

    def pause(self) -> None:
        """The host leaves the step for a while."""
        self._busy += self._now() - self._since

    def resume(self) -> None:
        """The host comes back to the step."""
        self._since = self._now()

    def end(self) -> None:
        """The step is complete. What the host did elsewhere between `pause` and `resume` counts as idle."""
        if self._tag is None:
            return
        now = self._now()
        busy = self._busy + now - self._since
        start = self._last_end or self._begun
        self._queue.append((self._tag, float(busy), float(max(0, now - start - busy))))
        self._last_end = now
        self._tag = None

    def cancel(self) -> None:
        """The step failed: it is not timed."""
        self._tag = None

    def poll(self, deliver: Deliver[Tag], limit: int = 4) -> int:
        """Deliver at most `limit` steps, oldest first; how many there were."""
        done = 0
        while done < limit and self._queue:
            tag, busy, idle = self._queue.popleft()
            deliver(tag, busy, idle, 0.0)
            done += 1
        return done


Clock = EventClock[Tag] | WallClock[Tag]
