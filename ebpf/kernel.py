"""The system calls that the tracer makes: bpf(2), perf_event_open(2) for probes, pidfd_open(2).

In flow file descriptors and bytes, out flow file descriptors and bytes; what the kernel refuses is an
`OSError`. Probes are perf events of the kernel's `uprobe` device, so neither loader needs tracefs, and the
kernel takes a probe off as soon as its descriptor is closed, however the process ends."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_NUMBERS = {"x86_64": (321, 298), "aarch64": (280, 241)}
"""bpf and perf_event_open (asm/unistd.h)."""

MAP_CREATE, MAP_LOOKUP, MAP_UPDATE, MAP_DELETE, MAP_NEXT_KEY = 0, 1, 2, 3, 4
RAW_TRACEPOINT_OPEN, MAP_LOOKUP_BATCH, LINK_CREATE = 17, 24, 28
"""Commands of bpf(2) (linux/bpf.h)."""

BATCH = 4096
"""Entries of a map that are read at a time."""

BATCH_BYTES = 1 << 18
"""Bytes of their values, at most."""

_PERF_CLOEXEC = 8
_SET_BPF, _ENABLE = 0x40042408, 0x2400
UPROBE_DEVICE = Path("/sys/bus/event_source/devices/uprobe")


def syscall_numbers(machine: str = platform.machine()) -> tuple[int, int]:
    """Numbers of bpf and perf_event_open; raises `KeyError` on an architecture that is not known."""
    return _NUMBERS[machine]


def _syscall(number: int, *arguments: object) -> int:
    result: int = _LIBC.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def bpf(command: int, attributes: bytes | ctypes.Array[ctypes.c_char]) -> int:
    """One call of bpf(2)."""
    buffer = (
        ctypes.create_string_buffer(attributes, len(attributes))
        if isinstance(attributes, bytes)
        else attributes
    )
    return _syscall(syscall_numbers()[0], command, buffer, len(buffer))


def create_map(kind: int, key_size: int, value_size: int, max_entries: int, flags: int, name: str) -> int:
    """A new map's descriptor."""
    plain = struct.pack(
        "=IIIIIII16s", kind, key_size, value_size, max_entries, flags, 0, 0, name.encode()[:15]
    )
    return bpf(MAP_CREATE, plain)


class Map:
    """One map of the kernel, read and written as bytes."""

    def __init__(self, fd: int, key_size: int, value_size: int, max_entries: int) -> None:
        self.fd = fd
        self.key_size = key_size
        self.value_size = value_size
        self.max_entries = max_entries

    def get(self, key: bytes) -> bytes | None:
        """A value; None if there is none."""
        of_key = ctypes.create_string_buffer(key, self.key_size)
        value = ctypes.create_string_buffer(self.value_size)
        try:
            bpf(MAP_LOOKUP, self._element(of_key, value))
        except FileNotFoundError:
            return None
        return value.raw

    def set(self, key: bytes, value: bytes) -> None:
        """Store a value, new or not."""
        of_key = ctypes.create_string_buffer(key, self.key_size)
        of_value = ctypes.create_string_buffer(value, self.value_size)
        bpf(MAP_UPDATE, self._element(of_key, of_value))

    def delete(self, key: bytes) -> bool:
        """Remove a key; False if it was not there."""
        of_key = ctypes.create_string_buffer(key, self.key_size)
        try:
            bpf(MAP_DELETE, struct.pack("=IIQ", self.fd, 0, ctypes.addressof(of_key)))
        except FileNotFoundError:
            return False
        return True

    def _element(self, key: ctypes.Array[ctypes.c_char], value: ctypes.Array[ctypes.c_char]) -> bytes:
        return struct.pack("=IIQQQ", self.fd, 0, ctypes.addressof(key), ctypes.addressof(value), 0)

    def batches(self) -> Iterator[tuple[memoryview, memoryview]]:
        """Keys and values, concatenated, some thousand at a time; what changes meanwhile may come or not."""
        count = max(min(BATCH, BATCH_BYTES // self.value_size, self.max_entries), 16)
        position: ctypes.Array[ctypes.c_char] | None = None
        while True:
            keys = ctypes.create_string_buffer(count * self.key_size)
            values = ctypes.create_string_buffer(count * self.value_size)
            after = ctypes.create_string_buffer(max(self.key_size, 8))
            attributes = ctypes.create_string_buffer(
                struct.pack(
                    "=QQQQIIQQ",
                    ctypes.addressof(position) if position is not None else 0,
                    ctypes.addressof(after),
                    ctypes.addressof(keys),
                    ctypes.addressof(values),
                    count,
                    self.fd,
                    0,
                    0,
                ),
                56,
            )
            done = False
            try:
                bpf(MAP_LOOKUP_BATCH, attributes)
            except FileNotFoundError:
                done = True
            except OSError as error:
                # One bucket holds more than fits: once more with more room.
                if error.errno != errno.ENOSPC or count >= self.max_entries:
                    raise
                count = min(2 * count, self.max_entries)
                continue
            (found,) = struct.unpack_from("=I", attributes, 32)
            if found:
                yield (
                    memoryview(keys)[: found * self.key_size],
                    memoryview(values)[: found * self.value_size],
                )
            if done:
                return
            position = after

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)


def attach_raw_tracepoint(program_fd: int, name: str) -> int:
    """Run a program at a kernel tracepoint; the descriptor's close ends it."""
    of_name = ctypes.create_string_buffer(name.encode())
    return bpf(RAW_TRACEPOINT_OPEN, struct.pack("=QII", ctypes.addressof(of_name), program_fd, 0))


UPROBE_MULTI = 48
"""Attach type of a program that one link puts at many places of a file (BPF_TRACE_UPROBE_MULTI)."""
_MULTI_SINCE = (6, 6)


def has_uprobe_multi(version: tuple[int, int]) -> bool:
    """Whether a kernel has such links. They go in a moment; perf events are taken off one by one, some 80 ms
    each."""
    return version >= _MULTI_SINCE


def attach_uprobes(
    program_fd: int,
    path: str,
    offsets: Sequence[int],
    at_return: bool,
    counters: Sequence[int] = (),
    cookies: Sequence[int] = (),
) -> int:
    """Run a program, loaded for `UPROBE_MULTI`, at a file's offsets; the descriptor's close ends it.

    `counters` are offsets of the static probes' counters of listeners, which the kernel keeps; `cookies` are
    what the program is told of each place."""
    of_path = ctypes.create_string_buffer(os.fsencode(path))
    of_offsets, of_counters, of_cookies = (
        (ctypes.c_uint64 * len(values))(*values) for values in (offsets, counters, cookies)
    )
    where = (
        ctypes.addressof(of_path),
        ctypes.addressof(of_offsets),
        ctypes.addressof(of_counters) if counters else 0,
        ctypes.addressof(of_cookies) if cookies else 0,
        len(offsets),
        int(at_return),
        0,
        0,
    )
    return bpf(LINK_CREATE, struct.pack("=IIIIQQQQIIII", program_fd, 0, UPROBE_MULTI, 0, *where))


def uprobe_type() -> int:
    """The number of the kernel's `uprobe` device; raises `OSError` where it has none."""
    return int((UPROBE_DEVICE / "type").read_text())


def attach_uprobe(program_fd: int, path: str, offset: int, at_return: bool, kind: int) -> int:
    """Run a program at a file's offset, in whichever process it is mapped; the descriptor's close ends it.

    `kind` is `uprobe_type()`.
    """
    of_path = ctypes.create_string_buffer(os.fsencode(path))
    # struct perf_event_attr up to config2; its `size` of 112 is the fifth version's, which 4.1 knew.
    attributes = struct.pack(
        "=IIQQQQQIIQQ",
        *(kind, 112, int(at_return), 0, 0, 0, 0, 0, 0),
        *(ctypes.addressof(of_path), offset),
    ).ljust(112, b"\0")
    buffer = ctypes.create_string_buffer(attributes, 112)
    minus_one = ctypes.c_int(-1)
    event = _syscall(syscall_numbers()[1], buffer, minus_one, 0, minus_one, ctypes.c_ulong(_PERF_CLOEXEC))
    try:
        fcntl.ioctl(event, _SET_BPF, program_fd)
        fcntl.ioctl(event, _ENABLE, 0)
    except OSError:
        os.close(event)
        raise
    return event


def close_together(fds: Iterable[int]) -> None:
    """Take probes off. Each close waits until no processor runs the probe; together they wait once."""
    # Plain threads: concurrent.futures would take a megabyte for this.
    closing = [threading.Thread(target=os.close, args=(fd,)) for fd in fds]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()


def possible_cpus() -> int:
    """Number of processors for which a per-CPU map has values."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return max(int(part.rpartition("-")[2]) for part in text.split(",")) + 1
