"""Finds processes that a test session left behind.

In: /proc. Out: the living processes that descend from this one or carry its mark in their environment: a
daemon that was re-parented is found as well.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from contextlib import suppress
from pathlib import Path

MARK = "GPUGLASS_TEST_SESSION"


def mark_session() -> str:
    """Marks what this process starts from now on; the mark is to be given to `survivors`."""
    os.environ[MARK] = uuid.uuid4().hex
    return os.environ[MARK]


def survivors(mark: str, grace_seconds: float = 3.0, proc: Path = Path("/proc")) -> dict[int, str]:
    """The command lines, by pid, of what still runs after `grace_seconds`."""
    deadline = time.monotonic() + grace_seconds
    while (left := _running(mark, proc)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def kill(pids: dict[int, str]) -> None:
    """Kills what `survivors` found."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _running(mark: str, proc: Path) -> dict[int, str]:
    parents: dict[int, int] = {}
    found: dict[int, str] = {}
    marked: set[int] = set()
    for folder in proc.glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # ended meanwhile
            continue
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:  # another user's
            environment = b""
        # multiprocessing's own helper ends with the interpreter; a zombie holds nothing any more.
        if state in "ZX" or "multiprocessing.resource_tracker" in command:
            continue
        pid = int(folder.name)
        parents[pid], found[pid] = int(parent), command
        if f"{MARK}={mark}".encode() in environment.split(b"\0"):
            marked.add(pid)

    def descends(pid: int) -> bool:
        while pid := parents.get(pid, 0):
            if pid == os.getpid():
                return True
        return False

    return {
        pid: command
        for pid, command in found.items()
        if pid != os.getpid() and (pid in marked or descends(pid))
    }
