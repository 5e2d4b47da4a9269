"""A kubelet that only speaks pod-resources: a real gRPC server on a unix socket with scripted answers.

    with FakeKubelet(path) as kubelet:
        kubelet.answer = pod_list(pod("team-a", "llm-0", vllm={"nvidia.com/gpu": ["GPU-…"]}))

`answer` is the bytes of the next answers, `delay` the seconds before each, `status` a gRPC status to refuse
with; `calls` counts what was asked, `authority` is the last call's. Messages are the client's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from gpuglass.podresources import METHOD, messages

Devices = Mapping[str, Iterable[str]]


def pod(namespace: str, name: str, **containers: Devices) -> Any:
    """A pod with containers by name, each with device ids by resource name."""
    message = messages()["PodResources"](namespace=namespace, name=name)
    for container_name, devices in containers.items():
        container = message.containers.add(name=container_name)
        for resource, ids in devices.items():
            container.devices.add(resource_name=resource, device_ids=list(ids))
    return message


def claim(
    to: Any,
    container: str,
    name: str,
    *,
    driver: str = "",
    pool: str = "",
    device: str = "",
    cdi: Iterable[str] = (),
) -> Any:
    """Add a DRA claim to a pod's container, which is made when it is not there; the pod is returned."""
    found = next((held for held in to.containers if held.name == container), None)
    dynamic = (to.containers.add(name=container) if found is None else found).dynamic_resources.add(
        claim_name=name, claim_namespace=to.namespace
    )
    resource = dynamic.claim_resources.add(driver_name=driver, pool_name=pool, device_name=device)
    for cdi_name in cdi:
        resource.cdi_devices.add(name=cdi_name)
    return to


def pod_list(*pods: Any) -> bytes:
    """The bytes of an answer."""
    answer: bytes = messages()["ListPodResourcesResponse"](pod_resources=pods).SerializeToString()
    return answer


class FakeKubelet:
    def __init__(self, socket_path: Path, answer: bytes = b"", method: str = METHOD) -> None:
        self.socket_path = socket_path
        self.answer = answer
        self.delay = 0.0
        self.status: grpc.StatusCode | None = None
        self.details = ""
        self.calls = 0
        self.requests: list[bytes] = []
        self.authority = ""
        self._service, self._method = method.removeprefix("/").split("/")
        self._server: Any = None

    def start(self) -> None:
        server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=4), options=[("grpc.max_send_message_length", -1)]
        )
        handler = grpc.unary_unary_rpc_method_handler(self._list)  # bytes in, bytes out
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(self._service, {self._method: handler})]
        )
        server.add_insecure_port(f"unix:{self.socket_path}")
        server.start()
        self._server = server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(grace=None).wait()
            self._server = None

    def __enter__(self) -> FakeKubelet:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _list(self, request: bytes, context: Any) -> bytes:
        self.calls += 1
        self.requests.append(request)
        self.authority = context._rpc_event.call_details.host.decode()  # gRPC has no public way to it
        deadline = time.monotonic() + self.delay
        while time.monotonic() < deadline and context.is_active():
            time.sleep(0.01)
        if self.status is not None:
            context.abort(self.status, self.details)
        return self.answer
