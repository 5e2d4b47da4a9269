"""What the receiver counts about itself. Written by its thread and read by the publisher, both under the
sink's lock."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from exporters.vllm.sink import Refusal
from gpuglass.families import probe as families


@dataclass(slots=True)
class Counts:
    """Totals since the agent started; every key is of a closed set."""

    records: Counter[str] = field(default_factory=Counter)
    """Taken in, by type."""
    refused: Counter[Refusal] = field(default_factory=Counter)
    packets: int = 0
    received_bytes: int = 0
    repeated: int = 0
    """Packets that were taken in before and are acknowledged again."""
    pauses: int = 0
    """Times that a sender was made to wait because it was over its rate."""
    unsent_acks: int = 0
    connections: int = 0
    lag: list[int] = field(default_factory=lambda: [0] * (len(families.LAG.buckets) + 1))
    lag_seconds: float = 0.0

    def observe_lag(self, seconds: float) -> None:
        """How old a state was when it came."""
        seconds = max(0.0, seconds)
        self.lag[bisect_left(families.LAG.buckets, seconds)] += 1
        self.lag_seconds += seconds


class Quiet:
    """Lets a message through once per key and hour, of at most `size` keys: the log of a machine is not the
    place where a hostile sender writes."""

    def __init__(self, size: int = 256, seconds: float = 3600.0) -> None:
        self._size = size
        self._seconds = seconds
        self._said: OrderedDict[object, float] = OrderedDict()

    def may(self, key: object, now: float) -> bool:
        """Whether to say it now."""
        last = self._said.get(key)
        if last is not None and now - last < self._seconds:
            return False
        if last is None and len(self._said) >= self._size:
            oldest, at = next(iter(self._said.items()))
            if now - at < self._seconds:
                return False
            del self._said[oldest]
        self._said[key] = now
        self._said.move_to_end(key)
        return True
