"""From a stack's addresses to names: module and offset, and the nearest exported function where there is one.

A process's maps are read when a stack of it is first named, so a process that has gone leaves bare addresses.
All tables are bounded."""

from __future__ import annotations

import bisect
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from ebpf import elf
from gpuglass.procfs import ProcFs, clean_name

_LINE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ..x. ([0-9a-f]+) \S+ ([0-9]+) +(/[^\n]*)$", re.MULTILINE)
_MAPS_LIMIT = 4 << 20
_PROCESSES = 64
_MODULES = 64
_MAX_FAR = 1 << 20
"""Bytes from an exported function's start beyond which its name says nothing."""


@dataclass(frozen=True, slots=True)
class _Segment:
    start: int
    end: int
    offset: int
    inode: int
    path: str


class Names:
    """Names frames. Used by one thread."""

    def __init__(self, proc: ProcFs) -> None:
        self._proc = proc
        self._segments: OrderedDict[int, list[_Segment]] = OrderedDict()
        self._functions: OrderedDict[tuple[int, str], tuple[list[int], list[str]]] = OrderedDict()

    def frames(self, id: int, pid: int, addresses: Sequence[int]) -> list[str]:
        """One line a frame; `id` is the process's id in the ledger."""
        segments = self._segments.get(id)
        if segments is None or any(not self._at(segments, address) for address in addresses):
            segments = self._read(pid) or segments or []
            self._segments[id] = segments
            while len(self._segments) > _PROCESSES:
                self._segments.popitem(last=False)
        return [self._name(pid, self._at(segments, address), address) for address in addresses]

    def forget(self, id: int) -> None:
        """A life has ended."""
        self._segments.pop(id, None)

    def _read(self, pid: int) -> list[_Segment]:
        raw = self._proc.read(pid, "maps", _MAPS_LIMIT) or b""
        return [
            _Segment(int(a, 16), int(b, 16), int(o, 16), int(inode), os.fsdecode(path))
            for a, b, o, inode, path in _LINE.findall(raw)
        ]

    @staticmethod
    def _at(segments: Sequence[_Segment], address: int) -> _Segment | None:
        index = bisect.bisect_right(segments, address, key=lambda segment: segment.start) - 1
        return segments[index] if index >= 0 and address < segments[index].end else None

    def _name(self, pid: int, segment: _Segment | None, address: int) -> str:
        if segment is None:
            return f"0x{address:x}"
        module = clean_name(os.fsencode(os.path.basename(segment.path)))
        offset = address - segment.start + segment.offset
        starts, names = self._exports(pid, segment)
        index = bisect.bisect_right(starts, offset) - 1
        if index >= 0 and offset - starts[index] < _MAX_FAR:
            return f"{names[index]} ({module})"
        return f"{module}+0x{offset:x}"

    def _exports(self, pid: int, segment: _Segment) -> tuple[list[int], list[str]]:
        key = (segment.inode, segment.path)
        found = self._functions.get(key)
        if found is None:
            found = ([], [])
            try:
                fd = os.open(
                    f"{self._proc.root}/{pid}/root{segment.path}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                )
            except OSError:
                return found
            try:
                by_offset = sorted((offset, name) for name, offset in elf.read(fd, (b"",)).functions.items())
                found = ([offset for offset, _ in by_offset], [name for _, name in by_offset])
            except elf.ElfError:
                pass
            finally:
                os.close(fd)
            self._functions[key] = found
            while len(self._functions) > _MODULES:
                self._functions.popitem(last=False)
        return found


def stack_id(frames: Sequence[str]) -> int:
    """A number below 2^53 that is the same for the same frames, and not 0."""
    digest = hashlib.blake2b("\0".join(frames).encode("utf-8", "replace"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) or 1
