"""What tracing costs, and when that is too much.

The kernel's way to a probe and back cannot be seen by the program that runs there, so an empty pair of probes
is measured once, at the start, on a function of libc that nobody calls. A process's cost is its calls times
that, plus the time within the programs, which they measure themselves."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ebpf import elf, kernel

_FUNCTION = "a64l"
"""Of libc: converts a number as SVR4 encoded passwords' ages; current programs have no use for it."""
_CALLS = 200


def measure_pair(program_fd: int, multi: bool) -> float | None:
    """Seconds that an empty pair of probes costs here; None if it cannot be told."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            match = re.search(rb" (/\S+/libc[.-]\S+)$", maps.read(), re.MULTILINE)
        if match is None:
            return None
        path = os.fsdecode(match[1])
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            offset = elf.read(fd, (_FUNCTION.encode(),)).functions[_FUNCTION]
        finally:
            os.close(fd)
        call = getattr(ctypes.CDLL(None), _FUNCTION)
        call.argtypes, call.restype = [ctypes.c_char_p], ctypes.c_long
        bare = _time(call)
        if multi:
            probes = [kernel.attach_uprobes(program_fd, path, [offset], both) for both in (True, False)]
        else:
            kind = kernel.uprobe_type()
            probes = [kernel.attach_uprobe(program_fd, path, offset, both, kind) for both in (True, False)]
        try:
            probed = _time(call)
        finally:
            kernel.close_together(probes)
    except (OSError, elf.ElfError, KeyError, AttributeError):
        return None
    return max(probed - bare, 0.0)


def _time(call: Callable[[bytes], int]) -> float:
    """Seconds per call: the best of five, because others use the machine, too."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(_CALLS // 5):
            call(b"1")
        best = min(best, (time.perf_counter() - start) / (_CALLS // 5))
    return best


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds on traced threads since tracing began, of one process."""

    calls: int
    programs: float


@dataclass(slots=True)
class Budget:
    """Watches the cost over a window and says when it is too much.

    `limit` is the share of a core per traced process, 0: no limit. `pair` is the cost of an empty pair in
    seconds."""

    limit: float
    pair: float
    window: float = 30.0
    _past: deque[tuple[float, Mapping[int, Spent], float]] = field(default_factory=deque)

    def cost(self, now: float, spent: Mapping[int, Spent], own: float) -> float:
        """Share of a core per traced process over the window; `own` is the collector's CPU time so far."""
        self._past.append((now, spent, own))
        while len(self._past) > 2 and now - self._past[1][0] >= self.window:
            self._past.popleft()
        then, before, own_before = self._past[0]
        # A full window is waited for: a model's load is a burst that a minute of service makes up for.
        elapsed = max(now - then, self.window)
        seconds, active = own - own_before, 0
        for id, after in spent.items():
            first = before.get(id, Spent(0, 0.0))
            if after.calls > first.calls:
                active += 1
                seconds += (after.calls - first.calls) * self.pair + after.programs - first.programs
        return seconds / elapsed / max(active, 1)

    def exceeded(self, cost: float) -> bool:
        """Whether that is too much."""
        return self.limit > 0 and cost > self.limit
