"""Builds the fake GPU driver library from its C sources.

In flow the sources beside this file and a C compiler, out flows the path of a ``libnvidia-ml.so.1``, compiled
once for each state of the sources and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

LIBRARY = "libnvidia-ml.so.1"
FLAGS = (
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"),
    *("-shared", "-fPIC", "-pthread", f"-Wl,-soname,{LIBRARY}"),
)
SOURCES = Path(__file__).parent


class BuildError(RuntimeError):
    """The library cannot be compiled here."""


def compiler() -> list[str]:
    """$CC, else the first C compiler found."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    wanted = given[0] if given else "cc, gcc or clang"
    raise BuildError(f"no C compiler ({wanted}) for the fake GPU driver: install the package gcc")


def cache_folder() -> Path:
    own = os.environ.get("GPUGLASS_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gpuglass"


def build(old: bool = False, extra_flags: tuple[str, ...] = ()) -> Path:
    """Path of the library; ``old``: one that exports only what a driver of about version 450 to 470 had."""
    command = [*compiler(), *FLAGS, *extra_flags, *(["-DFAKE_NVML_OLD=1"] if old else [])]
    digest = hashlib.sha256("\0".join(command).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = cache_folder() / f"fake-nvml-{digest.hexdigest()[:16]}"
    library = folder / LIBRARY
    if not library.exists():
        _compile(command, library)
    return library


def _compile(command: list[str], library: Path) -> None:
    """Another process may build the same at the same time: each renames a finished file into place."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        made = Path(work) / LIBRARY
        sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
        done = subprocess.run([*command, *sources, "-o", str(made), "-lm"], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"the fake GPU driver does not compile:\n{done.stderr}")
        os.replace(made, library)
