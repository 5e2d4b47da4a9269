"""`gpuglass cuda-tracer` as its users run it: what it serves, what it tells the agent, how it refuses and
ends."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ebpf import gate, kernel
from ebpf.layout import map_specs
from ebpf.loaders import LoaderError, bcc
from gpuglass.demo.scenario import Scenario, uuid_of
from gpuglass_vllm import records
from tests.ebpf.conftest import Player
from tests.fakes import nvml
from tests.fakes.cuda import LIBRARY, TENSORS, build
from tests.support.ports import free_port
from tests.support.probe_receiver import running_receiver

MIB = 1 << 20
needs_bpf = pytest.mark.needs("cc", "bpf", "ebpf")


class Running:
    """The tracer as a process."""

    def __init__(self, bpf_object: Path, folder: Path, *arguments: str, **environment: str) -> None:
        self.port = free_port()
        self.log = folder / "tracer.log"
        command = [
            *(sys.executable, "-m", "gpuglass", "cuda-tracer", "--listen", f"127.0.0.1:{self.port}"),
            *("--object", str(bpf_object), *arguments),
        ]
        base = {name: value for name, value in os.environ.items() if not name.startswith("GPUGLASS_TRACER")}
        # So often that it would be over budget on a busy machine.
        own = {
            "GPUGLASS_TRACER_INTERVAL": "200ms",
            "GPUGLASS_TRACER_RECONCILE_INTERVAL": "500ms",
            "GPUGLASS_TRACER_BUDGET": "0",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env={**base, **own, **environment}, stderr=log)
        self.wait(self.is_up, "the tracer serves")

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return bool(self.samples("gpuglass_tracer_state"))
        except OSError:
            return False

    def samples(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        """Samples of one scrape with these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return [
            (sample.labels, sample.value)
            for metric in text_string_to_metric_families(text)
            for sample in metric.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def value(self, name: str, **labels: str) -> float | None:
        """The only such sample's value."""
        found = self.samples(name, **labels)
        assert len(found) <= 1, found
        return found[0][1] if found else None

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        """Wait until something holds."""
        until = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < until, f"{what}: {self.log.read_text()[-2000:]}"
            time.sleep(0.05)
        return result

    def wait_value(self, name: str, expected: float | None, **labels: str) -> None:
        """Wait until a sample has a value."""
        self.wait(lambda: self.value(name, **labels) == expected, f"{name}{labels} is {expected}")


@contextmanager
def running(bpf_object: Path, folder: Path, *arguments: str, **environment: str) -> Iterator[Running]:
    environment.setdefault("GPUGLASS_TRACER_SOCKET", "")
    tracer = Running(bpf_object, folder, *arguments, **environment)
    try:
        yield tracer
    finally:
        if tracer.process.poll() is None:
            tracer.process.terminate()
            assert tracer.process.wait(30) == 0


@pytest.fixture
def played() -> Iterator[list[Player]]:
    """Players that end with the test."""
    players: list[Player] = []
    yield players
    for player in players:
        if player.process.poll() is None:
            player.kill()


@needs_bpf
@pytest.mark.skipif(
    not kernel.has_uprobe_multi(gate.kernel_version(os.uname().release)),
    reason="static probes need Linux 6.6",
)
def test_it_serves_live_tensors_of_processes_that_began_after_pytorch_was_probed(
    bpf_object: Path, tmp_path: Path, played: list[Player]
) -> None:
    def with_pytorch() -> Player:
        player = Player(str(build() / LIBRARY))
        played.append(player)
        player.do("load", str(build() / TENSORS))
        return player

    with running(bpf_object, tmp_path, "--tensors") as tracer:
        with_pytorch()
        # Others on this machine may use a PyTorch as well.
        for library in (LIBRARY, TENSORS):
            named = f"tracing {(build() / library).resolve()}: "
            tracer.wait(lambda named=named: named in tracer.log.read_text(), f"{library} is probed")
        player = with_pytorch()
        player.out("cuMemAlloc_v2", 4 * MIB)
        kept = player.out("tensorAllocate", MIB)
        player.call("tensorFree", player.out("tensorAllocate", 2 * MIB))
        of = {"pid": str(player.pid)}
        tracer.wait_value("gpuglass_cuda_tensor_bytes", MIB, **of)
        assert tracer.value("gpuglass_cuda_tensors", **of) == 1
        assert tracer.value("gpuglass_cuda_tensor_allocated_bytes_total", **of) == 3 * MIB
        assert tracer.value("gpuglass_cuda_live_bytes", kind="device", **of) == 4 * MIB
        player.call("tensorFree", kept)
        tracer.wait_value("gpuglass_cuda_tensor_bytes", 0, **of)


@needs_bpf
def test_it_serves_the_ledger_of_a_process_and_its_end(
    bpf_object: Path, tmp_path: Path, played: list[Player]
) -> None:
    with running(bpf_object, tmp_path) as tracer:
        before = time.time()
        environment = {**os.environ, "LD_LIBRARY_PATH": str(build())}
        player = Player("-", env=environment)
        played.append(player)
        tracer.wait(
            lambda: tracer.value("gpuglass_tracer_libraries", library="libcuda"), "the library is probed"
        )
        player.do("load", str(build() / LIBRARY))
        address = player.out("cuMemAlloc_v2", 3 * MIB)
        player.out("cuMemAlloc_v2", 1 * MIB)
        player.call("cuMemFree_v2", address)
        player.do("fail", "cuMemAlloc_v2", 2)
        player.do("out", "cuMemAlloc_v2", MIB)
        of = {"pid": str(player.pid), "kind": "device"}
        tracer.wait_value("gpuglass_cuda_call_failures_total", 1, result="out_of_memory", **of)
        assert tracer.value("gpuglass_cuda_live_bytes", **of) == MIB
        assert tracer.value("gpuglass_cuda_live_allocations", **of) == 1
        assert tracer.value("gpuglass_cuda_allocated_bytes_total", **of) == 4 * MIB
        assert tracer.value("gpuglass_cuda_freed_bytes_total", how="call", **of) == 3 * MIB
        assert tracer.value("gpuglass_cuda_allocation_size_bytes_bucket", le="1048576.0", **of) == 1
        assert tracer.value("gpuglass_cuda_allocation_size_bytes_count", **of) == 2
        assert tracer.value("gpuglass_cuda_allocation_duration_seconds_count", **of) == 2
        since = tracer.value("gpuglass_cuda_tracking_since_timestamp_seconds", pid=str(player.pid))
        assert since is not None and before - 2 < since < time.time()
        assert tracer.value("gpuglass_cuda_ledger_exact", pid=str(player.pid)) == 1
        assert tracer.value("gpuglass_tracer_state", state="tracing") == 1
        assert tracer.samples("gpuglass_tracer_build_info", loader="core")
        assert not [
            s for s in tracer.samples("gpuglass_tracer_lost_total") if s[1] and s[0]["what"] != "stack"
        ]
        assert (tracer.value("gpuglass_tracer_probe_pair_seconds") or 0) > 0
        assert (tracer.value("gpuglass_tracer_cost_seconds_total", part="programs") or 0) > 0
        player.kill()
        tracer.wait_value("gpuglass_cuda_live_bytes", 0, **of)
        assert tracer.value("gpuglass_cuda_freed_bytes_total", how="exit", **of) == MIB


@needs_bpf
def test_it_tells_the_agent_states_events_and_stacks(
    bpf_object: Path, tmp_path: Path, played: list[Player]
) -> None:
    socket = tmp_path / "agent.sock"
    player = Player(str(build() / LIBRARY))
    played.append(player)
    with (
        running_receiver(socket) as heard,
        running(bpf_object, tmp_path, GPUGLASS_TRACER_SOCKET=str(socket)) as tracer,
    ):
        tracer.wait(lambda: tracer.value("gpuglass_tracer_libraries", library="libcuda"), "probed")
        begin = time.monotonic_ns()
        player.out("cuMemAlloc_v2", 128 * MIB)
        player.do("create", 4 * MIB)
        player.do("fail", "cuMemAlloc_v2", 2)
        player.do("out", "cuMemAlloc_v2", 5 * MIB)
        heard.wait(lambda: len(heard.of(records.CudaEvent)) >= 3, "events")
        events = {event.reason: event for event in heard.of(records.CudaEvent) if event.pid == player.pid}
        assert {reason: event.bytes for reason, event in events.items()} == {
            "large": 128 * MIB,
            "sample": 4 * MIB,
            "failure": 5 * MIB,
        }
        assert (events["failure"].code, events["failure"].function) == (2, "cuMemAlloc")
        assert (events["large"].kind, events["sample"].kind) == ("device", "virtual")
        for event in events.values():
            assert begin < event.begin_ns < event.at < time.monotonic_ns()
            assert event.tid == player.pid
        heard.wait(lambda: heard.of(records.CudaProcess), "states")
        state = [state for state in heard.of(records.CudaProcess) if state.pid == player.pid][-1]
        assert state.start_ticks == events["large"].start_ticks > 0
        memory = {part.kind: part for part in state.memory}
        assert memory["device"].live_bytes == 128 * MIB
        assert memory["device"].failures == {2: 1}
        assert memory["virtual"].live_bytes == 4 * MIB
        stacks = {stack.stack: stack.frames for stack in heard.of(records.CudaStack)}
        owner = max(state.stacks, key=lambda owner: owner.live_bytes)
        assert owner.live_bytes == 128 * MIB
        assert stacks[owner.stack]
        assert re.search(r"\((libffi|python|_ctypes)\S*\)|\+0x", " ".join(stacks[owner.stack]))
        player.kill()
        heard.wait(
            lambda: any(s.ended for s in heard.of(records.CudaProcess) if s.pid == player.pid), "the end"
        )
        assert heard.faults == []
        assert tracer.value("gpuglass_tracer_agent_connected") == 1


@needs_bpf
def test_what_the_driver_lists_beyond_the_ledger_is_untracked(
    bpf_object: Path, tmp_path: Path, played: list[Player]
) -> None:
    player = Player(str(build() / LIBRARY))
    played.append(player)
    scenario = Scenario().gpus(1).process(0, player.pid, mem_mib=600)
    file = scenario.write(tmp_path / "scenario.txt")
    environment = {"FAKE_NVML_SCENARIO": str(file), "GPUGLASS_GPU_NVML_LIBRARY": str(nvml.build())}
    with running(bpf_object, tmp_path, **environment) as tracer:
        of = {"pid": str(player.pid), "gpu_uuid": uuid_of(0)}
        tracer.wait(lambda: tracer.value("gpuglass_tracer_libraries", library="libcuda"), "probed")
        player.out("cuMemAlloc_v2", 80 * MIB)
        player.do("create", 20 * MIB)
        player.out("cuMemHostAlloc", 50 * MIB, 0)
        tracer.wait_value("gpuglass_cuda_tracked_bytes", 100 * MIB, **of)
        assert tracer.value("gpuglass_cuda_untracked_bytes", **of) == 500 * MIB
        # The ledger holds more than the driver lists: it cannot be right, and says so until that is over.
        Scenario().gpus(1).process(0, player.pid, mem_mib=50).write(file)
        tracer.wait_value("gpuglass_cuda_ledger_exact", 0, pid=str(player.pid))
        Scenario().gpus(1).process(0, player.pid, mem_mib=700).write(file)
        tracer.wait_value("gpuglass_cuda_ledger_exact", 1, pid=str(player.pid))
        assert tracer.value("gpuglass_cuda_ledger_resyncs_total", pid=str(player.pid)) == 1


@needs_bpf
def test_what_does_not_fit_is_counted_and_the_ledger_says_so(
    bpf_object: Path, tmp_path: Path, played: list[Player]
) -> None:
    player = Player(str(build() / LIBRARY))
    played.append(player)
    with running(bpf_object, tmp_path, GPUGLASS_TRACER_LIVE_ENTRIES="1024") as tracer:
        tracer.wait(lambda: tracer.value("gpuglass_tracer_libraries", library="libcuda"), "probed")
        for _ in range(1100):
            player.out("cuMemAlloc_v2", 4096)
        tracer.wait_value("gpuglass_tracer_lost_total", 76, what="live")
        of = {"pid": str(player.pid)}
        tracer.wait_value("gpuglass_cuda_ledger_exact", 0, **of)
        assert tracer.value("gpuglass_cuda_live_bytes", kind="device", **of) == 1024 * 4096
        assert tracer.value("gpuglass_cuda_allocated_bytes_total", kind="device", **of) == 1100 * 4096


@needs_bpf
def test_above_its_budget_it_takes_all_probes_off_and_says_so(
    bpf_object: Path, tmp_path: Path, played: list[Player]
) -> None:
    player = Player(str(build() / LIBRARY))
    played.append(player)
    with running(bpf_object, tmp_path, GPUGLASS_TRACER_BUDGET="0.0001") as tracer:
        tracer.wait(lambda: tracer.value("gpuglass_tracer_libraries", library="libcuda"), "probed")
        player.do("loop", 3000, 0)
        tracer.wait_value("gpuglass_tracer_state", 1, state="over_budget")
        assert tracer.value("gpuglass_tracer_functions") == 0
        assert "tracer.budget" in tracer.log.read_text()
        time.sleep(0.6)  # what was booked until then is read
        calls = tracer.value("gpuglass_tracer_calls_total")
        player.do("loop", 100, 0)
        time.sleep(0.6)
        assert tracer.value("gpuglass_tracer_calls_total") == calls


@needs_bpf
@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_stays_in_the_kernel(
    bpf_object: Path, tmp_path: Path, played: list[Player], number: signal.Signals
) -> None:
    # A file of its own: another tracer of this session may trace the common one.
    player = Player(str(shutil.copy(build() / LIBRARY, tmp_path / LIBRARY)))
    played.append(player)
    tracer = Running(bpf_object, tmp_path, GPUGLASS_TRACER_SOCKET="")
    try:
        tracer.wait(lambda: tracer.value("gpuglass_tracer_libraries", library="libcuda"), "probed")
        assert first_byte(player) == 0xCC  # the breakpoint by which the kernel gets there
        maps = maps_of(tracer.process.pid) & maps_of_ours()
        assert len(maps) == len(map_specs(1024, 4096))
    finally:
        tracer.process.send_signal(number)
        tracer.process.wait(60)
    # The kernel ends them after grace periods, which are long where it has much to do.
    until = time.monotonic() + 90
    while (probed := first_byte(player) == 0xCC) or maps & maps_of_ours():
        assert time.monotonic() < until, "probes are still there" if probed else "maps are still there"
        time.sleep(0.1)
    player.out("cuMemAlloc_v2", MIB)


def first_byte(player: Player) -> int:
    """The first byte of cuMemAlloc_v2 in a process's memory."""
    maps = Path(f"/proc/{player.pid}/maps").read_text()
    start = next(int(line.split("-")[0], 16) for line in maps.splitlines() if line.endswith(LIBRARY))
    from ebpf import elf

    fd = os.open(build() / LIBRARY, os.O_RDONLY)
    offset = elf.read(fd, (b"cuMemAlloc_v2",)).functions["cuMemAlloc_v2"]
    os.close(fd)
    with open(f"/proc/{player.pid}/mem", "rb") as memory:
        memory.seek(start + offset)
        return memory.read(1)[0]


def maps_of(pid: int) -> set[int]:
    """Ids of the BPF maps that a process holds."""
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            told = re.findall(r"^map_id:\s+(\d+)$", path.read_text(), re.MULTILINE)
            found.update(map(int, told))
    return found


def maps_of_ours() -> set[int]:
    """Ids of the BPF maps in the kernel that are called as ours."""
    found, at = set(), 0
    while True:
        attributes = ctypes.create_string_buffer(at.to_bytes(4, "little"), 12)
        try:
            kernel.bpf(12, attributes)  # BPF_MAP_GET_NEXT_ID
        except OSError:
            return found
        at = int.from_bytes(attributes.raw[4:8], "little")
        open_it = ctypes.create_string_buffer(at.to_bytes(4, "little"), 12)
        try:
            fd = kernel.bpf(14, open_it)  # BPF_MAP_GET_FD_BY_ID
        except OSError:
            continue
        try:
            info = ctypes.create_string_buffer(80)
            kernel.bpf(
                15,
                fd.to_bytes(4, "little")
                + (80).to_bytes(4, "little")
                + ctypes.addressof(info).to_bytes(8, "little"),
            )
            if info.raw[24:40].startswith(b"gg_"):
                found.add(at)
        finally:
            os.close(fd)


def refusal(*command: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [*command, sys.executable, "-m", "gpuglass", "cuda-tracer", "--check"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


@pytest.mark.needs("root")
def test_without_rights_it_refuses_in_one_line() -> None:
    code, said = refusal("setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin")
    assert code == 2
    assert "lacks CAP_PERFMON, CAP_BPF" in said
    assert "[PERFMON, BPF]" in said


@needs_bpf
def test_on_a_kernel_that_is_not_on_the_list_it_refuses_in_one_line() -> None:
    code, said = refusal(GPUGLASS_TRACER_ALLOW="x86_64 4.*")
    assert (code, "tracer.allow" in said) == (2, True)


@needs_bpf
def test_without_an_object_core_says_how_to_get_one() -> None:
    code, said = refusal(GPUGLASS_TRACER_LOADER="core", GPUGLASS_TRACER_OBJECT="/none.o")
    assert (code, "make bpf" in said) == (2, True)


@needs_bpf
def test_an_object_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.o").write_bytes(b"\x7fELF no object")
    code, said = refusal(GPUGLASS_TRACER_LOADER="core", GPUGLASS_TRACER_OBJECT=str(tmp_path / "old.o"))
    assert (code, "libbpf cannot read it" in said) == (2, True)


@needs_bpf
def test_without_an_object_auto_takes_bcc() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpuglass", "cuda-tracer", "--check"],
        env={**os.environ, "GPUGLASS_TRACER_OBJECT": "/none.o"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "loaded by bcc" in done.stdout


def machine(root: Path, capabilities: int = (1 << 41) - 1, lockdown: str = "[none] integrity") -> Path:
    """A machine's files."""
    for folder in ("proc/self", "sys/kernel/security", "sys/bus/event_source/devices/uprobe"):
        (root / folder).mkdir(parents=True)
    (root / "proc/self/status").write_text(f"Name:\tx\nCapEff:\t{capabilities:016x}\n")
    (root / "sys/kernel/security/lockdown").write_text(f"{lockdown}\n")
    (root / "sys/bus/event_source/devices/uprobe/type").write_text("8\n")
    return root


def refused(root: Path, machine: str = "x86_64", release: str = "6.1.0") -> str:
    try:
        gate.check(("x86_64 *",), root, machine, release)
    except gate.Refused as error:
        return str(error)
    return ""


def test_the_gate(tmp_path: Path) -> None:
    assert refused(machine(tmp_path / "a")) == ""
    bpf_perfmon = 1 << 2 | 1 << 19 | 1 << 38 | 1 << 39
    assert refused(machine(tmp_path / "b", bpf_perfmon)) == ""
    assert refused(machine(tmp_path / "c", 1 << 2 | 1 << 19 | 1 << 21)) == ""
    assert "CAP_SYS_PTRACE" in refused(machine(tmp_path / "d", bpf_perfmon & ~(1 << 19)))
    assert "lockdown" in refused(machine(tmp_path / "e", lockdown="none integrity [confidentiality]"))
    assert "5.8" in refused(tmp_path / "a", release="5.4.0-generic")
    assert "tracer.allow" in refused(tmp_path / "a", machine="aarch64")
    assert "knows x86_64" in refused(tmp_path / "a", machine="riscv64")


def test_bcc_is_never_another_package_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc/__init__.py").write_text("raise SystemExit('the wrong one')")
    with pytest.raises(LoaderError, match="apt-get install python3-bpfcc"):
        bcc.import_bcc((tmp_path,))


def test_bcc_says_which_headers_it_looked_for(tmp_path: Path) -> None:
    with (
        pytest.raises(
            LoaderError, match=r"/usr/src/linux-headers-\*.*apt-get install linux-headers-6\.1\.0-9"
        ),
        bcc.headers(tmp_path, "6.1.0-9"),
    ):
        pass


def test_the_help_has_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpuglass", "cuda-tracer", "--help"], capture_output=True, text=True
    )
    assert "--loader bcc --runtime" in done.stdout
