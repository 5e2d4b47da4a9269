"""The demo: the simulated node, the table, and that nothing it starts outlives it."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpuglass.cli import main
from gpuglass.demo import ports, readings, table
from gpuglass.demo.children import Child, ChildFailed, TemporaryFolder, stop
from gpuglass.demo.host import Host, cgroup, log_name
from gpuglass.demo.readings import Row, Sample, TopProcess, rows
from gpuglass.demo.simulator import (
    MEBIBYTE,
    STEP,
    UNATTRIBUTED_MIB,
    Frame,
    Process,
    Program,
    Simulation,
    gpm_metrics,
    scenario,
)
from gpuglass.errors import ConfigError
from gpuglass.procfs import ProcFs
from gpuglass.workload import WorkloadResolver
from tests.fakes import nvml
from tests.support.ports import free_port

LONG = 3000  # frames, 25 minutes: the leaking service starts again, the notebook dies often


@pytest.fixture(scope="module")
def history() -> list[Frame]:
    simulation = Simulation(seed=3)
    return [simulation.frame(number) for number in range(LONG)]


# --- simulator


def test_a_frame_depends_on_seed_and_number_only() -> None:
    straight, jumping = Simulation(seed=5), Simulation(seed=5)
    expected = [straight.frame(number) for number in range(200)]
    assert [jumping.frame(number) for number in (150, 3, 199, 0)] == [expected[n] for n in (150, 3, 199, 0)]
    assert Simulation(seed=6).frame(100) != expected[100]


def test_there_is_no_frame_before_the_first() -> None:
    with pytest.raises(ValueError, match="frame -1"):
        Simulation().frame(-1)


@pytest.mark.parametrize("counter", ["energy_mj", "capped_ns", "pcie_bytes", "nvlink_bytes"])
def test_counters_never_fall(history: list[Frame], counter: str) -> None:
    for gpu in range(8):
        values = [getattr(frame.gpus[gpu], counter) for frame in history]
        assert values == sorted(values)
    assert any(getattr(gpu, counter) for gpu in history[-1].gpus)


def test_energy_is_the_integral_of_power(history: list[Frame]) -> None:
    for gpu in range(8):
        total = sum(frame.gpus[gpu].power_mw * STEP for frame in history)
        assert history[-1].gpus[gpu].energy_mj == pytest.approx(total, rel=1e-3)


def test_values_are_possible_ones(history: list[Frame]) -> None:
    places = Simulation().places
    for frame in history:
        for place, gpu in zip(places, frame.gpus, strict=True):
            demand, model = gpu.demand, place.model.values
            held = sum(process.memory_mib for process in demand.processes)
            assert 0 <= held <= gpu.used_mib
            assert gpu.used_mib + model["reserved_mib"] <= model["total_mib"]  # type: ignore[operator]
            assert 0 <= demand.sm <= demand.busy <= 100
            assert 0 <= demand.tensor <= demand.sm and 0 <= demand.dram <= 100
            assert sum(process.sm for process in demand.processes) <= 100
            limit = place.limit_watts or model["power_default_limit_mw"] / 1000  # type: ignore[operator]
            assert 20_000 < gpu.power_mw <= limit * 1010
            assert 25 <= gpu.celsius < model["temp_slowdown"]  # type: ignore[operator]
            assert gpu.sm_mhz <= model["clock_max_sm"]  # type: ignore[operator]


def test_the_node_shows_what_it_promises(history: list[Frame]) -> None:
    def gpu(index: int) -> list[float]:
        return [frame.gpus[index].demand.busy for frame in history]

    assert max(gpu(0)) - min(gpu(0)) > 40  # load follows requests
    assert max(gpu(4)) == 0 and history[-1].gpus[4].used_mib > 60_000  # cold: memory held, nothing runs
    capped = [frame.gpus[3].power_capped for frame in history]
    assert sum(capped) > 0.9 * LONG and not any(frame.gpus[0].power_capped for frame in history[:20])
    leak = [frame.gpus[5].used_mib for frame in history]
    assert leak[240] > leak[0] + 10_000
    assert 0 in leak  # it was started again
    assert len({p.pid for frame in history for p in frame.gpus[5].demand.processes}) > 1
    xids = [(frame.time, i) for frame in history for i, g in enumerate(frame.gpus) if g.demand.xids]
    assert xids[0] == (12.0, 7) and 5 < len(xids) < 40 and {i for _, i in xids} == {7}


def test_a_process_that_comes_back_has_a_new_pid(history: list[Frame]) -> None:
    running: set[int] = set()
    ended: set[int] = set()
    for frame in history:
        now = {process.pid for process in frame.processes()}
        ended |= running - now
        assert not now & ended
        running = now


def test_metrics_of_hopper_are_on_hopper_only() -> None:
    simulation = Simulation()
    text = scenario(simulation.places, simulation.frames(10, 17), 100.0).text()
    assert set(re.findall(r"gpu\.(\d)\.gpm\.\d", text)) == set("012345")
    assert "clock.start = 100.0" in text


def test_a_scenario_tells_events_and_ends_in_its_window_only() -> None:
    simulation = Simulation()
    faulty = scenario(simulation.places, simulation.frames(9, 16), 0.0).text()
    assert "@12.0 gpu.7.event = xid 31" in faulty
    assert "@12.0 gpu.7.proc.51000 = gone" in faulty
    assert ".event" not in scenario(simulation.places, simulation.frames(15, 22), 0.0).text()


def test_gpm_percentages_are_percentages(history: list[Frame]) -> None:
    for frame in history[::50]:
        for gpu in frame.gpus:
            assert all(0 <= value <= 100 for metric, value in gpm_metrics(gpu.demand).items() if metric < 20)


# --- the simulated host


def test_the_agents_readers_find_names_and_pods(tmp_path: Path) -> None:
    host = Host(tmp_path / "host")
    pod = Program("VLLM::Worker_TP", "inference", "llama-70b-0", "vllm")
    batch = Program("torchrun")
    host.update([Process(pod, 501, 0.0, 1, 1), Process(batch, 502, 4.0, 1, 1)])
    assert ProcFs(host.proc).pid_namespace().is_host
    resolver = WorkloadResolver(host.proc, host.container_logs, host.pod_logs)
    found = resolver.resolve(501)
    assert found is not None
    process, workload = found
    assert (process.name, workload.namespace, workload.pod, workload.container) == (
        "VLLM::Worker_TP",
        "inference",
        "llama-70b-0",
        "vllm",
    )
    on_host = resolver.resolve(502)
    assert on_host is not None and on_host[1].is_host and on_host[0].start_time > process.start_time

    host.update([Process(batch, 502, 4.0, 1, 1)])
    assert resolver.resolve(501) is None and resolver.resolve(502) is not None


def test_all_containers_differ() -> None:
    programs = {process.program for process in Simulation().frame(0).processes()}
    pods = [program for program in programs if program.pod]
    assert len({cgroup(program) for program in pods}) == len({log_name(p) for p in pods}) == len(pods) == 7
    assert all(len(program.name) <= 15 for program in programs)


# --- readings and table

GPU0 = {"device": "nvidia0", "gpu_uuid": "GPU-0"}
SAMPLES = [
    Sample("gpuglass_gpu_info", GPU0 | {"model": "NVIDIA H200"}, 1),
    Sample("gpuglass_gpu_busy_ratio", GPU0 | {"source": "samples"}, 0.874),
    Sample("gpuglass_gpu_sm_active_ratio", GPU0, 0.5),
    Sample("gpuglass_gpu_memory_used_bytes", GPU0, 126.5 * 2**30),
    Sample("gpuglass_gpu_memory_total_bytes", GPU0, 140 * 2**30),
    Sample("gpuglass_gpu_power_watts", GPU0, 478.4),
    Sample("gpuglass_gpu_power_limit_watts", GPU0, 480),
    Sample("gpuglass_gpu_throttle_active", GPU0 | {"reason": "power_cap"}, 1),
    Sample("gpuglass_gpu_throttle_active", GPU0 | {"reason": "sync_boost"}, 0),
    Sample("gpuglass_gpu_xid_last_timestamp_seconds", GPU0 | {"xid": "31"}, 995),
    Sample("gpuglass_gpu_xid_last_timestamp_seconds", GPU0 | {"xid": "43"}, 100),
    Sample("gpuglass_process_memory_used_bytes", GPU0 | {"process": "large"}, 9e9),
    Sample("gpuglass_process_sm_ratio", GPU0 | {"process": "large"}, 0.1),
    Sample(
        "gpuglass_process_sm_ratio",
        GPU0 | {"process": "busy", "workload_namespace": "prod", "workload_pod": "llm-0"},
        0.4,
    ),
    Sample("gpuglass_gpus", {}, 1),
]


def test_rows_hold_what_the_samples_say() -> None:
    assert rows(SAMPLES, now=1000) == [
        Row(
            "nvidia0",
            "H200",
            True,
            0.874,
            0.5,
            126.5 * 2**30,
            140 * 2**30,
            478.4,
            480,
            TopProcess("busy", "prod", "llm-0"),
            ("power_cap",),
            (("31", 5.0),),
        )
    ]


def test_rows_are_in_the_order_of_the_gpus() -> None:
    samples = [Sample("gpuglass_gpu_up", {"device": f"nvidia{n}"}, 0) for n in (10, 2, 1)]
    assert [(row.device, row.up) for row in rows(samples, 0)] == [
        ("nvidia1", False),
        ("nvidia2", False),
        ("nvidia10", False),
    ]
    assert rows([], 0) == []


def test_the_table_is_aligned_and_says_dash_for_unknown() -> None:
    lines = table.lines([*rows(SAMPLES, 1000), Row("nvidia1", up=False)])
    assert lines == [
        "GPU  model            busy  SM active    memory used      power  "
        "top process                              notes",
        "0    H200             87 %       50 %  126.5/140 GiB  478/480 W  "
        "busy (prod/llm-0)                        XID 31, 5 s ago; power cap",
        "1    -                   -          -              -          -  "
        "-                                        down",
    ]


@pytest.mark.parametrize("width", [78, 80, 100, 132])
def test_the_table_fits_the_terminal(width: int) -> None:
    widths = table.fitted(width)
    assert sum(widths.values()) + 2 * (len(widths) - 1) <= width
    assert widths["memory used"] == 13  # numbers stay whole


def test_appended_tables_come_each_five_seconds_after_one_line_of_waiting() -> None:
    out = io.StringIO()
    view = table.Appended(out)
    for second in range(12):
        view.show([] if second < 2 else [Row("nvidia0")], float(second))
    said = out.getvalue()
    assert said.count(table.WAITING) == 1
    assert re.findall(r"after (\d+) s", said) == ["2", "7"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_view_suits_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    def live() -> table.View:
        return table.Appended(Terminal())

    def without_rich() -> table.View:
        raise ImportError("rich")

    chosen = live()
    assert table.choose({"TERM": "xterm"}, Terminal(), lambda: chosen) is chosen
    assert table.choose({"TERM": "dumb"}, Terminal(), lambda: chosen) is not chosen
    assert table.choose({"TERM": "xterm"}, io.StringIO(), lambda: chosen) is not chosen
    out = Terminal()
    assert isinstance(table.choose({"TERM": "xterm"}, out, without_rich), table.Appended)
    assert "pip install 'gpuglass[demo]'" in out.getvalue()


def test_a_server_that_does_not_answer_is_unavailable() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    source = readings.FromAgent(url)
    with pytest.raises(readings.Unavailable):
        source.read()
    assert source.summary() == readings.Summary(scrapes=1, failed=1, series=0)
    with pytest.raises(readings.Unavailable):
        readings.FromPrometheus(url).summary()


# --- ports


def test_a_port_that_was_asked_for_must_be_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        busy = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--agent-port {busy}: the port is in use"):
            ports.choose("--agent-port", 9955, busy)
    assert ports.choose("--agent-port", 9955, busy) == busy


def test_the_next_free_port_replaces_a_documented_one() -> None:
    def choose(*busy: int) -> int:
        return ports.choose("--x-port", 9090, None, avoid=[9091], is_free=lambda port: port not in busy)

    assert choose() == 9090
    assert choose(9090) == 9092
    with pytest.raises(ConfigError, match="all in use"):
        choose(*range(9090, 9200))


# --- children


def test_a_child_that_dies_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    child = Child(
        "the agent", ["/bin/sh", "-c", "echo first; echo last words >&2; exit 3"], tmp_path / "a.log"
    )
    child.process.wait(10)
    with pytest.raises(ChildFailed, match=r"(?s)the agent ended with exit code 3.*last words.*a\.log"):
        child.check()


def test_a_child_that_will_not_end_is_killed(tmp_path: Path) -> None:
    child = Child("x", ["/bin/sh", "-c", "trap '' TERM; echo on; sleep 60"], tmp_path / "x.log")
    assert child.wait_until(lambda: child.last_lines() == ["on"], 10, time.sleep)
    child.check()
    stop([child], seconds=0.3)
    assert child.process.returncode == -signal.SIGKILL


def test_the_folder_can_keep_the_logs() -> None:
    folder = TemporaryFolder()
    (folder.path / "data").mkdir()
    (folder.path / "agent.log").write_text("x")
    (folder.path / "scenario").write_text("x")
    folder.remove(keep=".log")
    assert [path.name for path in folder.path.iterdir()] == ["agent.log"]
    (folder.path / "agent.log").unlink()
    folder.path.rmdir()


# --- the whole


def test_without_the_library_one_line_names_make_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("path", ["/no/such/file", "/etc/passwd"])
def test_another_library_is_refused(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--nvml-library", path]) == 2
    assert path in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--seconds", "0"), ("--agent-port", "70000"), ("--seconds", "nan")])
def test_senseless_options_are_refused(option: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *option])
    assert stopped.value.code == 2


class Running:
    """A demo in a process of its own, with a temporary folder of its own."""

    def __init__(
        self, folder: Path, *options: str, path: str = "/nowhere", cache: Path | None = None
    ) -> None:
        self.temporary = folder
        environ = os.environ | {
            "TMPDIR": str(folder),
            "PATH": path,
            "GPUGLASS_CACHE": str(cache or folder / "cache"),
        }
        if "--agent-port" not in options:
            options += ("--agent-port", str(free_port()))
        library = nvml.build()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpuglass", "demo", "--nvml-library", str(library), *options],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def wait_for(self, text: str) -> str:
        """Read the output up to the line that holds `text`."""
        said = ""
        assert self.process.stdout
        for line in self.process.stdout:
            said += line
            if text in line:
                return said
        raise AssertionError(f"the demo ended before it said {text!r}:\n{said}")

    def rest(self) -> str:
        said, _ = self.process.communicate(timeout=40)
        return said

    def left(self) -> list[str]:
        """Living processes that know its folder, and the folder itself."""
        found = [str(path) for path in self.temporary.glob("gpuglass-demo-*")]
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                text = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except OSError:
                continue
            if str(self.temporary).encode() in text and not dead and int(entry.name) != os.getpid():
                found.append(f"{entry.name}: {text[:200]!r}")
        return found

    def nothing_left(self, seconds: float = 5.0) -> bool:
        deadline = time.monotonic() + seconds
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.left()


@contextmanager
def running(
    folder: Path, *options: str, path: str = "/nowhere", cache: Path | None = None
) -> Iterator[Running]:
    demo = Running(folder, *options, path=path, cache=cache)
    try:
        yield demo
    finally:
        if demo.process.poll() is None:
            demo.process.kill()
        demo.process.communicate()


def last_table(said: str) -> dict[str, list[str]]:
    """The cells of the last table by GPU."""
    lines = said.rpartition("\nGPU ")[2].splitlines()
    found = [re.split(r" {2,}", line) for line in lines if re.match(r"\d  ", line)]
    return {cells[0]: cells for cells in found}


def check_table(said: str) -> None:
    gpus = last_table(said)
    assert list(gpus) == list("01234567"), said
    for index, cells in gpus.items():
        model, busy, sm, memory, power = cells[1:6]
        assert model == ("H200" if index < "6" else "A100-SXM4-80GB")
        assert 0 <= int(busy.removesuffix(" %")) <= 100
        assert (sm == "-") == (index >= "6")
        used, total = map(float, memory.removesuffix(" GiB").split("/"))
        assert 5 < used < total
        watts, limit = map(float, power.removesuffix(" W").split("/"))
        assert 50 < watts <= limit
    assert gpus["0"][6] == "VLLM::Worker_TP (inference/llama-70b-0)"
    assert gpus["6"][6] == "torchrun"
    assert gpus["3"][7] == "power cap"
    assert gpus["4"][2] == "0 %"


@pytest.mark.needs("cc")
def test_the_agent_alone_shows_all_gpus_and_says_what_is_missing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        busy = server.getsockname()[1]
        with running(tmp_path, "--seconds", "8", "--agent-port", str(busy)) as refused:
            assert "is in use" in refused.rest() and refused.process.returncode == 2
    with running(tmp_path, "--seconds", "8", "--agent-port", str(free_port())) as demo:
        said = demo.rest()
    assert demo.process.returncode == 0, said
    assert "without Prometheus, with the agent alone: prometheus is missing: no apt-get" in said
    assert "https://prometheus.io/download/" in said
    check_table(said)
    assert re.search(r"\d+ scrapes, none failed; \d{3,} series; read on: README.md\n\Z", said)
    assert demo.nothing_left()


@pytest.mark.needs("cc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as demo:
        demo.wait_for("after ")
        assert any("GPUGLASS_SERVER_LISTEN" not in line and "agent" in line for line in demo.left())
        demo.process.send_signal(number)
        said = demo.rest()
    assert demo.process.returncode == 0, said
    assert "scrapes" in said
    assert demo.nothing_left()


@pytest.mark.needs("cc")
def test_the_agent_finds_the_processes_that_hold_the_memory(tmp_path: Path) -> None:
    with running(tmp_path, "--seconds", "30") as demo:
        said = demo.wait_for("after ")
        url = re.search(r"http://\S+/metrics", said)
        assert url
        found = readings.parse(readings.fetch(url[0]).decode())
        demo.process.send_signal(signal.SIGINT)
        demo.rest()
    unattributed = [
        sample.value for sample in found if sample.name == "gpuglass_gpu_memory_unattributed_bytes"
    ]
    assert unattributed == [UNATTRIBUTED_MIB * MEBIBYTE] * 8
    processes = [sample for sample in found if sample.name == "gpuglass_process_memory_used_bytes"]
    assert sorted(sample.labels["device"] for sample in processes) == [
        *(f"nvidia{n}" for n in range(8)),
        "nvidia7",
    ]
    failed = [s.labels for s in found if s.name == "gpuglass_gpu_collector_success" and s.value != 1]
    assert not failed


@pytest.mark.needs("cc")
def test_a_killed_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    with running(tmp_path) as demo:
        demo.wait_for("after ")
        demo.process.kill()
        demo.process.wait()
        assert demo.nothing_left()


@pytest.mark.needs("cc")
def test_the_death_of_the_agent_is_told(tmp_path: Path) -> None:
    with running(tmp_path) as demo:
        demo.wait_for("after ")
        agent = next(
            int(entry.split(":")[0]) for entry in demo.left() if re.match(r"\d+:.*gpuglass\\x00agent", entry)
        )
        os.kill(agent, signal.SIGKILL)
        said = demo.rest()
    assert demo.process.returncode == 1
    assert "gpuglass: the agent was killed by SIGKILL; its last lines" in said
    log = Path(said.rpartition("all of them: ")[2].strip())
    assert "serving" in log.read_text()
    assert [path.name for path in log.parent.iterdir()] == ["agent.log"]


@pytest.mark.needs("cc", "debian-prometheus")
def test_with_prometheus_the_table_comes_from_it(tmp_path: Path, debian_prometheus: Path) -> None:
    options = ("--agent-port", str(free_port()), "--prometheus-port", str(free_port()), "--seconds", "14")
    with running(tmp_path, *options, path=str(debian_prometheus.parent)) as demo:
        said = demo.rest()
    assert demo.process.returncode == 0, said
    assert f"Prometheus  http://127.0.0.1:{options[3]}\n" in said
    check_table(said)
    assert re.search(r"\d+ scrapes by Prometheus, none failed; \d{3,} series", said)
    assert demo.nothing_left()
