"""Joins allocations with the steps that ran then: which request ran when memory ran out.

In flow steps and out-of-memory words of workers, by the host's pid of their process, and the tracer's events;
out flows each event with its link. `exact`: the allocating thread is the one that ran the step and the call
lies within it, or the worker's own hook tells of the failure. `temporal`: a step of the process ran then,
or had just ended. Steps and events come by different ways, so an event waits a little for its step. All is
bounded: steps per process, processes, events that wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from gpuglass.exemplar import RequestRef
from gpuglass_vllm.records import CudaEvent, OutOfMemory, StepSample

MAX_STEPS = 512
"""Steps remembered per process."""
MAX_PROCESSES = 256
MAX_WAITING = 1024
WAIT_NS = 3_000_000_000
"""How long an event waits for its step; both are sent a few times per second."""
NEAR_NS = 1_000_000_000
"""How far from a step an allocation may lie and still be linked with it by time."""
HOOK_NS = 5_000_000_000
"""How long after a failed call the engine's out-of-memory hook may speak: PyTorch frees its cache and tries
again before."""
OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY."""
MAX_BATCH = 64


class Link(StrEnum):
    """How an allocation was joined with a request."""

    EXACT = "exact"
    TEMPORAL = "temporal"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Step:
    """One step that a worker told of, or a batch in which its allocator failed."""

    begin_ns: int
    end_ns: int
    tid: int
    """The thread that ran it, as the host numbers it; 0: unknown."""
    number: int
    """-1: the engine's hook, which knows no number."""
    request: RequestRef
    """The one with most scheduled tokens."""
    batch: tuple[tuple[str, int], ...]
    """Request ids and their scheduled tokens, most first."""


@dataclass(frozen=True, slots=True)
class Joined:
    """An allocation and what ran then."""

    event: CudaEvent
    link: Link
    step: Step | None


class Joiner:
    """Keeps steps, and events until they are joined."""

    def __init__(self) -> None:
        self.dropped = 0
        """Events beyond `MAX_WAITING`, given out without a link."""
        self._steps: dict[int, deque[Step]] = {}
        self._hooks: dict[int, deque[Step]] = {}
        self._waiting: deque[tuple[int, CudaEvent]] = deque()

    def step(self, pid: int, tid: int, sample: StepSample, request: RequestRef) -> None:
        """A worker's step; `pid` and `tid` are the host's."""
        batch = tuple(zip(sample.request_ids, sample.tokens, strict=True))[:MAX_BATCH]
        self._keep(
            self._steps,
            pid,
            Step(sample.begin_ns, sample.at, tid, sample.step, request, batch),
        )

    def out_of_memory(self, pid: int, record: OutOfMemory, request: RequestRef) -> None:
        """A worker's own word that an allocation failed."""
        tokens = record.tokens or [0] * len(record.request_ids)
        batch = tuple(zip(record.request_ids, tokens, strict=True))
        self._keep(self._hooks, pid, Step(record.at, record.at, 0, -1, request, batch))

    def event(self, event: CudaEvent, now_ns: int) -> Joined | None:
        """An allocation; given back at once only if there is no room for it to wait."""
        self._waiting.append((now_ns, event))
        if len(self._waiting) <= MAX_WAITING:
            return None
        self.dropped += 1
        return Joined(self._waiting.popleft()[1], Link.NONE, None)

    def forget(self, pid: int) -> None:
        """A process has gone."""
        self._steps.pop(pid, None)
        self._hooks.pop(pid, None)

    def due(self, now_ns: int) -> Iterator[Joined]:
        """Events whose step is known, or that have waited for long enough."""
        still: deque[tuple[int, CudaEvent]] = deque()
        while self._waiting:
            came, event = self._waiting.popleft()
            joined = self._join(event)
            if joined.link is Link.EXACT or now_ns - came >= WAIT_NS:
                yield joined
            else:
                still.append((came, event))
        self._waiting = still

    def _join(self, event: CudaEvent) -> Joined:
        if event.code == OUT_OF_MEMORY:
            for step in self._hooks.get(event.pid, ()):
                if step.batch and 0 <= step.end_ns - event.at <= HOOK_NS:
                    return Joined(event, Link.EXACT, step)
        best: Step | None = None
        nearest = NEAR_NS + 1
        for step in reversed(self._steps.get(event.pid, ())):
            if not step.batch:
                continue
            within = step.begin_ns <= event.begin_ns and event.at <= step.end_ns
            if within and step.tid == event.tid:
                return Joined(event, Link.EXACT, step)
            distance = max(0, event.begin_ns - step.end_ns, step.begin_ns - event.at)
            if distance < nearest:
                nearest, best = distance, step
        return Joined(event, Link.NONE if best is None else Link.TEMPORAL, best)

    @staticmethod
    def _keep(of: dict[int, deque[Step]], pid: int, step: Step) -> None:
        steps = of.get(pid)
        if steps is None:
            if len(of) >= MAX_PROCESSES:
                del of[min(of, key=lambda known: of[known][-1].end_ns)]
            steps = of[pid] = deque(maxlen=MAX_STEPS)
        steps.append(step)
