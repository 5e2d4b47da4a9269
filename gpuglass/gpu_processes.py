"""Which processes the driver lists on which GPU: what the GPU exporter knows and other rooms ask.

The GPU exporter notes each list that it reads; the receiver of engines' records asks before it believes that
a process uses the GPU that it names. Both speak of pids as the driver translates them for this process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

MAX_AGE = 600.0
"""Seconds after which a list says nothing any more: twice the longest interval of the slow tier."""


class GpuProcesses:
    """The latest lists by uuid of GPU or MIG instance. Safe for several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_age: float = MAX_AGE) -> None:
        self._clock = clock
        self._max_age = max_age
        self._lock = threading.Lock()
        self._listed: dict[str, tuple[float, frozenset[int]]] = {}

    def note(self, uuid: str, pids: Iterable[int]) -> None:
        """The driver's list for one device, as of now."""
        listed = (self._clock(), frozenset(pids))
        with self._lock:
            self._listed[uuid] = listed

    def on(self, uuid: str) -> frozenset[int] | None:
        """Pids on a device; None if there is no recent list of it."""
        with self._lock:
            listed = self._listed.get(uuid)
        return None if listed is None or self._is_old(listed[0]) else listed[1]

    @property
    def knows_any(self) -> bool:
        """Whether there is a recent list of any device."""
        with self._lock:
            return any(not self._is_old(at) for at, _ in self._listed.values())

    def _is_old(self, at: float) -> bool:
        return self._clock() - at > self._max_age
