"""Processes for fits that take longer than a cycle may.

A job is the name of a function of `State` that returns `State`; arguments and results cross the pipe as npz
(`anomaly_sidecar.snapshot`), never as pickles. Each process has one thread here that feeds it. A job that
takes too long, or whose process dies, ends as an error, and the process is started anew for the next one.
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
from typing import IO

from anomaly_sidecar import snapshot
from anomaly_sidecar.interface import JobResult, State, StateError

PREFIX = "anomaly_sidecar."
MAX_QUEUED = 1000
MAX_MESSAGE = 256 << 20
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

    def close(self) -> None:
        """Nothing to end."""


class WorkerPool:
    """`count` processes at low priority. Close it to end them."""

    def __init__(self, count: int, timeout: float = 600.0) -> None:
        self._timeout = timeout
        self._queue: queue.Queue[tuple[str, str, State] | None] = queue.Queue(MAX_QUEUED)
        self._lock = threading.Lock()
        self._pending: set[str] = set()
        self._results: dict[str, JobResult] = {}
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._closed = False
        self.jobs = 0
        self.failed = 0
        self._threads = [
            threading.Thread(target=self._feed, name=f"worker-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: str, job: str, arguments: State) -> bool:
        """See `Workers`."""
        with self._lock:
            if self._closed or key in self._pending or len(self._pending) >= MAX_QUEUED:
                return False
            self._pending.add(key)
        self._queue.put((key, job, arguments))
        return True

    def take(self, key: str) -> JobResult | None:
        """See `Workers`."""
        with self._lock:
            return self._results.pop(key, None)

    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Processes that run now."""
        with self._lock:
            return list(self._processes)

    @property
    def pending(self) -> int:
        """Jobs that wait or run."""
        return len(self._pending)

    def close(self) -> None:
        """End the processes; what they work on is lost."""
        with self._lock:
            self._closed = True
            processes = list(self._processes)
        for process in processes:
            process.kill()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(5)

    def _feed(self) -> None:
        process: subprocess.Popen[bytes] | None = None
        while (item := self._queue.get()) is not None:
            key, job, arguments = item
            if self._closed:
                continue
            if process is None or process.poll() is not None:
                process = self._start()
            result, healthy = self._exchange(process, job, arguments)
            if not healthy:
                self._end(process)
                process = None
            with self._lock:
                self._pending.discard(key)
                self._results[key] = result
                self.jobs += 1
                self.failed += result.state is None
        if process is not None:
            self._end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        with self._lock:
            self._processes.add(process)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        with self._lock:
            self._processes.discard(process)

    def _exchange(
        self, process: subprocess.Popen[bytes], job: str, arguments: State
    ) -> tuple[JobResult, bool]:
        """Result, and whether the process can go on."""
        if process.stdin is None or process.stdout is None:
            return JobResult(None, "the worker has no pipes"), False
        deadline = time.monotonic() + self._timeout
        try:
            message = State(arguments.arrays, {"job": job, "meta": arguments.meta})
            _send(process.stdin, snapshot.to_bytes(message))
            answer = snapshot.from_bytes(_receive(process.stdout, deadline))
        except TimeoutError:
            return JobResult(None, f"took longer than {self._timeout:g} s"), False
        except (OSError, EOFError, ValueError) as error:
            return JobResult(None, f"the worker died: {' '.join(str(error).split())[:120]}"), False
        error_text = str(answer.meta.get("error", ""))
        if error_text:
            return JobResult(None, error_text), True
        return JobResult(State(answer.arrays, answer.meta["meta"])), True


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
    os.nice(10)
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
