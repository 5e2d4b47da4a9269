"""Loads the object that was compiled ahead, through libbpf by ctypes: no compiler, headers or BTF of the
kernel needed.

The object holds no relocation against kernel types; its own BTF only describes its maps, which are replaced
by those that are handed in. Once the programs are in the kernel their descriptors are kept and libbpf's copy
is freed."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ebpf.kernel import UPROBE_MULTI
from ebpf.layout import EVENT
from ebpf.loaders import RAW_TRACEPOINTS, Loaded, LoaderError

LIBRARY = "libbpf.so.1"
_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SAMPLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_VERIFIER_LOG = 1 << 16


_LIBC = ctypes.CDLL(None)
_said: list[str] = []
"""The last lines that libbpf printed."""


def _listen(level: int, form: bytes, arguments: int) -> int:
    if level == 0:  # warnings; the verifier's log is part of one
        line = ctypes.create_string_buffer(_VERIFIER_LOG)
        _LIBC.vsnprintf(line, ctypes.c_size_t(len(line)), form, ctypes.c_void_p(arguments))
        _said.append(line.value.decode(errors="replace"))
        del _said[:-8]
    return 0


_LISTENER = _PRINT(_listen)


def _library(path: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(path, use_errno=True)
    except OSError as error:
        raise LoaderError(f"{LIBRARY} cannot be loaded ({error}): apt-get install libbpf1") from None
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("bpf_object__open_file", pointer, (text, pointer)),
        ("bpf_object__find_map_by_name", pointer, (pointer, text)),
        ("bpf_object__next_program", pointer, (pointer, pointer)),
        ("bpf_object__load", ctypes.c_int, (pointer,)),
        ("bpf_object__close", None, (pointer,)),
        ("bpf_map__reuse_fd", ctypes.c_int, (pointer, ctypes.c_int)),
        ("bpf_program__name", text, (pointer,)),
        ("bpf_program__fd", ctypes.c_int, (pointer,)),
        ("bpf_program__set_autoload", ctypes.c_int, (pointer, ctypes.c_bool)),
        ("bpf_program__set_expected_attach_type", ctypes.c_int, (pointer, ctypes.c_int)),
        ("libbpf_set_print", pointer, (pointer,)),
        ("ring_buffer__new", pointer, (ctypes.c_int, _SAMPLE, pointer, pointer)),
        ("ring_buffer__consume", ctypes.c_int, (pointer,)),
        ("ring_buffer__free", None, (pointer,)),
    ):
        try:
            function = getattr(library, name)
        except AttributeError:
            raise LoaderError(f"{path} lacks {name}: libbpf 1.0 or newer is needed") from None
        function.restype, function.argtypes = result, arguments
    return library


def _reason(code: int) -> str:
    return os.strerror(abs(code))


def load(
    object_file: Path,
    maps: Mapping[str, int],
    wanted: frozenset[str],
    multi: bool,
    library: str = LIBRARY,
) -> Loaded:
    """Load the programs of `object_file` that are wanted; raises `LoaderError`."""
    if not object_file.is_file():
        raise LoaderError(f"{object_file} is not there: build it with `make bpf`, or use --loader bcc")
    libbpf = _library(library)
    libbpf.libbpf_set_print(ctypes.cast(_LISTENER, ctypes.c_void_p))
    opened = libbpf.bpf_object__open_file(os.fsencode(object_file), None)
    if not opened:
        raise LoaderError(f"{object_file}: libbpf cannot read it: {_reason(ctypes.get_errno())}")
    try:
        for name, fd in maps.items():
            found = libbpf.bpf_object__find_map_by_name(opened, f"{name}_map".encode())
            if not found:
                raise LoaderError(
                    f"{object_file}: has no map {name}: it is of another version, run `make bpf`"
                )
            if error := libbpf.bpf_map__reuse_fd(found, fd):
                raise LoaderError(f"{object_file}: map {name}: {_reason(error)}")
        programs = _programs(libbpf, opened)
        if missing := wanted - programs.keys():
            raise LoaderError(
                f"{object_file}: has no program {min(missing)}: it is of another version, run `make bpf`"
            )
        for name, program in programs.items():
            libbpf.bpf_program__set_autoload(program, name in wanted)
            if multi and name not in RAW_TRACEPOINTS:
                libbpf.bpf_program__set_expected_attach_type(program, UPROBE_MULTI)
        if error := libbpf.bpf_object__load(opened):
            raise LoaderError(_refusal(object_file, error))
        fds = {name: os.dup(libbpf.bpf_program__fd(programs[name])) for name in wanted}
    finally:
        libbpf.bpf_object__close(opened)
    for fd in fds.values():
        os.set_inheritable(fd, False)
    return Loaded("core", fds, lambda fd, callback: _Ring(libbpf, fd, callback))


def _programs(libbpf: ctypes.CDLL, opened: int) -> dict[str, int]:
    found: dict[str, int] = {}
    program = libbpf.bpf_object__next_program(opened, None)
    while program:
        found[libbpf.bpf_program__name(program).decode()] = program
        program = libbpf.bpf_object__next_program(opened, program)
    return found


def _refusal(object_file: Path, error: int) -> str:
    if -error == errno.EPERM:
        return (
            f"{object_file}: the kernel refuses it ({_reason(error)}): "
            "run as root, or with CAP_BPF and CAP_PERFMON"
        )
    return f"{object_file}: the kernel refuses it: {_reason(error)}; {_verdict()}"


def _verdict() -> str:
    """The verifier's last words, from what libbpf printed."""
    lines = [
        line for text in _said for line in text.splitlines() if line and not line.startswith("processed ")
    ]
    return " / ".join(line.strip() for line in lines[-8:])[-400:]


class _Ring:
    """libbpf's reader."""

    def __init__(self, libbpf: ctypes.CDLL, fd: int, callback: Callable[[bytes], None]) -> None:
        def sample(_context: int, data: int, size: int) -> int:
            if size >= EVENT.size:
                callback(ctypes.string_at(data, EVENT.size))
            return 0

        self._libbpf = libbpf
        self._sample = _SAMPLE(sample)
        self._ring = libbpf.ring_buffer__new(fd, self._sample, None, None)
        if not self._ring:
            raise LoaderError(f"the events' ring cannot be read: {_reason(ctypes.get_errno())}")

    def consume(self) -> int:
        return max(int(self._libbpf.ring_buffer__consume(self._ring)), 0)

    def close(self) -> None:
        if self._ring:
            self._libbpf.ring_buffer__free(self._ring)
            self._ring = None
