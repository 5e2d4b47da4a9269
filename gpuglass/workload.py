"""Which workload a process belongs to: pod, container, or plain host process.

In flows a host pid, and the device it was seen on if there is one; out flow the process and its `Workload`.
The control group path says which container it is; names come from the file names under `/var/log/containers`
and `/var/log/pods`, which need neither an API server nor rights in the cluster, and only then from the
kubelet's pod-resources answer. `parse_cgroup`, `parse_mountinfo`, `parse_container_log` and `parse_pod_log`
are pure; `WorkloadResolver` does the reading and caches by `(pid, start_time)`.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from gpuglass.procfs import Process, ProcFs

CONTAINER_ID_LENGTH = 12
"""Characters of a container id in labels."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What a process works for. An empty string means: does not apply, or cannot be known from here.

    - host process: all fields empty;
    - container outside Kubernetes: `container_id` and `runtime` only (runtimes keep names out of the cgroup
      path);
    - pod with known names: `namespace`, `pod` and, where it is certain, `container`;
    - pod whose names are not known (yet): `namespace` is empty and `pod` holds the pod's uid, so that its
      processes still add up to one workload.

    `runtime` is containerd, crio, docker or podman, and empty where the cgroup path does not tell (cgroupfs
    driver).
    """

    namespace: str = ""
    pod: str = ""
    container: str = ""
    pod_uid: str = ""
    container_id: str = ""
    runtime: str = ""

    @property
    def is_pod(self) -> bool:
        return self.pod != ""

    @property
    def labels(self) -> tuple[str, str, str]:
        """Namespace, pod and container as labels; a container outside of Kubernetes by the beginning of its
        id."""
        container = self.container or ("" if self.is_pod else self.container_id[:CONTAINER_ID_LENGTH])
        return self.namespace, self.pod, container

    @property
    def is_named(self) -> bool:
        """Whether `pod` is a pod's name; False also for what is no pod."""
        return self.namespace != ""

    @property
    def is_host(self) -> bool:
        return self.pod == "" and self.container_id == ""


@dataclass(frozen=True, slots=True)
class CgroupIdentity:
    """What a control group path gives away. Uids are dashed; static pods have 32 hex digits instead."""

    pod_uid: str = ""
    container_id: str = ""
    runtime: str = ""
    qos: str = ""
    """guaranteed, burstable, besteffort or empty."""
    is_hidden: bool = False
    """The path is relative to a cgroup namespace and names nothing: unknown, which is not "host"."""


@dataclass(frozen=True, slots=True)
class MountIdentity:
    """What the bind mounts that a kubelet or runtime adds to each container give away."""

    pod_uid: str = ""
    container: str = ""
    """The container's name in its pod, from the kubelet's termination-log mount."""
    container_id: str = ""
    runtime: str = ""


class PodContainer(NamedTuple):
    """Names of a container in a pod."""

    namespace: str
    pod: str
    container: str


class PodName(NamedTuple):
    namespace: str
    pod: str


class DeviceHolders(Protocol):
    """Who was given a device: `gpuglass.podresources.PodResources` is one."""

    def workloads_for(self, device_uuid: str, /) -> tuple[tuple[str, str, str], ...]: ...


# --- control group paths

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_UID = r"(?:[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})"
_POD_SLICE = re.compile(rf"(?:[^/]*-)?kubepods(?:-(besteffort|burstable))?-pod({_UID})\.slice")
_POD_FOLDER = re.compile(rf"pod({_UID})")
_KUBEPODS = re.compile(r"(?:[^/]*-)?kubepods(?:-besteffort|-burstable)?(?:\.slice)?")
_CONTAINER = re.compile(r"(?:([a-z][a-z-]*)-)?([0-9a-f]{64})(?:\.scope)?")
_FARGATE = re.compile(r"[0-9a-f]{32}-[0-9]{6,12}")

_RUNTIMES = {
    "cri-containerd": "containerd",
    "nerdctl": "containerd",
    "crio": "crio",
    "docker": "docker",
    "libpod": "podman",
    "libpod-payload": "podman",
}
"""Unit prefixes of containers. Others with a container's id are its helpers: crio-conmon, libpod-conmon."""

_QOS = ("besteffort", "burstable")
_NAME_MAX = 255
_DEPTH_LIMIT = 128
_CGROUP_LIMIT = 65536
_MOUNTINFO_LIMIT = 1 << 20


def parse_cgroup(text: str) -> CgroupIdentity:
    """The most telling identity among the lines of a `/proc/PID/cgroup` (v1, v2 or both). Never raises.

    Limit: a path says what its owner made of it. Who may make control groups (root, a user with a delegated
    slice) can make one that reads like a pod's, as a kubelet in a container or a rootless one rightly does.
    """
    best = CgroupIdentity()
    hidden = False
    visible = False
    for line in text[:_CGROUP_LIMIT].split("\n", 128)[:128]:
        fields = line.split(":", 2)  # hierarchy id, controllers, path; the path itself may hold colons
        if len(fields) != 3 or not fields[2].startswith("/"):
            continue
        segments = _segments(fields[2])
        if all(segment == ".." for segment in segments):
            hidden = True
            continue
        visible = True
        found = _identity(segments)
        if _telling(found) > _telling(best):
            best = found
    return CgroupIdentity(is_hidden=True) if hidden and not visible else best


def _segments(path: str) -> list[str]:
    """Path parts, with `<slice>:<runtime>:<id>` (a systemd path handed to a cgroupfs runtime) taken apart."""
    segments: list[str] = []
    for part in path.removesuffix(" (deleted)").split("/"):
        if not part or len(part) > _NAME_MAX:
            continue
        if len(segments) >= _DEPTH_LIMIT:
            break
        pieces = part.split(":")
        segments += [pieces[0], f"{pieces[1]}-{pieces[2]}"] if len(pieces) == 3 else [part]
    return segments


def _identity(segments: list[str]) -> CgroupIdentity:
    """Walk a path from the root down.

    The outermost pod is the one that this node's kubelet knows; containers above it are nodes that themselves
    run in a container (kind). Below it, or where there is no pod, the outermost container is the one that the
    node's runtime knows; those further down were started inside it.
    """
    found = CgroupIdentity()
    for index, segment in enumerate(segments):
        above = segments[:index]
        if not found.pod_uid and (pod := _pod(segment, above)) is not None:
            found = pod
        elif not found.container_id:
            container_id, runtime = _container(segment, above)
            found = replace(found, container_id=container_id, runtime=runtime)
    return found


def _pod(segment: str, above: list[str]) -> CgroupIdentity | None:
    if match := _POD_SLICE.fullmatch(segment):
        return CgroupIdentity(pod_uid=match[2].replace("_", "-"), qos=match[1] or "guaranteed")
    if match := _POD_FOLDER.fullmatch(segment):
        parent = above[-1] if above else ""
        under_kubepods = any(_KUBEPODS.fullmatch(name) for name in above)
        # Seen from another pod's cgroup namespace, the part up to the common folder is "..".
        is_relative = bool(above) and all(name in ("..", *_QOS) for name in above)
        if under_kubepods or is_relative:
            qos = parent if parent in _QOS else "guaranteed" if _KUBEPODS.fullmatch(parent) else ""
            return CgroupIdentity(pod_uid=match[1].replace("_", "-"), qos=qos)
    return None


def _container(segment: str, above: list[str]) -> tuple[str, str]:
    in_ecs = "ecs" in above
    if match := _CONTAINER.fullmatch(segment):
        prefix, container_id = match[1], match[2]
        if prefix is None:
            return container_id, "docker" if in_ecs or above[-1:] == ["docker"] else ""
        return (container_id, _RUNTIMES[prefix]) if prefix in _RUNTIMES else ("", "")
    if in_ecs and _FARGATE.fullmatch(segment):
        return segment, ""
    return "", ""


def _telling(identity: CgroupIdentity) -> tuple[bool, bool]:
    return identity.pod_uid != "", identity.container_id != ""


# --- mounts

_POD_MOUNT = re.compile(rf"(?:.*/)?pods/({_UID})/(?:etc-hosts|containers/({_LABEL})/[^/]+|volumes/.*)")
_DOCKER_MOUNT = re.compile(r"(?:.*/)?containers/([0-9a-f]{64})/(?:hostname|hosts|resolv\.conf)")
_OVERLAY_MOUNT = re.compile(r"(?:.*/)?overlay-containers/([0-9a-f]{64})/userdata/.*")
_CONTAINERD_MOUNT = re.compile(r"(?:.*/)?io\.containerd\.grpc\.v1\.cri/sandboxes/[0-9a-f]{64}/.*")
_RUNTIME_FILES = frozenset(
    (
        "/etc/hostname",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/run/.containerenv",
        "/run/secrets",
        "/dev/termination-log",
    )
)


def parse_mountinfo(text: str) -> MountIdentity:
    """The identity in a `/proc/PID/mountinfo`, from the mounts' roots (field 4). Never raises.

    A process that sees the node's own mounts sees those of all pods; they lie below a `pods` folder again and
    are left out, and two answers are no answer. In a pod the runtime's files belong to the sandbox, so they
    tell the runtime but not the container. Limit: a docker container that shares another's network shows the
    other's files.
    """
    pods: set[str] = set()
    names: set[str] = set()
    docker: set[str] = set()
    podman: set[str] = set()
    is_containerd = False
    for line in text[:_MOUNTINFO_LIMIT].split("\n"):
        fields = line.split(" ", 5)
        if len(fields) < 6 or len(fields[3]) > 4096:
            continue
        root, point = fields[3], fields[4]
        if (match := _POD_MOUNT.fullmatch(root)) and "/pods/" not in point:
            pods.add(match[1].replace("_", "-"))
            if match[2]:
                names.add(match[2])
        elif point in _RUNTIME_FILES:
            if match := _DOCKER_MOUNT.fullmatch(root):
                docker.add(match[1])
            elif match := _OVERLAY_MOUNT.fullmatch(root):
                podman.add(match[1])
            elif _CONTAINERD_MOUNT.fullmatch(root):
                is_containerd = True
    if len(pods) == 1:
        runtime = "containerd" if is_containerd else "crio" if podman else "docker" if docker else ""
        return MountIdentity(
            pod_uid=pods.pop(), container=names.pop() if len(names) == 1 else "", runtime=runtime
        )
    if not pods and len(docker | podman) == 1:
        runtime = "docker" if docker else "podman"
        return MountIdentity(container_id=(docker | podman).pop(), runtime=runtime)
    return MountIdentity()


# --- log file names

_SUBDOMAIN = r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?"
_CONTAINER_LOG = re.compile(rf"({_SUBDOMAIN})_({_LABEL})_({_LABEL})-([0-9a-f]{{64}})\.log")
_POD_LOG = re.compile(rf"({_LABEL})_({_SUBDOMAIN})_({_UID})")
_CONTAINER_NAME = re.compile(_LABEL)


def parse_container_log(name: str) -> tuple[str, PodContainer] | None:
    """Container id and names in `<pod>_<namespace>_<container>-<id>.log`.

    The kubelet cuts such a name at 255 characters, from the id's end; a cut one is None.
    """
    match = _CONTAINER_LOG.fullmatch(name)
    return None if match is None else (match[4], PodContainer(match[2], match[1], match[3]))


def parse_pod_log(name: str) -> tuple[str, PodName] | None:
    """Pod uid and names in `<namespace>_<pod>_<uid>`."""
    match = _POD_LOG.fullmatch(name)
    return None if match is None else (match[3], PodName(match[1], match[2]))


# --- reading

Names = TypeVar("Names")
_LISTING_LIMIT = 50_000
_LISTING_INTERVAL = 1.0


class _Listing(Generic[Names]):
    """Names in one folder, by id. Looked at again only for an id that it lacks, at most once a second."""

    def __init__(self, folder: Path, parse: Callable[[str], tuple[str, Names] | None]) -> None:
        self.folder = folder
        self.problem = ""
        self.names: dict[str, Names] = {}
        self._parse = parse
        self._looked: float | None = None
        self._modified = -1
        self._settled = False

    def get(self, key: str, now: float) -> Names | None:
        found = self.names.get(key)
        if found is None and (self._looked is None or now - self._looked >= _LISTING_INTERVAL):
            self._looked = now
            self._look()
            found = self.names.get(key)
        return found

    def _look(self) -> None:
        try:
            modified = os.stat(self.folder).st_mtime_ns
            if modified == self._modified and self._settled:
                return
            with os.scandir(self.folder) as entries:
                listed = [entry.name for entry in itertools.islice(entries, _LISTING_LIMIT)]
        except OSError as error:
            self.problem = f"{self.folder} cannot be listed: {error.strerror}"
            self.names, self._modified, self._settled = {}, -1, False
            return
        # An entry added in the same tick of the file system's clock as the one before does not change the
        # modification time: a change is followed by one more listing.
        self._settled, self._modified = modified == self._modified, modified
        self.problem = ""
        self.names = dict(parsed for name in listed if (parsed := self._parse(name)) is not None)


@dataclass(slots=True)
class _Entry:
    workload: Workload
    is_settled: bool
    asked: float
    retry_at: float
    wait: float


class WorkloadResolver:
    """From host pid to workload. For use by one thread.

    An identity that is certain is read once; after that each call costs one read of `/proc/PID/stat`. One
    that is not (a host process, which a runtime may still move into a container; a pod without names, because
    the kubelet makes the log link a moment after the process starts) is looked at again after `retry`
    seconds, then twice as long each time up to `retry_limit`.

    - `size`: most processes remembered, least recently asked for go first;
    - `idle`: seconds after which a process that nobody asks for is forgotten;
    - `pod_resources`: whom the kubelet gave a device, used for a pod without names when exactly one container
      holds it.
    """

    def __init__(
        self,
        proc: Path | str | ProcFs = "/proc",
        container_logs: Path = Path("/var/log/containers"),
        pod_logs: Path = Path("/var/log/pods"),
        pod_resources: DeviceHolders | None = None,
        *,
        size: int = 4096,
        idle: float = 120.0,
        retry: float = 2.0,
        retry_limit: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        if not 0 < retry <= retry_limit:
            raise ValueError(f"retry must be above 0 and at most retry_limit, not {retry} and {retry_limit}")
        self._procfs = proc if isinstance(proc, ProcFs) else ProcFs(proc)
        self._containers = _Listing(Path(container_logs), parse_container_log)
        self._pods = _Listing(Path(pod_logs), parse_pod_log)
        self._pod_resources = pod_resources
        self._size = size
        self._idle = idle
        self._retry = retry
        self._retry_limit = retry_limit
        self._clock = clock
        self._entries: OrderedDict[tuple[int, int], _Entry] = OrderedDict()

    def __len__(self) -> int:
        """Processes remembered."""
        return len(self._entries)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why names may be missing, a line each; empty until a pod has been looked for."""
        return tuple(listing.problem for listing in (self._containers, self._pods) if listing.problem)

    def resolve(self, pid: int, device_uuid: str = "") -> tuple[Process, Workload] | None:
        """The process behind a host pid and its workload, or None when there is no (living) process.

        `device_uuid` is the GPU or MIG device on which the process was seen; it helps only where names are
        missing.
        """
        now = self._clock()
        self._forget(now)
        process = self._procfs.process(pid)
        if process is None or process.gone:
            return None
        key = (process.pid, process.start_time)
        entry = self._entries.get(key)
        if entry is None or (not entry.is_settled and now >= entry.retry_at):
            workload, is_settled = self._identify(pid, now)
            # The pid may have changed hands between the two reads; then neither belongs to the other.
            again = self._procfs.process(pid)
            if again is None or again.start_time != process.start_time:
                return None
            wait = self._retry if entry is None else min(entry.wait * 2, self._retry_limit)
            entry = self._entries[key] = _Entry(workload, is_settled, now, now + wait, wait)
        entry.asked = now
        self._entries.move_to_end(key)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return process, self._with_device(entry.workload, device_uuid)

    def _forget(self, now: float) -> None:
        # Least recently asked for first, so the walk ends at the first one that is still wanted.
        while self._entries and now - next(iter(self._entries.values())).asked > self._idle:
            self._entries.popitem(last=False)

    def _identify(self, pid: int, now: float) -> tuple[Workload, bool]:
        """Workload, and whether nothing more can be learned about it."""
        raw = self._procfs.read(pid, "cgroup", _CGROUP_LIMIT)
        cgroup = (
            CgroupIdentity(is_hidden=True) if raw is None else parse_cgroup(raw.decode("utf-8", "replace"))
        )
        container = ""
        if cgroup.is_hidden:
            raw = self._procfs.read(pid, "mountinfo", _MOUNTINFO_LIMIT)
            mounts = parse_mountinfo("" if raw is None else raw.decode("utf-8", "replace"))
            cgroup = CgroupIdentity(mounts.pod_uid, mounts.container_id, mounts.runtime)
            container = mounts.container
        found = Workload(pod_uid=cgroup.pod_uid, container_id=cgroup.container_id, runtime=cgroup.runtime)
        if not found.pod_uid and (not found.container_id or found.runtime in ("docker", "podman")):
            return found, found.container_id != ""
        if found.container_id and (names := self._containers.get(found.container_id, now)) is not None:
            return replace(found, namespace=names.namespace, pod=names.pod, container=names.container), True
        if not found.pod_uid:
            return found, False
        names_of_pod = self._pods.get(found.pod_uid, now)
        if names_of_pod is None:
            return replace(found, pod=found.pod_uid, container=container), False
        namespace, pod = names_of_pod
        container = container or self._only_container(names_of_pod, found)
        return replace(found, namespace=namespace, pod=pod, container=container), container != ""

    def _only_container(self, names: PodName, found: Workload) -> str:
        """The container's name when its pod has had just one, and that one is not known under another id.

        The other id would mean that ours is the pod's sandbox, or a restart whose link is still to come. A
        process without a container id is a helper of the pod's (conmon).
        """
        if not found.container_id:
            return ""
        folder = self._pods.folder / f"{names.namespace}_{names.pod}_{found.pod_uid}"
        try:
            with os.scandir(folder) as entries:
                listed = [
                    entry.name
                    for entry in itertools.islice(entries, 64)
                    if entry.is_dir(follow_symlinks=False)
                ]
        except OSError:
            return ""
        if len(listed) != 1 or not _CONTAINER_NAME.fullmatch(listed[0]):
            return ""
        candidate = PodContainer(names.namespace, names.pod, listed[0])
        return "" if candidate in self._containers.names.values() else listed[0]

    def _with_device(self, workload: Workload, device_uuid: str) -> Workload:
        """Complete a pod from whom the kubelet gave the device, when that is one container only."""
        if not device_uuid or self._pod_resources is None or not workload.is_pod or workload.container:
            return workload
        holders = self._pod_resources.workloads_for(device_uuid)
        if len(holders) != 1:
            return workload
        namespace, pod, container = holders[0]
        if workload.is_named:
            is_ours = (namespace, pod) == (workload.namespace, workload.pod)
        else:  # a pod that is listed under its own uid is another one
            is_ours = PodName(namespace, pod) not in self._pods.names.values()
        return replace(workload, namespace=namespace, pod=pod, container=container) if is_ours else workload
