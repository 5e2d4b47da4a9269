"""What is noted of requests while they run: steps, pieces of the prompt, events. Bounded in every direction.

In flow records of the stream as they come. Out flow `Notes`, one per request, which `build` turns into spans
when the request has ended. A step is kept once and shared by the notes of its requests. Processes of an
engine are heard in any order, so a request may be known by its steps before anybody says who asked. Not
locked: the caller serialises all calls.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from typing import NamedTuple

from exporters.vllm.experts import ExpertsRefused, decode, imbalance
from gpuglass.record_hub import Allocation, Speaker
from gpuglass_vllm import records
from otel_bridge import attributes as names
from otel_bridge.identity import Identity, identify
from otel_bridge.model import Attributes, Context

MAX_OPEN = 20_000
"""Requests with notes; of more, those that were not heard of for longest are forgotten."""
REMEMBERED = 20_000
"""Requests known to be over, so that a late word does not begin new notes."""
FORGET_NS = 900_000_000_000
"""How long nothing may be heard of a request; as long as the ledger waits."""
MAX_CHUNKS = 32
"""Pieces of a prompt that are kept; of more, the last ones are put together."""
MAX_EVENTS = 32
MAX_PINNED = 4
"""Profiled steps per request."""
RECENT_STEPS = 64
"""Steps of all workers that kernels may still be told of."""
READINGS = 64
"""Readings of expert imbalance kept per engine."""
MAX_ENGINES = 256
IMBALANCED = 2.0
"""Busiest expert ÷ mean from which an event is made."""
LEAST_TOKENS = 64
"""Fewer tokens are uneven by chance."""
LARGE_BYTES = 64 << 20
"""Successful allocations from here on make an event."""
BATCH_SHOWN = 16


class Place:
    """Where a request's span is, once somebody has said who asked. All that a step keeps of its requests."""

    __slots__ = ("identity", "wire")

    def __init__(self) -> None:
        self.identity: Identity | None = None
        self.wire = b""
        """What all links to it say alike, encoded (by `otlp`)."""

    @property
    def context(self) -> Context | None:
        """Its span; None: not known."""
        return self.identity.context if self.identity is not None else None


@dataclass(slots=True)
class SharedStep:
    """A step that was told, with the spans of its requests."""

    sample: records.StepSample
    rank: int
    gpu_uuid: str
    places: tuple[Place | None, ...]
    """For each of `sample.request_ids`; None: it is over."""
    took_ns: int
    """Its length, by the device where that is known."""
    kernels: records.StepKernels | None = None
    wire: list[bytes] = field(default_factory=list)
    """A link to each of its requests, encoded (by `otlp`) once for the spans of all; empty: not yet."""

    @classmethod
    def of(cls, speaker: Speaker, sample: records.StepSample, places: tuple[Place | None, ...]) -> SharedStep:
        """A step as its worker told it."""
        took = sample.gpu_end_ns - sample.gpu_begin_ns or sample.at - sample.begin_ns
        return cls(sample, speaker.rank, speaker.gpu_uuid, places, took)


class StepOf(NamedTuple):
    """A step as one of its requests sees it."""

    step: SharedStep
    place: int
    """Place of the request in it."""


class Chunk(NamedTuple):
    """A piece of a prompt that one step computed."""

    begin_ns: int
    end_ns: int
    tokens: int
    gpu_ns: float


class Note(NamedTuple):
    """An event, on the monotonic clock."""

    name: str
    at_ns: int
    attributes: Attributes


class Steps:
    """Some of a request's steps: the first, the slowest, and others spread over its life."""

    __slots__ = ("_first", "_pinned", "_slowest", "_spread", "_stride", "_turn")

    def __init__(self) -> None:
        self._first: StepOf | None = None
        self._slowest: list[tuple[int, int, StepOf]] = []
        """A heap by length and turn."""
        self._spread: list[StepOf] = []
        self._pinned: list[StepOf] = []
        self._stride = 1
        self._turn = 0

    def see(self, seen: StepOf, limit: int) -> None:
        """A further step; at most `limit` are kept."""
        if limit < 1:
            return
        if self._first is None:
            self._first = seen
            return
        slow = (limit - 1) // 3
        self._turn += 1
        entry = (seen.step.took_ns, -self._turn, seen)
        if len(self._slowest) < slow:
            heappush(self._slowest, entry)
            return
        seen = heappushpop(self._slowest, entry)[2]  # with no place for slow ones, the same one
        room = limit - 1 - slow
        if room < 1 or self._turn % self._stride:
            return
        self._spread.append(seen)
        if len(self._spread) > room:
            # Every second one stays, and from now on half as many come: evenly spread over any length.
            self._spread = self._spread[::2][:room]
            self._stride *= 2

    def pin(self, seen: StepOf) -> None:
        """Keep a step, one of few that were profiled, beside the others."""
        if len(self._pinned) < MAX_PINNED and not any(seen.step is other.step for other in self._pinned):
            self._pinned.append(seen)

    def kept(self) -> list[StepOf]:
        """Those kept, oldest first."""
        first = [self._first] if self._first is not None else []
        slowest = [seen for _, _, seen in self._slowest]
        found = {id(seen.step): seen for seen in (*first, *slowest, *self._spread, *self._pinned)}.values()
        return sorted(found, key=lambda seen: seen.step.sample.begin_ns)


class Notes:
    """What is noted of one request."""

    __slots__ = ("chunks", "engine_span", "events", "heard_at", "place", "steps")

    def __init__(self) -> None:
        self.place = Place()
        self.heard_at = 0
        self.steps: Steps | None = None
        self.chunks: list[Chunk] = []
        self.events: list[Note] = []
        self.engine_span: Context | None = None
        """The span that the engine itself exports of it."""

    def add(self, note: Note) -> None:
        """An event; of too many the first ones stay."""
        if len(self.events) < MAX_EVENTS:
            self.events.append(note)

    def chunk(self, chunk: Chunk) -> None:
        """A piece of the prompt."""
        if len(self.chunks) < MAX_CHUNKS:
            self.chunks.append(chunk)
            return
        last = self.chunks[-1]
        self.chunks[-1] = Chunk(
            last.begin_ns,
            max(last.end_ns, chunk.end_ns),
            last.tokens + chunk.tokens,
            last.gpu_ns + chunk.gpu_ns,
        )


class Reading(NamedTuple):
    """How uneven the experts were between two moments."""

    since_ns: int
    at_ns: int
    ratio: float
    layer: int


@dataclass(slots=True)
class Journal:
    """Notes of all open requests."""

    steps_per_request: int = 8
    forgotten: int = 0
    """Requests whose notes were thrown away."""
    _open: OrderedDict[tuple[str, str], Notes] = field(default_factory=OrderedDict)
    """By instance and request, those heard of last at the end."""
    _done: OrderedDict[tuple[str, str], None] = field(default_factory=OrderedDict)
    _recent: deque[tuple[int, SharedStep]] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    """With the number of their worker's connection."""
    _experts: OrderedDict[tuple[str, str], deque[Reading]] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._open)

    # Requests

    def start(self, instance: str, record: records.RequestStart, now_ns: int) -> None:
        """A request entered the engine; told again when the agent was away."""
        notes = self._heard((instance, record.request_id), now_ns)
        if notes is not None and notes.place.identity is None:
            notes.place.identity = identify(
                instance, record.request_id, record.trace_id, record.span_id, record.sampled
            )

    def take(self, instance: str, request_id: str) -> Notes | None:
        """The notes of a request that has ended, which are not kept any longer."""
        key = (instance, request_id)
        self._done[key] = None
        if len(self._done) > REMEMBERED:
            self._done.popitem(last=False)
        return self._open.pop(key, None)

    def sweep(self, now_ns: int) -> None:
        """Forget requests of which nothing was heard for long."""
        while self._open:
            key = next(iter(self._open))
            if now_ns - self._open[key].heard_at < FORGET_NS:
                return
            del self._open[key]
            self.forgotten += 1

    def _heard(self, key: tuple[str, str], now_ns: int) -> Notes | None:
        """The notes of a request, new ones if need be; None if it is over."""
        notes = self._open.get(key)
        if notes is not None:
            self._open.move_to_end(key)
        elif key in self._done:
            return None
        else:
            notes = self._open[key] = Notes()
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
                self.forgotten += 1
        notes.heard_at = now_ns
        return notes

    def traced(self, instance: str, record: records.RequestTraced, now_ns: int) -> None:
        """The engine exports a span of its own."""
        notes = self._heard((instance, record.request_id), now_ns)
        if notes is not None:
            notes.engine_span = Context(bytes.fromhex(record.trace_id), bytes.fromhex(record.span_id))

    # Steps

    def step(self, speaker: Speaker, sample: records.StepSample, now_ns: int) -> None:
        """One step. Those of the other ranks tell of the same requests at the same time."""
        if speaker.rank > 0:
            return
        found = [self._heard((speaker.instance, name), now_ns) for name in sample.request_ids]
        places = tuple(notes.place if notes is not None else None for notes in found)
        shared = SharedStep.of(speaker, sample, places)
        self._recent.append((speaker.number, shared))
        for index, notes in enumerate(found):
            if notes is not None:
                if notes.steps is None:
                    notes.steps = Steps()
                notes.steps.see(StepOf(shared, index), self.steps_per_request)

    def kernels(self, speaker: Speaker, record: records.StepKernels, now_ns: int) -> None:
        """What ran on the device in a step that was told."""
        for number, shared in reversed(self._recent):
            if number == speaker.number and shared.sample.step == record.step:
                shared.kernels = record
                for index, name in enumerate(shared.sample.request_ids):
                    notes = self._heard((speaker.instance, name), now_ns)
                    if notes is not None and notes.steps is not None and self.steps_per_request:
                        notes.steps.pin(StepOf(shared, index))
                return

    def prefill(self, speaker: Speaker, record: records.PrefillChunks, now_ns: int) -> None:
        """Pieces of prompts."""
        gpu = record.gpu_ns or [0.0] * len(record.request_ids)
        for name, begin, end, tokens, gpu_ns in zip(
            record.request_ids, record.begin_ns, record.end_ns, record.tokens, gpu, strict=True
        ):
            notes = self._heard((speaker.instance, name), now_ns)
            if notes is not None:
                notes.chunk(Chunk(begin, end, tokens, gpu_ns))

    # Events

    def preempted(self, instance: str, record: records.Preemption, now_ns: int) -> None:
        """A request lost its blocks."""
        notes = self._heard((instance, record.victim), now_ns)
        if notes is not None:
            holders = tuple(name for name in record.holders if name != record.victim)
            told: Attributes = ((names.CAUSE, record.cause), (names.LOST_TOKENS, record.lost_tokens))
            notes.add(Note(names.E_PREEMPTED, record.at, (*told, (names.HOLDERS, holders))))

    def out_of_memory(self, instance: str, record: records.OutOfMemory, now_ns: int) -> None:
        """An allocation failed: all requests of the batch see it."""
        pairs = zip(record.request_ids, record.tokens or [0] * len(record.request_ids), strict=True)
        batch = tuple(f"{name}: {tokens}" for name, tokens in pairs)
        note = Note(names.E_OUT_OF_MEMORY, record.at, ((names.BYTES, record.requested), (names.BATCH, batch)))
        for name in record.request_ids:
            notes = self._heard((instance, name), now_ns)
            if notes is not None:
                notes.add(note)

    def allocated(self, instances: list[str], told: Allocation, now_ns: int) -> None:
        """CUDA memory was asked for in a step of one of these servers."""
        if not told.code and told.bytes < LARGE_BYTES:
            return
        note = Note(
            names.E_ALLOCATION,
            told.at,
            (
                (names.FUNCTION, told.function),
                (names.BYTES, told.bytes),
                (names.CODE, told.code),
                (names.LINKED, told.link),
                (names.BATCH, tuple(f"{name}: {tokens}" for name, tokens in told.batch[:BATCH_SHOWN])),
            ),
        )
        for name, _ in told.batch:
            for instance in instances:
                # Of several servers in one process only one has the request.
                if len(instances) == 1 or (instance, name) in self._open:
                    notes = self._heard((instance, name), now_ns)
                    if notes is not None:
                        notes.add(note)

    # Experts

    def experts(self, speaker: Speaker, record: records.ExpertSums, now_ns: int) -> None:
        """Choices of experts since the last such record of the same layers."""
        if speaker.experts < 2 or record.counted_tokens < LEAST_TOKENS:
            return
        try:
            layers = decode(record.counts, speaker.experts)
        except ExpertsRefused:
            return
        ratio, layer = max((imbalance(counts), record.first + at) for at, counts in enumerate(layers))
        if not ratio >= IMBALANCED:
            return
        key = (speaker.instance, speaker.engine)
        readings = self._experts.get(key)
        if readings is None:
            readings = self._experts[key] = deque(maxlen=READINGS)
            if len(self._experts) > MAX_ENGINES:
                self._experts.popitem(last=False)
        since = readings[-1].at_ns if readings else now_ns - 1_000_000_000
        readings.append(Reading(since, now_ns, round(ratio, 3), layer))

    def worst_experts(self, instance: str, engine: str, begin_ns: int, end_ns: int) -> Reading | None:
        """The most uneven reading that overlaps a time."""
        readings = self._experts.get((instance, engine), ())
        there = [r for r in readings if r.since_ns <= end_ns and r.at_ns >= begin_ns]
        return max(there, key=lambda reading: reading.ratio, default=None)
