"""The wheel: what is in it and what is not, that it gets in nobody's way, and that it works outside of the
checkout."""

from __future__ import annotations

import ast
import email
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path

import pytest

from tests.test_architecture import PACKAGES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LEFT_OUT = ("tests", "helm", "docs", "exporters/engine_probe")


PROBE = ROOT / "exporters/engine_probe"
PROBE_PROJECT = tomllib.loads((PROBE / "pyproject.toml").read_text())


def can_build_here() -> bool:
    """Whether the build backend is installed in a version that pyproject.toml allows."""
    (requirement,) = PROJECT["build-system"]["requires"]
    name, least = requirement.split(">=")
    try:
        return int(version(name).split(".")[0]) >= int(least)
    except PackageNotFoundError:
        return False


def build(source: Path, out: Path) -> Path:
    """A wheel, built from a copy of `source` without what git ignores."""
    copy = out / "source"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__")
    shutil.copytree(source, copy, ignore=ignored)
    # A version of the backend that is too old here is fetched by pip, which needs the package index.
    isolated = [] if not can_build_here() else ["--no-build-isolation"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolated, "-w", str(out), str(copy)],
        capture_output=True,
        text=True,
    )
    if done.returncode and not isolated:
        pytest.skip(f"the build backend is to be had neither here nor from the network: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent's wheel."""
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def probe_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine probe's wheel."""
    return build(PROBE, tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Paths in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> email.message.Message:
    """The wheel's METADATA."""
    (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(path))


def in_package(names: set[str]) -> set[str]:
    return {name for name in names if ".dist-info/" not in name}


# What is in it


def test_it_holds_every_module_of_the_packages(names: set[str]) -> None:
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if not path.is_relative_to(ROOT / "exporters/engine_probe")
    }
    assert "gpuglass/cli.py" in modules
    assert modules <= names


def test_it_tells_type_checkers_that_it_is_typed(names: set[str]) -> None:
    assert "gpuglass/py.typed" in names


@pytest.mark.parametrize("folder", LEFT_OUT)
def test_it_leaves_out_what_is_not_for_a_node(names: set[str], folder: str) -> None:
    assert not [name for name in names if name.startswith(f"{folder}/")]


def test_it_holds_nothing_beside_the_packages(names: set[str]) -> None:
    assert {name.partition("/")[0] for name in in_package(names)} == PACKAGES
    assert {Path(name).suffix for name in in_package(names)} <= {
        *(".py", ".typed", ".json", ".yml", ".yaml", ".c", ".h", ".o", ".md", ".jsonnet", ".tmpl"),
    }


def test_it_carries_the_licence(names: set[str]) -> None:
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_its_metadata_say_what_it_is(metadata: email.message.Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("gpuglass", PROJECT["project"]["version"])
    assert metadata["Requires-Python"] == ">=3.11"


def test_no_dependency_is_called_bcc(metadata: email.message.Message) -> None:
    # The package of that name on the package index is not the BPF compiler collection.
    wanted = [re.split(r"[\s<>=!~;\[(]", line)[0].lower() for line in metadata.get_all("Requires-Dist") or []]
    assert "prometheus-client" in wanted
    assert "bcc" not in wanted


def test_the_versions_of_package_and_module_are_one(metadata: email.message.Message) -> None:
    assert metadata["Version"] == importlib.import_module("gpuglass").__version__


# The engine probe's


def test_versions_of_agent_and_probe_go_together() -> None:
    version = PROJECT["project"]["version"]
    assert PROBE_PROJECT["project"]["version"] == version
    assert importlib.import_module("gpuglass_vllm").__version__ == version
    assert f"gpuglass-vllm=={version}" in PROJECT["project"]["dependencies"]


def test_the_probes_wheel_holds_its_package_and_nothing_else(probe_wheel: Path) -> None:
    with zipfile.ZipFile(probe_wheel) as archive:
        held = in_package(set(archive.namelist()))
    modules = {path.relative_to(PROBE).as_posix() for path in (PROBE / "gpuglass_vllm").rglob("*.py")}
    assert held == {*modules, "gpuglass_vllm/py.typed"}
    assert "gpuglass_vllm/records.py" in held


def test_the_probe_brings_nothing_into_the_engines_environment(probe_wheel: Path) -> None:
    with zipfile.ZipFile(probe_wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    assert [re.split(r"[\s<>=]", line)[0] for line in metadata.get_all("Requires-Dist") or []] == ["msgspec"]
    assert metadata["Requires-Python"] == ">=3.10"


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.stat_logger_plugins"])
def test_the_probes_entry_points_lead_somewhere(group: str) -> None:
    (target,) = PROBE_PROJECT["project"]["entry-points"][group].values()
    module, _, attribute = target.partition(":")
    tree = ast.parse((PROBE / f"{module.replace('.', '/')}.py").read_text())
    named = {getattr(node, "name", "") for node in ast.walk(tree)}
    assert attribute in named  # vLLM is not installed here, so it cannot be imported


# Names


def top_level(distribution: Distribution) -> set[str]:
    """Names that a distribution puts into site-packages."""
    files = [file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")]
    return {
        Path(name).stem if name.endswith((".py", ".so")) else name for name in files if "-info" not in name
    }


def collisions(ours: frozenset[str], installed: Iterator[Distribution]) -> list[str]:
    """One line for each name that another distribution has as well."""
    return [
        f"{name} is a top-level name of {distribution.name} as well"
        for distribution in installed
        if distribution.name != "gpuglass"
        for name in sorted(top_level(distribution) & ours)
    ]


def test_no_installed_distribution_has_a_top_level_name_of_ours() -> None:
    assert collisions(PACKAGES, iter(distributions())) == []


def test_a_collision_would_be_found() -> None:
    found = collisions(PACKAGES | {"msgspec"}, iter(distributions()))
    assert found == ["msgspec is a top-level name of msgspec as well"]


def test_no_package_hides_a_module_of_python() -> None:
    assert not PACKAGES & sys.stdlib_module_names
    assert "json" in sys.stdlib_module_names


# Entry points


POINTS = [
    (group, name, target)
    for group, points in (
        {"console_scripts": PROJECT["project"]["scripts"]} | PROJECT["project"]["entry-points"]
    ).items()
    for name, target in points.items()
]


@pytest.mark.parametrize(("group", "name", "target"), POINTS, ids=[f"{g}:{n}" for g, n, _ in POINTS])
def test_every_entry_point_leads_somewhere_that_is_in_the_wheel(
    names: set[str], group: str, name: str, target: str
) -> None:
    module, _, attribute = target.partition(":")
    path = module.replace(".", "/")
    assert f"{path}.py" in names or f"{path}/__init__.py" in names
    assert getattr(importlib.import_module(module), attribute) is not None


# Installed


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program `gpuglass` in an environment of its own, which finds the dependencies in this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    return folder / "bin" / "gpuglass"


def run(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    here = [path for path in sys.path if path.endswith("site-packages")]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("GPUGLASS_", "PYTHON"))}
    return subprocess.run(
        [str(program), *arguments],
        cwd=cwd,
        env=environ | {"PYTHONPATH": os.pathsep.join(here)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_installed_command_works_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "metrics", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gpuglass_gpu_up{device, gpu_uuid, reason}" in done.stdout


def test_the_installed_command_is_the_wheels_and_not_the_checkouts(installed: Path, tmp_path: Path) -> None:
    ask = "import gpuglass, exporters.gpu.part as part; print(gpuglass.__file__, part.__file__)"
    done = run(installed.parent / "python", "-c", ask, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(installed.parents[1])) for path in done.stdout.split())
    assert len(done.stdout.split()) == 2


def test_the_installed_command_names_what_is_wrong(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "config", "check", "none.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpuglass: none.yaml: cannot read it: No such file or directory\n"
