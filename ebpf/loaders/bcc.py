"""Compiles the program on the node with the BPF compiler collection, for machines without a prebuilt object
and for people who add probes.

The real bcc is the distribution's (`python3-bpfcc`) and lives in its dist-packages; the package of that name
on PyPI is something else and is never imported. bcc wants a kernel's headers. Probes of user space do with
those of another kernel, so the usual places are searched and what is found is laid out, as links in a
temporary folder, in the way that bcc expects."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ebpf.kernel import UPROBE_MULTI
from ebpf.layout import EVENT
from ebpf.loaders import RAW_TRACEPOINTS, Loaded, LoaderError

DIST_PACKAGES = (Path("/usr/lib/python3/dist-packages"), Path("/usr/lib/python3.13/site-packages"))
_ARCHITECTURE = {"x86_64": "x86", "aarch64": "arm64"}
_SOURCE_VARIABLE = "BCC_KERNEL_SOURCE"
_DEBIAN = re.compile(r"linux-headers-(.+)-(?:amd64|arm64|cloud-amd64|cloud-arm64)\Z")


def load(source: Path, maps: Mapping[str, int], wanted: frozenset[str], multi: bool) -> Loaded:
    """Compile `source` and load the programs that are wanted; raises `LoaderError`."""
    module = import_bcc()
    flags = ["-DFOR_BCC=1", f"-I{source.parent}", *(f"-DMAP_{name}={fd}" for name, fd in maps.items())]
    text = source.read_bytes()
    with headers() as variables, _environment(variables), _captured() as said:
        try:
            compiled = module.BPF(text=text, cflags=flags)
            fds = {}
            for name in wanted:
                is_tracepoint = name in RAW_TRACEPOINTS
                kind = module.BPF.RAW_TRACEPOINT if is_tracepoint else module.BPF.KPROBE
                attach_type = UPROBE_MULTI if multi and not is_tracepoint else -1
                fds[name] = os.dup(compiled.load_func(name.encode(), kind, attach_type=attach_type).fd)
        except Exception as error:
            raise LoaderError(f"bcc: {error}: {_last_line(said())}") from None
    # The module is 100 MB of compiler; the kernel has the programs now.
    compiled.cleanup()
    for fd in fds.values():
        os.set_inheritable(fd, False)
    return Loaded("bcc", fds, lambda fd, callback: _Ring(module.lib, fd, callback))


def import_bcc(places: tuple[Path, ...] = DIST_PACKAGES) -> Any:
    """The distribution's package, whatever else is called bcc; raises `LoaderError`."""
    import importlib.machinery
    import importlib.util

    for place in places:
        folder = place / "bcc"
        if not (folder / "libbcc.py").is_file():
            continue
        loaded = sys.modules.get("bcc")
        if loaded is not None and str(loaded.__file__).startswith(str(folder)):
            return loaded
        spec = importlib.util.spec_from_file_location(
            "bcc", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            continue
        module = importlib.util.module_from_spec(spec)
        sys.modules["bcc"] = module
        try:
            spec.loader.exec_module(module)
        except (ImportError, OSError) as error:
            del sys.modules["bcc"]
            raise LoaderError(f"{folder} cannot be imported: {error}") from None
        return module
    looked = " and ".join(map(str, places))
    raise LoaderError(f"the BPF compiler collection is not in {looked}: apt-get install python3-bpfcc")


@contextmanager
def headers(root: Path = Path("/"), release: str = os.uname().release) -> Iterator[dict[str, str]]:
    """Variables that tell bcc where the headers are; raises `LoaderError` when there are none.

    Searched: what the user names, the running kernel's, those that the kernel carries, then those of any
    other kernel under /usr/src."""
    if os.environ.get(_SOURCE_VARIABLE):
        yield {}
        return
    own = root / "lib/modules" / release
    if (own / "build" / "include").is_dir() or (root / "sys/kernel/kheaders.tar.xz").exists():
        yield {}
        return
    found = sorted(path for path in (root / "usr/src").glob("linux-headers-*") if (path / "include").is_dir())
    configured = [path for path in found if (path / "include/generated/autoconf.h").is_file()]
    if not configured:
        raise LoaderError(
            f"bcc compiles on the node and needs kernel headers; looked in {own}/build, "
            f"/sys/kernel/kheaders.tar.xz and /usr/src/linux-headers-*: apt-get install "
            f"linux-headers-{release}, "
            "or those of another kernel (linux-headers-amd64 on Debian, linux-headers-generic on Ubuntu)"
        )
    with tempfile.TemporaryDirectory(prefix="gpuglass-headers-") as folder:
        _lay_out(configured[-1], _common(configured[-1]), Path(folder))
        yield {_SOURCE_VARIABLE: folder}


def _common(built: Path) -> Path:
    """Debian and Ubuntu split headers into a built part and one that is common to all flavours."""
    name = built.name
    if match := _DEBIAN.match(name):
        common = built.with_name(f"linux-headers-{match[1]}-common")
        if common.is_dir():
            return common
    generic = built.with_name(re.sub(r"-(generic|lowlatency|aws|gcp|azure|oracle)\Z", "", name))
    return generic if generic.is_dir() else built


def _lay_out(built: Path, common: Path, into: Path) -> None:
    """Links so that one folder has the headers of both parts."""
    architecture = _ARCHITECTURE.get(platform.machine(), "x86")
    for inner in ("include", f"arch/{architecture}/include"):
        target = into / inner
        target.mkdir(parents=True)
        for part in (built, common):
            for path in sorted((part / inner).iterdir()) if (part / inner).is_dir() else ():
                link = target / path.name
                if not link.exists():
                    link.symlink_to(path)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """What the compiler writes to standard error, which is the process's and not Python's."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            return file.read(1 << 16).decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines or ["it says nothing more"])[0][:300]


class _Ring:
    """bcc's reader."""

    def __init__(self, library: Any, fd: int, callback: Callable[[bytes], None]) -> None:
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)

        def sample(_context: int, data: int, size: int) -> int:
            if size >= EVENT.size:
                callback(ctypes.string_at(data, EVENT.size))
            return 0

        self._sample = kind(sample)
        self._library = ctypes.CDLL(library._name, use_errno=True)
        self._library.bpf_new_ringbuf.restype = ctypes.c_void_p
        self._library.bpf_new_ringbuf.argtypes = [ctypes.c_int, kind, ctypes.c_void_p]
        self._library.bpf_consume_ringbuf.argtypes = [ctypes.c_void_p]
        self._library.bpf_free_ringbuf.argtypes = [ctypes.c_void_p]
        self._library.bpf_free_ringbuf.restype = None
        self._ring = self._library.bpf_new_ringbuf(fd, self._sample, None)
        if not self._ring:
            raise LoaderError("the events' ring cannot be read")

    def consume(self) -> int:
        return max(int(self._library.bpf_consume_ringbuf(self._ring)), 0)

    def close(self) -> None:
        if self._ring:
            self._library.bpf_free_ringbuf(self._ring)
            self._ring = None
