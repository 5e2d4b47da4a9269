"""Which thread of the host a worker means: it knows its threads by the numbers of its own pid namespace.

In flow the host's pid of a process and a thread's number as the process sees it; out flows the host's
number. Read from `NSpid` in `/proc/PID/task/TID/status`, which everybody may read, and remembered.
"""

from __future__ import annotations

import os
from collections import OrderedDict

from gpuglass.procfs import ProcFs, parse_namespace_pids

MAX_THREADS = 4096
"""Threads of a process that are looked through, and answers that are remembered."""


class HostThreads:
    """Translates thread numbers. For one thread."""

    def __init__(self, procfs: ProcFs) -> None:
        self._procfs = procfs
        self._known: OrderedDict[tuple[int, int], int] = OrderedDict()

    def find(self, pid: int, tid: int) -> int:
        """The host's number of a thread; 0 if it cannot be told."""
        if pid <= 0:
            return 0
        key = (pid, tid)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._look(pid, tid)
            if len(self._known) > MAX_THREADS:
                self._known.popitem(last=False)
        return found

    def forget(self, pid: int) -> None:
        """A process has gone, and its numbers may come again."""
        for key in [key for key in self._known if key[0] == pid]:
            del self._known[key]

    def _look(self, pid: int, tid: int) -> int:
        own = self._numbers(f"{pid}")
        if len(own) == 1:
            return tid  # no namespace of its own
        if own and own[-1] == tid:
            return pid  # the main thread, which is nearly always the one
        try:
            threads = os.listdir(f"{self._procfs.root}/{pid}/task")[:MAX_THREADS]
        except OSError:
            return 0
        return next((int(t) for t in threads if self._numbers(f"{pid}/task/{t}")[-1:] == (tid,)), 0)

    def _numbers(self, path: str) -> tuple[int, ...]:
        status = self._procfs.read(path, "status", 65536)
        return () if status is None else parse_namespace_pids(status.decode("utf-8", errors="replace"))
