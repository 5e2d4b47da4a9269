"""Names of the processes on the GPUs, for all GPU threads, and whom the kubelet gave which device.

The kubelet is asked by a thread of its own: it may take its time, a GPU may not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from exporters.gpu.collectors.processes import UNKNOWN_PROCESS
from gpuglass.config import Config
from gpuglass.podresources import Allocation, PodResources, PodResourcesClient
from gpuglass.procfs import ProcFs
from gpuglass.workload import WorkloadResolver


class Workloads:
    """Resolves pids for several threads and keeps the kubelet's answer fresh."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        kubernetes = config.kubernetes
        procfs = ProcFs(config.proc)
        self._clock = clock
        self._lock = threading.Lock()
        self._namespace = procfs.pid_namespace()
        self._socket = Path(kubernetes.pod_resources_socket)
        self._container_logs = Path(kubernetes.container_logs)
        self._kubelet = PodResources(
            PodResourcesClient(self._socket, resources=kubernetes.resources),
            kubernetes.refresh,
            max_age=max(60.0, 3 * kubernetes.refresh),
        )
        self._refresh = kubernetes.refresh
        self._resolver = WorkloadResolver(
            procfs, self._container_logs, Path(kubernetes.pod_logs), self._kubelet, clock=clock
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="kubelet", daemon=True)

    def start(self) -> None:
        """Start asking the kubelet."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end after its present question."""
        self._closing.set()

    def _poll(self) -> None:
        while not self._closing.wait(0.0 if self._kubelet.age(self._clock()) is None else 1.0):
            if not self._socket.exists():
                self._closing.wait(self._refresh)
                continue
            self._kubelet.refresh(self._clock())
            self._closing.wait(1.0)

    def resolve(self, pid: int, device_uuid: str) -> tuple[str, str, str, str] | None:
        """Labels of a pid (namespace, pod, container, process name); None if there is no such process.

        Without the host's pid namespace no pid can be looked up: then its memory is shown as process
        "unknown".
        """
        with self._lock:
            found = self._resolver.resolve(pid, device_uuid)
        if found is None:
            return None if self._namespace.is_host else ("", "", "", UNKNOWN_PROCESS)
        process, workload = found
        if not self._namespace.is_host:
            return "", "", "", UNKNOWN_PROCESS  # a pid of ours by chance, not the driver's
        return *workload.labels, process.name

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """Devices that the kubelet gave to containers, as of its last answer."""
        return self._kubelet.allocations

    def capabilities(self) -> dict[str, str]:
        """What this node lets us see, by feature."""
        if not self._socket.exists():
            pod_resources = "absent"
        elif self._kubelet.error:
            pod_resources = "error"
        else:
            pod_resources = "supported"
        return {
            "host_pid": "supported" if self._namespace.is_host else "unsupported",
            "pod_resources": pod_resources,
            "container_names": "supported" if self._container_logs.is_dir() else "absent",
        }
