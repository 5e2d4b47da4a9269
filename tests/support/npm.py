"""Installs what tests need from npm, once per machine.

In: `tests/tools/NAME/package.json` and `package-lock.json`, which pin content by its hash. Out: a folder
in the cache with `node_modules`; it appears only when complete.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gpuglass.demo.distribution import cache_folder, locked
from tests.support.tools import LOG_LINES, MODULES, BuildFailed

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
        entry = self.entry()
        with locked(entry.parent / f".{self.name}.lock"):
            if entry.exists():
                return
            with tempfile.TemporaryDirectory(prefix=".new-", dir=entry.parent) as temporary:
                work = Path(temporary, "modules")
                work.mkdir()
                for file in FILES:
                    shutil.copy(MODULES / self.name / file, work)
                done = subprocess.run(
                    ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                    cwd=work,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                if done.returncode:
                    raise BuildFailed("\n".join(done.stdout.splitlines()[-LOG_LINES:]))
                work.rename(entry)


GRAFANA_SCHEMA = NpmModules("grafana-schema")
