"""What ran on the device in a step: a profiler around at most one step in some seconds. Off by default.

The engine's thread waits for the device, starts the profiler, waits again at the step's end and stops it,
which costs that step some milliseconds; the link's thread reads what was seen. What this takes is kept apart
from the probe's own budget and has one of its own: a profiler that takes more is used less often, and one
that takes far more not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from gpuglass_vllm import records

BUDGET = 0.001
"""Share of the time that profiling may take from the engine's thread."""
TOO_LONG_NS = 250_000_000
"""A profiled step that takes this much longer by the profiler alone ends profiling."""
SHOWN = 12
"""Kernels of a step that are told one by one."""


SWITCH_NS = 2000
"""A pause up to this between two kernels is the device's own: it goes on to the next node of a graph."""


class Kernel(NamedTuple):
    """One kernel, copy or fill. Times on the host's monotonic clock, nanoseconds."""

    name: str
    stream: int
    begin_ns: int
    duration_ns: int


class Profiler(Protocol):
    """What is used of a profiler."""

    def start(self) -> None:
        """Begin to record what the device does."""

    def stop(self) -> Callable[[], list[Kernel]]:
        """Wait for the device and end; gives what reads the result, on another thread."""


class TooSlow(Exception):
    """Profiling takes more than it may; the text says how much."""


class KernelSampler:
    """Decides which steps are profiled. All but `take`, which is the link's thread's, on the engine's."""

    def __init__(
        self, profiler: Profiler, every_s: float, now: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._profiler = profiler
        self._every_ns = int(every_s * 1e9)
        self._now = now
        self._next = now() + self._every_ns
        self._running = False
        self._began_at = 0
        self._took_ns = 0
        self._done: tuple[int, Callable[[], list[Kernel]]] | None = None
        self.spent_ns = 0
        """Taken from the engine's thread so far."""

    def warm_up(self) -> None:
        """The first start takes seconds: do it before the engine serves."""
        self._profiler.start()
        self._profiler.stop()()
        self._next = self._now() + self._every_ns

    def due(self) -> bool:
        """Whether the next step is to be profiled."""
        return self._done is None and self._now() >= self._next

    def begin(self) -> None:
        """The step begins."""
        start = self._now()
        self._running = True
        self._profiler.start()
        self._took_ns = self._now() - start

    def end(self, step: int) -> None:
        """All of the step is queued. Raises `TooSlow`."""
        if not self._running:
            return
        start = self._now()
        self._running = False
        read = self._profiler.stop()
        took = self._took_ns + self._now() - start
        self.spent_ns += took
        self._done = (step, read)
        # Rather less often than more than the budget.
        self._next = start + max(self._every_ns, int(took / BUDGET))
        if took > TOO_LONG_NS:
            raise TooSlow(f"a profiled step took {took / 1e6:.0f} ms longer")

    def cancel(self) -> None:
        """The step failed."""
        if self._running:
            self._running = False
            self._profiler.stop()
            self._next = self._now() + self._every_ns

    def take(self) -> records.StepKernels | None:
        """What ran in the step that was profiled last, once."""
        done = self._done
        if done is None:
            return None
        step, read = done
        kernels = read()
        self._done = None
        return summary(step, kernels, self._now()) if kernels else None


def device_time(kernels: Sequence[Kernel]) -> list[float]:
    """What each kernel had of the device's time, in nanoseconds and in the order of `kernels`.

    Where several run at once they share it, and the device's own pause before a kernel is that kernel's. So
    the sum is the time in which the device was at work, as the step's own time is.
    """
    found = [0.0] * len(kernels)
    points = sorted(
        point
        for index, kernel in enumerate(kernels)
        for point in ((kernel.begin_ns, 1, index), (kernel.begin_ns + kernel.duration_ns, 0, index))
    )
    running: set[int] = set()
    before = points[0][0] if points else 0
    for at, begins, index in points:
        if running:
            for other in running:
                found[other] += (at - before) / len(running)
        elif at - before <= SWITCH_NS:
            found[index] += at - before
        before = at
        if begins:
            running.add(index)
        else:
            running.discard(index)
    return found


def summary(step: int, kernels: Sequence[Kernel], at: int, error_ns: int = 0) -> records.StepKernels:
    """The longest kernels of a step, and the others together."""
    had = device_time(kernels)
    order = sorted(range(len(kernels)), key=lambda index: -kernels[index].duration_ns)
    shown = [kernels[index] for index in order[:SHOWN]]
    return records.StepKernels(
        at=at,
        step=step,
        names=[kernel.name[:200] for kernel in shown],
        streams=[max(0, kernel.stream) for kernel in shown],
        begin_ns=[kernel.begin_ns for kernel in shown],
        duration_ns=[kernel.duration_ns for kernel in shown],
        device_ns=[round(had[index]) for index in order[:SHOWN]],
        error_ns=error_ns,
        other_ns=round(sum(had[index] for index in order[SHOWN:])),
        others=max(0, len(kernels) - SHOWN),
        begun_ns=min(kernel.begin_ns for kernel in kernels),
        ended_ns=max(kernel.begin_ns + kernel.duration_ns for kernel in kernels),
    )


class TorchProfiler:
    """torch.profiler with CUDA activity only."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._profile: Any = None

    def start(self) -> None:
        """Begin to record."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        # What is still queued belongs to the step before.
        torch.cuda.synchronize(self._device)
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.start()

    def stop(self) -> Callable[[], list[Kernel]]:
        """Wait for the device and end."""
        import torch

        profile, self._profile = self._profile, None
        torch.cuda.synchronize(self._device)
        profile.stop()
        # Kineto gives Unix time; both clocks are read side by side.
        offset = time.monotonic_ns() - time.time_ns()

        def read() -> list[Kernel]:
            found = []
            for event in profile.profiler.kineto_results.events():
                if "CUDA" in str(event.device_type()) and event.duration_ns() > 0:
                    begin = event.start_ns() + offset
                    stream = event.device_resource_id()
                    found.append(Kernel(event.name(), stream, begin, event.duration_ns()))
            return found

        return read
