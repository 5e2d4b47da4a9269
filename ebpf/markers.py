"""Static probes that a library brings (USDT), as its `.note.stapsdt` section tells of them: where each one
is, which counter says that somebody listens, and where its arguments lie.

In flow notes of a file that a container may have brought, out flow plain values; what is not understood is an
`ElfError`. The format is SystemTap's (`sys/sdt.h`), version 3."""

from __future__ import annotations

import platform
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

from ebpf import elf
from ebpf.elf import ElfError

OWNER, TYPE = b"stapsdt", 3
"""Name and type of the notes."""


class Place(IntEnum):
    """Where an argument is; `enum place` of the program."""

    REGISTER = 0
    MEMORY = 1
    CONSTANT = 2


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a static probe."""

    place: Place
    register: int
    """Bytes from the beginning of the registers that the program is given."""
    offset: int
    """From the register's address, or the constant itself."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Marker:
    """One place of a static probe. Offsets are in the file."""

    provider: str
    name: str
    offset: int
    semaphore: int
    """The counter of listeners; 0: it has none."""
    arguments: tuple[str, ...]
    """As the note spells them."""


def read(fd: int, provider: str) -> list[Marker]:
    """The static probes of `provider` in a library; raises `ElfError`."""
    notes, file_offset = elf.static_probes(fd, OWNER, TYPE)
    return parse(notes, provider, file_offset)


def parse(
    notes: Iterable[tuple[int, bytes]], provider: str, file_offset: Callable[[int], int | None]
) -> list[Marker]:
    """The markers of `provider` in notes as (address of `.stapsdt.base`, content); raises `ElfError`.

    `file_offset` gives the place in the file of an address, None for one that is not in it.
    """
    found = []
    for base_now, content in notes:
        try:
            location, base, semaphore = struct.unpack_from("<QQQ", content)
            of, name, arguments, *_ = content[24:].split(b"\0")
        except (struct.error, ValueError):
            raise ElfError("a note on a static probe is cut off") from None
        if of.decode(errors="replace") != provider:
            continue
        # The library was prelinked: all addresses moved by as much as the base.
        moved = base_now - base if base_now and base else 0
        at = file_offset(location + moved)
        counter = file_offset(semaphore + moved) if semaphore else 0
        if at is None or counter is None:
            raise ElfError(f"its static probe {name.decode(errors='replace')} is outside of the file")
        spelled = tuple(_ONE.findall(arguments[:_MAX_SPELLED].decode(errors="replace")))
        found.append(Marker(provider, name.decode(errors="replace"), at, counter, spelled))
    return found


def _x86_registers() -> dict[str, int]:
    """Offsets in `struct registers` by each name of a register's whole or low part."""
    order = (
        *("r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di"),
        *("orig_ax", "ip", "cs", "flags", "sp"),
    )
    at = {name: 8 * index for index, name in enumerate(order)}
    found: dict[str, int] = {}
    for name in ("ax", "bx", "cx", "dx"):
        found |= dict.fromkeys((f"r{name}", f"e{name}", name, f"{name[0]}l"), at[name])
    for name in ("si", "di", "bp", "sp"):
        found |= dict.fromkeys((f"r{name}", f"e{name}", name, f"{name}l"), at[name])
    for number in range(8, 16):
        found |= dict.fromkeys((f"r{number}{part}" for part in ("", "d", "w", "b")), at[f"r{number}"])
    return found


_REGISTERS: Mapping[str, Mapping[str, int]] = {
    "x86_64": _x86_registers(),
    "aarch64": {
        **{f"{kind}{number}": 8 * number for number in range(31) for kind in "xw"},
        **{"sp": 8 * 31},
    },
}
_ONE = re.compile(r"(?:\[[^\]]*\]|\S)+")
"""One argument: arm64 spells memory with a space in brackets."""
_MAX_SPELLED = 1024
_SIZE = r"(?P<size>-?[1248])@"
_NUMBER = r"-?(?:0x[0-9a-f]{1,16}|0|[1-9][0-9]{0,18})"
_SPELLINGS: Mapping[str, tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]] = {
    "x86_64": (
        re.compile(_SIZE + r"%(?P<register>[a-z0-9]+)"),
        re.compile(_SIZE + rf"(?P<offset>{_NUMBER})?\(%(?P<register>[a-z0-9]+)\)"),
        re.compile(_SIZE + rf"\$(?P<offset>{_NUMBER})"),
    ),
    "aarch64": (
        re.compile(_SIZE + r"(?P<register>[xw][0-9]+|sp)"),
        re.compile(_SIZE + rf"\[(?P<register>x[0-9]+|sp)(?:, *(?P<offset>{_NUMBER}))?\]"),
        re.compile(_SIZE + rf"(?P<offset>{_NUMBER})"),
    ),
}


def argument(spelled: str, machine: str = platform.machine()) -> Argument:
    """Where `-8@%rax`, `8@-56(%rbp)` or `4@$1` is; raises `ElfError` for what is spelled otherwise."""
    for place, pattern in zip(Place, _SPELLINGS[machine], strict=True):
        match = pattern.fullmatch(spelled)
        if match is None:
            continue
        found = match.groupdict()
        register = 0
        if place is not Place.CONSTANT:
            at = _REGISTERS[machine].get(found["register"])
            if at is None:
                break
            register = at
        offset = int(found.get("offset") or "0", 0)
        if not -(1 << 31) <= offset < 1 << 31:
            break
        return Argument(place, register, offset, abs(int(found["size"])))
    raise ElfError(f"the argument {spelled} of a static probe is not understood")
