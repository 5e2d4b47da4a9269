"""Checks of how processes on a GPU get their names: host pids, the kubelet's answer, container links,
cgroups.

In flow readers of a proc root and of the kubelet; nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from gpuglass.config import KubernetesConfig
from gpuglass.doctor.bounded import TookTooLong, bounded
from gpuglass.doctor.check import Check, Status
from gpuglass.podresources import Allocation, PodResourcesClient, PodResourcesError
from gpuglass.procfs import PidView, ProcFs

KUBELET_SECONDS = 2.0

_HOST_PID = "run the agent with hostPID: true (Kubernetes) or --pid=host (docker, podman)"
_EXTRA = "pip install 'gpuglass[kubernetes]'"


def checks(proc: ProcFs, kubernetes: KubernetesConfig, environ: Mapping[str, str]) -> list[Check]:
    """All checks of this group."""
    found = [host_pids(proc), cgroup(proc)]
    if is_node(kubernetes, environ):
        client = PodResourcesClient(kubernetes.pod_resources_socket, KUBELET_SECONDS)
        found += [
            pod_resources(Path(kubernetes.pod_resources_socket), client.list),
            container_logs(Path(kubernetes.container_logs)),
        ]
    else:
        found.append(
            Check("processes.pods", "pods", Status.INFO, "not a Kubernetes node: processes get no pod names")
        )
    return found


def is_node(kubernetes: KubernetesConfig, environ: Mapping[str, str]) -> bool:
    """Whether pods can be expected here: a kubelet's traces, or being in a pod."""
    traces = (kubernetes.pod_resources_socket, kubernetes.container_logs)
    return bool(environ.get("KUBERNETES_SERVICE_HOST")) or any(os.path.lexists(path) for path in traces)


def host_pids(proc: ProcFs) -> Check:
    """The driver speaks of host pids."""
    title = "host pids"
    namespace = proc.pid_namespace()
    reason = namespace.reason.partition(": ")[0]
    if namespace.view is PidView.HOST:
        return Check("processes.host_pids", title, Status.OK, "processes are seen under the host's pids")
    if namespace.view is PidView.PRIVATE:
        finding = f"{reason}: processes on a GPU cannot be told apart by name or pod"
        return Check("processes.host_pids", title, Status.WARN, finding, _HOST_PID)
    mend = (
        "mount -o remount,hidepid=0 /proc, or run the agent with the group that proc's gid= option names"
        if "hidepid" in namespace.reason
        else "proc: the path at which the host's /proc is mounted here"
    )
    return Check("processes.host_pids", title, Status.WARN, namespace.reason, mend)


def cgroup(proc: ProcFs) -> Check:
    """Container ids are read from cgroup paths."""
    raw = proc.read("self", "cgroup", 65536)
    title, name = "cgroups", "processes.cgroup"
    if not raw:
        return Check(
            name,
            title,
            Status.WARN,
            f"{proc.root}/self/cgroup cannot be read: containers get no names",
            "mount /proc of a kernel with cgroups",
        )
    hierarchies = [line.split(b":", 2)[:2] for line in raw.splitlines() if line.count(b":") >= 2]
    if all(number == b"0" for number, _ in hierarchies):
        return Check(name, title, Status.OK, "version 2")
    unified = any(number == b"0" for number, _ in hierarchies)
    return Check(name, title, Status.OK, "version 1 and 2 (hybrid)" if unified else "version 1")


def pod_resources(socket: Path, ask: Callable[[], tuple[Allocation, ...]]) -> Check:
    """The kubelet says which container has which GPU."""
    title, name = "pod resources", "processes.pod_resources"
    try:
        allocations = bounded("kubelet", 2 * KUBELET_SECONDS + 1, ask)
    except TookTooLong as error:
        return Check(
            name, title, Status.WARN, f"{socket}: {error}", "look after the kubelet: systemctl status kubelet"
        )
    except PodResourcesError as error:
        finding, mend = str(error), _pod_resources_mend(socket, str(error))
        if mend == _EXTRA:
            finding = finding.partition(": pip install")[0]
        return Check(name, title, Status.WARN, finding, mend)
    containers = {(held.namespace, held.pod, held.container) for held in allocations}
    devices = {held.device_id for held in allocations}
    return Check(
        name,
        title,
        Status.OK,
        f"the kubelet answers: {counted(len(devices), 'GPU')} given to "
        f"{counted(len(containers), 'container')}",
    )


def _pod_resources_mend(socket: Path, error: str) -> str:
    if "pip install" in error:
        return _EXTRA
    if "does not exist" in error:
        return f"mount the host's {socket.parent} into the agent's container at the same path (hostPath)"
    if "ermission denied" in error:
        return "run the agent as root, or give its group access to the socket"
    if "kubelet running" in error:
        return "systemctl start kubelet"
    return "look after the kubelet: journalctl -u kubelet"


def container_logs(folder: Path) -> Check:
    """Links there name pod, namespace and container of an id."""
    title, name = "container names", "processes.container_logs"
    try:
        links = sum(1 for entry in os.scandir(folder) if entry.name.endswith(".log"))
    except FileNotFoundError:
        return Check(
            name,
            title,
            Status.WARN,
            f"{folder} does not exist: only pods that requested a GPU get names",
            f"mount the host's {folder} read-only into the agent's container (hostPath)",
        )
    except OSError as error:
        return Check(
            name,
            title,
            Status.WARN,
            f"{folder} cannot be read: {error.strerror}",
            f"chmod o+rx {folder}, or run the agent as root",
        )
    return Check(name, title, Status.OK, f"{folder} names {counted(links, 'container')}")


def counted(number: int, noun: str) -> str:
    """1 GPU, 8 GPUs, 2 processes."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"
