"""Who a sender is: what the kernel says of its process, the workload behind it, and whether it uses the GPU
that it claims.
"""

from __future__ import annotations

import fnmatch
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from exporters.vllm.sink import GpuClaim
from gpuglass.config import Config, EnginesConfig
from gpuglass.gpu_processes import GpuProcesses
from gpuglass.procfs import ProcFs, parse_namespace_pids
from gpuglass.workload import WorkloadResolver

PENDING_SECONDS = 60.0
"""How long a process may be missing in the driver's lists, which are read each slow interval, before its
claim is refused."""

_UCRED = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that called connect, from SO_PEERCRED (unix(7))."""

    pid: int
    """0 if it cannot be seen from this pid namespace."""
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Ask the kernel; raises OSError."""
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


class Peers:
    """Looks up processes. For the receiver's thread."""

    def __init__(self, config: Config, gpu_processes: GpuProcesses) -> None:
        kubernetes = config.kubernetes
        procfs = ProcFs(config.proc)
        self._procfs = procfs
        self.sees_pids = procfs.pid_namespace().is_host
        """Whether pids here are the host's; otherwise nothing is joined by pid."""
        self._gpu_processes = gpu_processes
        self._resolver = WorkloadResolver(procfs, Path(kubernetes.container_logs), Path(kubernetes.pod_logs))

    def workload(self, pid: int, gpu_uuid: str) -> tuple[str, str, str] | None:
        """Namespace, pod and container as labels; None if the process cannot be looked up."""
        if not self.sees_pids or pid <= 0:
            return None
        found = self._resolver.resolve(pid, gpu_uuid)
        return None if found is None else found[1].labels

    def sees_host_pids(self, pid: int) -> bool:
        """Whether a process numbers processes as we do, which is as the host does where we see the host's
        pids: a root user inside of a container does not."""
        if not self.sees_pids:
            return True  # nothing is joined by pid then
        status = self._procfs.read(pid, "status", 65536)
        return status is not None and len(parse_namespace_pids(status.decode("utf-8", "replace"))) == 1

    def claim(self, gpu_uuid: str, pid: int, seconds: float) -> GpuClaim:
        """What to think of a claim by a process that has been connected for `seconds`."""
        processes = self._gpu_processes
        return judge(
            gpu_uuid,
            pid if self.sees_pids else 0,
            processes.on(gpu_uuid) if gpu_uuid else None,
            processes.knows_any,
            seconds,
        )


def judge(
    gpu_uuid: str, pid: int, listed: frozenset[int] | None, knows_any: bool, seconds: float
) -> GpuClaim:
    """Whether a process uses the GPU that it claims.

    `listed` are the pids on it (None: no such list), `knows_any` says whether there are lists at all, `pid`
    is 0 if it means nothing here.
    """
    if not gpu_uuid:
        return GpuClaim.NONE
    if pid <= 0 or not knows_any:
        return GpuClaim.UNVERIFIED
    if listed is not None and pid in listed:
        return GpuClaim.VERIFIED
    return GpuClaim.PENDING if seconds < PENDING_SECONDS else GpuClaim.REFUSED


def is_allowed(config: EnginesConfig, uid: int, namespace: str | None) -> bool:
    """Whether a user, in a pod of a Kubernetes namespace (empty: none, None: unknown), may send."""
    if config.allow_uids and uid not in config.allow_uids:
        return False
    patterns = config.allow_namespaces
    return not patterns or (
        bool(namespace) and any(fnmatch.fnmatchcase(namespace or "", pattern) for pattern in patterns)
    )
