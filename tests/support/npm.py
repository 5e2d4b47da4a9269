"""Installs what tests need from npm, once per machine.

In: `tests/tools/NAME/package.json` and `package-lock.json`, which pin content by its hash. Out: a folder
in the cache with `node_modules`; it appears only when complete.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from gpuglass.demo.distribution import cache_folder
from tests.support.cached import make_once, run
from tests.support.tools import MODULES

FILES = ("package.json", "package-lock.json")


@dataclass(frozen=True, slots=True)
class NpmModules:
    """A folder below tests/tools with a package list and its lock."""

    name: str

    def entry(self) -> Path:
        """The cache folder that holds `node_modules`, or will."""
        content = b"".join((MODULES / self.name / file).read_bytes() for file in FILES)
        return cache_folder() / "tools" / f"{self.name}-{hashlib.sha256(content).hexdigest()[:16]}"

    def folder(self) -> Path | None:
        """The folder, or None before `install`."""
        return entry if (entry := self.entry()).exists() else None

    def install(self) -> None:
        """Installs all packages unless they are there. Raises BuildFailed."""

        def make(folder: Path) -> Path:
            work = folder / "modules"
            work.mkdir()
            for file in FILES:
                shutil.copy(MODULES / self.name / file, work)
            run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=work)
            return work

        make_once(self.entry(), f".{self.name}.lock", make)


GRAFANA_SCHEMA = NpmModules("grafana-schema")
