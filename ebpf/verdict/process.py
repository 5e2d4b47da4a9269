"""All processes of a node: their verdicts by kind of memory, and the stacks that grew.

In flow the tracer's reports (`CudaProcess`), with the number of requests that the process's engine has served
where that is known; out flow `ProcessWatch`es. A process is its pid and its start. Everything is bounded:
processes, stacks per process, points per stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ebpf.verdict.leak import LeakWatch, State, Verdict
from gpuglass_vllm.records import CudaOwner, CudaProcess

MAX_PROCESSES = 1024
FORGET_SECONDS = 600.0
"""How long a process is remembered of which the tracer says nothing any more."""
MAX_STACKS = 48
"""Stacks remembered per process."""
POINTS = 24
"""Points of a stack's history; when they are full every second one is dropped."""
FIRST_INTERVAL = 60.0
UNTRACKED = "untracked"
"""Watched like a kind: what the driver lists beyond the ledger. Memory that no API shows leaks there."""

_NAN = math.nan


@dataclass(frozen=True, slots=True)
class GrownStack:
    """A stack and what it has allocated and not freed since a growth began."""

    stack: int
    growth: float
    """Bytes."""
    live_bytes: int


class _StackHistory:
    """Live bytes of one stack over its life, at ever coarser intervals."""

    __slots__ = ("interval", "kind", "live", "points", "seen")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.points: list[tuple[float, int]] = []
        self.interval = FIRST_INTERVAL
        self.live = 0
        self.seen = 0.0

    def add(self, at: float, live: int) -> None:
        self.live, self.seen = live, at
        if self.points and at - self.points[-1][0] < self.interval:
            return
        self.points.append((at, live))
        if len(self.points) > POINTS:
            del self.points[1::2]
            self.interval *= 2

    def growth(self, since: float) -> float:
        """Bytes since a time; what was there when the history began counts as old."""
        before = next((live for at, live in reversed(self.points) if at <= since), None)
        if before is None:
            before = self.points[0][1] if self.points and self.points[0][0] <= since + self.interval else 0
        return self.live - before


def _mean_size(old: CudaProcess, new: CudaProcess) -> float:
    """Mean size of what was allocated between two reports, which a missed call is taken to have had; 0 if
    nothing was."""
    before = {memory.kind: memory for memory in old.memory}
    calls = size = 0
    for memory in new.memory:
        earlier = before.get(memory.kind)
        if earlier is not None:
            calls += memory.allocations - earlier.allocations
            size += memory.allocated_bytes - earlier.allocated_bytes
    return max(0.0, size / calls) if calls > 0 else 0.0


class ProcessWatch:
    """One process."""

    __slots__ = ("_doubt", "_lost", "_stacks", "last", "requests", "watches")

    def __init__(self, record: CudaProcess) -> None:
        self.last = record
        """The latest report."""
        self.watches: dict[str, LeakWatch] = {}
        """By kind of memory."""
        self.requests = _NAN
        self._doubt = 0.0
        self._lost = record.lost
        self._stacks: dict[tuple[int, str], _StackHistory] = {}

    def add(self, record: CudaProcess, requests: float = _NAN) -> None:
        """The next report; an older one than the last is passed over."""
        old = self.last
        if record.at < old.at:
            return
        at = record.at / 1e9
        if (record.epoch, record.tracking_since_ns) != (old.epoch, old.tracking_since_ns) or (
            record.lost < self._lost
        ):
            for watch in self.watches.values():
                watch.restart()
            self._stacks.clear()
            self._lost, self._doubt = record.lost, 0.0
        missed = record.lost - self._lost
        self._lost = record.lost
        self.last, self.requests = record, requests
        if missed:
            self._doubt += missed * _mean_size(old, record)
        for memory in record.memory:
            self._watch(memory.kind).add(at, memory.live_bytes, requests, self._doubt, record.drifted)
        if record.untracked_bytes >= 0:
            self._watch(UNTRACKED).add(at, record.untracked_bytes, requests, 0.0, record.drifted)
        self._note(record.stacks, at)

    def verdicts(self) -> Iterator[tuple[str, Verdict]]:
        """Verdicts by kind of memory."""
        return ((kind, watch.verdict) for kind, watch in self.watches.items())

    def grown(self, kind: str, since: float, most: int = 3) -> list[GrownStack]:
        """The stacks that grew most in one kind of memory since a time (seconds), most first."""
        found = [
            GrownStack(stack, history.growth(since), history.live)
            for (stack, of), history in self._stacks.items()
            if of == kind
        ]
        found.sort(key=lambda one: (-one.growth, one.stack))
        return [one for one in found[:most] if one.growth > 0]

    def _watch(self, kind: str) -> LeakWatch:
        watch = self.watches.get(kind)
        if watch is None:
            watch = self.watches[kind] = LeakWatch(kind)
        return watch

    def _note(self, owners: list[CudaOwner], at: float) -> None:
        for owner in owners:
            key = (owner.stack, owner.kind)
            history = self._stacks.get(key)
            if history is None:
                if len(self._stacks) >= MAX_STACKS:
                    oldest = min(self._stacks, key=lambda k: (self._stacks[k].seen, self._stacks[k].live))
                    del self._stacks[oldest]
                history = self._stacks[key] = _StackHistory(owner.kind)
            history.add(at, owner.live_bytes)


class Processes:
    """All processes that tracers report."""

    def __init__(self, most: int = MAX_PROCESSES) -> None:
        self.by_key: dict[tuple[int, int, str], ProcessWatch] = {}
        """By pid, start and GPU."""
        self.refused = 0
        """Reports of processes beyond the limit."""
        self._most = most

    def take(self, record: CudaProcess, requests: float = _NAN) -> ProcessWatch | None:
        """One report; None if the process has gone or there is no room for it."""
        key = (record.pid, record.start_ticks, record.gpu_uuid)
        if record.ended:
            self.by_key.pop(key, None)
            return None
        watch = self.by_key.get(key)
        if watch is None:
            if len(self.by_key) >= self._most:
                self.refused += 1
                return None
            watch = self.by_key[key] = ProcessWatch(record)
        watch.add(record, requests)
        return watch

    def tick(self, now_ns: int) -> None:
        """Forget processes of which nothing was heard for long."""
        limit = now_ns - int(FORGET_SECONDS * 1e9)
        for key in [key for key, watch in self.by_key.items() if watch.last.at < limit]:
            del self.by_key[key]

    def suspected(self) -> Iterator[tuple[ProcessWatch, str, Verdict]]:
        """All suspicions."""
        for watch in self.by_key.values():
            for kind, verdict in watch.verdicts():
                if verdict.state is State.SUSPECTED:
                    yield watch, kind, verdict
