"""Experts: how evenly the tokens of the last minute fell on the experts of each layer.

In flow counts of choices by layer and expert (`ExpertSums`); out flow per layer the imbalance, Jain's index,
the hottest expert and its share, the load of expert-parallel ranks, and totals. The functions over counts are
pure; `ExpertLoad` keeps the sliding window.
"""

from __future__ import annotations

import operator
import sys
from array import array
from collections import deque
from collections.abc import Iterator, Sequence

from gpuglass_vllm.records import Experts, HotExperts

MAX_EXPERTS = 4096
"""Experts per layer."""
MAX_CELLS = 1 << 18
"""Experts of all layers of an engine together: DeepSeek-V3 has 58 × 256 = 14848."""
SLICES = 6
"""The window moves on in steps of a sixth of itself."""
HOT_TENANTS = 3
"""Tenants named per layer."""


class ExpertsRefused(ValueError):
    """Counts that do not fit what their sender said of its layers."""


def decode(counts: bytes, experts: int) -> list[array[int]]:
    """Little-endian uint32, layer after layer; raises `ExpertsRefused`."""
    if not 0 < experts <= MAX_EXPERTS or not counts or len(counts) % (4 * experts):
        raise ExpertsRefused(f"{len(counts)} bytes are no layers of {experts} experts")
    numbers = array("I", counts)
    if sys.byteorder == "big":
        numbers.byteswap()
    return [numbers[at : at + experts] for at in range(0, len(numbers), experts)]


def imbalance(counts: Sequence[int]) -> float:
    """Busiest ÷ mean; NaN without choices."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else float("nan")


def jain(counts: Sequence[int]) -> float:
    """Jain's fairness index (Jain, Chiu and Hawe 1984): (Σx)² ÷ (n·Σx²); NaN without choices."""
    total = sum(counts)
    return total * total / (len(counts) * sum(map(operator.mul, counts, counts))) if total else float("nan")


def rank_loads(counts: Sequence[int], ranks: int, placement: str) -> list[int] | None:
    """Choices by expert-parallel rank; None where the placement is unknown or there is one rank only."""
    experts = len(counts)
    if not 1 < ranks <= experts:
        return None
    if placement == "round_robin":
        return [sum(counts[rank::ranks]) for rank in range(ranks)]
    if placement != "linear":
        return None
    loads = [0] * ranks
    for expert, count in enumerate(counts):
        loads[expert * ranks // experts] += count
    return loads


class Layer:
    """One layer: choices by expert in the window, and since the agent started."""

    __slots__ = ("every", "matrix", "pending_tokens", "placement", "ranks", "slices", "total", "window")

    def __init__(self, experts: int, matrix: bool) -> None:
        self.window = array("Q", bytes(8 * experts))
        """Choices of all slices together, not scaled."""
        self.slices: deque[tuple[int, array[int], list[int]]] = deque()
        """(number of the slice of time, choices, [counted tokens, seen tokens])."""
        self.total = 0.0
        """All choices since the agent started, scaled to all tokens."""
        self.matrix: array[float] | None = array("d", bytes(8 * experts)) if matrix else None
        self.pending_tokens = 0
        """Tokens of steps that were seen while none was counted: the next count speaks for them as well."""
        self.every = 1
        self.ranks = 1
        self.placement = "linear"

    @property
    def counting(self) -> str:
        """Whether totals are exact or scaled from a sample."""
        return "sampled" if self.every > 1 else "exact"

    def add(self, number: int, counts: array[int], counted: int, seen: int) -> None:
        """Choices of the experts in `counted` of `seen` tokens, in slice `number` of time."""
        if not self.slices or self.slices[-1][0] != number:
            self.slices.append((number, array("Q", bytes(8 * len(counts))), [0, 0]))
        _, choices, tokens = self.slices[-1]
        choices[:] = array("Q", map(operator.add, choices, counts))
        self.window = array("Q", map(operator.add, self.window, counts))
        tokens[0] += counted
        tokens[1] += seen
        self.pending_tokens += seen
        if counted > 0:
            scale = max(1.0, self.pending_tokens / counted)
            self.pending_tokens = 0
            self.total += sum(counts) * scale
            if self.matrix is not None:
                self.matrix = array("d", (m + c * scale for m, c in zip(self.matrix, counts, strict=True)))

    def forget(self, before: int) -> None:
        """Drop slices of time with a lower number."""
        while self.slices and self.slices[0][0] < before:
            _, choices, _ = self.slices.popleft()
            self.window = array("Q", map(operator.sub, self.window, choices))

    def tokens(self) -> tuple[int, int]:
        """Tokens counted and seen in the window."""
        return sum(t[0] for _, _, t in self.slices), sum(t[1] for _, _, t in self.slices)


class ExpertLoad:
    """The expert layers of one engine, by the layer's number."""

    __slots__ = ("_matrix", "_slice_ns", "hot", "layers")

    def __init__(self, window_seconds: float, matrix: bool) -> None:
        self._slice_ns = max(1, int(window_seconds * 1e9 / SLICES))
        self._matrix = matrix
        self.layers: dict[int, Layer] = {}
        self.hot: dict[int, tuple[int, list[tuple[str, int]]]] = {}
        """By layer: slice of time, and choices of its hottest expert by tenant."""

    def add(self, now_ns: int, experts: Experts, first: int, counts: bytes, counted: int, seen: int) -> None:
        """Take in one sum; raises `ExpertsRefused`, and then nothing is taken."""
        layers = decode(counts, experts.experts)
        names = experts.layers[first : first + len(layers)]
        if first < 0 or len(names) != len(layers) or len(set(names)) != len(names):
            raise ExpertsRefused(f"layers {first} to {first + len(layers) - 1} were not announced")
        new = sum(name not in self.layers for name in names)
        cells = sum(len(layer.window) for layer in self.layers.values()) + new * experts.experts
        if cells > MAX_CELLS:
            raise ExpertsRefused(f"more than {MAX_CELLS} experts")
        number = now_ns // self._slice_ns
        for name, choices in zip(names, layers, strict=True):
            layer = self.layers.get(name)
            if layer is None or len(layer.window) != experts.experts:
                layer = self.layers[name] = Layer(experts.experts, self._matrix)
            layer.every, layer.ranks, layer.placement = experts.every, experts.ranks, experts.placement
            layer.add(number, choices, counted, seen)

    def add_hot(self, now_ns: int, experts: Experts, hot: HotExperts) -> None:
        """Who chose the hottest experts; raises `ExpertsRefused`."""
        if not len(hot.layers) == len(hot.experts) == len(hot.counts) or any(
            len(counts) != len(hot.tenants) for counts in hot.counts
        ):
            raise ExpertsRefused("lists of different lengths")
        if any(not 0 <= index < len(experts.layers) for index in hot.layers):
            raise ExpertsRefused("a layer was not announced")
        number = now_ns // self._slice_ns
        for index, counts in zip(hot.layers, hot.counts, strict=True):
            name = experts.layers[index]
            if name in self.layers:
                self.hot[name] = (number, list(zip(hot.tenants, counts, strict=True)))

    def move_on(self, now_ns: int) -> None:
        """Forget what lies before the window."""
        before = now_ns // self._slice_ns - SLICES + 1
        for layer in self.layers.values():
            layer.forget(before)
        for name in [name for name, (number, _) in self.hot.items() if number < before]:
            del self.hot[name]

    def in_window(self) -> Iterator[tuple[int, Layer]]:
        """Layers with choices in the window, by number."""
        for name in sorted(self.layers):
            if self.layers[name].slices and any(self.layers[name].window):
                yield name, self.layers[name]

    def counted_share(self) -> float:
        """Share of the window's tokens that was counted; NaN without any."""
        counted = seen = 0
        for layer in self.layers.values():
            of_layer = layer.tokens()
            counted, seen = counted + of_layer[0], seen + of_layer[1]
        return min(1.0, counted / seen) if seen else float("nan")

    def loads_of_ranks(self) -> list[int] | None:
        """Choices of all layers by expert-parallel rank; None if one layer's cannot be told."""
        sums: list[int] | None = None
        for _, layer in self.in_window():
            loads = rank_loads(layer.window, layer.ranks, layer.placement)
            if loads is None or (sums is not None and len(loads) != len(sums)):
                return None
            sums = loads if sums is None else list(map(operator.add, sums, loads))
        return sums
