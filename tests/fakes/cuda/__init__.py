"""Builds the fake CUDA driver and runtime libraries from their C sources.

In flow the sources beside this file and a C compiler, out flows a folder with `libcuda.so.1`,
`libcudart.so.12` and `libc10_cuda.so` (PyTorch's allocator with its static probes), compiled once for each
state of the sources and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from tests.fakes.nvml import BuildError, cache_folder, compiler

LIBRARY = "libcuda.so.1"
RUNTIME = "libcudart.so.12"
TENSORS = "libc10_cuda.so"
SOURCES = Path(__file__).parent
FLAGS = (
    "-std=gnu11",
    "-O1",
    "-fno-omit-frame-pointer",
    "-fno-optimize-sibling-calls",
    "-Wall",
    "-Wextra",
    "-Werror",
)
_SHARED = ("-shared", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wl,--build-id")


def build(future: bool = False) -> Path:
    """Folder of the libraries; `future`: with a version of a function that no tracer knows."""
    extra = ("-DFAKE_CUDA_FUTURE",) if future else ()
    command = [*compiler(), *FLAGS, *_SHARED, *extra]
    digest = hashlib.sha256("\0".join(command).encode())
    for source in sorted(SOURCES.glob("*.c")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = cache_folder() / f"fake-cuda-{digest.hexdigest()[:16]}"
    if not (folder / TENSORS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile([*command, f"-Wl,-soname,{LIBRARY}", str(SOURCES / "driver.c")], folder / LIBRARY)
        _compile(
            [
                *(*command, f"-Wl,-soname,{RUNTIME}", str(SOURCES / "runtime.c")),
                *(f"-L{folder}", f"-l:{LIBRARY}", "-Wl,-rpath,$ORIGIN"),
            ],
            folder / RUNTIME,
        )
        _compile([*command, f"-Wl,-soname,{TENSORS}", str(SOURCES / "tensors.c")], folder / TENSORS)
    return folder


def _compile(command: list[str], library: Path) -> None:
    """Another process may build the same at the same time: each renames a finished file into place."""
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        made = Path(work) / library.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"the fake CUDA library does not compile:\n{done.stderr}")
        os.replace(made, library)
