"""What the tests' own machinery promises: skips that say their mend, budgets, a real Prometheus.

Most of it is seen from outside: a pytest of its own runs a small test file, with the plugin of
tests/support.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, start_http_server

from tests.support import bench, requirements
from tests.support.budgets import CORE, ROOMS, SECONDS, Spent, room_of
from tests.support.cached import BuildFailed
from tests.support.prometheus import PrometheusError, promtool_check_metrics, running_prometheus
from tests.support.tools import PROMETHEUS, TOOLS, GoTool

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    code: int
    text: str


Session = Callable[..., Outcome]

UNICORN = """
from tests.support.requirements import REQUIREMENTS, Requirement
REQUIREMENTS["unicorn"] = Requirement("unicorn", "a unicorn", lambda: "none seen", "apt-get install unicorn")
"""


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """Runs a pytest of its own on one test file, which knows one more requirement: always lacking."""

    def run(source: str, *arguments: str, **environment: str) -> Outcome:
        folder = tmp_path / "session"
        folder.mkdir(exist_ok=True)
        (folder / "conftest.py").write_text(UNICORN)
        (folder / "test_it.py").write_text("import pytest\n" + textwrap.dedent(source))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.support.plugin",
            "-c",
            os.devnull,
            f"--rootdir={folder}",
        ]
        inherited = {k: v for k, v in os.environ.items() if k not in ("GPUGLASS_REQUIRE", "GPUGLASS_BUDGETS")}
        done = subprocess.run(
            [*command, "-p", "pytest_timeout", "-p", "no:cacheprovider", *arguments, str(folder)],
            cwd=folder,
            env=inherited | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Outcome(done.returncode, done.stdout)

    return run


@pytest.fixture
def fake_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a `go` on the PATH whose `build` runs a shell script, and empties the tools' cache."""

    def put(build: str) -> Path:
        programs = tmp_path / "bin"
        programs.mkdir()
        go = programs / "go"
        go.write_text(f"#!/bin/sh\n[ $1 = build ] || {{ echo go version go1.99 test; exit; }}\n{build}\n")
        go.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setenv("GPUGLASS_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache/tools"

    return put


BUILD = 'while [ "$1" != -o ]; do shift; done; mkdir -p "$2"; : >"$2/prometheus"'
NEEDS_UNICORN = """
    @pytest.mark.needs("unicorn")
    def test_ride(): pass
    def test_walk(): pass
"""


def test_a_test_without_its_requirement_is_skipped_and_the_summary_names_the_command(
    session: Session,
) -> None:
    outcome = session(NEEDS_UNICORN, "-rs")
    assert outcome.code == 0
    assert "1 passed, 1 skipped" in outcome.text
    assert "needs unicorn: none seen; to have it: apt-get install unicorn" in outcome.text
    assert "unicorn (1 test): none seen; to have it: apt-get install unicorn" in outcome.text


@pytest.mark.parametrize("required", ["unicorn", "all", "cc,unicorn"])
def test_a_lacking_requirement_that_is_required_fails_its_tests(session: Session, required: str) -> None:
    outcome = session(NEEDS_UNICORN, GPUGLASS_REQUIRE=required)
    assert outcome.code == 1
    assert "1 passed, 1 error" in outcome.text
    assert "needs unicorn: none seen; to have it: apt-get install unicorn" in outcome.text


def test_requiring_something_else_leaves_the_skip(session: Session) -> None:
    assert session(NEEDS_UNICORN, GPUGLASS_REQUIRE="cc").code == 0


def test_an_unknown_name_in_the_environment_is_refused(session: Session) -> None:
    outcome = session(NEEDS_UNICORN, GPUGLASS_REQUIRE="unicron")
    assert outcome.code == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in outcome.text.splitlines() if "unicron" in line]
    assert "GPUGLASS_REQUIRE: unknown requirement 'unicron'; known are alertmanager, apt, bpf, cc," in line


def test_an_unknown_name_in_a_mark_is_refused(session: Session) -> None:
    outcome = session('@pytest.mark.needs("unicron")\ndef test_ride(): pass')
    assert outcome.code == pytest.ExitCode.USAGE_ERROR
    known = "known are alertmanager, apt, bpf, cc,"
    assert f"test_it.py::test_ride: unknown requirement 'unicron'; {known}" in outcome.text


def test_a_group_names_all_that_comes_the_same_way() -> None:
    assert {"go", "prometheus3"} <= requirements.parse_required("go")
    assert requirements.parse_required("prometheus3, cc") == {"prometheus3", "cc"}
    assert requirements.parse_required("all") == set(requirements.REQUIREMENTS)
    assert requirements.parse_required("") == set()


SLOW = "import time\ndef test_slow(): time.sleep(0.3)"


def test_a_room_that_takes_too_long_fails_the_session(session: Session) -> None:
    outcome = session(SLOW, GPUGLASS_BUDGETS="0.001")
    assert outcome.code == 1
    said = r"time budget exceeded: tests of core and GPU took \d+\.\d s of 0\.24 s"
    assert re.search(said, outcome.text)
    assert "1 passed" in outcome.text.splitlines()[-1]


@pytest.mark.parametrize("scale", ["1", ""])
def test_within_its_budget_or_without_budgets_it_passes(session: Session, scale: str) -> None:
    outcome = session(SLOW, GPUGLASS_BUDGETS=scale)
    assert (outcome.code, "time budget exceeded" in outcome.text) == (0, False)


def test_a_budget_that_is_no_number_is_refused(session: Session) -> None:
    outcome = session(SLOW, GPUGLASS_BUDGETS="yes")
    assert outcome.code == pytest.ExitCode.USAGE_ERROR
    assert "GPUGLASS_BUDGETS='yes': give 1" in outcome.text


def test_every_room_has_a_budget_and_what_is_in_no_room_is_the_cores() -> None:
    assert set(ROOMS.values()) | {CORE} == set(SECONDS)
    assert room_of("tests/exporters/engine_probe/test_hooks.py::test_x") == "vLLM"
    assert room_of("tests/exporters/vllm/test_ledger.py::test_x") == "receiver and ledger"
    assert room_of("tests/exporters/gpu/test_nvml.py::test_x") == CORE
    assert room_of("tests/test_packaging.py::test_x") == CORE
    assert room_of("tests/test_support.py::test_x") != CORE


def test_budgets_add_up_setup_call_and_teardown() -> None:
    spent = Spent()
    for seconds in (100, 100, 41):
        spent.add("tests/ebpf/test_loader.py::test_x", seconds)
    spent.add("tests/dashboards/test_json.py::test_x", 300)
    assert spent.exceeded() == ["time budget exceeded: tests of ebpf took 241.0 s of 240 s"]


def test_the_slowest_tests_are_always_listed(session: Session) -> None:
    assert "slowest 10 durations" in session(SLOW).text


NEEDS_TOOL = """
    @pytest.mark.needs("prometheus3")
    def test_with_tool(): pass
    def test_without(): pass
"""


def test_tests_that_wait_for_a_build_run_last_and_waiting_is_not_counted(
    session: Session, fake_go: Callable[[str], Path]
) -> None:
    cache = fake_go(f"sleep 6; {BUILD}")
    limits = {"GPUGLASS_BUDGETS": "0.02", "GPUGLASS_REQUIRE": "prometheus3"}  # 4.8 s
    outcome = session(NEEDS_TOOL, "-v", "--timeout=5", **limits)
    assert outcome.code == 0, outcome.text
    assert outcome.text.index("test_without PASSED") < outcome.text.index("test_with_tool PASSED")
    assert "waiting for prometheus3" in outcome.text
    assert len(list(cache.glob("prometheus-*"))) == 1


def test_without_being_required_nothing_is_built(session: Session, fake_go: Callable[[str], Path]) -> None:
    cache = fake_go(BUILD)
    outcome = session(NEEDS_TOOL)
    assert "1 passed, 1 skipped" in outcome.text
    assert "to have it: GPUGLASS_REQUIRE=prometheus3 make test" in outcome.text
    assert not cache.exists()


def test_a_failed_build_shows_its_last_lines(session: Session, fake_go: Callable[[str], Path]) -> None:
    cache = fake_go("seq 100; echo main.go:7: undefined: x >&2; exit 1")
    outcome = session(NEEDS_TOOL, GPUGLASS_REQUIRE="go")
    assert (outcome.code, "1 passed, 1 error" in outcome.text) == (1, True)
    assert "99\n100\nmain.go:7: undefined: x" in outcome.text
    assert "\n50\n" not in outcome.text
    assert not list(cache.glob("[!.]*"))


def test_a_build_that_no_test_waited_for_is_ended(session: Session, fake_go: Callable[[str], Path]) -> None:
    cache = fake_go(f"sleep 60; {BUILD}")
    start = time.monotonic()
    outcome = session(
        "def test_broken(): assert 0\n" + textwrap.dedent(NEEDS_TOOL), "-x", GPUGLASS_REQUIRE="go"
    )
    assert "1 failed" in outcome.text
    assert time.monotonic() - start < 30
    assert [path.name for path in cache.glob("*")] in ([], [".lock"])


def test_two_processes_build_a_tool_once(tmp_path: Path, fake_go: Callable[[str], Path]) -> None:
    fake_go(f"echo build >>{tmp_path}/log; sleep 0.5; {BUILD}")
    command = [sys.executable, "-m", "tests.support.requirements", "prometheus3"]
    both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "build\n"


def test_a_tool_is_built_anew_when_its_pins_or_flags_change(
    tmp_path: Path, fake_go: Callable[[str], Path]
) -> None:
    fake_go(BUILD)
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool/go.mod").write_text("module tool\n")
    (tmp_path / "tool/go.sum").write_text("")
    tool = GoTool("tool", ("prometheus",), modules=tmp_path)
    assert tool.program("prometheus") is None
    tool.build()
    assert tool.program("prometheus") is not None
    entries = {tool.entry(), GoTool("tool", ("prometheus",), ("-tags=x",), tmp_path).entry()}
    (tmp_path / "tool/go.sum").write_text("pinned\n")
    assert len(entries | {tool.entry()}) == 3
    assert tool.program("prometheus") is None


@pytest.mark.needs("go")
def test_the_real_go_says_what_is_wrong_with_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUGLASS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool/go.mod").write_text("module tool\n\ngo 1.25\n\ntool example.invalid/nothing\n")
    (tmp_path / "tool/go.sum").write_text("")
    with pytest.raises(BuildFailed, match=r"example\.invalid/nothing"):
        GoTool("tool", ("nothing",), modules=tmp_path).build()


def test_every_tool_has_its_pinned_module() -> None:
    folders = {path.parent.name for path in PROMETHEUS.modules.glob("*/go.mod")}
    assert folders == set(TOOLS)
    for name in folders:
        assert (PROMETHEUS.modules / name / "go.mod").exists()
        assert (PROMETHEUS.modules / name / "go.sum").exists()


def test_processes_left_behind_fail_the_session_and_are_killed(session: Session) -> None:
    outcome = session(
        """
        import subprocess
        def test_child(): subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
        def test_daemon(): subprocess.run(["setsid", "-f", "sleep", "61"], stdout=subprocess.DEVNULL)
        """
    )
    assert outcome.code == 1
    assert "tests left processes behind (killed now):" in outcome.text
    for command in (": sleep 60", ": sleep 61"):
        # A process that was listed while it forked stands there with its parent's command line.
        lines = [line for line in outcome.text.splitlines() if line.endswith(command)]
        assert lines, command
        for line in lines:
            with suppress(
                FileNotFoundError, ProcessLookupError
            ):  # gone, or else a zombie that nobody waited for
                assert (
                    Path("/proc", line.split(":")[0].strip(), "stat").read_text().rpartition(")")[2][1] == "Z"
                )


def test_a_process_that_ends_in_time_is_no_leftover(session: Session) -> None:
    outcome = session('import subprocess\ndef test_it(): subprocess.Popen(["sleep", "0.5"])')
    assert outcome.code == 0, outcome.text


@pytest.mark.timeout(60)
@pytest.mark.needs("debian-prometheus")
def test_a_real_prometheus_scrapes_and_answers(debian_prometheus: Path, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    Counter("requests", "Requests.", registry=registry).inc(3, exemplar={"request_id": "r1"})
    server, thread = start_http_server(0, "127.0.0.1", registry)
    config = {
        "job_name": "app",
        "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}", "127.0.0.1:1"]}],
    }
    try:
        with running_prometheus(debian_prometheus, [config], tmp_path) as prom:
            (sample,) = prom.wait_for("requests_total")
            (down,) = prom.wait_for("up == 0")
            assert (sample.value, sample.labels["job"]) == (3.0, "app")
            assert down.labels["instance"] == "127.0.0.1:1"
            assert abs(sample.time - time.time()) < 10
            (series,) = prom.query_range("requests_total", sample.time, sample.time + 2, 1)
            assert {value for _, value in series.points} == {3.0}
            (exemplar,) = prom.exemplars("requests_total", sample.time - 60, sample.time + 60)
            assert (exemplar.labels, exemplar.value) == ({"request_id": "r1"}, 3.0)
            assert {target.health for target in prom.targets()} == {"up", "down"}
            assert prom.query("2")[0].value == 2.0
            with pytest.raises(PrometheusError, match="parse error"):
                prom.query("up{")
            with pytest.raises(TimeoutError, match="nothing_there is empty after 0 s"):
                prom.wait_for("nothing_there", seconds=0)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_prometheus_that_refuses_its_configuration_says_why(prometheus: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(PrometheusError, match="no_such_key"),
        running_prometheus(prometheus, [], tmp_path, config={"no_such_key": 1}),
    ):
        pass


@pytest.mark.parametrize(
    "promtool",
    [
        pytest.param("debian_promtool", marks=pytest.mark.needs("debian-prometheus")),
        pytest.param("promtool3", marks=pytest.mark.needs("prometheus3")),
    ],
)
def test_promtool_judges_an_exposition(promtool: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(promtool)
    assert promtool_check_metrics("# HELP a_total A.\n# TYPE a_total counter\na_total 1\n", path) == []
    (problem,) = promtool_check_metrics("# HELP a_total A.\n# TYPE a_total gauge\na_total 1\n", path)
    assert "_total" in problem
    assert promtool_check_metrics("a{ 1\n", path)


def test_benchmarks_become_a_table(tmp_path: Path) -> None:
    line = json.dumps(
        {
            "benchmark": "b",
            "figures": {"cost_ratio": 0.02},
            "targets": {"cost_ratio": "<= 0.01"},
            "missed": ["cost_ratio"],
        }
    )
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(f"import sys\nprint('noise')\nprint('''{line}''')\nsys.exit(1)")
    bad.write_text("print('no result')")
    table = bench.table({"good": bench.run(good, []), "bad": bench.run(bad, [])})
    assert "| good | cost_ratio | 0.02 | <= 0.01 | missed |" in table
    assert "| bad | | | | failed |" in table


def make(folder: Path, *arguments: str) -> Outcome:
    for name in ("Makefile", "pyproject.toml", "exporters/engine_probe/pyproject.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    plain = {
        key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    done = subprocess.run(["make", *arguments], cwd=folder, env=plain, capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout + done.stderr)


def test_make_lists_what_there_is(tmp_path: Path) -> None:
    outcome = make(tmp_path)
    assert outcome.code == 0
    for target in ("demo", "test", "lint", "generated", "check-generated", "bench", "clean"):
        assert f"make {target} " in outcome.text


@pytest.mark.parametrize(
    ("python", "says"),
    [
        (None, "not found: apt-get install python3 python3-venv"),
        (
            "case $1 in -V) echo Python 3.9.2;; *) exit 1;; esac",
            "GPUGlass needs Python 3.11, this is Python 3.9.2",
        ),
        ('case "$2" in *ensurepip) exit 1;; esac', "lacks venv: apt-get install python3-venv"),
    ],
    ids=["no Python", "old Python", "no venv"],
)
def test_make_names_the_mend_for_a_python_that_does_not_do(
    tmp_path: Path, python: str | None, says: str
) -> None:
    program = tmp_path / "python"
    if python:
        program.write_text(f"#!/bin/sh\n{python}\n")
        program.chmod(0o755)
    outcome = make(tmp_path, "test", f"PYTHON={program}")
    assert outcome.code == 2
    said = [line for line in outcome.text.splitlines() if not line.startswith("make:")]
    assert len(said) == 1
    assert says in said[0]
