"""Which part of the repository may know which, read from the imports; what lies at its top; what every module
has.

The checks are functions over a tree, and each is tried on a small tree with the fault that it must find.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from gpuglass import catalog

ROOT = Path(__file__).parents[1]

ALLOWED: dict[str, frozenset[str]] = {
    "gpuglass": frozenset(),
    "exporters.gpu": frozenset({"gpuglass"}),
    "exporters.vllm": frozenset({"gpuglass", "exporters.engine_probe"}),  # the probe's records
    "exporters.engine_probe": frozenset(),  # runs inside of the engine: it stands alone
    "ebpf": frozenset({"gpuglass", "exporters.engine_probe"}),  # sends by the same records
    "otel_bridge": frozenset({"gpuglass", "exporters.vllm", "exporters.engine_probe"}),  # hears its records
    "recording_rules": frozenset({"gpuglass"}),
    "alert_rules": frozenset({"gpuglass", "recording_rules"}),  # alerts read records
    "dashboards": frozenset({"gpuglass", "recording_rules", "alert_rules"}),  # and show both
    "anomaly_sidecar": frozenset({"gpuglass"}),
}
"""What each room may import of the others, at module level or anywhere else."""

PACKAGES = frozenset({"gpuglass", "exporters", *(room for room in ALLOWED if "." not in room)})
PROBE = "gpuglass_vllm"
"""Name under which the engine probe, a distribution of its own, is imported."""

HELD_APART = PACKAGES | {PROBE, "tests"}

TOP = frozenset(
    {
        ".ci",
        ".gitignore",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "NOTICE",
        "README.md",
        "docs",
        "helm",
        "pyproject.toml",
        "tests",
    }
    | PACKAGES
)
"""Everything that may lie at the top of the repository."""

MAX_FILE_BYTES = 1 << 20

READERS = frozenset({"gpuglass/demo", "gpuglass/doctor"})
"""Programs that read a scrape or ask Prometheus, as a user does: they have to name metrics."""


def room_of(module: str) -> str:
    """The room of a dotted module name: `exporters.gpu` for exporters.gpu.part, `ebpf` for ebpf.maps."""
    parts = module.split(".")
    if parts[0] == PROBE:
        return "exporters.engine_probe"
    return ".".join(parts[:2]) if parts[0] == "exporters" and len(parts) > 1 else parts[0]


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every module in the packages below `root`."""
    for package in sorted(PACKAGES):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@cache
def parsed(path: Path) -> ast.Module:
    """A module's syntax tree, read once."""
    return ast.parse(path.read_text())


def imported(name: str, path: Path) -> set[str]:
    """Absolute names of what a module imports, wherever in it."""
    found: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from exporters import gpu` imports a room by way of its name.
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            found.add(node.args[0].value)
    return found


def forbidden_imports(root: Path) -> list[str]:
    """One line for each import that the table does not allow."""
    faults = []
    for name, path in modules(root):
        room = room_of(name)
        allowed = ALLOWED.get(room, frozenset())
        for target in sorted(imported(name, path)):
            if target.partition(".")[0] not in HELD_APART:
                continue
            other = room_of(target)
            # Plain `exporters` is only the folder; a room below it shows as a name of its own.
            if other not in (room, "exporters") and other not in allowed:
                faults.append(f"{name} imports {target}")
    return faults


def without_docstring(root: Path) -> list[str]:
    """Modules that do not say what they are for."""
    return [name for name, path in modules(root) if not ast.get_docstring(parsed(path))]


_NAME = re.compile(r"gpuglass_[a-z0-9_]*[a-z0-9]")


def metric_names(root: Path) -> list[tuple[str, str]]:
    """(path, name) of each metric in a string outside of the declarations; docstrings do not count."""
    found = []
    for _, path in modules(root):
        tree = parsed(path)
        docstrings = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        where = path.relative_to(root).as_posix()
        if where.startswith("gpuglass/families/"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in docstrings:
                text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
                if isinstance(text, str):
                    found += [(where, name) for name in _NAME.findall(text)]
    return found


def undeclared(names: set[str]) -> list[str]:
    """Names that are neither a family's nor whole words at the beginning of one (`gpuglass_process_`)."""
    return sorted(
        name
        for name in names
        if not any(known == name or known.startswith(f"{name}_") for known in catalog.BY_NAME)
    )


def too_large(root: Path, files: list[str]) -> list[str]:
    """Files above the bound."""
    return [name for name in files if (root / name).stat().st_size > MAX_FILE_BYTES]


def tracked() -> list[str]:
    """Files of the repository, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def is_reader(where: str) -> bool:
    return any(where.startswith(f"{folder}/") for folder in READERS)


# The repository


def test_rooms_import_only_what_the_table_allows() -> None:
    assert forbidden_imports(ROOT) == []


def test_the_check_has_seen_imports_between_rooms() -> None:
    seen = {
        (room_of(name), room_of(target))
        for name, path in modules(ROOT)
        for target in imported(name, path)
        if target.partition(".")[0] in HELD_APART
    }
    assert ("exporters.gpu", "gpuglass") in seen


def test_every_room_has_a_row() -> None:
    assert {room_of(name) for name, _ in modules(ROOT)} - {"exporters"} <= ALLOWED.keys()


@pytest.mark.needs("git")
def test_the_top_of_the_repository_holds_what_is_expected() -> None:
    assert {name.partition("/")[0] for name in tracked()} <= TOP


def test_the_engine_probe_is_written_for_python_3_10_as_engines_run_on_it() -> None:
    files = sorted((ROOT / "exporters/engine_probe" / PROBE).rglob("*.py"))
    assert files
    for path in files:
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))
        late = {"StrEnum", "Self", "assert_never", "tomllib", "ExceptionGroup", "TaskGroup", "UTC"}
        found = {name for node in ast.walk(parsed(path)) if (name := getattr(node, "id", None)) in late}
        assert not found, path


def test_every_module_says_what_it_is_for() -> None:
    assert without_docstring(ROOT) == []


def test_only_declarations_and_readers_of_scrapes_name_metrics() -> None:
    others = [(where, name) for where, name in metric_names(ROOT) if not is_reader(where)]
    assert [found for found in others if found[1] in catalog.BY_NAME] == []


def test_metrics_that_readers_name_are_declared() -> None:
    read = {name for where, name in metric_names(ROOT) if is_reader(where)}
    assert read & catalog.BY_NAME.keys()
    assert undeclared(read) == []


@pytest.mark.needs("git")
def test_no_file_is_too_large_for_a_repository() -> None:
    assert too_large(ROOT, tracked()) == []


# The checks


def plant(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        ("gpuglass/a.py", "import exporters.gpu", "gpuglass.a imports exporters.gpu"),
        ("gpuglass/a.py", "from exporters import gpu", "gpuglass.a imports exporters.gpu"),
        ("gpuglass/a.py", "from exporters.gpu.part import X", "gpuglass.a imports exporters.gpu.part"),
        ("gpuglass/a.py", "def f():\n    import ebpf.maps", "gpuglass.a imports ebpf.maps"),
        ("gpuglass/a.py", "if TYPE_CHECKING:\n    import dashboards", "gpuglass.a imports dashboards"),
        ("gpuglass/a.py", "importlib.import_module('ebpf')", "gpuglass.a imports ebpf"),
        ("gpuglass/demo/__init__.py", "import tests.fakes", "gpuglass.demo imports tests.fakes"),
        ("exporters/gpu/a.py", "from exporters.vllm import x", "exporters.gpu.a imports exporters.vllm"),
        ("exporters/gpu/a.py", "from .. import vllm", "exporters.gpu.a imports exporters.vllm"),
        ("exporters/gpu/a.py", "from ..vllm import x", "exporters.gpu.a imports exporters.vllm"),
        ("exporters/engine_probe/a.py", "import gpuglass", "exporters.engine_probe.a imports gpuglass"),
        (
            "exporters/gpu/a.py",
            "import gpuglass_vllm.records",
            "exporters.gpu.a imports gpuglass_vllm.records",
        ),
        ("gpuglass/a.py", "from gpuglass_vllm import x", "gpuglass.a imports gpuglass_vllm"),
        ("ebpf/a.py", "import exporters.gpu", "ebpf.a imports exporters.gpu"),
        ("otel_bridge/a.py", "import exporters.gpu", "otel_bridge.a imports exporters.gpu"),
        ("recording_rules/a.py", "from alert_rules import x", "recording_rules.a imports alert_rules"),
        ("alert_rules/a.py", "import dashboards", "alert_rules.a imports dashboards"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, path: str, text: str, fault: str) -> None:
    plant(tmp_path, path, text)
    assert fault in forbidden_imports(tmp_path)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("gpuglass/a.py", "import json, gpuglass.store\nfrom . import config\nfrom .demo import run"),
        ("exporters/gpu/a.py", "import gpuglass.store\nfrom . import part\nfrom exporters.gpu import xid"),
        ("exporters/vllm/a.py", "from gpuglass_vllm import records\nfrom gpuglass import family"),
        ("exporters/engine_probe/gpuglass_vllm/a.py", "from gpuglass_vllm import records\nfrom . import b"),
        ("otel_bridge/a.py", "from exporters.vllm import records"),
        ("alert_rules/a.py", "from recording_rules import x"),
        ("dashboards/a.py", "import alert_rules.groups, recording_rules"),
        ("ebpf/a.py", "import testsuite, gpuglass_other"),
    ],
)
def test_what_the_table_allows_is_no_fault(tmp_path: Path, path: str, text: str) -> None:
    plant(tmp_path, path, text)
    assert forbidden_imports(tmp_path) == []


def test_a_module_without_a_docstring_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "gpuglass/a.py", "# a comment\nX = 1\n")
    plant(tmp_path, "gpuglass/b.py", '"""What it is for."""\n')
    assert without_docstring(tmp_path) == ["gpuglass.a"]


def test_a_metric_named_outside_of_the_declarations_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "gpuglass/families/a.py", 'UP = "gpuglass_gpu_up"')
    plant(tmp_path, "dashboards/a.py", '"""Shows gpuglass_gpu_up."""\nQUERY = "rate(gpuglass_gpu_up[1m])"')
    plant(tmp_path, "ebpf/a.py", 'X = f"sum({y}) + gpuglass_gpus"\nY = b"gpuglass_gpu_info{"')
    assert metric_names(tmp_path) == [
        ("dashboards/a.py", "gpuglass_gpu_up"),
        ("ebpf/a.py", "gpuglass_gpu_info"),
        ("ebpf/a.py", "gpuglass_gpus"),
    ]


def test_a_name_that_nobody_declares_is_found() -> None:
    names = {"gpuglass_gpu_up", "gpuglass_process", "gpuglass_gpu_u", "gpuglass_gpu_up_total"}
    assert undeclared(names) == ["gpuglass_gpu_u", "gpuglass_gpu_up_total"]


def test_a_large_file_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "small.txt", "x" * MAX_FILE_BYTES)
    plant(tmp_path, "large.txt", "x" * (MAX_FILE_BYTES + 1))
    assert too_large(tmp_path, ["small.txt", "large.txt"]) == ["large.txt"]
