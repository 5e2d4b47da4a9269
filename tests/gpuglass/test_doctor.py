from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import gpuglass
from exporters.gpu.diagnose import Surroundings, Survey, judge, surroundings
from gpuglass.config import Config, GpuConfig, KubernetesConfig, ServerConfig
from gpuglass.demo.scenario import A100, H200, RTX_4090, Scenario
from gpuglass.doctor import bpf, command, engines, http, listen, processes, prometheus
from gpuglass.doctor.check import Check, Status, exit_code, one_line, summary
from gpuglass.doctor.render import Look, as_json, look, screen
from gpuglass.podresources import Allocation, DeviceKind, PodResourcesError
from gpuglass.procfs import INITIAL_PID_NAMESPACE, ProcFs
from gpuglass.server.address import Address
from tests.fakes.nvml import build
from tests.support.ports import free_port
from tests.support.prometheus import running_prometheus

OK, INFO, WARN, FAIL = Status.OK, Status.INFO, Status.WARN, Status.FAIL
NODE_CONFIG = KubernetesConfig(pod_resources_socket="/none/kubelet.sock", container_logs="/none/containers")


def by_id(checks: list[Check]) -> dict[str, Check]:
    found = {check.id: check for check in checks}
    assert len(found) == len(checks), "two checks of one id"
    return found


# --- a small HTTP server


Reply = tuple[int, str, bytes]


@contextmanager
def serving(
    reply: Callable[[str, Mapping[str, str]], Reply],
    *,
    headers: Mapping[str, str] | None = None,
    name: str = "",
    drip: float = 0.0,
) -> Iterator[int]:
    """A server that answers by path and request headers; `drip` sends a byte of the body so often."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = reply(self.path, dict(self.headers))
            self.send_response_only(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for key, value in ({"Server": name} if name else {}).items():
                self.send_header(key, value)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            try:
                if drip:
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        time.sleep(drip)
                else:
                    self.wfile.write(body)
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def url(port: int, userinfo: str = "") -> http.Url:
    return http.parse_url(f"http://{userinfo}127.0.0.1:{port}")


# --- the command


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("GPUGLASS_", "NVIDIA_"))}


def doctor(
    *arguments: str,
    scenario: Path | None = None,
    old: bool = False,
    program: tuple[str, ...] = ("-m", "gpuglass"),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """`gpuglass doctor` on a free port, with the fake driver or with none."""
    env = clean_environment() | {"GPUGLASS_SERVER_LISTEN": f"127.0.0.1:{free_port()}", "PYTHONUTF8": "1"}
    if scenario is not None:
        env |= {"GPUGLASS_GPU_NVML_LIBRARY": str(build(old=old)), "FAKE_NVML_SCENARIO": str(scenario)}
    return subprocess.run(
        [sys.executable, *program, "doctor", *arguments],
        capture_output=True,
        text=True,
        env=env | environment,
        timeout=60,
    )


def gpu_checks(
    folder: Path, scenario: Scenario, expected: int, old: bool = False
) -> dict[str, dict[str, str]]:
    done = doctor("--json", scenario=scenario.write(folder / "scenario"), old=old)
    assert done.returncode == expected, done.stdout + done.stderr
    return {check["id"]: check for check in json.loads(done.stdout)["checks"] if check["group"] == "gpu"}


def healthy(gpus: int = 8) -> Scenario:
    return Scenario().driver("580.159.03", cuda="13.0").gpus(gpus, H200)


@pytest.mark.needs("cc")
def test_eight_healthy_gpus_are_all_ok(tmp_path: Path) -> None:
    found = gpu_checks(tmp_path, healthy().process(2, 4242, mem_mib=1024), 0)
    assert {check["status"] for check in found.values()} == {"ok"}
    assert found["gpu.devices"]["finding"] == "8 × NVIDIA H200"
    assert found["gpu.driver"]["finding"] == "580.159.03, CUDA 13.0"
    assert found["gpu.library"]["finding"] == str(build())
    assert "1 on a GPU" in found["gpu.processes"]["finding"]
    assert set(found) == {
        *("gpu.library", "gpu.driver", "gpu.devices", "gpu.gpm", "gpu.xid", "gpu.pcie"),
        *("gpu.processes", "gpu.mig", "gpu.ecc"),
    }


@pytest.mark.needs("cc")
def test_an_old_driver_works_with_less(tmp_path: Path) -> None:
    a100 = gpu_checks(tmp_path, Scenario().driver("470.57", cuda="11.4").gpus(2, A100), 0, old=True)
    assert a100["gpu.gpm"]["status"] == "info" and "ampere has no GPM" in a100["gpu.gpm"]["finding"]
    assert a100["gpu.gpm"]["mend"] == ""
    assert a100["gpu.processes"]["status"] == "ok"
    h200 = gpu_checks(tmp_path, Scenario().driver("470.57", cuda="11.4").gpus(2, H200), 0, old=True)
    assert h200["gpu.gpm"]["status"] == "warn" and h200["gpu.gpm"]["mend"] == "install driver 525 or newer"


@pytest.mark.needs("cc")
def test_a_lost_gpu_fails_with_the_reset(tmp_path: Path) -> None:
    found = gpu_checks(tmp_path, healthy(4).gpu(3, lost=1), 1)
    assert found["gpu.down_3"]["status"] == "fail"
    assert "nvidia-smi --gpu-reset -i 3" in found["gpu.down_3"]["mend"]
    assert "gpu.down_2" not in found
    assert found["gpu.devices"]["finding"] == "3 × NVIDIA H200 (3 of 4 answered)"


@pytest.mark.needs("cc")
def test_a_hung_call_does_not_hang_the_doctor(tmp_path: Path) -> None:
    scenario = healthy(4).hang(2, "nvmlDeviceGetEccMode", 600).write(tmp_path / "scenario")
    shorter = (
        "import sys, exporters.gpu.diagnose as room, gpuglass.cli as cli\n"
        "assert room.SECONDS == 10\nroom.SECONDS = 1.5\nsys.exit(cli.main())"
    )
    began = time.monotonic()
    done = doctor("--json", scenario=scenario, program=("-c", shorter))
    assert 1.5 < time.monotonic() - began < 40
    assert done.returncode == 1, done.stderr
    found = {check["id"]: check for check in json.loads(done.stdout)["checks"]}
    assert "a call into the driver did not return within 1.5 s" in found["gpu.hang"]["finding"]
    assert "nvmlDeviceGetEccMode of GPU 2" in found["gpu.hang"]["finding"]
    assert found["gpu.devices"]["finding"] == "2 × NVIDIA H200 (2 of 4 answered)"


@pytest.mark.needs("cc")
def test_what_is_refused_is_named_by_gpu(tmp_path: Path) -> None:
    scenario = (
        healthy(4)
        .gpu(0, mig_mode=1)
        .gpu(2, ecc_mode=0)
        .fail(1, "nvmlGpmSampleGet", "no_permission")
        .fail(3, "nvmlDeviceGetComputeRunningProcesses_v3", "no_permission")
        .gpu(1, event_types=0)
    )
    found = gpu_checks(tmp_path, scenario, 0)
    assert found["gpu.gpm"]["finding"].startswith("GPU 1: no permission")
    assert "NVreg_RestrictProfilingToAdminUsers=0" in found["gpu.gpm"]["mend"]
    assert found["gpu.processes"]["finding"] == "GPU 3: not listed (no permission)"
    assert found["gpu.xid"]["finding"].startswith("GPU 1: cannot be watched")
    assert found["gpu.mig"]["finding"].startswith("GPU 0: on")
    assert "nvidia-smi -i 2 -e 1" in found["gpu.ecc"]["mend"]
    assert found["gpu.pcie"]["status"] == "ok"


@pytest.mark.needs("cc")
def test_a_consumer_card_has_notes_and_no_warnings(tmp_path: Path) -> None:
    found = gpu_checks(tmp_path, Scenario().driver("555.1", cuda="12.5").gpus(1, RTX_4090), 0)
    assert found["gpu.ecc"]["status"] == found["gpu.gpm"]["status"] == "info"
    assert {check["status"] for check in found.values()} == {"ok", "info"}


@pytest.mark.needs("cc")
@pytest.mark.parametrize(
    ("state", "mend"), [("not_loaded", "modprobe nvidia"), ("version_mismatch", "reboot")]
)
def test_a_driver_that_does_not_start_fails(tmp_path: Path, state: str, mend: str) -> None:
    here = Surroundings(hardware=True, device_files=True)
    found = gpu_checks(tmp_path, healthy(1).driver(state=state), 1)
    assert list(found) == ["gpu.driver"]
    reason = "driver_not_loaded" if state == "not_loaded" else state
    assert mend in judge(Survey(error=(reason, "NVML does not start")), here)[0].mend


def test_no_library_at_the_configured_path_fails() -> None:
    done = doctor("--json", GPUGLASS_GPU_NVML_LIBRARY="/nowhere/libnvidia-ml.so.1")
    check = next(c for c in json.loads(done.stdout)["checks"] if c["id"] == "gpu.library")
    assert done.returncode == 1 and check["status"] == "fail" and "gpu.nvml_library" in check["mend"]


def test_gpus_switched_off_are_no_problem() -> None:
    done = doctor(
        "--json", GPUGLASS_GPU_ENABLED="false", GPUGLASS_GPU_NVML_LIBRARY="/nowhere/libnvidia-ml.so.1"
    )
    assert done.returncode == 0 and '"gpu.enabled"' in done.stdout and '"gpu.library"' not in done.stdout


MISSING = Survey(error=("library_not_found", "libnvidia-ml.so.1: cannot open; install the NVIDIA driver"))


@pytest.mark.parametrize(
    ("here", "status", "mend"),
    [
        (Surroundings(), WARN, "gpu.enabled: false"),
        (Surroundings(container=True, visible_devices="void"), WARN, "gpu.enabled: false"),
        (Surroundings(hardware=True), FAIL, "install NVIDIA's driver"),
        (Surroundings(hardware=True, container=True), FAIL, "--gpus all"),
        (
            Surroundings(container=True, visible_devices="all", capabilities="compute"),
            FAIL,
            "set NVIDIA_DRIVER_CAPABILITIES=utility in the container",
        ),
        (
            Surroundings(container=True, visible_devices="all", capabilities="compute,utility"),
            FAIL,
            "runtimeClassName: nvidia",
        ),
    ],
)
def test_a_missing_library_fails_only_where_a_gpu_is_expected(
    here: Surroundings, status: Status, mend: str
) -> None:
    (check,) = judge(MISSING, here)
    assert check.status is status and mend in check.mend


def test_a_gpu_is_seen_on_the_pci_bus(tmp_path: Path) -> None:
    device = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    assert surroundings(Config(), {}, tmp_path).asked
    (device / "class").write_text("0x020700\n")  # a network card
    assert not surroundings(Config(), {}, tmp_path).asked
    assert surroundings(Config(gpu=GpuConfig(nvml_library="/x")), {}, tmp_path).asked


def test_no_gpus_in_a_driver_that_works_fail() -> None:
    checks = by_id(judge(Survey(library="/x", driver="580", count=0), Surroundings(hardware=True)))
    assert checks["gpu.devices"].status is FAIL and "lspci" in checks["gpu.devices"].mend


# --- exit codes, JSON, screen


def test_wrong_usage_and_configuration_give_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("gpu: {interval: soon}\n")
    for arguments in (
        ("--config", str(tmp_path / "bad.yaml")),
        ("--config", str(tmp_path / "none.yaml")),
        ("--prometheus", "ftp://reader:hunter2@host"),
        ("--prometheus", "http://reader:hun/ter2@host:1"),
        ("--prometheus", "host:9090"),
    ):
        done = doctor(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
        assert "ter2" not in done.stderr
    assert doctor(GPUGLASS_SERVER_LISTEN="nonsense").returncode == 2


def test_json_has_stable_keys() -> None:
    document = json.loads(doctor("--json", GPUGLASS_GPU_ENABLED="false").stdout)
    assert set(document) == {"version", "checks", "summary"}
    assert set(document["summary"]) == {"ok", "info", "warn", "fail"}
    assert sum(document["summary"].values()) == len(document["checks"])
    for check in document["checks"]:
        assert set(check) == {"id", "group", "title", "status", "finding", "mend"}
        assert check["status"] != "ok" or check["mend"] == ""


def on_terminal(**environment: str) -> str:
    main, terminal = pty.openpty()
    env = (
        clean_environment()
        | {"GPUGLASS_GPU_ENABLED": "false", "TERM": "xterm", "PYTHONUTF8": "1"}
        | environment
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpuglass", "doctor"], stdout=terminal, stdin=terminal, env=env
        )
        os.close(terminal)
        chunks = []
        try:
            while chunk := os.read(main, 65536):
                chunks.append(chunk)
        except OSError:  # EIO: the other side is closed
            pass
        process.wait(20)
    finally:
        os.close(main)
    return b"".join(chunks).decode()


def test_colours_are_for_terminals_only() -> None:
    plain = {"NO_COLOR": ""}
    assert "\033[" in on_terminal(**plain)
    assert "\033[" not in on_terminal(NO_COLOR="1")
    assert "\033[" not in on_terminal(**plain, TERM="dumb")
    assert "\033[" not in doctor(GPUGLASS_GPU_ENABLED="false").stdout


def test_another_encoding_gets_ascii() -> None:
    done = doctor(
        GPUGLASS_GPU_NVML_LIBRARY="/nowhere/lib", PYTHONUTF8="0", PYTHONIOENCODING="latin-1", LC_ALL="C"
    )
    assert done.stdout.isascii() and "x NVML library" in done.stdout and "-> " in done.stdout
    assert "✗ NVML library" in doctor(GPUGLASS_GPU_NVML_LIBRARY="/nowhere/lib").stdout


def test_lines_fit_and_mends_stand_below() -> None:
    checks = [
        Check("gpu.a", "first", OK, "fine"),
        Check("gpu.b", "second", FAIL, "word " * 60, "command " * 40),
        Check("zoo.c", "third", WARN, "x" * 300, "y"),
    ]
    lines = screen(checks, Look())
    assert max(map(len, lines)) <= 100
    assert lines[:2] == ["GPU", "  ✓ first   fine"]
    assert any(line.startswith(" " * 12 + "→ command") for line in lines)
    assert lines[-1] == "1 ok, 1 warning, 1 problem"
    assert "Zoo" in lines and lines.index("Zoo") > lines.index("GPU")
    assert max(map(len, screen(checks, Look(width=60)))) <= 60


def test_the_look_follows_the_output() -> None:
    assert look(300, True, "UTF-8", {}) == Look(100, True, True)
    assert look(72, True, "utf8", {"NO_COLOR": "1"}) == Look(72, False, True)
    assert look(20, False, "ANSI_X3.4-1968", {}) == Look(100, False, False)


def test_only_a_failure_gives_1() -> None:
    fine = [Check("a.b", "t", status, "f") for status in (OK, INFO, WARN)]
    assert exit_code(fine) == 0 and exit_code([*fine, Check("a.c", "t", FAIL, "f")]) == 1
    assert summary(fine) == {"ok": 1, "info": 1, "warn": 1, "fail": 0}
    assert json.loads(as_json(fine))["summary"]["warn"] == 1


def test_text_of_others_cannot_write_to_the_terminal() -> None:
    check = Check("a.b", "t", WARN, "red \033[31m\nnew line\r\u202e" + "z" * 900, "m\x07")
    assert check.finding.isprintable() and len(check.finding) == 500 and check.mend == "m"
    assert one_line("as it was") == "as it was"


def test_a_check_is_declared_well() -> None:
    with pytest.raises(ValueError, match=r"group\.name"):
        Check("nogroup", "t", OK, "f")
    with pytest.raises(ValueError, match="has a mend"):
        Check("a.b", "t", OK, "f", "do this")


def test_a_room_that_breaks_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, name: str, diagnose: Callable[[Config], list[Check]]) -> None:
            self.name, self._diagnose = name, diagnose

        def load(self) -> Callable[[Config], list[Check]]:
            return self._diagnose

    def broken(_: Config) -> list[Check]:
        raise KeyError("x")

    entries = [Entry("zoo", lambda _: [Check("zoo.a", "t", OK, "f")]), Entry("ape", broken)]
    monkeypatch.setattr(command, "entry_points", lambda group: entries)
    checks = by_id(command.of_rooms(Config()))
    assert checks["ape.diagnosis"].status is FAIL and "KeyError" in checks["ape.diagnosis"].finding
    assert checks["zoo.a"].status is OK


# --- processes and pods


def proc_tree(root: Path, **own: str | bytes) -> ProcFs:
    """A procfs whose `self` has the given files; `pid_ns` is the namespace's inode."""
    folder = root / "self"
    (folder / "ns").mkdir(parents=True)
    (folder / "ns/pid").symlink_to(f"pid:[{own.pop('pid_ns', INITIAL_PID_NAMESPACE)}]")
    for name, content in own.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (root / "1").mkdir()
    (root / "1/stat").write_text("1 (init) S 0")
    return ProcFs(root)


def test_host_pids(tmp_path: Path) -> None:
    host = processes.host_pids(proc_tree(tmp_path / "host"))
    private = processes.host_pids(proc_tree(tmp_path / "pod", pid_ns="4026532000"))
    nothing = processes.host_pids(ProcFs(tmp_path / "none"))
    assert host.status is OK
    assert private.status is WARN and "hostPID: true" in private.mend and "--pid=host" in private.mend
    assert nothing.status is WARN and nothing.mend.startswith("proc: ")
    (tmp_path / "host/1/stat").unlink()
    assert "hidepid=0" in processes.host_pids(ProcFs(tmp_path / "host")).mend


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ("0::/user.slice\n", "version 2"),
        ("4:memory:/x\n1:name=systemd:/\n", "version 1"),
        ("4:memory:/x\n0::/x\n", "version 1 and 2 (hybrid)"),
    ],
)
def test_cgroup_versions(tmp_path: Path, content: str, finding: str) -> None:
    check = processes.cgroup(proc_tree(tmp_path, cgroup=content))
    assert check.status is OK and check.finding == finding


def test_no_cgroup_is_a_warning(tmp_path: Path) -> None:
    assert processes.cgroup(proc_tree(tmp_path)).status is WARN


def test_outside_kubernetes_pods_are_a_note(tmp_path: Path) -> None:
    proc = proc_tree(tmp_path, cgroup="0::/")
    assert by_id(processes.checks(proc, NODE_CONFIG, {}))["processes.pods"].status is INFO
    in_pod = by_id(processes.checks(proc, NODE_CONFIG, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}))
    assert "hostPath" in in_pod["processes.pod_resources"].mend
    assert "hostPath" in in_pod["processes.container_logs"].mend
    assert "processes.pods" not in in_pod


def test_the_kubelets_answer() -> None:
    socket = Path("/var/lib/kubelet/pod-resources/kubelet.sock")

    def held(pod: str, device: str) -> Allocation:
        return Allocation("ns", pod, "vllm", "nvidia.com/gpu", device, DeviceKind.GPU)

    def failing(text: str) -> Check:
        def ask() -> tuple[Allocation, ...]:
            raise PodResourcesError(text)

        return processes.pod_resources(socket, ask)

    ok = processes.pod_resources(socket, lambda: (held("a", "GPU-1"), held("a", "GPU-2"), held("b", "GPU-3")))
    assert ok.status is OK and ok.finding.endswith("3 GPUs given to 2 containers")
    extra = failing(
        f"{socket} needs Python packages that are missing (grpc): pip install 'gpuglass[kubernetes]'"
    )
    assert extra.status is WARN and extra.mend == "pip install 'gpuglass[kubernetes]'"
    assert "pip" not in extra.finding
    assert "root" in failing(f"{socket}: cannot connect: Permission denied").mend
    assert failing(f"{socket}: no answer within 2 s").mend == "look after the kubelet: journalctl -u kubelet"


def test_container_links(tmp_path: Path) -> None:
    (tmp_path / "a_ns_c-1.log").touch()
    assert processes.container_logs(tmp_path).finding.endswith("names 1 container")
    assert processes.container_logs(tmp_path / "none").status is WARN


# --- BPF


FULL = b"Name:\tx\nCapEff:\t000001ffffffffff\n"
NONE = b"Name:\tx\nCapEff:\t0000000000000000\n"
NEW = bpf.Kernel("6.18.44-generic", 8 << 20)


def test_bpf_on_a_machine_that_has_all(tmp_path: Path) -> None:
    for path in (
        "lib/modules/6.18.44-generic/build",
        "usr/lib/python3/dist-packages/bcc/__init__.py",
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    proc = proc_tree(tmp_path / "proc", status=FULL)
    checks = by_id(bpf.checks(tmp_path, proc, NEW))
    assert {check.status for check in checks.values()} == {OK}
    assert "bpf.memlock" not in checks


def test_bpf_on_a_machine_that_has_nothing_never_fails(tmp_path: Path) -> None:
    proc = proc_tree(tmp_path / "proc", status=NONE)
    checks = by_id(bpf.checks(tmp_path, proc, bpf.Kernel("4.18.0", 64 << 10)))
    lockdown = checks.pop("bpf.lockdown")
    assert lockdown.status is OK
    assert {check.status for check in checks.values()} == {INFO}
    assert all(check.mend for check in checks.values())
    assert checks["bpf.bcc"].mend == "apt-get install python3-bpfcc"
    assert "linux-headers-4.18.0" in checks["bpf.headers"].mend
    assert "CAP_SYS_ADMIN" in checks["bpf.rights"].finding and "64 KiB" in checks["bpf.memlock"].finding


@pytest.mark.parametrize(
    ("bits", "release", "missing"),
    [
        ((bpf.CAP_BPF, bpf.CAP_PERFMON, bpf.CAP_SYS_PTRACE), "5.15", ()),
        ((bpf.CAP_SYS_ADMIN, bpf.CAP_SYS_PTRACE), "5.4", ()),
        ((bpf.CAP_BPF, bpf.CAP_PERFMON, bpf.CAP_SYS_PTRACE), "5.4", ("CAP_SYS_ADMIN",)),
        ((bpf.CAP_BPF, bpf.CAP_SYS_PTRACE), "5.15", ("CAP_PERFMON",)),
        ((bpf.CAP_BPF, bpf.CAP_PERFMON), "5.15", ("CAP_SYS_PTRACE",)),
    ],
)
def test_rights(bits: tuple[int, ...], release: str, missing: tuple[str, ...]) -> None:
    effective = sum(1 << bit for bit in bits)
    check = bpf.rights(f"CapEff:\t{effective:016x}\n".encode(), bpf.Kernel(release, -1))
    assert check.status is (INFO if missing else OK)
    assert all(name in check.finding for name in missing)


def test_lockdown() -> None:
    assert bpf.lockdown("none integrity [confidentiality]\n").status is WARN
    assert bpf.lockdown("none [integrity] confidentiality\n").finding == "integrity"


def test_headers_of_another_kernel_do(tmp_path: Path) -> None:
    (tmp_path / "usr/src/linux-headers-6.1.0-1-amd64").mkdir(parents=True)
    check = bpf.headers(tmp_path, "6.18")
    assert check.status is OK and "another kernel" in check.finding


def test_the_unrelated_bcc_is_told(tmp_path: Path) -> None:
    package = tmp_path / "site-packages/bcc"
    package.mkdir(parents=True)
    assert bpf.unrelated_bcc([str(package)]) == str(package)
    check = bpf.bcc(tmp_path, str(package))
    assert check.status is WARN and check.mend.startswith("pip uninstall bcc")
    (package / "libbcc.py").touch()
    assert bpf.unrelated_bcc([str(package)]) == ""


# --- engines


SECRET = "sk-very-secret"


@pytest.mark.parametrize(
    ("line", "port", "model"),
    [
        ("vllm serve Qwen/Qwen3-8B --port 9001", 9001, "Qwen3-8B"),
        ("/opt/bin/python3.12 /opt/bin/vllm serve --model=/models/llama --port=80", 80, "llama"),
        ("python -m vllm.entrypoints.openai.api_server --model s3://k:sk-very-secret@b/m1", 8000, "m1"),
        ("python -u -m vllm.entrypoints.cli.main serve org/m --api-key sk-very-secret", 8000, "m"),
        ("vllm serve --api-key sk-very-secret", 8000, ""),
        ("vllm serve https://h/m?token=sk-very-secret", 8000, ""),
        ("vllm serve m --port sk-very-secret", 8000, "m"),
    ],
)
def test_servers_are_known_without_their_secrets(line: str, port: int, model: str) -> None:
    server = engines.parse_server(7, line.split(" "))
    assert server is not None and (server.port, server.model) == (port, model)
    assert SECRET not in repr(server)


@pytest.mark.parametrize("line", ["vim vllm serve", "vllm bench serve", "python serve.py", "sh -c vllm", ""])
def test_other_command_lines_are_none(line: str) -> None:
    assert engines.parse_server(7, line.split(" ")) is None


def test_engines_in_proc(tmp_path: Path) -> None:
    root = tmp_path / "proc"
    (root / "self/ns").mkdir(parents=True)
    (root / "self/ns/net").symlink_to("net:[1]")
    lines = {
        10: b"vllm\0serve\0org/m\0",
        11: b"VLLM::EngineCore_DP0" + b"\0" * 40,
        12: b"VLLM::Worker_TP0\0",
        13: b"VLLM::Worker_TP1\0",
        14: b"",
        15: b"vllm\0serve\0other\0--host\00010.0.0.1\0",
        16: b"vllm\0serve\0far\0",
        17: b"\xff\xfe\0",
    }
    for pid, line in lines.items():
        (root / f"{pid}/ns").mkdir(parents=True)
        (root / f"{pid}/cmdline").write_bytes(line)
        (root / f"{pid}/ns/net").symlink_to("net:[2]" if pid == 16 else "net:[1]")
    found = engines.find(ProcFs(root))
    assert [(server.model, server.on_loopback, server.own_network) for server in found.servers] == [
        ("m", True, True),
        ("other", False, True),
        ("far", True, False),
    ]
    assert found.others == Counter(EngineCore=1, Worker=2)
    assert engines.find(ProcFs(tmp_path / "none")) == engines.Engines((), Counter())


def test_servers_are_asked_on_loopback_only() -> None:
    def fetch(at: http.Url) -> http.Answer:
        return http.get(at, "/metrics", seconds=1)

    text = b'# HELP vllm:x y\nvllm:num_requests_running{a="b"} 1\nvllm:y 2\npython_z 3\n'
    with serving(lambda path, _: (200, "text/plain", text)) as port:
        servers = (
            engines.Server(1, port, "m"),
            engines.Server(2, free_port(), "m"),
            engines.Server(3, port, "m", on_loopback=False),
            engines.Server(4, port, "m", own_network=False),
        )
        checks = engines.checks(engines.Engines(servers, Counter(Worker=2)), fetch)
    assert [check.status for check in checks] == [OK, WARN, INFO, INFO, OK]
    assert checks[0].finding == f"vllm m (pid 1, port {port}): /metrics answers, 2 series"
    assert "curl" in checks[1].mend and checks[4].finding == "2 × Worker"
    assert engines.checks(engines.Engines((), Counter()), fetch)[0].status is INFO


def test_a_server_without_our_series_is_a_warning() -> None:
    def fetch(status: int) -> engines.Fetch:
        return lambda _: http.Answer(status, "text/plain", "", b"python_z 3\n")

    found = engines.Engines((engines.Server(1, 8000),), Counter())
    assert "no series of vLLM" in engines.checks(found, fetch(200))[0].finding
    assert "status 404" in engines.checks(found, fetch(404))[0].finding


# --- our own address


def own(
    server: ServerConfig, answers: Mapping[str, http.Answer] | None = None, problem: str = ""
) -> dict[str, Check]:
    def fetch(_: http.Url, path: str) -> http.Answer:
        if answers is None:
            raise http.NoAnswer("no answer within 2 s")
        return answers[path]

    return by_id(listen.checks(server, fetch, lambda _: problem))


def agent_answers(version: str, ready: int = 200, text: bytes = b"ok", metrics: int = 200) -> dict[str, Any]:
    body = (
        f'gpuglass_agent_build_info{{version="{version}",python="3.11"}} 1\n'
        'gpuglass_agent_series{tier="fast"} 40\ngpuglass_agent_series{tier="slow"} 160.0\n'
    ).encode()
    return {
        "/readyz": http.Answer(ready, "text/plain", "gpuglass", text),
        "/metrics/slow": http.Answer(metrics, "text/plain", "gpuglass", body if metrics == 200 else b""),
    }


def test_our_address() -> None:
    config = ServerConfig()
    name = "monitoring.listen"
    free = own(config)[name]
    assert free.status is INFO and free.mend == "gpuglass agent"
    running = own(config, agent_answers(gpuglass.__version__), listen.IN_USE)[name]
    assert running.status is OK and running.finding.endswith(f"agent {gpuglass.__version__}, 200 series")
    older = own(config, agent_answers("0.0.1"), listen.IN_USE)[name]
    assert older.status is WARN and "restart" in older.mend
    waiting = own(config, agent_answers(gpuglass.__version__, 503, b"gpu: no driver"), listen.IN_USE)[name]
    assert waiting.status is WARN and "not ready: gpu: no driver" in waiting.finding
    locked = own(config, agent_answers("", metrics=401), listen.IN_USE)[name]
    assert locked.status is OK and "password" in locked.finding
    other = own(config, {"/readyz": http.Answer(200, "", "nginx/1.2", b"")}, listen.IN_USE)[name]
    assert other.status is FAIL and "nginx/1.2" in other.finding and "ss -ltnp" in other.mend
    silent = own(config, None, listen.IN_USE)[name]
    assert silent.status is FAIL
    foreign = own(config, None, "Cannot assign requested address")[name]
    assert foreign.status is FAIL and "cannot assign" in foreign.finding


@pytest.mark.parametrize("address", ["0.0.0.0:9955", "[::]:9955", ":9955"])
def test_all_addresses_without_a_web_config_are_a_warning(address: str, tmp_path: Path) -> None:
    assert own(ServerConfig(listen=address))["monitoring.exposure"].status is WARN
    web = tmp_path / "web.yaml"
    web.write_text("{}\n")
    assert "monitoring.exposure" not in own(ServerConfig(listen=address, web_config_file=str(web)))
    assert "monitoring.exposure" not in own(ServerConfig())


def test_a_bad_web_config_fails(tmp_path: Path) -> None:
    web = tmp_path / "web.yaml"
    web.write_text("nonsense: 1\n")
    assert own(ServerConfig(web_config_file=str(web)))["monitoring.web_config"].status is FAIL


def test_what_the_kernel_says_of_an_address() -> None:
    with serving(lambda path, _: (200, "", b"")) as port:
        assert listen.why_not_bindable(Address("127.0.0.1", port)) == listen.IN_USE
        assert listen.why_not_bindable(Address("", port)) == listen.IN_USE
    assert listen.why_not_bindable(Address("127.0.0.1", port)) == ""
    assert listen.why_not_bindable(Address("192.0.2.1", 9955)) not in ("", listen.IN_USE)


# --- HTTP


def test_credentials_go_to_the_server_and_nowhere_else() -> None:
    at = http.parse_url("http://reader:p%40ss@prom.example:9090/prefix/")
    assert str(at) == "http://prom.example:9090/prefix" and at.authorization.startswith("Basic ")
    assert "p@ss" not in repr(at) and at.authorization not in repr(at)
    seen: list[str] = []

    def reply(_: str, headers: Mapping[str, str]) -> Reply:
        seen.append(headers.get("Authorization", ""))
        return 200, "text/plain", b"x"

    with serving(reply) as port:
        http.get(url(port, "reader:p%40ss@"), "/")
        http.get(url(port), "/")
    assert seen == [at.authorization, ""]


@pytest.mark.parametrize("text", ["", "prom:9090", "ftp://h", "http://", "http://h:port", "http://[::1"])
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(http.UrlError):
        http.parse_url(text)


def test_redirects_stay_at_home() -> None:
    reached: list[str] = []

    def count(path: str, _: Mapping[str, str]) -> Reply:
        reached.append(path)
        return 200, "", b""

    with (
        serving(count) as other,
        serving(lambda *_: (302, "", b""), headers={"Location": f"http://127.0.0.1:{other}/x"}) as port,
        serving(lambda *_: (302, "", b""), headers={"Location": "http://login.example/?next=1"}) as away,
        serving(lambda *_: (302, "", b""), headers={"Location": "/round"}) as circle,
    ):
        with pytest.raises(http.NoAnswer, match="another place"):
            http.get(url(port), "/a")
        with pytest.raises(http.NoAnswer, match=r"login\.example"):
            http.get(url(away), "/a")
        with pytest.raises(http.NoAnswer, match="circle"):
            http.get(url(circle), "/a")
    assert reached == []


def test_a_redirect_on_the_same_host_is_followed() -> None:
    def reply(path: str, _: Mapping[str, str]) -> Reply:
        return (200, "text/plain", b"here") if path == "/prom/a?q=1" else (301, "", b"")

    with serving(reply, headers={"Location": "/prom/a?q=1"}) as port:
        assert http.get(url(port), "/a").body == b"here"


def test_answers_are_bounded_in_time_and_size() -> None:
    with serving(lambda *_: (200, "", b"x" * 1000)) as port:
        assert http.get(url(port), "/", limit=1000).complete
        cut = http.get(url(port), "/", limit=999)
        assert not cut.complete and len(cut.body) == 999
    began = time.monotonic()
    with (
        serving(lambda *_: (200, "", b"x" * 200), drip=0.1) as port,
        pytest.raises(http.NoAnswer, match=r"within 0\.5 s"),
    ):
        http.get(url(port), "/", seconds=0.5)
    assert time.monotonic() - began < 15, "all of it takes 20 s"


def test_why_there_is_no_answer() -> None:
    with pytest.raises(http.NoAnswer) as refused:
        http.get(url(free_port()), "/")
    assert refused.value.refused
    with serving(lambda *_: (200, "", b"")) as port, pytest.raises(http.NoAnswer, match="TLS") as plain:
        http.get(http.parse_url(f"https://127.0.0.1:{port}"), "/")
    assert not plain.value.refused


# --- Prometheus


def prom(port: int, userinfo: str = "", seconds: float = 3.0) -> dict[str, Check]:
    at = url(port, userinfo)
    return by_id(prometheus.checks(at, lambda path: http.get(at, path, seconds=seconds), "127.0.0.1:9955"))


def target(path: str, job: str = "gpuglass", **more: Any) -> dict[str, Any]:
    return {
        "scrapeUrl": f"http://node:9955{path}",
        "labels": {"job": job},
        "health": "up",
        "lastError": "",
        "scrapeInterval": "1s" if path.endswith("fast") else "15s",
    } | more


PAIR = [target("/metrics/fast", "fast"), target("/metrics/slow", "slow")]
SEEN = [
    {"metric": {"__name__": "gpuglass_gpu_up", "job": "fast"}, "value": [1, "8"]},
    {"metric": {"__name__": "gpuglass_agent_build_info", "job": "slow"}, "value": [1, "1"]},
]


def api(
    version: str = "2.53.1",
    features: str = "exemplar-storage",
    targets: list[dict[str, Any]] | None = None,
    seen: list[dict[str, Any]] | None = None,
    missing: tuple[str, ...] = (),
) -> Callable[[str, Mapping[str, str]], Reply]:
    data = {
        "query": {"resultType": "vector", "result": SEEN if seen is None else seen},
        "status/buildinfo": {"version": version},
        "status/flags": {"enable-feature": features, "web.enable-lifecycle": "false"},
        "targets": {"activeTargets": PAIR if targets is None else targets},
    }

    def reply(path: str, _: Mapping[str, str]) -> Reply:
        name = path.partition("?")[0].removeprefix("/api/v1/")
        if name in missing or name not in data:
            return 404, "text/plain", b"404 page not found"
        return 200, "application/json", json.dumps({"status": "success", "data": data[name]}).encode()

    return reply


def test_a_good_prometheus_is_all_ok() -> None:
    with serving(api()) as port:
        checks = prom(port)
    assert {check.status for check in checks.values()} == {OK}
    assert checks["monitoring.prometheus"].finding.endswith("version 2.53.1")
    assert checks["monitoring.scraping"].finding == "8 GPUs of 1 agent, job fast, slow"
    assert checks["monitoring.endpoints"].finding == "/metrics/fast and /metrics/slow"


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.42.0+ds", OK), ("3.5.0", OK), ("2.41.0", WARN), ("1.8", WARN), ("main", OK)],
)
def test_versions(version: str, status: Status) -> None:
    with serving(api(version)) as port:
        assert prom(port)["monitoring.prometheus"].status is status


@pytest.mark.parametrize(
    ("features", "status"),
    [
        ("native-histograms,exemplar-storage", OK),
        ("", WARN),
        ("no-exemplar-storage", WARN),
    ],
)
def test_exemplar_storage(features: str, status: Status) -> None:
    with serving(api(features=features)) as port:
        check = prom(port)["monitoring.exemplars"]
    assert check.status is status
    assert (status is OK) != ("--enable-feature=exemplar-storage" in check.mend)


def test_double_and_half_scrapes_are_warned_of() -> None:
    def endpoints(*targets: dict[str, Any]) -> Check:
        with serving(api(targets=list(targets))) as port:
            return prom(port)["monitoring.endpoints"]

    assert endpoints(*PAIR).status is OK
    assert endpoints(target("/metrics")).status is OK
    both = endpoints(target("/metrics"), *PAIR)
    assert both.status is WARN and "twice" in both.finding
    twice = endpoints(target("/metrics", "fast"), target("/metrics", "slow"))
    assert twice.status is WARN and "2 targets" in twice.finding
    half = endpoints(PAIR[0])
    assert half.status is WARN and "/metrics/slow" in half.mend
    apart = endpoints(target("/metrics"), target("/metrics", scrapeUrl="http://other:9955/metrics"))
    assert apart.status is OK


@pytest.mark.parametrize(
    ("interval", "status"), [("1s", OK), ("500ms", OK), ("15s", INFO), ("1m30s", WARN), ("", INFO)]
)
def test_scrape_intervals(interval: str, status: Status) -> None:
    with serving(api(targets=[target("/metrics/fast", scrapeInterval=interval), PAIR[1]])) as port:
        assert prom(port)["monitoring.interval"].status is status


def test_an_agent_that_is_not_scraped_fails_with_the_job_to_add() -> None:
    elsewhere = target("/metrics", "node", scrapeUrl="http://node:9100/metrics")
    with serving(api(seen=[], targets=[elsewhere])) as port:
        check = prom(port)["monitoring.scraping"]
    assert check.status is FAIL and "metrics_path: /metrics/fast" in check.mend
    assert "targets: ['127.0.0.1:9955']" in check.mend


def test_targets_that_are_down_are_told_without_their_credentials() -> None:
    down = target("/metrics/fast", health="down", lastError='Get "http://u:hunter2@node:9955/": refused')
    with serving(api(seen=[], targets=[down])) as port:
        check = prom(port)["monitoring.scraping"]
    assert check.status is FAIL and "refused" in check.finding and "hunter2" not in check.finding
    with serving(api(targets=[down, PAIR[1]])) as port:
        assert prom(port)["monitoring.scraping"].status is WARN


def test_agents_without_gpus_are_a_warning() -> None:
    with serving(api(seen=SEEN[1:])) as port:
        assert "none shows a GPU" in prom(port)["monitoring.scraping"].finding


def test_a_compatible_server_without_the_other_paths_is_enough() -> None:
    with serving(api(missing=("status/buildinfo", "status/flags", "targets"))) as port:
        checks = prom(port)
    assert set(checks) == {"monitoring.prometheus", "monitoring.scraping"}
    assert {check.status for check in checks.values()} == {OK}


def test_what_is_no_prometheus_fails_in_one_line() -> None:
    def only(port: int, **more: Any) -> Check:
        (check,) = prom(port, **more).values()
        assert check.status is FAIL and check.mend
        return check

    with serving(lambda *_: (200, "text/html; charset=utf-8", b"<html>Grafana</html>")) as port:
        assert "status 200, text/html" in only(port).finding
    with serving(lambda *_: (401, "text/plain", b"no")) as port:
        check = only(port, userinfo="reader:hunter2@")
        assert "401" in check.finding and "hunter2" not in check.finding + check.mend
    with serving(api(), drip=0.2) as port:
        assert "no answer within 0.5 s" in only(port, seconds=0.5).finding
    with serving(lambda *_: (200, "application/json", b'{"status":"error","error":"bad\\nquery"}')) as port:
        assert "bad query" in only(port).finding
    with serving(lambda *_: (200, "application/json", b"[" * 100_000)) as port:
        only(port)
    assert "refused" in only(free_port()).finding


@pytest.mark.parametrize(
    "data", [None, [], "x", {"result": None}, {"result": [1, {"metric": 2, "value": 3}]}]
)
def test_answers_of_any_shape_are_survived(data: object) -> None:
    assert prometheus.parse_jobs(data) == {}
    assert prometheus.parse_targets(data) == []
    assert prometheus.exemplars(data).status is WARN
    assert prometheus.parse_targets({"activeTargets": [None, {"scrapeUrl": "http://[x"}]}) == [
        prometheus.Target("", "", "", True, "", None)
    ]


def test_the_command_fails_for_a_prometheus_that_was_asked_for() -> None:
    port = free_port()
    off = {"GPUGLASS_GPU_ENABLED": "false"}
    done = doctor("--prometheus", f"http://reader:hunter2@127.0.0.1:{port}", **off)
    assert done.returncode == 1 and f"http://127.0.0.1:{port}: connection refused" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr
    with serving(api()) as port:
        assert doctor("--prometheus", f"http://127.0.0.1:{port}", **off).returncode == 0


@pytest.mark.needs("debian-prometheus")
def test_with_a_real_prometheus(debian_prometheus: Path, tmp_path: Path) -> None:
    body = b"# TYPE gpuglass_gpu_up gauge\ngpuglass_gpu_up 1\n"
    with serving(lambda *_: (200, "text/plain; version=0.0.4", body)) as port:
        jobs = [
            {
                "job_name": path.strip("/").replace("/", "-"),
                "metrics_path": path,
                "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
            }
            for path in ("/metrics/fast", "/metrics")
        ]
        with running_prometheus(debian_prometheus, jobs, tmp_path) as server:
            server.wait_for("count(gpuglass_gpu_up) == 2")
            checks = prom(int(server.url.rpartition(":")[2]))
    # A program that was built without its release's flags tells no version.
    assert re.search(r"version 2\.42|no version|version 3\.", checks["monitoring.prometheus"].finding)
    assert checks["monitoring.exemplars"].status is OK
    assert checks["monitoring.scraping"].finding == "2 GPUs of 1 agent, job metrics, metrics-fast"
    assert checks["monitoring.interval"].finding.endswith("each 1 s")
    assert "twice" in checks["monitoring.endpoints"].finding
