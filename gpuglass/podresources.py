"""Which container the kubelet gave which device.

In flows the answer of the kubelet's pod-resources API (gRPC, `/v1.PodResourcesLister/List` on a unix socket);
out flow `Allocation`s, and from `PodResources` the containers of one device. The answer knows allocations,
not use: a pod that did not request a device is not in it, several containers may share one, and kubelets
before 1.34 could list pods that had ended (kubernetes#132020). So the caller treats it as a hint and checks
it against the processes it sees alive.

gRPC and protobuf come with the extra `gpuglass[kubernetes]` and are imported only where the socket exists.
The messages are built at run time from a table of the few fields needed.
"""

from __future__ import annotations

import enum
import errno
import importlib
import os
import re
import socket
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

SOCKET = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
METHOD = "/v1.PodResourcesLister/List"
RESOURCES = ("nvidia.com/gpu", "nvidia.com/mig-*")
"""Resource names looked at, as fnmatch patterns."""
DRA_DRIVER = "gpu.nvidia.com"
"""The DRA driver whose claims are allocations. compute-domain.nvidia.com hands out channels, not devices."""

_TEXT_LIMIT = 253


class PodResourcesError(Exception):
    """No answer from the kubelet; the text says why, in one line."""


class DeviceKind(enum.Enum):
    """In what terms a device id speaks of a device."""

    GPU = "gpu"
    """`GPU-<uuid>`, NVML's uuid."""
    MIG = "mig"
    """`MIG-<uuid>`, or `MIG-GPU-<uuid>/<gi>/<ci>` of drivers before 470."""
    NODE = "node"
    """`nvidia<minor>`, the device node (GKE)."""
    GPU_INSTANCE = "gpu_instance"
    """`<index>-<gi>`: MIG by GPU index and GPU instance id."""
    CLAIM = "claim"
    """The name of a device in the DRA driver's slice: `gpu-<minor>`, `gpu-<minor>-mig-<profile>-…`."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Allocation:
    """One device given to one container. Shares of a device (time slices, vGPUs) are the same allocation."""

    namespace: str
    pod: str
    container: str
    resource: str
    """Resource name, or `<driver>/<claim name>` for a DRA claim."""
    device_id: str
    kind: DeviceKind


# --- device ids

_GKE = re.compile(r"nvidia([0-9]{1,4})(?:/vgpu[0-9]{1,4})?")
_GKE_MIG = re.compile(r"nvidia([0-9]{1,4})/gi([0-9]{1,4})(?:/vgpu[0-9]{1,4})?")
_GPU_INSTANCE = re.compile(r"[0-9]{1,4}-[0-9]{1,4}")
_CLAIM_PREFIX = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}-")


def normalise(device_id: str) -> tuple[str, DeviceKind]:
    """A device plugin's id without the mark of a share, and in what terms it speaks.

    `GPU-x::3` (replica 3 of a time slice) and `nvidia0/vgpu1` are shares of `GPU-x` and `nvidia0`;
    `nvidia0/gi2` is GKE's way to write `0-2`.
    """
    plain = device_id.partition("::")[0]
    if match := _GKE_MIG.fullmatch(plain):
        return f"{match[1]}-{match[2]}", DeviceKind.GPU_INSTANCE
    if match := _GKE.fullmatch(plain):
        return f"nvidia{match[1]}", DeviceKind.NODE
    if plain.startswith("GPU-"):
        return plain, DeviceKind.GPU
    if plain.startswith("MIG-"):
        return plain, DeviceKind.MIG
    if _GPU_INSTANCE.fullmatch(plain):
        return plain, DeviceKind.GPU_INSTANCE
    return plain, DeviceKind.OTHER


# --- messages

# Field numbers of staging/src/k8s.io/kubelet/pkg/apis/podresources/v1/api.proto in kubernetes. A star marks a
# repeated field. DynamicResource's field 1 (class_name) went in 1.31, ClaimResource's driver, pool and device
# names are younger than its CDI names; fields left out here are skipped by the decoder.
_SCHEMA: Mapping[str, tuple[tuple[str, int, str], ...]] = {
    "ListPodResourcesRequest": (),
    "ListPodResourcesResponse": (("pod_resources", 1, "PodResources*"),),
    "PodResources": (
        ("name", 1, "string"),
        ("namespace", 2, "string"),
        ("containers", 3, "ContainerResources*"),
    ),
    "ContainerResources": (
        ("name", 1, "string"),
        ("devices", 2, "ContainerDevices*"),
        ("dynamic_resources", 5, "DynamicResource*"),
    ),
    "ContainerDevices": (("resource_name", 1, "string"), ("device_ids", 2, "string*")),
    "DynamicResource": (
        ("claim_name", 2, "string"),
        ("claim_namespace", 3, "string"),
        ("claim_resources", 4, "ClaimResource*"),
    ),
    "ClaimResource": (
        ("cdi_devices", 1, "CDIDevice*"),
        ("driver_name", 2, "string"),
        ("pool_name", 3, "string"),
        ("device_name", 4, "string"),
    ),
    "CDIDevice": (("name", 1, "string"),),
}


@lru_cache(maxsize=1)
def messages() -> Mapping[str, Any]:
    """Message classes by name, built from the table. Raises ImportError without protobuf."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="api.proto", package="v1", syntax="proto3")
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            base = kind.removesuffix("*")
            label = types.LABEL_OPTIONAL if kind == base else types.LABEL_REPEATED
            if base == "string":
                message.field.add(name=field, number=number, label=label, type=types.TYPE_STRING)
            else:
                message.field.add(
                    name=field, number=number, label=label, type=types.TYPE_MESSAGE, type_name=f".v1.{base}"
                )
    pool = descriptor_pool.DescriptorPool()  # its own, so that another api.proto of package v1 does no harm
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"v1.{name}")) for name in _SCHEMA
    }


def allocations(answer: Any, resources: Iterable[str] = RESOURCES) -> tuple[Allocation, ...]:
    """The device allocations in a ListPodResourcesResponse, each once, in the kubelet's order.

    Entries whose names a Kubernetes object could not have are left out.
    """
    patterns = tuple(resources)
    found: dict[Allocation, None] = {}
    for pod in answer.pod_resources:
        for container in pod.containers:
            if not all(map(_is_name, (pod.namespace, pod.name, container.name))):
                continue
            for resource, device_id, kind in _devices(container, patterns):
                if _is_name(resource) and _is_name(device_id):
                    found[Allocation(pod.namespace, pod.name, container.name, resource, device_id, kind)] = (
                        None
                    )
    return tuple(found)


def _devices(container: Any, patterns: tuple[str, ...]) -> Iterable[tuple[str, str, DeviceKind]]:
    for devices in container.devices:
        if any(fnmatchcase(devices.resource_name, pattern) for pattern in patterns):
            for device_id in devices.device_ids:
                yield devices.resource_name, *normalise(device_id)
    for dynamic in container.dynamic_resources:
        for claim in dynamic.claim_resources:
            if device := _claimed_device(claim):
                yield f"{DRA_DRIVER}/{dynamic.claim_name}", device, DeviceKind.CLAIM


def _claimed_device(claim: Any) -> str:
    """The name of a claimed device in its pool, empty for another driver's.

    Kubelets that do not tell it give it away in the CDI names that the driver makes:
    `k8s.gpu.nvidia.com/device=gpu-0` and `k8s.gpu.nvidia.com/claim=<claim uid>-gpu-0`.
    """
    if claim.driver_name not in ("", DRA_DRIVER):
        return ""
    if claim.device_name:
        return str(claim.device_name) if claim.driver_name else ""
    for device in claim.cdi_devices:
        vendor, _, name = str(device.name).partition("/")
        plain = _CLAIM_PREFIX.sub("", name.partition("=")[2], count=1)
        if vendor == f"k8s.{DRA_DRIVER}" and plain.startswith("gpu-"):
            return plain
    return ""


def _is_name(text: str) -> bool:
    return 0 < len(text) <= _TEXT_LIMIT and text.isprintable()


# --- client


class PodResourcesClient:
    """Asks the kubelet. Each call opens a connection of its own, so a kubelet that was restarted is just
    another one.

    - `timeout`: seconds for one call, connecting included;
    - `max_message`: bytes of the largest answer taken;
    - `resources`: fnmatch patterns of the resource names wanted.
    """

    def __init__(
        self,
        socket_path: Path | str = SOCKET,
        timeout: float = 2.0,
        max_message: int = 16 << 20,
        resources: Iterable[str] = RESOURCES,
    ) -> None:
        self.socket_path = Path(socket_path)
        self.timeout = timeout
        self.max_message = max_message
        self.resources = tuple(resources)

    def list(self) -> tuple[Allocation, ...]:
        """What is allocated on this node now. Raises PodResourcesError when there is no answer."""
        self._check_socket()
        grpc, decode_error = self._libraries()
        options = (
            ("grpc.max_receive_message_length", self.max_message),
            # Without it gRPC sends the escaped socket path as :authority, which strict servers refuse
            # (grpc#38142).
            ("grpc.default_authority", "localhost"),
            ("grpc.enable_http_proxy", 0),
            # The connection of the call before may linger in a pool of all channels: each call makes its own,
            # so that a socket that was replaced, or may not be opened any more, is noticed at once.
            ("grpc.use_local_subchannel_pool", 1),
        )
        request = messages()["ListPodResourcesRequest"]()
        try:
            with grpc.insecure_channel(f"unix:{self.socket_path}", options=options) as channel:
                call = channel.unary_unary(METHOD)  # bytes in, bytes out
                answer = call(request.SerializeToString(), timeout=self.timeout)
        except grpc.RpcError as error:
            raise PodResourcesError(self._explain(grpc, error)) from error
        try:
            decoded = messages()["ListPodResourcesResponse"].FromString(answer)
        except decode_error as error:
            raise PodResourcesError(f"{self.socket_path}: the answer is not a pod-resources list") from error
        return allocations(decoded, self.resources)

    def _check_socket(self) -> None:
        try:
            mode = os.stat(self.socket_path).st_mode
        except FileNotFoundError:
            raise PodResourcesError(
                f"{self.socket_path} does not exist: not a Kubernetes node, or its folder is not mounted here"
            ) from None
        except OSError as error:
            raise PodResourcesError(f"{self.socket_path} cannot be reached: {error.strerror}") from error
        if not stat.S_ISSOCK(mode):
            raise PodResourcesError(f"{self.socket_path} is not a socket")

    def _libraries(self) -> tuple[Any, type[Exception]]:
        try:
            grpc = importlib.import_module("grpc")
            decode_error: type[Exception] = importlib.import_module("google.protobuf.message").DecodeError
            messages()
        except ImportError as error:
            raise PodResourcesError(
                f"{self.socket_path} needs Python packages that are missing ({error.name}): "
                "pip install 'gpuglass[kubernetes]'"
            ) from error
        return grpc, decode_error

    def _explain(self, grpc: Any, error: Any) -> str:
        code = error.code()
        details = " ".join(str(error.details() or "").split())[:200]
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            reason = f"no answer within {self.timeout:g} s"
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            reason = "the server does not speak pod-resources v1 (Kubernetes 1.20 or later does)"
        elif code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            reason = f"answer larger than {self.max_message} bytes, or too many calls: {details}"
        elif code is grpc.StatusCode.UNAVAILABLE:
            reason = self._why_unavailable() or details
        else:
            reason = f"{code.name}: {details}"
        return f"{self.socket_path}: {reason}"

    def _why_unavailable(self) -> str:
        """What the kernel says to a bare connect, which gRPC words its own way; empty on success."""
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            probe.settimeout(self.timeout)
            probe.connect(str(self.socket_path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                return "nothing listens there: is the kubelet running?"
            return f"cannot connect: {error.strerror or error}"
        finally:
            probe.close()
        return ""


# --- poller


class Lister(Protocol):
    """What the poller asks: a `PodResourcesClient` is one."""

    def list(self) -> tuple[Allocation, ...]: ...


class PodResources:
    """The kubelet's last good answer, with its age. Has no thread; for use by one.

    A call of `refresh` blocks for as long as the client does (its timeout). After failures in a row the pause
    doubles, up to half of `max_age`, so that a hanging kubelet does not slow down its caller each time.

    - `interval`: seconds from one question to the next;
    - `max_age`: seconds after which an answer is forgotten: stale names are worse than none;
    - `limit`: most allocations kept.
    """

    def __init__(
        self, client: Lister, interval: float = 10.0, max_age: float = 60.0, limit: int = 4096
    ) -> None:
        if not 0 < interval < max_age:
            raise ValueError(f"interval must be above 0 and below max_age, not {interval} and {max_age}")
        self._client = client
        self._interval = interval
        self._max_age = max_age
        self._limit = limit
        self._next: float | None = None
        self._answered: float | None = None
        self._failures = 0
        self._by_device: dict[str, tuple[tuple[str, str, str], ...]] = {}
        self.allocations: tuple[Allocation, ...] = ()
        self.dropped = 0
        """Allocations of the last answer beyond `limit`."""
        self.error = ""
        """Why the last question had no answer; empty when it had one."""

    def refresh(self, now: float) -> bool:
        """Ask if it is time to. `now` is seconds of a monotonic clock. True when there is a new answer."""
        is_due = self._next is None or now >= self._next
        is_new = is_due and self._ask(now)
        if self._answered is not None and now - self._answered > self._max_age:
            self._answered = None
            self._keep(())
        return is_new

    def age(self, now: float) -> float | None:
        """Seconds since the answer in hand was given, None without one."""
        return None if self._answered is None else now - self._answered

    def workloads_for(self, device_uuid: str, /, *other_ids: str) -> tuple[tuple[str, str, str], ...]:
        """Containers, as (namespace, pod, container), that hold the device, as of the last `refresh`.

        `other_ids` are further names of the same device in the terms of `DeviceKind`: `nvidia0`, `0-2`,
        `gpu-0`.
        """
        found: dict[tuple[str, str, str], None] = {}
        for device_id in (device_uuid, *other_ids):
            found.update(dict.fromkeys(self._by_device.get(device_id, ())))
        return tuple(found)

    def _ask(self, now: float) -> bool:
        try:
            answer = self._client.list()
        except PodResourcesError as error:
            self._failures += 1
            pause = self._interval * 2 ** min(self._failures - 1, 16)
            self._next = now + max(self._interval, min(pause, self._max_age / 2))
            self.error = str(error)
            return False
        self._failures, self.error = 0, ""
        self._next, self._answered = now + self._interval, now
        self._keep(answer)
        return True

    def _keep(self, answer: tuple[Allocation, ...]) -> None:
        self.allocations = answer[: self._limit]
        self.dropped = len(answer) - len(self.allocations)
        by_device: dict[str, dict[tuple[str, str, str], None]] = {}
        for held in self.allocations:
            by_device.setdefault(held.device_id, {})[(held.namespace, held.pod, held.container)] = None
        self._by_device = {device: tuple(holders) for device, holders in by_device.items()}
