"""Processes for fits that take longer than a cycle may.

A job is the name of a function of `State` that returns `State`; arguments and results cross the pipe as npz
(`anomaly_sidecar.snapshot`), never as pickles. Each process has one thread here that feeds it. A process that
dies is told and started anew, after a while that grows as long as they die; its job is tried again, and ends
as an error after `MAX_TRIES` or when it takes too long.
"""

from __future__ import annotations

import importlib
import os
import queue
import selectors
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import IO

from anomaly_sidecar import snapshot
from anomaly_sidecar.interface import JobResult, State, StateError
from gpuglass.logs import LOG

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""For numpy: more threads take twice the CPU time for matrices as small as these."""
NICE = 5
"""A third of the CPU that others get who want it: on a busy machine a fit is still done within its hour."""
PREFIX = "anomaly_sidecar."
MAX_QUEUED = 1000
MAX_MESSAGE = 256 << 20
MAX_TRIES = 3
"""Processes that a job may outlive."""
FIRST_BACKOFF = 0.5
"""Seconds before a process is started in the place of one that died; doubled for each that follows."""
MAX_BACKOFF = 60.0
_LENGTH = struct.Struct("<Q")


def function_of(job: str) -> Callable[[State], State]:
    """The function that a job names. Raises `StateError` unless it is one of this package."""
    module, _, name = job.partition(":")
    if not job.startswith(PREFIX) or not name.isidentifier() or name.startswith("_"):
        raise StateError(f"{job} is no job")
    try:
        found: Callable[[State], State] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise StateError(f"{job} is no job") from None
    return found


def run_job(job: str, arguments: State) -> JobResult:
    """Run a job here; whatever it raises is the result's error."""
    try:
        return JobResult(function_of(job)(arguments))
    except Exception as error:
        return JobResult(None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


class InlineWorkers:
    """Runs each job at once in this process: for backtests and tests, and where no process may be started."""

    def __init__(self) -> None:
        self._results: dict[str, JobResult] = {}

    def submit(self, key: str, job: str, arguments: State) -> bool:
        """See `Workers`."""
        result = run_job(job, snapshot.from_bytes(snapshot.to_bytes(arguments)))
        if result.state is not None:
            result = JobResult(snapshot.from_bytes(snapshot.to_bytes(result.state)))
        self._results[key] = result
        return True

    def take(self, key: str) -> JobResult | None:
        """See `Workers`."""
        return self._results.pop(key, None)

    def wait(self, key: str, seconds: float) -> tuple[JobResult | None, float]:
        """See `Workers`."""
        return self.take(key), 0.0

    def drop(self, key: str) -> None:
        """See `Workers`."""
        self._results.pop(key, None)

    def close(self) -> None:
        """Nothing to end."""


class WorkerPool:
    """`count` processes at low priority. Close it to end them."""

    def __init__(self, count: int, timeout: float = 600.0) -> None:
        self._timeout = timeout
        self._queue: queue.Queue[tuple[str, str, State] | None] = queue.Queue(MAX_QUEUED + count)
        self._changed = threading.Condition()
        self._pending: set[str] = set()
        self._dropped: set[str] = set()
        """Pending ones whose results nobody wants."""
        self._results: dict[str, JobResult] = {}
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._closed = threading.Event()
        self.jobs = 0
        self.failed = 0
        self.restarts = 0
        self._threads = [
            threading.Thread(target=self._feed, name=f"worker-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: str, job: str, arguments: State) -> bool:
        """See `Workers`."""
        with self._changed:
            if self._closed.is_set() or key in self._pending or len(self._pending) >= MAX_QUEUED:
                return False
            self._pending.add(key)
        self._queue.put((key, job, arguments))
        return True

    def take(self, key: str) -> JobResult | None:
        """See `Workers`."""
        with self._changed:
            return self._results.pop(key, None)

    def wait(self, key: str, seconds: float) -> tuple[JobResult | None, float]:
        """See `Workers`."""
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: key in self._results or self._closed.is_set(), seconds)
            return self._results.pop(key, None), time.monotonic() - started

    def drop(self, key: str) -> None:
        """See `Workers`."""
        with self._changed:
            self._results.pop(key, None)
            if key in self._pending:
                self._dropped.add(key)

    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Processes that run now."""
        with self._changed:
            return list(self._processes)

    @property
    def pending(self) -> int:
        """Jobs that wait or run."""
        return len(self._pending)

    def close(self) -> None:
        """End the processes; what they work on is lost."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
            processes = list(self._processes)
        for process in processes:
            process.kill()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(5)

    def _feed(self) -> None:
        """One process's thread: its jobs, one after the other."""
        process: subprocess.Popen[bytes] | None = None
        deaths = 0  # since the latest answer
        while (item := self._queue.get()) is not None:
            key, job, arguments = item
            result = JobResult(None, "not wanted any more")
            for attempt in range(1, MAX_TRIES + 1):
                if self._closed.is_set() or key in self._dropped:
                    break
                if process is None:
                    if deaths and self._closed.wait(min(MAX_BACKOFF, FIRST_BACKOFF * 2.0 ** (deaths - 1))):
                        continue
                    process = self._start()
                result, outcome = self._exchange(process, job, arguments)
                if outcome is not _Outcome.ANSWERED:
                    self._end(process)
                    process = None
                if outcome is not _Outcome.DIED:
                    deaths = 0
                    break
                deaths = min(deaths + 1, 16)
                if not self._closed.is_set():
                    self.restarts += 1
                    LOG.warning("%s: %s; attempt %d of %d", key, result.error, attempt, MAX_TRIES)
            self._settle(key, result)
        if process is not None:
            self._end(process)

    def _settle(self, key: str, result: JobResult) -> None:
        with self._changed:
            self._pending.discard(key)
            if key in self._dropped:
                self._dropped.discard(key)
                return
            self._results[key] = result
            self.jobs += 1
            self.failed += result.state is None
            self._changed.notify_all()
        if result.state is None and not self._closed.is_set():
            LOG.warning("%s: %s", key, result.error)

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=os.environ | ONE_THREAD,
        )
        with self._changed:
            self._processes.add(process)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        with self._changed:
            self._processes.discard(process)

    def _exchange(
        self, process: subprocess.Popen[bytes], job: str, arguments: State
    ) -> tuple[JobResult, _Outcome]:
        """Result, and what became of the process."""
        if process.stdin is None or process.stdout is None:
            return JobResult(None, "the worker has no pipes"), _Outcome.DIED
        deadline = time.monotonic() + self._timeout
        try:
            message = State(arguments.arrays, {"job": job, "meta": arguments.meta})
            _send(process.stdin, snapshot.to_bytes(message))
            answer = snapshot.from_bytes(_receive(process.stdout, deadline))
        except TimeoutError:
            return JobResult(None, f"took longer than {self._timeout:g} s"), _Outcome.TOO_LONG
        except (OSError, EOFError, ValueError) as error:
            text = " ".join(str(error).split())[:120]
            return JobResult(None, f"the worker died: {text}"), _Outcome.DIED
        error_text = str(answer.meta.get("error", ""))
        if error_text:
            return JobResult(None, error_text), _Outcome.ANSWERED
        return JobResult(State(answer.arrays, answer.meta["meta"])), _Outcome.ANSWERED


class _Outcome(Enum):
    """What became of a process that was given a job."""

    ANSWERED = 0
    DIED = 1
    TOO_LONG = 2


def _send(pipe: IO[bytes], data: bytes) -> None:
    left = memoryview(_LENGTH.pack(len(data)) + data)
    while left:
        left = left[pipe.write(left) :]


def _receive(pipe: IO[bytes], deadline: float | None) -> bytes:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size, selector, deadline))
        if length > MAX_MESSAGE:
            raise ValueError("the message is too long")
        return _exactly(pipe, length, selector, deadline)


def _exactly(pipe: IO[bytes], size: int, selector: selectors.BaseSelector, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not selector.select(left):
            raise TimeoutError
        part = pipe.read(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError("the pipe is closed")
        data += part
    return bytes(data)


def echo(arguments: State) -> State:
    """A job that gives back what it got: says whether workers work."""
    return arguments


def rest(arguments: State) -> State:
    """A job that takes `seconds`."""
    time.sleep(float(arguments.meta["seconds"]))
    return arguments


def main() -> None:
    """The worker's process: jobs in on standard input, results out on standard output, until it is closed."""
    os.nice(NICE)
    # What a library prints must not get between the messages.
    source, sink = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)
    while True:
        try:
            message = snapshot.from_bytes(_receive(source, None))
        except EOFError:
            return
        result = run_job(message.meta["job"], State(message.arrays, message.meta["meta"]))
        if result.state is None:
            answer = State(meta={"error": result.error or "failed"})
        else:
            answer = State(result.state.arrays, {"meta": result.state.meta})
        _send(sink, snapshot.to_bytes(answer))


if __name__ == "__main__":
    main()
