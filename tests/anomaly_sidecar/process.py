"""`gpuglass anomaly run` as a process: what it serves, and what it says on standard error."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

WAIT = 250.0
"""Seconds: a worker that has to load statsmodels on a machine with much else to do takes long."""


@dataclass
class Running:
    """The process; its methods raise AssertionError when they have waited for `seconds`."""

    process: subprocess.Popen[str]
    port: int
    lines: queue.Queue[str] = field(default_factory=queue.Queue)

    def samples(self, beginning: str) -> dict[str, float]:
        """Values of the lines of its exposition that begin so; nothing while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        found = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(beginning)]
        return {head: float(value) for head, value in found}

    def wait_until(
        self, beginning: str, holds: Callable[[dict[str, float]], bool], seconds: float = WAIT
    ) -> dict[str, float]:
        """Wait until the lines that begin so are as they should be."""
        deadline = time.monotonic() + seconds
        while not holds(found := self.samples(beginning)):
            assert self.process.poll() is None, "it has ended"
            assert time.monotonic() < deadline, f"{beginning}: {found}"
            time.sleep(0.05)
        return found

    def wait(self, beginning: str, value: float, *labels: str, seconds: float = WAIT) -> None:
        """Wait until a line that begins so, and holds these `labels` as it writes them, has the value."""

        def holds(found: dict[str, float]) -> bool:
            return any(own == value and all(label in head for label in labels) for head, own in found.items())

        self.wait_until(beginning, holds, seconds)

    def said(self, words: str, seconds: float = WAIT) -> str:
        """The next line with these words on standard error."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"it said nothing about {words}") from None
            if words in line:
                return line


@contextmanager
def running_sidecar(config: Path, port: int) -> Iterator[Running]:
    """Runs the command until the block ends."""
    command = [sys.executable, "-m", "gpuglass", "anomaly", "run", "--config", str(config)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GPUGLASS_")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    running = Running(process, port)

    def read() -> None:
        for line in process.stderr or ():
            running.lines.put(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            reader.join(10)
            if process.stderr is not None:
                process.stderr.close()
