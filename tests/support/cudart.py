"""NVIDIA's own CUDA runtime libraries, from PyPI: 6 MB, installed once per machine, loaded without a GPU.

In: the pinned list in tests/tools/cudart. Out: a folder in the cache with `libcudart.so.12` and
`libcudart.so.13`; it appears only when complete.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from gpuglass.demo.distribution import cache_folder
from tests.support.cached import make_once, run
from tests.support.tools import MODULES

LIST = MODULES / "cudart" / "requirements.txt"


def entry() -> Path:
    """The cache folder that holds the packages, or will."""
    return cache_folder() / "tools" / f"cudart-{hashlib.sha256(LIST.read_bytes()).hexdigest()[:16]}"


def libraries() -> list[Path]:
    """The libraries, oldest version first; empty before `install`."""
    return sorted(entry().rglob("libcudart.so.*"), key=lambda path: int(path.suffix[1:]))


def install() -> None:
    """Install them unless they are there. Raises BuildFailed."""

    def make(folder: Path) -> Path:
        run(
            *(sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:"),
            *("--quiet", "--target", f"{folder}/packages", "-r", str(LIST)),
        )
        return folder / "packages"

    make_once(entry(), ".cudart.lock", make)
