"""How long each step took, measured on the device without ever waiting for it.

`EventClock` records CUDA events on the engine's stream and reads them later, in order, once the device has
passed them. `WallClock` is for engines on a CPU. Both give, per step, the busy time and the idle time before
it.

An event costs the host some ten microseconds, so there are as few as possible. While the device is behind the
host, a step begins where the one before ended, and one event per step is enough. If the device has passed the
last step's end when a step begins, or when its first captured graph is about to be launched, it waits for
the host: another event is recorded there, and the time up to it counts as idle (with the few copies of the
preparation that ran then), as does the time that the host takes to launch the graph. What the host could not
feed inside an eager forward pass cannot be told and counts as busy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import msgspec

Tag = TypeVar("Tag")

_AT_ONCE = 16
"""Steps whose passing is asked for with one query."""

STEADY = 4
"""Steps in a row that begin while the device is still busy; from then on one step in so many is looked at."""
SLOWER = 1.1
"""... and whenever the host takes so much longer than before from one step to the next."""

MAX_OUTSTANDING = 1024
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


class _Entry(msgspec.Struct):
    """A struct because it is made without a Python call."""

    tag: Any
    gap: bool
    """Steps before this one were not timed."""
    unseen: bool
    """It was not looked yet whether the device waits."""
    forwarded: bool = False
    begin: Any = None
    """An event where it begins, if that is not where the step before ended."""
    launch_ns: int = 0
    """How long the device waited behind `begin` until its graph was launched."""
    end: Any = None


class EventClock(Generic[Tag]):
    """Steps on a CUDA stream. One thread records, another polls, without a lock: the one appends to the
    queue, the other takes from it."""

    kind = "cuda"

    def __init__(
        self,
        new_event: Callable[[], Event],
        record: Callable[[Any], None] = lambda event: event.record(),
        query: Callable[[Any], bool] = lambda event: bool(event.query()),
        limit: int = MAX_OUTSTANDING,
    ) -> None:
        """`record` puts an event on the engine's stream, `query` asks whether the device has passed one.

        Raises what `new_event` raises.
        """
        self._new_event = new_event
        self._record = record
        self._query = query
        self._limit = limit
        self._pool: list[Event] = [new_event() for _ in range(8)]
        self._queue: deque[_Entry] = deque()
        self._open: _Entry | None = None
        self._newest: Event | None = None
        """End of the last step that was queued."""
        self._last_end: Event | None = None
        """End of the last step that was delivered."""
        self._missed = False
        self._behind = 0
        """Steps in a row for which the device did not wait."""
        self._forward_ns = 0
        self._pace_ns = 0
        """From one forward pass to the next, when it was last seen that the device did not wait."""
        self.launching = 0
        """Since when a graph is being launched for which the device waits (ns); 0: none is."""
        self.span: tuple[Event, Event, float] | None = None
        """Begin and end of the step that is being delivered, and how long after its begin the device still
        waited (ns); only then the events are still its own."""
        self.untimed = 0
        """Steps that were not timed because the device was too far behind."""

    def __len__(self) -> int:
        return len(self._queue)

    def begin(self, tag: Tag, graph: bool = False) -> bool:
        """A step begins on the current stream. False: it is not timed.

        `graph` says that `forward` is sure to follow: whether the device waits is looked at there.
        """
        if self._open is not None:
            self.end()  # its sampling never came
        if len(self._queue) >= self._limit:
            self._missed = True
            self.untimed += 1
            return False
        entry = self._open = _Entry(tag, self._missed, graph)
        self._missed = False
        if not graph:
            newest = self._newest
            if newest is None or entry.gap or self._query(newest):
                entry.begin = self._recorded()
        return True

    def forward(self, now: int = 0) -> None:
        """A captured graph of the step is about to be launched; only the first one tells something.

        `now` is the host's time (ns). While the device is behind and the host keeps its pace, it is looked
        only at some steps whether the device waits: it can only wait where the host was slower than before.
        """
        entry = self._open
        if entry is None or entry.forwarded:
            return
        entry.forwarded = True
        entry.unseen = False
        begin, newest = entry.begin, self._newest
        if begin is not None:
            if self._query(begin):
                self._record(begin)
                self.launching = time.monotonic_ns()
            return
        pause, self._forward_ns = now - self._forward_ns, now
        if newest is None or entry.gap:
            entry.begin = self._recorded()
        elif self._behind >= STEADY and self._behind % STEADY and pause < self._pace_ns * SLOWER:
            self._behind += 1
        elif self._query(newest):
            entry.begin = self._recorded()
            self.launching = time.monotonic_ns()
            self._behind = 0
        else:
            self._behind += 1
            self._pace_ns = pause

    def launched(self) -> None:
        """The graph is launched: a device that waited for it has it from now on."""
        entry, since = self._open, self.launching
        self.launching = 0
        if entry is not None and since:
            entry.launch_ns = time.monotonic_ns() - since

    def pause(self) -> None:
        """The forward pass is queued; sampling follows."""

    def resume(self) -> None:
        """The host comes back to the step."""

    def end(self) -> None:
        """All of the step is queued."""
        entry, self._open = self._open, None
        if entry is not None:
            if entry.unseen and (self._newest is None or entry.gap):
                entry.begin = self._recorded()
            end = self._pool.pop() if self._pool else self._new_event()
            self._record(end)
            entry.end = self._newest = end
            self._queue.append(entry)

    def note(self, tag: Tag) -> bool:
        """Deliver a tag in its turn, with no time. False: there is no room for it."""
        if self._open is not None:
            self.end()
        if len(self._queue) >= self._limit:
            return False
        self._queue.append(_Entry(tag, False, False))
        return True

    def cancel(self) -> None:
        """The step failed: it is not timed."""
        entry, self._open = self._open, None
        self.launching = 0
        if entry is not None:
            self._missed = True
            if entry.begin is not None:
                self._pool.append(entry.begin)

    def poll(self, deliver: Deliver[Tag], limit: int = 8) -> int:
        """Deliver at most `limit` steps that the device has passed, oldest first; how many there were."""
        queue = self._queue
        passed = 0
        while passed < min(limit, len(queue)):
            # The last of several: events are passed in order.
            ahead = last = min(limit, len(queue), passed + _AT_ONCE)
            while last > passed and queue[last - 1].end is None:
                last -= 1  # noted without a time
            end = queue[last - 1].end if last > passed else None
            if end is None or self._query(end):
                passed = ahead
            elif ahead == passed + 1:
                break
            else:
                limit = min(limit, passed + (ahead - passed) // 2)
        for _ in range(passed):
            self._deliver(queue.popleft(), deliver)
        return passed

    def _deliver(self, entry: _Entry, deliver: Deliver[Tag]) -> None:
        before, begin, end = self._last_end, entry.begin, entry.end
        if end is None:
            deliver(entry.tag, 0.0, 0.0, 0.0)
            return
        idle = unknown = launch = 0.0
        if begin is None:
            assert before is not None, "a step without a begin follows one that ended"
            busy = _ns(before, end)
            if entry.unseen:  # the graph that was sure to follow did not: how long it waited is not known
                busy, unknown = 0.0, busy
        else:
            busy = _ns(begin, end)
            launch = min(float(entry.launch_ns), busy)
            busy -= launch
            if before is not None:
                pause = _ns(before, begin) + launch
                idle, unknown = (0.0, pause) if entry.gap else (pause, 0.0)
        self._last_end = end
        first = begin or before
        self.span = (first, end, launch) if first is not None else None
        deliver(entry.tag, busy, idle, unknown)
        self.span = None
        # Only now: the other thread may record them anew at once.
        if begin is not None:
            self._pool.append(begin)
        if before is not None:
            self._pool.append(before)

    def _recorded(self) -> Event:
        event = self._pool.pop() if self._pool else self._new_event()
        self._record(event)
        return event


def _ns(begin: Event, end: Event) -> float:
    return max(0.0, begin.elapsed_time(end)) * 1e6


class WallClock(Generic[Tag]):
    """Steps by the host's clock: the time that the engine's thread spends in them."""

    kind = "wall"
    launching = 0

    def __init__(self, now: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now = now
        self._queue: deque[tuple[Tag, float, float]] = deque(maxlen=MAX_OUTSTANDING)
        self._tag: Tag | None = None
        self._busy = 0
        self._since = 0
        self._begun = 0
        self._last_end = 0
        self.span: tuple[Event, Event, float] | None = None
        """There are no events."""
        self.untimed = 0

    def __len__(self) -> int:
        return len(self._queue)

    def begin(self, tag: Tag, graph: bool = False) -> bool:
        """A step begins."""
        if len(self._queue) >= MAX_OUTSTANDING:
            self.untimed += 1
            self._tag = None
            return False
        self._tag = tag
        self._busy = 0
        self._begun = self._since = self._now()
        return True

    def forward(self, now: int = 0) -> None:
        """Has no meaning here: the host itself computes."""

    def launched(self) -> None:
        """Nor has this."""

    def pause(self) -> None:
        """The host leaves the step for a while."""
        self._busy += self._now() - self._since

    def resume(self) -> None:
        """The host comes back to the step."""
        self._since = self._now()

    def end(self) -> None:
        """The step is complete. What the host did elsewhere between `pause` and `resume` counts as idle."""
        tag, self._tag = self._tag, None
        if tag is None:
            return
        now = self._now()
        busy = self._busy + now - self._since
        start = self._last_end or self._begun
        self._queue.append((tag, float(busy), float(max(0, now - start - busy))))
        self._last_end = now

    def note(self, tag: Tag) -> bool:
        """Deliver a tag in its turn, with no time. False: there is no room for it."""
        self.end()
        if len(self._queue) >= MAX_OUTSTANDING:
            return False
        self._queue.append((tag, 0.0, 0.0))
        return True

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
