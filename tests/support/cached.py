"""Makes what tests need once per machine: a folder in the cache that appears only when complete.

In: where it is to be, and a function that fills a new folder. Out: nothing, or `BuildFailed` with what the
failing command said last.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from gpuglass.demo.distribution import locked

LOG_LINES = 12
"""How much of a failed command's output is shown."""


class BuildFailed(Exception):
    """The text holds the last lines of the command's output."""


def make_once(entry: Path, lock: str, make: Callable[[Path], Path]) -> None:
    """Make `entry` unless it is there. `make` gets an empty folder and says what of it becomes the entry.

    `lock` names a file beside it: of those who have the same, one works at a time.
    """
    with locked(entry.parent / lock):
        if entry.exists():
            return
        with tempfile.TemporaryDirectory(prefix=".new-", dir=entry.parent) as temporary:
            make(Path(temporary)).rename(entry)


def run(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
    """Run a command to its end. Raises BuildFailed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise BuildFailed("\n".join(done.stdout.splitlines()[-LOG_LINES:]))
