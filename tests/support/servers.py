"""Runs a server of somebody else's as a process: starts it, waits until it is ready, ends it.

In: a command, where its output goes, and the address that answers with 200 once it is ready.
"""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(
    name: str,
    command: Sequence[str],
    log: Path,
    ready: str,
    ready_seconds: float,
    stop_seconds: float = 10,
    cwd: Path | None = None,
    error: type[Exception] = RuntimeError,
) -> Iterator[None]:
    """The process, ready in `ready_seconds`, else `error`; killed if it does not end in `stop_seconds`."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        if not _becomes_ready(process, ready, ready_seconds):
            said = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise error(f"{name} is not ready (exit code {process.poll()}):\n{said}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(stop_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _becomes_ready(process: subprocess.Popen[bytes], url: str, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except OSError:  # not listening yet, or 503 while it starts
            time.sleep(0.05)
    return False
