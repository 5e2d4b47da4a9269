"""Builds the Go tools that tests use, each from a module of its own, once per machine.

In: `tests/tools/NAME/go.mod` and `go.sum`, which pin the tool, and its row in `TOOLS`. Out: executable
files in the cache folder, in one entry per tool, pinned content, flags and Go version; an entry appears
only when complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gpuglass.demo.distribution import cache_folder
from tests.support.cached import make_once, run

MODULES = Path(__file__).parents[1] / "tools"
COMMON_FLAGS = ("-mod=readonly", "-trimpath", "-ldflags=-s -w")


@dataclass(frozen=True, slots=True)
class GoTool:
    """A module below tests/tools whose `tool` directives name the programs."""

    name: str
    programs: tuple[str, ...]
    flags: tuple[str, ...] = ()
    modules: Path = MODULES

    def entry(self) -> Path:
        """The cache folder that holds the programs, or will; needs `go`."""
        module = self.modules / self.name
        go = subprocess.run(["go", "version"], cwd=module, capture_output=True, text=True, check=True).stdout
        content = (module / "go.mod").read_bytes() + (module / "go.sum").read_bytes()
        key = hashlib.sha256(repr((go, content, COMMON_FLAGS, self.flags)).encode()).hexdigest()[:16]
        return cache_folder() / "tools" / f"{self.name}-{key}"

    def program(self, name: str) -> Path | None:
        """The built program, or None before `build`."""
        if not shutil.which("go"):
            return None
        path = self.entry() / name
        return path if path.exists() else None

    def build(self) -> None:
        """Builds all programs unless they are there. Raises BuildFailed.

        One build at a time: each takes all cores, and two at once only take the memory of both.
        """

        def make(folder: Path) -> Path:
            # Static: needs no C compiler, runs anywhere.
            run(
                *("go", "build", *COMMON_FLAGS, *self.flags, "-o", f"{folder}/bin/", "tool"),
                cwd=self.modules / self.name,
                env=os.environ | {"CGO_ENABLED": "0"},
            )
            return folder / "bin"

        make_once(self.entry(), ".lock", make)


PROMETHEUS = GoTool(
    "prometheus",
    ("prometheus", "promtool"),
    # Static, file and http discovery are always in; every other one would more than double the build.
    ("-tags=remove_all_sd,enable_kubernetes_sd",),
)

JAEGER = GoTool("jaeger", ("jaeger",))

ALERTMANAGER = GoTool("alertmanager", ("alertmanager", "amtool"))

DASHBOARD_LINTER = GoTool("dashboard-linter", ("dashboard-linter",))

PINT = GoTool("pint", ("pint",))

TOOLS = {tool.name: tool for tool in (PROMETHEUS, ALERTMANAGER, DASHBOARD_LINTER, JAEGER, PINT)}
