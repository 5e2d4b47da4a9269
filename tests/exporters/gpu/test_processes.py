"""Who holds a GPU: attribution to processes and pods, its caps, and what is called unknown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.gpu.collectors.processes import Admission, Share, combine, scale_to
from gpuglass.config import KubernetesConfig, ProcessConfig, Seconds
from gpuglass.demo.scenario import H200, Scenario, mig_uuid_of, uuid_of
from tests.fakes.kubelet import FakeKubelet, pod, pod_list
from tests.support.node import FakeProc, Node, running_node

MIB = 2**20
UID = "2fc932ce-fdcc-454b-97bd-aadfdeb4c340"
ID = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
POD_CGROUP = f"/kubepods/burstable/pod{UID}/{ID}"
MEMORY = "gpuglass_process_memory_used_bytes"
SM = "gpuglass_process_sm_ratio"
UNATTRIBUTED = "gpuglass_gpu_memory_unattributed_bytes"


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    proc = FakeProc(tmp_path / "proc")
    proc.add(100, "vllm")
    proc.add(200, "trainer")
    return proc


def shared_gpu() -> Scenario:
    return (
        Scenario()
        .gpus(1, H200)
        .gpu(0, used_mib=1000)
        .process(0, 100, mem_mib=600, sm=40)
        .process(0, 200, mem_mib=300, sm=0)
    )


def attributed(node: Node) -> float:
    return sum(sample.value for sample in node.samples(MEMORY)) + (node.value(UNATTRIBUTED) or 0)


def test_processes_and_the_unattributed_rest_add_up_to_the_used_memory(
    tmp_path: Path, proc: FakeProc
) -> None:
    with running_node(tmp_path, shared_gpu(), proc=proc) as node:
        node.wait_value(MEMORY, 600 * MIB, process="vllm")
        assert node.value(MEMORY, process="trainer") == 300 * MIB
        assert node.value(UNATTRIBUTED) == 100 * MIB
        assert attributed(node) == node.value("gpuglass_gpu_memory_used_bytes")
        assert node.value("gpuglass_gpu_processes", type="compute") == 2


def test_other_parts_of_the_agent_can_ask_who_uses_which_gpu(tmp_path: Path, proc: FakeProc) -> None:
    scenario = Scenario().gpus(2, H200)
    scenario.process(0, 100, mem_mib=1).process(0, 200, mem_mib=1).process(1, 300, mem_mib=5)
    with running_node(tmp_path, scenario, proc=proc) as node:
        seen = node.part._processes
        node.wait(lambda: seen.on(uuid_of(1)) == {300}, what="the second GPU's process")
        node.wait(lambda: seen.on(uuid_of(0)) == {100, 200}, what="the first GPU's processes")
        assert seen.on(uuid_of(2)) is None


def test_an_idle_process_has_an_sm_share_of_zero(tmp_path: Path, proc: FakeProc) -> None:
    with running_node(tmp_path, shared_gpu(), proc=proc) as node:
        node.wait_value(SM, 0.4, process="vllm")
        assert node.value(SM, process="trainer") == 0


def test_before_the_driver_was_asked_twice_the_sm_share_is_unknown(tmp_path: Path, proc: FakeProc) -> None:
    with running_node(tmp_path, shared_gpu(), proc=proc, slow_interval=60.0) as node:
        node.wait_value(MEMORY, 600 * MIB, process="vllm")
        assert node.samples(SM) == []


@pytest.mark.parametrize("trouble", ["proc_util_garbage", "proc_util_zero", "proc_grow"])
def test_a_driver_that_answers_badly_about_processes_spoils_nothing(
    tmp_path: Path, proc: FakeProc, trouble: str
) -> None:
    scenario = shared_gpu().gpu(0, **{trouble: 100 if trouble == "proc_grow" else 1})
    with running_node(tmp_path, scenario, proc=proc) as node:
        node.wait(lambda: node.samples("gpuglass_gpu_memory_total_bytes"), what="the slow tier")
        if trouble != "proc_grow":
            node.wait_value(MEMORY, 600 * MIB, process="vllm")
            node.wait(lambda: node.value(SM, process="vllm") is not None, what="an SM share")
            assert sum(sample.value for sample in node.samples(SM)) <= 1
        assert node.value("gpuglass_gpu_up") == 1
        assert node.value("gpuglass_gpu_power_watts") == 70


def test_a_process_that_ended_leaves_and_its_memory_with_it(tmp_path: Path, proc: FakeProc) -> None:
    with running_node(tmp_path, shared_gpu(), proc=proc) as node:
        node.wait_value(MEMORY, 300 * MIB, process="trainer")
        proc.remove(200)
        node.rewrite(shared_gpu().gone(0, 200).gpu(0, used_mib=700))
        node.wait_value(MEMORY, None, process="trainer")
        assert node.samples(SM, process="trainer") == []
        node.wait(lambda: attributed(node) == 700 * MIB, what="the sum")


def test_memory_of_a_dead_pid_that_the_driver_still_lists_is_unattributed(
    tmp_path: Path, proc: FakeProc
) -> None:
    proc.add(200, "trainer", state="Z")
    with running_node(tmp_path, shared_gpu(), proc=proc) as node:
        node.wait_value(UNATTRIBUTED, 400 * MIB)
        assert node.value(MEMORY, process="trainer") is None
        assert attributed(node) == 1000 * MIB


def test_a_reused_pid_is_another_process(tmp_path: Path, proc: FakeProc) -> None:
    proc.add(100, "vllm", cgroup=POD_CGROUP, start=100)
    with running_node(tmp_path, shared_gpu(), proc=proc) as node:
        node.wait_value(MEMORY, 600 * MIB, workload_pod=UID)
        proc.add(100, "intruder", cgroup="/", start=9999)
        node.wait_value(MEMORY, 600 * MIB, process="intruder")
        assert node.samples(MEMORY, workload_pod=UID) == []


def test_processes_of_one_name_share_a_series_unless_pids_are_asked_for(
    tmp_path: Path, proc: FakeProc
) -> None:
    proc.add(200, "vllm")
    with running_node(tmp_path, shared_gpu(), proc=proc) as node:
        node.wait_value(MEMORY, 900 * MIB, process="vllm")
        assert "pid" not in node.samples(MEMORY)[0].labels
    (tmp_path / "again").mkdir()
    with running_node(
        tmp_path / "again", shared_gpu(), proc=proc, process=ProcessConfig(pid_label=True)
    ) as node:
        node.wait_value(MEMORY, 600 * MIB, process="vllm", pid="100")
        assert node.value(MEMORY, process="vllm", pid="200") == 300 * MIB


def test_a_thousand_processes_stay_within_the_cap_and_still_add_up(tmp_path: Path) -> None:
    proc = FakeProc(tmp_path / "proc")
    scenario = Scenario().gpus(1, H200).gpu(0, used_mib=100_000)
    for pid in range(1000, 2000):
        proc.add(pid, f"job-{pid}")
        scenario.process(0, pid, mem_mib=50 + pid % 10, sm=0)
    with running_node(
        tmp_path, scenario, proc=proc, process=ProcessConfig(limit=20), hang_timeout=5.0, slow_interval=1.0
    ) as node:
        node.wait(lambda: node.samples(MEMORY, process="other"), 20, "the other bucket")
        assert len(node.samples(MEMORY)) == 21
        assert attributed(node) == 100_000 * MIB
        names = {sample.labels["process"] for sample in node.samples(MEMORY)}
        before = node.samples("gpuglass_gpu_snapshot_age_seconds")
        node.wait(lambda: node.value("gpuglass_gpu_processes", type="compute") == 1000, what="all counted")
        assert {sample.labels["process"] for sample in node.samples(MEMORY)} == names, "admission is sticky"
        assert before


def test_parts_larger_than_the_whole_are_scaled_down_and_counted(tmp_path: Path, proc: FakeProc) -> None:
    with running_node(tmp_path, shared_gpu().gpu(0, used_mib=450), proc=proc) as node:
        node.wait_value(MEMORY, 300 * MIB, process="vllm")
        assert node.value(MEMORY, process="trainer") == 150 * MIB
        assert node.value(UNATTRIBUTED) == 0
        assert (node.value("gpuglass_gpu_process_clamped_total", kind="memory") or 0) >= 1


def test_where_a_processs_memory_is_hidden_the_rest_is_unknown_too(tmp_path: Path, proc: FakeProc) -> None:
    with running_node(tmp_path, shared_gpu().process(0, 200, mem_mib=None, sm=0), proc=proc) as node:
        node.wait_value(MEMORY, 600 * MIB, process="vllm")
        assert node.value(MEMORY, process="trainer") is None
        assert node.value(UNATTRIBUTED) is None


def test_an_idle_gpu_has_no_processes_and_no_error(tmp_path: Path) -> None:
    with running_node(tmp_path, Scenario().gpus(1, H200).gpu(0, used_mib=4)) as node:
        node.wait_value("gpuglass_gpu_processes", 0, type="compute")
        assert node.value(UNATTRIBUTED) == 4 * MIB
        assert node.value("gpuglass_gpu_collector_success", collector="processes") == 1


def test_outside_the_hosts_pid_namespace_no_pid_gets_a_name(tmp_path: Path) -> None:
    proc = FakeProc(tmp_path / "proc", namespace=4026532999)
    proc.add(100, "innocent", cgroup=POD_CGROUP)
    with running_node(tmp_path, shared_gpu(), proc=proc) as node:
        node.wait_value(MEMORY, 900 * MIB, process="unknown")
        assert len(node.samples(MEMORY)) == 1
        assert node.value(UNATTRIBUTED) == 100 * MIB


def test_the_kubelets_log_names_give_pod_namespace_and_container(tmp_path: Path, proc: FakeProc) -> None:
    proc.add(100, "vllm", cgroup=POD_CGROUP)
    logs = tmp_path / "containers"
    logs.mkdir()
    (logs / f"llm-0_serving_server-{ID}.log").symlink_to("/nowhere")
    with running_node(tmp_path, shared_gpu(), proc=proc) as node:
        node.wait_value(
            MEMORY, 600 * MIB, workload_namespace="serving", workload_pod="llm-0", workload_container="server"
        )
        assert "workload_pod" not in node.samples(MEMORY, process="trainer")[0].labels


def test_the_pod_resources_socket_names_who_was_given_a_gpu_even_when_it_idles(tmp_path: Path) -> None:
    held = pod_list(pod("serving", "llm-0", server={"nvidia.com/gpu": [uuid_of(0)]}))
    with FakeKubelet(tmp_path / "kubelet.sock", held):
        config = KubernetesConfig(
            pod_resources_socket=str(tmp_path / "kubelet.sock"),
            container_logs=str(tmp_path / "none"),
            pod_logs=str(tmp_path / "none"),
            refresh=Seconds(1),
        )
        with running_node(tmp_path, Scenario().gpus(2, H200), kubernetes=config) as node:
            node.wait(lambda: node.samples("gpuglass_gpu_allocation_info"), what="the allocation")
            (sample,) = node.samples("gpuglass_gpu_allocation_info")
            assert sample.labels["workload_pod"] == "llm-0"
            assert sample.labels["gpu_uuid"] == uuid_of(0)
            assert sample.labels["resource"] == "nvidia.com/gpu"


def test_without_a_socket_there_is_no_allocation_and_it_is_said(tmp_path: Path) -> None:
    with running_node(tmp_path, Scenario().gpus(1, H200)) as node:
        node.wait(lambda: node.samples("gpuglass_gpu_memory_total_bytes"), what="the slow tier")
        assert node.samples("gpuglass_gpu_allocation_info") == []
        assert node.part._workloads.capabilities()["pod_resources"] == "absent"


def mig_gpu() -> Scenario:
    scenario = Scenario().gpus(1, H200).gpu(0, mig_mode=1, used_mib=50_000)
    scenario.mig(0, 0, gi=1, ci=0, profile="3g.71gb", total_mib=70_000, used_mib=40_000)
    scenario.mig(0, 1, gi=2, ci=0, profile="1g.18gb", total_mib=17_000, used_mib=10_000)
    scenario.gpm(0, {1: 80.0, 2: 75.0, 3: 30.0, 10: 20.0}, mig=0).gpm(
        0, {1: 10.0, 2: 5.0, 3: 1.0, 10: 2.0}, mig=1
    )
    return scenario.process(0, 100, mem_mib=30_000, sm=50, gi=1, ci=0)


def test_mig_instances_have_families_of_their_own(tmp_path: Path, proc: FakeProc) -> None:
    with running_node(tmp_path, mig_gpu(), proc=proc) as node:
        first, second = mig_uuid_of(0, 0), mig_uuid_of(0, 1)
        node.wait_value("gpuglass_mig_sm_active_ratio", 0.75, mig_uuid=first)
        node.wait_value("gpuglass_mig_sm_active_ratio", 0.05, mig_uuid=second)
        node.wait_value("gpuglass_mig_memory_used_bytes", 40_000 * MIB, mig_uuid=first, gpu_uuid=uuid_of(0))
        node.wait_value(
            "gpuglass_mig_process_memory_used_bytes", 30_000 * MIB, mig_uuid=first, process="vllm"
        )
        assert node.value("gpuglass_mig_memory_unattributed_bytes", mig_uuid=first) == 10_000 * MIB
        assert node.value("gpuglass_mig_memory_unattributed_bytes", mig_uuid=second) == 10_000 * MIB
        profiles = {s.labels["profile"] for s in node.samples("gpuglass_mig_info")}
        assert profiles == {"3g.71gb", "1g.18gb"}
        assert node.samples(MEMORY) == [], "the parent's family must not count an instance's bytes again"
        assert node.value("gpuglass_gpu_capability", field="busy_samples", state="unsupported") == 1


def test_compute_instances_that_share_memory_report_it_once(tmp_path: Path, proc: FakeProc) -> None:
    scenario = mig_gpu().mig(0, 2, gi=1, ci=1, profile="1c.3g.71gb", total_mib=70_000, used_mib=40_000)
    with running_node(tmp_path, scenario, proc=proc) as node:
        node.wait(lambda: len(node.samples("gpuglass_mig_info")) == 3, what="three instances")
        node.wait(lambda: len(node.samples("gpuglass_mig_memory_used_bytes")) == 2, what="two memories")


def test_an_instance_that_is_destroyed_leaves(tmp_path: Path, proc: FakeProc) -> None:
    with running_node(tmp_path, mig_gpu(), proc=proc) as node:
        node.wait(lambda: len(node.samples("gpuglass_mig_memory_used_bytes")) == 2, what="two instances")
        node.rewrite(mig_gpu().mig_gone(0, 1))
        node.wait(lambda: len(node.samples("gpuglass_mig_memory_used_bytes")) == 1, what="one instance")
        assert node.samples("gpuglass_mig_sm_active_ratio", mig_uuid=mig_uuid_of(0, 1)) == []


# --- the pure parts

shares = st.dictionaries(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xyz")),
    st.builds(Share, st.integers(0, 2**40), st.floats(0, 1)),
    max_size=20,
)


@given(st.dictionaries(st.integers(1, 99), st.integers(0, 2**40)), st.integers(0, 2**40))
def test_scaled_parts_never_exceed_the_whole(parts: dict[int, float], whole: int) -> None:
    scaled, clamped = scale_to(parts, whole)
    assert sum(scaled.values()) <= whole * (1 + 1e-9)
    assert clamped == (sum(parts.values()) > whole)
    assert clamped or scaled == parts


@given(st.lists(shares, min_size=1, max_size=6), st.integers(1, 5))
def test_admission_is_first_come_sticky_and_bounded(
    rounds: list[dict[tuple[str, ...], Share]], limit: int
) -> None:
    admission = Admission(limit)
    before: set[tuple[str, ...]] = set()
    for present in rounds:
        admitted = admission.admit(present)
        assert len(admitted) <= limit
        assert before & present.keys() <= admitted, "who was admitted stays while it lives"
        before = admitted


@given(
    st.lists(
        st.tuples(
            st.sampled_from([("a",), ("b",)]), st.builds(Share, st.none() | st.integers(0, 9), st.none())
        )
    )
)
def test_a_sum_with_an_unknown_part_is_unknown(parts: list[tuple[tuple[str, ...], Share]]) -> None:
    total = combine(parts)
    for key in total:
        mine = [share.memory for other, share in parts if other == key]
        assert total[key].memory == (None if None in mine else sum(value or 0 for value in mine))
