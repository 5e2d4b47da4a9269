"""Which experts are chosen how often, per layer and tenant, with nothing added to the engine's CUDA graphs.

vLLM hands each layer's `topk_ids` to a capture function. While a graph is captured we keep these tensors: a
tensor that is still referenced keeps its place in the graph's memory, so every replay leaves the layer's
choices at an address that we know. In an eager step we keep the tensors until the step ends. On one step in
`every`, one kernel behind the forward pass reads all layers and adds to counts on the device; on a CPU numpy
does. Every few seconds the counts are copied out beside the engine's stream. Only the first rank of a
tensor-parallel group counts: all of them route alike.

A step is counted whole or not at all: if a layer is missing, or saw fewer tokens than were scheduled (chunks,
micro-batches, sequence parallelism), it only counts as seen.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gpuglass_vllm.records import MAX_PACKET, ExpertSums, HotExperts

EVERY_CUDA = 16
"""Default: one step in so many is counted on a CUDA device, chosen by tests/benchmarks/engine_probe_gpu.py.
"""
EVERY_CPU = 1
"""Default on a CPU, where steps are long and counting is cheap against them."""

TENANTS = 16
"""Tenants told apart between two copies; the last row is for all others."""
OTHER = "other"

INTERVAL = 2.0
"""Seconds between copies of the counts."""

MAX_HELD_BYTES = 256 * 2**20
"""Bytes of `topk_ids` kept for captured graphs; graphs captured beyond that are not counted."""

MAX_COUNTED = 2**30
"""Tokens counted between two copies: with no agent to tell, counting rests there, below 32 bits."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The model's expert layers on this rank."""

    layers: tuple[int, ...]
    """Layer numbers as the model counts them."""
    experts: int
    top_k: int


@dataclass(slots=True)
class Held:
    """The choices that one captured graph leaves behind, by index of layer."""

    serial: int
    ids: dict[int, Any] = field(default_factory=dict)
    choices: Choices | None = None
    """The same, once it was seen that one graph has all layers: it is looked at only once."""


@dataclass(slots=True)
class Choices:
    """What the layers of one step left behind, complete."""

    ids: list[Any]
    """`topk_ids` of each layer: [tokens or more, top_k]."""
    key: tuple[int, ...] = ()
    """Names the addresses if they will be the same in another step with this key; empty: they will not."""
    rows: int = 0
    """Tokens that each layer has room for."""


class Routing:
    """Collects the layers' choices: from captured graphs as they are replayed, from eager steps as they run.

    `capturing` is set between `capture_begin` and `capture_end`, `begin` and `take` enclose a step.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.capturing: Held | None = None
        self.held_bytes = 0
        self.incomplete = 0
        """Steps that could not be counted since the process began."""
        self._live = False
        self._eager: dict[int, Any] = {}
        self._replayed: list[Held] = []
        self._serials = itertools.count(1)

    def capture_fn(self, index: int, chained: Callable[[Any], None] | None) -> Callable[[Any], None]:
        """The function for layer `index`; it calls the one that was set before, if there was one."""

        def see(topk_ids: Any) -> None:
            held = self.capturing
            if held is not None:
                size = topk_ids.numel() * topk_ids.element_size()
                if self.held_bytes + size <= MAX_HELD_BYTES:
                    self.held_bytes += size
                    held.ids[index] = topk_ids
            elif self._live:
                self._eager[index] = topk_ids
            if chained is not None:
                chained(topk_ids)

        return see

    def capture_begin(self) -> Held:
        """A graph begins to be captured; keep the result with the graph."""
        self.capturing = Held(next(self._serials))
        return self.capturing

    def capture_end(self) -> None:
        """The capture is over."""
        self.capturing = None

    def begin(self) -> None:
        """A step begins that is to be counted."""
        self._eager = {}
        self._replayed = []
        self._live = True

    def replayed(self, held: Held) -> None:
        """A captured graph is replayed within the step."""
        if self._live and held.ids:
            self._replayed.append(held)

    def take(self, tokens: int) -> Choices | None:
        """The forward pass is queued: what its layers leave behind, or None if that is not all of it."""
        if not self._live:
            return None
        self._live = False
        found, replayed = self._eager, self._replayed
        self._eager, self._replayed = {}, []
        key = () if found else tuple([held.serial for held in replayed])
        whole = replayed[0] if key and len(replayed) == 1 else None
        choices = whole.choices if whole is not None else None
        if choices is None:
            for held in replayed:
                found.update(held.ids)
            choices = self._complete(found, key)
            if whole is not None:
                whole.choices = choices
        if choices is None or choices.rows < tokens:
            self.incomplete += 1
            return None
        return choices

    def _complete(self, found: dict[int, Any], key: tuple[int, ...]) -> Choices | None:
        if len(found) != len(self.layout.layers):
            return None
        ids = [found[index] for index in range(len(found))]
        if any(tensor.ndim != 2 or tensor.shape[1] != self.layout.top_k for tensor in ids):
            return None
        return Choices(ids, key, min(tensor.shape[0] for tensor in ids))

    def drop(self) -> None:
        """The step failed or is over: let go of its tensors."""
        self._live = False
        self._eager, self._replayed = {}, []


@dataclass(slots=True)
class Window:
    """What was counted between two copies, beside the counts themselves."""

    counted_tokens: int = 0
    seen_tokens: int = 0
    tenants: dict[str, int] = field(default_factory=dict)

    def row(self, tenant: str) -> int:
        """Row of a tenant in this window; the last row is shared by those who came late."""
        row = self.tenants.get(tenant)
        if row is None:
            if len(self.tenants) >= TENANTS - 1:
                return TENANTS - 1
            row = self.tenants[tenant] = len(self.tenants)
        return row

    def names(self, used: int) -> list[str]:
        """Names of the first `used` rows."""
        names = list(self.tenants)
        return [names[row] if row < len(names) else OTHER for row in range(used)]


@dataclass(frozen=True, slots=True)
class Counted:
    """One copy: counts[tenant row, layer, expert] and what belongs to it."""

    counts: Any
    window: Window


class Counts(Protocol):
    """Where counts are kept."""

    def add(self, choices: Choices, tokens: int, rows: int | Sequence[tuple[int, int]]) -> bool:
        """Count a step. `rows` is the row of all tokens, or (row, tokens) of each request in the batch's
        order.

        False: it could not be counted now.
        """

    def swap(self) -> None:
        """From here on count into empty counts; what was counted until now is for `collect`."""

    def collect(self) -> Any | None:
        """What was counted before the last `swap` [TENANTS, layers, experts]; None: not ready yet."""


class HostCounts:
    """Counts of an engine on a CPU."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._counts = np.zeros((TENANTS, len(layout.layers), layout.experts), dtype=np.int64)
        self._done: Any = None

    def add(self, choices: Choices, tokens: int, rows: int | Sequence[tuple[int, int]]) -> bool:
        """See `Counts`."""
        experts, top_k = self._layout.experts, self._layout.top_k
        if isinstance(rows, int):
            offset = None
        else:
            row, width = np.array(rows, dtype=np.int64).T
            offset = np.repeat(row * experts, width * top_k)
        for layer, tensor in enumerate(choices.ids):
            ids = np.asarray(tensor)[:tokens].astype(np.int64).reshape(-1)
            valid = (ids >= 0) & (ids < experts)
            if offset is None:
                self._counts[rows, layer] += np.bincount(ids[valid], minlength=experts)
            else:
                found = np.bincount((ids + offset)[valid], minlength=TENANTS * experts)
                self._counts[:, layer] += found.reshape(TENANTS, experts)
        return True

    def swap(self) -> None:
        """See `Counts`."""
        self._done, self._counts = self._counts, np.zeros_like(self._counts)

    def collect(self) -> Any | None:
        """See `Counts`."""
        done, self._done = self._done, None
        return done


class Experts:
    """Counts steps, and hands the counts out as records. `step` methods: engine's thread; `drain`: link's."""

    def __init__(
        self,
        routing: Routing,
        counts: Counts,
        every: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.routing = routing
        self.every = every
        self._counts = counts
        self._now = now
        self._lock = threading.Lock()
        self._window = Window()
        self._taking: Window | None = None
        self._next = now() + INTERVAL
        self._seen = self._seen_before = 0
        """Tokens of all steps so far, and of those that were handed out."""
        self._counting = False
        """A step that is to be counted is under way."""
        self._position = 0
        self._chosen = 0
        self._random = 12345

    def begin(self, tokens: int) -> bool:
        """A step with so many tokens begins; whether it is one to be counted.

        One step of each `every` is chosen at random, so that nothing that repeats hides from the count.
        """
        chosen = self._position == self._chosen
        self._counting = chosen
        self._seen += tokens
        self._position += 1
        if self._position >= self.every:
            self._position = 0
            self._random = (1103515245 * self._random + 12345) & 0x7FFFFFFF
            self._chosen = (self._random >> 8) % self.every
        if chosen:
            self.routing.begin()
        return chosen

    def cancel(self) -> None:
        """The step failed."""
        self._counting = False
        self.routing.drop()

    def finish(self, tokens: int, single: str | None, spans: Callable[[], list[tuple[str, int]]]) -> None:
        """The forward pass of a step to be counted is queued. `single` is the tenant of all tokens; if there
        are several, `spans` tells (tenant, tokens) of each request in the batch's order."""
        choices = self.routing.take(tokens)
        with self._lock:
            self._counting = False
            window = self._window
            if choices is None or window.counted_tokens + tokens > MAX_COUNTED:
                return
            rows: int | list[tuple[int, int]]
            if single is not None:
                rows = window.row(single)
            else:
                told = spans()
                if sum(width for _, width in told) != tokens:
                    self.routing.incomplete += 1
                    return
                rows = [(window.row(tenant), width) for tenant, width in told]
            if self._counts.add(choices, tokens, rows):
                window.counted_tokens += tokens

    def drain(self, at: int, hurry: bool = False) -> tuple[list[ExpertSums], HotExperts | None]:
        """Counts since the last time, if it is time and the device has them ready; `hurry`: it is time."""
        if self._taking is None:
            if (self._now() < self._next and not hurry) or self.routing.capturing is not None:
                return [], None
            with self._lock:
                seen = self._seen
                # A step's tokens are counted in the window that saw them.
                if seen == self._seen_before or self._counting:
                    return [], None
                self._taking, self._window = self._window, Window()
                self._taking.seen_tokens, self._seen_before = seen - self._seen_before, seen
                self._counts.swap()
        counts = self._counts.collect()
        if counts is None:
            return [], None
        window, self._taking = self._taking, None
        self._next = self._now() + INTERVAL
        return records_of(Counted(counts, window), at)


def records_of(counted: Counted, at: int) -> tuple[list[ExpertSums], HotExperts | None]:
    """The sums of all layers in as many records as packets ask for, and who chose each layer's hottest
    expert."""
    window = counted.window
    total = counted.counts.sum(axis=0)
    layers, experts = total.shape
    per_record = max(1, (MAX_PACKET // 2) // (4 * experts))
    sums = [
        ExpertSums(
            first=first,
            counts=total[first : first + per_record].astype("<u4").tobytes(),
            counted_tokens=window.counted_tokens,
            seen_tokens=window.seen_tokens,
        )
        for first in range(0, layers, per_record)
    ]
    if not window.counted_tokens:
        return sums, None
    used = len(window.tenants) + int(counted.counts[TENANTS - 1].any())
    rows = list(range(len(window.tenants)))
    if used > len(rows):
        rows.append(TENANTS - 1)
    hottest = total.argmax(axis=1)
    chosen = counted.counts[rows][:, np.arange(layers), hottest]
    hot = HotExperts(
        at=at,
        tenants=window.names(len(rows)),
        layers=list(range(layers)),
        experts=hottest.tolist(),
        counts=chosen.T.tolist(),
    )
    return sums, hot
