"""NVIDIA's own CUDA runtime libraries, from PyPI: 6 MB, installed once per machine, loaded without a GPU.

In: the pinned list in tests/tools/cudart. Out: a folder in the cache with `libcudart.so.12` and
`libcudart.so.13`; it appears only when complete.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from gpuglass.demo.distribution import cache_folder, locked
from tests.support.tools import LOG_LINES, MODULES, BuildFailed

LIST = MODULES / "cudart" / "requirements.txt"


def entry() -> Path:
    """The cache folder that holds the packages, or will."""
    return cache_folder() / "tools" / f"cudart-{hashlib.sha256(LIST.read_bytes()).hexdigest()[:16]}"


def libraries() -> list[Path]:
    """The libraries, oldest version first; empty before `install`."""
    return sorted(entry().rglob("libcudart.so.*"), key=lambda path: int(path.suffix[1:]))


def install() -> None:
    """Install them unless they are there. Raises BuildFailed."""
    with locked(entry().parent / ".cudart.lock"):
        if entry().exists():
            return
        with tempfile.TemporaryDirectory(prefix=".new-", dir=entry().parent) as temporary:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:"),
                    *("--quiet", "--target", f"{temporary}/packages", "-r", str(LIST)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                raise BuildFailed("\n".join(done.stdout.splitlines()[-LOG_LINES:]))
            Path(temporary, "packages").rename(entry())
