"""What the tracer reads of a shared library: machine, exported functions with their offsets in the file,
build id, notes on static probes.

The file may be anything that a container brings: every read is bounded, and nothing is mapped into memory,
since a file that shrinks meanwhile would end the process. What is no library for this machine is an
`ElfError`."""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MACHINES = {"x86_64": 62, "aarch64": 183}
"""e_machine (elf.h)."""

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_LOAD, _NOTE = 1, 4
_DYNSYM, _NOTES = 11, 7
_FUNCTION = 2
_MAX_TABLES = 4096
_MAX_SYMBOLS = 400_000
_MAX_STRINGS = 32 << 20
_MAX_NOTES = 1 << 16
_BUILD_ID = 3


class ElfError(ValueError):
    """Not a library that can be read, or of another machine."""


@dataclass(frozen=True, slots=True)
class Library:
    """A shared library's exports."""

    functions: dict[str, int]
    """Offsets in the file by name."""
    build_id: str


@dataclass(frozen=True, slots=True)
class _Tables:
    """Where things are in a file."""

    loads: list[tuple[int, int, int]]
    """Address, offset in the file, and size of what is loaded."""
    notes: list[tuple[int, int]]
    """Offset and size of the segments with notes."""
    sections: list[tuple[int, ...]]
    names: int
    """The section with the sections' names."""

    def file_offset(self, address: int) -> int | None:
        """Where an address is in the file; None if it is not."""
        for start, offset, in_file in self.loads:
            if start <= address < start + in_file:
                return address - start + offset
        return None


def read(fd: int, prefixes: tuple[bytes, ...], machine: str = platform.machine()) -> Library:
    """Exports that begin with one of `prefixes`; raises `ElfError`."""
    tables = _tables(fd, machine)
    functions: dict[str, int] = {}
    for name, address in _exported(fd, tables.sections, prefixes):
        offset = tables.file_offset(address)
        if offset is not None:
            functions[name] = offset
    return Library(functions, _build_id(fd, tables.notes))


def static_probes(
    fd: int, owner: bytes, kind: int, machine: str = platform.machine()
) -> tuple[list[tuple[int, bytes]], Callable[[int], int | None]]:
    """Notes of an owner and kind, each with the address of the section `.stapsdt.base` (0: there is none),
    and where addresses are in the file; raises `ElfError`."""
    tables = _tables(fd, machine)
    if tables.names >= len(tables.sections):
        return [], tables.file_offset
    _, _, _, _, at, size, *_ = tables.sections[tables.names]
    names = _exactly(fd, at, min(size, _MAX_NOTES))
    base = 0
    found = []
    for name, of_kind, _, address, offset, size, *_ in tables.sections:
        if names[name : name + 15] == b".stapsdt.base\0":
            base = address
        if of_kind == _NOTES and size <= _MAX_NOTES:
            found += [
                content
                for of, note, content in _each_note(_exactly(fd, offset, size))
                if (of, note) == (owner, kind)
            ]
    return [(base, content) for content in found], tables.file_offset


def _tables(fd: int, machine: str) -> _Tables:
    header = _exactly(fd, 0, _HEADER.size)
    ident, _, of_machine, _, _, at_segments, at_sections, *rest = _HEADER.unpack(header)
    _, _, size, segments, section_size, sections, names = rest
    if ident[:6] != b"\x7fELF\x02\x01":
        raise ElfError("not a 64-bit little-endian ELF file")
    if of_machine != MACHINES.get(machine):
        raise ElfError(f"of another machine ({of_machine})")
    if size != _SEGMENT.size or segments > _MAX_TABLES or sections > _MAX_TABLES:
        raise ElfError("its tables are not as they should be")
    loads, notes = [], []
    for fields in _SEGMENT.iter_unpack(_exactly(fd, at_segments, size * segments)):
        kind, _, offset, address, _, in_file, _, _ = fields
        if kind == _LOAD:
            loads.append((address, offset, in_file))
        elif kind == _NOTE:
            notes.append((offset, in_file))
    if sections and section_size != _SECTION.size:
        raise ElfError("its sections are not as they should be")
    table = list(_SECTION.iter_unpack(_exactly(fd, at_sections, section_size * sections)))
    return _Tables(loads, notes, table, names)


def _exactly(fd: int, offset: int, size: int) -> bytes:
    try:
        data = os.pread(fd, size, offset)
    except (OSError, OverflowError, ValueError) as error:
        raise ElfError(f"cannot be read: {error}") from None
    if len(data) != size:
        raise ElfError("it is cut off")
    return data


def _exported(
    fd: int, table: list[tuple[int, ...]], prefixes: tuple[bytes, ...]
) -> Iterator[tuple[str, int]]:
    for _, kind, _, _, offset, size, link, _, _, _ in table:
        if kind != _DYNSYM or link >= len(table):
            continue
        at_strings, of_strings = table[link][4], table[link][5]
        if size > _MAX_SYMBOLS * _SYMBOL.size or size % _SYMBOL.size or of_strings > _MAX_STRINGS:
            raise ElfError("its symbols are not as they should be")
        strings = _exactly(fd, at_strings, of_strings)
        for name, info, _, section, value, _ in _SYMBOL.iter_unpack(_exactly(fd, offset, size)):
            if info & 15 == _FUNCTION and section and strings.startswith(prefixes, name):
                end = strings.find(b"\0", name, name + 256)
                if end > 0:
                    yield strings[name:end].decode("ascii", "replace"), value


def _build_id(fd: int, notes: list[tuple[int, int]]) -> str:
    for offset, size in notes:
        try:
            data = _exactly(fd, offset, min(size, _MAX_NOTES))
        except ElfError:
            continue
        for owner, kind, content in _each_note(data):
            if (owner, kind) == (b"GNU", _BUILD_ID) and len(content) <= 64:
                return content.hex()
    return ""


def _each_note(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Owner, type and content of each note."""
    at = 0
    while at + 12 <= len(data):
        of_name, of_content, kind = struct.unpack_from("<III", data, at)
        content = at + 12 + (of_name + 3 & ~3)
        yield data[at + 12 : at + 12 + of_name].rstrip(b"\0"), kind, data[content : content + of_content]
        at = content + (of_content + 3 & ~3)
