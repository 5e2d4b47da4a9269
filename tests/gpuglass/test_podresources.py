from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from gpuglass.podresources import (
    Allocation,
    DeviceKind,
    PodResources,
    PodResourcesClient,
    PodResourcesError,
    allocations,
    messages,
    normalise,
)
from tests.fakes.kubelet import FakeKubelet, claim, pod, pod_list

GPU = "GPU-8f6f3f4e-1f0c-4d5b-9a53-3f2b0c9d7a11"
OTHER_GPU = "GPU-11111111-2222-3333-4444-555555555555"
MIG = "MIG-5d2e8d5c-0d2f-5d3b-8b9e-6f5f9a7a1c22"
CLAIM_UID = "5f1b6f2e-1111-2222-3333-444455556666"


def decode(answer: bytes) -> tuple[Allocation, ...]:
    return allocations(messages()["ListPodResourcesResponse"].FromString(answer))


def held(pod_name: str, device: str = GPU, container: str = "vllm") -> Allocation:
    return Allocation("team-a", pod_name, container, "nvidia.com/gpu", device, DeviceKind.GPU)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path that others may enter: a unix socket's name is limited to 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="pr"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def kubelet(folder: Path) -> Iterator[FakeKubelet]:
    answer = pod_list(pod("team-a", "llm-0", vllm={"nvidia.com/gpu": [GPU]}))
    with FakeKubelet(folder / "kubelet.sock", answer) as server:
        yield server


def reason(client: PodResourcesClient) -> str:
    with pytest.raises(PodResourcesError) as caught:
        client.list()
    text = str(caught.value)
    assert "\n" not in text and str(client.socket_path) in text
    return text


# --- device ids


@pytest.mark.parametrize(
    ("given_id", "device_id", "kind"),
    [
        (GPU, GPU, DeviceKind.GPU),
        (f"{GPU}::3", GPU, DeviceKind.GPU),
        (MIG, MIG, DeviceKind.MIG),
        (f"{MIG}::0", MIG, DeviceKind.MIG),
        (f"MIG-{GPU}/1/0", f"MIG-{GPU}/1/0", DeviceKind.MIG),
        ("nvidia0", "nvidia0", DeviceKind.NODE),
        ("nvidia12", "nvidia12", DeviceKind.NODE),
        ("nvidia0/vgpu1", "nvidia0", DeviceKind.NODE),
        ("nvidia0/gi2", "0-2", DeviceKind.GPU_INSTANCE),
        ("nvidia0/gi2/vgpu3", "0-2", DeviceKind.GPU_INSTANCE),
        ("0-1", "0-1", DeviceKind.GPU_INSTANCE),
        ("nvidiax", "nvidiax", DeviceKind.OTHER),
        ("0-1-2", "0-1-2", DeviceKind.OTHER),
        ("", "", DeviceKind.OTHER),
    ],
)
def test_a_device_id_is_freed_of_its_share_and_says_its_kind(
    given_id: str, device_id: str, kind: DeviceKind
) -> None:
    assert normalise(given_id) == (device_id, kind)


@given(st.text(max_size=60))
def test_no_device_id_makes_the_reading_fail(text: str) -> None:
    device_id, _ = normalise(text)
    assert len(device_id) <= len(text)


# --- the answer


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field by hand: numbers here come from api.proto, not from the code."""
    assert len(payload) < 128
    return bytes([number << 3 | 2, len(payload)]) + payload


def test_the_wire_format_is_the_kubelets_and_fields_not_needed_are_skipped() -> None:
    topology = field(3, field(1, b"\x08\x01"))
    devices = field(1, b"nvidia.com/gpu") + field(2, GPU.encode()) + topology
    cpu_ids, memory = field(3, b"\x01\x02"), field(4, field(1, b"memory") + b"\x10\x05")
    answer = field(1, field(1, b"p") + field(2, b"n") + field(3, field(1, b"c") + field(2, devices)))
    assert decode(answer) == (Allocation("n", "p", "c", "nvidia.com/gpu", GPU, DeviceKind.GPU),)
    answer = field(1, field(1, b"p") + field(2, b"n") + field(3, field(1, b"c") + cpu_ids + memory))
    assert decode(answer) == ()
    resource = field(1, field(1, b"x")) + field(2, b"gpu.nvidia.com") + field(3, b"node") + field(4, b"gpu-0")
    dynamic = field(2, b"claim") + field(3, b"n") + field(4, resource)
    answer = field(1, field(1, b"p") + field(2, b"n") + field(3, field(1, b"c") + field(5, dynamic)))
    assert decode(answer) == (Allocation("n", "p", "c", "gpu.nvidia.com/claim", "gpu-0", DeviceKind.CLAIM),)


def test_only_wanted_resources_are_allocations() -> None:
    answer = pod_list(
        pod(
            "team-a",
            "llm-0",
            vllm={
                "nvidia.com/gpu": [GPU],
                "nvidia.com/mig-1g.10gb": [MIG],
                "nvidia.com/gpu.shared": [OTHER_GPU],
                "example.com/fpga": ["x"],
            },
        )
    )
    assert [found.device_id for found in decode(answer)] == [GPU, MIG]
    decoded = messages()["ListPodResourcesResponse"].FromString(answer)
    assert [found.device_id for found in allocations(decoded, ["nvidia.com/gpu.*"])] == [OTHER_GPU]


def test_several_shares_of_one_device_in_one_container_are_one_allocation() -> None:
    answer = pod_list(pod("team-a", "llm-0", vllm={"nvidia.com/gpu": [f"{GPU}::0", f"{GPU}::1"]}))
    assert decode(answer) == (held("llm-0"),)


@pytest.mark.parametrize(
    ("arguments", "device"),
    [
        ({"driver": "gpu.nvidia.com", "pool": "node-1", "device": "gpu-0"}, "gpu-0"),
        ({"driver": "gpu.nvidia.com", "device": "gpu-0-mig-1g10gb-19-0"}, "gpu-0-mig-1g10gb-19-0"),
        ({"driver": "gpu.nvidia.com", "cdi": ["k8s.gpu.nvidia.com/device=gpu-1"]}, "gpu-1"),
        ({"cdi": [f"k8s.gpu.nvidia.com/claim={CLAIM_UID}-gpu-1"]}, "gpu-1"),
        ({"cdi": [f"k8s.gpu.nvidia.com/claim={CLAIM_UID}", "k8s.gpu.nvidia.com/device=gpu-2"]}, "gpu-2"),
        ({"cdi": [f"k8s.gpu.nvidia.com/claim={CLAIM_UID}"]}, ""),
        ({"cdi": ["k8s.nic.example.com/device=gpu-1"]}, ""),
        ({"driver": "nic.example.com", "device": "gpu-0", "cdi": ["k8s.gpu.nvidia.com/device=gpu-1"]}, ""),
        ({"device": "gpu-0"}, ""),
        ({}, ""),
    ],
)
def test_a_claim_of_the_gpu_driver_is_an_allocation_by_the_devices_name(
    arguments: dict[str, str], device: str
) -> None:
    found = decode(pod_list(claim(pod("team-a", "llm-0"), "vllm", "two-gpus", **arguments)))  # type: ignore[arg-type]
    wanted = Allocation("team-a", "llm-0", "vllm", "gpu.nvidia.com/two-gpus", device, DeviceKind.CLAIM)
    assert found == ((wanted,) if device else ())


@pytest.mark.parametrize(
    ("namespace", "name", "device"),
    [
        ("", "p", GPU),
        ("n", "", GPU),
        ("n" * 254, "p", GPU),
        ("n", "p\n", GPU),
        ("n", "p", ""),
        ("n", "p", "x" * 999),
    ],
)
def test_names_that_no_object_could_have_are_left_out(namespace: str, name: str, device: str) -> None:
    good = pod("team-a", "llm-0", vllm={"nvidia.com/gpu": [GPU]})
    bad = pod(namespace, name, c={"nvidia.com/gpu": [device]})
    assert decode(pod_list(bad, good)) == (held("llm-0"),)


@given(st.binary(max_size=200))
def test_bytes_are_an_answer_or_refused_by_the_decoder(answer: bytes) -> None:
    with contextlib.suppress(DecodeError):
        decode(answer)


# --- the client against a server


def test_the_client_reads_what_the_kubelet_says(kubelet: FakeKubelet) -> None:
    client = PodResourcesClient(kubelet.socket_path)
    assert client.list() == (held("llm-0"),)
    assert kubelet.requests == [b""]
    assert kubelet.authority == "localhost"  # not the escaped path, which strict servers refuse
    kubelet.answer = pod_list()
    assert client.list() == ()


def test_five_hundred_pods_are_read(kubelet: FakeKubelet) -> None:
    kubelet.answer = pod_list(
        *(
            pod(
                f"ns-{n % 20}",
                f"llm-{n}",
                server={"nvidia.com/gpu": [f"GPU-{n:04d}-{g}" for g in range(8)]},
                proxy={},
            )
            for n in range(500)
        )
    )
    found = PodResourcesClient(kubelet.socket_path).list()
    assert len(found) == 4000
    assert found[-1] == Allocation(
        "ns-19", "llm-499", "server", "nvidia.com/gpu", "GPU-0499-7", DeviceKind.GPU
    )


def test_an_answer_above_the_limit_is_refused(kubelet: FakeKubelet) -> None:
    kubelet.answer = pod_list(*(pod("team-a", f"llm-{n}", c={"nvidia.com/gpu": [GPU]}) for n in range(500)))
    assert "larger than 1000 bytes" in reason(PodResourcesClient(kubelet.socket_path, max_message=1000))
    assert len(PodResourcesClient(kubelet.socket_path, max_message=len(kubelet.answer)).list()) == 500


def test_a_slow_kubelet_times_out_and_a_slightly_slow_one_does_not(kubelet: FakeKubelet) -> None:
    client = PodResourcesClient(kubelet.socket_path, timeout=0.5)
    kubelet.delay = 30
    begin = time.monotonic()
    assert "no answer within 0.5 s" in reason(client)
    assert time.monotonic() - begin < 20
    kubelet.delay = 0.05
    assert client.list() == (held("llm-0"),)


def test_a_kubelet_that_restarts_on_the_same_path_is_found_at_once(folder: Path) -> None:
    path = folder / "kubelet.sock"
    client = PodResourcesClient(path)
    with FakeKubelet(path, pod_list(pod("team-a", "llm-0", vllm={"nvidia.com/gpu": [GPU]}))):
        assert client.list() == (held("llm-0"),)
    for _ in range(3):
        reason(client)
    path.unlink(missing_ok=True)
    with FakeKubelet(path, pod_list(pod("team-a", "llm-1", vllm={"nvidia.com/gpu": [GPU]}))):
        assert client.list() == (held("llm-1"),)


def test_a_missing_socket_says_so(folder: Path) -> None:
    assert "does not exist" in reason(PodResourcesClient(folder / "kubelet.sock"))


def test_a_file_that_is_no_socket_says_so(folder: Path) -> None:
    (folder / "kubelet.sock").write_text("")
    assert "not a socket" in reason(PodResourcesClient(folder / "kubelet.sock"))


def test_a_socket_that_nobody_serves_says_so(folder: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(folder / "kubelet.sock"))
    left.close()
    assert "is the kubelet running?" in reason(PodResourcesClient(folder / "kubelet.sock"))


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the superuser's passage through permissions."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_socket_without_permission_says_so(kubelet: FakeKubelet) -> None:
    client = PodResourcesClient(kubelet.socket_path)
    assert client.list() == (held("llm-0"),)
    kubelet.socket_path.chmod(0o000)
    with as_nobody():
        assert "Permission denied" in reason(client)


def test_a_folder_without_permission_says_so(kubelet: FakeKubelet) -> None:
    kubelet.socket_path.parent.chmod(0o600)
    try:
        with as_nobody():
            assert "Permission denied" in reason(PodResourcesClient(kubelet.socket_path))
    finally:
        kubelet.socket_path.parent.chmod(0o755)


def test_an_older_kubelet_says_that_it_does_not_speak_v1(folder: Path) -> None:
    with FakeKubelet(folder / "kubelet.sock", method="/v1alpha1.PodResourcesLister/List") as server:
        assert "does not speak pod-resources v1" in reason(PodResourcesClient(server.socket_path))


def test_a_refusal_is_given_with_its_code_and_on_one_line(kubelet: FakeKubelet) -> None:
    kubelet.status, kubelet.details = grpc.StatusCode.INTERNAL, "first\nsecond " + "x" * 1000
    text = reason(PodResourcesClient(kubelet.socket_path))
    assert "INTERNAL: first second xxx" in text and len(text) < 400


@pytest.mark.parametrize("answer", [b"\xff" * 50, b"\x0a\x05ab", b"\x0a\x03\x0a\x01\xff"])
def test_garbage_in_the_answer_is_refused(kubelet: FakeKubelet, answer: bytes) -> None:
    kubelet.answer = answer
    assert "not a pod-resources list" in reason(PodResourcesClient(kubelet.socket_path))


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 4096, b""])
def test_a_server_that_speaks_something_else_is_refused_in_time(folder: Path, says: bytes) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "kubelet.sock"))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(says)

    thread = threading.Thread(target=serve)
    thread.start()
    begin = time.monotonic()
    try:
        reason(PodResourcesClient(folder / "kubelet.sock", timeout=1.0))
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=5)
    assert time.monotonic() - begin < 30
    assert not thread.is_alive()


# --- libraries


@pytest.mark.parametrize("module", ["grpc", "google.protobuf.message"])
def test_without_its_libraries_the_client_names_the_extra(
    kubelet: FakeKubelet, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    text = reason(PodResourcesClient(kubelet.socket_path))
    assert "gpuglass[kubernetes]" in text and module in text


def test_without_a_socket_no_library_is_loaded() -> None:
    script = (
        "import sys\n"
        "from gpuglass.podresources import PodResourcesClient, PodResourcesError\n"
        "try: PodResourcesClient('/nowhere/kubelet.sock').list()\n"
        "except PodResourcesError: print({'grpc', 'google.protobuf'} & set(sys.modules) or 'none')\n"
    )
    root = Path(__file__).parent.parent.parent
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "none"


# --- the poller


class Scripted:
    def __init__(self, *answers: tuple[Allocation, ...] | PodResourcesError) -> None:
        self.answers = list(answers)
        self.calls = 0

    def list(self) -> tuple[Allocation, ...]:
        self.calls += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, PodResourcesError):
            raise answer
        return answer


def test_before_the_first_answer_a_device_belongs_to_nobody() -> None:
    resources = PodResources(Scripted((held("llm-0"),)))
    assert resources.workloads_for(GPU) == ()
    assert resources.age(0) is None
    assert resources.refresh(0)
    assert resources.workloads_for(GPU) == (("team-a", "llm-0", "vllm"),)
    assert resources.workloads_for(OTHER_GPU) == ()


def test_the_kubelet_is_asked_once_an_interval() -> None:
    client = Scripted((held("llm-0"),))
    resources = PodResources(client, interval=10)
    asked = [now for now in range(0, 40, 5) if resources.refresh(now)]
    assert asked == [0, 10, 20, 30]
    assert client.calls == 4


def test_a_shared_device_belongs_to_each_of_its_holders_once() -> None:
    resources = PodResources(
        Scripted((held("llm-0"), held("llm-1"), held("llm-0", OTHER_GPU), held("llm-0")))
    )
    resources.refresh(0)
    assert resources.workloads_for(GPU) == (("team-a", "llm-0", "vllm"), ("team-a", "llm-1", "vllm"))
    assert resources.workloads_for(OTHER_GPU) == (("team-a", "llm-0", "vllm"),)


def test_other_ids_of_the_same_device_are_looked_up_too() -> None:
    node = Allocation("team-a", "llm-0", "vllm", "nvidia.com/gpu", "nvidia0", DeviceKind.NODE)
    resources = PodResources(Scripted((node, held("llm-0"))))
    resources.refresh(0)
    assert resources.workloads_for(OTHER_GPU) == ()
    assert resources.workloads_for(OTHER_GPU, "nvidia0", GPU) == (("team-a", "llm-0", "vllm"),)


def test_a_new_answer_replaces_the_old_one() -> None:
    resources = PodResources(Scripted((held("llm-0"),), (held("llm-1", OTHER_GPU),)))
    resources.refresh(0)
    resources.refresh(10)
    assert resources.workloads_for(GPU) == ()
    assert resources.workloads_for(OTHER_GPU) == (("team-a", "llm-1", "vllm"),)


def test_the_last_good_answer_outlives_failures_until_it_is_too_old() -> None:
    resources = PodResources(Scripted((held("llm-0"),), PodResourcesError("kubelet gone")), max_age=60)
    resources.refresh(0)
    for now in range(1, 61):
        assert not resources.refresh(now)
    assert resources.error == "kubelet gone"
    assert resources.age(60) == 60
    assert resources.workloads_for(GPU) == (("team-a", "llm-0", "vllm"),)
    resources.refresh(61)
    assert resources.age(61) is None
    assert resources.workloads_for(GPU) == () and resources.allocations == ()


def test_failures_in_a_row_are_asked_ever_more_seldom_and_one_answer_ends_that() -> None:
    gone = PodResourcesError("kubelet gone")
    client = Scripted(gone, gone, gone, gone, (held("llm-0"),), gone, gone, (held("llm-0"),))
    resources = PodResources(client, interval=5, max_age=60)
    asked = []
    for now in range(100):
        before = client.calls
        resources.refresh(now)
        asked += [now] * (client.calls - before)
    assert asked == [0, 5, 15, 35, 65, 70, 75, 85, 90, 95]
    assert resources.error == ""


def test_allocations_beyond_the_limit_are_dropped_and_counted() -> None:
    resources = PodResources(Scripted(tuple(held(f"llm-{n}") for n in range(5000))))
    resources.refresh(0)
    assert len(resources.allocations) == len(resources.workloads_for(GPU)) == 4096
    assert resources.dropped == 904


@pytest.mark.parametrize(("interval", "max_age"), [(0, 60), (60, 60), (-1, 60)])
def test_an_interval_that_makes_no_sense_is_refused(interval: float, max_age: float) -> None:
    with pytest.raises(ValueError, match="interval"):
        PodResources(Scripted(()), interval=interval, max_age=max_age)


def test_the_poller_follows_a_real_server_through_a_restart(folder: Path) -> None:
    path = folder / "kubelet.sock"
    resources = PodResources(PodResourcesClient(path, timeout=1.0), interval=10, max_age=60)
    assert not resources.refresh(0) and "does not exist" in resources.error
    with FakeKubelet(path, pod_list(pod("team-a", "llm-0", vllm={"nvidia.com/gpu": [f"{GPU}::1"]}))):
        assert resources.refresh(10) and resources.error == ""
    assert not resources.refresh(20)
    assert resources.workloads_for(GPU) == (("team-a", "llm-0", "vllm"),)
    path.unlink(missing_ok=True)
    with FakeKubelet(path, pod_list()):
        assert resources.refresh(40)
    assert resources.workloads_for(GPU) == ()
