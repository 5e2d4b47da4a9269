from __future__ import annotations

import csv
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuglass.procfs import ProcFs
from gpuglass.workload import (
    CgroupIdentity,
    MountIdentity,
    PodContainer,
    PodName,
    Workload,
    WorkloadResolver,
    parse_cgroup,
    parse_container_log,
    parse_mountinfo,
    parse_pod_log,
)

FIXTURES = Path(__file__).parent.parent / "fixtures" / "cgroup"

UID = "2fc932ce-fdcc-454b-97bd-aadfdeb4c340"
OTHER_UID = "7ffde41a-fa85-4b01-8023-69a4e4b50c55"
STATIC_UID = "36b6d6be73b1065af369b3985edafa09"
ID = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
OTHER_ID = "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"
GPU = "GPU-8f6f3f4e-1f0c-4d5b-9a53-3f2b0c9d7a11"

TAIL = "1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 {threads} 0 {start} 0 0"


def expectations() -> Iterator[Any]:
    with (FIXTURES / "expected.tsv").open(encoding="ascii", newline="") as table:
        for row in csv.DictReader(table, delimiter="\t"):
            identity = CgroupIdentity(
                row["pod_uid"], row["container_id"], row["runtime"], row["qos"], row["hidden"] == "hidden"
            )
            yield pytest.param(row["file"], identity, id=row["file"].removesuffix(".txt"))


# --- control group paths


@pytest.mark.parametrize(("file", "identity"), list(expectations()))
def test_a_control_group_file_names_its_container(file: str, identity: CgroupIdentity) -> None:
    assert parse_cgroup((FIXTURES / file).read_text(encoding="ascii")) == identity


def test_every_control_group_fixture_has_an_expectation() -> None:
    assert {path.name for path in FIXTURES.glob("*.txt")} == {case.values[0] for case in expectations()}


@pytest.mark.parametrize(
    "path",
    [
        f"/system.slice/pod{UID}/x",  # a pod folder outside kubepods
        f"/kubepods/pod{UID[:-1]}",  # a digit short
        f"/kubepods/pod{UID.upper()}",
        "/kubepods/podcast",
        f"/system.slice/docker-{ID[:-1]}.scope",
        f"/system.slice/docker-{ID}0.scope",
        f"/system.slice/docker-{ID}.service",
        f"/system.slice/{'x' * 300}-{ID}.scope",
        f"/system.slice/backup-{ID}.scope",
        "/ecs/9dc77abb1d3e4a2f8e0c9b1a2d3c4e5f",
        "/process_api/fa0477adb0092ed5324d433a22815a81",
    ],
)
def test_what_only_looks_like_a_container_is_none(path: str) -> None:
    assert parse_cgroup(f"0::{path}\n") == CgroupIdentity()


@pytest.mark.parametrize("text", ["", "\n", "0::", "::", "0:/", "no colons", "0::relative", "\x00" * 50])
def test_what_is_no_control_group_file_gives_nothing(text: str) -> None:
    assert parse_cgroup(text) == CgroupIdentity()


def test_a_container_cannot_pose_as_another_with_a_control_group_of_its_own_making() -> None:
    mine = f"/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/cri-containerd-{ID}.scope"
    theirs = f"kubepods/burstable/pod{OTHER_UID}/{OTHER_ID}"
    for separator in ("/", "\x0b0::/", "\x0c0::/", "\u20280::/", "\r0::/", ":x:/"):
        identity = parse_cgroup(f"0::{mine}/x{separator}{theirs}\n")
        assert (identity.pod_uid, identity.container_id) == (UID, ID), repr(separator)


words = st.sampled_from(
    [
        *(
            "0::",
            "/",
            ":",
            "..",
            "kubepods",
            "kubepods.slice",
            "-",
            "pod",
            ".slice",
            ".scope",
            "cri-containerd-",
        ),
        *("crio-", "docker", "ecs", "besteffort", "A", UID, UID.replace("-", "_"), ID),
        *("\n", " (deleted)", "é", "\x00"),
    ]
)


@given(st.one_of(st.text(max_size=300), st.lists(words, max_size=40).map("".join)))
def test_no_text_makes_the_control_group_parser_fail(text: str) -> None:
    found = parse_cgroup(text)
    assert re.fullmatch(r"[0-9a-f-]{32,36}|", found.pod_uid)
    assert re.fullmatch(r"[0-9a-f-]{39,64}|", found.container_id)
    assert found.runtime in ("", "containerd", "crio", "docker", "podman")
    assert found.qos in ("", "guaranteed", "burstable", "besteffort")
    assert not found.is_hidden or found == CgroupIdentity(is_hidden=True)


@pytest.mark.parametrize(
    "text",
    ["0::/" + "a/" * 2_000_000, "0::/\n" * 1_000_000, "0::/" + "kubepods-" * 400_000, f"0::/{ID}/" * 50_000],
)
def test_a_huge_file_is_read_in_bounded_time(text: str) -> None:
    begin = time.thread_time()  # others on this machine do not count
    parse_cgroup(text)
    parse_mountinfo(text)
    assert time.thread_time() - begin < 4


# --- mounts


@pytest.mark.parametrize(
    ("file", "identity"),
    [
        ("pod-containerd", MountIdentity(UID, "vllm", "", "containerd")),
        ("pod-crio", MountIdentity(UID, "server", "", "crio")),
        ("docker", MountIdentity("", "", ID, "docker")),
        ("docker-own-disk", MountIdentity("", "", ID, "docker")),
        ("podman-rootless", MountIdentity("", "", ID, "podman")),
        ("podman-rootful", MountIdentity("", "", ID, "podman")),
        ("node", MountIdentity()),
        ("storage-plugin-pod", MountIdentity(UID, "vllm", "", "containerd")),
        ("two-pods", MountIdentity()),
    ],
)
def test_mounts_name_the_container_only_when_they_are_its_own(file: str, identity: MountIdentity) -> None:
    assert parse_mountinfo((FIXTURES / "mountinfo" / f"{file}.txt").read_text(encoding="ascii")) == identity


def test_the_real_mounts_of_this_process_can_be_read() -> None:
    parse_mountinfo(Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace"))


mount_words = st.sampled_from(
    [
        *("/", f"pods/{OTHER_UID}/", f"/var/lib/kubelet/pods/{UID}/etc-hosts", "containers/", "vllm", "/x"),
        *(f"containers/{ID}/hosts", f"overlay-containers/{OTHER_ID}/userdata/x"),
        *(" ", "1 2 0:3 ", " /etc/hosts ", " rw - ext4 x", "\n"),
    ]
)


@given(st.one_of(st.text(max_size=300), st.lists(mount_words, max_size=40).map("".join)))
def test_no_text_makes_the_mount_parser_fail(text: str) -> None:
    found = parse_mountinfo(text)
    assert re.fullmatch(r"[0-9a-f-]{32,36}|", found.pod_uid)
    assert re.fullmatch(r"[0-9a-f]{64}|", found.container_id)
    assert re.fullmatch(r"[a-z0-9-]{1,63}|", found.container)


# --- log names


def test_a_container_log_names_pod_namespace_container_and_id() -> None:
    name = f"llm-0.shard-1_team-a_vllm-server-{ID}.log"
    assert parse_container_log(name) == (ID, PodContainer("team-a", "llm-0.shard-1", "vllm-server"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        f"pod_ns_ctr-{ID}",
        f"pod_ns_ctr-{ID[:-9]}.log",  # cut at the file system's 255 characters
        f"pod_ctr-{ID}.log",
        f"pod_ns_x_ctr-{ID}.log",
        f"Pod_ns_ctr-{ID}.log",
        f"pod_ns_-{ID}.log",
        f"{'p' * 254}_ns_ctr-{ID}.log",
        f'pod_n"s_ctr-{ID}.log',
    ],
)
def test_another_file_beside_the_container_logs_is_none(name: str) -> None:
    assert parse_container_log(name) is None


@pytest.mark.parametrize("uid", [UID, STATIC_UID])
def test_a_pod_log_folder_names_namespace_pod_and_uid(uid: str) -> None:
    assert parse_pod_log(f"kube-system_etcd-node.local_{uid}") == (
        uid,
        PodName("kube-system", "etcd-node.local"),
    )


@pytest.mark.parametrize("name", ["", UID, f"ns_{UID}", f"ns_pod_{UID}x", f"n.s_pod_{UID}", "ns_pod_uid"])
def test_another_folder_beside_the_pod_logs_is_none(name: str) -> None:
    assert parse_pod_log(name) is None


# --- the resolver


class CountingProcFs(ProcFs):
    """A procfs that notes what is read."""

    def __init__(self, proc: Path) -> None:
        super().__init__(proc)
        self.reads: list[str] = []
        self.after: dict[str, Any] = {}

    def read(self, pid: int | str, name: str, limit: int) -> bytes | None:
        self.reads.append(name)
        found = super().read(pid, name, limit)
        if name in self.after:
            self.after.pop(name)()
        return found


class Holders:
    def __init__(self, *holders: tuple[str, str, str]) -> None:
        self.holders = holders
        self.asked: list[str] = []

    def workloads_for(self, device_uuid: str, /) -> tuple[tuple[str, str, str], ...]:
        self.asked.append(device_uuid)
        return self.holders


class Node:
    """A machine made of files: `/proc`, `/var/log/containers`, `/var/log/pods`, and a clock."""

    def __init__(self, root: Path) -> None:
        self.now = 1000.0
        self.proc = root / "proc"
        self.container_logs = root / "containers"
        self.pod_logs = root / "pods"
        for folder in (self.proc, self.container_logs, self.pod_logs):
            folder.mkdir()
        self.procfs = CountingProcFs(self.proc)
        self._modified = 1_000_000_000

    def resolver(self, **options: Any) -> WorkloadResolver:
        return WorkloadResolver(
            self.procfs, self.container_logs, self.pod_logs, clock=lambda: self.now, **options
        )

    def process(
        self,
        pid: int,
        cgroup: str | None,
        start: int = 100,
        state: str = "S",
        threads: int = 1,
        name: str = "python3",
        mountinfo: str = "",
    ) -> None:
        folder = self.proc / str(pid)
        folder.mkdir(exist_ok=True)
        tail = TAIL.format(threads=threads, start=start)
        (folder / "stat").write_text(f"{pid} ({name}) {state} {tail}\n")
        (folder / "mountinfo").write_text(mountinfo)
        if cgroup is None:
            (folder / "cgroup").unlink(missing_ok=True)
        else:
            (folder / "cgroup").write_text(f"0::{cgroup}\n")

    def end(self, pid: int) -> None:
        for file in (self.proc / str(pid)).iterdir():
            file.unlink()
        (self.proc / str(pid)).rmdir()

    def container_log(self, pod: str, namespace: str, container: str, container_id: str) -> None:
        # As on a real node the link's target is not mounted here: only the name may be used.
        link = self.container_logs / f"{pod}_{namespace}_{container}-{container_id}.log"
        link.symlink_to("/nowhere/0.log")
        self._touch(self.container_logs)

    def pod_log(self, namespace: str, pod: str, uid: str, *containers: str) -> None:
        for container in containers:
            (self.pod_logs / f"{namespace}_{pod}_{uid}" / container).mkdir(parents=True, exist_ok=True)
        self._touch(self.pod_logs)

    def _touch(self, folder: Path) -> None:
        self._modified += 1_000_000_000
        os.utime(folder, ns=(self._modified, self._modified))

    def workload(self, resolver: WorkloadResolver, pid: int, device: str = "") -> Workload:
        found = resolver.resolve(pid, device)
        assert found is not None
        return found[1]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def pod_path(uid: str = UID, container_id: str = ID) -> str:
    return f"/kubepods.slice/kubepods-pod{uid.replace('-', '_')}.slice/cri-containerd-{container_id}.scope"


def test_a_pods_process_gets_its_names_from_the_container_log_link(node: Node) -> None:
    node.process(7, pod_path(), name="VLLM::EngineCore")
    node.container_log("llm-0", "team-a", "vllm", ID)
    node.container_log("other-0", "team-b", "app", OTHER_ID)
    found = node.resolver().resolve(7)
    assert found is not None
    process, workload = found
    assert (process.pid, process.start_time, process.name) == (7, 100, "VLLM::EngineCore")
    assert workload == Workload("team-a", "llm-0", "vllm", UID, ID, "containerd")
    assert workload.is_pod and workload.is_named and not workload.is_host


def test_a_host_process_has_an_empty_workload(node: Node) -> None:
    node.process(7, "/user.slice/user-1000.slice/session-3.scope")
    workload = node.workload(node.resolver(), 7)
    assert workload == Workload()
    assert workload.is_host and not workload.is_pod and not workload.is_named


def test_a_container_outside_kubernetes_has_an_id_and_a_runtime_only(node: Node) -> None:
    node.process(7, f"/system.slice/docker-{ID}.scope")
    workload = node.workload(node.resolver(), 7)
    assert workload == Workload(container_id=ID, runtime="docker")
    assert not workload.is_host and not workload.is_pod


def test_a_pod_without_names_is_called_by_its_uid(node: Node) -> None:
    node.process(7, pod_path())
    workload = node.workload(node.resolver(), 7)
    assert workload == Workload("", UID, "", UID, ID, "containerd")
    assert workload.is_pod and not workload.is_named


def test_a_process_that_is_gone_or_a_zombie_has_no_workload(node: Node) -> None:
    node.process(7, pod_path(), state="Z")
    node.process(8, pod_path(), state="Z", threads=3)
    resolver = node.resolver()
    assert resolver.resolve(6) is None
    assert resolver.resolve(7) is None
    assert resolver.resolve(8) is not None  # only its main thread has ended


# names from the pod's log folder


def test_without_a_container_log_the_pod_log_folder_gives_the_names(node: Node) -> None:
    node.process(7, pod_path())
    node.pod_log("team-a", "llm-0", UID, "vllm")
    assert node.workload(node.resolver(), 7) == Workload("team-a", "llm-0", "vllm", UID, ID, "containerd")


def test_with_several_containers_in_the_pod_log_folder_the_container_stays_unknown(node: Node) -> None:
    node.process(7, pod_path())
    node.pod_log("team-a", "llm-0", UID, "vllm", "init-model")
    assert node.workload(node.resolver(), 7) == Workload("team-a", "llm-0", "", UID, ID, "containerd")


def test_the_pods_only_container_is_not_guessed_while_it_is_known_under_another_id(node: Node) -> None:
    node.process(7, pod_path())  # the sandbox, or a restart whose link is still to come
    node.pod_log("team-a", "llm-0", UID, "vllm")
    node.container_log("llm-0", "team-a", "vllm", OTHER_ID)
    resolver = node.resolver()
    assert node.workload(resolver, 7).container == ""
    node.container_log("llm-0", "team-a", "vllm", ID)
    node.now += 5
    assert node.workload(resolver, 7).container == "vllm"


def test_a_helper_in_the_pods_control_group_belongs_to_the_pod_but_to_no_container(node: Node) -> None:
    node.process(7, pod_path().replace("cri-containerd", "crio-conmon"))
    node.pod_log("team-a", "llm-0", UID, "vllm")
    assert node.workload(node.resolver(), 7) == Workload("team-a", "llm-0", "", UID)


def test_a_static_pod_is_found_by_its_hash(node: Node) -> None:
    node.process(7, pod_path(uid=STATIC_UID))
    node.pod_log("kube-system", "dcgm-node", STATIC_UID, "dcgm")
    assert node.workload(node.resolver(), 7).pod == "dcgm-node"


def test_log_folders_that_do_not_exist_are_a_problem_only_once_a_pod_was_looked_for(node: Node) -> None:
    node.container_logs.rmdir()
    node.pod_logs.rmdir()
    node.process(7, "/user.slice")
    node.process(8, pod_path())
    resolver = node.resolver()
    node.workload(resolver, 7)
    assert resolver.problems == ()
    assert node.workload(resolver, 8).pod == UID
    assert len(resolver.problems) == 2
    assert str(node.container_logs) in resolver.problems[0] and "No such file" in resolver.problems[0]


# hidden control groups


def test_a_hidden_control_group_is_looked_up_in_the_mounts(node: Node) -> None:
    mounts = (FIXTURES / "mountinfo" / "pod-containerd.txt").read_text()
    node.process(7, "/", mountinfo=mounts)
    node.pod_log("team-a", "llm-0", UID, "vllm", "init-model")
    assert node.workload(node.resolver(), 7) == Workload("team-a", "llm-0", "vllm", UID, "", "containerd")


def test_a_control_group_file_that_cannot_be_read_is_looked_up_in_the_mounts(node: Node) -> None:
    node.process(7, None, mountinfo=(FIXTURES / "mountinfo" / "docker.txt").read_text())
    assert node.workload(node.resolver(), 7) == Workload(container_id=ID, runtime="docker")


def test_the_mounts_of_a_process_with_a_plain_control_group_are_not_read(node: Node) -> None:
    node.process(7, "/user.slice", mountinfo=(FIXTURES / "mountinfo" / "docker.txt").read_text())
    assert node.workload(node.resolver(), 7) == Workload()
    assert "mountinfo" not in node.procfs.reads


def test_a_container_beside_ours_is_named_by_its_id_alone(node: Node) -> None:
    node.process(7, f"/../cri-containerd-{ID}.scope")
    node.container_log("llm-0", "team-a", "vllm", ID)
    assert node.workload(node.resolver(), 7) == Workload("team-a", "llm-0", "vllm", "", ID, "containerd")


# the cache


def test_a_known_process_costs_one_read_of_its_stat(node: Node) -> None:
    node.process(7, pod_path())
    node.container_log("llm-0", "team-a", "vllm", ID)
    resolver = node.resolver()
    first = resolver.resolve(7)
    node.procfs.reads.clear()
    (node.proc / "7" / "cgroup").unlink()
    for _ in range(20):
        node.now += 5
        assert resolver.resolve(7) == first
    assert node.procfs.reads == ["stat"] * 20


def test_a_reused_pid_never_gets_the_old_workload(node: Node) -> None:
    node.process(7, pod_path())
    node.container_log("llm-0", "team-a", "vllm", ID)
    resolver = node.resolver()
    assert node.workload(resolver, 7).pod == "llm-0"
    node.process(7, "/user.slice", start=200)
    assert node.workload(resolver, 7) == Workload()


def test_a_pid_that_changes_hands_between_two_reads_is_given_to_nobody(node: Node) -> None:
    node.process(7, pod_path())
    node.container_log("llm-0", "team-a", "vllm", ID)
    resolver = node.resolver()
    node.procfs.after["stat"] = lambda: node.process(7, f"/system.slice/docker-{OTHER_ID}.scope", start=200)
    assert resolver.resolve(7) is None
    assert node.workload(resolver, 7) == Workload(container_id=OTHER_ID, runtime="docker")


def test_a_process_that_ends_between_two_reads_is_given_to_nobody(node: Node) -> None:
    node.process(7, pod_path())
    resolver = node.resolver()
    node.procfs.after["cgroup"] = lambda: node.end(7)
    assert resolver.resolve(7) is None
    assert len(resolver) == 0


def test_the_name_is_fresh_even_when_the_workload_is_remembered(node: Node) -> None:
    node.process(7, f"/system.slice/docker-{ID}.scope", name="sh")
    resolver = node.resolver()
    resolver.resolve(7)
    node.process(7, f"/system.slice/docker-{ID}.scope", name="vllm")
    found = resolver.resolve(7)
    assert found is not None and found[0].name == "vllm"


def test_names_that_come_a_moment_later_are_found_then(node: Node) -> None:
    node.process(7, pod_path())
    resolver = node.resolver()
    assert not node.workload(resolver, 7).is_named
    node.container_log("llm-0", "team-a", "vllm", ID)
    node.now += 1.9
    assert not node.workload(resolver, 7).is_named
    node.now += 0.2
    assert node.workload(resolver, 7).pod == "llm-0"


def test_a_process_that_its_runtime_moves_into_a_container_is_found_there(node: Node) -> None:
    node.process(7, "/system.slice/containerd.service")
    node.container_log("llm-0", "team-a", "vllm", ID)
    resolver = node.resolver()
    assert node.workload(resolver, 7).is_host
    node.process(7, pod_path())
    node.now += 5
    assert node.workload(resolver, 7).pod == "llm-0"


def test_what_stays_unknown_is_looked_at_ever_more_seldom_but_not_never(node: Node) -> None:
    node.process(7, "/user.slice")
    resolver = node.resolver(retry=2.0, retry_limit=60.0)
    for _ in range(600):
        node.workload(resolver, 7)
        node.now += 1
    # At 0, then after 2, 4, 8, 16, 32 and each 60 seconds: 62 + 60 n < 600.
    assert node.procfs.reads.count("cgroup") == 14


def test_the_least_recently_asked_for_is_forgotten_first(node: Node) -> None:
    for pid in (1, 2, 3):
        node.process(pid, f"/system.slice/docker-{ID}.scope")
    resolver = node.resolver(size=2)
    for pid in (1, 2, 1, 3):
        resolver.resolve(pid)
    assert len(resolver) == 2
    node.procfs.reads.clear()
    resolver.resolve(1)
    assert "cgroup" not in node.procfs.reads
    resolver.resolve(2)
    assert "cgroup" in node.procfs.reads


def test_what_nobody_asks_for_is_forgotten(node: Node) -> None:
    for pid in (1, 2):
        node.process(pid, f"/system.slice/docker-{ID}.scope")
    resolver = node.resolver(idle=60)
    resolver.resolve(1)
    for _ in range(5):
        node.now += 15
        resolver.resolve(2)
    assert len(resolver) == 1


@pytest.mark.parametrize("options", [{"size": 0}, {"retry": 0}, {"retry": 10, "retry_limit": 5}])
def test_settings_that_make_no_sense_are_refused(node: Node, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        node.resolver(**options)


# listing the log folders


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    listed: list[str] = []
    scandir = os.scandir

    def note(path: str | os.PathLike[str]) -> Any:
        listed.append(Path(path).name)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", note)
    return listed


def test_one_listing_serves_all_processes(node: Node, listings: list[str]) -> None:
    ids = [f"{number:064x}" for number in range(200)]
    for pid, container_id in enumerate(ids, 10):
        node.process(pid, pod_path(container_id=container_id))
        node.container_log(f"llm-{pid}", "team-a", "vllm", container_id)
    resolver = node.resolver()
    assert [node.workload(resolver, pid).pod for pid in range(10, 210)] == [
        f"llm-{pid}" for pid in range(10, 210)
    ]
    assert listings == ["containers"]


def test_unknown_ids_cause_at_most_one_listing_a_second(node: Node, listings: list[str]) -> None:
    for pid in range(10, 110):
        node.process(pid, pod_path(container_id=f"{pid:064x}"))
    resolver = node.resolver()
    for pid in range(10, 110):
        node.workload(resolver, pid)
    assert sorted(listings) == ["containers", "pods"]


def test_an_unchanged_folder_is_not_listed_for_ever(node: Node, listings: list[str]) -> None:
    node.process(7, pod_path())
    resolver = node.resolver(retry=1.0, retry_limit=1.0)
    for _ in range(30):
        node.workload(resolver, 7)
        node.now += 2
    # Once more after a change: a link made in the same clock tick leaves the modification time as it was.
    assert sorted(listings) == ["containers", "containers", "pods", "pods"]


def test_a_link_made_in_the_same_tick_as_the_listing_is_found(node: Node) -> None:
    node.process(7, pod_path())
    node.container_log("other-0", "team-b", "app", OTHER_ID)
    before = node.container_logs.stat().st_mtime_ns
    resolver = node.resolver()
    assert not node.workload(resolver, 7).is_named
    node.container_log("llm-0", "team-a", "vllm", ID)
    os.utime(node.container_logs, ns=(before, before))
    node.now += 5
    assert node.workload(resolver, 7).pod == "llm-0"


# pod-resources


def test_a_pod_without_names_is_named_after_the_only_holder_of_its_device(node: Node) -> None:
    node.process(7, pod_path())
    holders = Holders(("team-a", "llm-0", "vllm"))
    resolver = node.resolver(pod_resources=holders)
    assert node.workload(resolver, 7, GPU) == Workload("team-a", "llm-0", "vllm", UID, ID, "containerd")
    assert holders.asked == [GPU]
    assert node.workload(resolver, 7).pod == UID  # the device is not part of who the process is


@pytest.mark.parametrize("holders", [(), (("team-a", "llm-0", "vllm"), ("team-b", "llm-1", "vllm"))])
def test_a_device_with_no_holder_or_several_names_nobody(
    node: Node, holders: tuple[tuple[str, str, str], ...]
) -> None:
    node.process(7, pod_path())
    assert node.workload(node.resolver(pod_resources=Holders(*holders)), 7, GPU).pod == UID


def test_the_holder_of_a_device_gives_the_container_of_the_same_pod(node: Node) -> None:
    node.process(7, pod_path())
    node.pod_log("team-a", "llm-0", UID, "vllm", "sidecar")
    resolver = node.resolver(pod_resources=Holders(("team-a", "llm-0", "vllm")))
    assert node.workload(resolver, 7, GPU).container == "vllm"


def test_the_holder_of_a_device_does_not_rename_another_pod(node: Node) -> None:
    node.process(7, pod_path())
    node.pod_log("team-b", "privileged", UID, "a", "b")
    resolver = node.resolver(pod_resources=Holders(("team-a", "llm-0", "vllm")))
    assert node.workload(resolver, 7, GPU) == Workload("team-b", "privileged", "", UID, ID, "containerd")


def test_a_pod_without_names_is_not_named_after_a_holder_that_has_another_uid(node: Node) -> None:
    node.process(7, pod_path())
    node.pod_log("team-a", "llm-0", OTHER_UID, "vllm")
    resolver = node.resolver(pod_resources=Holders(("team-a", "llm-0", "vllm")))
    assert node.workload(resolver, 7, GPU).pod == UID


@pytest.mark.parametrize("path", ["/user.slice", f"/system.slice/docker-{ID}.scope"])
def test_what_is_no_pod_is_not_named_after_the_holder_of_its_device(node: Node, path: str) -> None:
    node.process(7, path)
    holders = Holders(("team-a", "llm-0", "vllm"))
    assert not node.workload(node.resolver(pod_resources=holders), 7, GPU).is_pod
    assert holders.asked == []


# the real machine


def test_own_process_and_a_forked_child_resolve_alike_on_the_real_procfs() -> None:
    resolver = WorkloadResolver()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        mine, its = resolver.resolve(os.getpid()), resolver.resolve(child)
        assert mine is not None and its is not None
        assert its[0].parent == mine[0].pid
        assert its[0].start_time >= mine[0].start_time
        assert its[1] == mine[1]
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert resolver.resolve(child) is None
    assert resolver.resolve(os.getpid()) == mine
