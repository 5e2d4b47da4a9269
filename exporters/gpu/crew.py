"""The threads that sample GPUs: one for all that answer, one more for each that hangs.

One thread wakes once per tick and samples GPU after GPU; a thread for each GPU would spend more CPU time on
waking up and on handing the interpreter's lock around than on the driver's calls. When a call takes too long,
the GPUs that wait behind it go to a new thread, and the one that hangs keeps the old thread for itself. A
thread inside the driver cannot be ended, only left behind.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from exporters.gpu.worker import Worker

PATIENCE = 0.5
"""Seconds that GPUs wait behind one whose driver call does not return."""


class SamplerThread(threading.Thread):
    """Samples its workers when they are due, until closed."""

    def __init__(
        self, workers: Sequence[Worker], wake: threading.Event, on_change: Callable[[], None]
    ) -> None:
        super().__init__(name="gpu-sampler", daemon=True)
        self.workers = tuple(workers)
        self.closing = False
        self.wake = wake
        self._on_change = on_change

    def run(self) -> None:
        """Sample, wait for the next due time, and so on."""
        while not self.closing:
            workers = self.workers
            sampled = False
            for worker in workers:
                if self.closing or self.workers is not workers:
                    break  # the rest was given to another thread while this one hung
                sampled = worker.sample() or sampled
            if sampled:
                self._on_change()
            due = min((worker.due_at() for worker in self.workers), default=math.inf)
            self.wake.wait(min(60.0, max(0.0, due - time.monotonic())))
            self.wake.clear()


class Crew:
    """All sampling threads of one life of the driver."""

    def __init__(self, workers: Sequence[Worker], on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self.workers = tuple(workers)
        self._threads: list[SamplerThread] = []
        self._lock = threading.Lock()
        self._add(self.workers)

    def _add(self, workers: Sequence[Worker]) -> SamplerThread:
        thread = SamplerThread(workers, threading.Event(), self._on_change)
        self._threads.append(thread)
        return thread

    def start(self) -> None:
        """Start sampling."""
        self._threads[0].start()

    def relieve(self, now: float) -> None:
        """Give the GPUs behind one that hangs to another thread. Called about once per tick."""
        with self._lock:
            for thread in tuple(self._threads):
                stuck = [
                    w for w in thread.workers if w.busy_since is not None and now - w.busy_since > PATIENCE
                ]
                if stuck and len(thread.workers) > 1 and not thread.closing:
                    others = tuple(worker for worker in thread.workers if worker is not stuck[0])
                    thread.workers = (stuck[0],)
                    self._add(others).start()

    def reschedule(self) -> None:
        """Let the threads look again when their workers are due."""
        for thread in self._threads:
            thread.wake.set()

    def close(self) -> None:
        """Ask all threads to end."""
        with self._lock:
            for thread in self._threads:
                thread.closing = True
                thread.wake.set()

    def join(self, until: float) -> bool:
        """Wait for them until a moment of the monotonic clock; False if one is stuck in the driver."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)
