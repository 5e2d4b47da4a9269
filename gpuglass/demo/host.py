"""The simulated node's files: a /proc tree and the kubelet's container logs, below a temporary folder.

In flow the processes of some frames; out come `PID/stat` and `PID/cgroup` for each, and a log file name for
each container, which is all that the agent reads to find a process's name and pod.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path

from gpuglass.demo.simulator import Process, Program
from gpuglass.procfs import INITIAL_PID_NAMESPACE

TICKS = 100
"""Clock ticks a second in /proc/PID/stat."""

BOOTED = 100_000
"""Ticks since boot at the simulation's start."""


class Host:
    """Keeps the files in step with the simulation."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.container_logs = folder / "containers"
        self.pod_logs = folder / "pods"
        self._known: set[int] = set()
        for path in (self.proc / "self" / "ns", self.container_logs, self.pod_logs):
            path.mkdir(parents=True)
        # The agent's own process: it sees the machine's first pid namespace, whose pids the driver speaks of.
        (self.proc / "self" / "status").write_text("Name:\tgpuglass\nNSpid:\t1\n")
        (self.proc / "self" / "ns" / "pid").symlink_to(f"pid:[{INITIAL_PID_NAMESPACE}]")
        self._add(1, stat(1, "systemd", 0), "0::/init.scope\n")

    def update(self, processes: Iterable[Process]) -> None:
        """Make the tree show exactly these processes."""
        wanted = {process.pid: process for process in processes}
        for pid in wanted.keys() - self._known:
            process = wanted[pid]
            program = process.program
            if program.pod:
                (self.container_logs / log_name(program)).touch()
            started = BOOTED + round(process.started * TICKS)
            self._add(pid, stat(pid, program.name, started), cgroup(program))
        for pid in self._known - wanted.keys():
            shutil.rmtree(self.proc / str(pid))
        self._known = set(wanted)

    def _add(self, pid: int, stat_line: str, cgroup_line: str) -> None:
        """A process appears with all of its files at once."""
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=self.proc))
        (work / "stat").write_text(stat_line)
        (work / "cgroup").write_text(cgroup_line)
        work.rename(self.proc / str(pid))


def stat(pid: int, name: str, start_ticks: int) -> str:
    """A `/proc/PID/stat` line (proc_pid_stat(5)) of a sleeping process with one thread."""
    middle = "0 0 0 -1 4194304 0 0 0 0 0 0 0 0 20 0"  # group and session to nice
    return f"{pid} ({name}) S 1 {middle} 1 0 {start_ticks} 0 0\n"


def cgroup(program: Program) -> str:
    """A `/proc/PID/cgroup` line: of containerd under systemd, or of a batch system for a host process."""
    if not program.pod:
        return "0::/system.slice/slurmstepd.scope/job_4711/step_0/user/task_0\n"
    pod = f"kubepods-burstable-pod{_pod_uid(program).replace('-', '_')}.slice"
    container = f"cri-containerd-{_container_id(program)}.scope"
    return f"0::/kubepods.slice/kubepods-burstable.slice/{pod}/{container}\n"


def log_name(program: Program) -> str:
    """The file name under /var/log/containers."""
    return f"{program.pod}_{program.namespace}_{program.container}-{_container_id(program)}.log"


def _pod_uid(program: Program) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{program.pod}.{program.namespace}"))


def _container_id(program: Program) -> str:
    return hashlib.sha256(f"{program.namespace}/{program.pod}/{program.container}".encode()).hexdigest()
