"""What `/proc` says about one process: who it is, whether it still lives, and whose pids we are looking at.

In flows a pid and the root of a procfs; out flows a `Process`, or None when there is nothing to attribute to.
A pid alone names nobody, the kernel reuses it: `(pid, start_time)` is the identity that everything else keys
by. The root is a constructor argument, so that a test or a mounted host `/proc` takes its place.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from pathlib import Path

NAME_LIMIT = 64
"""Characters of a process name. The kernel gives 15 bytes to a user task and up to 64 to a worker thread."""

INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""Inode number of the machine's first pid namespace (the kernel's PROC_PID_INIT_INO in linux/proc_ns.h)."""

_STAT_LIMIT = 4096
_NAMESPACE_LINK_PREFIX = "pid:["


@dataclass(frozen=True, slots=True)
class Process:
    """One task group, as `/proc/PID/stat` tells it (proc_pid_stat(5))."""

    pid: int
    start_time: int
    """Clock ticks since boot (field 22)."""
    name: str
    """The command name; what cannot be printed is U+FFFD, at most `NAME_LIMIT` characters."""
    state: str
    """One letter: R, S, D, T, t, I, Z, X."""
    parent: int
    threads: int

    @property
    def gone(self) -> bool:
        """Whether the process has ended and only waits to be reaped.

        A main thread that has ended before the others also reads as Z. Its process still holds its memory, on
        the GPU too, so it counts as alive while other threads remain.
        """
        return self.state in "Xx" or (self.state == "Z" and self.threads <= 1)


class PidView(enum.Enum):
    """Whose pids this process sees."""

    HOST = "host"
    PRIVATE = "private"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class PidNamespace:
    """Whether host pids mean anything here, and in one line why."""

    view: PidView
    reason: str

    @property
    def is_host(self) -> bool:
        return self.view is PidView.HOST


def clean_name(raw: bytes) -> str:
    """A command name fit for a label: what is not UTF-8 or cannot be printed becomes U+FFFD."""
    text = raw.decode("utf-8", errors="replace")[:NAME_LIMIT]
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def parse_stat(raw: bytes) -> Process | None:
    """The process in one `/proc/PID/stat` line, or None for a line that is not one.

    The name may hold anything, parentheses, blanks and newlines included. No field after it can hold a
    parenthesis, so it ends at the last one.
    """
    opening, closing = raw.find(b"("), raw.rfind(b")")
    if opening < 0 or closing < opening:
        return None
    rest = raw[closing + 1 :].split()
    if len(rest) < 20 or len(rest[0]) != 1 or not rest[0].isalpha():
        return None
    try:
        return Process(
            pid=int(raw[:opening]),
            start_time=int(rest[19]),
            name=clean_name(raw[opening + 1 : closing]),
            state=rest[0].decode("ascii"),
            parent=int(rest[1]),
            threads=int(rest[17]),
        )
    except ValueError:
        return None


def parse_namespace_pids(status: str) -> tuple[int, ...]:
    """The pids in the NSpid line of `/proc/PID/status`, outermost namespace first; empty without one."""
    for line in status.split("\n"):
        if line.startswith("NSpid:"):
            values = line.removeprefix("NSpid:").split()
            return tuple(int(value) for value in values if value.isascii() and value.isdigit())
    return ()


class ProcFs:
    """Reader of one procfs. Every read is bounded; what is gone or forbidden is None, never an exception."""

    def __init__(self, proc: Path | str = "/proc") -> None:
        self.root = Path(proc)
        self._prefix = str(self.root)

    def process(self, pid: int) -> Process | None:
        """The process behind a pid, from one read of `stat`; None when there is none to be seen."""
        if pid <= 0:
            return None
        raw = self.read(pid, "stat", _STAT_LIMIT)
        found = None if raw is None else parse_stat(raw)
        return found if found is not None and found.pid == pid else None

    def read(self, pid: int | str, name: str, limit: int) -> bytes | None:
        """At most `limit` bytes of `<root>/<pid>/<name>`, or None when it cannot be read."""
        try:
            descriptor = os.open(f"{self._prefix}/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            chunks: list[bytes] = []
            left = limit
            # procfs hands out at most a page per read; only an empty read is the end.
            while left > 0 and (chunk := os.read(descriptor, min(left, 65536))):
                chunks.append(chunk)
                left -= len(chunk)
            return b"".join(chunks)
        except OSError:  # ESRCH: the process ended between open and read
            return None
        finally:
            os.close(descriptor)

    def pid_namespace(self) -> PidNamespace:
        """Whether pids here are the host's, which is what the driver and the kernel's tracers speak of.

        It is our own namespace that counts: the NVIDIA driver translates pids to the caller's, so that a
        host's `/proc` mounted into a container with its own pids shows the processes but under numbers that
        never match.
        """
        inode = self._own_namespace()
        status = self.read("self", "status", 65536)
        pids = () if status is None else parse_namespace_pids(status.decode("utf-8", errors="replace"))
        if len(pids) > 1:
            return PidNamespace(
                PidView.PRIVATE,
                f"{self.root} belongs to an outer pid namespace, {len(pids) - 1} level(s) above this "
                f"process: "
                "run with hostPID: true (Kubernetes) or --pid=host (docker, podman)",
            )
        if inode is None:
            return PidNamespace(PidView.UNKNOWN, f"{self.root}/self/ns/pid cannot be read: is it a procfs?")
        if inode != INITIAL_PID_NAMESPACE:
            return PidNamespace(
                PidView.PRIVATE,
                f"pid namespace {inode} is not the machine's first ({INITIAL_PID_NAMESPACE}): "
                "run with hostPID: true (Kubernetes) or --pid=host (docker, podman)",
            )
        if self.read(1, "stat", _STAT_LIMIT) is None:
            return PidNamespace(
                PidView.UNKNOWN,
                f"host pid namespace, but {self.root}/1/stat cannot be read: "
                "procfs mounted with hidepid shows only own processes",
            )
        return PidNamespace(PidView.HOST, f"pid namespace {inode} is the machine's first")

    def _own_namespace(self) -> int | None:
        try:
            link = os.readlink(f"{self._prefix}/self/ns/pid")
        except OSError:
            return None
        number = link.removeprefix(_NAMESPACE_LINK_PREFIX).removesuffix("]")
        if not link.startswith(_NAMESPACE_LINK_PREFIX) or not (number.isascii() and number.isdigit()):
            return None
        return int(number)
